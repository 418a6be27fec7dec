"""A promise in each group of samples: what passes, what fails and is named, and data that cannot be groups."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank.calibration.groups import GroupComparison, read_samples
from lowrank.calibration.measurement import Comparison, Measurement
from lowrank.calibration.metrics import OUTPUT
from lowrank.errors import BudgetError, CalibrationError, UsageError


class TwoHeads(nn.Module):
    """One head sees what group "second" has much of: features of its own, through a layer that rounding hurts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.near, self.far = nn.Linear(48, 32), nn.Linear(32, 6), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = torch.relu(self.body(x))
        return {"near": self.near(hidden), "far": self.far(hidden)}


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 12)).eval()
    with torch.no_grad():
        # What this input holds matters to no output, and yet it sets the step that a token's inputs are rounded with.
        model[0].weight[:, 0] = 0.0
    return model


def rows(samples: int, seed: int, spread: float = 0.0) -> Tensor:
    """(samples, 48); with ``spread`` a few inputs are far larger than the others, which rounding to 8 bits takes badly."""
    x = torch.randn(samples, 48, generator=torch.Generator().manual_seed(seed))
    x[:, 0] += spread * torch.sign(x[:, 1])
    return x


def compress(model: nn.Module, **kwargs: Any) -> lowrank.CompressionResult:
    arguments: dict[str, Any] = {"calibration": [rows(192, 1)], "error_budget": 0.05, "progress": False}
    return lowrank.compress_model(model, **(arguments | kwargs))


def output_error(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        wanted, got = model(x).double(), other(x).double()
    return float((wanted - got).norm() / wanted.norm())


def test_every_group_is_measured_by_itself_and_the_worst_is_the_error() -> None:
    model = mlp()
    groups = {"news": rows(60, 2), "captions": rows(48, 3, spread=9.0)}
    result = compress(model, validation={"news": [groups["news"]], "captions": groups["captions"]})
    totals = result.report.totals
    found = totals["groups"]
    assert list(found) == ["news", "captions"] and totals["worst_group"] == "captions"
    for name, x in groups.items():
        assert math.isclose(found[name]["error"], output_error(model, result.model, x), rel_tol=1e-4)
        assert found[name]["samples"] == len(x) and found[name]["error"] < found[name]["upper"] <= 0.05
    assert totals["error_measured"] == max(each["error"] for each in found.values())
    assert totals["error_upper"] == max(each["upper"] for each in found.values())
    assert totals["samples"] == 108


def test_the_report_shows_each_group_in_every_form() -> None:
    report = compress(mlp(), validation={"news": [rows(60, 2)], "captions": [rows(48, 3)]}).report
    told = report.totals["groups"]
    assert set(json.loads(report.to_json())["totals"]["groups"]) == {"news", "captions"}
    for text in (report.to_text(), report.to_markdown(), report.to_html()):
        text = " ".join(text.split())
        assert "the worst of 2 groups" in text and "in each of 2 groups by itself: news, captions" in text
        for name, item in told.items():
            assert name in text and str(item["samples"]) in text
    rows_of = [line.split() for line in report.to_text().splitlines() if line.startswith(("news", "captions"))]
    assert [(cells[0], cells[1], cells[-1]) for cells in rows_of] == [
        ("news", "60", "kept"),
        ("captions", "48", "kept"),
    ]
    again = lowrank.CompressionReport.from_json(report.to_json())
    assert "Groups of samples" in again.to_text()


INTEGER: dict[str, Any] = {"overrides": {"*": {"format": "int8", "activations": "int8"}}}
EASY, HARD = [rows(60, 2)], [rows(200, 3, spread=40.0)]


def between(model: nn.Module) -> float:
    """A budget that integer products everywhere keep in one group, by far, and break in the other."""
    found = compress(model, validation={"easy": EASY, "hard": HARD}, error_budget=0.9, **INTEGER).report.totals[
        "groups"
    ]
    assert 4.0 * found["easy"]["upper"] < found["hard"]["error"]
    return 0.7 * float(found["hard"]["error"])


@pytest.mark.parametrize("given", [False, True])
def test_the_error_names_the_group_that_failed_and_what_it_reaches(given: bool) -> None:
    model = mlp()
    budget = between(model)
    # Of the one layer there are no safer plans.
    asked = INTEGER if given else {"formats": ["int8"], "activations": "int8", "ignore": ["2"]}
    plan = compress(model, error_budget=0.9, **INTEGER).plan if given else None
    with pytest.raises(BudgetError) as caught:
        compress(model, validation={"easy": EASY, "hard": HARD}, error_budget=budget, plan=plan, **asked)
    text = str(caught.value)
    assert "in the worst of 2 groups: group 'hard' (" in text and "fails; 'easy' (" in text and "keeps it" in text
    assert caught.value.error is not None and caught.value.error > budget


def test_groups_that_the_search_has_not_met_do_not_skip_the_safe_plans() -> None:
    """A plan far within the budget on the search part may be beyond it in another domain, where a safer one is not."""
    model = mlp()
    budget = between(model)
    result = compress(model, validation={"hard": HARD}, formats=["int8"], error_budget=budget)
    assert result.report.totals["error_upper"] <= budget and result.report.totals["size_ratio"] < 0.5


def test_calibration_groups_are_split_group_by_group_and_applied_again() -> None:
    model = mlp()
    data = {"a": [rows(64, 1)], "b": rows(160, 9, spread=5.0)}
    result = compress(model, calibration=data)
    assert {name: each["samples"] for name, each in result.report.totals["groups"].items()} == {"a": 16, "b": 40}
    again = lowrank.apply_plan(model, result.plan, data)
    x = rows(9, 5)
    assert torch.equal(again(x), result.model(x))


@pytest.mark.parametrize("metric", ["output", "variation", "kl"])
def test_every_sampled_metric(metric: str) -> None:
    result = compress(mlp(), metric=metric, validation={"a": [rows(40, 2)], "b": [rows(40, 3)]}, error_budget=0.1)
    found = result.report.totals["groups"]
    assert len(found) == 2 and all(0.0 < each["error"] < each["upper"] <= 0.1 for each in found.values())
    assert "2 groups" in result.report.to_text()


def test_the_mean_of_the_variation_metric_is_the_groups_own() -> None:
    model, shifted = mlp(), rows(60, 3) + 3.0
    result = compress(model, metric="variation", validation={"a": [rows(60, 2)], "b": [shifted]}, error_budget=0.2)
    with torch.no_grad():
        wanted, got = model(shifted).double(), result.model(shifted).double()
    expected = float((wanted - got).norm() / (wanted - wanted.mean(dim=0)).norm())
    assert math.isclose(result.report.totals["groups"]["b"]["error"], expected, rel_tol=1e-4)


def test_several_outputs_count_in_each_group() -> None:
    result = compress(TwoHeads(), validation={"a": [rows(40, 2)], "b": [rows(40, 3)]})
    found = result.report.totals
    assert set(found["outputs"]) == {"near", "far"}
    for path, item in found["outputs"].items():
        assert item["error"] == max(group["outputs"][path]["error"] for group in found["groups"].values())


def test_healing_inplace_and_size_budgets_work_with_groups() -> None:
    groups = {"a": [rows(40, 2)], "b": [rows(40, 3)]}
    model = mlp()
    result = compress(model, validation=groups, inplace=True)
    assert result.model is model and len(result.report.totals["groups"]) == 2
    healed = compress(mlp(), validation=groups, heal={"steps": 3}, error_budget=0.3, formats=["lowrank"])
    assert healed.report.totals["error_upper"] <= 0.3
    sized = compress(mlp(), validation=groups, error_budget=None, size_budget=0.5)
    assert len(sized.report.totals["groups"]) == 2 and "kept" not in sized.report.to_text().split("layer ")[0]


@pytest.mark.parametrize(
    ("validation", "words"),
    [
        ({"news": []}, r"validation, group 'news': is empty"),
        ({}, r"validation: is empty"),
        ({"news": [rows(3, 2)]}, r"group 'news': has 3 samples; .* at least 4"),
        ({"a=b": [rows(9, 2)]}, r"no '='.*call it 'a-b'"),
        ({"a\nb": [rows(9, 2)]}, r"no control character"),
        ({7: [rows(9, 2)]}, r"must be a text .*, got 7"),
        ({"": [rows(9, 2)]}, r"must be a text"),
        (
            {"a": [rows(9, 2)], "b": [rows(9, 3), rows(9, 2)[4:]]},
            r"groups 'a' and 'b' have 5 samples in common .*sample 4 of 'a' is sample 9 of 'b'",
        ),
        ({"a": [rows(9, 2)], "b": [rows(192, 1)]}, r"group 'b': 192 of 192 samples are calibration samples too"),
        ({"input": rows(40, 2)}, r"input is an argument of the model's forward: .*list of dicts"),
        ({"x": 3}, r"group 'x': must be an iterable"),
    ],
)
def test_what_cannot_be_groups_is_refused_by_name(validation: Any, words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        compress(mlp(), validation=validation)


def test_samples_shared_with_calibration_are_left_out_and_said_of_their_group() -> None:
    result = compress(mlp(), validation={"a": [rows(40, 2)], "b": [rows(192, 1)[:10], rows(30, 4)]})
    assert result.report.totals["groups"]["b"]["samples"] == 30
    assert any("group 'b': 10 of 40 samples are calibration samples too" in note for note in result.report.notes)


@pytest.mark.parametrize("metric", ["weight", lambda model: 1.0])
def test_a_metric_that_measures_no_samples_promises_nothing_of_groups(metric: Any) -> None:
    with pytest.raises(UsageError, match=r"holds for no group.*output"):
        compress(mlp(), metric=metric, validation={"a": [rows(40, 2)]})


def test_a_dict_of_arrays_is_still_one_batch_of_keyword_arguments_for_calibration() -> None:
    result = compress(mlp(), calibration={"input": rows(192, 1)})
    assert "groups" not in result.report.totals
    read = read_samples(mlp(), {"news": {"input": rows(8, 2)}, "captions": rows(8, 3)}, "validation")
    assert [(batch.group, batch.size) for batch in read] == [("news", 8), ("captions", 8)]


def test_too_few_samples_are_said_of_their_group() -> None:
    def comparison(errors: list[float]) -> Comparison:
        lost = torch.tensor(errors, dtype=torch.float64)
        return Comparison({"output": Measurement(OUTPUT, lost, torch.full_like(lost, 100.0))})

    many, few = comparison([1.0, 1.1, 0.9, 1.0] * 50), comparison([0.4, 1.4, 0.8, 1.0])
    both = GroupComparison.of({"many": many, "few": few})
    budget = 1.05 * max(many.upper(), few.value)
    assert many.passes(budget) and not few.passes(budget) and both.samples_needed(budget) == few.samples_needed(budget)
    needed = few.samples_needed(budget)
    assert both.too_few(budget).endswith(f": group 'few' has 4 and needs about {needed:,} like them")
    assert "group 'few' (9.5 %, at most" in both.standing(budget) and "'many' (10 %" in both.standing(budget)
    # Where no number of samples would do, nothing of the kind is said.
    hopeless = GroupComparison.of({"many": comparison([4.0, 4.1, 3.9, 4.0]), "few": few})
    assert hopeless.too_few(budget) == "" and "groups 'many' (" in hopeless.standing(budget)


def test_a_comparison_of_groups_adds_nothing_to_the_bounds() -> None:
    result = compress(mlp(), validation={"only": [rows(40, 2)]})
    alone = compress(mlp(), validation=[rows(40, 2)])
    assert result.report.totals["error_upper"] == alone.report.totals["error_upper"]
    assert isinstance(GroupComparison.of({}), GroupComparison)
