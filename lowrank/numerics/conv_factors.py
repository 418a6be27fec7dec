"""Two thin convolutions for one wide one: k×k to r channels, then 1×1; or k×1 to r channels, then 1×k."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank.errors import CalibrationError, RankError, UsageError
from lowrank.numerics.factors import RankCurve, check_rank, factorize
from lowrank.numerics.moments import InputStatistics
from lowrank.numerics.spatial_factors import SpatialCurve

__all__ = [
    "SCHEMES",
    "ConvCurve",
    "ConvFactors",
    "check_scheme",
    "compose",
    "factorize_conv",
    "largest_rank",
]

SCHEMES = ("channel", "spatial")


@dataclass(frozen=True)
class ConvFactors:
    """Kernels of two convolutions in a row, and what to add to the bias.

    Attributes:
        first: (rank · groups, in / groups, *kernel): the whole kernel in the channel form, (k, 1) in the spatial one.
        second: (out, rank, *kernel): ones in the channel form, (1, k) in the spatial one.
        bias_shift: (out,), ``(W − W')μ``; ``None`` where inputs were not centred.
    """

    first: Tensor
    second: Tensor
    bias_shift: Tensor | None = None

    @property
    def rank(self) -> int:
        """Number of rank components of each group."""
        return self.second.shape[1]


@dataclass(frozen=True)
class ConvCurve:
    """The rank-error curve of one convolution in one form; every group has the same rank.

    Attributes:
        errors: (max_rank + 1,) float64, relative, in the metric named by ``method``: the same for both forms.
        energy: square of what the errors are relative to.
        method: ``"svd"`` or ``"output"``, as in :class:`lowrank.numerics.factors.RankCurve`.
        scheme: ``"channel"`` or ``"spatial"``.

    In the spatial form with statistics the errors are those of nested factors, one decomposition for all ranks;
    :meth:`factors` improves on them a little.
    """

    errors: Tensor
    energy: float
    method: str
    scheme: str
    _groups: Sequence[RankCurve | SpatialCurve]
    _in_group: int
    _kernel: tuple[int, ...]

    @property
    def max_rank(self) -> int:
        """The rank at which the convolution is reproduced."""
        return self.errors.numel() - 1

    def factors(self, rank: int) -> ConvFactors:
        """Give the best factors of this rank that are known.

        Raises:
            RankError: the rank is not an integer in [1, max_rank].
        """
        rank = check_rank(rank, self.max_rank)
        found = [group.factors(rank) for group in self._groups]
        ones = (1,) * len(self._kernel)
        tall, wide = (self._kernel, ones) if self.scheme == "channel" else ((self._kernel[0], 1), (1, self._kernel[1]))
        first = torch.cat([part.right for part in found]).reshape(-1, self._in_group, *tall)
        # The spatial form's rows are (out, width): the width goes last.
        second = torch.cat([part.left for part in found]).reshape(-1, math.prod(wide), rank).transpose(1, 2)
        second = second.reshape(second.shape[0], rank, *wide)
        shifts = [part.bias_shift for part in found if part.bias_shift is not None]
        return ConvFactors(first, second, torch.cat(shifts) if shifts else None)

    def rank_for_error(self, max_error: float) -> int:
        """Find the smallest rank (at least 1) whose error is at most ``max_error``."""
        enough = torch.nonzero(self.errors[1:] <= max_error)
        return int(enough[0]) + 1 if enough.numel() else self.max_rank


def factorize_conv(
    weight: Tensor,
    statistics: InputStatistics | None = None,
    *,
    scheme: str = "channel",
    groups: int = 1,
    ridge: float = 0.0,
    shift_bias: bool = True,
    name: str = "weight",
) -> ConvCurve:
    """Find every rank's factors of one convolution.

    The channel form is :func:`lowrank.numerics.factors.factorize` on ``weight.flatten(1)``, group by group, exactly. The spatial form
    (Jaderberg, Vedaldi and Zisserman 2014) is the truncated SVD of the (out · width, in · height) matrix; with statistics see
    :class:`SpatialCurve`.

    Args:
        weight: (out, in / groups, *kernel), any floating dtype; computed in float64.
        statistics: moments of the patches, (in · kernel) features in the order of ``weight.flatten(1)``.
        scheme: ``"channel"``, or ``"spatial"`` for two dimensions.
        groups: of the convolution.
        ridge: relative to the mean diagonal of Σ; moves towards the plain SVD.
        shift_bias: centre the patches and correct the mean in the bias.
        name: for messages.

    Raises:
        RankError: a side of the weight is 0, or its outputs cannot be cut into so many groups.
        UsageError: an unknown form, or the spatial form of a kernel that has not two dimensions.
        CalibrationError: the statistics are of another number of features.
        NumericsError: NaN or Inf in the weight or the statistics.

    Example:
        >>> factors = factorize_conv(torch.randn(8, 4, 3, 5), scheme="spatial").factors(2)
        >>> factors.first.shape, factors.second.shape
        (torch.Size([2, 4, 3, 1]), torch.Size([8, 2, 1, 5]))
    """
    check_scheme(scheme, weight.ndim - 2)
    if weight.ndim < 3 or 0 in weight.shape or weight.shape[0] % groups:
        raise RankError(
            f"{name}: (out, in / groups, *kernel) with every size at least 1 and out a multiple of {groups} groups can be "
            f"factored, got shape {tuple(weight.shape)}"
        )
    features = weight[0].numel() * groups
    if statistics is not None and statistics.count and statistics.n_features != features:
        raise CalibrationError(
            f"{name}: statistics of {statistics.n_features} features given to a kernel of shape {tuple(weight.shape)} with "
            f"{groups} groups, whose patches have {features}; gather them with lowrank.numerics.convolutions.patches"
        )
    kernel = weight.detach().to(torch.float64)
    parts: list[RankCurve | SpatialCurve] = []
    for index, part in enumerate(kernel.chunk(groups)):
        known = None if statistics is None or statistics.count == 0 else statistics.block(index, groups)
        label = name if groups == 1 else f"{name} (group {index})"
        if scheme == "channel":
            parts.append(factorize(part.flatten(1), known, ridge=ridge, shift_bias=shift_bias, name=label))
        else:
            # The spatial form needs the whole moment, of which rows that were kept in its place are too few.
            known = None if known is None or known.sampled else known
            moment = None if known is None else known.moment(centred=shift_bias, ridge=ridge).to(kernel.device)
            mean = known.mean.to(kernel.device) if known is not None and shift_bias else None
            parts.append(SpatialCurve(part, moment, mean, name=label))
    energy = math.fsum(part.energy for part in parts)
    if groups == 1:
        errors = parts[0].errors
    else:
        squares = torch.stack([part.errors.square() * part.energy for part in parts]).sum(dim=0)
        errors = (squares / energy).sqrt() if energy > 0.0 else torch.zeros_like(squares)
    return ConvCurve(errors, energy, parts[0].method, scheme, parts, weight.shape[1], tuple(weight.shape[2:]))


def largest_rank(shape: Sequence[int], scheme: str | None = None, groups: int = 1) -> int:
    """Give the largest rank that a weight can use: the smaller side of what is factored, in each group.

    Args:
        shape: (out, in), or (out, in / groups, *kernel).
        scheme: of a kernel; ``None`` is the weight as one matrix (of each group), as is ``"channel"``.
        groups: that never meet.

    Example:
        >>> largest_rank((8, 6)), largest_rank((8, 4, 3, 5), "channel"), largest_rank((8, 4, 3, 5), "spatial")
        (6, 8, 12)
    """
    outputs = shape[0] // groups
    if scheme == SCHEMES[1] and len(shape) == 4:
        _, inputs, height, width = shape
        return min(inputs * height, outputs * width)
    return min(outputs, math.prod(shape[1:]))


def check_scheme(scheme: object, dims: int) -> str:
    """Return the form as a string.

    Raises:
        UsageError: unknown, or not for so many spatial dimensions.
    """
    if scheme not in SCHEMES:
        raise UsageError(f'scheme: must be "channel" (k×k, then 1×1) or "spatial" (k×1, then 1×k), got {scheme!r}')
    if scheme == "spatial" and dims != 2:
        raise UsageError('scheme: "spatial" cuts a kernel of two dimensions; use "channel" for one')
    return str(scheme)


def compose(first: Tensor, second: Tensor, groups: int = 1) -> Tensor:
    """Multiply out the kernel (out, in / groups, *kernel) that two convolutions in a row make together, in either form.

    Args:
        first: (rank · groups, in / groups, *kernel).
        second: (out, rank, *kernel); along each dimension one of the two kernels is 1 long.

    Example:
        >>> compose(torch.full((1, 1, 2, 1), 3.0), torch.tensor([[[[1.0, 2.0]]]])).tolist()
        [[[[3.0, 6.0], [3.0, 6.0]]]]
    """
    rank = second.shape[1]
    parts = [
        torch.einsum("orw,rih->oihw", outer.flatten(2), inner.flatten(2))
        for outer, inner in zip(second.chunk(groups), first.split(rank), strict=True)
    ]
    size = [max(one, other) for one, other in zip(first.shape[2:], second.shape[2:], strict=True)]
    return torch.cat(parts).reshape(second.shape[0], first.shape[1], *size)
