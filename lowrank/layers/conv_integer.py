"""What the convolutions with integer codes share: the stages of a forward, and gradients through rounded activations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.grad import conv1d_input, conv2d_input

from lowrank.kernels import IntegerConv
from lowrank.layers.base import graph_is_made
from lowrank.layers.checks import INTEGER_ACTIVATIONS
from lowrank.layers.conv_base import ConvLayer
from lowrank.layers.integer_base import IntegerLayer, in_autocast_type
from lowrank.numerics.convolutions import ConvGeometry, pad_input

__all__ = ["ConvStage", "IntegerConvLayer", "input_gradient", "unpadded"]


class ConvStage(NamedTuple):
    """One convolution of codes: ``scale · conv(x, codes)``; a scale of ``None`` is 1."""

    codes: Tensor
    scale: Tensor | None
    geometry: ConvGeometry


class IntegerConvLayer(ConvLayer, IntegerLayer):
    """Base of the convolutions whose kernel is held as int8 codes.

    Integer forward: each sample is rounded with one step and one offset, so that zero is a code and zeros around the image stay
    exact; the integer sums are exact; they become float32, times the channel's scale, times the sample's step, plus the
    bias. Other margins than zeros are put around the image before it is rounded.
    """

    def stages(self) -> tuple[ConvStage, ...]:
        """Give the convolutions in the order in which they are done."""
        raise NotImplementedError

    def derive(self) -> tuple[IntegerConv, ...]:
        """See :meth:`IntegerLayer.derive`."""
        return tuple(_kernel_of(stage) for stage in self.stages())

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, in, *size) to (B, out, *output size) of the same dtype, or both without B; computed in float32 (weight-only
        float64 in float64).

        Gradients reach the input, as if its rounding were not there, and the bias.
        """
        batched = self._batched(input)
        rounded = self.activations == INTEGER_ACTIVATIONS
        working = torch.float64 if input.dtype == torch.float64 and not rounded else torch.float32
        y = batched if batched.dtype == working else batched.to(working)
        bias = self.bias if self.bias is None or self.bias.dtype == working else self.bias.to(working)
        y = self._rounded(y, bias) if rounded else self._weight_only(y, bias)
        y = in_autocast_type(y if y.dtype == input.dtype else y.to(input.dtype))
        if _channels_last(batched):
            # As nn.Conv2d does: what comes behind (a pooling layer above all) may be many times slower on another layout.
            y = y.contiguous(memory_format=torch.channels_last)
        return y if batched is input else y[0]

    def _weight_only(self, x: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _rounded(self, x: Tensor, bias: Tensor | None) -> Tensor:
        stages = self.stages()
        kernels: tuple[IntegerConv | None, ...] = (None,) * len(stages) if graph_is_made() else self.prepared()
        last = len(stages) - 1
        for index, (stage, kernel) in enumerate(zip(stages, kernels, strict=True)):
            x = _convolved(x, bias if index == last else None, stage, kernel)
        return x

    def extra_repr(self) -> str:
        """Say what ``repr`` shows."""
        return f"{super().extra_repr()}, bits={self.n_bits}, activations={self.activations}"


def _channels_last(x: Tensor) -> bool:
    """Whether an image batch lies in memory with its channels last, and not (also) as torch lays tensors out by default."""
    return (
        x.ndim == 4
        and x.stride(1) == 1
        and not x.is_contiguous()
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _kernel_of(stage: ConvStage) -> IntegerConv:
    scale = stage.scale
    if scale is None:
        scale = torch.ones(stage.codes.shape[0], dtype=torch.float32, device=stage.codes.device)
    return IntegerConv(stage.codes, scale, unpadded(stage.geometry))


def unpadded(geometry: ConvGeometry) -> ConvGeometry:
    """Give the geometry of an input whose margins, unless they are zeros, have been put around it."""
    if geometry.padding_mode == "zeros":
        return geometry
    return replace(geometry, padding=(0,) * geometry.dims, padding_mode="zeros")


def _convolved(x: Tensor, bias: Tensor | None, stage: ConvStage, kernel: IntegerConv | None) -> Tensor:
    geometry = unpadded(stage.geometry)
    if geometry is not stage.geometry:
        x = pad_input(x, stage.geometry)
    if kernel is None:
        return _in_graph(x, bias, stage, geometry)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        result: Tensor = _StraightThrough.apply(x, bias, kernel, stage.codes, stage.scale, geometry)
        return result
    return kernel.product(x, bias)


def _in_graph(x: Tensor, bias: Tensor | None, stage: ConvStage, geometry: ConvGeometry) -> Tensor:
    """The product as one operator for a graph of torch.compile or torch.export; see :mod:`lowrank.layers.operators`."""
    pads = geometry.pads
    padding = tuple(before for before, _ in pads)
    if any(before != after for before, after in pads):
        # Zeros are exact in every sample's codes, so that those around the image may stand there before it is rounded.
        x, padding = pad_input(x, geometry), (0,) * geometry.dims
    scale = stage.scale
    if scale is None:
        scale = torch.ones(stage.codes.shape[0], dtype=torch.float32, device=stage.codes.device)
    sizes = geometry.stride, padding, geometry.dilation
    result: Tensor = torch.ops.lowrank.int8_conv(x, stage.codes, scale, bias, *sizes, geometry.groups)
    return result


class _StraightThrough(torch.autograd.Function):
    """The product forward; backward as if activations had not been rounded, with the exact codes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        kernel: IntegerConv,
        codes: Tensor,
        scale: Tensor | None,
        geometry: ConvGeometry,
    ) -> Tensor:
        ctx.save_for_backward(codes, scale)
        ctx.size, ctx.geometry = x.shape, geometry
        return kernel.product(x, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale = ctx.saved_tensors
        to_input = to_bias = None
        if ctx.needs_input_grad[0]:
            to_input = input_gradient(gradient, codes, scale, ctx.geometry, ctx.size)
        if ctx.needs_input_grad[1]:
            to_bias = gradient.transpose(0, 1).flatten(1).sum(dim=1)
        return to_input, to_bias, None, None, None, None


def input_gradient(
    gradient: Tensor, codes: Tensor, scale: Tensor | None, geometry: ConvGeometry, size: torch.Size
) -> Tensor:
    """Say what reaches the input (B, in, *size) of a convolution with zeros around, from what reached its output.

    Args:
        gradient: (B, out, *output size) float32.
        codes: (out, in / groups, *kernel) int8.
        scale: (out,) float32, or ``None`` for ones.
    """
    if scale is not None:
        gradient = gradient * scale.view(-1, *(1 for _ in geometry.kernel_size))
    padded = [length + before + after for length, (before, after) in zip(size[2:], geometry.pads, strict=True)]
    function = (conv1d_input, conv2d_input)[geometry.dims - 1]
    found: Tensor = function(
        [*size[:2], *padded],
        codes.to(gradient.dtype),
        gradient,
        stride=geometry.stride,
        dilation=geometry.dilation,
        groups=geometry.groups,
    )
    for dim, (before, _) in enumerate(geometry.pads):
        found = found.narrow(2 + dim, before, size[2 + dim])
    return found
