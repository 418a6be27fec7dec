"""From predictions to a plan whose promise was tested: calibrate on the search part, then verify from safe to small."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from tqdm import tqdm

from lowrank.compression.candidates import Plan
from lowrank.compression.healed_plans import heal_plan, healed_plans
from lowrank.compression.trial import Finalist, Gauge, Healer, Outcome, same_choices
from lowrank.compression.working_copy import Bench
from lowrank.errors import BudgetError

__all__ = ["keep_error_budget", "least_error"]

# Fractions of the calibrated budget at which plans are made. The small ones are there for the day when predictions are far off or
# samples so few that the test's margin is wide; steps near 1 are about as fine as a few hundred samples can tell apart.
FRACTIONS = (0.1, 0.25, 0.5, 0.7, 0.8, 0.87, 0.92, 0.96, 1.0, 1.03, 1.06, 1.1)
# End-to-end measurements that calibrate the predictions; seen to settle within 3 on MiniLM and small GPT and Llama models.
CALIBRATION_ROUNDS = 5
CALIBRATION_TOLERANCE = 0.03
# Doublings of the predicted error that is let through while everything is predicted to be over the budget.
WIDENING_ROUNDS = 12
# Gaps between finalists near the target that are filled, by measuring at most so many plans more.
GAP_WIDTH = 1.06
GAP_STEPS = 10
# How far beyond the predicted end of the budget plans are tried where all turned out too timid.
REACH_FACTOR = 1.3
REACH_STEPS = 12
# Finalists whose bound on the search part is below this share of the budget will pass; only the smallest of them is verified.
SURE_SHARE = 0.6


def keep_error_budget(
    bench: Bench,
    plan_for: Callable[[float], Plan],
    uniform: Sequence[tuple[str, Plan]],
    budget: float,
    search: Gauge,
    verify: Gauge,
    *,
    verify_samples: int,
    total: Callable[[float], float],
    progress: bool,
    heal: Healer | None = None,
) -> Outcome:
    """The smallest plan whose verification bound is within the budget.

    The order of the finalists is fixed by the search part alone, from the smallest error to the smallest size, and verification stops
    at the first that fails: so testing several plans leaves the 95 % of the test intact (fixed-sequence testing, Maurer, Hothorn and
    Lehmacher 1995).

    Args:
        plan_for: the smallest plan whose *predicted* contributions sum to at most this.
        uniform: named plans that are always among the finalists.
        total: from a value of the metric to the unit in which predicted contributions add up.
        heal: trains the model of a plan; healed models are finalists too. It may see neither part that is measured on.

    Raises:
        BudgetError: not even the safest finalist passed, or nothing can be compressed.
    """

    target, scale, tried = _calibrate(bench, plan_for, budget, search, verify_samples, total)
    candidates = [
        (f"{fraction:.0%} of the budget", plan_for(total(target * fraction) / scale)) for fraction in FRACTIONS
    ]
    finalists = _measured(bench, _distinct([*uniform, *candidates]), search, progress)
    if not finalists and tried is not None:
        # So that the refusal can say what the mildest compression costs.
        finalists = _measured(bench, [("the mildest plan tried", tried)], search, progress)
    _reach(bench, plan_for, finalists, target, search)
    _fill_gaps(bench, plan_for, finalists, target, search)
    if heal is not None:
        finalists += healed_plans(bench, plan_for, finalists, target, search, total, heal, progress)
    if not finalists:
        raise BudgetError(
            f"error budget {budget:g}: nothing could be compressed within it; every layer stays dense",
            plan=None,
            error=0.0,
        )
    sequence = _safe_to_small(finalists)
    sure = [item for item in sequence if item.searched.upper <= SURE_SHARE * budget]
    sequence = sequence[max(len(sure) - 1, 0) :]
    passed: Finalist | None = None
    for finalist in tqdm(sequence, desc="verifying plans", delay=2, disable=not progress):
        finalist.verified = verify(finalist.model(bench))
        if not finalist.verified.upper <= budget:
            break
        passed = finalist
    if passed is None:
        first = sequence[0]
        assert first.verified is not None
        raise BudgetError(
            f"error budget {budget:g}: cannot be met; the safest plan that compresses anything ({first.label}, "
            f"{first.plan.bytes:,} bytes in the targets) reaches {first.verified.value:.4g}, at most {first.verified.upper:.4g} with 95 % "
            "confidence; raise the budget to that, or give more calibration samples",
            plan=first.plan,
            error=first.verified.upper,
        )
    bench.install_plan(passed.plan)
    return Outcome(passed, scale, finalists)


def least_error(
    bench: Bench,
    plans: Iterable[tuple[str, Plan]],
    search: Gauge,
    verify: Gauge,
    *,
    total: Callable[[float], float],
    progress: bool,
    heal: Healer | None = None,
) -> Outcome:
    """The plan with the smallest error on the search part, measured on the verification part.

    Args:
        heal: as for :func:`keep_error_budget`; the best plan is healed.
    """

    def value(finalist: Finalist) -> tuple[float, int]:
        return finalist.searched.value, finalist.plan.bytes

    finalists = _measured(bench, _distinct(plans), search, progress, keep_dense=True)
    if heal is not None:
        healed = heal_plan(bench, min(finalists, key=value).plan, search, heal)
        finalists += [] if healed is None else [healed]
    chosen = min(finalists, key=value)
    bench.install_plan(chosen.plan)
    chosen.verified = verify(chosen.model(bench))
    scale = total(chosen.searched.value) / chosen.plan.error if chosen.plan.error > 0.0 else 1.0
    return Outcome(chosen, scale, finalists)


def _calibrate(
    bench: Bench,
    plan_for: Callable[[float], Plan],
    budget: float,
    search: Gauge,
    verify_samples: int,
    total: Callable[[float], float],
) -> tuple[float, float, Plan | None]:
    """The error to aim at (where the verification bound is expected to touch the budget), measured over predicted, the last plan."""
    target, scale = budget, 1.0
    previous: Plan | None = None
    tries = 0
    for _ in range(CALIBRATION_ROUNDS + WIDENING_ROUNDS):
        plan = plan_for(total(target) / scale)
        if plan.error <= 0.0:
            # Nothing is predicted to fit; the predictions may be too high.
            scale /= 4.0
            continue
        if tries == CALIBRATION_ROUNDS or (previous is not None and same_choices(plan, previous)):
            break
        tries += 1
        previous = plan
        reading = search(bench.install_plan(plan))
        if not math.isfinite(reading.value):
            # A plan that breaks the model says nothing about the scale but that it is far too bold.
            scale *= 4.0
            continue
        if reading.value <= 0.0:
            scale /= 4.0
            continue
        measured = total(reading.value) / plan.error
        margin = reading.upper / reading.value - 1.0 if math.isfinite(reading.upper) else 1.0
        if verify_samples and reading.samples:
            margin *= math.sqrt(reading.samples / verify_samples)
        target = budget / (1.0 + margin)
        settled = abs(math.log(measured / scale)) < CALIBRATION_TOLERANCE
        scale = measured
        if settled:
            break
    return target, scale, previous


def _reach(
    bench: Bench, plan_for: Callable[[float], Plan], finalists: list[Finalist], target: float, search: Gauge
) -> None:
    """Bolder and bolder plans, where predictions were too high, until one lies beyond the target or nothing smaller is left."""
    if not finalists:
        return
    boldest = max(finalists, key=lambda item: item.plan.error)
    allowed = boldest.plan.error
    for step in range(REACH_STEPS):
        if not boldest.searched.value < target:
            return
        allowed *= REACH_FACTOR
        plan = plan_for(allowed)
        if plan.error > 0.0 and not same_choices(plan, boldest.plan):
            boldest = Finalist(f"bolder, step {step + 1}", plan, search(bench.install_plan(plan)))
            finalists.append(boldest)


def _fill_gaps(
    bench: Bench, plan_for: Callable[[float], Plan], finalists: list[Finalist], target: float, search: Gauge
) -> None:
    """Bisect the widest gaps between finalists near the target: where predictions are off, their steps are uneven."""
    closed: set[tuple[float, float]] = set()
    for step in range(GAP_STEPS):
        near = sorted(
            (item for item in finalists if 0.75 * target <= item.searched.value <= 1.1 * target),
            key=lambda item: item.searched.value,
        )
        gaps = [
            (above.searched.value / below.searched.value, below, above)
            for below, above in pairwise(near)
            if (below.searched.value, above.searched.value) not in closed
        ]
        width, below, above = max(gaps, key=lambda gap: gap[0], default=(0.0, None, None))
        if below is None or above is None or width <= GAP_WIDTH:
            return
        plan = plan_for(math.sqrt(below.plan.error * above.plan.error))
        if any(same_choices(plan, item.plan) for item in finalists):
            closed.add((below.searched.value, above.searched.value))
        else:
            finalists.append(Finalist(f"between, step {step + 1}", plan, search(bench.install_plan(plan))))


def _measured(
    bench: Bench, plans: Iterable[tuple[str, Plan]], search: Gauge, progress: bool, *, keep_dense: bool = False
) -> list[Finalist]:
    found = []
    for label, plan in tqdm(list(plans), desc="measuring plans", delay=2, disable=not progress):
        if keep_dense or any(entry.format != "dense" for entry in plan.entries):
            found.append(Finalist(label, plan, search(bench.install_plan(plan))))
    return found


def _safe_to_small(finalists: Iterable[Finalist]) -> list[Finalist]:
    """By growing error on the search part, without plans that are no smaller than a safer one.

    Of two plans of one size the one with fewer weight-only bytes counts as the smaller: it runs faster.
    """
    sequence: list[Finalist] = []
    for finalist in sorted(finalists, key=lambda item: (item.searched.value, _size(item.plan))):
        if math.isfinite(finalist.searched.value) and (not sequence or _size(finalist.plan) < _size(sequence[-1].plan)):
            sequence.append(finalist)
    return sequence


def _size(plan: Plan) -> tuple[float, ...]:
    """What the smaller of two plans has less of; for plans made for speed: bytes over their size budget, then seconds."""
    if plan.metadata.get("objective") == "latency" and plan.objective_value is not None:
        return max(plan.bytes - plan.metadata.get("target_bytes", math.inf), 0), plan.objective_value, plan.bytes
    return plan.bytes, sum(entry.bytes for entry in plan.entries if entry.activations == "float")


def _distinct(plans: Iterable[tuple[str, Plan]]) -> list[tuple[str, Plan]]:
    kept: list[tuple[str, Plan]] = []
    for label, plan in plans:
        if not any(same_choices(plan, other) for _, other in kept):
            kept.append((label, plan))
    return kept
