"""How fast are the compressed linear layers next to PyTorch's own? See README.md.

Run: ``python reports/layer_speed/study.py`` (resumes where it stopped; ``--fresh`` starts anew, ``--smoke`` is for CI).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.kernels import route
from lowrank.layers import QuantizedLinear, QuantizedLowRankLayer, SVDCompressedLinear

HERE = Path(__file__).resolve().parent
# (out_features, in_features, rank): the layer, then feed-forward layers of BERT-base and MiniLM.
SHAPES = [(4096, 4096, 512), (768, 3072, 192), (384, 1536, 96)]
TOKENS = [1, 8, 128, 512]
# Speed-ups of QuantizedLowRankLayer that the project asks of itself: (out, in, rank, tokens) -> ratio.
GOALS = {(4096, 4096, 512, 1): 15.0, (4096, 4096, 512, 128): 8.0}
BASELINE = "nn.Linear float32"
CONTENDERS = (
    "nn.Linear bfloat16",
    "torch dynamic int8",
    "QuantizedLinear int8",
    "QuantizedLinear float",
    "SVDCompressedLinear float32",
    "QuantizedLowRankLayer int8",
    "QuantizedLowRankLayer float",
)


def contenders(outputs: int, inputs: int, rank: int) -> dict[str, nn.Module]:
    """The layers of one shape; values are random, since no route's time depends on them."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(inputs, outputs)
    with warnings.catch_warnings():
        # torch.ao.quantization announces its own removal; it is here as the baseline people use today.
        warnings.simplefilter("ignore")
        dynamic = torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear}, dtype=torch.qint8)

    def codes(rows: int, columns: int) -> Tensor:
        return torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=generator)

    def factored(activations: str) -> QuantizedLowRankLayer:
        scale = torch.full((rank,), 1e-6)
        return QuantizedLowRankLayer.from_tensors(
            codes(outputs, rank), codes(rank, inputs), scale, linear.bias, activations=activations
        )

    return {
        BASELINE: linear,
        "nn.Linear bfloat16": nn.Linear(inputs, outputs, dtype=torch.bfloat16),
        "torch dynamic int8": dynamic,
        "QuantizedLinear int8": QuantizedLinear.from_linear(linear),
        "QuantizedLinear float": QuantizedLinear.from_linear(linear, activations="float"),
        "SVDCompressedLinear float32": SVDCompressedLinear(inputs, outputs, rank),
        "QuantizedLowRankLayer int8": factored("int8"),
        "QuantizedLowRankLayer float": factored("float"),
    }


def seconds_of(call: Callable[[], Any], at_least: float) -> float:
    """Mean seconds of a call, over as many as fill ``at_least`` seconds."""
    count, start = 0, time.perf_counter()
    while True:
        call()
        count += 1
        spent = time.perf_counter() - start
        if spent >= at_least:
            return spent / count


def measure(outputs: int, inputs: int, rank: int, tokens: int, rounds: int, at_least: float) -> dict[str, Any]:
    """One shape at one number of tokens: every contender right after the baseline, round after round."""
    layers = contenders(outputs, inputs, rank)
    x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(1))
    given = {name: x.to(torch.bfloat16) if name.endswith("bfloat16") else x for name in layers}
    for name, layer in layers.items():
        layer(given[name])
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    ratios: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name in CONTENDERS:
            base = seconds_of(lambda: layers[BASELINE](given[BASELINE]), at_least)
            other = seconds_of(lambda name=name: layers[name](given[name]), at_least)  # type: ignore[misc]
            seconds[BASELINE].append(base)
            seconds[name].append(other)
            ratios[name].append(base / other)
    return {
        "shape": [outputs, inputs],
        "rank": rank,
        "tokens": tokens,
        "rounds": rounds,
        "microseconds": {name: round(1e6 * statistics.median(values), 1) for name, values in seconds.items()},
        "speedup": {name: _spread(values) for name, values in ratios.items()},
    }


def _spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": round(middle, 2), "lower_quartile": round(low, 2), "upper_quartile": round(high, 2)}


def host() -> dict[str, Any]:
    """What the numbers depend on."""
    model = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "route": route(),
        "torch": torch.__version__,
    }


def render(results: dict[str, Any]) -> str:
    """``table.md`` from ``results.json``."""
    about = results["host"]
    lines = [
        f"{about['cpu']}, {about['threads']} threads, {about['capability']}, torch {about['torch']}, "
        f"integer route `{about['route']}`. Speed-up over `nn.Linear` in float32: median (quartiles) of paired runs.",
        "",
        f"| shape | rank | tokens | float32, µs | {' | '.join(CONTENDERS)} |",
        f"|---|---:|---:|---:|{'---:|' * len(CONTENDERS)}",
    ]
    for case in results["cases"]:
        cells = [
            f"{s['median']:.2f} ({s['lower_quartile']:.2f}–{s['upper_quartile']:.2f})"
            for s in (case["speedup"][name] for name in CONTENDERS)
        ]
        outputs, inputs = case["shape"]
        first = f"{outputs}×{inputs} | {case['rank']} | {case['tokens']} | {case['microseconds'][BASELINE]:.0f}"
        lines.append(f"| {first} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_findings(results)]) + "\n"


def _findings(results: dict[str, Any]) -> list[str]:
    """What the numbers say to the goals, and where weight-only is slower than the layer it replaces."""
    lines = []
    for case in results["cases"]:
        shape = (*case["shape"], case["rank"])
        where = f"{shape[0]}×{shape[1]}, rank {shape[2]}, {case['tokens']} tokens"
        goal = GOALS.get((*shape, case["tokens"]))
        if goal is not None:
            got = case["speedup"]["QuantizedLowRankLayer int8"]["median"]
            verdict = "met" if got >= goal else "missed"
            lines.append(f"* Goal of {goal}× at {where}: **{verdict}**, {got:.1f}×.")
        for name in (name for name in CONTENDERS if name.endswith(" float")):
            if case["speedup"][name]["median"] < 1.0:
                lines.append(f"* {name} is slower than float32 at {where}: {case['speedup'][name]['median']:.2f}×.")
    return lines


def main() -> None:
    """Measure what is missing, write after every case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, results to a temporary folder")
    parser.add_argument("--fresh", action="store_true", help="measure everything anew")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    folder = Path(tempfile.mkdtemp(prefix="layer_speed_")) if arguments.smoke else HERE
    shapes, tokens = ([(64, 96, 16)], [1, 4]) if arguments.smoke else (SHAPES, TOKENS)
    rounds, at_least = (3, 0.001) if arguments.smoke else (15, 0.05)
    path = folder / "results.json"
    results: dict[str, Any] = {"host": host(), "cases": []}
    if path.exists() and not arguments.fresh:
        kept = json.loads(path.read_text())
        # Cases of another machine or library do not belong in one table.
        if kept["host"] == results["host"]:
            results = kept
    done = {(*case["shape"], case["rank"], case["tokens"]) for case in results["cases"]}
    for shape in shapes:
        for count in tokens:
            if (*shape, count) not in done:
                results["cases"].append(measure(*shape, count, rounds, at_least))
                path.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
                (folder / "table.md").write_text(render(results))
                print(f"{shape} {count} tokens: {results['cases'][-1]['speedup']}", flush=True)
    print(f"written to {folder}")


if __name__ == "__main__":
    main()
