"""Plans beyond the error budget, trained until their models keep it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from tqdm import tqdm

from lowrank.compression.candidates import Plan
from lowrank.compression.trial import Finalist, Gauge, Healer, same_choices
from lowrank.compression.working_copy import Bench

__all__ = ["heal_plan", "healed_plans"]

# The first plan that is healed has this many times the error that the budget allows; later ones go by what healing brought. Each
# takes as long as training does, so there are few. Heuristics: the error at equal bytes fell to 0.4 to 0.9 of itself in the studies.
HEAL_REACH = 1.5
HEAL_ROUNDS = 4
HEAL_TOLERANCE = 0.03


def healed_plans(
    bench: Bench,
    plan_for: Callable[[float], Plan],
    finalists: Sequence[Finalist],
    target: float,
    search: Gauge,
    total: Callable[[float], float],
    heal: Healer,
    progress: bool,
) -> list[Finalist]:
    """Plans beyond the budget, healed, until one comes out near the target."""
    fitting = [item for item in finalists if item.searched.value <= target]
    base = min(fitting, key=lambda item: item.plan.bytes, default=None)
    if base is None:
        # Nothing fits as it is: healing the safest may be what it takes.
        base = min(finalists, key=lambda item: item.searched.value, default=None)
        if base is None or not math.isfinite(base.searched.value):
            return []
        allowed = base.plan.error
    else:
        allowed = base.plan.error * total(HEAL_REACH * target) / max(total(base.searched.value), 1e-300)
    found: list[Finalist] = []
    # Predicted errors whose healed models came out within the target, and beyond it.
    within, beyond = 0.0, math.inf
    for _ in tqdm(range(HEAL_ROUNDS), desc="healing plans", delay=2, disable=not progress):
        plan = plan_for(allowed)
        if not plan.error > 0.0 or any(same_choices(plan, item.plan) for item in found):
            break
        finalist = heal_plan(bench, plan, search, heal)
        if finalist is None:
            # Training made it no better: nothing here can make up for what is lost.
            break
        found.append(finalist)
        value = finalist.searched.value
        if not math.isfinite(value) or value <= 0.0:
            break
        # As if healing took the same share off every plan's error.
        ratio = total(target) / total(value)
        if ratio >= 1.0:
            within = max(within, allowed)
            if math.log(ratio) < HEAL_TOLERANCE:
                break
        else:
            beyond = min(beyond, allowed)
        allowed *= ratio
        if not within < allowed < beyond and within > 0.0 and math.isfinite(beyond):
            allowed = math.sqrt(within * beyond)
    return found


def heal_plan(bench: Bench, plan: Plan, search: Gauge, heal: Healer) -> Finalist | None:
    """The plan as a finalist whose model was trained; ``None`` where training made it no better."""
    result = heal(bench.install_plan(plan))
    if result.report.kept == "before":
        return None
    plan = replace(plan, metadata={**plan.metadata, "healed": {"steps": result.report.steps}})
    return Finalist("healed", plan, search(result.model), healed=result)
