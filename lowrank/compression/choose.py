"""Which plan: the budgets, the gauges that test them, and the uniform formats that any plan has to beat."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from lowrank.calibration.batches import Batch, sample_count
from lowrank.calibration.evaluation import Evaluator
from lowrank.calibration.metrics import CallableMetric, SampledMetric
from lowrank.compression.accounting import layer_rows
from lowrank.compression.candidates import LayerChoices, Plan, plan_formats
from lowrank.compression.healed_plans import heal_plan
from lowrank.compression.options import Options
from lowrank.compression.prepare import Job
from lowrank.compression.probes import uniform_choices
from lowrank.compression.search import keep_error_budget, least_error
from lowrank.compression.trial import Finalist, Gauge, Healer, Outcome, SampledGauge, ValueGauge
from lowrank.compression.working_copy import choice_of, weight_error_of
from lowrank.compression.workshop import Choice
from lowrank.errors import BudgetError
from lowrank.training.healing import HealResult, heal_batches
from lowrank.training.options import HealOptions

__all__ = ["choose", "gauges_of", "healer_of", "measure_given", "planner_of", "uniform_plans"]

# Times the budget: what the report says that other budgets would give.
OTHER_BUDGETS = (0.1, 0.2, 0.35, 0.5, 0.75, 1.5, 2.0, 3.0, 5.0)
# A budget for plans that have one candidate a layer and nothing to choose.
UNLIMITED = 1e300


def planner_of(job: Job, options: Options) -> Callable[[float], Plan]:
    """A function from an allowed sum of contributions (inf: the size budget decides) to the best plan.

    Where the budget has room for every layer in a compressed format, dense is no longer offered: a tiny layer kept dense to spare a
    little error for integer activations elsewhere would make the model larger than plain int8.
    """
    metadata = _metadata(job, options)
    fast_within = metadata.get("target_bytes")
    # For speed a layer may well stay dense: the others then have more of the budget to get faster with.
    small = [_without_dense(layer) for layer in job.layers] if job.speed is None else job.layers
    least = math.fsum(min(candidate.error for candidate in layer.candidates) for layer in small)

    def plan_for(total: float) -> Plan:
        if math.isfinite(total) and fast_within is not None:
            with contextlib.suppress(BudgetError):
                # Out of reach together; by the error alone then, and whatever keeps the size too is preferred.
                return plan_formats(job.layers, error_budget=total, size_budget=fast_within, metadata=metadata)
        if math.isfinite(total):
            return plan_formats(small if least <= total else job.layers, error_budget=total, metadata=metadata)
        return plan_formats(job.layers, size_budget=_target_bytes(job, options), metadata=metadata)

    return plan_for


def _metadata(job: Job, options: Options) -> dict[str, Any]:
    """The job's; for a plan made for speed within a size also what the size leaves, so that plans can be compared."""
    bound = job.speed is not None and options.size_budget is not None
    return job.metadata(options) | ({"target_bytes": _target_bytes(job, options)} if bound else {})


def _without_dense(layer: LayerChoices) -> LayerChoices:
    compressed = tuple(candidate for candidate in layer.candidates if candidate.format != "dense")
    return replace(layer, candidates=compressed) if compressed else layer


def _target_bytes(job: Job, options: Options) -> int:
    """What the size budget leaves for the targets once everything else is stored as it is."""
    assert options.size_budget is not None
    rows = layer_rows(job.survey, job.bench.original, job.bench.workshops)
    before = sum(row.bytes_before for row in rows)
    rest = sum(row.bytes_after for row in rows) - sum(
        shop.bytes(Choice("dense")) for shop in job.bench.workshops.values()
    )
    allowed = int(before * options.size_budget) - rest
    least = sum(min(candidate.bytes for candidate in layer.candidates) for layer in job.layers)
    if allowed < least:
        raise BudgetError(
            f"size budget {options.size_budget:g}: cannot be met; the smallest these formats can make of the model is "
            f"{(least + rest) / before:.4g} of its bytes"
        )
    return allowed


def uniform_plans(job: Job, options: Options) -> list[tuple[str, Plan]]:
    """Plans that give every layer the same format; they are what a smarter plan has to beat."""
    if "int8" not in options.formats or options.overrides:
        return []
    modes = ("int8", "float") if options.activations == "auto" else (options.activations,)
    plans = []
    for mode in modes:
        wanted = uniform_choices(job.bench.workshops, mode)
        layers = []
        for layer in job.layers:
            fitting = [item for item in layer.candidates if choice_of(item) == wanted[layer.name]]
            layers.append(replace(layer, candidates=tuple(fitting or layer.candidates[:1])))
        label = "int8 throughout" + (", weight-only" if mode == "float" else "")
        plans.append((label, plan_formats(layers, error_budget=UNLIMITED, metadata=_metadata(job, options))))
    return plans


def gauges_of(job: Job, verification: Sequence[Batch], options: Options) -> tuple[Gauge, Gauge]:
    """What measures a plan while searching, and what tests it at the end."""
    metric = options.error_metric
    if isinstance(metric, CallableMetric):
        gauge = ValueGauge(metric.loss_against(job.bench.reference))
        return gauge, gauge
    if not isinstance(metric, SampledMetric) or job.split is None:
        weight = ValueGauge(lambda model: weight_error_of(job.bench))
        return weight, weight
    bench = job.bench
    desc = "measuring" if options.progress else None
    search = Evaluator(bench.reference, job.split.search, metric, options.output_fn)
    verify = Evaluator(bench.reference, verification, metric, options.output_fn)
    return SampledGauge(search, desc), SampledGauge(verify, desc)


def healer_of(job: Job, options: Options) -> Healer | None:
    """What trains the model of a plan, where that is asked for: on the statistics part, with its outcome judged on the search part."""
    if not options.heal or job.split is None:
        return None
    settings, split = HealOptions.of(options.heal), job.split

    def heal(model: nn.Module) -> HealResult:
        return heal_batches(
            model,
            job.bench.reference,
            split.statistics,
            split.search,
            settings,
            output_fn=options.output_fn,
            seed=options.seed,
            progress=options.progress,
        )

    return heal


def choose(job: Job, verification: Sequence[Batch], options: Options) -> Outcome:
    """The plan that keeps the budgets, put up on the bench.

    Raises:
        BudgetError: no plan keeps them.
    """
    search, verify = gauges_of(job, verification, options)
    plan_for = planner_of(job, options)
    if options.error_budget is None:
        allowed = _target_bytes(job, options)
        plans = [
            ("size budget", plan_for(math.inf)),
            *(item for item in uniform_plans(job, options) if item[1].bytes <= allowed),
        ]
        outcome = least_error(
            job.bench,
            plans,
            search,
            verify,
            total=options.contribution,
            progress=options.progress,
            heal=healer_of(job, options),
        )
        outcome.predicted = _others(plan_for, outcome, outcome.chosen.searched.value, options)
        return _calibrated(outcome, options)
    outcome = keep_error_budget(
        job.bench,
        plan_for,
        uniform_plans(job, options),
        options.error_budget,
        search,
        verify,
        verify_samples=sample_count(verification),
        total=options.contribution,
        progress=options.progress,
        heal=healer_of(job, options),
    )
    outcome.predicted = _others(plan_for, outcome, options.error_budget, options)
    return _calibrated(outcome, options)


def _others(
    plan_for: Callable[[float], Plan], outcome: Outcome, around: float, options: Options
) -> list[tuple[float, Plan]]:
    """Plans for error budgets around this one, for the report: nothing is built or measured."""
    found: list[tuple[float, Plan]] = []
    for factor in OTHER_BUDGETS:
        budget = around * factor
        allowed = options.contribution(budget) / outcome.calibration
        if not 0.0 < allowed < UNLIMITED or (options.error_metric.relative and budget > 1.0):
            continue
        try:
            plan = plan_for(allowed)
        except BudgetError:
            # Overrides that no budget of this size can hold.
            continue
        if any(entry.format != "dense" for entry in plan.entries):
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


def measure_given(job: Job, plan: Plan, verification: Sequence[Batch], options: Options) -> Outcome:
    """A plan that somebody else made, put up on the bench and measured.

    Raises:
        BudgetError: it does not keep the error budget.
    """
    _, verify = gauges_of(job, verification, options)
    heal = healer_of(job, options)
    # What is measured on the verification samples is all that counts for a plan that is not chosen.
    found = None if heal is None else heal_plan(job.bench, plan, verify, heal)
    if found is None:
        reading = verify(job.bench.install_plan(plan))
        found = Finalist("given plan", plan, reading)
    reading, plan = found.searched, found.plan
    # An edit by hand leaves the old sizes in the plan; the one that is handed back and saved has those of the built layers.
    sized = tuple(
        replace(entry, bytes=job.bench.workshops[entry.name].bytes(choice_of(entry))) for entry in plan.entries
    )
    plan = replace(plan, entries=sized)
    if options.error_budget is not None and not reading.upper <= options.error_budget:
        raise BudgetError(
            f"error budget {options.error_budget:g}: the given plan reaches {reading.value:.4g}, at most {reading.upper:.4g} "
            "with 95 % confidence",
            plan=plan,
            error=reading.upper,
        )
    return Outcome(Finalist("given plan", plan, reading, reading, found.healed), 1.0)
