"""What do integer layers cost on a processor with AVX2 and no VNNI, by each route? See README.md.

python reports/avx2/study.py           # some minutes; needs such a processor, or one that is told to be (ONEDNN_MAX_CPU_ISA=AVX2)
python reports/avx2/study.py --smoke   # one small layer of each kind, prints and writes nothing
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _shared import harness
from _shared.host import host

import lowrank
from lowrank import kernels
from lowrank.kernels import integer, native

HERE = Path(__file__).resolve().parent
# Inputs and outputs; tokens.
LINEAR = (((384, 1536), (1, 32, 512)), ((1024, 1024), (1, 32, 512)), ((4096, 4096), (1, 32, 128)))
# Channels in and out, side of the image; images. 3×3.
CONV = (((16, 16, 32), (1, 16)), ((64, 64, 8), (1, 16)), ((128, 128, 28), (1,)))
ROUNDS = 15
# How layers multiply: all of a layer in C; torch around a product in C, torch's product, a float product.
PRODUCTS = {"avx2": integer._narrow_product, "int_mm": integer._cpu_product, "float": integer._float_product}
ROUTES = ("native-avx2", *PRODUCTS)
# Torch's product takes seconds where it multiplies one pair of numbers at a time.
MOST_BY_INT_MM = 2**25


def once(layer: nn.Module, x: Tensor, route: str | None) -> float:
    """Seconds of one call, by a route; ``None`` for a float layer."""
    if route in PRODUCTS:
        integer._routes[torch.device("cpu")] = (route, PRODUCTS[route])
        with kernels.torch_route():
            return once(layer, x, None)
    start = time.perf_counter()
    with torch.no_grad():
        layer(x)
    return time.perf_counter() - start


def layers_of(dense: nn.Linear | nn.Conv2d) -> dict[str, nn.Module]:
    """What is compared with a float layer."""
    if isinstance(dense, nn.Conv2d):
        return {"int8": lowrank.QuantizedConv2d.from_conv2d(dense)}
    weight_only = lowrank.QuantizedLinear.from_linear(dense)
    weight_only.activations = "float"
    return {
        "int8": lowrank.QuantizedLinear.from_linear(dense),
        "int8, rank 1/4": lowrank.QuantizedLowRankLayer.from_linear(dense, rank=min(dense.weight.shape) // 4),
        "int8 weights alone": weight_only,
    }


def measure(dense: nn.Linear | nn.Conv2d, x: Tensor, name: str, rounds: int) -> list[dict[str, Any]]:
    """For each layer and route the quartiles of ratios to float32, each of a pair of neighbouring calls."""
    rows = []
    dense.requires_grad_(False)
    work = dense.weight.numel() * x.numel() // x.shape[1]
    for kind, layer in layers_of(dense).items():
        row: dict[str, Any] = {"layer": name, "kind": kind, "samples": len(x), "ratios": {}}
        seconds = []
        for route in ROUTES:
            if route == "int_mm" and work > MOST_BY_INT_MM:
                continue
            pairs = []
            for number in range(rounds + 1):
                float32, ours = once(dense, x, None), once(layer, x, route)
                if number:  # the first round warms up
                    pairs.append(float32 / ours)
                    seconds.append(float32)
            row["ratios"][route] = harness.quartiles(pairs, inside=False)
        rows.append({**row, "float32_seconds": statistics.median(seconds)})
    return rows


def render(results: dict[str, Any]) -> str:
    """``table.md`` from ``results.json``."""
    body = []
    for row in results["rows"]:
        cells = [
            harness.middle_and_quartiles(quartiles, 2, " to ") if quartiles else ""
            for quartiles in (row["ratios"].get(route) for route in ROUTES)
        ]
        body.append([row["layer"], row["kind"], row["samples"], f"{1e3 * row['float32_seconds']:.2f}", *cells])
    header = ["layer", "kind", "tokens or images", "float32, ms", "native-avx2", "avx2 product", "int_mm", "float"]
    return "How many times as fast as float32: median and quartiles of pairs.\n\n" + harness.table(body, header) + "\n"


def main() -> None:
    """Measure and write."""
    smoke = harness.options_of(__doc__).parse_args().smoke
    torch.manual_seed(0)
    library = native.library()
    if smoke:
        if library is None:
            del PRODUCTS["avx2"]
        print(measure(nn.Linear(64, 32), torch.randn(3, 64), "64×32", 3))
        print(measure(nn.Conv2d(4, 8, 3, padding=1), torch.randn(2, 4, 8, 8), "4→8, 8×8", 3))
        return
    if library is None or library.level != native.AVX2:
        raise SystemExit("this processor takes other routes; set ONEDNN_MAX_CPU_ISA=AVX2, or use one with AVX2 alone")
    rows = []
    for (inputs, outputs), counts in LINEAR:
        linear = nn.Linear(inputs, outputs)
        for tokens in counts:
            rows += measure(linear, torch.randn(tokens, inputs), f"{inputs}×{outputs}", ROUNDS)
    for (inputs, outputs, side), counts in CONV:
        conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        for images in counts:
            rows += measure(
                conv, torch.randn(images, inputs, side, side), f"3×3, {inputs}→{outputs}, {side}×{side}", ROUNDS
            )
    results = {"host": host("machine", "capability", "torch", "threads", "load"), "rows": rows}
    harness.write_results(HERE, results, render)
    print(render(results))


if __name__ == "__main__":
    main()
