"""The optimiser of healing: orthogonalised momentum for factors, AdamW for everything else."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["FactorDescent", "orthogonalised"]

# Newton-Schulz coefficients of Jordan et al. (2024), "Muon": five rounds bring every singular value into about [0.7, 1.2].
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5
_MOMENTUM = 0.95
# Of biases and norms against the factors' rate: an unmeasured heuristic.
_VECTOR_SHARE = 0.3


def orthogonalised(matrix: Tensor) -> Tensor:
    """About U Vᵀ of a matrix's singular value decomposition, without computing it.

    Args:
        matrix: (m, n), float32 or wider.

    Example:
        >>> found = torch.linalg.svdvals(orthogonalised(torch.randn(5, 12)))
        >>> bool(found.min() > 0.5), bool(found.max() < 1.5)
        (True, True)
    """
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / torch.linalg.vector_norm(x).clamp_min(torch.finfo(x.dtype).tiny)
    for _ in range(_ROUNDS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class FactorDescent:
    """Steps for factors of layers: every direction of a factor moves alike, by a share of the factor's own size.

    A layer's inputs have few strong directions; AdamW spends its steps there. Matrices get ``lr · s · O``, O the
    orthogonalised momentum of the gradient and s the root mean square of the factor's singular values at the start;
    kernels are matrices (out, in · kernel). Everything else gets AdamW at a share of ``lr``.

    Args:
        parameters: to be trained.
        lr: peak learning rate.

    Example:
        >>> weight = nn.Parameter(torch.eye(3))
        >>> descent = FactorDescent([weight], lr=0.1)
        >>> (weight * torch.ones(3, 3)).sum().backward()
        >>> descent.step(1.0)
        >>> bool((weight.detach() - torch.eye(3)).norm() < 0.2)
        True
    """

    def __init__(self, parameters: Sequence[nn.Parameter], lr: float) -> None:
        self.lr = lr
        self.matrices = [parameter for parameter in parameters if parameter.ndim > 1]
        self.momenta = [torch.zeros_like(parameter, dtype=_working(parameter)) for parameter in self.matrices]
        self.sizes = [
            float(torch.linalg.vector_norm(p.detach().double())) / math.sqrt(max(min(p.flatten(1).shape), 1))
            for p in self.matrices
        ]
        vectors = [parameter for parameter in parameters if parameter.ndim <= 1]
        self.adam = torch.optim.AdamW(vectors, lr=lr, weight_decay=0.0, foreach=False) if vectors else None

    def step(self, factor: float) -> None:
        """One step at ``factor`` times the peak learning rate; a parameter without a gradient stays."""
        with torch.no_grad():
            for parameter, momentum, size in zip(self.matrices, self.momenta, self.sizes, strict=True):
                if parameter.grad is None:
                    continue
                gradient = parameter.grad.to(momentum.dtype)
                momentum.mul_(_MOMENTUM).add_(gradient)
                # Nesterov's form: where the momentum is going.
                ahead = (gradient + _MOMENTUM * momentum).flatten(1)
                change = orthogonalised(ahead).view_as(parameter)
                parameter.add_(change.to(parameter.dtype), alpha=-self.lr * factor * (size or 1.0))
        if self.adam is not None:
            self.adam.param_groups[0]["lr"] = self.lr * factor * _VECTOR_SHARE
            self.adam.step()


def _working(parameter: Tensor) -> torch.dtype:
    return torch.float64 if parameter.dtype is torch.float64 else torch.float32
