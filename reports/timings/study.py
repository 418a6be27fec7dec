"""What layers take on this machine, for plans made for speed; see README.md.

Run: ``python reports/timings/study.py`` (``--smoke`` is for CI). Writes ``results.json``, ``table.md`` and
``lowrank/timings.json``, the table that comes with the package; on a processor with AVX2 alone those that end in ``-avx2``.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _shared import harness

from lowrank import kernels
from lowrank.analysis.stopwatch import host_facts
from lowrank.analysis.tuning import measure_conv_points, measure_points
from lowrank.compression.timings import SHIPPED, Point, TimingTable, cross_validate, fit_table

HERE = Path(__file__).resolve().parent
KINDS = ("dense/-", "lowrank/-", "int8/int8", "int8/float", "lowrank-int8/int8", "lowrank-int8/float")


def points_of(results: dict[str, Any]) -> list[Point]:
    """The measurements, as the package takes them."""
    return [Point(**point) for point in results["points"]]


def table_of(results: dict[str, Any]) -> TimingTable:
    """The table that the package ships."""
    points = points_of(results)
    return fit_table(points, results["host"], cross_validate(points))


def render(results: dict[str, Any]) -> str:
    """``table.md`` from ``results.json``."""
    about, points = results["host"], points_of(results)
    accuracy = cross_validate(points)
    lines = [
        f"{about['cpu']}, {about['threads']} threads, {about['capability']}, torch {about['torch']}, integer route "
        f"`{about['route']}`; {len(points)} measurements.",
        "",
        f"For a shape that the fit has not seen: median error {accuracy['median_error']:.0%}, 90 % of predictions within "
        f"{accuracy['p90_error']:.0%}; {accuracy['wrong_order']:.1%} of the compressed layers on the wrong side of dense.",
        "",
        "Measured microseconds (factored layers: rank 3/8 of the smaller side):",
        "",
        f"| shape | dtype | tokens | {' | '.join(KINDS)} |",
        f"|---|---|---:|{'---:|' * len(KINDS)}",
    ]
    found: dict[tuple[int, int, str, int], dict[str, float]] = {}
    for point in sorted(points, key=lambda point: point.rank or 0):
        kind, _, dtype = point.key.rpartition("/")
        # Of the ranks the largest stays.
        found.setdefault((point.outputs, point.inputs, dtype, point.rows), {})[kind] = 1e6 * point.seconds
    for (outputs, inputs, dtype, rows), seconds in sorted(found.items()):
        if not seconds.keys() & set(KINDS):
            continue
        cells = " | ".join(f"{seconds[kind]:.0f}" for kind in KINDS)
        lines.append(f"| {outputs}×{inputs} | {dtype} | {rows} | {cells} |")
    lines += [*_conv_lines(points)]
    return "\n".join(lines) + "\n"


def _conv_lines(points: list[Point]) -> list[str]:
    found: dict[tuple[int, int, int], dict[str, float]] = {}
    for point in sorted(points, key=lambda point: point.rank or 0):
        if point.key.startswith("conv-"):
            kind = point.key.removeprefix("conv-").rpartition("/")[0]
            found.setdefault((point.outputs, point.inputs, point.rows), {})[kind] = 1e6 * point.seconds
    if not found:
        return []
    lines = [
        "",
        "Convolutions, float32, zeros around (shape: output channels × patch):",
        "",
        f"| shape | positions | {' | '.join(KINDS)} |",
        f"|---|---:|{'---:|' * len(KINDS)}",
    ]
    for (outputs, inputs, rows), seconds in sorted(found.items()):
        lines.append(f"| {outputs}×{inputs} | {rows} | {' | '.join(f'{seconds[kind]:.0f}' for kind in KINDS)} |")
    return lines


# Of the names of results and table, by route.
ENDINGS = {"native": "", "native-avx2": "-avx2"}


def main() -> None:
    """Measure, write."""
    parser = harness.options_of(__doc__)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    route = kernels.route()
    if not arguments.smoke and route not in SHIPPED:
        raise SystemExit(f"integer layers take route {route} here, for which no table comes with the package")
    small = {"shapes": [(16, 32), (32, 16)], "rows": [1, 4], "dtypes": ["float32"], "rounds": 1, "at_least": 0.0}
    folder = harness.folder_for(HERE, arguments.smoke)
    points = measure_points(progress=True, **(small if arguments.smoke else {}))
    few = {"channels": [(2, 4, 3)], "images": [(1, 5)], "rounds": 1, "at_least": 0.0}
    points += measure_conv_points(progress=True, **(few if arguments.smoke else {}))
    for index, point in enumerate(points):
        points[index] = Point(**asdict(point) | {"seconds": float(f"{point.seconds:.4g}")})
    results = {"host": host_facts(), "points": [asdict(point) for point in points]}
    harness.write_results(folder, results, render, ending="" if arguments.smoke else ENDINGS[route], indent=None)
    shipped = folder / "timings.json" if arguments.smoke else SHIPPED[route]
    shipped.write_text(table_of(results).to_json())
    print(f"written to {folder} and {shipped}")


if __name__ == "__main__":
    main()
