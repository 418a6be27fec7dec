"""Error metrics: each in a file of its own, and registered here."""

from __future__ import annotations

from lowrank.calibration.metrics.base import NATS, PERCENT, ErrorMetric, SampledMetric, Unit
from lowrank.calibration.metrics.callable import CallableMetric, RelativeLoss
from lowrank.calibration.metrics.kl import KL, KLMetric
from lowrank.calibration.metrics.output import OUTPUT, OutputMetric
from lowrank.calibration.metrics.perplexity import PERPLEXITY, PerplexityMetric
from lowrank.calibration.metrics.registry import (
    METRICS,
    metric_named,
    recorded_metric,
    register_metric,
    sampled_metric,
    sampled_metrics,
)
from lowrank.calibration.metrics.variation import VARIATION, VariationMetric
from lowrank.calibration.metrics.weight import WEIGHT, WeightMetric

__all__ = [
    # What a metric is, and which there are
    "ErrorMetric",
    "SampledMetric",
    "Unit",
    "NATS",
    "PERCENT",
    "METRICS",
    "metric_named",
    "recorded_metric",
    "register_metric",
    "sampled_metric",
    "sampled_metrics",
    # One file each
    "OUTPUT",
    "OutputMetric",
    "VARIATION",
    "VariationMetric",
    "WEIGHT",
    "WeightMetric",
    "KL",
    "KLMetric",
    "PERPLEXITY",
    "PerplexityMetric",
    "CallableMetric",
    "RelativeLoss",
]

for _metric in (OUTPUT, WEIGHT, KL, PERPLEXITY, VARIATION):
    register_metric(_metric)
