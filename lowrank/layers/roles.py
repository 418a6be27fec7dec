"""What the stored tensors of a layer are."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CODES", "FLOAT", "SCALE", "ZERO_POINT", "Role"]

CODES, SCALE, ZERO_POINT, FLOAT = "codes", "scale", "zero_point", "float"


@dataclass(frozen=True)
class Role:
    """What one stored tensor of a layer is.

    Attributes:
        kind: ``"codes"`` (integers), ``"scale"`` (float32 whatever the model's dtype, positive), ``"zero_point"``, or ``"float"``.
        bits: that a code uses; ``None`` for anything else.
        packed: whether several codes share a byte.
    """

    kind: str
    bits: int | None = None
    packed: bool = False
