"""Embedding tables as int8 rows, and as two int8 factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.errors import UsageError
from lowrank.kernels import wide_matmul
from lowrank.kernels.activations import pieces_for
from lowrank.layers.base import dtype_from_name, graph_is_made
from lowrank.layers.embedding import CompressedEmbedding, check_fit, table_error
from lowrank.layers.quantized_lowrank import dense_product, round_factors
from lowrank.layers.source import choose_rank, require_embedding
from lowrank.numerics.factors import Factors, check_rank, factorize_embedding
from lowrank.numerics.moments import TokenCounts
from lowrank.numerics.rounding import check_bits, dequantize_rows, quantize_rows, rounding_bound

__all__ = ["QuantizedEmbedding", "QuantizedLowRankEmbedding"]


class QuantizedEmbedding(CompressedEmbedding):
    """``codes[ids] · scale[ids]``: a table of int8 rows, of which only those asked for become floats.

    Args:
        num_embeddings, embedding_dim: of the table.
        padding_idx: carried along; the table is not trained.
        n_bits: bits of a code, 2 to 8.
        device: of the tensors.
        dtype: of the output.

    Attributes:
        codes: (num_embeddings, embedding_dim) int8 buffer.
        scale: (num_embeddings,) float32 buffer.

    Example:
        >>> layer = QuantizedEmbedding.from_embedding(nn.Embedding(10, 4))
        >>> layer(torch.tensor([[1, 9]])).shape, layer.stored_bytes
        (torch.Size([1, 2, 4]), 80)
    """

    _format: ClassVar[str] = "int8"
    _is_integer: ClassVar[bool] = True
    codes: Tensor
    scale: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        n_bits: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, dtype)
        self.n_bits = check_bits(n_bits, "n_bits")
        self.register_buffer("codes", torch.zeros(num_embeddings, embedding_dim, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.ones(num_embeddings, dtype=torch.float32, device=device))
        self.error_bound_value: float | None = None

    @classmethod
    def from_embedding(cls, embedding: nn.Module, bits: int = 8) -> QuantizedEmbedding:
        """Round every row of an ``nn.Embedding``.

        Raises:
            RankError: bits outside 2 to 8.
            NumericsError: NaN or Inf in the table.
            UsageError: not an ``nn.Embedding``, or one with ``max_norm``.
        """
        source = require_embedding(embedding)
        codes, scale = quantize_rows(source.weight, bits)
        layer = cls.from_tensors(codes, scale, source.padding_idx, bits=bits, dtype=source.weight.dtype)
        lost = source.weight.detach().double()[(codes == 0).all(dim=1)]
        used = scale[(codes != 0).any(dim=1)]
        layer.error_bound_value = rounding_bound(used, codes.shape[1]) + float(torch.linalg.vector_norm(lost))
        return layer.train(source.training)

    @classmethod
    def from_tensors(
        cls,
        codes: Tensor,
        scale: Tensor,
        padding_idx: int | None = None,
        *,
        bits: int = 8,
        dtype: torch.dtype | None = None,
    ) -> QuantizedEmbedding:
        """A layer that holds these very tensors, which a linear layer may share."""
        rows, columns = codes.shape
        layer = cls(rows, columns, padding_idx, bits, "meta", dtype)
        layer.codes, layer.scale = codes, scale
        return layer

    def forward(self, ids: Tensor) -> Tensor:
        """(...) integers to (..., embedding_dim) in the layer's dtype."""
        rows = F.embedding(ids, self.codes).to(torch.float32)
        return rows.mul_(F.embedding(ids, self.scale[:, None])).to(self.dtype)

    def dense_weight(self) -> Tensor:
        """``codes · scale``, (num, dim) float32."""
        return dequantize_rows(self.codes, self.scale)

    def error_bound(self) -> float:
        """A bound of ‖E − E'‖_F: half a step in every entry.

        Raises:
            UsageError: the layer was made from scratch.
        """
        return _bound(self.error_bound_value, self.kind)

    def config(self) -> dict[str, Any]:
        """See :meth:`CompressedLayer.config`."""
        return super().config() | {"error_bound": self.error_bound_value}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], device: torch.device | str | None = None) -> QuantizedEmbedding:
        """See :meth:`CompressedLayer.from_config`."""
        rows, columns = config["shape"]
        layer = cls(rows, columns, config["padding_idx"], config["bits"], device, dtype_from_name(config["dtype"]))
        layer.error_bound_value = config["error_bound"]
        return layer


class QuantizedLowRankEmbedding(CompressedEmbedding):
    """``(left_codes[ids] · scale) @ right_codes``: both factors as int8.

    Args:
        num_embeddings, embedding_dim, rank: of the table; rank from 1 to the smaller side.
        padding_idx: carried along; the table is not trained.
        n_bits: bits of a code, 2 to 8.
        device: of the tensors.
        dtype: of the output.

    Attributes:
        left_codes: (num_embeddings, rank) int8 buffer.
        right_codes: (rank, embedding_dim) int8 buffer.
        scale: (rank,) float32 buffer.

    Example:
        >>> layer = QuantizedLowRankEmbedding.from_embedding(nn.Embedding(10, 4), rank=2)
        >>> layer(torch.tensor([[1, 9]])).shape, layer.stored_bytes
        (torch.Size([1, 2, 4]), 36)
    """

    _format: ClassVar[str] = "lowrank-int8"
    _is_integer: ClassVar[bool] = True
    left_codes: Tensor
    right_codes: Tensor
    scale: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        padding_idx: int | None = None,
        n_bits: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, dtype)
        rank = check_rank(rank, min(num_embeddings, embedding_dim))
        self.n_bits = check_bits(n_bits, "n_bits")
        self.register_buffer("left_codes", torch.zeros(num_embeddings, rank, dtype=torch.int8, device=device))
        self.register_buffer("right_codes", torch.zeros(rank, embedding_dim, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.ones(rank, dtype=torch.float32, device=device))
        self.error_bound_value: float | None = None

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Module,
        rank: int | None = None,
        max_error: float | None = None,
        bits: int = 8,
        statistics: TokenCounts | None = None,
    ) -> QuantizedLowRankEmbedding:
        """The rounded table of this rank, or of the smallest rank whose error, rounding included, is within
        ``max_error``.

        Raises:
            RankError: rank or bits out of range, or no rank is within ``max_error``.
            UsageError: not an ``nn.Embedding``, or one with ``max_norm``.
        """
        check_bits(bits)
        source = require_embedding(embedding)
        curve = factorize_embedding(source.weight, statistics)

        def measure(candidate: int) -> float:
            factors = curve.factors(candidate)
            product = dense_product(*round_factors(factors.left, factors.right, bits)[:3])
            return table_error(source.weight, product, statistics)

        return cls.from_factors(curve.factors(choose_rank(curve, rank, max_error, measure)), source, bits=bits)

    @classmethod
    def from_factors(cls, factors: Factors, embedding: nn.Module, *, bits: int = 8) -> QuantizedLowRankEmbedding:
        """Round these factors, in the place of an ``nn.Embedding``."""
        source = require_embedding(embedding)
        check_fit(factors, source)
        rounded = round_factors(factors.left, factors.right, bits)
        layer = cls.from_tensors(*rounded[:3], source.padding_idx, bits=bits, dtype=source.weight.dtype)
        truncated = source.weight.detach().double() - factors.left.double() @ factors.right.double()
        layer.error_bound_value = rounded.bound + float(torch.linalg.vector_norm(truncated))
        return layer.train(source.training)

    @classmethod
    def from_tensors(
        cls,
        left_codes: Tensor,
        right_codes: Tensor,
        scale: Tensor,
        padding_idx: int | None = None,
        *,
        bits: int = 8,
        dtype: torch.dtype | None = None,
    ) -> QuantizedLowRankEmbedding:
        """A layer that holds these very tensors, which a linear layer may share."""
        (rows, rank), columns = left_codes.shape, right_codes.shape[1]
        layer = cls(rows, columns, rank, padding_idx, bits, "meta", dtype)
        layer.left_codes, layer.right_codes, layer.scale = left_codes, right_codes, scale
        return layer

    @property
    def rank(self) -> int:
        """Number of rank components."""
        return self.left_codes.shape[1]

    def forward(self, ids: Tensor) -> Tensor:
        """(...) integers to (..., embedding_dim) in the layer's dtype."""
        if graph_is_made():
            result: Tensor = torch.ops.lowrank.lowrank_int8_embedding(
                ids, self.left_codes, self.right_codes, self.scale, self.dtype
            )
            return result
        return self.looked_up(ids, self.dtype)

    def looked_up(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows of these ids in this dtype, (..., embedding_dim)."""
        working = torch.float64 if dtype is torch.float64 else torch.float32
        components = F.embedding(ids, self.left_codes).to(working).mul_(self.scale).view(ids.numel(), self.rank)
        sums, unit = wide_matmul(components, self.right_codes.t(), pieces_for(dtype))
        return sums.mul_(unit).to(dtype).view(*ids.shape, self.embedding_dim)

    def dense_weight(self) -> Tensor:
        """``left_codes · diag(scale) · right_codes``, (num, dim) float32, multiplied in float64."""
        return dense_product(self.left_codes, self.right_codes, self.scale).to(torch.float32)

    def error_bound(self) -> float:
        """A bound of ‖E − E'‖_F: truncation plus half a step of every scale.

        Raises:
            UsageError: the layer was made from scratch.
        """
        return _bound(self.error_bound_value, self.kind)

    def config(self) -> dict[str, Any]:
        """See :meth:`CompressedLayer.config`."""
        return super().config() | {"error_bound": self.error_bound_value}

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], device: torch.device | str | None = None
    ) -> QuantizedLowRankEmbedding:
        """See :meth:`CompressedLayer.from_config`."""
        rows, columns = config["shape"]
        dtype = dtype_from_name(config["dtype"])
        layer = cls(rows, columns, config["rank"], config["padding_idx"], config["bits"], device, dtype)
        layer.error_bound_value = config["error_bound"]
        return layer


def _bound(value: float | None, kind: str) -> float:
    if value is None:
        raise UsageError(f"error_bound: this {kind} was not made from a table; use from_embedding or from_factors")
    return value
