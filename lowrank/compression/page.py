"""The HTML page of a compression report: tiles, bars and the sortable table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from lowrank.calibration.metrics import METRICS, recorded_metric
from lowrank.compression.formats import colour_of
from lowrank.compression.rows import ARITHMETICS, COLUMNS, LayerRow, row_texts, sum_rows, total_texts
from lowrank.reporting import charts as report_charts
from lowrank.reporting import html as report_html
from lowrank.reporting.html import Cell, Heading
from lowrank.reporting.points import FrontierPoint, frontier_chart, points_table
from lowrank.reporting.text import MISSING, human_bytes, one_line, percent, shown_name

__all__ = ["sections"]

# Layers that get bars of their own; the others are summed in one line.
MOST_BARS = 40


def sections(
    rows: Sequence[LayerRow], totals: Mapping[str, Any], answer: str, frontier: Sequence[FrontierPoint] = ()
) -> list[str]:
    """Draw the parts of a :class:`lowrank.CompressionReport`'s page, as markup.

    Args:
        rows, totals: of the report.
        answer: which formats won, in words.
        frontier: what other budgets would have given.
    """
    parts = [report_html.tiles(_tiles(rows, totals, answer))]
    bar = _budget_bar(totals)
    if bar:
        parts.append(report_html.section("Error against the budget", bar))
    if frontier:
        parts.append(report_html.section("What other budgets would have given", *_frontier(frontier, totals)))
    strip = [
        (f"{human_bytes(totals.get(each.key, 0))} {each.words}", float(totals.get(each.key) or 0), each.colour)
        for each in ARITHMETICS
    ]
    parts.append(
        report_html.section("How the bytes are computed with", report_html.stacked_bar(strip, "bytes by arithmetic"))
    )
    parts.append(
        report_html.section(
            "Where the bytes are",
            _bytes_chart(rows),
            text="Each segment is a layer, in the model's order; one scale. Colours: the format after.",
        )
    )
    parts.append(
        report_html.section(
            "Layer by layer",
            _layer_bars(rows),
            text="Left: stored bytes before (pale) and after. Right: the part of the model's error that the plan predicts from "
            "each layer; the longest bar is the layer that costs most.",
        )
    )
    parts.append(
        report_html.section(
            "Layers",
            _layer_table(rows),
            text="Every module that holds weights, in the model's order; grey rows were left alone. "
            "Click a heading to sort.",
        )
    )
    return parts


def _tiles(rows: Sequence[LayerRow], totals: Mapping[str, Any], answer: str) -> list[tuple[str, str, str, str]]:
    metric = one_line(str(totals.get("metric") or "error"))
    show = recorded_metric(metric).show
    sizes = f"{human_bytes(totals.get('bytes_before'))} → {human_bytes(totals.get('bytes_after'))}"
    bits = totals.get("bits_per_weight")
    items = [("Size", percent(totals.get("size_ratio"), 3), sizes, "")]
    items.append(("Bits a weight", MISSING if bits is None else f"{bits:.2f}", "of the original weights", ""))
    measured, upper, budget = (totals.get(key) for key in ("error_measured", "error_upper", "error_budget"))
    name = METRICS[metric].title if metric in METRICS else metric
    if measured is not None:
        items.append((f"{name[0].upper()}{name[1:]}", show(measured), "measured on the finished model", ""))
    elif totals.get("error_predicted") is not None:
        items.append((f"{name[0].upper()}{name[1:]}", show(totals["error_predicted"]), "predicted, not measured", ""))
    if upper is not None:
        tone = "" if budget is None else ("good" if upper <= budget else "bad")
        items.append(("At most", show(upper), "with 95 % confidence", tone))
    if budget is not None:
        items.append(("Budget", show(budget), "allowed error", ""))
    changed = sum(row.compressed for row in rows)
    items.append(("Layers compressed", f"{changed} of {len(rows)}", answer, ""))
    return items


def _budget_bar(totals: Mapping[str, Any]) -> str:
    measured, upper, budget = (totals.get(key) for key in ("error_measured", "error_upper", "error_budget"))
    upper = measured if upper is None else upper
    if not (_drawable(measured) and _drawable(upper) and _drawable(budget)):
        return ""
    show = recorded_metric(one_line(str(totals.get("metric") or "error"))).show
    labels = (f"measured {show(measured)}", f"at most {show(upper)} with 95 % confidence", f"budget {show(budget)}")
    return report_html.bullet_bar(measured, upper, budget, labels)


def _layer_table(rows: Sequence[LayerRow]) -> str:
    hints = {
        "before": "stored bytes of the original module",
        "after": "stored bytes of the compressed module",
        "bits/w": "8 x stored bytes / number of original weights",
        "weight err": "Frobenius norm of the change / of the weight",
        "act. err": "the same in the norm of the calibration inputs",
        "remarks": "integer or weight-only: which products the layer uses; or why it was left alone",
    }
    headings = [
        Heading(column.title, column.numeric, column.title == "remarks", hints.get(column.title, ""))
        for column in COLUMNS
    ]
    # The bar stands beside the numbers it draws.
    spot = [column.title for column in COLUMNS].index("after") + 1
    headings.insert(spot, Heading("kept", hint="stored bytes after / before; sorts by what was saved"))
    body = []
    for row in rows:
        sorts: list[float | None] = [None, None, row.rank, row.bytes_before, row.bytes_after, row.bits_per_weight]
        sorts += [row.weight_error, row.activation_error, None, math.prod(row.shape), None]
        name, *texts = row_texts(row)
        cells = [Cell(text, sort) for text, sort in zip([shown_name(name), *texts], sorts, strict=True)]
        bar = report_html.ratio_bar(row.bytes_after, row.bytes_before)
        cells.insert(spot, Cell("", row.bytes_before - row.bytes_after, markup=bar))
        body.append(cells)
    total = total_texts(rows)
    total.insert(spot, "")
    muted = [not row.compressed for row in rows]
    return report_html.table(headings, body, total=total, muted=muted)


def _frontier(points: Sequence[FrontierPoint], totals: Mapping[str, Any]) -> list[str]:
    metric = recorded_metric(one_line(str(totals.get("metric") or "error")))
    unit, budget = metric.unit, totals.get("error_budget")
    chart = frontier_chart(
        points,
        metric.show,
        factor=unit.factor,
        axis=unit.axis,
        suffix=unit.suffix,
        budget=budget if _drawable(budget) else None,
    )
    told = (
        "Measured points were put up and run on the samples that the search used; predicted ones are what the planner "
        "expects of other budgets, after those measurements corrected it. lowrank frontier measures such points on data of its own."
    )
    text = report_html.section_text(told)
    return [text, chart, report_html.details("The points as a table", points_table(points, metric.show))]


def _layer_bars(rows: Sequence[LayerRow]) -> str:
    ordered = sorted(rows, key=lambda row: -max(row.bytes_before, row.bytes_after))[:MOST_BARS]
    shown = {id(row) for row in ordered}
    bars = [
        (
            shown_name(one_line(row.name)),
            float(row.bytes_before),
            float(row.bytes_after),
            row.error_share,
            f"{one_line(row.name)}: {human_bytes(row.bytes_before)} to {human_bytes(row.bytes_after)}"
            + ("" if row.error_share is None else f", {percent(row.error_share)} of the error"),
        )
        for row in rows
        if id(row) in shown
    ]
    rest = [row for row in rows if id(row) not in shown]
    if rest:
        before, after = sum(row.bytes_before for row in rest), sum(row.bytes_after for row in rest)
        shares = [row.error_share for row in rest if row.error_share is not None]
        name = f"{len(rest)} smaller modules together"
        text = f"{name}: {human_bytes(before)} to {human_bytes(after)}"
        bars.append((name, float(before), float(after), sum(shares) if shares else None, text))
    return report_charts.layer_bars(bars, "bytes before and after", "share of the error")


def _bytes_chart(rows: Sequence[LayerRow]) -> str:
    formats = sorted({row.format for row in rows})
    colours = {name: colour_of(name) for name in formats}
    whole = max(sum_rows(rows)["bytes_before"], sum_rows(rows)["bytes_after"])
    before = [(one_line(row.name), row.bytes_before, "3") for row in rows]
    after = [(one_line(row.name), row.bytes_after, colours[row.format]) for row in rows]
    legend = [
        (f"{name} {human_bytes(sum(row.bytes_after for row in rows if row.format == name))}", colours[name])
        for name in formats
    ]
    return (
        report_html.segment_bar("before", before, whole)
        + report_html.segment_bar("after", after, whole)
        + report_html.legend(legend)
    )


def _drawable(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and math.isfinite(value) and value >= 0
