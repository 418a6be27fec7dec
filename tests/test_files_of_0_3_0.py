"""What lowrank 0.3.0 wrote still loads, bit for bit; files_of_0_3_0/make.py made the files."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from files_of_0_3_0.models import ADAPTERS, CASES, FOLDER, Adapted, adapter_base, machine, plain_adapter_input
from helpers import assert_same_state
from safetensors.torch import load_file
from torch import Tensor, nn

import lowrank
from lowrank.analysis import frontier, frontier_state
from lowrank.analysis.frontier_report import FrontierReport, plan_name
from lowrank.checkpoint import stored_tensors
from lowrank.compression.timings import TimingTable, load_timings
from lowrank.errors import CheckpointError

MADE_ON = json.loads((FOLDER / "machine.json").read_text(encoding="utf-8"))
# Factorisations, and floating-point sums in another order, differ between processors in their last bits.
same_machine = pytest.mark.skipif(machine() != MADE_ON, reason=f"the files were made on {MADE_ON}, this is {machine()}")
PLANS = [*(FOLDER / name / "plan.json" for name in CASES), *sorted((FOLDER / "frontier" / "plans").iterdir())]


def group(name: str, key: str) -> dict[str, Tensor]:
    """The tensors of one group (dense, input, calibration, output, base) of a file of expectations."""
    tensors = load_file(FOLDER / f"{name}.safetensors")
    found = {path.split("/", 1)[1]: tensor for path, tensor in tensors.items() if path.startswith(f"{key}/")}
    assert found, f"{name}.safetensors holds no {key}/"
    return found


def in_order(tensors: dict[str, Tensor]) -> list[Tensor]:
    return [tensors[str(index)] for index in range(len(tensors))]


def dense(name: str) -> nn.Module:
    """The model before compression."""
    model = CASES[name].build().eval()
    incompatible = model.load_state_dict(group(name, "dense"), strict=False)
    assert not incompatible.unexpected_keys
    tied = {key for key, tensor in model.state_dict().items() if tensor.data_ptr() in pointers(model, name)}
    assert set(incompatible.missing_keys) <= tied
    return model


def pointers(model: nn.Module, name: str) -> set[int]:
    """Where the tensors lie that a file of expectations gave."""
    state = model.state_dict()
    return {state[key].data_ptr() for key in group(name, "dense") if key in state}


def load(name: str) -> nn.Module:
    """The compressed directory; a Hugging Face one without a skeleton."""
    return lowrank.load_model(FOLDER / name, None if name == "llama" else CASES[name].build)


def run(model: nn.Module, inputs: list[Tensor]) -> Tensor:
    with torch.no_grad():
        found = model(*inputs)
    return found if isinstance(found, Tensor) else found.logits


def stored(folder: Path) -> dict[str, Tensor]:
    """What a compressed directory holds, without the tensor of zero size that guards a Hugging Face one."""
    return {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if tensor.numel()}


def tolerance(expected: Tensor, *, rounded: bool) -> float:
    """What another processor may change: sums of up to 10 layers of 144 terms, and one step of int8 where inputs are rounded."""
    share = 10 * (144**0.5 + 2) * torch.finfo(expected.dtype).eps
    return float(expected.abs().max()) * (share + (1 / 127 if rounded else 0.0))


@pytest.mark.parametrize("name", CASES)
def test_tensors_load_bit_for_bit(name: str) -> None:
    assert_same_state(stored_tensors(load(name)), stored(FOLDER / name))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.exact])
def test_integer_outputs_are_equal_on_every_machine(name: str) -> None:
    assert torch.equal(run(load(name), in_order(group(name, "input"))), group(name, "output")["0"])


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_equal_to_rounding(name: str) -> None:
    expected = group(name, "output")["0"]
    actual = run(load(name), in_order(group(name, "input")))
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=tolerance(expected, rounded=CASES[name].rounded))


@same_machine
@pytest.mark.parametrize("name", CASES)
def test_outputs_are_equal_bit_for_bit_here(name: str) -> None:
    assert torch.equal(run(load(name), in_order(group(name, "input"))), group(name, "output")["0"])


@pytest.mark.parametrize("path", PLANS, ids=lambda path: str(path.relative_to(FOLDER)))
def test_plans_read_back_to_the_same_text(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert lowrank.Plan.from_json(text).to_json() == text


@pytest.mark.parametrize("name", CASES)
def test_reports_read_back_to_the_same_text(name: str) -> None:
    text = (FOLDER / name / "report.json").read_text(encoding="utf-8")
    report = lowrank.CompressionReport.from_json(text)
    report.check_totals()
    assert report.to_json() == text


@pytest.mark.parametrize("name", CASES)
def test_a_loaded_model_saves_to_the_same_tensors_and_layers(name: str, tmp_path: Path) -> None:
    from lowrank.checkpoint import save_compressed

    save_compressed(load(name), tmp_path / "again")
    assert_same_state(stored(tmp_path / "again"), stored(FOLDER / name))
    before, after = (
        json.loads((folder / "lowrank_config.json").read_text()) for folder in (FOLDER / name, tmp_path / "again")
    )
    assert before["layers"] and before["layers"] == after["layers"]
    assert before["format_version"] == after["format_version"]


def applied(name: str) -> dict[str, Tensor]:
    plan = lowrank.Plan.from_json((FOLDER / name / "plan.json").read_text(encoding="utf-8"))
    return stored_tensors(lowrank.apply_plan(dense(name), plan, in_order(group(name, "calibration"))))


@same_machine
@pytest.mark.parametrize("name", CASES)
def test_plans_give_the_same_tensors_here(name: str) -> None:
    assert_same_state(applied(name), stored(FOLDER / name))


@pytest.mark.parametrize("name", CASES)
def test_plans_give_tensors_of_the_same_names_shapes_and_dtypes(name: str) -> None:
    def described(tensors: dict[str, Tensor]) -> dict[str, Any]:
        return {key: (tensor.dtype, tensor.shape) for key, tensor in tensors.items()}

    assert described(applied(name)) == described(stored(FOLDER / name))


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_load_and_save_bit_for_bit(name: str, tmp_path: Path) -> None:
    base = adapter_base(name)
    if isinstance(base, Adapted):
        base.load_state_dict(group("adapters/base", "base"))
    model = lowrank.load_adapter(base, FOLDER / "adapters" / name).eval()
    expected = group("adapters/base", "output")[name]
    actual = run(model, [plain_adapter_input()])
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=tolerance(expected, rounded=name == "over_int8"))
    lowrank.save_adapter(model, tmp_path / "again")
    files = [FOLDER / "adapters" / name, tmp_path / "again"]
    old, new = (load_file(folder / "adapter_model.safetensors") for folder in files)
    assert_same_state(new, old)
    old_config, new_config = ((folder / "adapter_config.json").read_text(encoding="utf-8") for folder in files)
    assert new_config == old_config


@same_machine
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapted_outputs_are_equal_bit_for_bit_here(name: str) -> None:
    base = adapter_base(name)
    if isinstance(base, Adapted):
        base.load_state_dict(group("adapters/base", "base"))
    model = lowrank.load_adapter(base, FOLDER / "adapters" / name).eval()
    assert torch.equal(run(model, [plain_adapter_input()]), group("adapters/base", "output")[name])


def frontier_files(folder: Path) -> dict[str, str]:
    """The JSON of a frontier's directory."""
    return {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.json"))}


def frontier_again(folder: Path) -> FrontierReport:
    """The call that made the frontier, on a copy of its directory; a point that is measured is a failure."""
    shutil.copytree(FOLDER / "frontier", folder)
    with mock.patch.object(frontier._Run, "measure", side_effect=AssertionError("measured again")):
        return lowrank.measure_frontier(
            dense("integers"),
            calibration=in_order(group("integers", "calibration")),
            budgets=[0.03, 0.3],
            # All that there were then.
            formats=["int8", "lowrank", "lowrank-int8"],
            targets=["linear", "conv", "embedding"],
            directory=folder,
            source="integers",
            progress=False,
        )


def test_a_frontier_of_another_version_differs_in_that_alone(tmp_path: Path) -> None:
    words = f"were measured with lowrank '0.3.0' then, '{lowrank.__version__}' now; give the same again"
    with pytest.raises(CheckpointError, match=re.escape(words)):
        frontier_again(tmp_path / "frontier")


def test_a_frontier_is_taken_up_without_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Points of different versions are not mixed; all that is besides the version is as 0.3.0 wrote it.
    monkeypatch.setattr(frontier_state, "__version__", "0.3.0")
    report = frontier_again(tmp_path / "frontier")
    before = frontier_files(FOLDER / "frontier")
    kept = json.loads(before["frontier.json"])
    assert json.loads(report.to_json()) == {key: kept[key] for key in ("format_version", "points", "totals", "notes")}
    assert len(report.plans) == len(kept["points"]) > 1
    for index, plan in enumerate(report.plans):
        assert plan.to_json() == before[f"plans/{plan_name(index)}"]
    assert frontier_files(tmp_path / "frontier") == before


def test_a_frontier_reads_back_to_the_same_text() -> None:
    text = (FOLDER / "frontier" / "frontier.json").read_text(encoding="utf-8")
    kept = json.loads(text)
    report = FrontierReport.from_json(text, [])
    assert report.to_json(arguments=kept["arguments"], steps=kept["steps"]) == text


def test_a_timing_table_reads_back_to_the_same_text_and_seconds() -> None:
    path = FOLDER / "timings.json"
    text = path.read_text(encoding="utf-8")
    table = load_timings({"LOWRANK_TIMINGS": str(path)})
    assert table.to_json() == text == TimingTable.from_json(text, source="timings.json").to_json()
    # make.py's seconds: 1e-6 a row, and 1e-9 for each of outputs times rank or inputs.
    assert table.seconds("dense", None, "float32", 64, 64, 64) == pytest.approx(64e-6 + 64 * 64e-9, rel=1e-4)
    assert table.seconds("lowrank", None, "float32", 1, 64, 64, 8) == pytest.approx(1e-6 + 64 * 8e-9, rel=1e-4)


def test_only_safetensors_and_json_are_kept_and_little_of_them() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {path.suffix for path in files} == {".json", ".py", ".safetensors"}
    assert {path.name for path in files if path.suffix == ".py"} == {"make.py", "models.py"}
    assert sum(path.stat().st_size for path in files) < 400_000
