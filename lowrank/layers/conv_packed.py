"""Convolutions of packed codes of 2 to 8 bits, in groups along the flattened kernel."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from lowrank.layers.checks import FLOAT_ACTIVATIONS
from lowrank.layers.conv_base import ConvLayer, Sizes, conv_parts, float_conv
from lowrank.layers.integer_base import IntegerLayer, in_autocast_type
from lowrank.layers.packed import PackedCodes
from lowrank.numerics.rounding_methods import NEAREST, ROUNDINGS, Grid, Rounded

__all__ = ["PackedConv1d", "PackedConv2d"]

_Layer = TypeVar("_Layer", bound="PackedConv")


class PackedConv(PackedCodes, ConvLayer, IntegerLayer):
    """``y = conv(x, scale · (code − zero)) + bias``; see :class:`PackedConv2d`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        n_bits: int = 4,
        group: int | None = 64,
        zero_point: bool = False,
        activations: str = FLOAT_ACTIVATIONS,
        scale_dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._set_geometry(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        self.activations = activations
        self._allocate_packed(Grid(n_bits, group, zero_point), scale_dtype, device)
        self.allocate_bias(bias, device, dtype)

    @classmethod
    def _from_conv(
        cls: type[_Layer], conv: nn.Module, bits: int, group: int | None, zero_point: bool, rounding: str
    ) -> _Layer:
        weight, grid = conv_parts(conv, cls.dims)[0], Grid(bits, group, zero_point)
        return cls.from_rounded(ROUNDINGS[rounding](weight.flatten(1), grid), conv, grid=grid)

    @classmethod
    def from_rounded(cls: type[_Layer], rounded: Rounded, conv: nn.Module, *, grid: Grid) -> _Layer:
        """Make the layer of codes (out, in / groups · kernel) that were chosen for a convolution, whose bias is copied."""
        weight, bias, geometry = conv_parts(conv, cls.dims)
        arguments = cls._as_arguments(geometry, weight.shape[1] * geometry.groups, weight.shape[0])
        layer = cls(
            **arguments,
            bias=bias is not None,
            n_bits=grid.bits,
            group=grid.group,
            zero_point=grid.zero_point,
            scale_dtype=rounded.scale.dtype,
            device="meta",
            dtype=weight.dtype,
        )
        layer._hold(rounded, weight)
        layer.allocate_bias(bias is not None, weight.device, weight.dtype)
        layer.take_bias(bias)
        return layer.train(conv.training)

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, in, *size) to (B, out, *output size) of the same dtype, or both without B; computed in float32 (float64 in
        float64).

        The kernel is decoded once a call: it is small beside the image that it meets at every position.
        """
        batched = self._batched(input)
        working = torch.float64 if input.dtype == torch.float64 else torch.float32
        x = batched if batched.dtype == working else batched.to(working)
        bias = self.bias if self.bias is None or self.bias.dtype == working else self.bias.to(working)
        y = float_conv(x, self.dense_weight().to(working), bias, self.geometry)
        y = in_autocast_type(y if y.dtype == input.dtype else y.to(input.dtype))
        return y if batched is input else y[0]

    def _from_floats(self: _Layer, floats: Any) -> _Layer:
        return self.from_rounded(self._nearest_here(floats.weight), floats, grid=self.grid)


class PackedConv1d(PackedConv):
    """``nn.Conv1d`` of packed codes; as :class:`PackedConv2d`.

    Example:
        >>> layer = PackedConv1d.from_conv1d(nn.Conv1d(4, 6, 3, padding=1))
        >>> layer(torch.zeros(1, 4, 9)).shape
        torch.Size([1, 6, 9])
    """

    dims: ClassVar[int] = 1

    @classmethod
    def from_conv1d(
        cls,
        conv: nn.Module,
        *,
        bits: int = 4,
        group: int | None = 64,
        zero_point: bool = False,
        rounding: str = NEAREST,
    ) -> PackedConv1d:
        """As :meth:`PackedConv2d.from_conv2d`."""
        return cls._from_conv(conv, bits, group, zero_point, rounding)

    def dequantize(self) -> nn.Conv1d:
        """Make a dense convolution of the rounded kernel, in the dtype of the model."""
        conv = self._dense(self.codes.device)
        assert isinstance(conv, nn.Conv1d)
        return conv


class PackedConv2d(PackedConv):
    """``y = conv(x, W) + bias`` with ``W = scale · (code − zero)`` in groups along each flattened kernel; weight-only.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: as of ``nn.Conv2d``.
        n_bits: bits of a code, 2 to 8.
        group: numbers of a flattened kernel that share a scale: 32, 64, 128, or ``None`` for all of an output channel.
        zero_point: whether each group has a zero of its own.
        activations: ``"float"``; there is no other way.
        scale_dtype: float16 or float32.
        device: of all tensors.
        dtype: of the bias.

    Attributes:
        codes, scale, zero_point, grid: see :class:`PackedCodes`.

    Raises:
        RankError: a size, number of groups or number of bits out of range.
        UsageError: a geometry or group out of range, or other activations.

    Example:
        >>> layer = PackedConv2d.from_conv2d(nn.Conv2d(4, 6, 3, padding="same"), bits=4)
        >>> layer(torch.zeros(1, 4, 9, 9)).shape, layer.stored_bytes
        (torch.Size([1, 6, 9, 9]), 156)
    """

    dims: ClassVar[int] = 2

    @classmethod
    def from_conv2d(
        cls,
        conv: nn.Module,
        *,
        bits: int = 4,
        group: int | None = 64,
        zero_point: bool = False,
        rounding: str = NEAREST,
    ) -> PackedConv2d:
        """Round the kernel of ``nn.Conv2d``.

        Raises:
            RankError: bits outside 2 to 8.
            UsageError: not an ``nn.Conv2d``.
            NumericsError: NaN or Inf in the weight.
        """
        return cls._from_conv(conv, bits, group, zero_point, rounding)

    def dequantize(self) -> nn.Conv2d:
        """Make a dense convolution of the rounded kernel, in the dtype of the model."""
        conv = self._dense(self.codes.device)
        assert isinstance(conv, nn.Conv2d)
        return conv
