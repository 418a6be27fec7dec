"""Embedding tables of packed codes of 2 to 8 bits."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.layers.embedding import CompressedEmbedding
from lowrank.layers.packed import PackedCodes
from lowrank.layers.source import require_embedding
from lowrank.numerics.packing import decode_rows
from lowrank.numerics.rounding_methods import NEAREST, ROUNDINGS, Grid, Rounded

__all__ = ["PackedEmbedding"]


class PackedEmbedding(PackedCodes, CompressedEmbedding):
    """A table of packed codes, of which only the rows asked for become floats.

    Args:
        num_embeddings, embedding_dim: of the table.
        padding_idx: carried along; the table is not trained.
        n_bits: bits of a code, 2 to 8.
        group: numbers of a row that share a scale: 32, 64, 128, or ``None`` for all.
        zero_point: whether each group has a zero of its own.
        scale_dtype: float16 or float32.
        device: of the tensors.
        dtype: of the output.

    Attributes:
        codes, scale, zero_point, grid: see :class:`PackedCodes`.

    Example:
        >>> layer = PackedEmbedding.from_embedding(nn.Embedding(10, 64), bits=3, group=32)
        >>> layer(torch.tensor([[1, 9]])).shape, layer.stored_bytes
        (torch.Size([1, 2, 64]), 280)
    """

    source_words: ClassVar[str] = "a table; use from_embedding"

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        n_bits: int = 4,
        group: int | None = 64,
        zero_point: bool = False,
        scale_dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, dtype)
        self._allocate_packed(Grid(n_bits, group, zero_point), scale_dtype, device)

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Module,
        *,
        bits: int = 4,
        group: int | None = 64,
        zero_point: bool = False,
        rounding: str = NEAREST,
    ) -> PackedEmbedding:
        """Round every row of an ``nn.Embedding``.

        Raises:
            RankError: bits outside 2 to 8.
            NumericsError: NaN or Inf in the table.
            UsageError: not an ``nn.Embedding``, or one with ``max_norm``.
        """
        grid = Grid(bits, group, zero_point)
        return cls.from_rounded(ROUNDINGS[rounding](require_embedding(embedding).weight, grid), embedding, grid=grid)

    @classmethod
    def from_rounded(cls, rounded: Rounded, embedding: nn.Module, *, grid: Grid) -> PackedEmbedding:
        """Make the table of codes that were chosen for another one."""
        source = require_embedding(embedding)
        rows, columns = source.weight.shape
        layer = cls(
            rows,
            columns,
            source.padding_idx,
            grid.bits,
            grid.group,
            grid.zero_point,
            rounded.scale.dtype,
            "meta",
            source.weight.dtype,
        )
        layer._hold(rounded, source.weight)
        return layer.train(source.training)

    def forward(self, input: Tensor) -> Tensor:
        """Map (...) integers to (..., embedding_dim) in the layer's dtype."""
        flat = input.reshape(-1)
        zero = None if self.zero_point is None else F.embedding(flat, self.zero_point)
        working = torch.float64 if self.dtype is torch.float64 else torch.float32
        codes, scale = F.embedding(flat, self.codes), F.embedding(flat, self.scale)
        rows = decode_rows(codes, scale, zero, self.grid, self.embedding_dim, working)
        return rows.to(self.dtype).view(*input.shape, self.embedding_dim)
