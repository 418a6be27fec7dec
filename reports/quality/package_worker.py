"""One point of a real package, in an environment of its own (README): a case in and what was measured out, as JSON. See study.py.

Weights are weights alone everywhere: what a package stores is put back as floats, or runs with float activations.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from compared_models import SUBJECTS, Run, Subject
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
Case = dict[str, Any]
Outcome = tuple[Run, int]


def put_back(subject: Subject, case: Case, code: Callable[[str, nn.Module], tuple[Tensor, int]]) -> Outcome:
    """Replace every matrix of the scope by what a package makes of it; tables as the package can."""
    total = 0
    for name in subject.scopes[case["scope"]]:
        module = subject.model.get_submodule(name)
        made, size = code(name, module)
        with torch.no_grad():
            module.weight.copy_(made.view_as(module.weight))  # type: ignore[operator, union-attr, arg-type]
        total += size
    return (lambda batch: subject.run(subject.model, batch)), total + subject.others(case["scope"])


def torchao(subject: Subject, case: Case) -> Outcome:
    """IntxWeightOnlyConfig, asymmetric in groups; it keeps a byte a code whatever the bits, and here codes count at their bits."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.quant_primitives import MappingType

    dtype = getattr(torch, f"int{case['bits']}")

    def code(name: str, module: nn.Module) -> tuple[Tensor, int]:
        weight = module.weight.detach().flatten(1)  # type: ignore[operator, union-attr]
        columns = weight.shape[1]
        group = next((size for size in (case["group"], 32, 16) if columns % size == 0), columns)
        linear = nn.Linear(columns, len(weight), bias=False)
        linear.weight.data = weight.clone()
        config = IntxWeightOnlyConfig(
            weight_dtype=dtype,
            granularity=PerGroup(group),
            mapping_type=MappingType.ASYMMETRIC,
            scale_dtype=torch.float16,
        )
        holder = nn.Sequential(linear)
        quantize_(holder, config)
        kept = holder[0].weight
        groups = len(weight) * (columns // group)
        return kept.dequantize().float(), (weight.numel() * case["bits"] + groups * (16 + case["bits"])) // 8

    return put_back(subject, case, code)


def hqq(subject: Subject, case: Case) -> Outcome:
    """HQQLinear with float16 scales, bytes as it stores them (three bits are packed ten to 32)."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    def code(name: str, module: nn.Module) -> tuple[Tensor, int]:
        weight = module.weight.detach()  # type: ignore[operator, union-attr]
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = weight.clone()
        group = case["group"] if weight.numel() % case["group"] == 0 else None
        config = BaseQuantizeConfig(nbits=case["bits"], group_size=group, axis=1)
        layer = HQQLinear(linear, config, compute_dtype=torch.float16, device="cpu")
        tensors = [layer.W_q, layer.meta["scale"], layer.meta["zero"]]
        return layer.dequantize().float(), sum(each.nbytes for each in tensors)

    return put_back(subject, case, code)


def quanto(subject: Subject, case: Case) -> Outcome:
    """Weights as qint8, qint4 or qint2; groups are its own choice (128, smaller where rows are short)."""
    from optimum.quanto import QTensor, freeze, qint2, qint4, qint8, quantize

    kind = {8: qint8, 4: qint4, 2: qint2}[case["bits"]]

    def code(name: str, module: nn.Module) -> tuple[Tensor, int]:
        holder = nn.Sequential(module)
        quantize(holder, weights=kind)
        freeze(holder)
        weight = holder[0].weight
        if not isinstance(weight, QTensor):
            # Tables are left as they are.
            return module.weight.detach(), 4 * module.weight.numel()  # type: ignore[operator, union-attr, return-value, arg-type]
        return weight.dequantize().float(), inner_bytes(weight)

    return put_back(subject, case, code)


def inner_bytes(tensor: Any) -> int:
    """Bytes of what a wrapping tensor is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return int(tensor.nbytes)
    names, _ = tensor.__tensor_flatten__()
    return sum(inner_bytes(getattr(tensor, name)) for name in names)


def nncf(subject: Subject, case: Case) -> Outcome:
    """compress_weights on OpenVINO's model, every layer, float activations; bytes are those of the saved .bin."""
    import nncf as package
    import numpy as np
    import openvino as ov

    modes = package.CompressWeightsMode
    option = case["option"]
    first = subject.calibration[0]
    example = first if isinstance(first, dict) else first[:1]
    holder = subject.model
    if not isinstance(first, dict):
        converted = ov.convert_model(holder, example_input=example, input=[-1, *example.shape[1:]])
    else:
        holder.config.use_cache = False
        converted = ov.convert_model(holder, example_input=dict(example))
    names = [port.get_any_name() for port in converted.inputs]

    def fed(batch: Any) -> Any:
        if not isinstance(batch, dict):
            return batch.numpy()
        return {name: batch[name].numpy() for name in names}

    given: dict[str, Any] = {"mode": modes.INT8_ASYM}
    if case["bits"] == 4:
        given = {"mode": modes.INT4_ASYM, "ratio": 1.0, "group_size": case["group"], "all_layers": True}
        given["gptq"], given["scale_estimation"], given["awq"] = ("GPTQ" in option, "scale" in option, "AWQ" in option)
        if "," in option:
            parts = [fed(batch) for batch in subject.calibration]
            given |= {"dataset": package.Dataset(parts), "subset_size": len(parts)}
    small = package.compress_weights(converted, **given)
    with tempfile.TemporaryDirectory() as folder:
        ov.save_model(small, Path(folder) / "model.xml", compress_to_fp16=False)
        size = (Path(folder) / "model.bin").stat().st_size
    settings = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "INFERENCE_NUM_THREADS": "1"}
    compiled = ov.Core().compile_model(small, "CPU", settings)
    return (lambda batch: torch.from_numpy(np.array(compiled(fed(batch))[0]))), size


def auto_round(subject: Subject, case: Case) -> Outcome:
    """Signed gradient descent on roundings and ranges, block after block; 200 steps, its default."""
    from auto_round import AutoRound

    rows = [
        {key: value[index : index + 1] for key, value in batch.items()}
        for batch in subject.calibration
        for index in range(len(batch["input_ids"]))
    ]
    tuned = AutoRound(
        subject.model,
        tokenizer=None,
        bits=case["bits"],
        group_size=case["group"],
        sym=False,
        dataset=[row["input_ids"] for row in rows][:128],
        seqlen=64,
        nsamples=128,
        device_map="cpu",
    )
    tuned.quantize()
    total = 0
    for name in subject.scopes[case["scope"]]:
        weight = subject.weight(name)
        kept = tuned.model.get_submodule(name)
        groups = len(weight) * -(-weight.shape[1] // case["group"])
        if isinstance(kept, nn.Embedding):
            total += 4 * weight.numel()
        else:
            total += (weight.numel() * case["bits"] + groups * (16 + case["bits"])) // 8
    return (lambda batch: subject.run(tuned.model, batch)), total + subject.others(case["scope"])


PACKAGES: dict[str, Callable[[Subject, Case], Outcome]] = {
    "torchao": torchao,
    "hqq": hqq,
    "optimum-quanto": quanto,
    "NNCF": nncf,
    "auto-round": auto_round,
}


def main() -> None:
    """Answer one case."""
    torch.set_num_threads(1)
    case: Case = json.loads(sys.argv[1])
    # What packages print is not the answer.
    answer = os.dup(1)
    os.dup2(2, 1)
    subject = SUBJECTS[case["model"]](case["seed"])
    _ = subject.reference
    dense = subject.dense_bytes(case["scope"])
    start = time.perf_counter()
    run, size = PACKAGES[case["method"]](subject, case)
    seconds = time.perf_counter() - start
    found = {"share": size / dense, **subject.measured(run), "seconds": round(seconds, 1)}
    os.write(answer, (json.dumps(found) + "\n").encode())


if __name__ == "__main__":
    main()
