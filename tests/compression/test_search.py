"""The search keeps its order: calibrated on the search part, verified from safe to small, stopping at the first failure."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lowrank.compression.plan import Plan, PlanEntry
from lowrank.compression.search import Search
from lowrank.compression.trial import ComputedError, ErrorMeasure, Reading
from lowrank.errors import BudgetError
from lowrank.layers.spec import LayerSpec


def plan_of(rank: int, error: float) -> Plan:
    """A plan of one layer, smaller the smaller its rank."""
    if rank == 0:
        return Plan((PlanEntry("fc", "linear", (100, 100), LayerSpec("dense"), 40_000, 0.0),))
    return Plan((PlanEntry("fc", "linear", (100, 100), LayerSpec("lowrank", rank=rank), 800 * rank, error),))


class FakeCopy:
    """Stands in for the working copy: "installing" a plan hands it on to what measures."""

    def install_plan(self, plan: Plan) -> Any:
        return plan


def planner(predicted: Callable[[int], float]) -> Callable[[float], Plan]:
    def plan_for(allowed: float) -> Plan:
        ranks = [rank for rank in range(1, 50) if predicted(rank) <= allowed]
        return plan_of(min(ranks), predicted(min(ranks))) if ranks else plan_of(0, 0.0)

    return plan_for


def truth(rank: int) -> float:
    return 0.0 if rank == 0 else 1.0 / rank


def search_with(plan_for: Callable[[float], Plan], measure: ErrorMeasure, verify: ErrorMeasure) -> Search:
    return Search(FakeCopy(), plan_for, measure, verify, total=lambda value: value * value)  # type: ignore[arg-type]


def search(
    verify: Callable[[int], float],
    *,
    budget: float = 0.1,
    scale: float = 1.0,
    uniform: tuple[tuple[str, Plan], ...] = (),
) -> Any:
    """Predictions are ``scale`` times the true squared errors."""

    def rank_of(plan: Any) -> int:
        return plan.entries[0].rank or 0

    return search_with(
        planner(lambda rank: scale * truth(rank) ** 2),
        ComputedError(lambda plan: truth(rank_of(plan))),
        ComputedError(lambda plan: verify(rank_of(plan))),
    ).keep_error_budget(budget, uniform)


@pytest.mark.parametrize("scale", [1.0, 25.0, 0.04, 400.0])
def test_the_smallest_plan_within_the_budget_is_found_however_far_off_the_predictions_are(scale: float) -> None:
    outcome = search(truth, scale=scale)
    assert outcome.chosen.plan.entries[0].rank in (10, 11)
    assert math.isclose(outcome.calibration, 1.0 / scale, rel_tol=0.1)


def test_verification_stops_at_the_first_failure() -> None:
    seen: list[int] = []

    def verify(rank: int) -> float:
        seen.append(rank)
        return 1.0 if rank == 12 else truth(rank)

    outcome = search(verify)
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] == 12
    assert outcome.chosen.plan.entries[0].rank > 12


def test_nothing_verified_means_a_budget_error_with_the_safest_plan() -> None:
    with pytest.raises(BudgetError, match="cannot be met") as raised:
        search(lambda rank: 1.0)
    assert raised.value.error == 1.0
    assert raised.value.plan.entries[0].format == "lowrank"


def test_nothing_to_compress_within_the_budget_is_a_budget_error() -> None:
    with pytest.raises(BudgetError, match="cannot be met") as raised:
        search(truth, budget=0.001)
    assert truth(49) <= raised.value.error <= truth(40)

    def dense_only(allowed: float) -> Plan:
        return plan_of(0, 0.0)

    nothing = ComputedError(lambda plan: 0.0)
    with pytest.raises(BudgetError, match="nothing could be compressed"):
        search_with(dense_only, nothing, nothing).keep_error_budget(0.1, [])


def test_uniform_plans_compete_and_larger_ones_lose() -> None:
    entry = PlanEntry("fc", "linear", (100, 100), LayerSpec("int8", bits=8, activations="int8"), 3_000, 0.5)
    small = Plan((entry,))

    def value(plan: Any) -> float:
        return 0.05 if plan.entries[0].format == "int8" else truth(plan.entries[0].rank or 0)

    found = search_with(planner(lambda rank: truth(rank) ** 2), ComputedError(value), ComputedError(value))
    outcome = found.keep_error_budget(0.1, [("int8 throughout", small)])
    assert outcome.chosen.label == "int8 throughout"


def test_of_equal_sizes_the_plan_with_fewer_weight_only_bytes_wins() -> None:
    plans = [
        (mode, Plan((PlanEntry("fc", "linear", (100, 100), LayerSpec("int8", bits=8, activations=mode), 9_000, 0.5),)))
        for mode in ("float", "int8")
    ]
    values = {"float": 0.03, "int8": 0.05, None: 0.0}
    measure = ComputedError(lambda plan: values[plan.entries[0].activations])  # type: ignore[attr-defined]
    outcome = search_with(lambda allowed: plan_of(0, 0.0), measure, measure).keep_error_budget(0.1, plans)
    assert outcome.chosen.label == "int8"


def test_a_plan_that_breaks_the_model_is_never_chosen() -> None:
    def verify(rank: int) -> float:
        return math.nan if rank < 20 else truth(rank)

    assert search(verify).chosen.plan.entries[0].rank >= 20


def test_least_error_picks_by_the_search_part_and_reports_the_verification_part() -> None:
    readings = {5: Reading(0.2, 0.25), 9: Reading(0.1, 0.12)}

    def measure(model: nn.Module) -> Reading:
        return readings[model.entries[0].rank]  # type: ignore[index, union-attr]

    plans = [("a", plan_of(5, 0.04)), ("b", plan_of(9, 0.02))]
    outcome = search_with(lambda allowed: plan_of(0, 0.0), measure, measure).least_error(plans)
    assert outcome.chosen.label == "b"
    assert outcome.chosen.verified == readings[9]
    assert torch.isclose(torch.tensor(outcome.calibration), torch.tensor(0.5))
