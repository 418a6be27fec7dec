"""The arguments of ``compress_model``, checked before any work."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lowrank.calibration.batches import ForwardFn
from lowrank.calibration.metrics import METRICS, OUTPUT, WEIGHT, CallableMetric, ErrorMetric
from lowrank.compression.formats import FORMATS, check_format, compressing_formats
from lowrank.errors import UsageError, is_whole
from lowrank.io.numbers import number_of
from lowrank.layers.base import ACTIVATIONS
from lowrank.targets import target_names
from lowrank.training.options import HealOptions

__all__ = [
    "MOST_SEED",
    "Metric",
    "Options",
    "budget_of",
    "check_budgets",
    "default_metric",
    "metric_choices",
    "metric_of",
]

Metric = str | Callable[[nn.Module], float]
AUTO = "auto"
# What a generator of torch takes.
MOST_SEED = 2**63 - 1


def metric_choices() -> tuple[str, ...]:
    """Give the names that ``metric`` takes: "auto", those that need no data, the others.

    Example:
        >>> metric_choices()
        ('auto', 'weight', 'output', 'kl', 'perplexity', 'variation')
    """
    return (AUTO, *sorted(METRICS, key=lambda name: METRICS[name].needs_data))


def default_metric(*, calibrated: bool) -> str:
    """Say what "auto" stands for.

    Example:
        >>> default_metric(calibrated=True), default_metric(calibrated=False)
        ('output', 'weight')
    """
    return OUTPUT.name if calibrated else WEIGHT.name


def metric_of(metric: Metric, *, calibrated: bool, higher_is_better: bool = False) -> ErrorMetric:
    """Give the metric that a name, "auto" or a callable stands for.

    Raises:
        UsageError: it is none of these.

    Example:
        >>> metric_of("auto", calibrated=False).title
        'weight error'
    """
    if isinstance(metric, str):
        if metric not in metric_choices():
            raise UsageError(
                f"metric: must be one of {', '.join(metric_choices())} or a callable(model) -> float, got {metric!r}"
            )
        return METRICS[default_metric(calibrated=calibrated) if metric == AUTO else metric]
    if not callable(metric):
        raise UsageError(f"metric: must be a name or a callable(model) -> float, got {metric!r}")
    return CallableMetric(metric, higher_is_better=higher_is_better)


def budget_of(value: Any, name: str) -> float | None:
    """Read a budget: a number, or a text such as "5%" or "0.05" as the command line takes it.

    Raises:
        UsageError: a text that is no number.

    Example:
        >>> budget_of("5%", "error_budget"), budget_of(0.1, "error_budget"), budget_of(None, "size_budget")
        (0.05, 0.1, None)
    """
    if not isinstance(value, str):
        return value  # type: ignore[no-any-return]
    try:
        return number_of(value)
    except ValueError:
        raise UsageError(f'{name}: must be a positive number such as 0.05 or "5%", got {value!r}') from None


def check_budgets(error_budget: float | None, size_budget: float | None, metric: Metric = "auto") -> None:
    """Refuse budgets that mean nothing.

    Raises:
        UsageError: none given, not a positive number, or over 1 where that is no budget.

    Example:
        >>> check_budgets(0.05, None)
    """
    if error_budget is None and size_budget is None:
        raise UsageError("error_budget or size_budget: give one, or both; error_budget=0.05 allows an error of 5 %")
    for name, value in (("error_budget", error_budget), ("size_budget", size_budget)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0.0:
            raise UsageError(f"{name}: must be a positive number, got {value!r}")
    if error_budget is not None and error_budget > 1.0 and metric_of(metric, calibrated=True).relative:
        raise UsageError(
            f"error_budget: must be at most 1 for a relative error, got {error_budget!r}; 5 % is written 0.05"
        )
    if size_budget is not None and size_budget > 1.0:
        raise UsageError(
            f"size_budget: must be at most 1 (stored bytes after / before), got {size_budget!r}; 30 % is written 0.3"
        )


@dataclass(frozen=True)
class Options:
    """Everything but the model and the data; see :func:`lowrank.compress_model`.

    Attributes:
        directions: of the gradients that factors are fitted to (:func:`lowrank.calibration.gradients.output_gradients`), ``None`` for none;
            :meth:`checked` finds them by ``loss_aware`` and the metric.
    """

    error_budget: float | None = None
    size_budget: float | None = None
    metric: Metric = "auto"
    higher_is_better: bool = False
    formats: Sequence[str] | str = compressing_formats()
    targets: Sequence[str] = target_names()
    ignore: Sequence[str] = ()
    overrides: Mapping[str, Any] | None = None
    objective: str = "size"
    loss_aware: bool | str = "auto"
    heal: bool | Mapping[str, Any] = False
    strict: bool = False
    activations: str = "auto"
    output_fn: Callable[[Any], Tensor] | None = None
    forward_fn: ForwardFn | None = None
    seed: int = 0
    progress: bool = True
    on_nonfinite: str = "raise"
    fold_batchnorm: bool = False
    directions: str | None = None
    smallest: bool = False

    def checked(self, *, calibrated: bool, planned: bool = False) -> Options:
        """Check every argument and resolve "auto" and "all".

        Args:
            calibrated: whether calibration data was given.
            planned: a plan is given, so that no budget is needed.

        Raises:
            UsageError: an argument outside its range.
            NotImplementedError: a format that a later version brings.

        Example:
            >>> Options(error_budget=0.1).checked(calibrated=True).metric
            'output'
        """
        if not planned or self.error_budget is not None or self.size_budget is not None:
            check_budgets(self.error_budget, self.size_budget, self.metric)
        measured = metric_of(self.metric, calibrated=calibrated)
        metric = measured.name if self.metric == AUTO else self.metric
        if measured.needs_data and not calibrated:
            raise UsageError(
                f"metric {metric!r}: needs calibration batches; without any only metric='weight' can be promised"
            )
        self._check_choices()
        if self.objective == "latency" and not planned and not (calibrated and self.error_budget is not None):
            missing = "calibration batches, whose token counts it plans for" if not calibrated else "an error_budget"
            raise UsageError(f'objective="latency": needs {missing}')
        for name, value, allowed in (
            ("activations", self.activations, (AUTO, *ACTIVATIONS)),
            ("on_nonfinite", self.on_nonfinite, ("raise", "copy")),
        ):
            if value not in allowed:
                raise UsageError(f"{name}: must be one of {', '.join(allowed)}, got {value!r}")
        for name, function in (("output_fn", self.output_fn), ("forward_fn", self.forward_fn)):
            if function is not None and not callable(function):
                raise UsageError(f"{name}: must be a function, got {function!r}")
        for name, flag in (("fold_batchnorm", self.fold_batchnorm), ("smallest", self.smallest)):
            if not isinstance(flag, bool):
                raise UsageError(f"{name}: must be True or False, got {flag!r}")
        if not is_whole(self.seed, 0, MOST_SEED):
            raise UsageError(f"seed: must be an integer from 0, got {self.seed!r}")
        resolved = {"metric": metric, "formats": self._formats(), "directions": self._directions(measured)}
        return Options(**{**vars(self), **resolved})

    @property
    def output_fn_name(self) -> str | None:
        """What ``output_fn`` is called, for files; ``None`` where there is none."""
        function = self.output_fn
        return None if function is None else str(getattr(function, "__qualname__", type(function).__qualname__))

    @property
    def error_metric(self) -> ErrorMetric:
        """The metric itself; of "auto" that of calibrated models, until :meth:`checked` has resolved it."""
        return metric_of(self.metric, calibrated=True, higher_is_better=self.higher_is_better)

    def contribution(self, value: float | None) -> float:
        """Give a value of the metric in the unit in which layers' contributions add up, its ratio; inf for None.

        Example:
            >>> Options(metric="output").contribution(0.5)
            0.25
        """
        return math.inf if value is None else self.error_metric.ratio(value)

    def value(self, contribution: float) -> float:
        """Undo :meth:`contribution`."""
        return self.error_metric.value(contribution)

    def _formats(self) -> tuple[str, ...]:
        if self.formats == "all":
            return compressing_formats()
        if isinstance(self.formats, str) or not self.formats:
            raise UsageError(f'formats: must be a list out of {", ".join(FORMATS)}, or "all", got {self.formats!r}')
        for name in self.formats:
            check_format(name, "formats")
        return tuple(name for name in compressing_formats() if name in self.formats)

    def _check_choices(self) -> None:
        if self.objective not in ("size", "latency"):
            raise UsageError(f'objective: must be "size" or "latency", got {self.objective!r}')
        if self.loss_aware not in ("auto", True, False):
            raise UsageError(f'loss_aware: must be "auto", True or False, got {self.loss_aware!r}')
        if not isinstance(self.heal, (bool, Mapping)):
            raise UsageError(f"heal: must be True, False or a dict of lowrank.heal's arguments, got {self.heal!r}")
        HealOptions.of(self.heal)

    def _directions(self, metric: ErrorMetric) -> str | None:
        """What is back-propagated for factors that cost the metric least; ``None`` where they are not wanted or not known."""
        measured = not metric.weights_only
        for name, wanted in (("loss_aware=True", self.loss_aware is True), ("heal", bool(self.heal))):
            if wanted and not measured:
                raise UsageError(
                    f"{name}: needs calibration batches and a metric that the model's outputs decide, not metric='weight'"
                )
        if not measured or self.loss_aware is False:
            return None
        return metric.gradients
