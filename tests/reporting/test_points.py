"""The frontier and the bars in a compression report: from the search to the page and back from JSON."""

from __future__ import annotations

import json
import math

import pytest
import torch
from helpers import matrix_with_spectrum, seeded
from torch import nn

from lowrank import CompressionReport, LayerRow, compress_model
from lowrank.compression.report import sum_rows
from lowrank.errors import CheckpointError
from lowrank.reporting.charts import Dot, Series, layer_bars, nice_ticks, scatter
from lowrank.reporting.points import FrontierPoint, frontier_chart
from lowrank.reporting.text import percent


@pytest.fixture(scope="module")
def compressed() -> CompressionReport:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 8))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            sigma = torch.logspace(0, -1.5, 48, dtype=torch.float64)
            layer.weight.copy_(matrix_with_spectrum(*layer.weight.shape, sigma, seeded(3)))
    inputs = [torch.randn(64, 64, generator=seeded(index)) for index in range(6)]
    return compress_model(model, error_budget=0.05, calibration=inputs, progress=False).report


def test_the_search_leaves_measured_and_predicted_points(compressed: CompressionReport) -> None:
    points = compressed.frontier
    measured = [point for point in points if point.measured]
    predicted = [point for point in points if not point.measured]
    assert len(measured) == len(compressed.totals["finalists"])
    assert len(predicted) >= 4
    assert [point.size_ratio for point in points] == sorted(point.size_ratio for point in points)
    assert all(math.isfinite(point.error) and 0 < point.size_ratio < 1 for point in points)
    ordered = sorted(predicted, key=lambda point: point.budget or 0.0)
    sizes = [point.size_ratio for point in ordered]
    assert sizes == sorted(sizes, reverse=True), "a larger budget never needs more bytes"
    assert all(point.error <= (point.budget or 0.0) * (1 + 1e-9) for point in predicted)
    chosen = [point for point in measured if point.budget == 0.05]
    assert [point.size_ratio for point in chosen] == [pytest.approx(compressed.totals["size_ratio"], rel=1e-12)]


def test_shares_of_the_error_sum_to_one(compressed: CompressionReport) -> None:
    shares = [row.error_share for row in compressed.rows if row.error_share is not None]
    assert sum(shares) == pytest.approx(1.0, rel=1e-9)
    assert all(0.0 <= share <= 1.0 for share in shares)


def test_the_frontier_survives_json_and_its_absence_too(compressed: CompressionReport) -> None:
    again = CompressionReport.from_json(compressed.to_json())
    assert again.frontier == compressed.frontier
    assert again.rows == compressed.rows
    data = json.loads(compressed.to_json())
    del data["frontier"]
    assert CompressionReport.from_json(json.dumps(data)).frontier == []
    for odd in ({}, 3, [{"size_ratio": 1}]):
        with pytest.raises(CheckpointError, match="frontier"):
            CompressionReport.from_json(json.dumps(data | {"frontier": odd}))


def test_the_page_shows_points_and_bars(compressed: CompressionReport) -> None:
    page = compressed.to_html()
    assert page.count("<circle") == len(compressed.frontier)
    assert page.count("fill:var(--card)") == sum(not point.measured for point in compressed.frontier)
    assert page.count('class="after"') == len(compressed.rows)
    assert "budget 5 %" in page
    assert "http" not in page.replace("http-equiv", "")


def test_many_layers_are_summed_beyond_the_largest() -> None:
    rows = [
        LayerRow(f"layer{i}", "Linear", (4, 4), bytes_before=64 + i, bytes_after=64 + i, weights=16) for i in range(60)
    ]
    page = CompressionReport(rows, sum_rows(rows)).to_html()
    assert page.count('class="after"') == 41
    assert "20 smaller modules together" in page


def test_names_in_charts_are_escaped() -> None:
    bars = layer_bars([("<b>x", 2.0, 1.0, None, '"><script>')], "a", "b")
    chart = frontier_chart([FrontierPoint(0.5, 0.1, True, label="<script>\x1b")], percent, budget=0.2)
    for text in (bars, chart):
        assert "<script>" not in text
        assert "<b>x" not in text
        assert "\x1b" not in text


@pytest.mark.parametrize("factor", [1.0, 100.0])
@pytest.mark.parametrize("errors", [[0.0], [0.0, 0.1], [1e-6, 0.5], [0.1, 0.1], [0.02, 0.03]])
def test_charts_of_any_errors_stay_in_their_frame(factor: float, errors: list[float]) -> None:
    points = [FrontierPoint(0.2 + 0.1 * index, error, True) for index, error in enumerate(errors)]
    chart = frontier_chart(points, str, factor=factor, axis="nats a token", suffix="")
    spots = [float(part.split('"')[1]) for part in chart.split(" cy=")[1:] for part in [f" cy={part}"]]
    assert len(spots) == len(errors)
    assert all(0.0 <= spot <= 320.0 for spot in spots)
    assert "nan" not in chart


def test_ticks_are_round_and_cover_the_range() -> None:
    for low, high in ((0.0, 1.0), (3.2, 97.0), (1e-7, 3e-7), (5.0, 5.0)):
        ticks = nice_ticks(low, high)
        assert ticks[0] <= low + 1e-12
        assert ticks[-1] >= high - 1e-12
        assert 2 <= len(ticks) <= 12


def test_a_chart_of_nothing_is_nothing() -> None:
    assert scatter("t", [], x_label="x", y_label="y") == ""
    assert scatter("t", [Series("a", "1", [Dot(math.nan, 1.0)])], x_label="x", y_label="y") == ""
