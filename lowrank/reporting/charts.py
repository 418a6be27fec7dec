"""The one engine of charts: inline SVG in the colours of the page, and bars a layer; needs no library."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from lowrank.reporting.html import legend

__all__ = ["HALF", "WIDE", "Axis", "Dot", "Frame", "Series", "draw", "layer_bars", "nice_ticks", "scatter"]

# Below this many decades of error a linear scale is easier to read.
LOG_FROM = 4.0


@dataclass(frozen=True)
class Frame:
    """Size a picture, in its own units, and set how its axes are drawn.

    Attributes:
        width, height: of the picture.
        left, top, right, bottom: margins around the field.
        sides: draw the y axis with its label beside it, and marks at the ticks; else the label stands outside the picture.
        dot: radius.
        outline: width of a dot's line.
        inside: of hollow dots: the colour of the card hides the line behind them, ``"none"`` shows the dots.
    """

    width: int
    height: int
    left: int
    top: int
    right: int
    bottom: int
    sides: bool = False
    dot: float = 4.5
    outline: float = 1.5
    inside: str = "var(--card)"


WIDE = Frame(640, 320, 62, 16, 18, 46)
HALF = Frame(432, 281, 44, 5, 4, 36, sides=True, dot=2.5, outline=1.0, inside="none")


@dataclass(frozen=True)
class Axis:
    """Lay values along an axis.

    Attributes:
        label: what is measured, with its unit.
        ticks: values with a line and a number.
        low, high: the range; what lies outside stands on its edge.
        log: logarithmic; ticks and range must be positive.
        text: writes a tick's number.
    """

    label: str
    ticks: Sequence[float]
    low: float
    high: float
    log: bool = False
    text: Callable[[float], str] = "{:g}".format

    def share(self, value: float) -> float:
        """Place a value between ``low`` (0) and ``high`` (1)."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        warped = math.log(max(value, self.low)) if self.log else value
        return min(max((warped - low) / ((high - low) or 1.0), 0.0), 1.0)


@dataclass(frozen=True)
class Dot:
    """Mark a point, and say what is shown when the pointer rests on it."""

    x: float
    y: float
    title: str = ""
    hollow: bool = False


@dataclass(frozen=True)
class Series:
    """Gather dots and lines of one kind in one of the page's colours.

    Attributes:
        name: for the legend.
        colour: 1 to 8, of the page's variables ``--s1`` to ``--s8``.
        dots: points.
        lines: each a row of (x, y).
        dashed: lines that are no measurements.
        look: further declarations for the lines, such as ``"opacity:.5"``.
    """

    name: str
    colour: str
    dots: Sequence[Dot] = ()
    lines: Sequence[Sequence[tuple[float, float]]] = ()
    dashed: bool = False
    look: str = ""


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Pick round numbers from at or below ``low`` to at or above ``high``, in steps of 1, 2 or 5 times a power of ten.

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
    """Pick 1, 2 and 5 times powers of ten around the values; powers alone where those would be many."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    fine = [factor * 10.0**power for power in range(first, last + 1) for factor in (1.0, 2.0, 5.0)]
    below = max((tick for tick in fine if tick <= low * 1.0001), default=fine[0])
    above = min((tick for tick in fine if tick >= high * 0.9999), default=fine[-1])
    kept = [tick for tick in fine if below <= tick <= above]
    return kept if len(kept) <= 8 else [10.0**power for power in range(first, last + 1)]


def draw(
    title: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    *,
    frame: Frame = HALF,
    level: tuple[float, str] | None = None,
) -> str:
    """Draw dots and lines as an ``<svg>`` element: texts as text, every colour one of the page's variables.

    So it follows the page into the dark and onto paper. What is not finite is left out.

    Args:
        title: what a screen reader says.
        level: (y, text) of a line across.

    Returns:
        Markup, the same for the same input.

    Example:
        >>> axis = Axis("share", [0.0, 1.0], 0.0, 1.0)
        >>> chart = draw("t", [Series("a", "1", [Dot(1, 1)], [[(0, 0), (1, 1)]])], axis, axis)
        >>> chart.startswith("<svg"), "var(--s1)" in chart, chart.count("<polyline"), chart.count("<circle")
        (True, True, 1, 1)
    """
    right, floor = frame.width - frame.right, frame.height - frame.bottom

    def x_of(value: float) -> float:
        return frame.left + (right - frame.left) * (value - x.low) / ((x.high - x.low) or 1.0)

    def y_of(value: float) -> float:
        return floor - (floor - frame.top) * y.share(value)

    marks = [*_axes(frame, x, y, x_of, y_of)]
    if level is not None:
        height = y_of(level[0])
        marks.append(
            f'<line class="level" x1="{frame.left}" x2="{right}" y1="{height:.1f}" y2="{height:.1f}"/>'
            f'<text x="{right}" y="{height - 5:.1f}" text-anchor="end">{escape(level[1])}</text>'
        )
    for one in series:
        look = (";stroke-dasharray:5 4" if one.dashed else "") + (f";{one.look}" if one.look else "")
        for line in one.lines:
            path = " ".join(f"{x_of(a):.1f},{y_of(b):.1f}" for a, b in line if math.isfinite(a) and math.isfinite(b))
            marks.append(f'<polyline class="line" points="{path}" style="stroke:var(--s{one.colour}){look}"/>')
        for dot in one.dots:
            if math.isfinite(dot.x) and math.isfinite(dot.y):
                fill = frame.inside if dot.hollow else f"var(--s{one.colour})"
                marks.append(
                    f'<circle cx="{x_of(dot.x):.1f}" cy="{y_of(dot.y):.1f}" r="{frame.dot}" '
                    f'style="fill:{fill};stroke:var(--s{one.colour});stroke-width:{frame.outline}">'
                    f"<title>{escape(dot.title)}</title></circle>"
                )
    kind = 'class="plot" ' if frame.sides else ""
    return (
        f'<svg {kind}viewBox="0 0 {frame.width} {frame.height}" role="img" aria-label="{escape(title)}">'
        f"{''.join(marks)}</svg>\n"
    )


def _axes(
    frame: Frame, x: Axis, y: Axis, x_of: Callable[[float], float], y_of: Callable[[float], float]
) -> Iterator[str]:
    """Draw lines at the ticks with their numbers, the axes and their labels."""
    left, right, floor = frame.left, frame.width - frame.right, frame.height - frame.bottom
    # Half the height of a digit, and a line below the axis: smaller texts stand closer.
    half, below, last = (3.5, 14, 4) if frame.sides else (4, 17, 6)
    for tick in y.ticks:
        height = y_of(tick)
        yield (
            f'<line class="grid" x1="{left}" x2="{right}" y1="{height:.1f}" y2="{height:.1f}"/>'
            f'<text x="{left - 7}" y="{height + half:.1f}" text-anchor="end">{escape(y.text(tick))}</text>'
        )
    for tick in x.ticks:
        spot = x_of(tick)
        yield (
            f'<line class="grid" x1="{spot:.1f}" x2="{spot:.1f}" y1="{frame.top}" y2="{floor}"/>'
            f'<text x="{spot:.1f}" y="{floor + below}" text-anchor="middle">{escape(x.text(tick))}</text>'
        )
    yield f'<line class="axis" x1="{left}" x2="{right}" y1="{floor}" y2="{floor}"/>'
    if frame.sides:
        yield f'<line class="axis" x1="{left}" x2="{left}" y1="{frame.top}" y2="{floor}"/>'
        middle = (frame.top + floor) / 2
        for tick in y.ticks:
            yield f'<line class="axis" x1="{left - 3}" x2="{left}" y1="{y_of(tick):.1f}" y2="{y_of(tick):.1f}"/>'
        for tick in x.ticks:
            yield f'<line class="axis" x1="{x_of(tick):.1f}" x2="{x_of(tick):.1f}" y1="{floor}" y2="{floor + 3}"/>'
        yield (
            f'<text x="9" y="{middle}" text-anchor="middle" transform="rotate(-90 9 {middle})">{escape(y.label)}</text>'
        )
    yield (f'<text x="{(left + right) / 2}" y="{frame.height - last}" text-anchor="middle">{escape(x.label)}</text>')


def scatter(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    level: tuple[float, str] | None = None,
) -> str:
    """Draw a figure of y over x, with its legend; y is logarithmic where its positive values span much.

    Args:
        level: (y, text) of a line across.

    Returns:
        A ``<figure>``; nothing where there is no dot to draw.

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
    x = Axis(x_label, x_ticks, x_ticks[0], x_ticks[-1])
    y = Axis(y_label, y_ticks, y_ticks[0], y_ticks[-1], log)
    scale = ", logarithmic" if log else ""
    return (
        f'<figure class="wide"><figcaption>{escape(title)}</figcaption>\n<p class="soft">{escape(y_label)}{scale}</p>'
        f"{draw(title, series, x, y, frame=WIDE, level=level)}"
        f"{legend([(one.name, one.colour) for one in series])}</figure>\n"
    )


def layer_bars(rows: Sequence[tuple[str, float, float, float | None, str]], left: str, right: str) -> str:
    """Draw a line a layer: its size before (pale) and after (solid), and its share of the error.

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
