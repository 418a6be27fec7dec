"""Plans that were tried, with what was measured of each, and what measures and trains them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch import nn

from lowrank.calibration.evaluation import Evaluator
from lowrank.compression.candidates import Plan
from lowrank.compression.working_copy import Bench
from lowrank.training.healing import HealResult

__all__ = ["Finalist", "Gauge", "Healer", "Outcome", "Reading", "SampledGauge", "ValueGauge", "same_choices"]


@dataclass(frozen=True)
class Reading:
    """A measured error, and the bound that must lie within the budget."""

    value: float
    upper: float
    samples: int = 0


class Gauge(Protocol):
    """Measures the error of a model."""

    def __call__(self, model: nn.Module) -> Reading: ...


@dataclass
class SampledGauge:
    """The error on samples, bounded with 95 % confidence."""

    evaluator: Evaluator
    desc: str | None = None

    def __call__(self, model: nn.Module) -> Reading:
        measured = self.evaluator.measure(model, desc=self.desc)
        return Reading(measured.value, measured.upper(), len(measured.numerators))


@dataclass
class ValueGauge:
    """An error that needs no statistics: computed from the weights, or a callable's value as it is."""

    function: Callable[[nn.Module], float]

    def __call__(self, model: nn.Module) -> Reading:
        value = self.function(model)
        return Reading(value, value)


Healer = Callable[[nn.Module], HealResult]


@dataclass
class Finalist:
    """A plan with what was measured on the search part and, where its turn came, on the verification part.

    Attributes:
        healed: the model of the plan after it was trained, where that is what was measured.
    """

    label: str
    plan: Plan
    searched: Reading
    verified: Reading | None = None
    healed: HealResult | None = None

    def model(self, bench: Bench) -> nn.Module:
        """The model that is measured."""
        return self.healed.model if self.healed is not None else bench.install_plan(self.plan)


@dataclass
class Outcome:
    """The plan chosen, measured over predicted contributions, everything that was tried, and plans for other error budgets."""

    chosen: Finalist
    calibration: float
    finalists: list[Finalist] = field(default_factory=list)
    predicted: list[tuple[float, Plan]] = field(default_factory=list)


def same_choices(one: Plan, other: Plan) -> bool:
    """Whether two plans make every layer the same."""

    def key(plan: Plan) -> list[tuple[object, ...]]:
        return [
            (entry.name, entry.format, entry.rank, entry.bits, entry.activations, entry.scheme)
            for entry in plan.entries
        ]

    return key(one) == key(other)
