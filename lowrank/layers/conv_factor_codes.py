"""A convolution as two thinner ones of int8 codes, with one scale a rank component between them."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lowrank.errors import UsageError
from lowrank.layers.checks import INTEGER_ACTIVATIONS, check_activations
from lowrank.layers.conv import (
    FactoredConv,
    SVDCompressedConv,
    SVDCompressedConv1d,
    SVDCompressedConv2d,
    kernels_of,
    matrices_of,
)
from lowrank.layers.conv_base import Sizes, conv_parts, float_conv, kernel_error
from lowrank.layers.conv_integer import ConvStage, IntegerConvLayer
from lowrank.layers.factors import round_factors
from lowrank.layers.source import choose_rank
from lowrank.layers.weights import FactorCodes
from lowrank.numerics.conv_factors import ConvFactors, check_scheme, compose, factorize_conv
from lowrank.numerics.moments import InputStatistics
from lowrank.numerics.rounding import check_bits

__all__ = ["QuantizedLowRankConv1d", "QuantizedLowRankConv2d", "round_kernels"]

_Layer = TypeVar("_Layer", bound="QuantizedLowRankConv")


class RoundedKernels(NamedTuple):
    """Codes and scale of two kernels, and a bound of ‖W' − what they make together‖_F."""

    left_codes: Tensor
    right_codes: Tensor
    scale: Tensor
    bound: float

    def dense(self, groups: int) -> Tensor:
        """Give the kernel that they make together, float64."""
        first = self.right_codes.double() * self.scale.double().view(-1, *(1 for _ in self.right_codes.shape[1:]))
        return compose(first, self.left_codes.double(), groups)


def round_kernels(right: Tensor, left: Tensor, groups: int, bits: int = 8) -> RoundedKernels:
    """Round two kernels, every rank component to the full range of the codes; see
    :func:`lowrank.layers.factors.round_factors`.

    Args:
        right: (rank · groups, in / groups, *kernel), of the first convolution.
        left: (out, rank, *kernel), of the second.

    Example:
        >>> rounded = round_kernels(torch.ones(1, 2, 3), torch.ones(4, 1, 1), 1)
        >>> rounded.scale.shape, rounded.dense(1).shape
        (torch.Size([1]), torch.Size([4, 2, 3]))
    """
    rights, lefts = matrices_of(right, left, groups)
    parts = [round_factors(one, other, bits) for one, other in zip(lefts, rights, strict=True)]
    right_codes = torch.stack([part.right_codes for part in parts])
    left_codes = torch.stack([part.left_codes for part in parts])
    first, second = kernels_of(right_codes, left_codes, right.shape, left.shape)
    # Groups are blocks of the kernel that do not overlap, so their squares add up.
    bound = math.sqrt(math.fsum(part.bound**2 for part in parts))
    # Copied, so that sizes of 1 have their usual strides: torch picks its routes by them.
    second = second.clone(memory_format=torch.contiguous_format)
    return RoundedKernels(second, first, torch.cat([part.scale for part in parts]), bound)


class QuantizedLowRankConv(FactorCodes, FactoredConv, IntegerConvLayer):
    """Two convolutions of int8 codes; see :class:`QuantizedLowRankConv2d`."""

    _float_kind: ClassVar[type[SVDCompressedConv]]

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
        n_bits: int = 8,
        activations: str = INTEGER_ACTIVATIONS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._set_geometry(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        right, left = self._set_scheme(scheme, rank)
        self.activations = check_activations(activations)
        self._allocate_codes({"left_codes": left, "right_codes": right}, rank * groups, n_bits, device)
        self.allocate_bias(bias, device, dtype)

    @classmethod
    def _from_conv(
        cls: type[_Layer],
        conv: nn.Module,
        rank: int | None,
        max_error: float | None,
        scheme: str,
        statistics: InputStatistics | None,
        ridge: float,
        bits: int,
        activations: str,
    ) -> _Layer:
        check_bits(bits)
        weight, bias, geometry = conv_parts(conv, cls.dims)
        groups, centred = geometry.groups, bias is not None
        curve = factorize_conv(
            weight, statistics, scheme=check_scheme(scheme, cls.dims), groups=groups, ridge=ridge, shift_bias=centred
        )

        def measure(candidate: int) -> float:
            factors = curve.factors(candidate)
            product = round_kernels(factors.first, factors.second, groups, bits).dense(groups)
            return kernel_error(weight, product, statistics, groups=groups, centred=centred, ridge=ridge)

        chosen = curve.factors(choose_rank(curve, rank, max_error, measure))
        return cls.from_factors(cls._float_kind.from_factors(chosen, conv, scheme), bits=bits, activations=activations)

    @classmethod
    def from_factors(
        cls: type[_Layer], layer: SVDCompressedConv, *, bits: int = 8, activations: str = INTEGER_ACTIVATIONS
    ) -> _Layer:
        """Round the factors of a low-rank convolution; bias, mode and dtype are carried over.

        Raises:
            UsageError: a layer of another number of dimensions.
        """
        if layer.dims != cls.dims:
            raise UsageError(f"layer: must be an {cls._float_kind.__name__}, got {type(layer).__name__}")
        rounded = round_kernels(layer.right, layer.left, layer.groups, bits)
        arguments = cls._as_arguments(layer.geometry, layer.in_channels, layer.out_channels)
        arguments |= {"bias": layer.bias is not None, "rank": layer.rank, "scheme": layer.scheme}
        device, dtype = layer.left.device, layer.left.dtype
        quantized = cls(**arguments, n_bits=bits, activations=activations, device=device, dtype=dtype)
        quantized.left_codes, quantized.right_codes, quantized.scale = rounded[:3]
        quantized.take_bias(layer.bias)
        quantized.error_bound_value = rounded.bound + (layer.truncation_error or 0.0)
        return quantized.train(layer.training)

    def stages(self) -> tuple[ConvStage, ...]:
        """See :meth:`IntegerConvLayer.stages`."""
        return (
            ConvStage(self.right_codes, self.scale, self.first_geometry),
            ConvStage(self.left_codes, None, self.second_geometry),
        )

    def dense_weight(self) -> Tensor:
        """Give the kernel (out, in / groups, *kernel) float32, multiplied in float64."""
        return RoundedKernels(self.left_codes, self.right_codes, self.scale, 0.0).dense(self.groups).float()

    def _weight_only(self, x: Tensor, bias: Tensor | None) -> Tensor:
        scale = self.scale.to(x.dtype).view(-1, *(1 for _ in self.right_codes.shape[1:]))
        y = float_conv(x, self.right_codes.to(x.dtype).mul_(scale), None, self.first_geometry)
        return float_conv(y, self.left_codes.to(x.dtype), bias, self.second_geometry)

    def _dequantized(self) -> SVDCompressedConv:
        arguments = self._as_arguments(self.geometry, self.in_channels, self.out_channels)
        arguments |= {"bias": self.bias is not None, "rank": self.rank, "scheme": self.scheme, "dtype": self.dtype}
        layer = self._float_kind._allocate(arguments, self.left_codes.device)
        root = self.scale.double().sqrt()
        ones = (1,) * self.dims
        # Of each output, the roots of its own group's components.
        of_outputs = root.view(self.groups, self.rank).repeat_interleave(self.out_channels // self.groups, dim=0)
        with torch.no_grad():
            layer.left.copy_(self.left_codes.double() * of_outputs.view(self.out_channels, self.rank, *ones))
            layer.right.copy_(self.right_codes.double() * root.view(-1, 1, *ones))
            if self.bias is not None and layer.bias is not None:
                layer.bias.copy_(self.bias)
                layer.bias.requires_grad_(self.bias.requires_grad)
        return layer.train(self.training)

    def _of_kernels(self: _Layer, factors: ConvFactors) -> _Layer:
        return self._of_codes(*round_kernels(factors.first, factors.second, self.groups, self.n_bits)[:3])

    def _from_floats(self: _Layer, floats: Any) -> _Layer:
        return self.from_factors(floats, bits=self.n_bits, activations=self.activations)


class QuantizedLowRankConv1d(QuantizedLowRankConv):
    """``nn.Conv1d`` as two convolutions of int8 codes; as :class:`QuantizedLowRankConv2d`, in the channel form only.

    Example:
        >>> layer = QuantizedLowRankConv1d.from_conv1d(nn.Conv1d(4, 6, 3, padding=1), rank=2)
        >>> layer(torch.zeros(1, 4, 9)).shape
        torch.Size([1, 6, 9])
    """

    dims: ClassVar[int] = 1
    _float_kind: ClassVar[type[SVDCompressedConv]] = SVDCompressedConv1d

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
        bits: int = 8,
        activations: str = INTEGER_ACTIVATIONS,
    ) -> QuantizedLowRankConv1d:
        """As :meth:`QuantizedLowRankConv2d.from_conv2d`."""
        return cls._from_conv(conv, rank, max_error, scheme, statistics, ridge, bits, activations)

    def dequantize(self) -> SVDCompressedConv1d:
        """Make a low-rank convolution of the rounded factors, in the dtype of the model."""
        layer = self._dequantized()
        assert isinstance(layer, SVDCompressedConv1d)
        return layer


class QuantizedLowRankConv2d(QuantizedLowRankConv):
    """``nn.Conv2d`` as two convolutions of int8 codes: ``y = conv(scale · conv(x, right_codes), left_codes) + bias``.

    What lies between the two is rounded too, sample by sample, where activations are ``"int8"``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: as of ``nn.Conv2d``.
        rank, scheme: as of :class:`SVDCompressedConv2d`.
        n_bits: bits of a code, 2 to 8; each is stored in a byte.
        activations: ``"int8"`` or ``"float"``, as of :class:`QuantizedConv2d`.
        device: of all tensors.
        dtype: of the bias.

    Attributes:
        right_codes: (rank · groups, in / groups, *kernel) int8 buffer, of the first convolution.
        left_codes: (out, rank, *kernel) int8 buffer, of the second.
        scale: (rank · groups,) float32 buffer.

    Raises:
        RankError: a rank, size, number of groups or of bits out of range.
        UsageError: an unknown form or activations, or a geometry out of range.

    Example:
        >>> layer = QuantizedLowRankConv2d.from_conv2d(nn.Conv2d(4, 6, 3), rank=2, scheme="spatial")
        >>> layer(torch.zeros(1, 4, 9, 9)).shape, layer.stored_bytes
        (torch.Size([1, 6, 7, 7]), 92)
    """

    dims: ClassVar[int] = 2
    _float_kind: ClassVar[type[SVDCompressedConv]] = SVDCompressedConv2d

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
        bits: int = 8,
        activations: str = INTEGER_ACTIVATIONS,
    ) -> QuantizedLowRankConv2d:
        """Factor, then round; with ``max_error`` the smallest rank whose rounded kernel is within it.

        Args:
            conv: ``nn.Conv2d``.
            rank, max_error, scheme, statistics, ridge: as :meth:`SVDCompressedConv2d.from_conv2d`.
            bits: 2 to 8.
            activations: ``"int8"`` or ``"float"``.

        Raises:
            RankError: rank or bits out of range, or no rank is within ``max_error``.
            UsageError: not an ``nn.Conv2d``, or an unknown form.
            NumericsError: NaN or Inf in the weight.
        """
        return cls._from_conv(conv, rank, max_error, scheme, statistics, ridge, bits, activations)

    def dequantize(self) -> SVDCompressedConv2d:
        """Make a low-rank convolution of the rounded factors, in the dtype of the model."""
        layer = self._dequantized()
        assert isinstance(layer, SVDCompressedConv2d)
        return layer
