"""In which order plans that were measured are tested, which of them are not worth it, and what lies beside the one that is chosen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from lowrank.compression.plan import Plan
from lowrank.compression.probes import WEIGHT_ONLY_CHARGE
from lowrank.compression.trial import Trial

__all__ = ["before_the_knee", "neighbours_of", "safe_to_small", "size_of"]

# No step that takes a tenth of the budget or more for less than half a per cent of the bytes, or more at this rate.
KNEE_SHARE = 0.1
KNEE_RATE = 0.005 / KNEE_SHARE


def safe_to_small(trials: Iterable[Trial]) -> list[Trial]:
    """By growing error on the search part, without plans that are no smaller than a safer one.

    Of two plans of one size the one with fewer weight-only bytes counts as the smaller: it runs faster.
    """
    sequence: list[Trial] = []
    for trial in sorted(trials, key=lambda item: (item.searched.value, size_of(item.plan))):
        if math.isfinite(trial.searched.value) and (not sequence or size_of(trial.plan) < size_of(sequence[-1].plan)):
            sequence.append(trial)
    return sequence


def before_the_knee(sequence: Sequence[Trial], budget: float, rest_bytes: int) -> list[Trial]:
    """Leave out what is hardly smaller than a safer plan: decided on the search part alone, so that the order of the tests stays fixed.

    A plan made for speed is never left out.

    Args:
        sequence: of :func:`safe_to_small`.
        budget: in the metric's unit.
        rest_bytes: of the file beside the targets.
    """

    def beyond(trial: Trial) -> bool:
        if trial.plan.metadata.get("objective") == "latency":
            return False
        for safer in sequence:
            taken = (trial.searched.value - safer.searched.value) / budget
            saved = (_charged(safer.plan) - _charged(trial.plan)) / max(rest_bytes + safer.plan.bytes, 1)
            if taken >= KNEE_SHARE and saved < KNEE_RATE * taken:
                return True
        return False

    return [trial for trial in sequence if not beyond(trial)]


def neighbours_of(chosen: Trial, trials: Iterable[Trial]) -> tuple[Trial | None, Trial | None]:
    """The next better and the next smaller plan that were measured."""
    sequence = safe_to_small(trials)
    if chosen not in sequence:
        return None, None
    place = sequence.index(chosen)
    better = sequence[place - 1] if place else None
    return better, sequence[place + 1] if place + 1 < len(sequence) else None


def _charged(plan: Plan) -> float:
    """Bytes, with what weight-only ones are charged for: integer products are faster."""
    return plan.bytes + (WEIGHT_ONLY_CHARGE - 1.0) * plan.weight_only_bytes


def size_of(plan: Plan) -> tuple[float, ...]:
    """What the smaller of two plans has less of; for plans made for speed: bytes over their size budget, then seconds."""
    if plan.metadata.get("objective") == "latency" and plan.objective_value is not None:
        return max(plan.bytes - plan.metadata.get("target_bytes", math.inf), 0), plan.objective_value, plan.bytes
    return plan.bytes, plan.weight_only_bytes
