"""The relative loss of a figure of the caller's own: an accuracy, a word error rate."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn

from lowrank.calibration.batches import evaluating
from lowrank.calibration.metrics.base import ErrorMetric, SampledMetric
from lowrank.calibration.metrics.output import OUTPUT
from lowrank.errors import UsageError

__all__ = ["CallableMetric", "RelativeLoss"]


class RelativeLoss(ErrorMetric):
    """What is known of a callable's metric by the name that a report gives it.

    Args:
        label: the name of the callable.

    Example:
        >>> RelativeLoss("accuracy").title, RelativeLoss("accuracy").show(0.02)
        ('relative loss of accuracy', '2.0 %')
    """

    name = "callable"

    def __init__(self, label: str) -> None:
        self._label = label
        self.title = f"relative loss of {label}"

    @property
    def label(self) -> str:
        return self._label

    @property
    def probe(self) -> SampledMetric:
        return OUTPUT


class CallableMetric(RelativeLoss):
    """How much worse a figure is for the compressed model: (f(model) − f(original)) / \\|f(original)\\|, 0 where it is better.

    Args:
        function: model to a number.
        higher_is_better: of that number.

    Example:
        >>> gains = CallableMetric(lambda model: float(model.weight[0, 0]), higher_is_better=True)
        >>> one, other = nn.Linear(1, 1), nn.Linear(1, 1)
        >>> _ = nn.init.constant_(one.weight, 4.0), nn.init.constant_(other.weight, 3.0)
        >>> gains.loss_against(one)(other)
        0.25
    """

    def __init__(self, function: Callable[[nn.Module], float], *, higher_is_better: bool = False) -> None:
        super().__init__(str(getattr(function, "__name__", "callable")))
        self.function = function
        self.higher_is_better = higher_is_better

    def loss_against(self, original: nn.Module) -> Callable[[nn.Module], float]:
        """Give the loss of any model relative to this one; inf where the figure is not finite.

        Raises:
            UsageError: the original's own figure is 0 or not finite.
        """
        reference = self._value_of(original)
        if not math.isfinite(reference) or reference == 0.0:
            raise UsageError(
                f"metric: the callable gives {reference!r} for the original model; a relative loss needs a finite value other than 0"
            )
        sign = -1.0 if self.higher_is_better else 1.0

        def loss(model: nn.Module) -> float:
            value = self._value_of(model)
            return max(sign * (value - reference) / abs(reference), 0.0) if math.isfinite(value) else math.inf

        return loss

    def _value_of(self, model: nn.Module) -> float:
        with evaluating(model):
            return float(self.function(model))
