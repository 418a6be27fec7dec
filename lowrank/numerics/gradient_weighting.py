"""The metric that gradients make of a layer's outputs: an error counts by what it costs the model."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowrank.errors import NumericsError
from lowrank.numerics.linalg import safe_eigh

__all__ = ["GRADIENT_RIDGE", "GradientWeighting"]

# Of a gradient metric, relative to the mean of its eigenvalues: it is inverted. As small as the inputs' ridge, for the same reason.
GRADIENT_RIDGE = 1e-3


class GradientWeighting:
    """The metric of a layer's outputs: ``ΔWᵀ C ΔW`` in place of ``ΔWᵀ ΔW``, by the roots of C.

    Attributes:
        root, inverse: C^½ and C^-½, (out, out) float64.

    Args:
        gradients: C, (out, out) float64.
        ridge: relative to the mean eigenvalue; C is inverted, so it needs one.
        groups: of a convolution; what different groups share is left out, since each is factored by itself.

    Raises:
        NumericsError: C is not finite, or all zeros.

    Example:
        >>> weighting = GradientWeighting(torch.diag(torch.tensor([4.0, 1.0])).double(), ridge=0.0)
        >>> weighting.root.diagonal().tolist(), weighting.inverse.diagonal().tolist()
        ([2.0, 1.0], [0.5, 1.0])
    """

    def __init__(
        self, gradients: Tensor, *, ridge: float = GRADIENT_RIDGE, groups: int = 1, name: str = "weight"
    ) -> None:
        size = gradients.shape[0] // groups
        blocks = [gradients[at : at + size, at : at + size] for at in range(0, gradients.shape[0], size)]
        mean = float(gradients.diagonal().mean())
        if not 0.0 < mean < math.inf:
            raise NumericsError(f"{name}: gradients whose mean square is {mean} make no metric")
        roots, inverses = [], []
        for block in blocks:
            values, vectors = safe_eigh(block, name=f"{name} (gradients)")
            root = (values + ridge * mean).sqrt()
            roots.append((vectors * root) @ vectors.T)
            inverses.append((vectors / root) @ vectors.T)
        self.root, self.inverse = torch.block_diag(*roots), torch.block_diag(*inverses)

    def of(self, matrix: Tensor) -> Tensor:
        """Return ``C^½ matrix``; the first dimension of a tensor with more is the outputs'."""
        product: Tensor = self.root.to(matrix.device) @ matrix.to(torch.float64).flatten(1)
        return product.view(matrix.shape)

    def back(self, matrix: Tensor) -> Tensor:
        """Return ``C^-½ matrix``: what :meth:`of` undoes."""
        product: Tensor = self.inverse.to(matrix.device) @ matrix.flatten(1)
        return product.view(matrix.shape)
