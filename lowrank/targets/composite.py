"""What recurrent layers and attention have in common: several matrices in one module, taken or left together."""

from __future__ import annotations

import re
from typing import ClassVar

import torch
from torch import Tensor, nn

from lowrank.calibration.observers import AnyObserver
from lowrank.numerics.sampled_moments import Moment
from lowrank.targets.kind import LayerKind

__all__ = ["Composite"]


class Composite(LayerKind):
    """Describe a module of several matrices.

    What flows between them is not looked at: errors are those of the weights, and what they cost the model is measured.

    Attributes:
        parameter_name: matches the names that such a module's parameters have; one with others is parametrized.
    """

    composite: ClassVar[bool] = True
    target: ClassVar[str] = "linear"
    parameter_name: ClassVar[re.Pattern[str]]

    def refusal(self, module: nn.Module) -> str | None:
        """Refuse parametrized modules and those of several dtypes."""
        names = [name for name, _ in module.named_parameters()]
        odd = next((name for name in names if not self.parameter_name.fullmatch(name)), None)
        if odd is not None or not self.parameters(module):
            return f"parametrized (it holds {odd}): remove the parametrization first"
        if len({tensor.dtype for tensor in module.parameters()}) > 1:
            return "holds weights of more than one dtype"
        return None

    def parameters(self, module: nn.Module) -> dict[str, Tensor | None]:
        """Give the matrices by name, those of its children included."""
        return {name: tensor for name, tensor in module.named_parameters() if tensor.ndim == 2}

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """Give each matrix as (1, out, in)."""
        return {name: tensor.detach()[None] for name, tensor in self.parameters(module).items() if tensor is not None}

    def observer(self, module: nn.Module) -> AnyObserver | None:
        """Gather nothing: what flows between the matrices is not seen from outside."""
        return None

    def matrix(self, module: nn.Module) -> Tensor:
        """Give one row with all weights: norms are sums over it."""
        return torch.cat([stack.flatten() for stack in self.weights(module).values()])[None]

    def squared_norm(self, matrix: Tensor, moments: Moment | None, row_weights: Tensor | None, blocks: int) -> float:
        """Compute ‖matrix‖²_F."""
        return float(matrix.to(torch.float64).square().sum())
