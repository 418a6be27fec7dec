"""What every kind of report does alike: files, refusals, widths, hostile texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowrank
from lowrank import AnalysisReport, BenchmarkReport, CompressionReport, FrontierReport, LayerRow
from lowrank.analysis.stopwatch import Spread
from lowrank.compression.plan import Plan
from lowrank.compression.report import sum_rows
from lowrank.errors import CheckpointError
from lowrank.reporting.points import FrontierPoint
from lowrank.reporting.report import Report, Table
from lowrank.reporting.text import Column

HOSTILE = "<script>x|\x1b[31m\n"


def reports() -> list[Report]:
    """One of each kind."""
    rows = [LayerRow("a.b", "Linear", (4, 4), bytes_before=64, bytes_after=64, weights=16)]
    torch.manual_seed(0)
    analysis = lowrank.analyze_model(nn.Sequential(nn.Linear(8, 8)))
    assert isinstance(analysis, AnalysisReport)
    host = {"cpu": "c", "threads": 1, "capability": "d", "route": "e", "torch": "f"}
    seconds = Spread(0.001, 0.002, 0.003)
    return [
        CompressionReport(rows, sum_rows(rows), notes=[HOSTILE]),
        AnalysisReport(analysis.rows, analysis.totals, [HOSTILE]),
        FrontierReport([FrontierPoint(0.5, 0.1, True, label="p")], [Plan(())], {"metric": "output"}, [HOSTILE]),
        BenchmarkReport((), seconds, None, None, "1 batch a pass", 3, host, 0.0, None),
    ]


@pytest.mark.parametrize("report", reports(), ids=lambda report: type(report).__name__)
def test_every_report_is_saved_as_json_markdown_and_a_page(report: Report, tmp_path: Path) -> None:
    folder = report.save(tmp_path / "out")
    for name, text in report.files().items():
        assert (folder / name).read_text(encoding="utf-8") == text
    assert set(report.files()) >= {f"{report.stem}.{kind}" for kind in ("json", "md", "html")}
    assert json.loads(report.to_json())["format_version"] == report.version
    page = report.to_html()
    assert page.count("<script>") == 1
    assert f"<title>{report.heading}" in page
    assert "\x1b" not in page.replace("\n", "")


@pytest.mark.parametrize("report", reports()[:3], ids=lambda report: type(report).__name__)
def test_notes_are_text_everywhere(report: Report) -> None:
    for text in (report.to_text(80), report.to_markdown()):
        assert "x|\\x1b[31m\\n" in text
        assert "\x1b" not in text
    assert "<script>" not in report.to_markdown()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"totals": 3}, "not a .*; it must hold '(rows|points)' and 'totals'"),
        ({"rows": None, "points": None}, "it must hold"),
        ({"format_version": 9}, "format_version 9, this lowrank reads 1; it may be written by a newer lowrank"),
        ({"notes": "x"}, "'notes' must be a list"),
    ],
)
def test_json_of_something_else_is_refused_alike(change: dict[str, Any], match: str) -> None:
    compression, _, frontier, _ = reports()
    with pytest.raises(CheckpointError, match=match):
        CompressionReport.from_json(json.dumps(json.loads(compression.to_json()) | change))
    with pytest.raises(CheckpointError, match=match):
        FrontierReport.from_json(json.dumps(json.loads(frontier.to_json()) | change), [])


def test_a_table_escapes_its_cells_in_markdown_and_shows_the_model_itself() -> None:
    table = Table([Column("layer"), Column("remark")], [["", "a|b<i>"]], ["1 layer", ""], title="More")
    assert table.to_text(80).startswith("More:\n")
    assert "(the model itself)" in table.to_text(80)
    text = table.to_markdown()
    assert text.startswith("## More\n\n|")
    assert "a\\|b&lt;i>" in text
    assert "**1 layer**" in text


def test_the_terminal_sets_the_width_within_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    report = reports()[1]
    for columns, widest in ((20, 60), (100, 100), (1000, 200)):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert report.to_text() == report.to_text(widest)
