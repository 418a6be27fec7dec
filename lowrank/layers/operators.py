"""The integer layers as operators that a graph can hold: for ``torch.compile`` without breaks and ``torch.export``.

An operator is given the codes and scales themselves, so that an exported program carries them; its body is the
layer's own product, so that a graph gives what eager gives, bit for bit. The derivative is that of the layer: as if
activations had not been rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lowrank.kernels import IntegerConv
from lowrank.kernels.packed import PackedWeight
from lowrank.layers.conv_integer import input_gradient
from lowrank.layers.embedding_codes import QuantizedLowRankEmbedding
from lowrank.layers.linear_codes import QuantizedLinear
from lowrank.layers.linear_factor_codes import QuantizedLowRankLayer
from lowrank.layers.linear_integer import IntegerLinear
from lowrank.layers.linear_packed import packed_input_gradient
from lowrank.numerics.convolutions import ConvGeometry
from lowrank.numerics.rounding_methods import Grid

__all__: list[str] = []

# What was made for the tensors of a graph, so that what is derived from codes is derived once. It holds aliases: the
# entry goes when the graph's own tensor goes.
_made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _kept(build: Callable[..., Any], *tensors: Tensor, more: tuple[Any, ...] = ()) -> Any:
    """``build(*tensors, *more)``, made anew when a tensor is another one or was written to."""
    entries = _made.setdefault(tensors[0], {})
    state = [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]
    kept = entries.get((build, more))
    if kept is None or kept[0] != state:
        aliases = [tensor.detach() for tensor in tensors]
        # The aliases keep the memory, so that its address stays a name for it.
        entries[(build, more)] = kept = (state, build(*aliases, *more), aliases)
    return kept[1]


def _linear(
    build: Callable[..., Any], x: Tensor, tensors: tuple[Tensor, ...], bias: Tensor | None, mode: str
) -> Tensor:
    layer: IntegerLinear = _kept(build, *tensors)
    if layer.activations != mode:
        layer.activations = mode
    with torch.no_grad():
        return _own(layer._product(x, bias))


def _own(result: Tensor) -> Tensor:
    """Not a view into something larger, as an operator's result has to be."""
    return result if result.storage_offset() == 0 else result.clone()


@torch.library.custom_op("lowrank::int8_linear", mutates_args=())
def int8_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, activations: str) -> Tensor:
    """:class:`QuantizedLinear`: (..., in) to (..., out) of the same dtype."""
    return _linear(QuantizedLinear.from_tensors, x, (codes, scale), bias, activations)


@torch.library.custom_op("lowrank::lowrank_int8_linear", mutates_args=())
def lowrank_int8_linear(
    x: Tensor, left_codes: Tensor, right_codes: Tensor, scale: Tensor, bias: Tensor | None, activations: str
) -> Tensor:
    """:class:`QuantizedLowRankLayer`: (..., in) to (..., out) of the same dtype."""
    return _linear(QuantizedLowRankLayer.from_tensors, x, (left_codes, right_codes, scale), bias, activations)


@torch.library.custom_op("lowrank::packed_linear", mutates_args=())
def packed_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
) -> Tensor:
    """:class:`PackedLinear`: (..., in) to (..., out) of the same dtype; a group of 0 is a whole row."""
    tensors = (codes, scale) if zero_point is None else (codes, scale, zero_point)
    weight: PackedWeight = _kept(_packed_weight, *tensors, more=(bits, group or None, x.shape[-1]))
    with torch.no_grad():
        working = x if x.dtype in (torch.float32, torch.float64) else x.float()
        cast = None if bias is None else bias.to(working.dtype)
        return _own(weight.product(working, cast).to(x.dtype))


def _packed_weight(*parts: Any) -> PackedWeight:
    *tensors, bits, group, columns = parts
    return PackedWeight(*tensors, bits=bits, group=group, columns=columns)


@packed_linear.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _remember_packed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scale, zero_point, bias, bits, group = inputs
    ctx.save_for_backward(codes, scale, zero_point)
    ctx.columns, ctx.bias_dtype = x.shape[-1], None if bias is None else bias.dtype
    ctx.grid = Grid(bits, group or None, zero_point is not None)


def _packed_derivative(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    codes, scale, zero_point = ctx.saved_tensors
    rows = gradient.reshape(-1, gradient.shape[-1])
    to_input = to_bias = None
    if ctx.needs_input_grad[0]:
        to_input = packed_input_gradient(rows, codes, scale, zero_point, ctx.grid, ctx.columns)
        to_input = to_input.reshape(*gradient.shape[:-1], ctx.columns)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[4]:
        to_bias = rows.sum(dim=0).to(ctx.bias_dtype)
    return to_input, None, None, None, to_bias, None, None


packed_linear.register_autograd(_packed_derivative, setup_context=_remember_packed)


@torch.library.custom_op("lowrank::lowrank_int8_embedding", mutates_args=())
def lowrank_int8_embedding(
    ids: Tensor, left_codes: Tensor, right_codes: Tensor, scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """:class:`QuantizedLowRankEmbedding`: (...) to (..., embedding_dim) of this dtype."""
    layer: QuantizedLowRankEmbedding = _kept(QuantizedLowRankEmbedding.from_tensors, left_codes, right_codes, scale)
    return _own(layer.looked_up(ids, dtype))


@torch.library.custom_op("lowrank::int8_conv", mutates_args=())
def int8_conv(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Make one stage of an :class:`IntegerConvLayer`: (B, in, *size) float32 to (B, out, *output size), zeros around."""
    geometry = _geometry(codes, stride, padding, dilation, groups)
    kernel: IntegerConv = _kept(IntegerConv, codes, scale, more=(geometry,))
    return _own(kernel.product(x, bias))


def _geometry(
    codes: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> ConvGeometry:
    return ConvGeometry(
        tuple(int(size) for size in codes.shape[2:]), tuple(stride), tuple(padding), tuple(dilation), groups
    )


@int8_conv.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    # Written out: geometry's own checks would put guards on sizes that a graph leaves open.
    size = [
        (length + 2 * margin - step * (kernel - 1) - 1) // hop + 1
        for length, margin, step, kernel, hop in zip(
            x.shape[2:], padding, dilation, codes.shape[2:], stride, strict=True
        )
    ]
    return x.new_empty(x.shape[0], codes.shape[0], *size)


@int8_linear.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, activations: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@lowrank_int8_linear.register_fake
def _(x: Tensor, left_codes: Tensor, right_codes: Tensor, scale: Tensor, bias: Tensor | None, mode: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], left_codes.shape[0])


@lowrank_int8_embedding.register_fake
def _(ids: Tensor, left_codes: Tensor, right_codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return ids.new_empty(*ids.shape, right_codes.shape[1], dtype=dtype)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *tensors, bias, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _derivative(kind: type[IntegerLinear]) -> Callable[[Any, Tensor], tuple[Tensor | None, ...]]:
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows = gradient.reshape(-1, gradient.shape[-1])
        to_input = to_bias = None
        saved = ctx.saved_tensors
        if ctx.needs_input_grad[0]:
            to_input = kind.input_gradient(rows, *saved)
            to_input = to_input.reshape(*gradient.shape[:-1], to_input.shape[-1])
        if ctx.bias_dtype is not None and ctx.needs_input_grad[-2]:
            to_bias = rows.sum(dim=0).to(ctx.bias_dtype)
        return (to_input, *(None for _ in saved), to_bias, None)

    return backward


int8_linear.register_autograd(_derivative(QuantizedLinear), setup_context=_remember)
lowrank_int8_linear.register_autograd(_derivative(QuantizedLowRankLayer), setup_context=_remember)


def _remember_conv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scale, bias, stride, padding, dilation, groups = inputs
    ctx.save_for_backward(codes, scale)
    ctx.size, ctx.biased = x.shape, bias is not None
    ctx.geometry = _geometry(codes, stride, padding, dilation, groups)


def _conv_derivative(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    to_input = to_bias = None
    if ctx.needs_input_grad[0]:
        codes, scale = ctx.saved_tensors
        to_input = input_gradient(gradient, codes, scale, ctx.geometry, ctx.size)
    if ctx.biased and ctx.needs_input_grad[3]:
        to_bias = gradient.transpose(0, 1).flatten(1).sum(dim=1)
    return to_input, None, None, to_bias, None, None, None, None


int8_conv.register_autograd(_conv_derivative, setup_context=_remember_conv)
