"""What an error metric says of itself: its name and unit, what it needs, and for one measured on samples its terms."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from lowrank.calibration.batches import Batch
from lowrank.errors import UsageError
from lowrank.io.numbers import percent

if TYPE_CHECKING:
    from lowrank.calibration.metrics.variation import Centre

__all__ = ["NATS", "PERCENT", "ErrorMetric", "SampledMetric", "Unit"]


@dataclass(frozen=True)
class Unit:
    """How errors are drawn on an axis.

    Attributes:
        factor: from the metric's value to the number on the axis.
        axis: the axis's name.
        suffix: behind a number of that axis.

    Example:
        >>> f"{PERCENT.factor * 0.05:g}{PERCENT.suffix}"
        '5 %'
    """

    factor: float
    axis: str
    suffix: str


MOST_DIGITS = 9
PERCENT = Unit(100.0, "error, %", " %")
NATS = Unit(1.0, "nats a token", "")


class ErrorMetric(ABC):
    """One way to say how far a compressed model is from its original; a registered one has a name that users write.

    An error has two scales. Its *value* is what budgets and reports hold. Its *ratio* is the scale on which the errors of layers
    add up to that of the model, to first order; :meth:`value` and :meth:`ratio` are inverses of each other for values from 0.
    What stands here fits a relative error: its square adds up, and it is written in per cent.

    Attributes:
        name: unique; what users, plans and reports call it.
        title: for the reader: "output error".
        needs_data: it cannot be measured without calibration batches.
        weights_only: it is computed from the weights, so that data has no part in how layers are fitted.
        relative: a value above 1 says that everything is lost, so that no budget may be larger.
        usual: the range of values that a frontier is drawn over: from about what int8 weights alone cost to where few models are
            of use.
        gradients: which :data:`lowrank.calibration.gradients.DIRECTIONS` say what an error in a layer costs this metric; ``None``:
            gradients are of no use to it.
        unit: of charts.
    """

    name: str
    title: str
    needs_data: ClassVar[bool] = False
    weights_only: ClassVar[bool] = False
    relative: ClassVar[bool] = False
    usual: ClassVar[tuple[float, float]] = (0.01, 0.5)
    gradients: ClassVar[str | None] = "output"
    unit: ClassVar[Unit] = PERCENT

    @property
    def label(self) -> str:
        """What reports call it: the name, but for a callable, which has its own."""
        return self.name

    @property
    @abstractmethod
    def probe(self) -> SampledMetric:
        """What single-layer probes are measured in: a metric that answers smoothly to small changes and whose ratios add up alike."""

    def value(self, ratio: float) -> float:
        """Give the metric's value at a ratio."""
        return math.sqrt(max(ratio, 0.0))

    def ratio(self, value: float) -> float:
        """Give the ratio of a value: what :meth:`value` undoes."""
        return value * value

    def show(self, value: float, digits: int = 2) -> str:
        """Write a value as text, with its unit and at least so many significant digits."""
        return percent(value, digits)

    def show_beside(self, value: float, limit: float) -> str:
        """Write a value with the digits that tell it from a limit: a bound of 10.04 % is not within 10 %."""
        if value == limit or not math.isfinite(value):
            return self.show(value)
        for digits in range(2, MOST_DIGITS):
            if _number(self.show(value, digits)) != _number(self.show(limit, MOST_DIGITS)):
                return self.show(value, digits)
        return self.show(value, MOST_DIGITS)

    def show_limit(self, limit: float) -> str:
        """Write a budget with all the digits that it has: one of 1.25 % is not 1.2 %."""
        for digits in range(2, MOST_DIGITS):
            if _number(self.show(limit, digits)) == _number(self.show(limit, MOST_DIGITS)):
                return self.show(limit, digits)
        return self.show(limit, MOST_DIGITS)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.label!r}>"


def _number(text: str) -> float:
    """The number in front of a unit."""
    return float(text.split()[0])


class SampledMetric(ErrorMetric):
    """A metric that compares the two models' outputs sample by sample; its ratio is Σ numerators / Σ denominators.

    That form is what lets a test with 95 % confidence be made of it (:class:`lowrank.calibration.evaluation.Measurement`).

    Attributes:
        figure: the key of its value in :func:`lowrank.compare_models`.
        needs_logits: it reads the last dimension as classes, so that outputs which do not call themselves logits are no use to it.
        every_output: it is measured on every floating tensor of the output, each by itself; else on the main one.
        centred: it needs the mean of the outputs: see :meth:`fitted`.
    """

    needs_data = True
    needs_logits: ClassVar[bool] = False
    every_output: ClassVar[bool] = False
    centred: ClassVar[bool] = False

    @property
    def figure(self) -> str:
        return self.name

    @property
    def probe(self) -> SampledMetric:
        return self

    @abstractmethod
    def terms(self, reference: Tensor, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Per sample what was lost and what it is relative to.

        Args:
            reference, output: of the original and of the other model, of one shape.
            batch: what both were called with; padding, by its mask, must count nowhere.

        Returns:
            numerators, denominators: (samples,) float64, on the CPU; of length 1 where ``batch.size`` is 1.
        """

    def fitted(self, centre: Centre, what: str = "the output") -> SampledMetric:
        """Give the metric for outputs whose mean this is; the metric itself where it needs none.

        Raises:
            UsageError: it needs one, and ``what`` has none, or does not vary about it.
        """
        return self

    def check(self, output: Tensor, batch: Batch) -> None:
        """Refuse an output, of the original, that this metric cannot read.

        Raises:
            UsageError: says what it needs and what it got.
        """

    def applies(self, output: Tensor, batch: Batch) -> bool:
        """Tell whether the output tells anything in this metric: asked where all metrics that fit are wanted."""
        try:
            self.check(output, batch)
        except UsageError:
            return False
        return True

    def level(self, output: Tensor, batch: Batch) -> float | None:
        """Sum what one model has by itself, in the unit of the numerators; ``None`` where only a difference is known."""
        return None

    def level_value(self, ratio: float) -> float:
        """Give the figure for one model at Σ :meth:`level` / Σ denominators."""
        return ratio
