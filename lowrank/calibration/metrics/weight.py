"""The relative error of the weights, which needs no data."""

from __future__ import annotations

from lowrank.calibration.metrics.base import ErrorMetric, SampledMetric
from lowrank.calibration.metrics.output import OUTPUT

__all__ = ["WEIGHT", "WeightMetric"]


class WeightMetric(ErrorMetric):
    """√(Σ‖ΔW‖² / Σ‖W‖²) over the layers that are compressed; computed exactly, so nothing is probed and nothing bounded.

    Example:
        >>> WEIGHT.show(WEIGHT.value(1e-4)), WEIGHT.needs_data
        ('1.0 %', False)
    """

    name = "weight"
    title = "weight error"
    weights_only = True
    relative = True
    usual = (0.005, 0.5)
    gradients = None

    @property
    def probe(self) -> SampledMetric:
        return OUTPUT


WEIGHT = WeightMetric()
