"""The metrics that have a name: what options, commands, frontiers and reports offer and read."""

from __future__ import annotations

from lowrank.calibration.metrics.base import ErrorMetric, SampledMetric
from lowrank.calibration.metrics.callable import RelativeLoss
from lowrank.errors import UsageError

__all__ = ["METRICS", "metric_named", "recorded_metric", "register_metric", "sampled_metric", "sampled_metrics"]

METRICS: dict[str, ErrorMetric] = {}
"""By name, in the order in which messages list them."""


def register_metric(metric: ErrorMetric) -> None:
    """Make a metric known by its name.

    Raises:
        UsageError: the name is taken.

    Example:
        >>> register_metric(METRICS["output"])
        Traceback (most recent call last):
        lowrank.errors.UsageError: metric 'output': the name is taken by <OutputMetric 'output'>; choose another
    """
    if metric.name in METRICS:
        raise UsageError(f"metric {metric.name!r}: the name is taken by {METRICS[metric.name]!r}; choose another")
    METRICS[metric.name] = metric


def metric_named(name: str) -> ErrorMetric:
    """Find a registered metric.

    Raises:
        UsageError: there is none of that name; lists those that are.

    Example:
        >>> metric_named("kl").title
        'KL divergence'
    """
    if name not in METRICS:
        raise UsageError(f"metric: must be one of {', '.join(METRICS)}, got {name!r}")
    return METRICS[name]


def sampled_metrics() -> dict[str, SampledMetric]:
    """List those that are measured on samples, by name.

    Example:
        >>> list(sampled_metrics())
        ['output', 'kl', 'perplexity', 'variation']
    """
    return {name: metric for name, metric in METRICS.items() if isinstance(metric, SampledMetric)}


def sampled_metric(metric: SampledMetric | str) -> SampledMetric:
    """Give the metric, or the one of that name, where it is measured on samples.

    Raises:
        UsageError: it is not.

    Example:
        >>> sampled_metric("output").relative
        True
    """
    if isinstance(metric, SampledMetric):
        return metric
    known = sampled_metrics()
    if metric not in known:
        raise UsageError(f"metric: must be one of {', '.join(known)} here, got {metric!r}")
    return known[metric]


def recorded_metric(label: str) -> ErrorMetric:
    """Give the metric that a report names; a name that is not registered is that of a callable.

    Example:
        >>> recorded_metric("weight").title, recorded_metric("accuracy").title
        ('weight error', 'relative loss of accuracy')
    """
    return METRICS[label] if label in METRICS else RelativeLoss(label)
