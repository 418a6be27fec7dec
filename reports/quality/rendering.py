"""``table.md`` of the study: every point, where a peer is better, and the bytes at equal error."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from _shared import harness

# Methods of this package.
OURS = ("uniform", "uniform, two-sided", "planner")
# Errors at which curves are read.
LEVELS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
# Above this a model says nothing any more.
WORTHLESS = 0.9
# Bytes and errors that are alike to this count as the same.
ALIKE = 1.0005
# At an end of our curve a point of ours that takes so much more still says what ours is worth there.
NEAR = 1.015


@dataclass(frozen=True)
class Point:
    """One setting of one method, its seeds taken together.

    Attributes:
        share: of the scope's bytes.
        errors: one a seed.
        judged: mean of the subject's own measure, and its name.
    """

    model: str
    scope: str
    method: str
    setting: str
    share: float
    errors: tuple[float, ...]
    judged: tuple[str, float]
    seconds: float

    @property
    def error(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.errors)

    @property
    def ours(self) -> bool:
        """Whether this package made it."""
        return self.method in OURS


def setting_of(case: dict[str, Any]) -> str:
    """Say in words what a case asks for."""
    parts = [case["option"]] if case["option"] else []
    if case["bits"] is not None:
        parts.append(f"{case['bits']} bits, {'row' if case['group'] is None else case['group']}")
    if case["rank"] is not None:
        parts.append(f"rank {case['rank']}")
    if case["share"] is not None:
        parts.append(f"{case['share']:.1%} of the bytes")
    if case["budget"] is not None:
        parts.append(f"within {case['budget']:.0%}")
    return "; ".join(parts)


def points_of(results: dict[str, Any]) -> list[Point]:
    """Take the seeds of a setting together."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in results["rows"]:
        case = row["case"]
        if "failed" not in row:
            key = (case["model"], case["scope"], case["method"], setting_of(case))
            found.setdefault(key, []).append(row)
    points = []
    for key, rows in found.items():
        name = next(each for each in ("drift", "perplexity", "top-1") if each in rows[0])
        share, judged, seconds = (statistics.fmean(row[field] for row in rows) for field in ("share", name, "seconds"))
        points.append(Point(*key, share, tuple(row["error"] for row in rows), (name, judged), seconds))
    return points


def at_share(curve: Sequence[Point], share: float) -> float | None:
    """Read a curve between its points, log error over bytes; at its ends from the point next to it, ``None`` farther out."""
    front = sorted(curve, key=lambda point: (point.share, point.error))
    for low, high in pairwise(front):
        if low.share <= share <= high.share and high.share > low.share:
            part = (share - low.share) / (high.share - low.share)
            return math.exp((1 - part) * math.log(low.error) + part * math.log(high.error))
    if front and front[-1].share < share:
        # More bytes than our largest point: that one is there for less.
        return front[-1].error
    return front[0].error if front and front[0].share <= share * NEAR else None


def frontier(points: Sequence[Point]) -> list[Point]:
    """Those of which no other is as small and as good."""
    found: list[Point] = []
    for point in sorted(points, key=lambda each: (each.share, each.error)):
        if not found or point.error < found[-1].error:
            found.append(point)
    return found


def better(points: Sequence[Point]) -> list[tuple[Point, float | None]]:
    """Peers' points that no point of ours matches in both bytes and error, with our error at their bytes, read off between points."""
    ours = [point for point in points if point.ours]
    curve = frontier(ours)
    found = []
    for point in points:
        if point.ours or point.error > WORTHLESS:
            continue
        if not any(own.share <= point.share * ALIKE and own.error <= point.error * ALIKE for own in ours):
            found.append((point, at_share(curve, point.share)))
    return sorted(found, key=lambda pair: pair[0].share)


def bytes_at(points: Sequence[Point], error: float) -> float | None:
    """The share at which a method's curve comes down to this error; ``None`` where its points do not reach around it."""
    curve = frontier(points)
    for low, high in pairwise(curve):
        if high.error <= error <= low.error:
            part = (math.log(low.error) - math.log(error)) / (math.log(low.error) - math.log(high.error))
            return low.share + part * (high.share - low.share)
    return None


def _scopes(points: Sequence[Point]) -> Iterator[tuple[str, str, list[Point]]]:
    for model, scope in dict.fromkeys((point.model, point.scope) for point in points):
        yield model, scope, [point for point in points if (point.model, point.scope) == (model, scope)]


def _spread(errors: Sequence[float]) -> str:
    return "" if len(errors) == 1 else f"{min(errors):.2%}–{max(errors):.2%}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _every_point(points: Sequence[Point]) -> str:
    body = [
        [
            f"{point.share:.2%}",
            f"{32 * point.share:.2f}",
            f"**{point.method}**" if point.ours else point.method,
            point.setting,
            f"{point.error:.2%}",
            str(len(point.errors)),
            _spread(point.errors),
            f"{point.judged[1]:.5f}" if point.judged[0] == "drift" else f"{point.judged[1]:.4f}",
            f"{point.seconds:.0f}",
        ]
        for point in sorted(points, key=lambda each: (each.share, each.error))
    ]
    head = [
        "bytes",
        "bits a weight",
        "method",
        "setting",
        "error",
        "seeds",
        "least–most",
        points[0].judged[0],
        "seconds",
    ]
    return harness.table(body, head)


def _peers_ahead(points: Sequence[Point]) -> str:
    found = better(points)
    if not found:
        return "None."
    body = [
        [
            f"{point.share:.2%}",
            point.method,
            point.setting,
            f"{point.error:.2%}",
            _percent(own),
            "" if own is None else "yes" if point.error < own else "no",
        ]
        for point, own in found
    ]
    return harness.table(
        body, ["bytes", "peer", "setting", "its error", "ours between points", "better at equal bytes"]
    )


def _at_equal_error(points: Sequence[Point]) -> str:
    body = []
    for method in dict.fromkeys(point.method for point in points):
        own = [bytes_at([point for point in points if point.method == method], level) for level in LEVELS]
        if any(value is not None for value in own):
            body.append([f"**{method}**" if method in OURS else method, *map(_percent, own)])
    return harness.table(body, ["method", *(f"{level:.0%}" for level in LEVELS)])


def render(results: dict[str, Any]) -> str:
    """Write ``table.md`` from ``results.json``."""
    lines: list[str] = []
    for model, scope, points in _scopes(points_of(results)):
        lines += [f"## {model}, {scope}", "", "Bytes at equal error, read off between points:", ""]
        lines += [
            _at_equal_error(points),
            "",
            "Points of peers that no point of this package matches in bytes and error at once:",
            "",
        ]
        lines += [_peers_ahead(points), "", "Every point:", "", _every_point(points), ""]
    failed = [row for row in results["rows"] if "failed" in row]
    if failed:
        body = [
            [r["case"]["model"], r["case"]["scope"], r["case"]["method"], setting_of(r["case"]), r["failed"]]
            for r in failed
        ]
        lines += [
            "## Packages that did not run",
            "",
            harness.table(body, ["model", "scope", "package", "setting", "message"]),
            "",
        ]
    return "\n".join(lines)
