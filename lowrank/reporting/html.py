"""One self-contained HTML page: no network, no library, readable in light and dark, on paper and on a narrow screen.

Everything that comes from a model or a file goes through :func:`html.escape`; a content-security policy in the page
forbids every script but our own (by its hash), so that a hostile layer name could not run even if it slipped through.
"""

from __future__ import annotations

import base64
import hashlib
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


@dataclass(frozen=True)
class Heading:
    """Head a column; ``hint`` is shown when the pointer rests on it."""

    title: str
    numeric: bool = False
    wide: bool = False
    hint: str = ""


@dataclass(frozen=True)
class Cell:
    """Fill a cell: its text (escaped here), what it sorts by, and optionally markup made by this module in its place."""

    text: str
    sort: float | str | None = None
    markup: str | None = None


def page(title: str, summary: Sequence[str], parts: Sequence[str], *, footer: str = "") -> str:
    """Compose the whole document.

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
    """Make a card with a heading; ``text`` is plain, ``parts`` are markup of this module."""
    intro = f'<p class="soft">{escape(text)}</p>\n' if text else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{intro}{''.join(parts)}</section>\n"


def section_text(text: str) -> str:
    """Make a plain paragraph inside a card."""
    return f'<p class="soft">{escape(text)}</p>\n'


def details(title: str, markup: str) -> str:
    """Put markup of this module behind a heading that opens it."""
    return f"<details>\n<summary>{escape(title)}</summary>\n{markup}</details>\n"


def tiles(items: Sequence[tuple[str, str, str, str]]) -> str:
    """Make summary tiles: (label, value, hint, tone) with tone one of ``""``, ``"good"``, ``"bad"``."""
    cells = "".join(
        f'<li><span>{escape(label)}</span><strong class="{escape(tone)}">{escape(value)}</strong>'
        f"<span>{escape(hint)}</span></li>\n"
        for label, value, hint, tone in items
    )
    return f'<ul class="tiles">\n{cells}</ul>\n'


def stacked_bar(parts: Sequence[tuple[str, float, str]], label: str) -> str:
    """Draw one bar cut into (label, size, colour 1 to 5) with its legend; the labels carry the numbers."""
    whole = sum(size for _, size, _ in parts) or 1.0
    strip = "".join(
        f'<i style="width:{100 * size / whole:.3f}%;background:var(--s{colour})"></i>'
        for _, size, colour in parts
        if size > 0
    )
    bar = f'<div class="strip" role="img" aria-label="{escape(label)}">{strip}</div>\n'
    return bar + legend([(text, colour) for text, _, colour in parts])


def bullet_bar(measured: float, upper: float, budget: float, labels: tuple[str, str, str]) -> str:
    """Draw a measured value (solid), its upper bound (pale), and the budget as a mark; all on one scale.

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
    """Draw a thin bar of which ``part / whole`` is filled (all of it above 1, none where the whole is 0)."""
    share = min(max(part / whole, 0.0), 1.0) if whole > 0 else 0.0
    return f'<span class="bar"><b style="width:{100 * share:.2f}%"></b></span>'


def segment_bar(label: str, segments: Sequence[tuple[str, int, str]], whole: float) -> str:
    """Draw one bar of (name, bytes, colour 1 to 5) segments, as long as their sum is of ``whole``; names show on hover."""
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
    """Frame a chart made elsewhere in this package, with a title and a plain sentence above it."""
    return f'<figure><figcaption>{escape(title)}</figcaption>\n<p class="soft">{escape(text)}</p>{markup}</figure>\n'


def legend(items: Sequence[tuple[str, str]]) -> str:
    """List (text, colour) pairs under a chart."""
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
    """Make a sortable table whose first column holds names; ``muted`` rows are printed softly."""

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
    """List plain-text notes."""
    return '<ul class="notes">' + "".join(f"<li>{escape(one_line(note))}</li>\n" for note in notes) + "</ul>\n"
