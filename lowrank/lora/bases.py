"""What an adapter needs to know of the layer under it, whatever its kind; weights always as (out, in, *kernel).

An embedding counts as a linear layer on one-hot inputs: out is the embedding dimension, in the number of rows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lowrank.errors import RankError
from lowrank.layers import (
    CompressedLayer,
    LowRankEmbedding,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedLowRankEmbedding,
    QuantizedLowRankLayer,
    SVDCompressedLinear,
)
from lowrank.layers.conv import FactoredConv, SVDCompressedConv
from lowrank.layers.conv_base import ConvLayer
from lowrank.layers.conv_codes import QuantizedConv
from lowrank.layers.conv_factor_codes import QuantizedLowRankConv
from lowrank.layers.source import is_conv1d

__all__ = [
    "BaseFacts",
    "adapter_dtype",
    "base_bias",
    "base_weight",
    "exact_weight",
    "facts_of",
    "factor_pair",
    "family",
    "largest_rank",
    "require_rank",
    "row_norms",
]

LINEAR_KINDS = (SVDCompressedLinear, QuantizedLowRankLayer, QuantizedLinear)
EMBEDDING_KINDS = (LowRankEmbedding, QuantizedEmbedding, QuantizedLowRankEmbedding)


class BaseFacts(NamedTuple):
    """Sizes and whereabouts of a base layer."""

    in_features: int
    out_features: int
    device: torch.device
    dtype: torch.dtype


def family(module: nn.Module) -> str | None:
    """``"linear"``, ``"conv1d"``, ``"conv2d"`` or ``"embedding"``: the adapter that fits; ``None`` where none does.

    Example:
        >>> family(nn.Linear(2, 2)), family(nn.ReLU())
        ('linear', None)
    """
    if isinstance(module, (nn.Linear, *LINEAR_KINDS)) or is_conv1d(module):
        return "linear"
    if isinstance(module, (nn.Embedding, *EMBEDDING_KINDS)):
        return "embedding"
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return "conv1d" if isinstance(module, nn.Conv1d) else "conv2d"
    if isinstance(module, ConvLayer):
        return "conv1d" if module.dims == 1 else "conv2d"
    return None


def base_weight(base: nn.Module) -> Tensor:
    """The weight (out, in, *kernel) that a layer stands for, without a gradient; a view where the layer is dense."""
    if isinstance(base, CompressedLayer):
        dense = base.dense_weight().detach()
        return dense.T if isinstance(base, EMBEDDING_KINDS) else dense
    weight = base.weight
    assert isinstance(weight, Tensor)
    return weight.detach().T if is_conv1d(base) or isinstance(base, nn.Embedding) else weight.detach()


def exact_weight(base: nn.Module) -> Tensor:
    """The weight (out, in, *kernel) in float64, products of factors and of codes and scales not rounded on the way."""
    pair = factor_pair(base, torch.float64)
    if pair is not None:
        product = pair[0] @ pair[1]
        return product.view(base.shape) if isinstance(base, ConvLayer) else product
    if isinstance(base, (QuantizedLinear, QuantizedEmbedding, QuantizedConv)):
        weight = base.codes.double() * base.scale.double().view(-1, *[1] * (base.codes.ndim - 1))
        return weight.T if isinstance(base, QuantizedEmbedding) else weight
    return base_weight(base).double()


def base_bias(base: nn.Module) -> Tensor | None:
    """The bias (out,), or ``None``."""
    bias = getattr(base, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def facts_of(base: nn.Module) -> BaseFacts:
    """Features, device and dtype of a base layer."""
    if isinstance(base, CompressedLayer):
        rows, columns = base.shape[0], base.shape[1]
        if isinstance(base, EMBEDDING_KINDS):
            rows, columns = columns, rows
        elif isinstance(base, ConvLayer):
            columns = base.in_channels
        tensor = next(iter(base.state_dict().values()))
        return BaseFacts(columns, rows, tensor.device, base.dtype)
    weight = base.weight
    assert isinstance(weight, Tensor)
    if isinstance(base, (nn.Conv1d, nn.Conv2d)):
        return BaseFacts(base.in_channels, base.out_channels, weight.device, weight.dtype)
    rows, columns = base_weight(base).shape
    return BaseFacts(columns, rows, weight.device, weight.dtype)


def adapter_dtype(base: nn.Module) -> torch.dtype:
    """Of the adapter's parameters: the base's, but float32 over half precision, as PEFT has it."""
    dtype = facts_of(base).dtype
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def factor_pair(base: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """``left`` (out, rank) and ``right`` (rank, in · kernel) of a factored layer; ``None`` where a layer is no such product.

    Of convolutions those in the channel form are, without groups.
    """
    if isinstance(base, FactoredConv) and (base.scheme != "channel" or base.groups > 1):
        return None
    if isinstance(base, SVDCompressedConv):
        return base.left.detach().to(dtype).flatten(1), base.right.detach().to(dtype).flatten(1)
    if isinstance(base, QuantizedLowRankConv):
        return base.left_codes.to(dtype).flatten(1) * base.scale.to(dtype), base.right_codes.to(dtype).flatten(1)
    if isinstance(base, SVDCompressedLinear):
        return base.left.detach().to(dtype), base.right.detach().to(dtype)
    if isinstance(base, LowRankEmbedding):
        return base.right.detach().to(dtype).T, base.left.detach().to(dtype).T
    if isinstance(base, (QuantizedLowRankLayer, QuantizedLowRankEmbedding)):
        left, right = base.left_codes.to(dtype) * base.scale.to(dtype), base.right_codes.to(dtype)
        return (right.T, left.T) if isinstance(base, QuantizedLowRankEmbedding) else (left, right)
    return None


def row_norms(base: nn.Module, left: Tensor, right: Tensor) -> Tensor:
    """Norms (out,) of the rows of ``W + left @ right``, without the dense W where the base is factored.

    For W = LR the squared norms are the diagonal of ``[L, left] G [L, left]ᵀ`` with G the gram of ``[R; right]``.

    Args:
        base: the layer that holds W (out, in, *kernel).
        left: (out, r).
        right: (r, in · kernel).
    """
    pair = factor_pair(base, left.dtype)
    if pair is None:
        weight = exact_weight(base) if left.dtype is torch.float64 else base_weight(base).to(left.dtype)
        norms: Tensor = torch.linalg.vector_norm(weight.flatten(1) + left @ right, dim=1)
        return norms
    lefts, rights = torch.cat([pair[0], left], dim=1), torch.cat([pair[1], right])
    return ((lefts @ (rights @ rights.T)) * lefts).sum(dim=1).clamp_min(0.0).sqrt()


def largest_rank(base: nn.Module) -> int:
    """min(out, in · kernel): beyond it an adapter has more components than the weight can use."""
    if isinstance(base, CompressedLayer):
        return min(base.shape[0], math.prod(base.shape[1:]))
    return min(base_weight(base).flatten(1).shape)


def require_rank(base: nn.Module, rank: int, name: str) -> None:
    """Refuse a rank r whose adapter, ``r · (out + in · kernel)`` numbers, would hold over max(16 · weight, 2²⁰) of them.

    Ranks over :func:`largest_rank` mean nothing but are harmless; this one keeps a slip from taking all memory.

    Args:
        base: the layer.
        rank: of its adapter.
        name: of the layer, for the message.

    Raises:
        RankError: over the limit.

    Example:
        >>> require_rank(nn.Linear(64, 10), 10**12, "head")
        Traceback (most recent call last):
            ...
        lowrank.errors.RankError: r: layer head: must be between 1 and 14,169, got 1,000,000,000,000; ...
    """
    rows, *others = base.shape if isinstance(base, CompressedLayer) else base_weight(base).shape
    columns = math.prod(others)
    limit = max(16 * rows * columns, 2**20) // max(rows + columns, 1)
    if rank > limit:
        # Python refuses to print integers of thousands of digits.
        given = f"{rank:,}" if rank < 10**30 else "a number of over 30 digits"
        raise RankError(
            f"r: layer {name}: must be between 1 and {limit:,}, got {given}; an adapter may hold 16 times the numbers of its "
            f"layer, or {2**20:,} where that is more"
        )
