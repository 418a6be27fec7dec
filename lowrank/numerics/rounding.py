"""Floats to integer codes with one float32 scale a row, and back."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowrank.errors import NumericsError, RankError, is_whole

__all__ = [
    "LEAST_BITS",
    "MOST_BITS",
    "check_bits",
    "dequantize_rows",
    "largest_code",
    "quantize_rows",
    "require_finite",
    "rounding_bound",
]

# Of a code: with one bit there would be no codes but 0, and a byte holds eight.
LEAST_BITS, MOST_BITS = 2, 8
# The smallest normal float32. A smaller scale would lose digits, and its reciprocal would overflow.
SMALLEST_SCALE = 2.0**-126
# The scale's own rounding to float32 can move the outermost code by 127 · eps / 2 steps beyond half a step.
_SLACK = 1.0 + 128.0 * torch.finfo(torch.float32).eps


def check_bits(bits: object, name: str = "bits") -> int:
    """Return the number of bits as an int.

    Raises:
        RankError: not an integer from 2 to 8.

    Example:
        >>> check_bits(4)
        4
    """
    if not is_whole(bits):
        raise RankError(f"{name}: must be an integer from {LEAST_BITS} to {MOST_BITS}, got {bits!r}")
    if not is_whole(bits, LEAST_BITS, MOST_BITS):
        raise RankError(f"{name}: must be from {LEAST_BITS} to {MOST_BITS}, got {bits}")
    return bits


def largest_code(bits: int) -> int:
    """Return ``2**(bits - 1) - 1``: codes are symmetric, so the most negative integer is never used.

    Example:
        >>> largest_code(8), largest_code(2)
        (127, 1)
    """
    return (1 << (check_bits(bits) - 1)) - 1


def quantize_rows(weight: Tensor, bits: int = 8, *, name: str = "weight") -> tuple[Tensor, Tensor]:
    """Round each row to symmetric integers: ``weight[i] ≈ codes[i] · scale[i]``.

    ``scale[i] = max|weight[i]| / (2**(bits-1) - 1)``, but never below the smallest normal float32; a row of zeros has
    scale 1.

    Args:
        weight: (rows, columns), any floating dtype; computed in float64.
        bits: 2 to 8.
        name: for messages.

    Returns:
        codes (rows, columns) int8 and scale (rows,) float32.

    Raises:
        RankError: bits outside 2 to 8, or not a matrix.
        NumericsError: NaN or Inf in the weight (the index is named), or a row too large for a float32 scale.

    Example:
        >>> codes, scale = quantize_rows(torch.tensor([[127.0, -1.0], [0.0, 0.0]]))
        >>> codes.tolist(), scale.tolist()
        ([[127, -1], [0, 0]], [1.0, 1.0])
    """
    limit = largest_code(bits)
    if weight.ndim != 2:
        raise RankError(f"{name}: must be a matrix, got shape {tuple(weight.shape)}")
    matrix = require_finite(weight.detach(), name).to(torch.float64)
    largest = matrix.abs().amax(dim=1) if matrix.shape[1] else matrix.new_zeros(matrix.shape[0])
    # Rounded to float32 before use, so that codes fit the scale that is stored.
    scale = (largest / limit).clamp_min(SMALLEST_SCALE).to(torch.float32)
    if not bool(torch.isfinite(scale).all()):
        row = int(torch.nonzero(~torch.isfinite(scale))[0])
        raise NumericsError(f"{name}: row {row} is too large for a float32 scale; rescale the layer or leave it dense")
    scale = torch.where(largest > 0, scale, torch.ones_like(scale))
    codes = torch.round(matrix / scale.to(torch.float64)[:, None]).clamp_(-limit, limit).to(torch.int8)
    return codes, scale


def dequantize_rows(codes: Tensor, scale: Tensor) -> Tensor:
    """Return ``codes[i] · scale[i]`` as float32.

    Args:
        codes: (rows, columns) int8.
        scale: (rows,) float32.

    Example:
        >>> dequantize_rows(torch.tensor([[2, -4]], dtype=torch.int8), torch.tensor([0.5])).tolist()
        [[1.0, -2.0]]
    """
    return codes.to(torch.float32) * scale[:, None]


def rounding_bound(scale: Tensor, columns: int) -> float:
    """Bound the Frobenius error that :func:`quantize_rows` can make: half a step in every entry, ``½ √(columns · Σ
    scale²)``.

    Args:
        scale: (rows,) float32, with rows of zeros left out by the caller where tightness matters.
        columns: entries in a row.

    Example:
        >>> round(rounding_bound(torch.tensor([3.0, 4.0]), 4), 3)
        5.0
    """
    return 0.5 * math.sqrt(columns * float(scale.to(torch.float64).square().sum())) * _SLACK


def require_finite(tensor: Tensor, name: str) -> Tensor:
    """Return the tensor itself, if it is finite.

    Raises:
        NumericsError: it holds NaN or Inf; the index of the first is named.
    """
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        index = tuple(int(i) for i in torch.nonzero(~finite)[0])
        raise NumericsError(
            f"{name}: {float(tensor[index])} at index {list(index)}; repair the weight or leave the layer as it is"
        )
    return tensor
