"""The levels that codes of a few bits stand for, and codes with their scales as floats again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from lowrank.errors import RankError
from lowrank.numerics.rounding import check_bits
from lowrank.numerics.sampled_moments import Moment

if TYPE_CHECKING:
    from lowrank.numerics.factored_moments import FactoredMoment

__all__ = ["Grid", "Rounded", "Rounding", "dequantize_groups", "in_groups", "scale_dtype", "spread"]

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

    def to(self, device: torch.device) -> Rounded:
        """Give the same on a device."""
        return Rounded(
            self.codes.to(device), self.scale.to(device), None if self.zero is None else self.zero.to(device)
        )


class Rounding(Protocol):
    """Choose codes and scales for a weight."""

    def __call__(
        self, weight: Tensor, grid: Grid, moment: Moment | FactoredMoment | None = None, gradients: Tensor | None = None
    ) -> Rounded:
        """Round a weight.

        Args:
            weight: (out, in), any floating dtype.
            grid: the levels.
            moment: Σ of the inputs, (in, in) or (blocks, in, in) float64, or the rows it is made of, for methods that use it.
            gradients: C of the outputs, (out, out) float64, for methods that use it.

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
    largest = in_groups(weight.detach().abs(), grid.span(weight.shape[1])).amax(dim=2)
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
    offsets = float(grid.middle) if zero is None else spread(zero.to(dtype), span, columns)
    return (codes.to(dtype) - offsets).mul_(spread(scale.to(dtype), span, columns))


def in_groups(matrix: Tensor, span: int) -> Tensor:
    """Cut rows in groups, the last one filled up with zeros: (rows, columns) to (rows, groups, span).

    Example:
        >>> in_groups(torch.tensor([[1.0, 2.0, 3.0]]), 2).tolist()
        [[[1.0, 2.0], [3.0, 0.0]]]
    """
    missing = -matrix.shape[1] % span
    if missing:
        matrix = torch.nn.functional.pad(matrix, (0, missing))
    return matrix.reshape(matrix.shape[0], matrix.shape[1] // span, span)


def spread(values: Tensor, span: int, columns: int) -> Tensor:
    """Repeat what groups have for each of their inputs: (rows, groups) to (rows, columns), or (rows, 1) where a group is a row.

    Example:
        >>> spread(torch.tensor([[1, 2]]), 2, 3).tolist()
        [[1, 1, 2]]
    """
    return values if values.shape[1] == 1 else values.repeat_interleave(span, dim=1)[:, :columns]
