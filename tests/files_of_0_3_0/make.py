"""Writes the files of this folder with lowrank 0.3.0; kept to show how they came about, not to be run again.

Run as it was, from a checkout of the present version, with one of 0.3.0 (and its compiled library) beside it::

    OMP_NUM_THREADS=1 PYTHONPATH=../lowrank-0.3.0:tests python tests/files_of_0_3_0/make.py

Reports for people (HTML, Markdown) and ``run.json`` are taken out again: loading does not read them.
"""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from files_of_0_3_0.models import ADAPTERS, CASES, FOLDER, Adapted, Case, adapter_base, machine, plain_adapter_input
from safetensors.torch import save_file
from torch import Tensor, nn

import lowrank
from lowrank.lora.model import lora_layers

UNREAD = ("report.html", "report.md", "README.md", "run.json", "frontier.html", "frontier.md")


def dense_model(case: Case) -> nn.Module:
    """The model before compression, its singular values falling, its BatchNorms as after training."""
    torch.manual_seed(3)
    model = case.build().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d)):
                left, sigma, right = torch.linalg.svd(module.weight.flatten(1), full_matrices=False)
                falling = sigma * torch.logspace(0, -1, sigma.numel())
                module.weight.copy_(((left * falling) @ right).reshape(module.weight.shape))
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.1)
    return model


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What the model's state holds, tied tensors once."""
    kept: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            kept[name] = tensor.detach().clone().contiguous()
        seen.add(tensor.data_ptr())
    return kept


def run(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """The output of one call, logits where there are several."""
    with torch.no_grad():
        found = model(*inputs)
    return (found if isinstance(found, Tensor) else found.logits).contiguous()


def write_tensors(path: Path, **groups: Mapping[str, Tensor]) -> None:
    """Write groups of tensors as one file, ``group/name``."""
    save_file({f"{group}/{name}": tensor for group, found in groups.items() for name, tensor in found.items()}, path)


def numbered(tensors: object) -> dict[str, Tensor]:
    """Tensors by their place."""
    assert isinstance(tensors, (list, tuple))
    return {str(index): tensor.contiguous() for index, tensor in enumerate(tensors)}


def drop_unread(folder: Path) -> None:
    for name in UNREAD:
        (folder / name).unlink(missing_ok=True)


def write_case(name: str, case: Case) -> None:
    """A compressed directory, and beside it what went in and what came out."""
    model = dense_model(case)
    inputs, batches = case.data(torch.Generator().manual_seed(4))
    result = lowrank.compress_model(
        model,
        size_budget=0.95,
        calibration=batches,
        overrides=dict(case.overrides),
        progress=False,
        **case.options,
    )
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    result.save(folder)
    drop_unread(folder)
    write_tensors(
        FOLDER / f"{name}.safetensors",
        dense=unique_tensors(model),
        input=numbered(inputs),
        calibration=numbered(batches),
        output={"0": run(result.model, inputs)},
    )
    print(name, {row.name: (row.format, row.rank) for row in result.report.rows}, result.report.totals["error_upper"])


def write_adapters() -> None:
    """The dense base, each adapter's directory, and the outputs."""
    folder = FOLDER / "adapters"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    torch.manual_seed(5)
    base = Adapted().eval()
    outputs = {}
    for name, options in ADAPTERS.items():
        model = adapter_base(name)
        if name != "over_int8":
            model.load_state_dict(base.state_dict())
        model = lowrank.add_lora(model, lowrank.LoRAConfig(r=2, lora_alpha=6, **options))
        with torch.no_grad():
            for layer in lora_layers(model).values():
                for parameter in layer.adapter_parameters("default"):
                    parameter.add_(0.2 * torch.randn(parameter.shape))
            if "modules_to_save" in options:
                for parameter in (parameter for parameter in model.head.parameters() if parameter.requires_grad):
                    parameter.add_(0.2 * torch.randn(parameter.shape))
        lowrank.save_adapter(model, folder / name)
        outputs[name] = run(model.eval(), (plain_adapter_input(),))
    write_tensors(folder / "base.safetensors", base=unique_tensors(base), output=outputs)


def write_frontier() -> None:
    """A measured frontier of the model "integers"."""
    folder = FOLDER / "frontier"
    shutil.rmtree(folder, ignore_errors=True)
    case = CASES["integers"]
    model = dense_model(case)
    _, batches = case.data(torch.Generator().manual_seed(4))
    report = lowrank.measure_frontier(
        model, calibration=batches, budgets=[0.03, 0.3], directory=folder, source="integers", progress=False
    )
    drop_unread(folder)
    print("frontier", [(point.label, point.size_ratio, point.error) for point in report.points])


def write_timings() -> None:
    """A table fitted to made-up seconds."""
    timings = importlib.import_module("lowrank.timings")  # where 0.3.0 had it
    points = [
        timings.Point(key, rows, out, 64, rank, 1e-6 * rows + 1e-9 * out * (rank or 64))
        for key, rank in (("dense/-/float32", None), ("int8/int8/float32", None), ("lowrank/-/float32", 8))
        for rows in (1, 64)
        for out in (32, 64, 96)
    ]
    table = timings.fit_table(points, {"cpu": "made up", "threads": 1, "route": "native"}, {"median_error": 0.125})
    (FOLDER / "timings.json").write_text(table.to_json(), encoding="utf-8")


if __name__ == "__main__":
    assert lowrank.__version__ == "0.3.0", lowrank.__version__
    torch.set_num_threads(1)
    for case_name, described in CASES.items():
        write_case(case_name, described)
    write_adapters()
    write_frontier()
    write_timings()
    (FOLDER / "machine.json").write_text(json.dumps(machine(), indent=1) + "\n", encoding="utf-8")
