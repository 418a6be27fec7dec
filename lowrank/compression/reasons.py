"""Why a layer stays as it is, in numbers: what its cheapest format would cost, and what the budget is."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank.compression.candidates import Candidate, LayerChoices
from lowrank.compression.formats import is_dense
from lowrank.compression.options import Options
from lowrank.compression.plan import Plan

__all__ = ["reasons_for_dense"]

# An error beyond which its size tells nothing more: an output of size 0 that became something has an infinite one.
RUIN = 10.0


def reasons_for_dense(
    choices: Sequence[LayerChoices], plan: Plan | None, scale: float, options: Options
) -> dict[str, str]:
    """Give by name why each layer that the plan leaves dense is left.

    Args:
        choices: of every target, with predicted contributions.
        plan: the one that was chosen; ``None`` for all layers.
        scale: measured over predicted contributions.
        options: of the run, which say what the budget is.
    """
    kept = (
        {layer.name for layer in choices}
        if plan is None
        else {entry.name for entry in plan.entries if not entry.compressed}
    )
    return {layer.name: _reason(layer, scale, options) for layer in choices if layer.name in kept}


def _reason(layer: LayerChoices, scale: float, options: Options) -> str:
    offered = [each for each in layer.candidates if not is_dense(each.spec.format)]
    if not offered:
        return "no format makes it smaller"
    mildest = min(offered, key=lambda each: (each.error, each.bytes))
    metric, name = options.error_metric, mildest.spec.format
    cost = options.value(mildest.error * scale)
    ruin = not cost < RUIN
    shown = f"more than {metric.show(RUIN)}" if ruin else metric.show(cost)
    budget = options.error_budget
    if budget is None:
        return f"{name} would cost an error of {shown}; the size budget is met without it"
    limit = metric.show_limit(budget)
    if cost > budget:
        return f"{name} costs {shown if ruin else metric.show_beside(cost, budget)}, the budget is {limit}"
    if options.objective != "size" and not any(each.price < dense.price for each in offered for dense in _dense(layer)):
        return "no format makes it faster"
    return f"{name} alone costs {shown} of the budget of {limit}, which saves more in other layers"


def _dense(layer: LayerChoices) -> list[Candidate]:
    return [each for each in layer.candidates if is_dense(each.spec.format)]
