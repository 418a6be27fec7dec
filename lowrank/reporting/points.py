"""Size against error: the points of a frontier, as data, as a table and as a chart."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from lowrank.errors import CheckpointError
from lowrank.reporting import charts, html
from lowrank.reporting.text import Column, one_line, percent

__all__ = [
    "FRONTIER_COLUMNS",
    "FrontierPoint",
    "frontier_chart",
    "lowest",
    "points_as_json",
    "points_from_json",
    "points_table",
    "points_texts",
]

FRONTIER_COLUMNS = (
    Column("plan", keep="left", least=20),
    Column("budget", numeric=True, drop=3),
    Column("size", numeric=True),
    Column("error", numeric=True),
    Column("at most (95 %)", numeric=True, drop=1),
    Column("formats", keep="left", least=24, drop=2),
)


@dataclass(frozen=True)
class FrontierPoint:
    """State what one plan makes of the model.

    Attributes:
        size_ratio: stored bytes after / before, of the whole model.
        error: in the metric's unit.
        measured: on data; else the error is what the calibrated predictions add up to.
        budget: the error that the plan was made for, where it was made for one.
        upper: bound on the error with 95 % confidence, where the data that was measured on had no part in the plan.
        label: what the plan is, for the reader.
        formats: (format, number of layers), sorted.

    Example:
        >>> FrontierPoint(0.25, 0.05, True).measured
        True
    """

    size_ratio: float
    error: float
    measured: bool
    budget: float | None = None
    upper: float | None = None
    label: str = ""
    formats: tuple[tuple[str, int], ...] = ()


def points_as_json(points: Sequence[FrontierPoint]) -> list[dict[str, Any]]:
    """Return plain data, in the points' order."""
    return [asdict(point) | {"formats": [list(item) for item in point.formats]} for point in points]


def points_from_json(data: object, source: str) -> list[FrontierPoint]:
    """Read what :func:`points_as_json` gave.

    Raises:
        CheckpointError: not such a list.

    Example:
        >>> points_from_json([{"size_ratio": 0.5, "error": 0.1, "measured": True}], "report.json")[0].size_ratio
        0.5
    """
    if not isinstance(data, list):
        raise CheckpointError(f"{source}: a frontier must be a list of points, got a {type(data).__name__}")
    known = {item.name for item in fields(FrontierPoint)}
    points = []
    for item in data:
        if not isinstance(item, dict) or not {"size_ratio", "error", "measured"} <= set(item) <= known:
            raise CheckpointError(
                f"{source}: a frontier's point holds size_ratio, error, measured and maybe {', '.join(sorted(known))}"
            )
        numbers = [item.get(key) for key in ("size_ratio", "error", "budget", "upper")]
        good = [_number(value) or (value is None and index > 1) for index, value in enumerate(numbers)]
        formats = item.get("formats", [])
        pairs = isinstance(formats, list) and all(
            isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and type(pair[1]) is int
            for pair in formats
        )
        if (
            not all(good)
            or not pairs
            or type(item["measured"]) is not bool
            or not isinstance(item.get("label", ""), str)
        ):
            raise CheckpointError(
                f"{source}: a frontier's point holds values that are none: {one_line(str(item))[:200]}"
            )
        points.append(FrontierPoint(**{**item, "formats": tuple((name, count) for name, count in formats)}))
    return points


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def lowest(points: Sequence[FrontierPoint]) -> list[FrontierPoint]:
    """Pick the points that no other of the same kind beats in both size and error, by size ascending.

    Example:
        >>> points = [FrontierPoint(0.5, 0.1, True), FrontierPoint(0.6, 0.2, True), FrontierPoint(0.7, 0.05, True)]
        >>> [point.size_ratio for point in lowest(points)]
        [0.5, 0.7]
    """
    kept: list[FrontierPoint] = []
    for point in sorted(points, key=lambda item: (item.size_ratio, item.error)):
        if not kept or point.error < kept[-1].error:
            kept.append(point)
    return kept


def points_texts(points: Sequence[FrontierPoint], show: Callable[[float], str]) -> list[list[str]]:
    """Write the cells under :data:`FRONTIER_COLUMNS`."""
    return [
        [
            one_line(point.label) + ("" if point.measured else " (predicted)"),
            "" if point.budget is None else show(point.budget),
            percent(point.size_ratio, 3),
            show(point.error),
            "" if point.upper is None else show(point.upper),
            ", ".join(f"{one_line(name)} {count}" for name, count in point.formats),
        ]
        for point in points
    ]


def points_table(points: Sequence[FrontierPoint], show: Callable[[float], str], *, wide: bool = False) -> str:
    """Draw the points as a sortable table of a page.

    Args:
        show: an error as text.
        wide: lets the column of formats break into lines.
    """
    headings = [
        html.Heading(column.title, column.numeric, wide and column is FRONTIER_COLUMNS[-1])
        for column in FRONTIER_COLUMNS
    ]
    cells = [
        [
            html.Cell(text, sort)
            for text, sort in zip(
                texts, (None, point.budget, point.size_ratio, point.error, point.upper, None), strict=True
            )
        ]
        for point, texts in zip(points, points_texts(points, show), strict=True)
    ]
    return html.table(headings, cells)


def frontier_chart(
    points: Sequence[FrontierPoint],
    show: Callable[[float], str],
    *,
    factor: float = 100.0,
    axis: str = "error, %",
    suffix: str = " %",
    budget: float | None = None,
) -> str:
    """Draw error over size as inline SVG: measured points filled and joined along the lowest, predicted ones hollow.

    Args:
        points: at least one; those of error 0 stand on the axis.
        show: an error as text.
        factor: from an error to the number on the axis.
        axis: what it is named.
        suffix: behind a number of that axis.
        budget: drawn as a line across.
    """
    named: list[charts.Series] = []
    for measured, title, colour in ((False, "predicted", "3"), (True, "measured", "1")):
        alike = [point for point in points if point.measured is measured]
        dots = [
            charts.Dot(
                100 * point.size_ratio,
                factor * point.error,
                f"{one_line(point.label) or title}: {percent(point.size_ratio, 3)} of the bytes, error {show(point.error)}",
                hollow=not measured,
            )
            for point in alike
        ]
        line = [(100 * point.size_ratio, factor * point.error) for point in lowest(alike)]
        if dots:
            named.append(charts.Series(title, colour, dots, [line], dashed=not measured))
    return charts.scatter(
        "Size against error",
        named,
        x_label="stored bytes, % of the original",
        y_label=axis,
        level=None if budget is None else (factor * budget, f"budget {factor * budget:g}{suffix}"),
    )
