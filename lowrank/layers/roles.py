"""What the stored tensors of a layer are."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["CODES", "FLOAT", "SCALE", "ZERO_POINT", "Role", "ScaleForm"]

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
