"""Ways to choose codes for a weight, apart from where they are used: a rounding is handed in, one function each."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lowrank.numerics.factored_moments import FactoredMoment
from lowrank.numerics.feedback import gptq, importance
from lowrank.numerics.grids import Grid, Rounded, Rounding, dequantize_groups, scale_dtype
from lowrank.numerics.ranges import fitted_ranges, rounded_to
from lowrank.numerics.rounding import require_finite
from lowrank.numerics.sampled_moments import Moment
from lowrank.numerics.two_sided import two_sided

__all__ = [
    "GPTQ",
    "NEAREST",
    "ROUNDINGS",
    "TWO_SIDED",
    "Grid",
    "Rounded",
    "Rounding",
    "dequantize_groups",
    "nearest",
    "scale_dtype",
]


def nearest(
    weight: Tensor, grid: Grid, moment: Moment | FactoredMoment | None = None, gradients: Tensor | None = None
) -> Rounded:
    """Round each weight to the nearest level; a group's range is the one whose squared error is least.

    With a moment each input counts by its mean square; gradients are not used.

    Example:
        >>> import torch
        >>> rounded = nearest(torch.tensor([[-8.0, 7.0, 1.0]]), Grid(4))
        >>> rounded.codes.tolist(), rounded.scale.tolist()
        ([[0, 15, 9]], [[1.0]])
    """
    matrix = require_finite(weight.detach(), "weight")
    scale, zero = fitted_ranges(matrix, grid, scale_dtype(matrix, grid), importance(matrix, moment))
    return Rounded(rounded_to(matrix, scale, zero, grid), scale, zero)


NEAREST = "nearest"
GPTQ = "gptq"
TWO_SIDED = "two-sided"
ROUNDINGS: Mapping[str, Rounding] = {NEAREST: nearest, GPTQ: gptq, TWO_SIDED: two_sided}
