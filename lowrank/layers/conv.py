"""A convolution as two thinner ones, trainable."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from lowrank.errors import RankError
from lowrank.layers.conv_base import ConvLayer, Sizes, conv_parts, float_conv, kernel_error
from lowrank.layers.factors import balanced
from lowrank.layers.source import carry_over, choose_rank
from lowrank.layers.weights import FactoredWeight, FloatFactors, matrix_for
from lowrank.numerics.conv_factors import ConvFactors, check_scheme, compose, factorize_conv
from lowrank.numerics.convolutions import ConvGeometry
from lowrank.numerics.factors import Factors, check_rank
from lowrank.numerics.moments import InputStatistics

__all__ = [
    "FactoredConv",
    "SVDCompressedConv1d",
    "SVDCompressedConv2d",
    "balanced_kernels",
    "kernels_of",
    "matrices_of",
]

_Layer = TypeVar("_Layer", bound="SVDCompressedConv")
_Factored = TypeVar("_Factored", bound="FactoredConv")


class FactoredConv(FactoredWeight, ConvLayer):
    """Base of the layers that are two convolutions in a row, float or int8.

    Attributes:
        scheme: ``"channel"`` (k×k to r channels, then 1×1) or ``"spatial"`` (k×1 to r channels, then 1×k).
        first_geometry, second_geometry: of the two convolutions.
    """

    scheme: str
    first_geometry: ConvGeometry
    second_geometry: ConvGeometry

    def _set_scheme(self, scheme: str, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the two kernels, first and second.

        Raises:
            UsageError: an unknown form, or one that this layer has not.
            RankError: the rank is out of range.
        """
        self.scheme = check_scheme(scheme, self.dims)
        geometry = self.geometry
        inputs = self.in_channels // self.groups
        if scheme == "spatial":
            self.first_geometry, self.second_geometry = geometry.along(0), geometry.along(1)
        else:
            self.first_geometry, self.second_geometry = geometry, geometry.pointwise()
        rank = check_rank(rank, self.rank_limit(self.shape, scheme, self.groups))
        return (
            (rank * self.groups, inputs, *self.first_geometry.kernel_size),
            (self.out_channels, rank, *self.second_geometry.kernel_size),
        )

    @property
    def is_product(self) -> bool:
        """Whether the kernel, as a matrix, is the product of the two: in the channel form, without groups."""
        return self.scheme == "channel" and self.groups == 1

    def with_weight(self: _Factored, weight: Tensor) -> _Factored:
        """Factor another kernel in the same form; see :meth:`CompressedLayer.with_weight`."""
        kernel = matrix_for(self, weight).view(self.shape)
        curve = factorize_conv(kernel, scheme=self.scheme, groups=self.groups, shift_bias=False)
        return self._of_kernels(curve.factors(self._components))

    def _of_kernels(self: _Factored, factors: ConvFactors) -> _Factored:
        """A layer like this one of other kernels of the same rank."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """See :meth:`CompressedLayer.config`."""
        return super().config() | {"scheme": self.scheme}

    @classmethod
    def _arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return super()._arguments(config) | {"scheme": config["scheme"]}

    def extra_repr(self) -> str:
        """Say what ``repr`` shows."""
        return f"{super().extra_repr()}, scheme={self.scheme!r}"


class SVDCompressedConv(FloatFactors, FactoredConv):
    """``y = conv(conv(x, right), left) + bias``; see :class:`SVDCompressedConv2d`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        rank: int,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        scheme: str = "channel",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._set_geometry(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        right, left = self._set_scheme(scheme, rank)
        self.left = nn.Parameter(torch.empty(left, device=device, dtype=dtype))
        self.right = nn.Parameter(torch.empty(right, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        self.dtype = self.left.dtype
        self.truncation_error: float | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw factors whose product has the variance of a convolution's initial weight, 1 / (3 · in / groups · kernel)."""
        bound = 1.0 / math.sqrt(math.prod(self.shape[1:]))
        # var(left right) = rank · var(left) · var(right), split evenly.
        each = (3.0 * bound * bound / self.left.shape[1]) ** 0.25
        with torch.no_grad():
            self.left.uniform_(-each, each)
            self.right.uniform_(-each, each)
            if self.bias is not None:
                self.bias.uniform_(-bound, bound)

    @classmethod
    def _from_conv(
        cls: type[_Layer],
        conv: nn.Module,
        rank: int | None,
        max_error: float | None,
        scheme: str,
        statistics: InputStatistics | None,
        ridge: float,
    ) -> _Layer:
        weight, bias, geometry = conv_parts(conv, cls.dims)
        groups, centred = geometry.groups, bias is not None
        curve = factorize_conv(
            weight, statistics, scheme=check_scheme(scheme, cls.dims), groups=groups, ridge=ridge, shift_bias=centred
        )

        def measure(candidate: int) -> float:
            right, left = balanced_kernels(curve.factors(candidate), groups, weight.dtype)
            product = compose(right.double(), left.double(), groups)
            return kernel_error(weight, product, statistics, groups=groups, centred=centred, ridge=ridge)

        return cls.from_factors(curve.factors(choose_rank(curve, rank, max_error, measure)), conv, scheme)

    @classmethod
    def from_factors(cls: type[_Layer], factors: ConvFactors, conv: nn.Module, scheme: str = "channel") -> _Layer:
        """Make the layer of these factors; all else (bias, dtype, device, mode, ``requires_grad``) is the convolution's.

        Args:
            factors: see :func:`lowrank.numerics.conv_factors.factorize_conv`.
            conv: the layer it takes the place of.
            scheme: the form that the factors are of.

        Raises:
            RankError: the factors do not fit the layer, or shift a bias that it does not have.
        """
        weight, bias, geometry = conv_parts(conv, cls.dims)
        if factors.bias_shift is not None and bias is None:
            raise RankError("factors: carry a bias shift, but the layer has no bias; factorize with shift_bias=False")
        arguments = cls._as_arguments(geometry, weight.shape[1] * geometry.groups, weight.shape[0])
        arguments |= {"bias": bias is not None, "rank": factors.rank, "scheme": scheme, "dtype": weight.dtype}
        layer = cls._allocate(arguments, weight.device)
        if layer.right.shape != factors.first.shape or layer.left.shape != factors.second.shape:
            raise RankError(
                f'factors: {tuple(factors.first.shape)} and {tuple(factors.second.shape)} do not fit the "{scheme}" form '
                f"of a kernel of {tuple(weight.shape)} with {geometry.groups} groups"
            )
        right, left = balanced_kernels(factors, geometry.groups, weight.dtype)
        with torch.no_grad():
            layer.left.copy_(left)
            layer.right.copy_(right)
            if layer.bias is not None and bias is not None:
                shift = 0.0 if factors.bias_shift is None else factors.bias_shift.to(bias.device)
                layer.bias.copy_(bias.double() + shift)
        layer.truncation_error = layer.reconstruction_error(weight) * float(
            torch.linalg.vector_norm(weight.detach().double())
        )
        carry_over(conv, layer)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, in, *size) to (B, out, *output size), or both without B."""
        batched = self._batched(input)
        y = float_conv(batched, self.right, None, self.first_geometry)
        y = float_conv(y, self.left, self.bias, self.second_geometry)
        return y if batched is input else y[0]

    def dense_weight(self) -> Tensor:
        """Give the kernel (out, in / groups, *kernel), multiplied in float64 and rounded once."""
        return compose(self.right.double(), self.left.double(), self.groups).to(self.left.dtype)

    def _to_conv(self) -> nn.Module:
        conv = self._dense(self.left.device)
        conv.get_parameter("weight").requires_grad_(self.left.requires_grad)
        return conv

    def reconstruction_error(self, weight: Tensor) -> float:
        """Compute ‖W − W'‖_F / ‖W‖_F for a kernel (out, in / groups, *kernel)."""
        return kernel_error(weight, compose(self.right.double(), self.left.double(), self.groups).detach())

    def config(self) -> dict[str, Any]:
        """See :meth:`CompressedLayer.config`."""
        return super().config() | {"truncation_error": self.truncation_error}

    def _restore(self, config: Mapping[str, Any]) -> None:
        self.truncation_error = config.get("truncation_error")

    def _of_kernels(self: _Layer, factors: ConvFactors) -> _Layer:
        right, left = balanced_kernels(factors, self.groups, self.left.dtype)
        return self._of_matrices(left, right)


class SVDCompressedConv1d(SVDCompressedConv):
    """``nn.Conv1d`` as two convolutions; as :class:`SVDCompressedConv2d`, in the channel form only.

    Example:
        >>> layer = SVDCompressedConv1d.from_conv1d(nn.Conv1d(4, 6, 3, padding="same"), rank=2)
        >>> layer(torch.zeros(1, 4, 9)).shape, layer.right.shape, layer.left.shape
        (torch.Size([1, 6, 9]), torch.Size([2, 4, 3]), torch.Size([6, 2, 1]))
    """

    dims: ClassVar[int] = 1

    @classmethod
    def from_conv1d(
        cls,
        conv: nn.Module,
        *,
        rank: int | None = None,
        max_error: float | None = None,
        scheme: str = "channel",
        statistics: InputStatistics | None = None,
        ridge: float = 0.0,
    ) -> SVDCompressedConv1d:
        """As :meth:`SVDCompressedConv2d.from_conv2d`."""
        return cls._from_conv(conv, rank, max_error, scheme, statistics, ridge)

    def to_conv1d(self) -> nn.Conv1d:
        """Make a dense convolution with the same kernel and bias."""
        conv = self._to_conv()
        assert isinstance(conv, nn.Conv1d)
        return conv


class SVDCompressedConv2d(SVDCompressedConv):
    """``nn.Conv2d`` as two convolutions in a row: ``y = conv(conv(x, right), left) + bias``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: as of ``nn.Conv2d``.
        rank: channels between the two, of each group.
        scheme: ``"channel"``: the whole kernel to ``rank`` channels, then 1×1. ``"spatial"``: (k, 1) to ``rank`` channels, then
            (1, k); strides, dilations and margins go to the half that they belong to.
        device, dtype: of the parameters.

    Attributes:
        right: (rank · groups, in / groups, *kernel) of the first convolution.
        left: (out, rank, *kernel) of the second.
        bias: (out,) or ``None``.
        truncation_error: ‖W − W'‖_F of the kernel it was made from; ``None`` for one made from scratch.

    Raises:
        RankError: a rank, size or number of groups out of range.
        UsageError: an unknown form, or a geometry out of range.

    Example:
        >>> layer = SVDCompressedConv2d.from_conv2d(nn.Conv2d(4, 6, 3, stride=2), rank=2, scheme="spatial")
        >>> layer(torch.zeros(1, 4, 9, 9)).shape, layer.right.shape, layer.left.shape
        (torch.Size([1, 6, 4, 4]), torch.Size([2, 4, 3, 1]), torch.Size([6, 2, 1, 3]))
    """

    dims: ClassVar[int] = 2

    @classmethod
    def from_conv2d(
        cls,
        conv: nn.Module,
        *,
        rank: int | None = None,
        max_error: float | None = None,
        scheme: str = "channel",
        statistics: InputStatistics | None = None,
        ridge: float = 0.0,
    ) -> SVDCompressedConv2d:
        """Make the best layer of this rank, or the one of the smallest rank within an error.

        Args:
            conv: ``nn.Conv2d``.
            rank: channels between the two convolutions, of each group.
            max_error: largest ‖W − W'‖_F/‖W‖_F; with statistics, the same in the norm of the (centred) patches.
            scheme: ``"channel"`` or ``"spatial"``.
            statistics: of the patches (:func:`lowrank.numerics.convolutions.patches`); makes the factors those of the least output
                error.
            ridge: relative, see :func:`lowrank.numerics.factors.factorize`.

        Raises:
            RankError: rank out of range, or no rank is within ``max_error``.
            UsageError: not an ``nn.Conv2d``, or an unknown form.
            NumericsError: NaN or Inf in the weight.
        """
        return cls._from_conv(conv, rank, max_error, scheme, statistics, ridge)

    def to_conv2d(self) -> nn.Conv2d:
        """Make a dense convolution with the same kernel and bias."""
        conv = self._to_conv()
        assert isinstance(conv, nn.Conv2d)
        return conv


def matrices_of(first: Tensor, second: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Two kernels as the matrices that are multiplied, group by group.

    Args:
        first: (rank · groups, in / groups, *kernel).
        second: (out, rank, *kernel).

    Returns:
        right (groups, rank, in / groups · kernel) and left (groups, out / groups · kernel, rank).
    """
    rank = second.shape[1]
    left = second.reshape(groups, second.shape[0] // groups, rank, -1).transpose(2, 3)
    return first.reshape(groups, rank, -1), left.reshape(groups, -1, rank)


def kernels_of(right: Tensor, left: Tensor, first: torch.Size, second: torch.Size) -> tuple[Tensor, Tensor]:
    """Give the kernels, of these shapes, that :func:`matrices_of` gave as matrices."""
    outputs, rank, *kernel = second
    back = left.reshape(outputs, math.prod(kernel), rank).transpose(1, 2)
    return right.reshape(first), back.reshape(second)


def balanced_kernels(factors: ConvFactors, groups: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """First and second kernel of one dtype, each rank component with equal norms in both; see :func:`balanced`."""
    right, left = matrices_of(factors.first, factors.second, groups)
    pairs = [balanced(Factors(one, other), dtype) for one, other in zip(left, right, strict=True)]
    lefts, rights = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    return kernels_of(rights, lefts, factors.first.shape, factors.second.shape)
