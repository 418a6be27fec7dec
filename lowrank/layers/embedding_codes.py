"""Embedding tables as int8 rows, and as two int8 factors."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.kernels import wide_matmul
from lowrank.kernels.activations import pieces_for
from lowrank.layers.base import graph_is_made
from lowrank.layers.embedding import CompressedEmbedding, check_fit, table_error
from lowrank.layers.factors import dense_product, round_factors
from lowrank.layers.source import choose_rank, require_embedding
from lowrank.layers.weights import FactorCodes, RowCodes
from lowrank.numerics.factors import Factors, check_rank, factorize_embedding
from lowrank.numerics.moments import TokenCounts
from lowrank.numerics.rounding import check_bits, quantize_rows

__all__ = ["QuantizedEmbedding", "QuantizedLowRankEmbedding"]

_SOURCE = "a table; use from_embedding or from_factors"


class QuantizedEmbedding(RowCodes, CompressedEmbedding):
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

    source_words: ClassVar[str] = _SOURCE

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
        self._allocate_codes({"codes": (num_embeddings, embedding_dim)}, num_embeddings, n_bits, device)

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
        layer._bound_error_from(source.weight)
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
        """Make a layer that holds these very tensors, which a linear layer may share."""
        rows, columns = codes.shape
        layer = cls(rows, columns, padding_idx, bits, "meta", dtype)
        layer.codes, layer.scale = codes, scale
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """Map (...) integers to (..., embedding_dim) in the layer's dtype."""
        rows = F.embedding(input, self.codes).to(torch.float32)
        return rows.mul_(F.embedding(input, self.scale[:, None])).to(self.dtype)


class QuantizedLowRankEmbedding(FactorCodes, CompressedEmbedding):
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

    source_words: ClassVar[str] = _SOURCE

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
        codes = {"left_codes": (num_embeddings, rank), "right_codes": (rank, embedding_dim)}
        self._allocate_codes(codes, rank, n_bits, device)

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Module,
        rank: int | None = None,
        max_error: float | None = None,
        bits: int = 8,
        statistics: TokenCounts | None = None,
    ) -> QuantizedLowRankEmbedding:
        """Make the rounded table of this rank, or of the smallest rank whose error, rounding included, is within
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
        """Make a layer that holds these very tensors, which a linear layer may share."""
        (rows, rank), columns = left_codes.shape, right_codes.shape[1]
        layer = cls(rows, columns, rank, padding_idx, bits, "meta", dtype)
        layer.left_codes, layer.right_codes, layer.scale = left_codes, right_codes, scale
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """Map (...) integers to (..., embedding_dim) in the layer's dtype."""
        if graph_is_made():
            result: Tensor = torch.ops.lowrank.lowrank_int8_embedding(
                input, self.left_codes, self.right_codes, self.scale, self.dtype
            )
            return result
        return self.looked_up(input, self.dtype)

    def looked_up(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Look up the rows of these ids in this dtype, (..., embedding_dim)."""
        working = torch.float64 if dtype is torch.float64 else torch.float32
        components = F.embedding(ids, self.left_codes).to(working).mul_(self.scale).view(ids.numel(), self.rank)
        sums, unit = wide_matmul(components, self.right_codes.t(), pieces_for(dtype))
        return sums.mul_(unit).to(dtype).view(*ids.shape, self.embedding_dim)
