"""What an adapter needs of the layer under it, dense or compressed: its weight, and the same layer with another one.

Weights are (out, in, *kernel) here. An embedding counts as a linear layer on one-hot inputs: out is the embedding
dimension, in the number of rows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lowrank.errors import AdapterError, RankError
from lowrank.layers import CompressedLayer
from lowrank.layers.source import is_conv1d
from lowrank.numerics.conv_factors import largest_rank
from lowrank.numerics.convolutions import ConvGeometry

__all__ = ["Base", "base_of", "dense_twin", "family"]

_DENSE: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Embedding: "embedding",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
}
_BY_DIMENSIONS = {2: "linear", 3: "conv1d", 4: "conv2d"}


def family(module: nn.Module) -> str | None:
    """Say which adapter fits: ``"linear"``, ``"conv1d"``, ``"conv2d"`` or ``"embedding"``; ``None`` where none does.

    Example:
        >>> family(nn.Linear(2, 2)), family(nn.ReLU())
        ('linear', None)
    """
    if isinstance(module, CompressedLayer):
        if not module.is_one_weight:
            return None
        return "embedding" if module.looks_up else _BY_DIMENSIONS.get(len(module.shape))
    if is_conv1d(module):
        return "linear"
    return next((name for kind, name in _DENSE.items() if isinstance(module, kind)), None)


def base_of(layer: nn.Module) -> Base:
    """Look at a layer as an adapter's base.

    Raises:
        AdapterError: a module that no adapter fits.

    Example:
        >>> base = base_of(nn.Linear(64, 10))
        >>> base.family, base.shape, base.largest_rank
        ('linear', (10, 64), 10)
    """
    kind = family(layer)
    if kind is None:
        raise AdapterError(f"{type(layer).__name__}: no adapter fits this kind of module")
    return _Compressed(layer, kind) if isinstance(layer, CompressedLayer) else _Dense(layer, kind)


def dense_twin(layer: CompressedLayer, parts: Mapping[str, Tensor]) -> nn.Module:
    """Make the torch layer that a compressed embedding or linear layer stands for, with numbers of a file; frozen.

    Args:
        layer: of the family ``"embedding"`` or ``"linear"``.
        parts: ``weight`` and ``bias``; what is missing is the layer's own.

    Example:
        >>> from lowrank.layers import QuantizedLinear
        >>> dense_twin(QuantizedLinear(4, 2), {"weight": torch.ones(2, 4)}).weight.sum()
        tensor(8.)
    """
    rows, columns = layer.shape
    device = next(iter(layer.state_dict().values())).device
    made: nn.Module
    if layer.looks_up:
        padding = getattr(layer, "padding_idx", None)
        made = nn.Embedding(rows, columns, padding, device=device, dtype=layer.dtype)
    else:
        has_bias = layer._parameters.get("bias") is not None
        made = nn.Linear(columns, rows, bias=has_bias, device=device, dtype=layer.dtype)
    with torch.no_grad():
        for part, own in made.named_parameters():
            given = parts.get(part)
            if given is None:
                given = layer.dense_weight() if part == "weight" else layer.get_parameter(part)
            own.copy_(given)
    return made.requires_grad_(False).train(layer.training)


class Base:
    """A layer as its adapters see it; holds no tensor, so that it may be made anew wherever it is needed.

    Attributes:
        layer: itself.
        family: which adapter fits.
        is_compressed: whether it stands in for a dense layer.
    """

    is_compressed = False

    def __init__(self, layer: nn.Module, kind: str) -> None:
        self.layer, self.family = layer, kind

    # What dense and compressed layers differ in

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in / groups, *kernel)."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """Of the model around it; scales may differ."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        raise NotImplementedError

    def weight(self) -> Tensor:
        """Give the weight (out, in, *kernel) without a gradient; a view where the layer is dense."""
        raise NotImplementedError

    def exact_weight(self) -> Tensor:
        """Give the weight (out, in, *kernel) in float64, products of factors, codes and scales not rounded on the way."""
        raise NotImplementedError

    @property
    def has_codes(self) -> bool:
        """Whether it holds integer codes, which take no gradient."""
        return False

    @property
    def format(self) -> str | None:
        """What it is stored as; ``None`` for a dense layer."""
        return None

    @property
    def rank(self) -> int | None:
        """Number of its components; ``None`` without factors."""
        return None

    @property
    def scheme(self) -> str | None:
        """How a convolution's kernel is cut in two; ``None`` where it is not."""
        return None

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Compute ``left`` (out, rank) and ``right`` (rank, in · kernel), whose product the weight is; ``None`` without factors."""
        return None

    def with_weight(self, weight: Tensor) -> nn.Module:
        """Make a layer of the same kind for another weight (out, in, *kernel) in float64; codes are rounded anew."""
        raise NotImplementedError

    def set_weight(self, weight: Tensor) -> None:
        """Write another weight (out, in, *kernel) into a dense layer itself."""
        raise NotImplementedError

    def with_factors(self, left: Tensor, right: Tensor) -> nn.Module:
        """Make a layer of the same kind for other factors, float64 of any rank; codes are rounded anew."""
        raise NotImplementedError

    def appended(self, left: Tensor, right: Tensor, rows: Tensor | None) -> nn.Module:
        """Make a layer of the same kind with these components beside its own, codes and scales of which stay.

        Args:
            left: (out, r) float64.
            right: (r, in · kernel) float64.
            rows: (out,), what the outputs of its own components are multiplied by; only without codes.
        """
        raise NotImplementedError

    # What follows from it

    @property
    def out_features(self) -> int:
        """Outputs, channels, or an embedding's dimension."""
        return self.shape[0]

    @property
    def in_features(self) -> int:
        """Inputs, channels, or an embedding's rows."""
        return self.shape[1] * self.groups

    @property
    def geometry(self) -> ConvGeometry:
        """Where a convolution's kernel goes."""
        return ConvGeometry.of(self.layer)

    @property
    def groups(self) -> int:
        """Into so many runs the channels are cut; 1 without a kernel."""
        return self.geometry.groups if self.family.startswith("conv") else 1

    @property
    def bias(self) -> Tensor | None:
        """(out,), or ``None``."""
        bias = getattr(self.layer, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    @property
    def adapter_dtype(self) -> torch.dtype:
        """Of the adapter's parameters: the base's, but float32 over half precision, as PEFT has it."""
        dtype = self.dtype
        return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype

    @property
    def largest_rank(self) -> int:
        """min(out, in · kernel): beyond it an adapter has more components than the weight can use."""
        return largest_rank(self.shape)

    def row_norms(self, left: Tensor, right: Tensor) -> Tensor:
        """Compute the norms (out,) of the rows of ``W + left @ right``, without the dense W where the base has factors.

        For W = LR the squared norms are the diagonal of ``[L, left] G [L, left]ᵀ`` with G the gram of ``[R; right]``.

        Args:
            left: (out, r).
            right: (r, in · kernel).
        """
        pair = self.factors(left.dtype)
        if pair is None:
            weight = self.exact_weight() if left.dtype is torch.float64 else self.weight().to(left.dtype)
            norms: Tensor = torch.linalg.vector_norm(weight.flatten(1) + left @ right, dim=1)
            return norms
        lefts, rights = torch.cat([pair[0], left], dim=1), torch.cat([pair[1], right])
        return ((lefts @ (rights @ rights.T)) * lefts).sum(dim=1).clamp_min(0.0).sqrt()

    def require_rank(self, rank: int, name: str) -> None:
        """Refuse a rank r whose adapter, ``r · (out + in · kernel)`` numbers, would hold over max(16 · weight, 2²⁰) of them.

        Ranks over :attr:`largest_rank` mean nothing but are harmless; this one keeps a slip from taking all memory.

        Args:
            rank: of the adapter.
            name: of the layer, for the message.

        Raises:
            RankError: over the limit.

        Example:
            >>> base_of(nn.Linear(64, 10)).require_rank(10**12, "head")
            Traceback (most recent call last):
                ...
            lowrank.errors.RankError: r: layer head: must be between 1 and 14,169, got 1,000,000,000,000; ...
        """
        rows, columns = self.shape[0], math.prod(self.shape[1:])
        limit = max(16 * rows * columns, 2**20) // max(rows + columns, 1)
        if rank > limit:
            # Python refuses to print integers of thousands of digits.
            given = f"{rank:,}" if rank < 10**30 else "a number of over 30 digits"
            raise RankError(
                f"r: layer {name}: must be between 1 and {limit:,}, got {given}; an adapter may hold 16 times the numbers of "
                f"its layer, or {2**20:,} where that is more"
            )


class _Dense(Base):
    """A layer of torch, or transformers' ``Conv1D``."""

    @property
    def _stored(self) -> Tensor:
        weight = self.layer.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def is_transposed(self) -> bool:
        """Whether the layer keeps its weight as (in, out)."""
        return self.family == "embedding" or is_conv1d(self.layer)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight().shape)

    @property
    def dtype(self) -> torch.dtype:
        return self._stored.dtype

    @property
    def device(self) -> torch.device:
        return self._stored.device

    def weight(self) -> Tensor:
        stored = self._stored.detach()
        return stored.T if self.is_transposed else stored

    def exact_weight(self) -> Tensor:
        return self.weight().double()

    def with_weight(self, weight: Tensor) -> nn.Module:
        merged = copy.copy(self.layer)
        merged._parameters = dict(self.layer._parameters)
        merged._parameters["weight"] = nn.Parameter(self._as_stored(weight), requires_grad=False)
        return merged

    def set_weight(self, weight: Tensor) -> None:
        self._stored.data = self._as_stored(weight)

    def _as_stored(self, weight: Tensor) -> Tensor:
        return (weight.T if self.is_transposed else weight).to(self.dtype).contiguous()


class _Compressed(Base):
    """A layer of ours, whatever its format."""

    layer: CompressedLayer
    is_compressed = True

    @property
    def has_codes(self) -> bool:
        return self.layer.bits is not None

    @property
    def format(self) -> str:
        return self.layer.format

    @property
    def rank(self) -> int | None:
        return self.layer.rank

    @property
    def scheme(self) -> str | None:
        return self.layer.scheme

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layer.shape[::-1] if self.layer.looks_up else self.layer.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.dtype

    @property
    def device(self) -> torch.device:
        tensor: Tensor = next(iter(self.layer.state_dict().values()))
        return tensor.device

    def weight(self) -> Tensor:
        dense = self.layer.dense_weight().detach()
        return dense.T if self.layer.looks_up else dense

    def exact_weight(self) -> Tensor:
        return self.layer.exact_weight()

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        return self.layer.factors(dtype)

    def with_weight(self, weight: Tensor) -> nn.Module:
        return self.layer.with_weight(weight)

    def with_factors(self, left: Tensor, right: Tensor) -> nn.Module:
        return self.layer.with_factors(left, right)

    def appended(self, left: Tensor, right: Tensor, rows: Tensor | None) -> nn.Module:
        return self.layer.appended(left, right, rows)
