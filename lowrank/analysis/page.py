"""The HTML page of an analysis: what a model's spectra look like, kind by kind and by depth, and every layer's numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lowrank.analysis.rows import AnalysisRow
from lowrank.errors import UsageError
from lowrank.integrations.matplotlib import Line, page_chart
from lowrank.reporting import html as report_html
from lowrank.reporting.html import Cell, Heading
from lowrank.reporting.text import count_text, human_bytes, one_line, percent

__all__ = ["kinds", "render"]

# Kinds of layers with a colour of their own; the others are drawn in grey.
COLOURS = ("1", "4", "2", "5", "6", "7", "8")
OTHERS = "3"
# The scale of spectra ends here: what lies below matters to nobody's budget.
SMALLEST = 1e-4


def kinds(rows: Sequence[AnalysisRow]) -> dict[str, list[AnalysisRow]]:
    """Layers that play one part in each block, by the name they share, shortened to what tells them apart.

    Example:
        >>> rows = [AnalysisRow(f"encoder.{i}.{part}", "Linear", (4, 4), 16, 64) for i in (0, 1) for part in ("query", "key")]
        >>> {kind: len(members) for kind, members in kinds(rows).items()}
        {'query': 2, 'key': 2}
    """
    groups: dict[tuple[str, ...], list[AnalysisRow]] = {}
    for row in rows:
        parts = tuple("*" if part.isdecimal() else part for part in row.name.split("."))
        groups.setdefault(parts, []).append(row)
    named: dict[str, list[AnalysisRow]] = {}
    for parts, members in groups.items():
        depth = next(
            (
                depth
                for depth in range(1, len(parts) + 1)
                if parts[-depth] != "*" and sum(other[-depth:] == parts[-depth:] for other in groups) == 1
            ),
            len(parts),
        )
        named[".".join(parts[-depth:]) or members[0].kind] = members
    return named


def render(
    rows: Sequence[AnalysisRow],
    totals: Mapping[str, Any],
    notes: Sequence[str],
    *,
    summary: Sequence[str],
    headings: Sequence[Heading],
    cells: Sequence[Sequence[str]],
    total: Sequence[str],
    key: str,
) -> str:
    """The page of a :class:`lowrank.AnalysisReport`.

    Args:
        rows, totals, notes: of the report.
        summary: its paragraphs.
        headings, cells, total: its table as texts, a row of cells for each of ``rows``.
        key: what the columns mean.
    """
    items = [
        ("Layers with a matrix", f"{totals['analysed']} of {totals['layers']}", "", ""),
        ("Parameters", count_text(totals["parameters"]), human_bytes(totals["bytes"]), ""),
        *(
            (f"Factors at {100 * float(level):g} % energy", percent(ratio, 3), "of the bytes", "")
            for level, ratio in totals.get("size_ratio_at_energy", {}).items()
        ),
    ]
    parts = [report_html.tiles(items)]
    drawn = [row for row in rows if row.analysed and row.spectrum and row.spectrum[0] > 0]
    if drawn:
        parts += _charts(drawn, totals)
    body = [
        [Cell(text, _number(text) if headings[index].numeric else None) for index, text in enumerate(texts)]
        for texts in cells
    ]
    muted = [not row.analysed for row in rows]
    table = report_html.table(headings, body, total=total, muted=muted)
    parts.append(report_html.section("Layers", table, text=f"{key} Click a heading to sort."))
    if notes:
        parts.append(report_html.section("Notes", report_html.notes_list(notes)))
    source, versions = totals.get("source"), totals.get("versions") or {}
    footer = ", ".join(f"{name} {value}" for name, value in sorted(versions.items()))
    title = f"Low-rank analysis: {source}" if source else "Low-rank analysis"
    return report_html.page(title, summary, parts, footer=footer)


def _charts(drawn: Sequence[AnalysisRow], totals: Mapping[str, Any]) -> list[str]:
    """Four charts: every layer's own line where matplotlib is there, the mean of each kind where it is not."""
    found = sorted(kinds(drawn).items(), key=lambda item: -sum(row.parameters for row in item[1]))
    groups = [(one_line(name), colour, members) for (name, members), colour in zip(found, COLOURS, strict=False)]
    rest = [row for _, members in found[len(COLOURS) :] for row in members]
    if rest:
        groups.append(("other kinds", OTHERS, rest))
    keys = report_html.legend([(f"{name} ({len(members)})", colour) for name, colour, members in groups])
    try:
        charts = _plots(drawn, groups, totals)
        intro = "One line a layer, one colour a kind."
    except UsageError:
        charts = _plain_charts(drawn, groups, totals)
        intro = "The mean of each kind; pip install 'lowrank[plot]' draws every layer's own line."
    hollow = any(row.data_effective_rank is not None for row in drawn)
    depth = " Hollow dots: in the metric of the calibration data." if hollow else ""
    text = (
        f"{intro} Where a line falls early, few singular values carry the layer; a flat one is full rank and better rounded than "
        f"factored.{depth}"
    )
    return [
        report_html.section("The model at a glance", keys, f'<div class="charts">{"".join(charts)}</div>\n', text=text)
    ]


def _plots(
    drawn: Sequence[AnalysisRow], groups: Sequence[tuple[str, str, Sequence[AnalysisRow]]], totals: Mapping[str, Any]
) -> list[str]:
    curve = totals["curve"]
    charts = [
        report_html.figure(
            "Bytes against error, whole model",
            "Weight error with the ranks divided best among the layers, factors alone. Rounding float32 to int8 takes 25 % at "
            "an error of about 1 %.",
            page_chart(
                "Bytes against error, whole model",
                [Line("1", [100 * size for size, _ in curve], [100 * error for _, error in curve], width=2.0)],
                x_label="bytes of the matrices kept, %",
                y_label="weight error, %",
                y_limits=(0, 102),
            ),
        )
    ]
    number = {id(row): float(index + 1) for index, row in enumerate(drawn)}
    dots = []
    for _, colour, members in groups:
        dots.append(
            Line(
                colour,
                [number[id(row)] for row in members],
                [100 * (row.effective_rank or 0.0) / (row.full_rank or 1) for row in members],
                dots="full",
            )
        )
        seen = [row for row in members if row.data_effective_rank is not None]
        if seen:
            effective = [100 * (row.data_effective_rank or 0.0) / (row.full_rank or 1) for row in seen]
            dots.append(Line(colour, [number[id(row)] for row in seen], effective, dots="hollow"))
    charts.append(
        report_html.figure(
            "Effective rank by depth",
            "Share of the full rank; 100 % is a matrix with no preferred direction.",
            page_chart(
                "Effective rank by depth",
                dots,
                x_label="layers, first to last",
                y_label="effective rank / full rank, %",
                y_limits=(0, 104),
                whole_x=True,
            ),
        )
    )
    for title, words, label, attribute, log in (
        ("Spectra by kind", "Singular values over the largest.", "singular value / largest", "spectrum", True),
        (
            "Cumulative energy by kind",
            "Share of the sum of squares that the first singular values hold.",
            "share of the energy, %",
            "energy",
            False,
        ),
    ):
        lines = []
        # The largest kinds come last, on top.
        for _, colour, members in reversed(groups):
            for row in members:
                values: Sequence[float] = getattr(row, attribute)
                # The same rounding as where the values were picked: of 16 singular values 33 steps show each twice.
                last = max((row.full_rank or 1) - 1, 1)
                steps = [100 * round(index * last / (len(values) - 1)) / last for index in range(len(values))]
                shown = list(values) if log else [100 * value for value in values]
                lines.append(Line(colour, steps, shown, opacity=0.75))
        limits = (SMALLEST, 1.3) if log else (0.0, 102.0)
        chart = page_chart(title, lines, x_label="rank, % of full", y_label=label, log_y=log, y_limits=limits)
        charts.append(report_html.figure(title, words, chart))
    return charts


def _plain_charts(
    drawn: Sequence[AnalysisRow], groups: Sequence[tuple[str, str, Sequence[AnalysisRow]]], totals: Mapping[str, Any]
) -> list[str]:
    quarters = [(x / 4, f"{25 * x} %") for x in range(5)]
    powers = [(10.0**power, f"1e{power}" if power else "1") for power in range(-4, 1)]
    depth = {
        id(row): (float(index), (row.effective_rank or 0.0) / (row.full_rank or 1)) for index, row in enumerate(drawn)
    }
    colours = [colour for _, colour, _ in groups]
    charts = [
        report_html.line_chart(
            "Bytes against error, whole model",
            [("", totals["curve"])],
            x_label="bytes of the matrices kept",
            y_label="weight error",
            x_ticks=quarters,
            y_ticks=quarters,
        ),
        report_html.line_chart(
            "Effective rank by depth",
            [("", [depth[id(row)] for row in members]) for _, _, members in groups],
            x_label="layers in order",
            y_label="effective rank / full rank",
            x_ticks=[(0, "first"), (max(len(drawn) - 1, 1), "last")],
            y_ticks=quarters,
            dots=True,
            colours=colours,
        ),
    ]
    for title, label, attribute, ticks in (
        ("Spectra by kind", "singular value / largest, mean of the layers", "spectrum", powers),
        ("Cumulative energy by kind", "share of the energy, mean of the layers", "energy", quarters),
    ):
        lines = [("", _mean_curve([getattr(row, attribute) for row in members])) for _, _, members in groups]
        charts.append(
            report_html.line_chart(
                title,
                lines,
                x_label="rank / full rank",
                y_label=label,
                x_ticks=quarters,
                y_ticks=ticks,
                log_y=attribute == "spectrum",
                colours=colours,
            )
        )
    return charts


def _mean_curve(curves: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    steps = len(curves[0]) - 1
    return [(i / steps, sum(curve[i] for curve in curves) / len(curves)) for i in range(steps + 1)]


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", "").removesuffix(" %"))
    except ValueError:
        return None
