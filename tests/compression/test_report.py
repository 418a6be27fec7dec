"""The report adds up, says in words what its numbers say, and shows hostile names as text."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank.compression.report import CompressionReport, LayerRow, sum_rows
from lowrank.errors import CheckpointError, LowRankError, StorageError
from lowrank.layers.spec import LayerSpec
from lowrank.reporting.charts import HALF, WIDE, Axis, Dot, Frame, Series, draw
from lowrank.reporting.html import bullet_bar, page, segment_bar
from lowrank.reporting.text import Column, human_bytes, percent, plain, shorten, stable_json, terminal_table

HOSTILE = "<script>alert('x')</script>|`\x1b[31m\n\"onload=&amp;"


def rows() -> list[LayerRow]:
    return [
        LayerRow(
            "embed", "Embedding", (100, 8), LayerSpec("int8", bits=8, activations="float"),
            bytes_before=3200, bytes_after=1200, bits_per_weight=12.0, weight_error=0.005, weights=800,
        ),
        LayerRow(
            "encoder.layer.0.dense", "Linear", (8, 16), LayerSpec("lowrank-int8", 2, 8, "int8"),
            bytes_before=544, bytes_after=88, bits_per_weight=8 * 88 / 136, weight_error=0.1, activation_error=0.04,
            reason="the metric does not depend on it", weights=136,
        ),
        LayerRow(
            "norm", "LayerNorm", (8,), bytes_before=64, bytes_after=64, bits_per_weight=32.0, reason="not a target", weights=16
        ),
        LayerRow(
            "head", "Linear", (100, 8), LayerSpec("int8", bits=8, activations="int8"),
            weight_error=0.005, reason="tied with embed",
        ),
    ]  # fmt: skip


def report(**totals: Any) -> CompressionReport:
    stated = {
        "metric": "output",
        "error_measured": 0.093,
        "error_upper": 0.097,
        "error_budget": 0.1,
        "seed": 0,
        "versions": {"torch": "2.13.0"},
    }
    return CompressionReport(rows(), sum_rows(rows()) | stated | totals, {"seconds": {"plan": 1.5}}, ["a note"])


class Page(HTMLParser):
    """Tags with their attributes, and the text of each body row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


# ---- sums


def test_rows_sum_to_totals_and_bytes_split_by_arithmetic() -> None:
    totals = sum_rows(rows())
    assert (totals["bytes_before"], totals["bytes_after"], totals["weights"]) == (3808, 1352, 952)
    assert (totals["bytes_integer"], totals["bytes_weight_only"], totals["bytes_dense"]) == (88, 1200, 64)
    assert totals["size_ratio"] == 1352 / 3808
    assert totals["bits_per_weight"] == 8 * 1352 / 952
    report().check_totals()


@pytest.mark.parametrize(
    "key", ["bytes_before", "bytes_after", "weights", "bytes_integer", "bytes_weight_only", "bytes_dense"]
)
def test_a_total_off_by_one_is_refused(key: str) -> None:
    broken = report()
    broken.totals[key] += 1
    with pytest.raises(LowRankError, match=key):
        broken.check_totals()


def test_missing_totals_and_wrong_bits_are_refused() -> None:
    broken = report()
    del broken.totals["size_ratio"]
    with pytest.raises(LowRankError, match="size_ratio"):
        broken.check_totals()
    broken = report()
    broken.rows[0] = replace(broken.rows[0], bits_per_weight=8.0)
    with pytest.raises(LowRankError, match=r"embed: 8\.0 bits per weight"):
        broken.check_totals()


def test_an_empty_report_has_no_ratio() -> None:
    empty = CompressionReport([], sum_rows([]))
    empty.check_totals()
    assert empty.totals["size_ratio"] is None
    for text in (empty.to_text(80), empty.to_markdown(), empty.to_html()):
        assert "0 modules" in text


# ---- words


def test_summary_says_size_error_bound_and_budget() -> None:
    first = report().summary()[0]
    assert first == (
        "35.5 % of the original size (3.81 kB -> 1.35 kB, 11.4 bits a weight), output error 9.3 % measured, "
        "at most 9.7 % with 95 % confidence, budget 10 %."
    )


@pytest.mark.parametrize(
    ("totals", "words"),
    [
        ({"metric": "kl", "error_measured": 0.0213}, "KL divergence 0.0213 nats a token measured"),
        ({"metric": "perplexity", "error_measured": 0.02}, "increase of the perplexity 2.0 % measured"),
        ({"metric": "accuracy", "error_measured": 0.01}, "relative loss of accuracy 1.0 % measured"),
        ({"error_measured": None, "error_predicted": 0.05}, "output error 5.0 % predicted, not measured"),
        ({"size_budget": 0.3}, "size budget 30.0 %"),
    ],
)
def test_summary_names_the_metric(totals: dict[str, Any], words: str) -> None:
    assert words in report(**totals).summary()[0]


def test_the_answer_is_said() -> None:
    only = [row for row in rows() if row.format in ("int8", "dense")]
    assert CompressionReport(only, sum_rows(only)).answer == "int8, no low rank"
    assert report().answer == "int8 in 2 layers, lowrank-int8 in 1 layer"
    assert CompressionReport(rows()[2:3], sum_rows(rows()[2:3])).answer == "nothing was compressed"


def test_every_row_is_in_every_rendering_with_its_reason() -> None:
    made = report()
    assert any(row.reason for row in made.rows)
    for text in (made.to_text(200), made.to_markdown(), Page(made.to_html()).text):
        for row in made.rows:
            assert row.name in text
            assert (row.reason or "") in text
        assert "a note" in text


# ---- terminal


@pytest.mark.parametrize("width", [70, 80, 100, 120, 160])
def test_terminal_lines_fit(width: int) -> None:
    made = report()
    made.rows[0] = replace(made.rows[0], name="model.decoder." * 20 + "query", reason="a long reason " * 20)
    text = made.to_text(width)
    assert max(map(len, text.splitlines())) <= width
    assert ".query" in text, "the end of a name is what tells layers apart"
    assert text.isascii(), "a C locale cannot print more"


def test_terminal_numbers_are_right_aligned() -> None:
    lines = report().to_text(160).splitlines()
    head = next(line for line in lines if line.startswith("layer"))
    end = head.index("after") + len("after")
    values = [line[:end].split("  ")[-1] for line in lines if line.startswith(("embed", "norm", "4 modules"))]
    assert [value.strip() for value in values] == ["1.20 kB", "64 B", "1.35 kB"]


def test_columns_are_dropped_in_order_and_empty_ones_first() -> None:
    columns = [Column("name", keep="right", least=4), Column("aaaaaaaaaa", drop=1), Column("b", drop=2)]
    assert "aaaaaaaaaa" not in terminal_table(columns, [["x", "1", "2"]], width=14)
    assert " b" in terminal_table(columns, [["x", "1", "2"]], width=14)
    assert "aaaaaaaaaa" not in terminal_table(columns, [["x", "", "2"]], width=80)


# ---- JSON


def test_json_round_trip_is_exact_and_deterministic() -> None:
    made = report(error_measured=0.1 + 0.2)
    text = made.to_json()
    again = CompressionReport.from_json(text)
    assert again.rows == made.rows
    assert again.totals["error_measured"] == 0.1 + 0.2
    assert again.to_json() == text
    assert list(json.loads(text)) == sorted(json.loads(text))
    reordered = CompressionReport(made.rows, dict(reversed(made.totals.items())), {}, made.notes)
    assert reordered.to_json() == text


def test_rows_of_older_and_of_newer_formats_are_read() -> None:
    data = json.loads(report().to_json())
    assert [row["scheme"] for row in data["rows"]] == [None] * 4, "written even where it is null"
    assert not {"spec", "group", "rounding"} & set(data["rows"][0])
    data["rows"] = [
        {"name": "old", "kind": "Linear", "shape": [4, 4]},
        {
            "name": "new",
            "kind": "Linear",
            "shape": [4, 4],
            "format": "int3later",
            "bits": 3,
            "group": 64,
            "rounding": "best",
        },
    ]
    read = CompressionReport.from_json(json.dumps(data))
    assert [row.compressed for row in read.rows] == [False, True]
    assert read.rows[1].spec == LayerSpec("int3later", bits=3, group=64, rounding="best")
    assert read.answer == "int3later in 1 layer"
    again = json.loads(read.to_json())["rows"][1]
    assert (again["group"], again["rounding"], again["scheme"]) == (64, "best", None)
    with pytest.raises(CheckpointError, match="spec"):
        CompressionReport.from_json(json.dumps(data | {"rows": [data["rows"][0] | {"spec": {}}]}))


def test_json_holds_nothing_of_the_run_and_no_nan() -> None:
    made = report(error_upper=math.inf, error_measured=math.nan)
    made.run["host"] = "a-host-name"
    text = made.to_json()
    assert "a-host-name" not in text
    assert "seconds" not in text
    data = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert data["totals"]["error_upper"] is None
    assert data["totals"]["error_measured"] is None
    assert made.to_html().count("nan") == report().to_html().count("nan"), "NaN is not drawn"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rows": 3}, "rows"),
        ({"format_version": 2}, "newer"),
        ({"rows": [3]}, "map"),
        ({"rows": [{"name": "a", "kind": "b", "shape": [1], "surprise": 1}]}, "surprise"),
        ({"rows": [{"name": "a"}]}, "shape"),
        ({"notes": "x"}, "notes"),
    ],
)
def test_json_of_something_else_is_refused(change: dict[str, Any], match: str) -> None:
    data = json.loads(report().to_json()) | change
    with pytest.raises(CheckpointError, match=match):
        CompressionReport.from_json(json.dumps(data))


def test_plain_takes_scalars_of_torch_and_refuses_objects() -> None:
    assert plain({"a": torch.tensor(2.5), "b": (1, None), "c": Path("x")}) == {"a": 2.5, "b": [1, None], "c": "x"}
    with pytest.raises(TypeError, match="object"):
        plain(object())
    assert stable_json({"b": 1, "a": "é"}) == '{\n "a": "\\u00e9",\n "b": 1\n}\n'


# ---- HTML


def test_html_is_self_contained_and_its_script_is_the_allowed_one() -> None:
    text = report().to_html()
    parsed = Page(text)
    assert not re.search(r"(?:src|href)\s*=|url\(|@import|https?:", text)
    assert [tag for tag, _ in parsed.tags if tag in ("link", "img", "iframe", "object", "base")] == []
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script.group(1).encode()).digest()).decode()
    policy = next(attributes["content"] for tag, attributes in parsed.tags if "http-equiv" in attributes)
    assert policy is not None
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "prefers-color-scheme:dark" in text
    assert "@media print" in text
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in parsed.tags


def test_hostile_names_are_text_everywhere() -> None:
    made = report(source=HOSTILE, metric=HOSTILE)
    made.rows[0] = replace(made.rows[0], name=HOSTILE, reason=HOSTILE, kind=HOSTILE)
    made.notes = [HOSTILE]
    html = made.to_html()
    parsed = Page(html)
    assert sum(tag == "script" for tag, _ in parsed.tags) == 1
    assert not [attributes for _, attributes in parsed.tags if any(name.startswith("on") for name in attributes)]
    assert "alert('x')" in parsed.text
    for text in (made.to_text(160), made.to_markdown(), html):
        assert "\x1b" not in text
    table = [line for line in made.to_markdown().splitlines() if line.startswith("|")]
    cells = [len(re.findall(r"(?<!\\)\|", line)) for line in table]
    assert len(table) == len(made.rows) + 3, "a line end in a name must not end its row"
    assert len(set(cells)) == 1, "a pipe in a name must not end its cell"
    assert "<script>" not in "".join(re.sub(r"`[^`]*`", "", line) for line in table)


def test_html_table_sorts_by_numbers_not_texts() -> None:
    parsed = Page(report().to_html())
    after = [attributes["data-sort"] for tag, attributes in parsed.tags if tag == "td" and "data-sort" in attributes]
    assert {"3200", "1200", "544", "88"} <= set(after)


def test_budget_bar_is_drawn_only_from_numbers_and_tells_a_miss() -> None:
    assert "Error against the budget" in report().to_html()
    assert "Error against the budget" not in report(error_budget=None).to_html()
    assert "Error against the budget" not in report(error_measured=math.nan).to_html()
    assert "var(--bad)" in bullet_bar(0.1, 0.12, 0.11, ("a", "b", "c"))
    assert "var(--bad)" not in bullet_bar(0.1, 0.105, 0.11, ("a", "b", "c"))


def test_segments_keep_their_sum_when_small_ones_are_drawn_together() -> None:
    sizes = [1000, 1, 1, 1, 500, 2, 2]
    bar = segment_bar("before", [(str(i), size, "1") for i, size in enumerate(sizes)], 2 * sum(sizes))
    drawn = [int(size) for size in re.findall(r"flex:(\d+) ", bar)]
    assert sum(drawn) == sum(sizes)
    assert drawn == [1000, 3, 500, 4]
    assert "width:50.000%" in bar


@pytest.mark.parametrize("frame", [HALF, WIDE])
def test_charts_skip_what_is_not_finite_and_stay_inside(frame: Frame) -> None:
    x, y = Axis("x", [0.0, 1.0], 0.0, 1.0), Axis("y", [0.1, 1.0], 0.1, 1.0, log=True)
    series = Series("a", "1", [Dot(0.5, math.inf), Dot(0.5, 0.0)], [[(0.0, math.nan), (0.5, 7.0), (1.0, 0.0)]])
    chart = draw("t", [series], x, y, frame=frame)
    path = re.search(r'points="([^"]*)"', chart)
    assert path is not None
    points = [tuple(map(float, pair.split(","))) for pair in path.group(1).split()]
    assert len(points) == 2
    assert all(0 <= a <= frame.width and 0 <= b <= frame.height for a, b in points)
    assert chart.count("<circle") == 1
    assert "nan" not in chart


def test_page_of_ten_thousand_layers_is_made_quickly_and_is_bounded() -> None:
    many = [replace(rows()[0], name=f"layer.{i}") for i in range(10_000)]
    text = CompressionReport(many, sum_rows(many)).to_html()
    assert text.count("<tr") == 10_000 + 2
    assert len(text) < 10_000 * 1500


# ---- files


def test_save_writes_four_files_and_keeps_the_run_apart(tmp_path: Path) -> None:
    made = report()
    folder = made.save(tmp_path / "new" / "folder")
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.json", "report.md", "run.json"]
    assert json.loads((folder / "run.json").read_text()) == {"seconds": {"plan": 1.5}}
    assert (folder / "report.json").read_text() == made.to_json()
    made.save(folder)


def test_save_into_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("x")
    with pytest.raises(StorageError, match="taken"):
        report().save(tmp_path / "taken")


def test_names_with_lone_surrogates_can_be_saved(tmp_path: Path) -> None:
    made = report()
    made.rows[0] = replace(made.rows[0], name="layer\udcff")
    text = (made.save(tmp_path) / "report.md").read_text(encoding="utf-8")
    assert "layer\\udcff" in text


# ---- numbers as text


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (999_499, "999 kB"), (10**15, "1,000 TB")]
)
def test_bytes_as_text(size: int, text: str) -> None:
    assert human_bytes(size) == text


@pytest.mark.parametrize("value", [0.1234, 0.01, 0.999, 1e-4, 2.5])
@pytest.mark.parametrize("digits", [2, 3])
def test_percent_is_right_to_its_digits(value: float, digits: int) -> None:
    shown = float(percent(value, digits).removesuffix(" %")) / 100
    assert abs(shown - value) <= 0.5 * 10.0 ** (1 - digits) * value


def test_shorten_never_exceeds_its_width() -> None:
    for width in range(1, 30):
        for keep in ("left", "right"):
            assert len(shorten("encoder.layer.0.attention", width, keep)) == min(width, 25)


def test_page_escapes_its_title() -> None:
    assert "<title>&lt;i&gt;</title>" in page("<i>", [], [])


# ---- what else was tried


def test_plans_that_were_measured_are_shown() -> None:
    finalist = {"label": "int8 everywhere", "size_ratio": 0.253, "error_search": 0.05, "error_measured": None}
    made = report(finalists=[finalist | {"error_upper": None}, finalist | {"label": "a|b", "error_measured": 0.06}])
    for text in (made.to_text(120), made.to_markdown(), Page(made.to_html()).text):
        assert "Plans that were measured" in text
        assert "int8 everywhere" in text
        assert "25.3 %" in text
        assert "6.0 %" in text
    assert "a\\|b" in made.to_markdown()
    assert "Plans that were measured" not in report().to_html()
