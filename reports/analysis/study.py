"""What does an analysis cost, next to WeightWatcher's, and are its singular values right? See README.md.

Run: ``python reports/analysis/study.py`` (``--fresh`` starts anew, ``--smoke`` is for CI and needs no WeightWatcher).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _shared import data, harness
from _shared.host import host

from lowrank import analyze_model, analyze_weight

HERE = Path(__file__).resolve().parent
CACHE = HERE / ".cache"
ROUNDS = 5
# What the project asks of itself: seconds for all 2-D weights of MiniLM, and how many times faster than WeightWatcher.
MOST_SECONDS, LEAST_SPEEDUP = 1.5, 3.0


def weights_of_minilm() -> dict[str, Tensor]:
    """All 2-D weights of all-MiniLM-L6-v2, embeddings included."""
    tensors = load_file(data.minilm_path() / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if tensor.ndim == 2 and tensor.is_floating_point()}


def as_module(weights: dict[str, Tensor]) -> nn.Module:
    """The weights as linear layers, as WeightWatcher gets them."""
    layers = nn.Sequential()
    for index, name in enumerate(sorted(weights)):
        layer = nn.Linear(weights[name].shape[1], weights[name].shape[0], bias=False)
        layer.weight = nn.Parameter(weights[name], requires_grad=False)
        layers.add_module(str(index), layer)
    return layers


class WeightWatcher:
    """The other tool in a process and environment of its own, made on first use."""

    def __init__(self, weights: dict[str, Tensor], threads: int) -> None:
        python = CACHE / "ww" / "bin" / "python"
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(python.parents[1])], check=True)
            subprocess.run([str(python), "-m", "pip", "install", "-q", "weightwatcher", "torch"], check=True)
        file = CACHE / "weights.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, file)
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
        command = [str(python), str(HERE / "weightwatcher_worker.py"), str(file), str(threads)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.versions = self._answer()

    def run(self) -> dict[str, Any]:
        """One ``analyze()`` with default settings: seconds, and how many layers it took."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        raise RuntimeError("weightwatcher's process ended without an answer")


def time_them(weights: dict[str, Tensor], threads: int, rounds: int, other: WeightWatcher | None) -> dict[str, Any]:
    """Both tools in turn, after one run each that is not counted."""
    module = as_module(weights)
    ours: list[float] = []
    theirs: list[float] = []
    layers = 0
    for turn in range(rounds + 1):
        start = time.perf_counter()
        report = analyze_model(module, progress=False)
        seconds = time.perf_counter() - start
        found: dict[str, Any] = other.run() if other is not None else {"seconds": seconds, "layers": 0}
        if turn:
            ours.append(seconds)
            theirs.append(found["seconds"])
            layers = found["layers"]
    return {
        "layers": report.totals["analysed"],
        "parameters": report.totals["parameters_analysed"],
        "threads": threads,
        "rounds": rounds,
        "lowrank_seconds": [round(value, 4) for value in ours],
        "weightwatcher_seconds": [round(value, 4) for value in theirs],
        "weightwatcher_layers": layers,
    }


def accuracy(weights: dict[str, Tensor]) -> dict[str, Any]:
    """Largest differences from an SVD in float64, relative to each layer's largest singular value, and of the ranks."""
    worst = 0.0
    ranks = 0
    for name in sorted(weights):
        spectrum = analyze_weight(weights[name])
        exact = torch.linalg.svdvals(weights[name].double())
        worst = max(worst, float((spectrum.singular_values - exact).abs().max() / exact[0]))
        threshold = torch.finfo(torch.float32).eps * max(weights[name].shape) * exact[0]
        ranks = max(ranks, abs(spectrum.numerical_rank - int((exact > threshold).sum())))
    return {"largest_difference": float(f"{worst:.2g}"), "largest_difference_of_numerical_rank": ranks}


def render(results: dict[str, Any]) -> str:
    """``table.md`` from ``results.json``."""
    about, timing, exact = results["host"], results["timing"], results["accuracy"]
    ours, theirs = timing["lowrank_seconds"], timing["weightwatcher_seconds"]
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    versions = ", ".join(f"{name} {value}" for name, value in sorted(results["versions"].items()))
    rows = [
        ("lowrank `analyze_model`", timing["layers"], ours),
        ("WeightWatcher `analyze()`", timing["weightwatcher_layers"], theirs),
    ]
    lines = [
        f"{about['cpu']}, {timing['threads']} threads, torch {about['torch']}; the other environment: {versions}. "
        f"{timing['parameters']:,} weights in {timing['layers']} matrices, {timing['rounds']} rounds in turn.",
        "",
        "| tool | layers | median, s | least, s | most, s |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| {name} | {layers} | {statistics.median(values):.2f} | {min(values):.2f} | {max(values):.2f} |"
            for name, layers, values in rows
        ),
        "",
        _goal(f"at most {MOST_SECONDS} s", statistics.median(ours) <= MOST_SECONDS, f"{statistics.median(ours):.2f} s"),
        _goal(
            f"at least {LEAST_SPEEDUP:.0f} times faster", ratio >= LEAST_SPEEDUP, f"{ratio:.1f} times (median of pairs)"
        ),
        f"* Singular values differ from those of an SVD in float64 by at most {exact['largest_difference']:.1e} of the "
        f"largest, the numerical rank by {exact['largest_difference_of_numerical_rank']}.",
    ]
    return "\n".join(lines) + "\n"


def _goal(wanted: str, met: bool, got: str) -> str:
    return f"* Goal of {wanted}: **{'met' if met else 'missed'}**, {got}."


def main() -> None:
    """Measure, unless this machine's results stand already."""
    parser = harness.options_of(__doc__)
    parser.add_argument("--fresh", action="store_true", help="measure anew")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = harness.folder_for(HERE, arguments.smoke)
    about = host("cpu", "torch", "capability")
    if not arguments.fresh and harness.read_results(folder, {}).get("host") == about:
        print(f"{folder / 'results.json'} stands; --fresh measures anew")
        return
    CACHE.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    weights = (
        {f"layer{index}": torch.randn(48, 32, generator=generator) for index in range(3)}
        if arguments.smoke
        else weights_of_minilm()
    )
    other = None if arguments.smoke else WeightWatcher(weights, arguments.threads)
    results = {
        "host": about,
        "versions": other.versions if other is not None else {},
        "timing": time_them(weights, arguments.threads, 2 if arguments.smoke else ROUNDS, other),
        "accuracy": accuracy(weights),
    }
    if other is not None:
        other.close()
    harness.write_results(folder, results, render)
    print(render(results))
    print(f"written to {folder}")


if __name__ == "__main__":
    main()
