"""Two tasks, two adapters, one int8 low-rank base: does each equal its own single run? See README.md.

Run: ``python reports/multi_task/study.py`` (``--smoke`` is for CI).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _shared import characters, harness

import lowrank

HERE = Path(__file__).resolve().parent
TASKS = ("shakespeare", "wikitext2")
STEPS, RATE, SIZE = 60, 2e-3, 0.15


def compressed_base(smoke: bool) -> tuple[nn.Module, nn.Module, dict[str, dict[str, Tensor]]]:
    """The pretrained character model, its int8 low-rank form, and the texts of both tasks."""
    if smoke:
        model = characters.gpt(len(characters.LETTERS), 1, 32).eval()
        data = {
            task: {part: (torch.arange(3000) * step) % len(characters.LETTERS) for part in ("train", "valid", "test")}
            for task, step in zip(TASKS, (1, 7), strict=True)
        }
        calibration, share = characters.stretches(data["shakespeare"]["train"], 8), 0.3
    else:
        data = characters.texts()
        model = characters.pretrained(data["pretraining"]["train"])
        calibration, share = characters.stretches(data["pretraining"]["train"], 32, 16), SIZE
    inputs = [{"input_ids": batch["input_ids"]} for batch in calibration]
    result = lowrank.compress_model(
        model, size_budget=share, calibration=inputs, formats=("lowrank-int8", "int8"), progress=False
    )
    return model, result.model, data


def train(model: nn.Module, data: dict[str, Tensor], steps: int) -> None:
    """One task's training; the same whatever else the model holds."""
    lowrank.finetune(
        model,
        characters.stretches(data["train"], 32, steps, seed=1),
        steps=steps,
        lr=RATE,
        warmup=20,
        seed=0,
        progress=False,
    )


def config() -> lowrank.LoRAConfig:
    """One adapter on every linear layer."""
    return lowrank.LoRAConfig(r=8, lora_alpha=16, target_modules="all-linear")


def measure(smoke: bool, steps: int) -> dict[str, Any]:
    """Train both adapters on one model, then each alone on a model of its own, and compare."""
    dense, base, data = compressed_base(smoke)
    codes = {name: buffer.clone() for name, buffer in base.named_buffers() if buffer.dtype == torch.int8}
    both = base
    for task in TASKS:
        torch.manual_seed(0)
        both = lowrank.add_lora(both, config(), adapter_name=task, inplace=both is not base)
        lowrank.set_adapter(both, task)
        train(both, data[task], steps)
    rows = []
    probe = characters.stretches(data[TASKS[0]]["test"], 8)[0]["input_ids"]
    for task in TASKS:
        torch.manual_seed(0)
        single = lowrank.add_lora(base, config(), adapter_name=task)
        train(single, data[task], steps)
        lowrank.set_adapter(both, task)
        with torch.no_grad():
            outputs = [model.eval()(input_ids=probe).logits for model in (both, single)]
        rows.append(
            {
                "task": task,
                "dense": characters.perplexity(dense, data[task]["test"]),
                "base": characters.perplexity(base, data[task]["test"]),
                "switched": characters.perplexity(both, data[task]["test"]),
                "single": characters.perplexity(single, data[task]["test"]),
                "largest_difference": float((outputs[0] - outputs[1]).abs().max()),
            }
        )
    kept = {name: buffer for name, buffer in both.named_buffers() if buffer.dtype == torch.int8}
    lowrank.set_adapter(both, None)
    with torch.no_grad():
        off = bool(torch.equal(both.eval()(input_ids=probe).logits, base.eval()(input_ids=probe).logits))
    same = len(kept) == len(codes) and all(any(torch.equal(b, c) for c in codes.values()) for b in kept.values())
    trainable = sum(p.numel() for n, p in both.named_parameters() if "lora_" in n) // len(TASKS)
    size = sum(tensor.nbytes for tensor in base.state_dict().values())
    return {
        "rows": rows,
        "codes_unchanged": same,
        "off_equals_base": off,
        "adapter_parameters": trainable,
        "base_bytes": size,
        "dense_bytes": sum(tensor.nbytes for tensor in dense.state_dict().values()),
    }


def render(results: dict[str, Any]) -> str:
    """``table.md`` from ``results.json``."""
    lines = [
        "| task | dense model | int8 low-rank base | its adapter, switched on | its own single run | largest difference of logits |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in results["rows"]:
        values = " | ".join(f"{row[key]:.3f}" for key in ("dense", "base", "switched", "single"))
        lines.append(f"| {row['task']} | {values} | {row['largest_difference']:.1e} |")
    lines += [
        "",
        f"Perplexity a character on text that no step saw. Base: {results['base_bytes']:,} bytes of {results['dense_bytes']:,}; "
        f"{results['adapter_parameters']:,} parameters an adapter.",
        "",
        f"* Integer codes unchanged by both trainings: {'yes' if results['codes_unchanged'] else '**no**'}.",
        f"* With both adapters off the outputs are the base's, bit for bit: {'yes' if results['off_equals_base'] else '**no**'}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write."""
    smoke = harness.options_of(__doc__).parse_args().smoke
    torch.set_num_threads(1)
    folder = harness.folder_for(HERE, smoke)
    results = measure(smoke, 3 if smoke else STEPS)
    harness.write_results(folder, results, render)
    print(render(results))


if __name__ == "__main__":
    main()
