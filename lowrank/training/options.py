"""What a training run is asked to do, checked before anything is computed, and the learning rate over its steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from lowrank.errors import UsageError, is_whole

__all__ = ["SCHEDULES", "HealOptions", "TrainingOptions", "learning_rate_factor"]

SCHEDULES = ("cosine", "linear", "constant")
METRICS = ("loss", "accuracy", "perplexity")
PRECISIONS = (None, "bf16", "fp16")
Metric = str | Callable[[nn.Module], float]


@dataclass(frozen=True)
class TrainingOptions:
    """Everything that decides the numbers of a run; see :func:`lowrank.finetune` for each.

    Raises:
        UsageError: an option out of its range, or ``epochs`` and ``steps`` both given or both missing.

    Example:
        >>> TrainingOptions(steps=10).warmup_steps(10), TrainingOptions(steps=10, warmup=0.2).warmup_steps(10)
        (0, 2)
    """

    epochs: int | None = None
    steps: int | None = None
    lr: float = 1e-4
    weight_decay: float = 0.01
    warmup: int | float = 0
    schedule: str = "cosine"
    max_grad_norm: float | None = 1.0
    gradient_accumulation: int = 1
    mixed_precision: str | None = None
    lora_plus_ratio: float | None = None
    gradient_checkpointing: bool = False
    patience: int | None = None
    evaluate_every: int | None = None
    metric: Metric = "loss"
    higher_is_better: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            given = "neither" if self.epochs is None else "both"
            raise UsageError(f"epochs, steps: give exactly one of them, got {given}; epochs=3, say")
        for name in ("epochs", "steps", "gradient_accumulation", "patience", "evaluate_every"):
            _whole(getattr(self, name), name, low=1)
        _whole(self.seed, "seed", low=0)
        _real(self.lr, "lr", positive=True)
        _real(self.weight_decay, "weight_decay", positive=False)
        for name in ("max_grad_norm", "lora_plus_ratio"):
            if getattr(self, name) is not None:
                _real(getattr(self, name), name, positive=True)
        _one_of(self.schedule, "schedule", SCHEDULES)
        _one_of(self.mixed_precision, "mixed_precision", PRECISIONS)
        if not callable(self.metric):
            _one_of(self.metric, "metric", (*METRICS, "callable(model) -> float"))
        if isinstance(self.warmup, float) and not 0.0 <= self.warmup < 1.0:
            raise UsageError(f"warmup: a fraction of the steps is in [0, 1), got {self.warmup}; whole steps are an int")
        if not isinstance(self.warmup, float):
            _whole(self.warmup, "warmup", low=0)

    @property
    def maximise(self) -> bool:
        """Whether a larger value of the metric is the better one."""
        return self.metric == "accuracy" or (callable(self.metric) and self.higher_is_better)

    @property
    def metric_name(self) -> str:
        """For the history."""
        return getattr(self.metric, "__name__", "metric") if callable(self.metric) else self.metric

    def total_steps(self, per_epoch: int) -> int:
        """Count the steps of the run, given those of an epoch."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return self.epochs * per_epoch

    def warmup_steps(self, total: int) -> int:
        """Count the steps over which the learning rate rises."""
        return math.ceil(self.warmup * total) if isinstance(self.warmup, float) else self.warmup

    def to_json(self) -> dict[str, Any]:
        """Give as plain data what two runs must have in common for one to go on where the other stopped."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)} | {"metric": self.metric_name}


@dataclass(frozen=True)
class HealOptions:
    """What decides how a model is healed; see :func:`lowrank.heal` for each.

    Raises:
        UsageError: an option out of its range, or ``epochs`` and ``steps`` both given.

    Example:
        >>> HealOptions().total_steps(samples=1000), HealOptions(epochs=3).total_steps(samples=1000)
        (400, 96)
    """

    steps: int | None = None
    epochs: int | None = None
    lr: float = 4e-4
    what: str = "auto"
    hidden_weight: float = 1.0
    batch_size: int = 32
    vary: bool = False
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise UsageError(f"epochs, steps: give at most one of them, got {self.epochs} and {self.steps}")
        for name in ("steps", "epochs", "batch_size"):
            _whole(getattr(self, name), name, low=1)
        for name in ("lr", "max_grad_norm", "hidden_weight"):
            _real(getattr(self, name), name, positive=name != "hidden_weight")
        if not isinstance(self.vary, bool):
            raise UsageError(f"vary: must be True or False, got {self.vary!r}")

    @classmethod
    def of(cls, given: bool | Mapping[str, Any]) -> HealOptions:
        """Read ``True`` or a dict of arguments.

        Raises:
            UsageError: an argument that there is not.
        """
        arguments = {} if isinstance(given, bool) else dict(given)
        known = [entry.name for entry in fields(cls)]
        unknown = sorted(set(map(str, arguments)) - set(known))
        if unknown:
            raise UsageError(f"heal: unknown argument {', '.join(unknown)}; it takes {', '.join(known)}")
        return cls(**arguments)

    def total_steps(self, samples: int) -> int:
        """Count the steps: as asked for; by default 20 epochs, but 100 to 400 steps."""
        per_epoch = max(math.ceil(samples / self.batch_size), 1)
        if self.steps is not None:
            return self.steps
        return self.epochs * per_epoch if self.epochs is not None else min(max(20 * per_epoch, 100), 400)


def learning_rate_factor(step: int, total: int, warmup: int, schedule: str) -> float:
    """Compute what the learning rate of a step (counted from 0) is multiplied by.

    Linear from 1 / warmup to 1 over the warm-up; then ``(1 + cos πx) / 2``, ``1 − x`` or 1, x the share of what is left.

    Example:
        >>> [round(learning_rate_factor(step, 6, 2, "linear"), 2) for step in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / max(total - warmup, 1)
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * share))
    return 1.0 - share if schedule == "linear" else 1.0


def check_seed(seed: object) -> None:
    """Refuse what seeds nothing."""
    _whole(seed, "seed", low=0)


def _whole(value: object, name: str, low: int) -> None:
    if value is not None and not is_whole(value, low):
        raise UsageError(f"{name}: must be an integer of at least {low}, got {value!r}")


def _real(value: object, name: str, *, positive: bool) -> None:
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        raise UsageError(f"{name}: must be a finite number {'above 0' if positive else 'of at least 0'}, got {value!r}")


def _one_of(value: object, name: str, legal: tuple[object, ...]) -> None:
    if value not in legal:
        raise UsageError(f"{name}: must be one of {', '.join(map(str, legal))}, got {value!r}")
