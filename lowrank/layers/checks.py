"""Arguments that many layers take: what is allowed, and the words for it."""

from __future__ import annotations

import torch

from lowrank.errors import RankError, UsageError, is_whole

__all__ = [
    "ACTIVATIONS",
    "FLOAT_ACTIVATIONS",
    "INTEGER_ACTIVATIONS",
    "check_activations",
    "check_size",
    "dtype_from_name",
]

# How products are made where weights are codes: activations rounded to integers too, or left as they are (weight-only).
INTEGER_ACTIVATIONS = "int8"
FLOAT_ACTIVATIONS = "float"
ACTIVATIONS = (INTEGER_ACTIVATIONS, FLOAT_ACTIVATIONS)


def check_size(value: object, name: str, low: int = 1) -> int:
    """Return a size as an int.

    Raises:
        RankError: not an integer of at least ``low``.
    """
    if not is_whole(value, low):
        raise RankError(f"{name}: must be an integer of at least {low}, got {value!r}")
    return value


def check_activations(value: object) -> str:
    """Return the way of making products: ``"int8"`` or ``"float"``.

    Raises:
        UsageError: anything else.
    """
    if value not in ACTIVATIONS:
        raise UsageError(
            f'activations: must be "{INTEGER_ACTIVATIONS}" (integer products) or "{FLOAT_ACTIVATIONS}" (weight-only), got {value!r}'
        )
    return str(value)


def dtype_from_name(name: object) -> torch.dtype:
    """Find the dtype of a name: ``torch.float32`` for ``"float32"``.

    Raises:
        UsageError: not the name of a floating dtype.
    """
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UsageError(f'dtype: must name a floating dtype such as "float32", got {name!r}')
    return dtype
