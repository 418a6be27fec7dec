"""The integer layers as operators that a graph can hold: for ``torch.compile`` without breaks and ``torch.export``.

An operator is given the codes and scales themselves, so that an exported program carries them; its body is the
layer's own product, so that a graph gives what eager gives, bit for bit. The derivative is that of the layer: as if
activations had not been rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lowrank.layers.integer import IntegerLinear
from lowrank.layers.quantized import QuantizedLinear
from lowrank.layers.quantized_embedding import QuantizedLowRankEmbedding
from lowrank.layers.quantized_lowrank import QuantizedLowRankLayer

__all__: list[str] = []

# Layers made for the tensors of a graph, so that what a layer derives from its codes is derived once. They hold
# aliases: the entry goes when the graph's own tensor goes.
_layers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _layer(build: Callable[..., Any], *tensors: Tensor) -> Any:
    first = tensors[0]
    kept = _layers.get(first, {}).get(build)
    if kept is not None and all(a.data_ptr() == b.data_ptr() for a, b in zip(kept[1], tensors, strict=True)):
        return kept[0]
    aliases = tuple(tensor.detach() for tensor in tensors)
    layer = build(*aliases)
    _layers.setdefault(first, {})[build] = (layer, aliases)
    return layer


def _linear(
    build: Callable[..., Any], x: Tensor, tensors: tuple[Tensor, ...], bias: Tensor | None, mode: str
) -> Tensor:
    layer: IntegerLinear = _layer(build, *tensors)
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


@torch.library.custom_op("lowrank::lowrank_int8_embedding", mutates_args=())
def lowrank_int8_embedding(
    ids: Tensor, left_codes: Tensor, right_codes: Tensor, scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """:class:`QuantizedLowRankEmbedding`: (...) to (..., embedding_dim) of this dtype."""
    layer: QuantizedLowRankEmbedding = _layer(QuantizedLowRankEmbedding.from_tensors, left_codes, right_codes, scale)
    return _own(layer.looked_up(ids, dtype))


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
        if ctx.needs_input_grad[0]:
            to_input = kind.input_gradient(rows, *ctx.saved_tensors)
            to_input = to_input.reshape(*gradient.shape[:-1], to_input.shape[-1])
        if ctx.bias_dtype is not None and ctx.needs_input_grad[-2]:
            to_bias = rows.sum(dim=0).to(ctx.bias_dtype)
        return (to_input, *(None for _ in ctx.saved_tensors), to_bias, None)

    return backward


int8_linear.register_autograd(_derivative(QuantizedLinear), setup_context=_remember)
lowrank_int8_linear.register_autograd(_derivative(QuantizedLowRankLayer), setup_context=_remember)
