"""The planner against brute force: feasible whenever that is, inside the budgets, within its gap of the optimum."""

from __future__ import annotations

import itertools
import math
from unittest import mock

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lowrank.compression.candidates import Candidate, LayerChoices, Plan, plan_formats
from lowrank.errors import BudgetError
from lowrank.layers.spec import LayerSpec
from lowrank.numerics import knapsack

# Errors over many magnitudes, with ties and zeros; steps of 0.1 so that sums meet budgets or miss them by one rounding.
ERRORS = st.one_of(
    st.just(0.0),
    st.integers(0, 12).map(lambda n: n / 10),
    st.floats(1e-12, 10.0),
    st.floats(0.0, 1e-300),
    st.just(math.inf),
)
SIZES = st.one_of(st.integers(0, 12), st.integers(0, 10**12))
COSTS = st.one_of(st.none(), st.floats(0.0, 1e6), st.integers(0, 12).map(float))
BUDGETS = st.one_of(st.integers(0, 30).map(lambda n: n / 10), st.floats(0.0, 30.0), st.floats(0.0, 1e-300))


@st.composite
def problems(draw, costs=None, errors=ERRORS):
    layers = []
    for index in range(draw(st.integers(1, 5))):
        dense = Candidate(LayerSpec("dense"), draw(SIZES), draw(st.sampled_from([0.0, 0.0, 0.1])))
        others = [
            Candidate(
                LayerSpec("lowrank", rank=rank + 1),
                draw(SIZES),
                draw(errors),
                draw(costs) if costs is not None else None,
            )
            for rank in range(draw(st.integers(0, 4)))
        ]
        candidates = draw(st.permutations([dense, *others]))
        layers.append(LayerChoices(f"layer.{index}", "linear", (8, 8), tuple(candidates)))
    return layers


def brute_force(layers, objective, error_budget=math.inf, size_budget=math.inf):
    """The least objective over all choices within the budgets; None where there is none."""
    best = None
    for choice in itertools.product(*(layer.candidates for layer in layers)):
        error = math.fsum(candidate.error for candidate in choice)
        if error <= error_budget and error < math.inf and sum(candidate.bytes for candidate in choice) <= size_budget:
            value = math.fsum(objective(candidate) for candidate in choice)
            best = value if best is None else min(best, value)
    return best


def price(candidate: Candidate) -> float:
    return candidate.price


def error_of(candidate: Candidate) -> float:
    return candidate.error


def check(layers, plan: Plan, optimum: float, objective) -> None:
    chosen = []
    for layer, entry in zip(layers, plan.entries, strict=True):
        same = [c for c in layer.candidates if (c.spec, c.bytes, c.error) == (entry.spec, entry.bytes, entry.error)]
        assert same
        chosen.append(min(same, key=price))
    value = math.fsum(objective(candidate) for candidate in chosen)
    rounding = 1e-9 * abs(value)
    assert plan.objective_value == pytest.approx(value, rel=1e-9)
    assert plan.duality_gap >= 0.0
    assert value >= optimum - rounding
    assert value - plan.duality_gap <= optimum + rounding


@settings(derandomize=True, max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(problems(costs=COSTS), BUDGETS)
def test_error_budget(layers, budget):
    optimum = brute_force(layers, price, error_budget=budget)
    if optimum is None:
        with pytest.raises(BudgetError):
            plan_formats(layers, error_budget=budget)
        return
    plan = plan_formats(layers, error_budget=budget)
    assert plan.error <= budget
    check(layers, plan, optimum, price)


@settings(derandomize=True, max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(problems(), st.one_of(st.integers(0, 60), st.integers(0, 4 * 10**12)))
def test_size_budget(layers, budget):
    optimum = brute_force(layers, error_of, size_budget=budget)
    if optimum is None:
        with pytest.raises(BudgetError):
            plan_formats(layers, size_budget=budget)
        return
    plan = plan_formats(layers, size_budget=budget)
    assert plan.bytes <= budget
    check(layers, plan, optimum, error_of)


@settings(derandomize=True, max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.one_of(problems(), problems(costs=COSTS)), BUDGETS, st.one_of(st.integers(0, 60), st.integers(0, 4 * 10**12)))
def test_both_budgets(layers, error_budget, size_budget):
    optimum = brute_force(layers, price, error_budget, size_budget)
    if optimum is None:
        with pytest.raises(BudgetError):
            plan_formats(layers, error_budget=error_budget, size_budget=size_budget)
        return
    plan = plan_formats(layers, error_budget=error_budget, size_budget=size_budget)
    assert plan.error <= error_budget
    assert plan.bytes <= size_budget
    check(layers, plan, optimum, price)


@settings(derandomize=True, max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(problems(costs=COSTS), BUDGETS)
def test_the_gap_also_holds_where_nothing_is_enumerated(layers, budget):
    optimum = brute_force(layers, price, error_budget=budget)
    assume(optimum is not None)
    with mock.patch.object(knapsack, "_EXACT_ROWS", 0):
        greedy = plan_formats(layers, error_budget=budget)
    assert greedy.error <= budget
    check(layers, greedy, optimum, price)
    with mock.patch.object(knapsack, "_EXACT_STATES", 2):
        beam = plan_formats(layers, error_budget=budget)
    assert beam.error <= budget
    check(layers, beam, optimum, price)
    assert beam.objective_value <= greedy.objective_value


@settings(derandomize=True, max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(problems(errors=st.one_of(st.integers(0, 12).map(lambda n: n / 10), st.floats(1e-12, 10.0))), BUDGETS)
def test_small_problems_are_solved_exactly(layers, budget):
    optimum = brute_force(layers, price, error_budget=budget)
    assume(optimum is not None)
    plan = plan_formats(layers, error_budget=budget)
    assert plan.objective_value == pytest.approx(optimum, rel=1e-9)


@settings(derandomize=True, max_examples=50, deadline=None)
@given(problems(), BUDGETS)
def test_every_plan_survives_json(layers, budget):
    try:
        plan = plan_formats(layers, error_budget=budget)
    except BudgetError as error:
        plan = error.plan
    text = plan.to_json()
    assert Plan.from_json(text) == plan
    assert Plan.from_json(text).to_json() == text
