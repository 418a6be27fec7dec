"""``lowrank frontier`` and ``lowrank analyze --calibration`` as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest

pytest.importorskip("transformers", reason="the extra hf is not installed")

from tiny_models import make_directory, make_text

from lowrank.analysis import frontier
from lowrank.cli.app import main


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, texts and a measured frontier."""
    room = tmp_path_factory.mktemp("frontier")
    make_directory(room / "model", width=64)
    make_text(room / "texts.txt", 64)
    make_text(room / "other.txt", 64, seed=1)
    assert main([*command(room), "-o", str(room / "out")]) == 0
    return room


def command(room: Path) -> list[str]:
    return ["frontier", str(room / "model"), "--calibration", str(room / "texts.txt"), "--budgets", "3%,0.1", "-q"]


def test_points_plans_and_pages_are_written(room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = json.loads((room / "out" / "frontier.json").read_text())
    assert state["totals"]["source"] == "model"
    assert state["arguments"]["budgets"] == [0.03, 0.1]
    assert {point["budget"] for point in state["points"]} <= {None, 0.03, 0.1}
    assert "<circle" in (room / "out" / "frontier.html").read_text()
    plans = sorted((room / "out" / "plans").iterdir())
    assert len(plans) == len(state["points"])
    smallest = state["points"][0]
    arguments = ["compress", str(room / "model"), "-o", str(room / "applied"), "--plan", str(plans[0]), "-q", "--json"]
    assert main([*arguments, "--calibration", str(room / "texts.txt")]) == 0
    totals = json.loads(capsys.readouterr().out)["totals"]
    assert totals["size_ratio"] == pytest.approx(smallest["size_ratio"], rel=1e-12)
    # The same split of the same samples: what the frontier measured is what compress measures.
    assert totals["error_measured"] == pytest.approx(smallest["error"], rel=1e-9)


def test_a_rerun_reads_what_is_there(room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (room / "out" / "frontier.json").read_bytes()
    with mock.patch.object(frontier, "prepare", side_effect=AssertionError):
        assert main([*command(room), "-o", str(room / "out"), "--json", "-"]) == 0
    assert len(json.loads(capsys.readouterr().out)["points"]) == len(json.loads(before)["points"])
    assert (room / "out" / "frontier.json").read_bytes() == before


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--seed", "3"], "seed 0 then, 3 now"),
        (["--max-tokens", "4"], "another calibration"),
        (["--formats", "int8"], "formats"),
        (["--budgets", "5%"], "budgets [0.03, 0.1] then, [0.05] now"),
    ],
)
def test_other_arguments_exit_with_3(
    room: Path, capsys: pytest.CaptureFixture[str], more: list[str], words: str
) -> None:
    before = (room / "out" / "frontier.json").read_bytes()
    assert main([*command(room), "-o", str(room / "out"), *more]) == 3
    assert words in capsys.readouterr().err
    assert (room / "out" / "frontier.json").read_bytes() == before


@pytest.mark.parametrize(
    ("more", "words", "code"),
    [
        (["--budgets", "0"], "positive", 2),
        (["--budgets", "x"], "not a number", 2),
        (["--budgets", "150%"], "at most 1", 2),
        (["--points", "6"], "--budgets or --points", 2),
        (["-o", "{room}/model"], "same or lie in one another", 2),
        (["-o", "{room}"], "lie in one another", 2),
        (["-o", "{room}/none/out"], "parent directory does not exist", 5),
        (["--html", "{room}/none/a.html"], "does not exist", 5),
        (["--validation", "{room}/none.txt"], "none.txt", 3),
        (["--calibration", "{room}/none.txt"], "--calibration: given 2 times", 2),
    ],
)
def test_what_cannot_be_is_refused_before_the_work(
    room: Path, capsys: pytest.CaptureFixture[str], more: list[str], words: str, code: int
) -> None:
    arguments = [part.replace("{room}", str(room)) for part in more]
    with mock.patch.object(frontier, "prepare", side_effect=AssertionError):
        assert main([*command(room), *arguments]) == code
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1


def test_weights_alone_need_no_data(room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    html = room / "weights.html"
    assert main(["frontier", str(room / "model"), "--points", "6", "-q", "--html", str(html), "--json", "-"]) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert len(points) >= 6
    assert len({(point["size_ratio"], point["error"]) for point in points}) == len(points)
    assert html.read_text().count("<circle") == len(points)


def test_analyze_with_calibration_shows_both_metrics(room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["analyze", str(room / "model"), "--calibration", str(room / "texts.txt"), "-q", "--json", "-"]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["totals"]["source"] == "model"
    row = next(row for row in report["rows"] if row["name"].endswith("layers.0.self_attn.q_proj"))
    assert row["tokens"] > 64
    assert row["data_ranks"]["0.99"] <= row["ranks"]["0.99"]
    assert row["data_errors"]["0.5"] < row["errors"]["0.5"]
