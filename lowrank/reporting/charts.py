"""Charts drawn here as inline SVG, in the colours of the page: points on logarithmic error, and bars a layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from lowrank.reporting.html import legend

__all__ = ["Dot", "Series", "layer_bars", "nice_ticks", "scatter"]

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 640, 320, 62, 16, 18, 46
# Below this many decades of error a linear scale is easier to read.
LOG_FROM = 4.0


@dataclass(frozen=True)
class Dot:
    """A point, and what is said when the pointer rests on it."""

    x: float
    y: float
    title: str


@dataclass(frozen=True)
class Series:
    """Dots of one kind in one of the page's colours (1 to 5), and the line that joins some of them."""

    name: str
    colour: str
    dots: Sequence[Dot]
    line: Sequence[tuple[float, float]] = ()
    hollow: bool = False


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from at or below ``low`` to at or above ``high``, in steps of 1, 2 or 5 times a power of ten.

    Example:
        >>> nice_ticks(0.0, 47.0), nice_ticks(3.0, 3.0)
        ([0.0, 10.0, 20.0, 30.0, 40.0, 50.0], [3.0, 3.2, 3.4, 3.6, 3.8, 4.0])
    """
    if not high > low:
        high = low + 1.0
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten around the values; powers alone where those would be many."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    fine = [factor * 10.0**power for power in range(first, last + 1) for factor in (1.0, 2.0, 5.0)]
    below = max((tick for tick in fine if tick <= low * 1.0001), default=fine[0])
    above = min((tick for tick in fine if tick >= high * 0.9999), default=fine[-1])
    kept = [tick for tick in fine if below <= tick <= above]
    return kept if len(kept) <= 8 else [10.0**power for power in range(first, last + 1)]


def scatter(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    level: tuple[float, str] | None = None,
) -> str:
    """Points and lines of y over x; y is logarithmic where its positive values span much.

    Args:
        level: (y, text) of a line across.

    Example:
        >>> chart = scatter("t", [Series("a", "1", [Dot(1, 2, "here")])], x_label="x", y_label="y")
        >>> chart.count("<circle"), "here" in chart
        (1, True)
    """
    dots = [dot for one in series for dot in one.dots if math.isfinite(dot.x) and math.isfinite(dot.y)]
    if not dots:
        return ""
    heights = [dot.y for dot in dots] + ([level[0]] if level is not None else [])
    positive = [value for value in heights if value > 0.0]
    log = bool(positive) and max(positive) > LOG_FROM * min(positive)
    y_ticks = _log_ticks(min(positive), max(positive)) if log else nice_ticks(0.0, max(heights))
    x_ticks = nice_ticks(min(dot.x for dot in dots), max(dot.x for dot in dots))

    def x_of(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])

    def y_of(y: float) -> float:
        low, high = (math.log(y_ticks[0]), math.log(y_ticks[-1])) if log else (y_ticks[0], y_ticks[-1])
        value = math.log(max(y, y_ticks[0])) if log else y
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(max((value - low) / ((high - low) or 1.0), 0.0), 1.0)

    floor = HEIGHT - BOTTOM
    marks = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_of(y):.1f}" y2="{y_of(y):.1f}"/>'
        f'<text x="{LEFT - 7}" y="{y_of(y) + 4:.1f}" text-anchor="end">{y:g}</text>'
        for y in y_ticks
    ]
    marks += [
        f'<line class="grid" x1="{x_of(x):.1f}" x2="{x_of(x):.1f}" y1="{TOP}" y2="{floor}"/>'
        f'<text x="{x_of(x):.1f}" y="{floor + 17}" text-anchor="middle">{x:g}</text>'
        for x in x_ticks
    ]
    marks.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>')
    marks.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    if level is not None:
        y = y_of(level[0])
        marks.append(
            f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{WIDTH - RIGHT}" y="{y - 5:.1f}" text-anchor="end">{escape(level[1])}</text>'
        )
    for one in series:
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in one.line if math.isfinite(x) and math.isfinite(y))
        dash = ";stroke-dasharray:5 4" if one.hollow else ""
        marks.append(f'<polyline class="line" points="{path}" style="stroke:var(--s{one.colour}){dash}"/>')
        fill = "var(--card)" if one.hollow else f"var(--s{one.colour})"
        marks += [
            f'<circle cx="{x_of(dot.x):.1f}" cy="{y_of(dot.y):.1f}" r="4.5" '
            f'style="fill:{fill};stroke:var(--s{one.colour});stroke-width:1.5"><title>{escape(dot.title)}</title></circle>'
            for dot in one.dots
            if math.isfinite(dot.x) and math.isfinite(dot.y)
        ]
    scale = ", logarithmic" if log else ""
    return (
        f'<figure class="wide"><figcaption>{escape(title)}</figcaption>\n<p class="soft">{escape(y_label)}{scale}</p>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(marks)}</svg>\n'
        f"{legend([(one.name, one.colour) for one in series])}</figure>\n"
    )


def layer_bars(rows: Sequence[tuple[str, float, float, float | None, str]], left: str, right: str) -> str:
    """A line a layer: its size before (pale) and after (solid), and its share of the error.

    Args:
        rows: (name, size before, size after, share of the error from 0 to 1 or None, text) a layer.
        left, right: headings of the two columns of bars.

    Example:
        >>> layer_bars([("fc", 4.0, 1.0, 0.5, "4 B to 1 B, 50 %")], "bytes", "error").count('class="after"')
        1
    """
    widest = max((max(before, after) for _, before, after, _, _ in rows), default=0.0) or 1.0
    most = max((share for *_, share, _ in rows if share is not None), default=0.0) or 1.0
    lines = []
    for name, before, after, share, text in rows:
        part = "" if share is None else f'<b class="share" style="width:{100 * share / most:.2f}%"></b>'
        lines.append(
            f'<li title="{escape(text)}"><span>{escape(name).replace(".", ".<wbr>")}</span>'
            f'<div><i style="width:{100 * before / widest:.2f}%"></i>'
            f'<b class="after" style="width:{100 * after / widest:.2f}%"></b></div><div>{part}</div></li>\n'
        )
    head = f"<li><span></span><em>{escape(left)}</em><em>{escape(right)}</em></li>\n"
    return f'<ul class="bars">\n{head}{"".join(lines)}</ul>\n'
