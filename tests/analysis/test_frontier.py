"""Size against error: points that were measured, kept one by one, taken up again, and refused with other arguments."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import assert_same_state, matrix_with_spectrum, seeded
from torch import Tensor, nn

from lowrank import apply_plan
from lowrank.analysis import frontier
from lowrank.analysis.frontier import default_budgets, measure_frontier
from lowrank.analysis.frontier_report import STATE_NAME, FrontierReport
from lowrank.analysis.frontier_state import State
from lowrank.errors import CheckpointError, UsageError
from lowrank.reporting.points import FrontierPoint, lowest, points_as_json, points_from_json

BUDGETS = [0.01, 0.03, 0.08, 0.2, 0.4]


def model_of(seed: int = 0) -> nn.Module:
    """Two layers of which low rank takes little, so that every budget finds something else."""
    generator = seeded(seed)
    torch.manual_seed(seed)
    sigma = torch.logspace(0, -1.5, 48, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 8))
    with torch.no_grad():
        model[0].weight.copy_(matrix_with_spectrum(48, 64, sigma, generator))
        model[2].weight.copy_(matrix_with_spectrum(64, 48, sigma, generator))
    return model


def inputs_of(seed: int = 1, count: int = 256) -> list[Tensor]:
    return [torch.randn(64, 64, generator=seeded(seed + index)) for index in range(count // 64)]


def measured(directory: Path | None = None, **changes: Any) -> FrontierReport:
    arguments: dict[str, Any] = {
        "calibration": inputs_of(),
        "budgets": BUDGETS,
        "progress": False,
        "directory": directory,
    }
    return measure_frontier(model_of(), **{**arguments, **changes})


def test_more_error_buys_less_size() -> None:
    report = measured()
    assert len(report.points) >= 5
    assert all(point.measured and 0.0 < point.size_ratio <= 1.0 for point in report.points)
    assert [point.size_ratio for point in report.points] == sorted(point.size_ratio for point in report.points)
    planned = sorted((point for point in report.points if point.budget), key=lambda point: point.budget or 0.0)
    sizes = [point.size_ratio for point in planned]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 0.7 * sizes[0]
    assert next(point.label for point in report.points if point.budget is None).startswith("int8 throughout")
    for point in report.points:
        assert point.upper is not None
        assert point.upper >= point.error


def test_the_errors_and_sizes_are_those_of_the_plans() -> None:
    # On data of its own, so that the measuring can be done again here.
    validation = inputs_of(50)
    report = measured(validation=validation)
    model = model_of()
    before = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert report.totals["bytes_before"] == before
    assert report.totals["samples"] == 256
    for point, plan in zip(report.points, report.plans, strict=True):
        smaller = apply_plan(model, plan, inputs_of())
        after = sum(tensor.nbytes for tensor in smaller.state_dict().values())
        assert after / before == pytest.approx(point.size_ratio, rel=1e-12)
        with torch.no_grad():
            lost = sum(float((smaller(x).double() - model(x).double()).square().sum()) for x in validation)
            whole = sum(float(model(x).double().square().sum()) for x in validation)
        assert math.sqrt(lost / whole) == pytest.approx(point.error, rel=1e-5)


def test_one_preparation_serves_all_budgets() -> None:
    with mock.patch.object(frontier, "prepare", wraps=frontier.prepare) as prepare:
        measured()
    assert prepare.call_count == 1


def test_the_model_is_left_alone_and_the_same_run_gives_the_same() -> None:
    model = model_of()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    one = measure_frontier(model, calibration=inputs_of(), budgets=BUDGETS, progress=False)
    assert_same_state(model, before)
    assert one.to_json() == measured().to_json()


def test_the_default_fills_up_where_budgets_gave_the_same_plan() -> None:
    report = measured(budgets=None, points=7)
    assert len(report.points) >= 7
    assert len({plan.to_json() for plan in report.plans}) == len(report.plans)


def test_without_data_the_errors_are_those_of_the_weights() -> None:
    report = measured(calibration=None, points=6, budgets=None)
    assert report.totals["metric"] == "weight"
    assert report.totals["samples"] == 0
    assert all(point.upper is None for point in report.points)
    assert "computed from the weights" in report.summary()[0]


# ---- resuming


class Stopped(Exception):
    """As by Ctrl-C, but for a test."""


def stop_after(steps: int) -> Any:
    count = 0
    real = State.write

    def write(self: Any, folder: Path) -> None:
        nonlocal count
        real(self, folder)
        count += 1
        if count == steps:
            raise Stopped

    return mock.patch.object(State, "write", write)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_run_that_was_stopped_goes_on_and_ends_in_the_same_bytes(tmp_path: Path, steps: int) -> None:
    measured(tmp_path / "whole")
    with stop_after(steps), pytest.raises(Stopped):
        measured(tmp_path / "cut")
    kept = json.loads((tmp_path / "cut" / STATE_NAME).read_text())
    assert len(kept["steps"]) == steps
    with mock.patch.object(State, "write", autospec=True, side_effect=State.write) as writes:
        measured(tmp_path / "cut")
    assert writes.call_count == 2 + len(BUDGETS) - steps, "what was finished is not measured again"
    names = sorted(str(path.relative_to(tmp_path / "whole")) for path in (tmp_path / "whole").rglob("*"))
    assert names == sorted(str(path.relative_to(tmp_path / "cut")) for path in (tmp_path / "cut").rglob("*"))
    files = [name for name in names if (tmp_path / "whole" / name).is_file()]
    assert {STATE_NAME, "frontier.md", "frontier.html"} < set(files)
    for name in files:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_finished_run_is_only_read(tmp_path: Path) -> None:
    first = measured(tmp_path / "out")
    with mock.patch.object(frontier, "prepare", side_effect=AssertionError):
        again = measured(tmp_path / "out")
    assert again.to_json() == first.to_json()
    assert again.plans == first.plans


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budgets": [0.1]}, "budgets"),
        ({"seed": 1}, "seed 0 then, 1 now"),
        ({"formats": ["int8"]}, "formats"),
        ({"calibration": inputs_of(9)}, "another calibration"),
        ({"validation": inputs_of(9)}, "another validation"),
        ({"metric": "weight"}, "metric 'output' then, 'weight' now"),
    ],
)
def test_other_arguments_are_refused_and_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    out = tmp_path / "out"
    with stop_after(1), pytest.raises(Stopped):
        measured(out)
    before = (out / STATE_NAME).read_bytes()
    with pytest.raises(CheckpointError, match=words) as caught:
        measured(out, **changes)
    assert caught.value.exit_code == 3
    assert "--overwrite" in str(caught.value)
    assert (out / STATE_NAME).read_bytes() == before


def test_another_model_is_refused_and_overwriting_starts_anew(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with stop_after(2), pytest.raises(Stopped):
        measured(out)
    with pytest.raises(CheckpointError, match="another model"):
        measure_frontier(model_of(7), calibration=inputs_of(), budgets=BUDGETS, progress=False, directory=out)
    report = measured(out, budgets=[0.05, 0.1], overwrite=True)
    assert json.loads((out / STATE_NAME).read_text())["arguments"]["budgets"] == [0.05, 0.1]
    assert len(list((out / "plans").iterdir())) == len(report.points)


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="not empty"):
        measured(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize(
    "text",
    ["", "{}", '{"arguments": 3}', '{"format_version": 1, "arguments": {}}', "[1]", '{"arguments": {}, "points": 1}'],
)
def test_a_damaged_state_is_bad_input(tmp_path: Path, text: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / STATE_NAME).write_text(text)
    with pytest.raises(CheckpointError) as caught:
        measured(out)
    assert caught.value.exit_code == 3


def test_damaged_steps_are_bad_input(tmp_path: Path) -> None:
    out = tmp_path / "out"
    measured(out)
    state = json.loads((out / STATE_NAME).read_text())
    for steps in (None, [3], [{"step": "a", "scale": 1.0, "point": 99}], [{"step": 1, "scale": 1.0, "point": 0}]):
        (out / STATE_NAME).write_text(json.dumps(state | {"steps": steps}))
        with pytest.raises(CheckpointError, match="damaged"):
            measured(out)
    for other in ({"notes": 3}, {"totals": {}}, {"totals": None}):
        (out / STATE_NAME).write_text(json.dumps(state | other))
        with pytest.raises(CheckpointError, match="damaged"):
            measured(out)


# ---- arguments


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budgets": []}, "budgets"),
        ({"budgets": "5%"}, "budgets"),
        ({"budgets": [0.0]}, "error_budget"),
        ({"budgets": [math.nan]}, "error_budget"),
        ({"budgets": [1.5]}, "at most 1"),
        ({"points": 6}, "budgets or points"),
        ({"budgets": None, "points": 1}, "points"),
        ({"budgets": None, "points": True}, "points"),
        ({"error_budget": 0.1}, "error_budget"),
        ({"metric": len}, "by name"),
        ({"metric": "nonsense"}, "metric"),
        ({"calibration": None, "metric": "output"}, "calibration"),
    ],
)
def test_what_means_nothing_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        measured(**changes)


def test_default_budgets_are_in_equal_ratios() -> None:
    for metric in ("output", "weight", "kl", "perplexity"):
        budgets = default_budgets(metric)
        assert len(set(budgets)) == 8
        ratios = [after / before for before, after in pairwise(budgets)]
        assert max(ratios) < 1.15 * min(ratios)


# ---- points and their renderings


def test_points_round_trip_and_odd_ones_are_refused() -> None:
    points = [FrontierPoint(0.5, 0.1, True, 0.1, 0.12, "a", (("int8", 3),)), FrontierPoint(0.7, 0.0, False)]
    plain = json.loads(json.dumps(points_as_json(points)))
    assert points_from_json(plain, "x") == points
    good = plain[0]
    for odd in (
        3,
        [3],
        [{}],
        [good | {"error": "0.1"}],
        [good | {"error": None}],
        [good | {"size_ratio": True}],
        [good | {"measured": 1}],
        [good | {"extra": 1}],
        [good | {"formats": [["int8"]]}],
        [good | {"label": 4}],
        [good | {"upper": -1.0}],
    ):
        with pytest.raises(CheckpointError, match="frontier"):
            points_from_json(odd, "x")


def test_the_lowest_points_fall() -> None:
    points = [FrontierPoint(size, error, True) for size, error in ((0.3, 0.3), (0.4, 0.35), (0.5, 0.1), (0.5, 0.2))]
    assert [(point.size_ratio, point.error) for point in lowest(points)] == [(0.3, 0.3), (0.5, 0.1)]


def test_every_rendering_holds_every_point(tmp_path: Path) -> None:
    report = measured()
    for text in (report.to_text(120), report.to_markdown(), report.to_html()):
        for point in report.points:
            assert point.label in text
    page = report.to_html()
    assert page.count("<circle") == len(report.points)
    assert "http" not in page.replace("http-equiv", "")
    assert FrontierReport.from_json(report.to_json(), report.plans) == report
    hostile = replace(report.points[0], label="<script>x|\x1b[31m")
    for text in (FrontierReport([hostile], [], report.totals).to_html(), FrontierReport([hostile], []).to_markdown()):
        assert "<script>x" not in text
        assert "\x1b" not in text
    assert FrontierReport([], [], {}).to_html().count("<circle") == 0


def test_with_groups_the_error_is_that_of_the_worst() -> None:
    torch.manual_seed(3)
    groups = {"near": inputs_of(40), "far": [x + 2.0 for x in inputs_of(40)]}
    report = measured(validation=groups)
    alone = {name: measured(validation=batches) for name, batches in groups.items()}
    for index, point in enumerate(report.points):
        assert point.error == max(each.points[index].error for each in alone.values())
    assert report.notes[0] == "errors are those of the worst of 2 groups: near, far"
