"""Ways to choose codes for a weight, apart from where they are used: a rounding is handed in, one function each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lowrank.errors import NumericsError, RankError
from lowrank.numerics.rounding import check_bits, require_finite

__all__ = [
    "NEAREST",
    "ROUNDINGS",
    "Grid",
    "Rounded",
    "Rounding",
    "codes_on",
    "dequantize_groups",
    "nearest",
    "scale_dtype",
]

# Beyond what a scale may become by fitting it to less than the largest weight.
_SHRINK = 4.0
# Scales below this lose too many of float16's digits; those of groups so much smaller than the largest are no reason to leave it.
_SMALLEST_HALF, _LARGEST_HALF = 2.0**-17, 2.0**15
_NEGLIGIBLE = 2.0**-20


@dataclass(frozen=True)
class Grid:
    """Describe the levels that codes stand for: ``weight = scale · (code − zero)``, a scale for each group of inputs of a row.

    Attributes:
        bits: of a code, 2 to 8; codes are 0 to ``2**bits − 1``.
        group: inputs that share a scale; ``None`` is a whole row. A last group may be short.
        zero_point: whether each group has a zero of its own, a whole number so that zero stays a level; else it is ``2**(bits − 1)``
            and the scale's sign says at which end the extra level is.

    Example:
        >>> grid = Grid(4, group=64)
        >>> grid.groups(100), grid.middle, grid.top
        (2, 8, 15)
    """

    bits: int
    group: int | None = None
    zero_point: bool = False

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.group is not None and self.group < 1:
            raise RankError(f"group: must be None (a whole row) or a number of inputs from 1, got {self.group}")

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero where groups have none of their own."""
        return 1 << (self.bits - 1)

    def groups(self, columns: int) -> int:
        """Count the groups of a row of so many inputs."""
        return 1 if self.group is None else max(-(-columns // self.group), 1)

    def span(self, columns: int) -> int:
        """Give how many inputs a group holds, but for a short last one."""
        return max(columns, 1) if self.group is None else self.group


class Rounded(NamedTuple):
    """Codes with what they stand for.

    Attributes:
        codes: (rows, columns) uint8.
        scale: (rows, groups) of the dtype that is stored, float16 or float32; a negative one turns its group's levels around.
        zero: (rows, groups) uint8; ``None`` where the grid's middle is the zero of all.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None


class Rounding(Protocol):
    """Choose codes and scales for a weight."""

    def __call__(self, weight: Tensor, grid: Grid, moment: Tensor | None = None) -> Rounded:
        """Round a weight.

        Args:
            weight: (out, in), any floating dtype.
            grid: the levels.
            moment: Σ of the inputs, (in, in) float64, for methods that use it.

        Raises:
            NumericsError: NaN or Inf in the weight, or weights too large for a float32 scale.
        """


def scale_dtype(weight: Tensor, grid: Grid) -> torch.dtype:
    """Tell in which dtype the scales of a weight are stored: float16 unless a group that counts is too small or too large for it.

    Known before anything is rounded, since sizes are.

    Example:
        >>> scale_dtype(torch.ones(2, 8), Grid(4)), scale_dtype(torch.full((2, 8), 1e-6), Grid(4))
        (torch.float16, torch.float32)
    """
    largest = _in_groups(weight.detach().abs(), grid.span(weight.shape[1])).amax(dim=2)
    top = float(largest.max()) if largest.numel() else 0.0
    counting = largest[largest > top * _NEGLIGIBLE]
    if not counting.numel():
        return torch.float16
    least = float(counting.min()) / grid.top / _SHRINK
    return torch.float16 if least >= _SMALLEST_HALF and 2.0 * top <= _LARGEST_HALF else torch.float32


def dequantize_groups(
    codes: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Compute ``scale · (code − zero)``, (rows, columns) of this dtype.

    Args:
        codes: (rows, columns) uint8.
        scale: (rows, groups).
        zero: (rows, groups) uint8; ``None`` is the grid's middle.

    Example:
        >>> codes, scale = torch.tensor([[8, 9, 7]], dtype=torch.uint8), torch.tensor([[0.5]])
        >>> dequantize_groups(codes, scale, None, Grid(4)).tolist()
        [[0.0, 0.5, -0.5]]
    """
    span, columns = grid.span(codes.shape[1]), codes.shape[1]
    spread = _spread(scale.to(dtype), span, columns)
    offsets = float(grid.middle) if zero is None else _spread(zero.to(dtype), span, columns)
    return (codes.to(dtype) - offsets).mul_(spread)


def codes_on(weight: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> Rounded:
    """Round each weight to the nearest level of scales and zeros that are given.

    Example:
        >>> codes_on(torch.tensor([[0.9, -9.0]]), torch.tensor([[0.5]]), None, Grid(4)).codes.tolist()
        [[10, 0]]
    """
    span, columns = grid.span(weight.shape[1]), weight.shape[1]
    offsets = float(grid.middle) if zero is None else _spread(zero.double(), span, columns)
    codes = torch.round(weight.detach().double() / _spread(scale.double(), span, columns) + offsets)
    return Rounded(codes.clamp_(0, grid.top).to(torch.uint8), scale, zero)


def nearest(weight: Tensor, grid: Grid, moment: Tensor | None = None) -> Rounded:
    """Round each weight to the nearest level; a group's range is that of its weights.

    Example:
        >>> rounded = nearest(torch.tensor([[-8.0, 7.0, 1.0]]), Grid(4))
        >>> rounded.codes.tolist(), rounded.scale.tolist()
        ([[0, 15, 9]], [[1.0]])
    """
    dtype = scale_dtype(weight, grid)
    matrix = require_finite(weight.detach(), "weight").to(torch.float64)
    span, columns = grid.span(matrix.shape[1]), matrix.shape[1]
    parts = _in_groups(matrix, span)
    high, low = parts.amax(dim=2), parts.amin(dim=2)
    zero = None
    if grid.zero_point:
        # The range holds zero, so that zero is a level.
        high, low = high.clamp_min(0.0), low.clamp_max(0.0)
        scale = _storable((high - low) / grid.top, dtype)
        zero = torch.round(-low / scale.double()).clamp_(0, grid.top).to(torch.uint8)
        offsets = _spread(zero.double(), span, columns)
    else:
        # The extra level, the lowest, goes to the side that reaches farther.
        turned = high > -low
        reach = torch.where(turned, high, -low)
        other = torch.where(turned, -low, high)
        scale = torch.maximum(reach / grid.middle, other / (grid.middle - 1))
        scale = _storable(torch.where(turned, -scale, scale), dtype)
        offsets = torch.full_like(matrix, grid.middle)
    codes = torch.round(matrix / _spread(scale.double(), span, columns) + offsets).clamp_(0, grid.top)
    return Rounded(codes.to(torch.uint8), scale, zero)


def _storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales in the dtype that is stored; one that vanishes there is 1, so that its group becomes zeros.

    Raises:
        NumericsError: a scale beyond float32.
    """
    stored = scale.to(dtype)
    if not bool(torch.isfinite(stored).all()):
        row = int(torch.nonzero(~torch.isfinite(stored))[0, 0])
        raise NumericsError(f"weight: row {row} is too large for a {dtype} scale; rescale the layer or leave it dense")
    return torch.where(stored == 0, torch.ones_like(stored), stored)


def _in_groups(matrix: Tensor, span: int) -> Tensor:
    """(rows, groups, span), the last group filled up with its last column, which changes no range."""
    missing = -matrix.shape[1] % span
    if missing:
        matrix = torch.cat([matrix, matrix[:, -1:].expand(-1, missing)], dim=1)
    return matrix.view(matrix.shape[0], -1, span)


def _spread(values: Tensor, span: int, columns: int) -> Tensor:
    """(rows, groups) to (rows, columns)."""
    return values if values.shape[1] == 1 else values.repeat_interleave(span, dim=1)[:, :columns]


NEAREST = "nearest"
ROUNDINGS: Mapping[str, Rounding] = {NEAREST: nearest}
