"""Two factors as numbers: balanced for floats, rounded to codes with one scale a component."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank.errors import NumericsError
from lowrank.numerics.factors import Factors
from lowrank.numerics.linalg import safe_svd
from lowrank.numerics.rounding import SMALLEST_SCALE, largest_code, require_finite

__all__ = ["RoundedFactors", "balanced", "dense_product", "round_factors", "rounded_in_best_basis"]


def balanced(factors: Factors, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Left and right of one dtype, each rank component with equal norms on both sides.

    One side would otherwise carry the whole scale, and half precision has little range.

    Example:
        >>> left, right = balanced(Factors(torch.ones(1, 1).double(), torch.full((1, 1), 4.0).double()), torch.float32)
        >>> left.item(), right.item()
        (2.0, 2.0)
    """
    left_norm = torch.linalg.vector_norm(factors.left, dim=0)
    right_norm = torch.linalg.vector_norm(factors.right, dim=1)
    ratio = torch.sqrt(right_norm / left_norm)
    ratio = torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, torch.ones_like(ratio))
    return (factors.left * ratio).to(dtype), (factors.right / ratio[:, None]).to(dtype)


class RoundedFactors(NamedTuple):
    """Codes and scale of two factors, and a bound of ‖left @ right − their product‖_F."""

    left_codes: Tensor
    right_codes: Tensor
    scale: Tensor
    bound: float


def round_factors(left: Tensor, right: Tensor, bits: int = 8) -> RoundedFactors:
    """Round both factors, every rank component to the full range of the codes, with one scale for the pair.

    ``scale[j] = max|left[:, j]| · max|right[j, :]| / q²``, q the largest code. The bound holds each rounding error to
    half a step: with e = ½ step, ‖ΔL R‖²_F = Σ_i ΔL_i G ΔL_iᵀ ≤ m · eᵀ|G|e, G = R Rᵀ, and likewise ‖L̂ ΔR‖_F with
    L̂ᵀL̂.

    Args:
        left: (out, r).
        right: (r, in).
        bits: 2 to 8.

    Raises:
        RankError: bits out of range.
        NumericsError: NaN, Inf, or a component too large for a float32 scale.

    Example:
        >>> rounded = round_factors(torch.tensor([[1.0], [-0.5]]), torch.tensor([[127.0, 0.0]]))
        >>> rounded.left_codes.tolist(), rounded.right_codes.tolist(), rounded.scale.tolist()
        ([[127], [-64]], [[127, 0]], [0.007874015718698502])
    """
    limit = largest_code(bits)
    left = require_finite(left.detach(), "left").double()
    right = require_finite(right.detach(), "right").double()
    left_step = left.abs().amax(dim=0) / limit
    right_step = right.abs().amax(dim=1) / limit
    used = (left_step > 0) & (right_step > 0)
    # A component with a zero side is zero: codes 0, scale 1.
    left_step = torch.where(used, left_step, torch.ones_like(left_step))
    right_step = torch.where(used, right_step, torch.ones_like(right_step))
    wanted = left_step * right_step
    scale = wanted.clamp_min(SMALLEST_SCALE).to(torch.float32)
    if not bool(torch.isfinite(scale).all()):
        raise NumericsError(
            "left, right: a rank component is too large for a float32 scale; rescale the layer or leave it dense"
        )
    # What rounding to float32 (or the smallest scale) changed goes into one side, so that the product keeps its size.
    right_step = right_step * (scale.double() / wanted)
    left_codes = (left / left_step).round_().clamp_(-limit, limit).mul_(used)
    right_codes = (right / right_step[:, None]).round_().clamp_(-limit, limit).mul_(used[:, None])
    # An entry that rounding the scale pushed past the largest code is clamped: at most 128 eps of a step more.
    slack = 1.0 + 256.0 * torch.finfo(torch.float32).eps
    half_left, half_right = 0.5 * left_step * used, 0.5 * slack * right_step * used
    rounded_left = left_codes * left_step
    bound = math.sqrt(left.shape[0] * float(half_left @ (right @ right.T).abs() @ half_left))
    bound += math.sqrt(right.shape[1] * float(half_right @ (rounded_left.T @ rounded_left).abs() @ half_right))
    return RoundedFactors(left_codes.to(torch.int8), right_codes.to(torch.int8), scale, bound)


def dense_product(left_codes: Tensor, right_codes: Tensor, scale: Tensor) -> Tensor:
    """Compute ``left_codes · diag(scale) · right_codes`` in float64."""
    return (left_codes.double() * scale.double()) @ right_codes.double()


def rounded_in_best_basis(left: Tensor, right: Tensor, bits: int = 8) -> RoundedFactors:
    """Round a product in whichever basis rounds better: its components as they are, or its singular vectors.

    Args:
        left: (out, r) float64.
        right: (r, in) float64.
        bits: 2 to 8.

    Example:
        >>> rounded = rounded_in_best_basis(torch.eye(3, 2).double(), torch.eye(2, 4).double())
        >>> [round(number, 6) for number in dense_product(*rounded[:3])[0].tolist()]
        [1.0, 0.0, 0.0, 0.0]
    """
    exact = left @ right
    basis, core = torch.linalg.qr(left)
    other, weights = torch.linalg.qr(right.T)
    u, sigma, v = safe_svd(core @ weights.T, name="adapter")
    count = left.shape[1]
    turned = (basis @ u)[:, :count] * sigma[:count], (v @ other.T)[:count]
    tries = [round_factors(left, right, bits)]
    if turned[0].shape[1] == count:
        tries.append(round_factors(*turned, bits))
    errors = [float(torch.linalg.vector_norm(dense_product(*rounded[:3]) - exact)) for rounded in tries]
    return tries[errors.index(min(errors))]
