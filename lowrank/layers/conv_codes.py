"""A convolution as int8 codes with one scale an output channel."""

from __future__ import annotations

from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from lowrank.layers.checks import INTEGER_ACTIVATIONS, check_activations
from lowrank.layers.conv_base import Sizes, conv_parts, float_conv
from lowrank.layers.conv_integer import ConvStage, IntegerConvLayer
from lowrank.layers.weights import RowCodes
from lowrank.numerics.rounding import quantize_rows

__all__ = ["QuantizedConv1d", "QuantizedConv2d"]

_Layer = TypeVar("_Layer", bound="QuantizedConv")


class QuantizedConv(RowCodes, IntegerConvLayer):
    """``y = scale · conv(x, codes) + bias``; see :class:`QuantizedConv2d`."""

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
        n_bits: int = 8,
        activations: str = INTEGER_ACTIVATIONS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._set_geometry(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        self.activations = check_activations(activations)
        self._allocate_codes({"codes": self.shape}, out_channels, n_bits, device)
        self.allocate_bias(bias, device, dtype)

    @classmethod
    def _from_conv(cls: type[_Layer], conv: nn.Module, bits: int, activations: str) -> _Layer:
        weight, bias, geometry = conv_parts(conv, cls.dims)
        codes, scale = quantize_rows(weight.flatten(1), bits)
        arguments = cls._as_arguments(geometry, weight.shape[1] * geometry.groups, weight.shape[0])
        arguments |= {"bias": bias is not None, "n_bits": bits, "activations": activations}
        layer = cls(**arguments, device=weight.device, dtype=weight.dtype)
        layer.codes, layer.scale = codes.view(weight.shape), scale
        layer.take_bias(bias)
        layer._bound_error_from(weight)
        return layer.train(conv.training)

    def stages(self) -> tuple[ConvStage, ...]:
        """See :meth:`IntegerConvLayer.stages`."""
        return (ConvStage(self.codes, self.scale, self.geometry),)

    def _weight_only(self, x: Tensor, bias: Tensor | None) -> Tensor:
        weight = self.codes.to(x.dtype).mul_(self.scale.to(x.dtype).view(-1, *(1 for _ in self.shape[1:])))
        return float_conv(x, weight, bias, self.geometry)

    def _from_floats(self: _Layer, floats: nn.Module) -> _Layer:
        return self._from_conv(floats, self.n_bits, self.activations)


class QuantizedConv1d(QuantizedConv):
    """``nn.Conv1d`` with int8 codes; as :class:`QuantizedConv2d`.

    Example:
        >>> layer = QuantizedConv1d.from_conv1d(nn.Conv1d(4, 6, 3, padding=1))
        >>> layer(torch.zeros(1, 4, 9)).shape
        torch.Size([1, 6, 9])
    """

    dims: ClassVar[int] = 1

    @classmethod
    def from_conv1d(cls, conv: nn.Module, *, bits: int = 8, activations: str = INTEGER_ACTIVATIONS) -> QuantizedConv1d:
        """As :meth:`QuantizedConv2d.from_conv2d`."""
        return cls._from_conv(conv, bits, activations)

    def dequantize(self) -> nn.Conv1d:
        """Make a dense convolution of the rounded kernel, in the dtype of the model."""
        conv = self._dense(self.codes.device)
        assert isinstance(conv, nn.Conv1d)
        return conv


class QuantizedConv2d(QuantizedConv):
    """``y = scale · conv(x, codes) + bias``: the kernel is ``codes · scale``, one scale an output channel.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: as of ``nn.Conv2d``.
        n_bits: bits of a code, 2 to 8; each is stored in a byte.
        activations: ``"int8"`` rounds each sample (one step, one offset) and multiplies integers; ``"float"`` makes the
            kernel a float one on each call (weight-only).
        device: of all tensors.
        dtype: of the bias.

    Attributes:
        codes: (out, in / groups, *kernel) int8 buffer.
        scale: (out,) float32 buffer.

    Raises:
        RankError: a size, number of groups or number of bits out of range.
        UsageError: unknown activations, or a geometry out of range.

    Example:
        >>> layer = QuantizedConv2d.from_conv2d(nn.Conv2d(4, 6, 3, padding="same"))
        >>> layer(torch.zeros(1, 4, 9, 9)).shape, layer.stored_bytes
        (torch.Size([1, 6, 9, 9]), 264)
    """

    dims: ClassVar[int] = 2

    @classmethod
    def from_conv2d(cls, conv: nn.Module, *, bits: int = 8, activations: str = INTEGER_ACTIVATIONS) -> QuantizedConv2d:
        """Round the kernel of ``nn.Conv2d``, one scale an output channel.

        Raises:
            RankError: bits outside 2 to 8.
            UsageError: not an ``nn.Conv2d``.
            NumericsError: NaN or Inf in the weight.
        """
        return cls._from_conv(conv, bits, activations)

    def dequantize(self) -> nn.Conv2d:
        """Make a dense convolution of the rounded kernel, in the dtype of the model."""
        conv = self._dense(self.codes.device)
        assert isinstance(conv, nn.Conv2d)
        return conv
