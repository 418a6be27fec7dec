"""Factors and ranks of whole models by what their error costs, and the gradients that the study takes it from."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lowrank.errors import RankError
from lowrank.numerics.factors import Factors, RankCurve, factorize_in_metric
from lowrank.numerics.gradient_weighting import GradientWeighting
from lowrank.numerics.knapsack import allocate
from lowrank.numerics.moments import InputStatistics


def pooled(output: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
    """Random directions to back-propagate; where the output has positions, one more that all positions of a sample share.

    The shared one is what the error of their mean would send back.
    """

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(output.device, output.dtype)

    found = draw(*output.shape)
    if output.ndim != 3:
        return found
    inside = torch.ones_like(output[:, :, :1])
    if mask is not None and mask.shape == output.shape[:2]:
        inside = mask[:, :, None].to(output.dtype)
    # Errors at single positions weigh as much, in all, as the error of the mean over them.
    found = found + draw(output.shape[0], 1, output.shape[2]) / inside.sum(dim=1, keepdim=True).sqrt()
    return found * inside


class LossAwareCurve:
    """Every rank's factors of a layer that cost the model least: ``W' = C^-½ U_r U_rᵀ C^½ W``, U of ``C^½ W Σ^½``.

    Attributes:
        costs: (max_rank + 1,) float64; ``costs[r]`` is ``tr(C ΔW Σ ΔWᵀ)`` at rank r, in one unit for all layers.

    Args:
        weight: (out, in); of a convolution ``weight.flatten(1)``.
        statistics: of the layer's inputs.
        gradients: C, (out, out) float64.
        ridge: relative, of both metrics; C is inverted, so it needs one.
        shift_bias: correct the mean in the bias.

    Example:
        >>> inputs = InputStatistics.from_samples(torch.randn(50, 3))
        >>> curve = LossAwareCurve(torch.eye(3), inputs, torch.diag(torch.tensor([0.0, 1.0, 0.0])).double())
        >>> curve.factors(1).left.abs().argmax().item()
        1
    """

    def __init__(
        self,
        weight: Tensor,
        statistics: InputStatistics,
        gradients: Tensor,
        *,
        ridge: float = 1e-3,
        shift_bias: bool = True,
        name: str = "weight",
    ) -> None:
        self._weight = weight.detach().double()
        self._mean = statistics.mean if shift_bias else None
        self._gradient_metric = GradientWeighting(gradients, ridge=ridge, name=name)
        moment = statistics.moment(centred=shift_bias, ridge=ridge)
        self._curve: RankCurve = factorize_in_metric(self._gradient_metric.of(self._weight), moment, name=name)
        self.costs = self._curve.errors.square() * self._curve.energy

    def factors(self, rank: int) -> Factors:
        """The best factors of this rank."""
        found = self._curve.factors(rank)
        left = self._gradient_metric.back(found.left)
        shift = None if self._mean is None else (self._weight - left @ found.right) @ self._mean
        return Factors(left, found.right, shift)


def ranks_for_budget(
    costs: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], budget: int
) -> dict[str, int | None]:
    """Ranks of least total cost within a number of parameters; ``None`` for a layer that is better left as it is.

    From the rank on at which two factors hold as much as the matrix, the matrix itself costs no more and loses nothing.

    Args:
        costs: (max_rank + 1,) by layer, in one unit: ``LossAwareCurve.costs``.
        shapes: (out, in) by layer.
        budget: parameters of all these layers, without biases.

    Raises:
        RankError: the budget does not pay for one component a layer.

    Example:
        >>> curve = torch.tensor([9.0, 4.0, 2.0, 1.0, 0.5, 0.2, 0.1, 0.05, 0.0])
        >>> ranks_for_budget({"a": curve, "b": curve / 100}, {"a": (8, 8), "b": (8, 8)}, 80)
        {'a': None, 'b': 1}
    """
    names = list(costs)
    useful = {name: max((math.prod(shapes[name]) - 1) // sum(shapes[name]), 0) for name in names}
    width = max(useful.values(), default=0) + 1
    cost, weight = (np.full((len(names), width), np.inf) for _ in range(2))
    for row, name in enumerate(names):
        ranks = np.arange(1, useful[name] + 1)
        cost[row, : len(ranks)] = costs[name][1 : len(ranks) + 1].numpy()
        weight[row, : len(ranks)] = ranks * sum(shapes[name])
        # The last column is the layer as it is.
        cost[row, -1], weight[row, -1] = 0.0, math.prod(shapes[name])
    found = allocate(cost, weight, float(budget))
    if not found.feasible:
        raise RankError(f"budget: {budget} parameters do not pay for rank 1 in each of {len(names)} layers")
    return {
        name: None if column == width - 1 else int(column) + 1
        for name, column in zip(names, found.choice.tolist(), strict=True)
    }
