"""Activations to int8 codes, token by token, on the fly; and floats as sums of int8 pieces for the weight-only
forward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank.kernels.integer import int_matmul

__all__ = ["pieces_for", "quantize_tokens", "split_tokens", "to_float", "wide_matmul"]

# Adding 1.5 · 2²³ leaves round-to-nearest-even(x) in the low bits of a float32's mantissa, so that its low byte is
# the int8 code. The bits are 0x4B400000 + code for |code| < 2²².
_MAGIC = 1.5 * 2.0**23
_MAGIC_BITS = 0x4B400000
# So that the power of two that scales a token stays finite (2^(22 + 99), 2^(54 + 959)).
_SMALLEST_EXACT = {torch.float32: 2.0**-100, torch.float64: 2.0**-960}
# The smallest normal float32: keeps the reciprocal of the step finite for tokens that are zero or denormal.
_TINY = 2.0**-126
# 254 steps and not 255: rounding both ends outwards must still fit the 256 codes.
_STEPS = 254.0
# As tensors: a Python number costs an operation as much again to be made into one, which shows at one token.
_MAGIC_TENSOR, _LOWEST = torch.tensor(_MAGIC, dtype=torch.float32), torch.tensor(-128.0, dtype=torch.float32)
_STEP = torch.tensor(1.0 / _STEPS, dtype=torch.float32)
_HALF_STEP = torch.tensor(2.0 / _STEPS, dtype=torch.float32)


def quantize_tokens(x: Tensor, symmetric: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round each token to int8: ``x ≈ (codes − offset) · scale``.

    Asymmetric: the range [min(x, 0), max(x, 0)] is cut into 254 steps and the offset is an integer, so that zero is
    exact. Symmetric: [−max|x|, max|x|] into 254 steps, no offset. A token with NaN or Inf gets a scale of NaN, which
    its outputs inherit. Steps are never below the smallest normal float32.

    Args:
        x: (M, K) float32.
        symmetric: whether to leave the offset out.

    Returns:
        codes (M, K) int8 in [−128, 127] (symmetric: [−127, 127]), scale (M, 1) float32, and offset (M, 1) float32, a
        whole number from −128 to 126, or ``None``.

    Example:
        >>> codes, scale, offset = quantize_tokens(torch.tensor([[0.0, 254.0]]))
        >>> codes.tolist(), scale.item(), offset.item()
        ([[-128, 126]], 1.0, -128.0)
    """
    if x.shape[1] == 0:
        ones = x.new_ones(x.shape[0], 1)
        return x.to(torch.int8), ones, None if symmetric else torch.zeros_like(ones)
    if symmetric:
        scale = _nan_for_inf(x.abs().amax(dim=1, keepdim=True).mul_(_HALF_STEP).clamp_min_(_TINY))
        return x.mul(scale.reciprocal()).add_(_MAGIC_TENSOR).view(torch.int32).to(torch.int8), scale, None
    high = x.amax(dim=1, keepdim=True).clamp_min_(0.0)
    low = x.amin(dim=1, keepdim=True).clamp_max_(0.0)
    # Divided before the subtraction, which could overflow.
    scale = _nan_for_inf(high.mul_(_STEP).sub_(low.mul(_STEP)).clamp_min_(_TINY))
    inverse = scale.reciprocal()
    offset = torch.sub(_LOWEST, low.mul_(inverse).round_())
    codes = x.mul(inverse).add_(offset.add(_MAGIC_TENSOR)).view(torch.int32).to(torch.int8)
    return codes, scale, offset


def _nan_for_inf(scale: Tensor) -> Tensor:
    """The codes of a token with Inf mean nothing, so its outputs are not to have a sign."""
    return scale.add_(scale - scale)


def to_float(codes: Tensor) -> Tensor:
    """Convert int32 sums to float32, in place where they are int32 already (a fresh tensor of that size costs more than the
    sums).
    """
    if codes.dtype != torch.int32 or not codes.is_contiguous():
        return codes.to(torch.float32)
    return codes.view(torch.float32).copy_(codes)


def pieces_for(dtype: torch.dtype) -> int:
    """Return the number of int8 pieces that hold a token to the precision of its dtype.

    Example:
        >>> pieces_for(torch.bfloat16), pieces_for(torch.float32), pieces_for(torch.float64)
        (2, 3, 7)
    """
    return {torch.float64: 7, torch.float32: 3}.get(dtype, 2)


def split_tokens(x: Tensor, pieces: int) -> tuple[Tensor, Tensor]:
    """Split each token into a fixed-point number of ``pieces`` int8 digits in base 256: ``x ≈ unit · Σ_p digits[p] ·
    256^(pieces−1−p)``.

    ``unit`` is a power of two, so the only error is the last digit's rounding: half a unit, ``2^(2−8·pieces) ·
    max|x|`` at most.

    Args:
        x: (M, K) float32 or float64.
        pieces: 1 or more.

    Returns:
        digits (pieces, M, K) int8 in [−128, 127], most significant first, and unit (M, 1) of x's dtype.

    Example:
        >>> digits, unit = split_tokens(torch.tensor([[1.0, -0.5]]), 2)
        >>> (unit * (digits[0] * 256.0 + digits[1])).tolist()
        [[1.0, -0.5]]
    """
    digits = torch.empty(pieces, *x.shape, dtype=torch.int8, device=x.device)
    if x.shape[1] == 0:
        return digits, x.new_ones(x.shape[0], 1)
    largest = x.abs().amax(dim=1, keepdim=True)
    bits = 8 * pieces - 2
    # |x| < 2^exponent becomes a whole number of at most 2^bits, whose first digit is at most 64. The floor keeps
    # 2^(bits − exponent) finite; what is smaller than it is rounded to the same unit.
    exponent = torch.frexp(largest.clamp_min(_SMALLEST_EXACT[x.dtype]))[1]
    whole = x * torch.exp2((bits - exponent).to(x.dtype))
    if bits <= 22:
        number = whole.add_(_MAGIC).view(torch.int32).sub_(_MAGIC_BITS)
    else:
        number = whole.round_().to(torch.int64)
    # Balanced digits: adding 128 to each lower byte carries, and flipping its top bit takes the 128 off again.
    middle = sum(128 << 8 * place for place in range(pieces - 1))
    number = number.add_(middle).bitwise_xor_(middle)
    for place in range(pieces):
        digits[pieces - 1 - place] = number >> (8 * place) if place else number
    # NaN and Inf become NaN: their digits mean nothing.
    unit = torch.exp2((exponent - bits).to(x.dtype)) + (largest - largest)
    return digits, unit


def wide_matmul(x: Tensor, codes: Tensor, pieces: int) -> tuple[Tensor, Tensor]:
    """Multiply ``x @ codesᵀ`` with the activations unrounded, by exact integer products of their int8 pieces.

    The error is the last digit's rounding and that of the recombination in x's dtype: norm-wise a few eps.

    Args:
        x: (M, K) float32 or float64.
        codes: (N, K) int8.
        pieces: see :func:`pieces_for`.

    Returns:
        sums (M, N) and unit (M, 1), both of x's dtype: the product is ``sums · unit``. The unit is a power of two
        that the caller applies last, so that tiny tokens keep their digits in between; it is NaN for tokens that hold
        NaN or Inf.

    Example:
        >>> sums, unit = wide_matmul(torch.tensor([[0.25, 1.5]]), torch.tensor([[4, 2]], dtype=torch.int8), 3)
        >>> (sums * unit).tolist()
        [[4.0]]
    """
    digits, unit = split_tokens(x, pieces)
    sums = int_matmul(digits.view(pieces * x.shape[0], x.shape[1]), codes).view(pieces, x.shape[0], codes.shape[0])
    parts = to_float(sums) if x.dtype == torch.float32 else sums.to(x.dtype)
    total = parts[0]
    for piece in range(1, pieces):
        total = parts[piece].add_(total, alpha=256.0)
    return total, unit
