"""One self-contained HTML page: no network, no library, readable in light and dark, on paper and on a narrow screen.

Everything that comes from a model or a file goes through :func:`html.escape`; a content-security policy in the page
forbids every script but our own (by its hash), so that a hostile layer name could not run even if it slipped through.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from lowrank.reporting.style import SCRIPT, STYLE
from lowrank.reporting.text import one_line

__all__ = [
    "Cell",
    "Heading",
    "bullet_bar",
    "details",
    "figure",
    "legend",
    "line_chart",
    "notes_list",
    "page",
    "ratio_bar",
    "section",
    "section_text",
    "segment_bar",
    "stacked_bar",
    "table",
    "tiles",
]


# Grey (3) is kept for what was left alone.
LINE_COLOURS = ("1", "2", "4", "5", "6", "7", "8")


@dataclass(frozen=True)
class Heading:
    """A column's heading; ``hint`` is shown when the pointer rests on it."""

    title: str
    numeric: bool = False
    wide: bool = False
    hint: str = ""


@dataclass(frozen=True)
class Cell:
    """A cell's text (escaped here), what it sorts by, and optionally markup made by this module in its place."""

    text: str
    sort: float | str | None = None
    markup: str | None = None


def page(title: str, summary: Sequence[str], parts: Sequence[str], *, footer: str = "") -> str:
    """The whole document.

    Args:
        title: plain text.
        summary: plain-text paragraphs under the title.
        parts: markup made by the functions of this module.
        footer: plain text.

    Example:
        >>> page("<b>", [], []).count("<b>")
        0
    """
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    paragraphs = "".join(
        f'<p class="{"lead" if i == 0 else "soft"}">{escape(text)}</p>\n' for i, text in enumerate(summary)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(title)}</h1>\n{paragraphs}{''.join(parts)}"
        f"<footer>{escape(footer)}</footer>\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def section(title: str, *parts: str, text: str = "") -> str:
    """A card with a heading; ``text`` is plain, ``parts`` are markup of this module."""
    intro = f'<p class="soft">{escape(text)}</p>\n' if text else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{intro}{''.join(parts)}</section>\n"


def section_text(text: str) -> str:
    """A plain paragraph inside a card."""
    return f'<p class="soft">{escape(text)}</p>\n'


def details(title: str, markup: str) -> str:
    """Markup of this module behind a heading that opens it."""
    return f"<details>\n<summary>{escape(title)}</summary>\n{markup}</details>\n"


def tiles(items: Sequence[tuple[str, str, str, str]]) -> str:
    """Summary tiles: (label, value, hint, tone) with tone one of ``""``, ``"good"``, ``"bad"``."""
    cells = "".join(
        f'<li><span>{escape(label)}</span><strong class="{escape(tone)}">{escape(value)}</strong>'
        f"<span>{escape(hint)}</span></li>\n"
        for label, value, hint, tone in items
    )
    return f'<ul class="tiles">\n{cells}</ul>\n'


def stacked_bar(parts: Sequence[tuple[str, float, str]], label: str) -> str:
    """One bar cut into (label, size, colour 1 to 5) with its legend; the labels carry the numbers."""
    whole = sum(size for _, size, _ in parts) or 1.0
    strip = "".join(
        f'<i style="width:{100 * size / whole:.3f}%;background:var(--s{colour})"></i>'
        for _, size, colour in parts
        if size > 0
    )
    bar = f'<div class="strip" role="img" aria-label="{escape(label)}">{strip}</div>\n'
    return bar + legend([(text, colour) for text, _, colour in parts])


def bullet_bar(measured: float, upper: float, budget: float, labels: tuple[str, str, str]) -> str:
    """Measured value (solid), its upper bound (pale), and the budget as a mark; all on one scale.

    Args:
        measured, upper, budget: the same unit, finite and at least 0.
        labels: texts of the three, with their numbers.
    """
    end = max(measured, upper, budget) * 1.08 or 1.0
    tone = "good" if upper <= budget else "bad"
    spot = 100 * budget / end
    # The label hangs to the side of the mark on which there is room.
    side = f"right:{100 - spot:.3f}%" if spot > 50 else f"left:{spot:.3f}%"
    keys = (
        f'<li><span class="key" style="background:var(--{tone})"></span>{escape(labels[0])}</li>'
        f'<li><span class="key" style="background:var(--{tone});opacity:.4"></span>{escape(labels[1])}</li>'
    )
    return (
        f'<div class="bullet" role="img" aria-label="{escape("; ".join(labels))}">'
        f'<i style="width:{100 * upper / end:.3f}%;background:var(--{tone});opacity:.4"></i>'
        f'<i style="width:{100 * measured / end:.3f}%;background:var(--{tone})"></i>'
        f'<b style="left:{spot:.3f}%"></b><em style="{side};padding:0 4px">{escape(labels[2])}</em></div>\n'
        f'<ul class="legend">{keys}</ul>\n'
    )


def ratio_bar(part: float, whole: float) -> str:
    """A thin bar of which ``part / whole`` is filled (all of it above 1, none where the whole is 0)."""
    share = min(max(part / whole, 0.0), 1.0) if whole > 0 else 0.0
    return f'<span class="bar"><b style="width:{100 * share:.2f}%"></b></span>'


def segment_bar(label: str, segments: Sequence[tuple[str, int, str]], whole: float) -> str:
    """One bar of (name, bytes, colour 1 to 5) segments, as long as their sum is of ``whole``; names show on hover."""
    merged: list[tuple[str, int, str, int]] = []
    for name, size, colour in segments:
        # Segments too thin to be seen are drawn together with their neighbours of the same colour.
        if merged and merged[-1][2] == colour and max(size, merged[-1][1]) < 0.004 * whole:
            _, before, _, count = merged[-1]
            merged[-1] = (f"{count + 1} small layers", before + size, colour, count + 1)
        elif size > 0:
            merged.append((name, size, colour, 1))
    strip = "".join(
        f'<i style="flex:{size} 0 0;background:var(--s{colour})" title="{escape(name)}: {size:,} bytes"></i>'
        for name, size, colour, _ in merged
    )
    total = sum(size for _, size, _ in segments)
    share = 100 * total / whole if whole > 0 else 0.0
    return (
        f'<p class="label">{escape(label)}</p><div class="segments" role="img" '
        f'aria-label="{escape(label)}: {total:,} bytes" style="width:{share:.3f}%">{strip}</div>\n'
    )


def figure(title: str, text: str, markup: str) -> str:
    """A chart made elsewhere in this package, with a title and a plain sentence above it."""
    return f'<figure><figcaption>{escape(title)}</figcaption>\n<p class="soft">{escape(text)}</p>{markup}</figure>\n'


def legend(items: Sequence[tuple[str, str]]) -> str:
    """(text, colour) pairs under a chart."""
    keys = "".join(
        f'<li><span class="key" style="background:var(--s{colour})"></span>{escape(text)}</li>'
        for text, colour in items
    )
    return f'<ul class="legend">{keys}</ul>\n'


def table(
    headings: Sequence[Heading],
    rows: Sequence[Sequence[Cell]],
    *,
    total: Sequence[str] | None = None,
    muted: Sequence[bool] | None = None,
) -> str:
    """A sortable table whose first column holds names; ``muted`` rows are printed softly."""

    def head(heading: Heading) -> str:
        classes = " ".join([*(["n"] if heading.numeric else []), *(["w"] if heading.wide else [])])
        hint = f' title="{escape(heading.hint)}"' if heading.hint else ""
        first = ' data-first="desc"' if heading.numeric else ""
        return f'<th scope="col" class="{classes}" aria-sort="none"{first}{hint}>{escape(heading.title)}</th>'

    def data(index: int, cell: Cell) -> str:
        heading = headings[index]
        classes = (
            "name" if index == 0 else " ".join([*(["n"] if heading.numeric else []), *(["w"] if heading.wide else [])])
        )
        key = "" if cell.sort is None and heading.numeric else str(cell.text if cell.sort is None else cell.sort)
        content = escape(cell.text) if cell.markup is None else cell.markup
        if index == 0:
            # Long names break after a dot rather than in the middle of a word.
            content = content.replace(".", ".<wbr>")
        return f'<td class="{classes}" data-sort="{escape(key)}">{content}</td>'

    body = "".join(
        f"<tr{' class=off' if muted is not None and muted[i] else ''}>"
        f"{''.join(data(j, cell) for j, cell in enumerate(row))}</tr>\n"
        for i, row in enumerate(rows)
    )
    foot = ""
    if total is not None:
        cells = "".join(
            f'<td class="{"n" if headings[i].numeric else ""}">{escape(text)}</td>' for i, text in enumerate(total)
        )
        foot = f"<tfoot><tr>{cells}</tr></tfoot>\n"
    return (
        f'<div class="scroll" tabindex="0"><table data-sortable>\n'
        f"<thead><tr>{''.join(head(heading) for heading in headings)}</tr></thead>\n"
        f"<tbody>\n{body}</tbody>\n{foot}</table></div>\n"
    )


def notes_list(notes: Sequence[str]) -> str:
    """Plain-text notes as a list."""
    return '<ul class="notes">' + "".join(f"<li>{escape(one_line(note))}</li>\n" for note in notes) + "</ul>\n"


def line_chart(
    title: str,
    lines: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    *,
    x_label: str,
    y_label: str,
    x_ticks: Sequence[tuple[float, str]],
    y_ticks: Sequence[tuple[float, str]],
    log_y: bool = False,
    dots: bool = False,
    colours: Sequence[str] = LINE_COLOURS,
) -> str:
    """A chart as inline SVG: a line a colour of (x, y); ticks give the range; points outside are clipped to it.

    Example:
        >>> ticks = [(0, "0"), (1, "1")]
        >>> line = ("a", [(0, 0), (1, 1)])
        >>> chart = line_chart("t", [line], x_label="x", y_label="y", x_ticks=ticks, y_ticks=ticks)
        >>> chart.count("<polyline")
        1
    """
    width, height, left, top, right, bottom = 460, 270, 56, 12, 14, 44

    def warp(value: float) -> float:
        return math.log10(max(value, 1e-300)) if log_y else value

    x_low, x_high = x_ticks[0][0], x_ticks[-1][0]
    y_low, y_high = warp(y_ticks[0][0]), warp(y_ticks[-1][0])

    def x_of(x: float) -> float:
        share = (x - x_low) / ((x_high - x_low) or 1.0)
        return left + (width - left - right) * min(max(share, 0.0), 1.0)

    def y_of(y: float) -> float:
        share = (warp(y) - y_low) / ((y_high - y_low) or 1.0)
        return height - bottom - (height - top - bottom) * min(max(share, 0.0), 1.0)

    marks = [
        f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y_of(y):.1f}" y2="{y_of(y):.1f}"/>'
        f'<text x="{left - 7}" y="{y_of(y) + 4:.1f}" text-anchor="end">{escape(text)}</text>'
        for y, text in y_ticks
    ]
    marks += [
        f'<text x="{x_of(x):.1f}" y="{height - bottom + 17}" text-anchor="middle">{escape(text)}</text>'
        for x, text in x_ticks
    ]
    marks.append(f'<line class="axis" x1="{left}" x2="{width - right}" y1="{height - bottom}" y2="{height - bottom}"/>')
    marks.append(
        f'<text x="{(left + width - right) / 2}" y="{height - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    for colour, (_, points) in zip(colours, lines, strict=False):
        spots = [(x_of(x), y_of(y)) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        if dots:
            marks += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" style="fill:var(--s{colour})"/>' for x, y in spots]
        else:
            marks.append(f'<polyline class="line" points="{path}" style="stroke:var(--s{colour})"/>')
    keys = legend([(name, colour) for colour, (name, _) in zip(colours, lines, strict=False) if name])
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>\n"
        f'<p class="soft">{escape(y_label)}</p>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{"".join(marks)}</svg>\n'
        f"{keys}</figure>\n"
    )
