"""Plans beyond the error budget, trained until their models keep it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from tqdm import tqdm

from lowrank.compression.plan import Plan, same_specs
from lowrank.compression.trial import ErrorMeasure, Healer, Trial
from lowrank.compression.working_copy import WorkingCopy

if TYPE_CHECKING:
    from lowrank.compression.search import Search

__all__ = ["heal_plan", "healed_plans"]

# The first plan that is healed has this many times the error that the budget allows; later ones go by what healing brought. Each
# takes as long as training does, so there are few. Heuristics: the error at equal bytes fell to 0.4 to 0.9 of itself in the studies.
HEAL_REACH = 1.5
HEAL_ROUNDS = 4
HEAL_TOLERANCE = 0.03


def healed_plans(search: Search) -> list[Trial]:
    """Heal plans beyond the budget, until one comes out near the search's target.

    Args:
        search: with plans that were tried, and something that heals.
    """
    assert search.heal is not None
    allowed = _first_allowed(search)
    found: list[Trial] = []
    # Predicted errors whose healed models came out within the target, and beyond it.
    within, beyond = 0.0, math.inf
    for _ in tqdm(range(HEAL_ROUNDS), desc="healing plans", delay=2, disable=not search.progress):
        if allowed is None:
            break
        plan = search.plan_for(allowed)
        if not plan.error > 0.0 or any(same_specs(plan, item.plan) for item in found):
            break
        trial = heal_plan(search.copy, plan, search.measure, search.heal)
        if trial is None:
            # Training made it no better: nothing here can make up for what is lost.
            break
        found.append(trial)
        value = trial.searched.value
        if not math.isfinite(value) or value <= 0.0:
            break
        # As if healing took the same share off every plan's error.
        ratio = search.total(search.target) / search.total(value)
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


def _first_allowed(search: Search) -> float | None:
    """The predicted error of the first plan to heal; ``None`` where nothing was measured that could lead to one."""
    fitting = [item for item in search.trials if item.searched.value <= search.target]
    base = min(fitting, key=lambda item: item.plan.bytes, default=None)
    if base is not None:
        reached = max(search.total(base.searched.value), 1e-300)
        return search.predicted(base.plan) * search.total(HEAL_REACH * search.target) / reached
    # Nothing fits as it is: healing the safest may be what it takes.
    base = min(search.trials, key=lambda item: item.searched.value, default=None)
    return None if base is None or not math.isfinite(base.searched.value) else search.predicted(base.plan)


def heal_plan(copy: WorkingCopy, plan: Plan, measure: ErrorMeasure, heal: Healer) -> Trial | None:
    """Train the model of a plan and measure it; ``None`` where training made it no better."""
    result = heal(copy.install_plan(plan))
    if result.report.kept == "before":
        return None
    plan = replace(plan, metadata={**plan.metadata, "healed": {"steps": result.report.steps}})
    return Trial("healed", plan, measure(result.model), healed=result)
