"""Embedding tables: rows that are looked up."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from lowrank.targets.kind import LayerKind

__all__ = ["Embedding"]


class Embedding(LayerKind):
    """Describe tables whose rows are looked up; one that is tied to a linear layer multiplies there."""

    name: ClassVar[str] = "embedding"
    target: ClassVar[str] = "embedding"
    described: ClassVar[str] = "nn.Embedding"
    types: ClassVar[tuple[type[nn.Module], ...]] = (nn.Embedding,)
    multiplies: ClassVar[bool] = False

    def refusal(self, module: nn.Module) -> str | None:
        """Refuse a table that rewrites itself."""
        if getattr(module, "max_norm", None) is not None:
            return "nn.Embedding with max_norm changes its weight while it runs"
        return None

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """Give the table as (1, num_embeddings, embedding_dim)."""
        weight = module.weight
        assert isinstance(weight, Tensor)
        return {"weight": weight.detach()[None]}

    def matrix(self, module: nn.Module) -> Tensor:
        """Give the table as (num_embeddings, embedding_dim)."""
        return self.weights(module)["weight"][0]
