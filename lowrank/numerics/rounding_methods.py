"""Ways to choose codes for a weight, apart from where they are used: a rounding is handed in, one function each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lowrank.numerics.rounding import quantize_rows

__all__ = ["NEAREST", "ROUNDINGS", "Grid", "Rounding", "nearest"]


@dataclass(frozen=True)
class Grid:
    """Describe the levels that codes stand for.

    Attributes:
        bits: of a code, 2 to 8; symmetric, so that ``2**(bits − 1) − 1`` is the largest.
        group: inputs that share a scale; ``None`` is a whole row.
    """

    bits: int
    group: int | None = None


class Rounding(Protocol):
    """Choose codes and scales for a weight."""

    def __call__(self, weight: Tensor, grid: Grid, moment: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Round a weight.

        Args:
            weight: (out, in), any floating dtype.
            grid: the levels.
            moment: Σ of the inputs, (in, in) float64, for methods that use it.

        Returns:
            codes (out, in) int8; scales (out,) float32, or (out, groups) where the grid has groups.
        """


def nearest(weight: Tensor, grid: Grid, moment: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round each weight to the nearest level; the scale of a row, or of a group of it, is set by its largest weight.

    A last group may be short.

    Example:
        >>> import torch
        >>> codes, scales = nearest(torch.tensor([[7.0, -1.0, 0.5]]), Grid(4, group=2))
        >>> codes.tolist(), scales.shape
        ([[7, -1, 7]], torch.Size([1, 2]))
    """
    if grid.group is None:
        return quantize_rows(weight, grid.bits)
    parts = [quantize_rows(part, grid.bits) for part in weight.split(grid.group, dim=1)]
    return torch.cat([codes for codes, _ in parts], dim=1), torch.stack([scale for _, scale in parts], dim=1)


NEAREST = "nearest"
ROUNDINGS: Mapping[str, Rounding] = {NEAREST: nearest}
