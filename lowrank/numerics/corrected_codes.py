"""Codes of few bits and a low-rank rest: what rounding lost, given back in the directions that the inputs feel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank.numerics.factors import Factors, check_rank, factorize, factorize_in_metric
from lowrank.numerics.feedback import gptq, importance
from lowrank.numerics.grids import Grid, Rounded, Rounding, dequantize_groups
from lowrank.numerics.sampled_moments import Moment, moment_squares

__all__ = ["CorrectedCodes", "corrected_codes"]

# Rounds of rounding what the factors leave and fitting them anew. After three the error has stopped falling, or rises.
ROUNDS = 3


class CorrectedCodes(NamedTuple):
    """``weight ≈ scale · (codes − zero) + left @ right``.

    Attributes:
        rounded: the codes.
        factors: float64.
        error: ``tr(ΔW Σ ΔWᵀ)``, or ‖ΔW‖² without a moment.
        start: which way led there: ``"repair"``, ``"split"`` or ``"columns"``.
    """

    rounded: Rounded
    factors: Factors
    error: float
    start: str


def corrected_codes(
    weight: Tensor,
    grid: Grid,
    rank: int,
    moment: Moment | None = None,
    *,
    rounding: Rounding = gptq,
    rounds: int = ROUNDS,
    name: str = "weight",
) -> CorrectedCodes:
    """Choose codes and a low-rank rest together, and keep the best of three ways to begin.

    For codes Q the best rest is the best rank-r layer for W − Q in the metric of the inputs, in closed form (Zhang et al. 2024,
    "QERA"; Liu et al. 2024, "EoRA"). Codes are chosen for what factors leave:

    * ``"repair"``: Q of W itself.
    * ``"split"``: the leading half of the rank's directions of W in the metric are taken out before rounding, and the rest repaired
      (Cho et al. 2026, "SRR"); the whole rank is then fitted anew, which can only be better.
    * ``"columns"``: the inputs of most energy are left to the factors (Cho et al. 2025, "ODLRI").

    Each goes on for ``rounds`` rounds (codes for what the factors leave, factors for what the codes leave: Saha et al. 2024,
    "CALDERA"), and the best iterate of all is kept.

    Args:
        weight: (out, in), any floating dtype.
        grid: the levels.
        rank: of the rest, from 1 to the smaller side.
        moment: Σ of the inputs, or the rows it is made of; ``None``: the identity.
        rounding: how codes are chosen.
        rounds: see above.
        name: for messages.

    Raises:
        RankError: the rank, or a moment of another size.
        NumericsError: NaN or Inf.

    Example:
        >>> found = corrected_codes(torch.eye(4), Grid(2), 1)
        >>> found.factors.rank, found.rounded.codes.shape
        (1, torch.Size([4, 4]))
    """
    matrix = weight.detach().to(torch.float64)
    rank = check_rank(rank, min(matrix.shape), f"{name}: rank")
    best: CorrectedCodes | None = None
    for start, taken in _starts(matrix, rank, moment, name):
        rest = taken
        for _ in range(rounds):
            rounded = rounding(matrix - rest, grid, moment)
            left = matrix - dequantize_groups(*rounded, grid, torch.float64)
            factors = best_factors(left, rank, moment, name)
            rest = factors.left @ factors.right
            error = energy(left - rest, moment)
            if best is None or error < best.error:
                best = CorrectedCodes(rounded, factors, error, start)
    assert best is not None
    return best


def _starts(matrix: Tensor, rank: int, moment: Moment | None, name: str) -> Iterator[tuple[str, Tensor]]:
    """Ways to begin: what is taken out of the weight before it is rounded for the first time."""
    yield "repair", torch.zeros_like(matrix)
    half = best_factors(matrix, (rank + 1) // 2, moment, name)
    yield "split", half.left @ half.right
    heavy = importance(matrix, moment)
    if heavy is not None and heavy.shape[0] == 1 and rank < matrix.shape[1]:
        columns = torch.topk(heavy[0] * matrix.square().sum(dim=0), rank).indices
        taken = torch.zeros_like(matrix)
        taken[:, columns] = matrix[:, columns]
        yield "columns", taken


def best_factors(matrix: Tensor, rank: int, moment: Moment | None, name: str = "weight") -> Factors:
    """Give the best factors of a rank in the metric of a moment, or by the plain SVD without one.

    Example:
        >>> best_factors(torch.eye(3).double(), 2, None).left.shape
        torch.Size([3, 2])
    """
    curve = factorize(matrix, name=name) if moment is None else factorize_in_metric(matrix, moment, name=name)
    return curve.factors(rank)


def energy(matrix: Tensor, moment: Moment | None) -> float:
    """Compute ``tr(M Σ Mᵀ)``, or ‖M‖² without a moment.

    Example:
        >>> energy(torch.eye(2), None)
        2.0
    """
    return float(matrix.square().sum() if moment is None else moment_squares(matrix, moment).sum())
