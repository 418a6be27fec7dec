"""Which plan: what measures plans, what heals them, and the search that the budgets ask for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from lowrank.calibration.batches import Batch
from lowrank.calibration.groups import evaluator_of, fewest, groups_of
from lowrank.calibration.metrics import CallableMetric, SampledMetric
from lowrank.compression.accounting import TargetBytes
from lowrank.compression.allocation import Allocator
from lowrank.compression.corrections import Corrections
from lowrank.compression.formats import format_of
from lowrank.compression.healed_plans import heal_plan
from lowrank.compression.options import Options
from lowrank.compression.plan import Plan
from lowrank.compression.prepare import Preparation
from lowrank.compression.reasons import reasons_for_dense
from lowrank.compression.search import Search
from lowrank.compression.trial import ComputedError, ErrorMeasure, Healer, Outcome, SampledError, Trial
from lowrank.compression.working_copy import weight_error_of
from lowrank.errors import BudgetError, UsageError
from lowrank.reporting.text import beside
from lowrank.training.healing import HealResult, heal_batches
from lowrank.training.options import HealOptions

__all__ = ["allocator_of", "choose", "measure_given", "search_of", "uniform_plans"]

# Times the budget: what the report says that other budgets would give.
OTHER_BUDGETS = (0.1, 0.2, 0.35, 0.5, 0.75, 1.5, 2.0, 3.0, 5.0)
# Uniform plans that are measured where the size is given.
MOST_UNIFORM = 4
# Contributions from which on a budget allows everything.
UNLIMITED = 1e300


def allocator_of(prepared: Preparation, options: Options) -> Allocator:
    """Give what makes plans for these options."""
    sizes = None
    if options.size_budget is not None:
        sizes = TargetBytes.of_original(prepared.survey, prepared.copy.original, prepared.copy.layers)
    return Allocator(
        prepared.choices, prepared.metadata(options), sizes, options.size_budget, for_speed=prepared.speed is not None
    )


def search_of(
    prepared: Preparation, verification: Sequence[Batch], options: Options, corrections: Corrections | None = None
) -> Search:
    """Give the search object of these options: copy, planner, measures, healing.

    Args:
        verification: samples that no plan is made from.
        corrections: of :func:`allocator_of`; ``None`` where a plan is given and none is made.
    """
    measure, verify = _measures(prepared, verification, options)
    planner: dict[str, Any] = {}
    if corrections is not None:
        planner = {"predicted": corrections.predicted, "learn": corrections.learn}
    return Search(
        prepared.copy,
        _no_plan if corrections is None else corrections.plan,
        measure,
        verify,
        options.contribution,
        verify_samples=fewest(verification),
        foreseen=prepared.split is None or set(groups_of(verification)) <= {"", *groups_of(prepared.split.search)},
        heal=_healer(prepared, options),
        progress=options.progress,
        reasons=lambda scale: prepared.refused | _unrefused(prepared, corrections, scale, options),
        passes=prepared.passes,
        rest_bytes=_rest_bytes(prepared),
        smallest=options.smallest,
        **planner,
    )


def _rest_bytes(prepared: Preparation) -> int:
    """What the file holds beside the targets."""
    return TargetBytes.of_original(prepared.survey, prepared.copy.original, prepared.copy.layers).rest


def _unrefused(
    prepared: Preparation, corrections: Corrections | None, scale: float, options: Options
) -> dict[str, str]:
    """Why layers that could be replaced would stay as they are."""
    choices = prepared.choices if corrections is None else corrections.allocator.choices
    found = reasons_for_dense(choices, None, scale, options)
    return {name: reason for name, reason in found.items() if name not in prepared.refused}


def _no_plan(total: float) -> Plan:
    raise UsageError("plan: one is given, so that none is made for a budget")


def uniform_plans(options: Options, allocator: Allocator) -> list[tuple[str, Plan]]:
    """Make the plans that give every layer the same rounding format, of each that is asked for; none where something is forced."""
    return [] if options.overrides else allocator.uniform(options.formats, options.activations)


def _measures(
    prepared: Preparation, verification: Sequence[Batch], options: Options
) -> tuple[ErrorMeasure, ErrorMeasure]:
    """What measures a plan while searching, and what tests it at the end."""
    copy = prepared.copy
    metric = options.error_metric
    if isinstance(metric, CallableMetric):
        relative = ComputedError(metric.loss_against(copy.reference))
        return relative, relative
    if not isinstance(metric, SampledMetric) or prepared.split is None:
        weight = ComputedError(lambda model: weight_error_of(copy))
        return weight, weight
    desc = "measuring" if options.progress else None
    search = evaluator_of(copy.reference, prepared.split.search, metric, options.output_fn)
    verify = evaluator_of(copy.reference, verification, metric, options.output_fn)
    return SampledError(search, desc), SampledError(verify, desc)


def _healer(prepared: Preparation, options: Options) -> Healer | None:
    """What trains the model of a plan, where that is asked for: on the statistics part, with its outcome judged on the search part."""
    if not options.heal or prepared.split is None:
        return None
    settings, split = HealOptions.of(options.heal), prepared.split

    def heal(model: nn.Module) -> HealResult:
        return heal_batches(
            model,
            prepared.copy.reference,
            split.statistics,
            split.search,
            settings,
            output_fn=options.output_fn,
            seed=options.seed,
            progress=options.progress,
        )

    return heal


def choose(prepared: Preparation, verification: Sequence[Batch], options: Options) -> Outcome:
    """Find the plan that keeps the budgets, and install it.

    Raises:
        BudgetError: no plan keeps them.
    """
    allocator = allocator_of(prepared, options)
    corrections = Corrections(allocator)
    search = search_of(prepared, verification, options, corrections)
    uniform = uniform_plans(options, allocator)
    if options.error_budget is None:
        allowed = allocator.allowed_bytes
        assert allowed is not None
        fitting = sorted((item for item in uniform if item[1].bytes <= allowed), key=lambda item: item[1].error)
        plans = [("size budget", allocator.plan(math.inf)), *fitting[:MOST_UNIFORM]]
        outcome = search.least_error(plans)
        around = outcome.chosen.searched.value
    else:
        outcome = search.keep_error_budget(options.error_budget, uniform)
        around = options.error_budget
    outcome.passes = dict(prepared.passes.spent)
    outcome.predicted = _others(corrections.allocator, outcome, around, options)
    # What is said of layers and of plans from here on is as measurements have corrected it.
    prepared.choices = list(corrections.allocator.choices)
    outcome.chosen.plan = corrections.repriced(outcome.chosen.plan)
    return _calibrated(outcome, options)


def _others(allocator: Allocator, outcome: Outcome, around: float, options: Options) -> list[tuple[float, Plan]]:
    """Plans for error budgets around this one, for the report: nothing is built or measured."""
    found: list[tuple[float, Plan]] = []
    for factor in OTHER_BUDGETS:
        budget = around * factor
        allowed = options.contribution(budget) / outcome.calibration
        if not 0.0 < allowed < UNLIMITED or (options.error_metric.relative and budget > 1.0):
            continue
        try:
            plan = allocator.plan(allowed)
        except BudgetError:
            # Overrides that no budget of this size can hold.
            continue
        if any(entry.compressed for entry in plan.entries):
            found.append((budget, plan))
    return found


def _calibrated(outcome: Outcome, options: Options) -> Outcome:
    """The outcome with the plan's predicted contributions as the end-to-end measurements corrected them."""
    plan, scale = outcome.chosen.plan, outcome.calibration
    if outcome.chosen.healed is not None and plan.error > 0.0:
        scale = options.contribution(outcome.chosen.searched.value) / plan.error
    entries = tuple(replace(entry, error=entry.error * scale) for entry in plan.entries)
    outcome.chosen.plan = replace(plan, entries=entries, metadata={**plan.metadata, "calibration": scale})
    return outcome


def measure_given(prepared: Preparation, plan: Plan, verification: Sequence[Batch], options: Options) -> Outcome:
    """Install and measure a plan that somebody else made.

    Raises:
        BudgetError: it does not keep the error budget.
    """
    search = search_of(prepared, verification, options)
    # What is measured on the verification samples is all that counts for a plan that is not chosen.
    found = None if search.heal is None else heal_plan(search.copy, plan, search.verify, search.heal)
    if found is None:
        found = Trial("given plan", plan, search.verify(search.copy.install_plan(plan)))
    reading, plan = found.searched, found.plan
    # An edit by hand leaves the old sizes in the plan; the one that is handed back and saved has those of the built layers.
    layers = search.copy.layers
    sized = tuple(
        replace(entry, bytes=format_of(entry.spec).stored_bytes(layers[entry.name], entry.spec))
        for entry in plan.entries
    )
    plan = replace(plan, entries=sized)
    if options.error_budget is not None and not reading.upper <= options.error_budget:
        standing = "" if reading.comparison is None else reading.comparison.standing(options.error_budget)
        raise BudgetError(
            f"error budget {options.error_budget:g}: the given plan reaches {beside(reading.value, options.error_budget)}, "
            f"at most {beside(reading.upper, options.error_budget)} with 95 % confidence{standing}",
            plan=plan,
            error=reading.upper,
        )
    return Outcome(Trial("given plan", plan, reading, reading, found.healed), 1.0)
