"""Linear layers: ``nn.Linear`` and transformers' ``Conv1D``, which keeps its weight the other way."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from lowrank.layers.source import is_conv1d
from lowrank.targets.kind import LayerKind

__all__ = ["Linear"]


class Linear(LayerKind):
    """Describe matrices that multiply."""

    name: ClassVar[str] = "linear"
    target: ClassVar[str] = "linear"
    described: ClassVar[str] = "nn.Linear, transformers' Conv1D"
    types: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    differentiated: ClassVar[bool] = True

    def matches(self, module: nn.Module) -> bool:
        """Tell whether a module is a linear layer."""
        return super().matches(module) or is_conv1d(module)

    def tie_refusal(self, module: nn.Module) -> str | None:
        """Refuse a shared weight that one of its owners reads transposed."""
        return "a tied Conv1D, whose weight is transposed" if is_conv1d(module) else None

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """Give the weight as (1, out, in)."""
        weight = module.weight
        assert isinstance(weight, Tensor)
        return {"weight": (weight.detach().T if is_conv1d(module) else weight.detach())[None]}

    def matrix(self, module: nn.Module) -> Tensor:
        """Give the weight as (out, in)."""
        return self.weights(module)["weight"][0]

    def timed_as(self, module: nn.Module) -> str | None:
        """Give the empty prefix: linear layers are what tables are of."""
        return ""
