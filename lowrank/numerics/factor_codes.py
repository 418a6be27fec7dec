"""Two factors as codes of few bits: one is rounded, the other fitted to what it became."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lowrank.numerics.corrected_codes import best_factors, energy
from lowrank.numerics.factors import check_rank
from lowrank.numerics.feedback import gptq
from lowrank.numerics.grids import Grid, Rounded, Rounding, dequantize_groups
from lowrank.numerics.sampled_moments import Moment, SampledMoment, times_moment

__all__ = ["FactorCodes", "factor_codes"]

ROUNDS = 3
# Of the least-squares fits, relative to the mean diagonal: rounded rows may be alike.
_FIT_RIDGE = 1e-6


class FactorCodes(NamedTuple):
    """``weight ≈ left @ right``, both rounded.

    Attributes:
        left: codes of (out, rank), in groups of the rank.
        right: codes of (rank, in), in groups of the inputs.
        error: ``tr(ΔW Σ ΔWᵀ)``, or ‖ΔW‖² without a moment.
    """

    left: Rounded
    right: Rounded
    error: float


def factor_codes(
    weight: Tensor,
    rank: int,
    left_grid: Grid,
    right_grid: Grid,
    moment: Moment | None = None,
    *,
    rounding: Rounding = gptq,
    rounds: int = ROUNDS,
    name: str = "weight",
) -> FactorCodes:
    """Round both factors of a rank, each fitted to the other as it was rounded; the best of a few rounds is kept.

    Starts from the best float factors, whose ``left`` has orthonormal columns. With right rounded to R: ``left = W Σ Rᵀ (R Σ Rᵀ)⁻¹``,
    rounded in its own metric R Σ Rᵀ to L; with L: ``right = (LᵀL)⁻¹ Lᵀ W``, rounded in Σ; and so on.

    Args:
        weight: (out, in), any floating dtype.
        rank: from 1 to the smaller side.
        left_grid, right_grid: levels of each.
        moment: Σ of the inputs, or the rows it is made of; ``None``: the identity.
        rounding: how codes are chosen.
        rounds: at least 1.
        name: for messages.

    Raises:
        RankError: the rank, or a moment of another size.
        NumericsError: NaN or Inf.

    Example:
        >>> found = factor_codes(torch.eye(4), 2, Grid(4), Grid(4))
        >>> found.left.codes.shape, found.right.codes.shape
        (torch.Size([4, 2]), torch.Size([2, 4]))
    """
    matrix = weight.detach().to(torch.float64)
    rank = check_rank(rank, min(matrix.shape), f"{name}: rank")
    right = best_factors(matrix, rank, moment, name).right
    best: FactorCodes | None = None
    for _ in range(rounds):
        right_codes = rounding(right, right_grid, moment)
        fixed = dequantize_groups(*right_codes, right_grid, torch.float64)
        felt = fixed if moment is None else times_moment(fixed, moment)
        own = moment.between(fixed) if isinstance(moment, SampledMoment) else felt @ fixed.T
        left_codes = rounding(_solved(own, felt @ matrix.T).T.contiguous(), left_grid, own)
        left = dequantize_groups(*left_codes, left_grid, torch.float64)
        error = energy(matrix - left @ fixed, moment)
        if best is None or error < best.error:
            best = FactorCodes(left_codes, right_codes, error)
        right = _solved(left.T @ left, left.T @ matrix)
    assert best is not None
    return best


def _solved(gram: Tensor, right: Tensor) -> Tensor:
    """(gram + a little)⁻¹ right, of a gram that may be singular."""
    ridge = _FIT_RIDGE * gram.diagonal().mean()
    damped = gram + torch.where(ridge > 0.0, ridge, 1.0) * torch.eye(
        gram.shape[0], dtype=gram.dtype, device=gram.device
    )
    solved: Tensor = torch.linalg.solve(damped, right)
    return solved
