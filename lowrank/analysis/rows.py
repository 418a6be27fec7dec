"""The rows of an analysis, and what the singular values of all layers together promise the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["SIZES", "AnalysisRow", "size_error_curve"]

# Fractions of a matrix's bytes at which its best factors' error is stated.
SIZES = (0.25, 0.5, 0.75)
# Multipliers tried for the model's size-error curve: 24 a decade keeps neighbours within a few per cent in size.
MULTIPLIERS = torch.logspace(-7, 5, 289, dtype=torch.float64)


@dataclass(frozen=True)
class AnalysisRow:
    """What the singular values of one layer's weight say, or why they were not computed.

    Attributes:
        name: module name, or the tensor's name without ``.weight``.
        kind: the module's class, or for a file what the shape says (``"matrix"``, ``"conv2d"`` …).
        shape: of the weight as stored.
        parameters: elements of all the layer's parameters, bias included, without buffers; a tied one counts in its first row.
        bytes: stored bytes of the same.
        dtype: of the weight.
        ranks: fewest singular values that hold each fraction of Σσ², by the fraction as text.
        effective_rank: exp of the entropy of σ/Σσ (Roy and Vetterli 2007).
        stable_rank: ‖W‖²_F/‖W‖²₂.
        numerical_rank: σ above eps·max(m, n)·σ₁.
        noise_rank: σ above the Gavish-Donoho threshold.
        full_rank: min(m, n).
        break_even_rank: mn/(m+n), at or above which factors are no smaller.
        errors: relative Frobenius error of the best factors within each of :data:`SIZES` of the bytes, by size as text.
        data_ranks, data_effective_rank, data_errors, tokens: the same for W Σ^½, the weight in the metric of its
            calibration inputs, and how many tokens reached it; ``None`` without calibration.
        verdict: what compressing would make of the layer, in words.
        plans: by budget as text, the ``format``, ``rank`` and ``bytes`` that compressing would choose; ``None`` for what is no layer
            that can be replaced, or is tied with one before.
        reason: why nothing was computed; ``None`` for an analysed layer.
        spectrum: σ/σ₁ at 33 equal steps of the rank from 1 to full, for plots.
        energy: cumulative share of Σσ² at the same ranks.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    bytes: int
    dtype: str = ""
    ranks: Mapping[str, int] | None = None
    effective_rank: float | None = None
    stable_rank: float | None = None
    numerical_rank: int | None = None
    noise_rank: int | None = None
    full_rank: int | None = None
    break_even_rank: float | None = None
    errors: Mapping[str, float] | None = None
    data_ranks: Mapping[str, int] | None = None
    data_effective_rank: float | None = None
    data_errors: Mapping[str, float] | None = None
    tokens: int | None = None
    verdict: str = ""
    plans: Mapping[str, Mapping[str, Any]] | None = None
    reason: str | None = None
    spectrum: tuple[float, ...] = ()
    energy: tuple[float, ...] = ()

    @property
    def analysed(self) -> bool:
        """Whether singular values were computed."""
        return self.reason is None


def size_error_curve(spectra: Sequence[tuple[Tensor, int, int, int]]) -> list[tuple[float, float]]:
    """Trade bytes against error for a whole model of plainly factored layers.

    For each multiplier the rank of every layer that minimises squared error + multiplier · bytes (one multiplier for
    all: the lower convex hull); a layer whose factors would not be smaller stays whole.

    Args:
        spectra: (singular values, rows, columns, bytes an element) a layer.

    Returns:
        (bytes / all bytes, ‖ΔW‖_F/‖W‖_F) over all the layers, sizes ascending, errors descending.

    Example:
        >>> size_error_curve([(torch.tensor([3.0, 0.0, 0.0], dtype=torch.float64), 3, 3, 4)])[-1]
        (0.6666666666666666, 0.0)
    """
    whole = sum(rows * columns * width for _, rows, columns, width in spectra)
    energy = sum(float(sigma.square().sum()) for sigma, *_ in spectra)
    if whole == 0 or not 0.0 < energy < math.inf:
        return []
    sizes = torch.zeros_like(MULTIPLIERS)
    losses = torch.zeros_like(MULTIPLIERS)
    for sigma, rows, columns, width in spectra:
        # Ranks from which factors are no smaller are left to the whole matrix.
        ranks = min(sigma.numel(), (rows * columns - 1) // (rows + columns))
        tails = torch.flip(torch.cumsum(torch.flip(sigma.square(), [0]), 0), [0])
        tails = torch.cat([tails, tails.new_zeros(1)]) / energy
        cost = torch.arange(ranks + 1, dtype=torch.float64) * ((rows + columns) * width / whole)
        cost = torch.cat([cost, torch.tensor([rows * columns * width / whole], dtype=torch.float64)])
        loss = torch.cat([tails[: ranks + 1], tails.new_zeros(1)])
        best = (loss[None, :] + MULTIPLIERS[:, None] * cost[None, :]).argmin(dim=1)
        sizes += cost[best]
        losses += loss[best]
    points = {(size, math.sqrt(max(loss, 0.0))) for size, loss in zip(sizes.tolist(), losses.tolist(), strict=True)}
    return sorted(points)
