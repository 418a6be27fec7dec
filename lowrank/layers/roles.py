"""What the stored tensors of a layer are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CODES", "FLOAT", "SCALE", "ZERO_POINT", "Role", "ScaleForm", "damaged_scales"]

CODES, SCALE, ZERO_POINT, FLOAT = "codes", "scale", "zero_point", "float"


@dataclass(frozen=True)
class Role:
    """What one stored tensor of a layer is.

    Attributes:
        kind: ``"codes"`` (integers), ``"scale"`` (its dtype is its own, whatever the model's), ``"zero_point"``, or ``"float"``.
        bits: that a code uses; ``None`` for anything else.
        packed: whether several codes share a byte.
        signed: whether a scale may be negative; zero it never is.
    """

    kind: str
    bits: int | None = None
    packed: bool = False
    signed: bool = False


@dataclass(frozen=True)
class ScaleForm:
    """Say what a scale of a layer looks like.

    Attributes:
        shape: of the tensor.
        dtype: float32, or float16 for scales of groups.
        signed: whether it may be negative.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    signed: bool = False


def damaged_scales(scale: Tensor, *, signed: bool) -> tuple[Tensor, str]:
    """Tell which numbers of a scale cannot be, and the rule that they break.

    Example:
        >>> damaged_scales(torch.tensor([1.0, -1.0]), signed=False)
        (tensor([False,  True]), 'every scale must be positive and finite')
    """
    sound = torch.isfinite(scale) & ((scale != 0) if signed else (scale > 0))
    return ~sound, "no scale may be zero, NaN or infinite" if signed else "every scale must be positive and finite"
