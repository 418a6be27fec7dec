"""Why a layer stays as it is, in numbers: what its cheapest format would cost, and what the budget is."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank.compression.candidates import LayerChoices
from lowrank.compression.formats import is_dense
from lowrank.compression.options import Options
from lowrank.compression.plan import Plan

__all__ = ["reasons_for_dense"]


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
    metric = options.error_metric
    cost = options.value(mildest.error * scale)
    if options.error_budget is None:
        return f"{mildest.spec.format} would cost an error of {metric.show(cost)}; the size budget is met without it"
    budget = options.error_budget
    if cost > budget:
        return f"{mildest.spec.format} costs {metric.show_beside(cost, budget)}, the budget is {metric.show(budget)}"
    return f"{mildest.spec.format} alone costs {metric.show(cost)} of the budget of {metric.show(budget)}, which saves more in other layers"
