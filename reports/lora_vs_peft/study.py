"""Does a LoRA adapter train here as it does in PEFT, and at what cost? See README.md.

Run: ``python reports/lora_vs_peft/study.py`` (``--smoke`` is for CI).
"""

from __future__ import annotations

import argparse
import copy
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _shared import data as shared
from _shared import harness
from _shared.host import host

import lowrank

HERE = Path(__file__).resolve().parent
OPTIONS: dict[str, Any] = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0}
TARGETS = ["q_proj", "v_proj", "gate_proj", "down_proj"]
STEPS, ROUNDS = 50, 15
LEARNING_RATE = 3e-3


def data(smoke: bool) -> tuple[nn.Module, list[Tensor]]:
    """stories260K and batches of Shakespeare in its tokens; in the quick form an untrained Llama of two layers."""
    if smoke:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
        return LlamaForCausalLM(config).eval(), list(torch.randint(0, 64, (6, 4, 16)))
    model, tokenizer = shared.stories()
    ids = torch.tensor(tokenizer(shared.text("shakespeare/train.txt")[:400_000])["input_ids"])
    rows = ids[: len(ids) // 128 * 128].view(-1, 128)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return model, [rows[part] for part in order.split(8)]


def adapted(kind: str, model: nn.Module, folder: Path) -> nn.Module:
    """The model with an adapter: PEFT makes it and saves it untrained, both start from that file."""
    if kind == "peft":
        import peft

        torch.manual_seed(0)
        config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS, **OPTIONS)
        wrapped = peft.get_peft_model(copy.deepcopy(model), config)
        wrapped.save_pretrained(folder)
        return wrapped
    loaded = lowrank.load_adapter(copy.deepcopy(model), folder)
    lowrank.set_adapter(loaded, "default")
    return loaded


def step_of(model: nn.Module) -> Any:
    """One training step as a function of a batch; AdamW over what is trainable."""
    model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=0.0)

    def step(batch: Tensor) -> float:
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def measure(smoke: bool, steps: int, rounds: int) -> dict[str, Any]:
    """Loss curves, then seconds a step in turn, round after round."""
    model, batches = data(smoke)
    with tempfile.TemporaryDirectory() as name:
        models = {kind: adapted(kind, model, Path(name)) for kind in ("peft", "lowrank")}
    trainable = {kind: sum(p.numel() for p in m.parameters() if p.requires_grad) for kind, m in models.items()}
    run = {kind: step_of(m) for kind, m in models.items()}
    losses = {kind: [run[kind](batches[index % len(batches)]) for index in range(steps)] for kind in run}
    seconds: dict[str, list[float]] = {kind: [] for kind in run}
    for index in range(rounds):
        # First one, then the other goes first.
        for kind in sorted(run, reverse=bool(index % 2)):
            start = time.perf_counter()
            for batch in batches[:5]:
                run[kind](batch)
            seconds[kind].append((time.perf_counter() - start) / len(batches[:5]))
    ratios = [own / other for own, other in zip(seconds["lowrank"], seconds["peft"], strict=True)]
    difference = max(abs(a - b) / abs(a) for a, b in zip(losses["peft"], losses["lowrank"], strict=True))
    return {
        "trainable": trainable,
        "losses": losses,
        "largest_relative_difference": difference,
        "milliseconds": {
            kind: harness.quartiles([1e3 * value for value in values], 4) for kind, values in seconds.items()
        },
        "time_ratio": harness.quartiles(ratios, 4),
    }


def memory(kind: str, smoke: bool) -> int:
    """Peak bytes of a process that trains one of the two for ten steps."""
    options = ["--memory", kind] + (["--smoke"] if smoke else [])
    done = subprocess.run([sys.executable, __file__, *options], check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def measure_memory(kind: str, smoke: bool) -> None:
    """What :func:`memory` starts: prints the process's peak resident size."""
    model, batches = data(smoke)
    with tempfile.TemporaryDirectory() as name:
        adapted("peft", model, Path(name))
        run = step_of(adapted(kind, model, Path(name)))
    for batch in batches[:10]:
        run(batch)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def render(results: dict[str, Any]) -> str:
    """``table.md`` from ``results.json``."""
    first, last = 0, len(results["losses"]["peft"]) - 1
    lines = ["| | PEFT | lowrank |", "|---|---:|---:|"]
    for label, value in (
        ("trainable parameters", lambda kind: f"{results['trainable'][kind]:,}"),
        ("loss at the first step", lambda kind: f"{results['losses'][kind][first]:.6f}"),
        (f"loss at step {last + 1}", lambda kind: f"{results['losses'][kind][last]:.6f}"),
        (
            "ms a step, median (quartiles)",
            lambda kind: harness.middle_and_quartiles(results["milliseconds"][kind], 1),
        ),
        (
            "peak memory, MB: median of 3 processes",
            lambda kind: f"{statistics.median(results['memory'][kind]) / 1e6:.0f}",
        ),
    ):
        lines.append(f"| {label} | {value('peft')} | {value('lowrank')} |")
    low, middle, high = results["time_ratio"]
    lines += [
        "",
        f"* Largest relative difference of the losses over {last + 1} steps: {results['largest_relative_difference']:.1e}.",
        f"* Time of a step, lowrank / PEFT, in paired rounds: {middle:.3f} (quartiles {low:.3f}–{high:.3f}).",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure everything and write it."""
    parser = harness.options_of(__doc__)
    parser.add_argument("--memory", choices=("peft", "lowrank"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    if arguments.memory:
        measure_memory(arguments.memory, arguments.smoke)
        return
    folder = harness.folder_for(HERE, arguments.smoke)
    results = measure(arguments.smoke, *((10, 3) if arguments.smoke else (STEPS, ROUNDS)))
    times = 1 if arguments.smoke else 3
    results["memory"] = {kind: [memory(kind, arguments.smoke) for _ in range(times)] for kind in ("peft", "lowrank")}
    results["host"] = host("machine", "torch", "threads")
    harness.write_results(folder, results, render)
    print(render(results))
    if results["largest_relative_difference"] > 1e-4:
        raise SystemExit("the loss curves differ by more than 1e-4")


if __name__ == "__main__":
    main()
