"""Embedding tables as two thin matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.errors import RankError, UsageError
from lowrank.layers.base import CompressedLayer
from lowrank.layers.checks import check_size
from lowrank.layers.factors import balanced
from lowrank.layers.source import choose_rank, error_in, require_embedding
from lowrank.layers.weights import FloatFactors
from lowrank.numerics.factors import Factors, check_rank, factorize_embedding
from lowrank.numerics.moments import TokenCounts

__all__ = ["CompressedEmbedding", "LowRankEmbedding", "check_fit", "table_error"]


class CompressedEmbedding(CompressedLayer):
    """Base of the embeddings: a table's shape, its padding row and its configuration."""

    looks_up: ClassVar[bool] = True
    padding_idx: int | None
    # As nn.Embedding calls them; tables with other values are refused before.
    max_norm: ClassVar[None] = None
    norm_type: ClassVar[float] = 2.0
    scale_grad_by_freq: ClassVar[bool] = False
    sparse: ClassVar[bool] = False

    def __init__(
        self, num_embeddings: int, embedding_dim: int, padding_idx: int | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.num_embeddings = check_size(num_embeddings, "num_embeddings")
        self.embedding_dim = check_size(embedding_dim, "embedding_dim")
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise UsageError(f"padding_idx: must be within the {num_embeddings} rows, got {padding_idx}")
        self.padding_idx = padding_idx if padding_idx is None or padding_idx >= 0 else num_embeddings + padding_idx
        self.dtype = dtype or torch.get_default_dtype()

    @property
    def shape(self) -> tuple[int, int]:
        """(num_embeddings, embedding_dim)."""
        return self.num_embeddings, self.embedding_dim

    def config(self) -> dict[str, Any]:
        """See :meth:`CompressedLayer.config`."""
        return super().config() | {"padding_idx": self.padding_idx}

    @classmethod
    def _arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        rows, columns = config["shape"]
        sizes = {"num_embeddings": rows, "embedding_dim": columns, "padding_idx": config["padding_idx"]}
        return super()._arguments(config) | sizes

    def extra_repr(self) -> str:
        """Say what ``repr`` shows."""
        parts = [str(self.num_embeddings), str(self.embedding_dim)]
        parts += [] if self.rank is None else [f"rank={self.rank}"]
        parts += [] if self.bits is None else [f"bits={self.bits}"]
        parts += [] if self.padding_idx is None else [f"padding_idx={self.padding_idx}"]
        return ", ".join(parts)


class LowRankEmbedding(FloatFactors, CompressedEmbedding):
    """``left[ids] @ right``, trainable.

    Args:
        num_embeddings, embedding_dim, rank: of the table; rank from 1 to the smaller side.
        padding_idx: row that gets no gradient.
        device, dtype: of the parameters.

    Attributes:
        left: (num_embeddings, rank).
        right: (rank, embedding_dim).

    Raises:
        RankError: a rank or size out of range.

    Example:
        >>> layer = LowRankEmbedding.from_embedding(nn.Embedding(10, 4), rank=2)
        >>> layer(torch.tensor([[1, 9]])).shape
        torch.Size([1, 2, 4])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, dtype)
        rank = check_rank(rank, min(num_embeddings, embedding_dim))
        self.left = nn.Parameter(torch.empty(num_embeddings, rank, device=device, dtype=self.dtype))
        self.right = nn.Parameter(torch.empty(rank, embedding_dim, device=device, dtype=self.dtype))
        with torch.no_grad():
            # Entries of variance 1, like nn.Embedding's.
            self.left.normal_()
            self.right.normal_(std=rank**-0.5)
            if self.padding_idx is not None:
                self.left[self.padding_idx] = 0.0

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Module,
        rank: int | None = None,
        max_error: float | None = None,
        statistics: TokenCounts | None = None,
    ) -> LowRankEmbedding:
        """Make the best table of this rank, or of the smallest rank whose relative Frobenius error is within ``max_error``.

        Args:
            statistics: how often each row is looked up; rows count accordingly, also in the error.

        Raises:
            RankError: rank out of range, or no rank is within ``max_error``.
            UsageError: not an ``nn.Embedding``, or one with ``max_norm``.
        """
        source = require_embedding(embedding)
        curve = factorize_embedding(source.weight, statistics)

        def measure(candidate: int) -> float:
            left, right = balanced(curve.factors(candidate), source.weight.dtype)
            return table_error(source.weight, left.double() @ right.double(), statistics)

        return cls.from_factors(curve.factors(choose_rank(curve, rank, max_error, measure)), source)

    @classmethod
    def from_factors(cls, factors: Factors, embedding: nn.Module) -> LowRankEmbedding:
        """Make the table of these factors, in the place of an ``nn.Embedding``."""
        source = require_embedding(embedding)
        check_fit(factors, source)
        left, right = balanced(factors, source.weight.dtype)
        rows, columns = source.weight.shape
        layer = cls(rows, columns, factors.rank, source.padding_idx, "meta", source.weight.dtype)
        layer = layer.to_empty(device=source.weight.device)
        with torch.no_grad():
            layer.left.copy_(left)
            layer.right.copy_(right)
        for parameter in (layer.left, layer.right):
            parameter.requires_grad_(source.weight.requires_grad)
        return layer.train(source.training)

    def forward(self, input: Tensor) -> Tensor:
        """Map (...) integers to (..., embedding_dim)."""
        return F.embedding(input, self.left, self.padding_idx) @ self.right

    def dense_weight(self) -> Tensor:
        """Compute ``left @ right``, (num, dim), multiplied in float64 and rounded once."""
        return (self.left.double() @ self.right.double()).to(self.left.dtype)


def check_fit(factors: Factors, embedding: nn.Embedding) -> None:
    """Refuse factors of another shape than the table's.

    Raises:
        RankError: names both shapes.
    """
    rows, columns = embedding.weight.shape
    if factors.left.shape[0] != rows or factors.right.shape[1] != columns:
        raise RankError(
            f"factors: {tuple(factors.left.shape)} @ {tuple(factors.right.shape)} do not fit a table of "
            f"{(rows, columns)}"
        )


def table_error(table: Tensor, approximation: Tensor, counts: TokenCounts | None) -> float:
    """Relative error of a table (num, dim), rows weighted by their look-ups where these are given."""
    if counts is None or counts.count == 0:
        return error_in(table, approximation, None)
    weights = counts.counts.to(table.device, torch.float64).sqrt()[:, None]
    return error_in(table.detach().double() * weights, approximation * weights, None)
