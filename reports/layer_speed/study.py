"""How fast are the compressed layers next to PyTorch's own? See README.md.

Run: ``python reports/layer_speed/study.py`` (resumes where it stopped; ``--fresh`` starts anew, ``--smoke`` is for CI).
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _shared import harness
from _shared.host import host

from lowrank.layers import QuantizedConv2d, QuantizedLinear, QuantizedLowRankLayer, SVDCompressedLinear

HERE = Path(__file__).resolve().parent
# (out_features, in_features, rank): the layer, then feed-forward layers of BERT-base and MiniLM, and attention.
SHAPES = [(4096, 4096, 512), (768, 3072, 192), (384, 1536, 96), (384, 384, 96)]
TOKENS = [1, 8, 32, 128, 512, 2048]
# (out, in, kernel, stride, size): every kind of convolution in ResNet-20 on CIFAR, and three of ResNet-50.
CONVOLUTIONS = [
    (16, 3, 3, 1, 32),
    (16, 16, 3, 1, 32),
    (32, 16, 3, 2, 32),
    (32, 32, 3, 1, 16),
    (64, 32, 3, 2, 16),
    (64, 64, 3, 1, 8),
    (64, 64, 3, 1, 56),
    (256, 64, 1, 1, 56),
    (512, 512, 3, 1, 7),
]
IMAGES = [1, 64]
BASELINE = "nn.Linear float32"
DYNAMIC = "torch dynamic int8"
FACTORED, DENSE = "QuantizedLowRankLayer int8", "QuantizedLinear int8"
CONTENDERS = (
    "nn.Linear bfloat16",
    DYNAMIC,
    DENSE,
    "QuantizedLinear float",
    "SVDCompressedLinear float32",
    FACTORED,
    "QuantizedLowRankLayer float",
)
# What the project asks of itself at 4096×4096, rank 512: (contender, against, tokens) -> ratio.
GOALS = {
    (FACTORED, BASELINE, 1): 25.0,
    (FACTORED, BASELINE, 128): 12.0,
    (FACTORED, BASELINE, 512): 12.0,
    (FACTORED, DYNAMIC, 1): 1.5,
    (FACTORED, DYNAMIC, 128): 2.5,
    (FACTORED, DYNAMIC, 512): 2.5,
}
MOST_OVERHEAD = 25.0  # µs of a layer too small to compute anything


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
        DYNAMIC: dynamic,
        DENSE: QuantizedLinear.from_linear(linear),
        "QuantizedLinear float": QuantizedLinear.from_linear(linear, activations="float"),
        "SVDCompressedLinear float32": SVDCompressedLinear(inputs, outputs, rank),
        FACTORED: factored("int8"),
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


def paired(calls: dict[str, Callable[[], Any]], rounds: int, at_least: float) -> dict[str, list[float]]:
    """Seconds of each call, round after round: what is compared ran within the same round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            call()  # into the caches
            seconds[name].append(seconds_of(call, at_least))
    return seconds


def summary(seconds: dict[str, list[float]], against: tuple[str, ...]) -> dict[str, Any]:
    """Median microseconds, and quartiles of the ratios within a round to each of the baselines."""
    ratios = {
        base: {
            name: _spread([a / b for a, b in zip(seconds[base], values, strict=True)])
            for name, values in seconds.items()
            if name != base
        }
        for base in against
    }
    microseconds = {name: round(1e6 * statistics.median(values), 1) for name, values in seconds.items()}
    return {"microseconds": microseconds, "speedup": ratios}


def measure(outputs: int, inputs: int, rank: int, tokens: int, rounds: int, at_least: float) -> dict[str, Any]:
    """One shape at one number of tokens."""
    layers = contenders(outputs, inputs, rank)
    x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(1))
    low = x.to(torch.bfloat16)
    calls = {
        name: lambda call=layer, n=name: call(low if n.endswith("bfloat16") else x) for name, layer in layers.items()
    }
    found = summary(paired(calls, rounds, at_least), (BASELINE, DYNAMIC))
    return {"shape": [outputs, inputs], "rank": rank, "tokens": tokens, "rounds": rounds} | found


def measure_convolution(
    outputs: int, inputs: int, kernel: int, stride: int, size: int, images: int, rounds: int, at_least: float
) -> dict[str, Any]:
    """One convolution at one number of images, in float32 and dense int8."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    layer = QuantizedConv2d.from_conv2d(conv)
    x = torch.randn(images, inputs, size, size, generator=torch.Generator().manual_seed(1))
    calls = {"nn.Conv2d float32": lambda: conv(x), "QuantizedConv2d int8": lambda: layer(x)}
    found = summary(paired(calls, rounds, at_least), ("nn.Conv2d float32",))
    return {"convolution": [outputs, inputs, kernel, stride, size], "images": images, "rounds": rounds} | found


def measure_overhead(rounds: int, at_least: float) -> dict[str, Any]:
    """A layer of 16×16 at one token: what a call costs before anything is computed."""
    layers = contenders(16, 16, 4)
    x = torch.randn(1, 16, generator=torch.Generator().manual_seed(1))
    calls = {name: lambda call=layers[name]: call(x) for name in (BASELINE, DYNAMIC, DENSE, FACTORED)}
    return summary(paired(calls, rounds, at_least), (BASELINE,))


def _spread(values: list[float]) -> dict[str, float]:
    low, middle, high = harness.quartiles(values, 2)
    return {"median": middle, "lower_quartile": low, "upper_quartile": high}


def render(results: dict[str, Any]) -> str:
    """``table.md`` from ``results.json``."""
    about = results["host"]
    lines = [
        f"{about['cpu']}, {about['threads']} threads, {about['capability']}, torch {about['torch']}, "
        f"integer route `{about['route']}`. Speed-up over `nn.Linear` in float32: median (quartiles) of the rounds; "
        f"in the last two columns over torch's dynamic int8, which is dense.",
        "",
        f"| shape | rank | tokens | float32, µs | {' | '.join(CONTENDERS)} | {DENSE}: dynamic | {FACTORED}: dynamic |",
        f"|---|---:|---:|---:|{'---:|' * (len(CONTENDERS) + 2)}",
    ]
    for case in results["cases"]:
        cells = [_cell(case["speedup"][BASELINE][name]) for name in CONTENDERS]
        cells += [_cell(case["speedup"][DYNAMIC][name]) for name in (DENSE, FACTORED)]
        outputs, inputs = case["shape"]
        first = f"{outputs}×{inputs} | {case['rank']} | {case['tokens']} | {case['microseconds'][BASELINE]:.0f}"
        lines.append(f"| {first} | {' | '.join(cells)} |")
    lines += ["", "| convolution | images | float32, µs | int8, µs | speed-up |", "|---|---:|---:|---:|---:|"]
    for case in results["convolutions"]:
        times = case["microseconds"]
        lines.append(
            f"| {_name_of(case)} | {case['images']} | {times['nn.Conv2d float32']:.0f} | "
            f"{times['QuantizedConv2d int8']:.0f} | {_cell(_speedup_of(case))} |"
        )
    overhead = results["overhead"]["microseconds"] if results["overhead"] else {}
    lines += ["", "| one token, 16×16 | µs |", "|---|---:|"]
    lines += [f"| {name} | {value:.1f} |" for name, value in sorted(overhead.items())]
    return "\n".join([*lines, "", *_findings(results)]) + "\n"


def _cell(spread: dict[str, float]) -> str:
    return harness.middle_and_quartiles([spread[part] for part in ("lower_quartile", "median", "upper_quartile")], 2)


def _name_of(case: dict[str, Any]) -> str:
    outputs, inputs, kernel, stride, size = case["convolution"]
    return f"{inputs} to {outputs} channels, {kernel}×{kernel}, stride {stride}, {size}×{size}"


def _speedup_of(case: dict[str, Any]) -> dict[str, float]:
    found: dict[str, float] = case["speedup"]["nn.Conv2d float32"]["QuantizedConv2d int8"]
    return found


def _findings(results: dict[str, Any]) -> list[str]:
    """What the numbers say to the goals, and every place where a layer is slower than what it should beat."""
    lines = []
    for case in results["cases"]:
        shape = (*case["shape"], case["rank"])
        where = f"{shape[0]}×{shape[1]}, rank {shape[2]}, {case['tokens']} tokens"
        for (name, against, tokens), goal in GOALS.items():
            if shape == (4096, 4096, 512) and tokens == case["tokens"]:
                got = case["speedup"][against][name]["median"]
                verdict = "met" if got >= goal else "missed"
                lines.append(f"* {name} at {where}: {goal}× {against} asked, **{verdict}**, {got:.1f}×.")
        ratios = case["speedup"][BASELINE]
        for name in (DENSE, "QuantizedLinear float", FACTORED, "QuantizedLowRankLayer float"):
            if ratios[name]["median"] < 1.0:
                lines.append(f"* {name} is slower than float32 at {where}: {ratios[name]['median']:.2f}×.")
        ratio = case["speedup"][DYNAMIC][DENSE]["median"]
        if ratio < 1.0:
            lines.append(f"* {DENSE} is slower than {DYNAMIC} at {where}: {ratio:.2f}×.")
        times = case["microseconds"]
        if times[FACTORED] > times[DENSE]:
            lines.append(
                f"* Low rank loses to dense int8 at {where}: {times[FACTORED]:.1f} against {times[DENSE]:.1f} µs."
            )
    for case in results["convolutions"]:
        ratio = _speedup_of(case)["median"]
        if ratio < 1.0:
            lines.append(
                f"* QuantizedConv2d is slower than float32, {case['images']} images, {_name_of(case)}: {ratio:.2f}×."
            )
    for name in (DENSE, FACTORED) if results["overhead"] else ():
        got = results["overhead"]["microseconds"][name]
        verdict = "met" if got <= MOST_OVERHEAD else "missed"
        lines.append(f"* A call of {name} in at most {MOST_OVERHEAD:.0f} µs: **{verdict}**, {got:.1f} µs.")
    return lines


def main() -> None:
    """Measure what is missing, write after every case."""
    parser = harness.options_of(__doc__)
    parser.add_argument("--fresh", action="store_true", help="measure everything anew")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    folder = harness.folder_for(HERE, arguments.smoke)
    shapes, tokens = ([(64, 96, 16)], [1, 4]) if arguments.smoke else (SHAPES, TOKENS)
    convolutions, images = ([(8, 4, 3, 1, 6)], [1]) if arguments.smoke else (CONVOLUTIONS, IMAGES)
    rounds, at_least = (3, 0.001) if arguments.smoke else (arguments.rounds, 0.05)
    about = host("cpu", "threads", "capability", "route", "torch")
    results: dict[str, Any] = {"host": about, "cases": [], "convolutions": [], "overhead": None}
    kept = harness.read_results(folder, results)
    # Cases of another machine or library do not belong in one table.
    if kept["host"] == about and not arguments.fresh:
        results = kept

    def keep(message: str) -> None:
        harness.write_results(folder, results, render)
        print(message, flush=True)

    if results["overhead"] is None:
        results["overhead"] = measure_overhead(rounds, at_least)
        keep(f"overhead: {results['overhead']['microseconds']}")
    done = {(*case["shape"], case["rank"], case["tokens"]) for case in results["cases"]}
    for shape in shapes:
        for count in tokens:
            if (*shape, count) not in done:
                results["cases"].append(measure(*shape, count, rounds, at_least))
                keep(f"{shape} {count} tokens: {results['cases'][-1]['microseconds']}")
    done = {(*case["convolution"], case["images"]) for case in results["convolutions"]}
    for convolution in convolutions:
        for count in images:
            if (*convolution, count) not in done:
                results["convolutions"].append(measure_convolution(*convolution, count, rounds, at_least))
                keep(f"{convolution} {count} images: {results['convolutions'][-1]['microseconds']}")
    print(f"written to {folder}")


if __name__ == "__main__":
    main()
