"""The HTML page of an analysis: what a model's spectra look like, kind by kind and by depth, and every layer's numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowrank.analysis.rows import AnalysisRow
from lowrank.reporting import html
from lowrank.reporting.charts import Axis, Dot, Series, draw, nice_ticks
from lowrank.reporting.text import count_text, human_bytes, one_line, percent

__all__ = ["kinds", "sections"]

# Kinds of layers with a colour of their own; the others are drawn in grey.
COLOURS = ("1", "4", "2", "5", "6", "7", "8")
OTHERS = "3"
# The scale of spectra ends at this power of ten: what lies below matters to nobody's budget.
SMALLEST_POWER = -4
FIFTHS = (0.0, 20.0, 40.0, 60.0, 80.0, 100.0)
# Many lines over one another.
THIN = "stroke-width:1.2;opacity:.75"


def kinds(rows: Sequence[AnalysisRow]) -> dict[str, list[AnalysisRow]]:
    """Group the layers that play one part in each block, by the name they share, shortened to what tells them apart.

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


def sections(rows: Sequence[AnalysisRow], totals: Mapping[str, Any], table: str, key: str) -> list[str]:
    """Draw the parts of a :class:`lowrank.AnalysisReport`'s page, as markup.

    Args:
        rows, totals: of the report.
        table: its table, as markup.
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
    drawn = [row for row in rows if row.analysed and row.spectrum and row.spectrum[0] > 0]
    return [
        html.tiles(items),
        *([_glance(drawn, totals["curve"])] if drawn else []),
        html.section("Layers", table, text=f"{key} Click a heading to sort."),
    ]


@dataclass(frozen=True)
class _Group:
    """Layers of one kind, and the colour they share."""

    name: str
    colour: str
    rows: Sequence[AnalysisRow]


def _grouped(drawn: Sequence[AnalysisRow]) -> list[_Group]:
    """The kinds by their parameters; those without a colour of their own together."""
    found = sorted(kinds(drawn).items(), key=lambda item: -sum(row.parameters for row in item[1]))
    groups = [_Group(one_line(name), colour, rows) for (name, rows), colour in zip(found, COLOURS, strict=False)]
    rest = [row for _, rows in found[len(COLOURS) :] for row in rows]
    return [*groups, _Group("other kinds", OTHERS, rest)] if rest else groups


def _glance(drawn: Sequence[AnalysisRow], curve: Sequence[tuple[float, float]]) -> str:
    """Four charts, in which every layer has a line or a dot of its own."""
    groups = _grouped(drawn)
    hollow = any(row.data_effective_rank is not None for row in drawn)
    depth = " Hollow dots: in the metric of the calibration data." if hollow else ""
    text = (
        "One line a layer, one colour a kind. Where a line falls early, few singular values carry the layer; a flat one is full "
        f"rank and better rounded than factored.{depth}"
    )
    charts = [_curve_chart(curve), _depth_chart(drawn, groups), _spectra_chart(groups), _energy_chart(groups)]
    keys = html.legend([(f"{group.name} ({len(group.rows)})", group.colour) for group in groups])
    return html.section("The model at a glance", keys, f'<div class="charts">{"".join(charts)}</div>\n', text=text)


def _curve_chart(curve: Sequence[tuple[float, float]]) -> str:
    title = "Bytes against error, whole model"
    line = [(100 * size, 100 * error) for size, error in curve]
    return html.figure(
        title,
        "Weight error with the ranks divided best among the layers, factors alone. Rounding float32 to int8 takes 25 % at "
        "an error of about 1 %.",
        draw(
            title,
            [Series("", "1", lines=[line])],
            Axis("bytes of the matrices kept, %", FIFTHS, -5.0, 105.0),
            Axis("weight error, %", FIFTHS, 0.0, 102.0),
        ),
    )


def _depth_chart(drawn: Sequence[AnalysisRow], groups: Sequence[_Group]) -> str:
    title = "Effective rank by depth"
    number = {id(row): float(index + 1) for index, row in enumerate(drawn)}

    def dots(row: AnalysisRow) -> Iterator[Dot]:
        for effective, hollow in ((row.effective_rank or 0.0, False), (row.data_effective_rank, True)):
            if effective is not None:
                share = effective / (row.full_rank or 1)
                yield Dot(number[id(row)], 100 * share, f"{one_line(row.name)}: {percent(share)}", hollow)

    margin = max(0.05 * (len(drawn) - 1), 0.5)
    ticks = [tick for tick in nice_ticks(1.0, float(len(drawn))) if tick.is_integer() and tick <= len(drawn) + margin]
    return html.figure(
        title,
        "Share of the full rank; 100 % is a matrix with no preferred direction.",
        draw(
            title,
            [Series(group.name, group.colour, [dot for row in group.rows for dot in dots(row)]) for group in groups],
            Axis("layers, first to last", ticks, 1.0 - margin, len(drawn) + margin),
            Axis("effective rank / full rank, %", FIFTHS, 0.0, 104.0),
        ),
    )


def _spectra_chart(groups: Sequence[_Group]) -> str:
    powers = [10.0**power for power in range(SMALLEST_POWER, 1)]
    return _rank_chart(
        "Spectra by kind",
        "Singular values over the largest.",
        groups,
        Axis("singular value / largest", powers, powers[0], 1.3, log=True, text=_power),
        lambda row: row.spectrum,
    )


def _energy_chart(groups: Sequence[_Group]) -> str:
    return _rank_chart(
        "Cumulative energy by kind",
        "Share of the sum of squares that the first singular values hold.",
        groups,
        Axis("share of the energy, %", FIFTHS, 0.0, 102.0),
        lambda row: [100 * value for value in row.energy],
    )


def _rank_chart(
    title: str,
    words: str,
    groups: Sequence[_Group],
    y: Axis,
    values_of: Callable[[AnalysisRow], Sequence[float]],
) -> str:
    """A line a layer over its rank; the largest kinds come last, on top."""
    series = [
        Series(
            group.name, group.colour, lines=[_over_rank(row, values_of(row), y.low) for row in group.rows], look=THIN
        )
        for group in reversed(groups)
    ]
    return html.figure(title, words, draw(title, series, Axis("rank, % of full", FIFTHS, -5.0, 105.0), y))


def _over_rank(row: AnalysisRow, values: Sequence[float], low: float) -> list[tuple[float, float]]:
    """The values at their ranks in per cent of the full one, up to the first that lies below the scale."""
    # The same rounding as where the values were picked: of 16 singular values 33 steps show each twice.
    last = max((row.full_rank or 1) - 1, 1)
    line = []
    for index, value in enumerate(values):
        line.append((100 * round(index * last / (len(values) - 1)) / last, value))
        if value < low:
            break
    return line


def _power(value: float) -> str:
    """A power of ten with its exponent raised."""
    return "10" + str(round(math.log10(value))).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
