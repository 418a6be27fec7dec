"""Plans that were tried, with what was measured of each, and what measures and trains them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch import nn

from lowrank.calibration.evaluation import Comparison, Evaluator
from lowrank.calibration.groups import GroupEvaluator
from lowrank.compression.plan import Plan
from lowrank.compression.working_copy import WorkingCopy
from lowrank.training.healing import HealResult

__all__ = ["ComputedError", "ErrorMeasure", "Healer", "Outcome", "Reading", "SampledError", "Trial", "corrected"]


@dataclass(frozen=True)
class Reading:
    """A measured error, and the bound that must lie within the budget.

    Attributes:
        samples: that it was measured on; 0 where that means nothing.
        comparison: of every output, where it was measured on samples.
    """

    value: float
    upper: float
    samples: int = 0
    comparison: Comparison | None = None


class ErrorMeasure(Protocol):
    """Measure the error of a model."""

    def __call__(self, model: nn.Module) -> Reading: ...


@dataclass
class SampledError:
    """Measure the error on samples, bounded with 95 % confidence."""

    evaluator: Evaluator | GroupEvaluator
    desc: str | None = None

    def __call__(self, model: nn.Module) -> Reading:
        measured = self.evaluator.measure(model, desc=self.desc)
        return Reading(measured.value, measured.upper(), measured.samples, measured)


@dataclass
class ComputedError:
    """Take an error that needs no statistics: computed from the weights, or a callable's value as it is."""

    function: Callable[[nn.Module], float]

    def __call__(self, model: nn.Module) -> Reading:
        value = self.function(model)
        return Reading(value, value)


Healer = Callable[[nn.Module], HealResult]


@dataclass(eq=False)
class Trial:
    """A plan with what was measured on the search part and, where its turn came, on the verification part.

    Attributes:
        healed: the model of the plan after it was trained, where that is what was measured.
        predicted: contributions that were foreseen, by what was known before it was measured.
    """

    label: str
    plan: Plan
    searched: Reading
    verified: Reading | None = None
    healed: HealResult | None = None
    predicted: float | None = None

    def model(self, copy: WorkingCopy) -> nn.Module:
        """Give the model that is measured."""
        return self.healed.model if self.healed is not None else copy.install_plan(self.plan)


@dataclass
class Outcome:
    """The plan chosen, measured over predicted contributions, everything that was tried, and plans for other error budgets.

    Attributes:
        neighbours: the next better and the next smaller plan that were measured, where there are any.
        passes: over the samples of the search, by what they were for.
    """

    chosen: Trial
    calibration: float
    trials: list[Trial] = field(default_factory=list)
    predicted: list[tuple[float, Plan]] = field(default_factory=list)
    neighbours: tuple[Trial | None, Trial | None] = (None, None)
    passes: dict[str, int] = field(default_factory=dict)


def corrected(predicted: float, reading: Reading, scale: float, total: Callable[[float], float]) -> float:
    """Give measured over predicted contributions; the old scale where one of them says nothing."""
    measured = total(reading.value) if math.isfinite(reading.value) else math.inf
    ratio = measured / predicted if predicted > 0.0 else 0.0
    return ratio if 0.0 < ratio < math.inf else scale
