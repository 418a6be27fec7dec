"""What do integer layers cost on a processor with AVX2 and no VNNI, by each route? See README.md.

python reports/avx2/study.py           # a minute or two; needs such a processor, or one that is told to be (ONEDNN_MAX_CPU_ISA=AVX2)
python reports/avx2/study.py --smoke   # one small layer, prints and writes nothing
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import lowrank
from lowrank import kernels
from lowrank.kernels import integer

HERE = Path(__file__).resolve().parent
SHAPES = ((384, 1536), (1024, 1024))
TOKENS = (1, 32, 512)
ROUNDS = 7
ROUTES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "avx2": integer._narrow_product,
    "int_mm": integer._cpu_product,
    "float": integer._float_product,
}


def once(layer: nn.Module, x: Tensor, route: str | None) -> float:
    """Seconds of one call, by a route."""
    if route is not None:
        integer._routes[torch.device("cpu")] = (route, ROUTES[route])
    start = time.perf_counter()
    with torch.no_grad(), kernels.torch_route():
        layer(x)
    return time.perf_counter() - start


def measure(shape: tuple[int, int], tokens: int, rounds: int) -> dict[str, Any]:
    """Ratios to float32, each of a pair of neighbouring calls."""
    inputs, outputs = shape
    linear = nn.Linear(inputs, outputs).requires_grad_(False)
    layers = {
        "int8": lowrank.QuantizedLinear.from_linear(linear),
        "int8, rank 1/4": lowrank.QuantizedLowRankLayer.from_linear(linear, rank=min(shape) // 4),
    }
    x = torch.randn(tokens, inputs)
    row: dict[str, Any] = {"shape": list(shape), "tokens": tokens, "float32_seconds": []}
    for name, layer in layers.items():
        for route in ROUTES:
            # Torch's product takes seconds where it multiplies one pair of numbers at a time.
            if route == "int_mm" and inputs * outputs * tokens > 2**25:
                continue
            pairs = []
            for number in range(rounds + 1):
                dense, ours = once(linear, x, None), once(layer, x, route)
                if number:  # the first round warms up
                    pairs.append(dense / ours)
                    row["float32_seconds"].append(dense)
            row[f"{name}, {route}"] = statistics.quantiles(pairs, n=4)
    row["float32_seconds"] = statistics.median(row["float32_seconds"])
    return row


def render(results: dict[str, Any]) -> str:
    """``table.md`` from ``results.json``."""
    names = [f"{layer}, {route}" for layer in ("int8", "int8, rank 1/4") for route in ROUTES]
    body = []
    for row in results["rows"]:
        cells = [
            f"{row[name][1]:.2f} ({row[name][0]:.2f} to {row[name][2]:.2f})" if name in row else "" for name in names
        ]
        body.append(["×".join(map(str, row["shape"])), row["tokens"], f"{1e3 * row['float32_seconds']:.2f}", *cells])
    header = ["layer", "tokens", "float32, ms", *names]
    return (
        "How many times as fast as float32: median and quartiles of pairs.\n\n"
        + tabulate(body, header, "github", disable_numparse=True)
        + "\n"
    )


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true")
    smoke = parser.parse_args().smoke
    torch.manual_seed(0)
    if smoke:
        one = torch.ones(1, 1, dtype=torch.int8)
        if integer.native.narrow_product(one, one) is None:
            del ROUTES["avx2"]
        print(measure((64, 32), 3, 3))
        return
    rows = [measure(shape, tokens, ROUNDS) for shape in SHAPES for tokens in TOKENS]
    host = {
        "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }
    host |= {"threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 1)}
    results = {"host": host, "rows": rows}
    (HERE / "results.json").write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    (HERE / "table.md").write_text(render(results), encoding="utf-8")
    print(render(results))


if __name__ == "__main__":
    main()
