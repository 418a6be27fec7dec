"""Errors that teach: each message names the layer, file or argument, the rule, the value given, and what to do.

Every class carries the exit code of the command line (see ``lowrank --help``):
2 usage, 3 bad input, 4 numerics or a budget that cannot be met, 5 reading or writing failed, 6 over a resource limit.
"""

from __future__ import annotations

from typing import Any, TypeGuard

__all__ = [
    "AdapterError",
    "BudgetError",
    "CalibrationError",
    "CheckpointError",
    "LowRankError",
    "NumericsError",
    "RankError",
    "ResourceError",
    "StorageError",
    "UsageError",
    "is_whole",
]


def is_whole(value: object, low: int | None = None, high: int | None = None) -> TypeGuard[int]:
    """Tell whether a value is a whole number: an ``int`` that is not a ``bool``, in the range.

    Args:
        value: anything; a float is not whole, not even 2.0, and neither is an integer of numpy.
        low: the smallest value allowed; ``None`` for no limit.
        high: the largest value allowed; ``None`` for no limit.

    Example:
        >>> is_whole(8, 2, 8), is_whole(9, 2, 8), is_whole(True), is_whole(2.0)
        (True, False, False, False)
    """
    if isinstance(value, bool) or not isinstance(value, int):
        return False
    return (low is None or value >= low) and (high is None or value <= high)


class LowRankError(Exception):
    """Base of everything this package raises on purpose."""

    exit_code: int = 3


class UsageError(LowRankError, ValueError):
    """An argument is not what the function takes: a pattern that matches nothing, a budget outside its range."""

    exit_code = 2


class RankError(LowRankError, ValueError):
    """A rank (or number of bits) that the shape of the layer does not allow."""


class AdapterError(LowRankError, ValueError):
    """A LoRA adapter's configuration is out of range, or the adapter does not fit its model."""


class CalibrationError(LowRankError):
    """Calibration or validation data that cannot be used."""


class CheckpointError(LowRankError):
    """A file or directory that is damaged, unsafe or not what it says it is."""


class StorageError(CheckpointError):
    """Reading or writing failed, or cannot succeed."""

    exit_code = 5


class ResourceError(LowRankError):
    """Going on would take more memory, disk or time than allowed."""

    exit_code = 6


class NumericsError(LowRankError):
    """NaN, Inf, or a decomposition that does not converge."""

    exit_code = 4


class BudgetError(NumericsError):
    """The budget cannot be met.

    Attributes:
        plan: the best :class:`lowrank.Plan` found, or ``None`` where no plan could be made.
        error: the error that plan reaches (the upper bound on the verification samples where there is one).
    """

    def __init__(self, message: str, *, plan: Any = None, error: float | None = None) -> None:
        super().__init__(message)
        self.plan = plan
        self.error = error
