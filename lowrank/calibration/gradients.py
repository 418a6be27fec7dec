"""What an error in each layer costs the model, and factors and ranks that are chosen by it (DESIGN §4)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowrank.calibration.batches import Batch, model_tensor
from lowrank.calibration.inputs import no_fast_path
from lowrank.errors import RankError, UsageError
from lowrank.numerics.factors import Factors, RankCurve, factorize_in_metric
from lowrank.numerics.gradient_weighting import GradientWeighting
from lowrank.numerics.knapsack import allocate
from lowrank.numerics.moments import InputStatistics

__all__ = ["DIRECTIONS", "LossAwareCurve", "output_gradients", "ranks_for_budget"]

OutputFn = Callable[[Any], Tensor]
DIRECTIONS = ("output", "pooled", "labels")
# Activations are kept for the backward pass: so many samples at a time bound what that takes.
SAMPLES_AT_ONCE = 16


def output_gradients(
    model: nn.Module,
    batches: Sequence[Batch],
    targets: Mapping[str, nn.Module],
    *,
    directions: str = "pooled",
    output_fn: OutputFn | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Second moments of the gradients with respect to each layer's outputs: C of DESIGN §4, without labels.

    One gradient is of one position (a token, a pixel); their products are summed over the positions of a sample and averaged over
    samples, so that layers with more positions count for more. Padding is left out. Neither values nor flags of the model change.

    What is back-propagated from the output y is, by ``directions``:

    * ``"output"``: random directions, independent for every number (Gauss-Newton of ‖Δy‖²).
    * ``"pooled"``: the same, and where the output has positions one more that all positions of a sample share, as the error of
      their mean would send it back.
    * ``"labels"``: ``softmax(y) − onehot(c)`` with c drawn from ``softmax(y)`` (Fisher information: ½ tr(C ΔW Σ ΔWᵀ) nats).

    Args:
        model: run in evaluation mode.
        batches: from :func:`lowrank.calibration.batches.prepare_batches`.
        targets: linear layers and convolutions by name.
        directions: see above.
        output_fn: picks the tensor out of the model's output.
        seed: of the directions.

    Returns:
        (out, out) float64 by name; a layer that the output does not depend on is absent.

    Raises:
        UsageError: unknown directions.
        RuntimeError: torch's own, where the model cannot be differentiated.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2))
        >>> output_gradients(model, [Batch((torch.ones(5, 3),), size=5)], {"0": model[0]})["0"].shape
        torch.Size([2, 2])
    """
    if directions not in DIRECTIONS:
        raise UsageError(f"directions: must be one of {', '.join(DIRECTIONS)}, got {directions!r}")
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, Tensor] = {}
    samples = max(sum(batch.size for batch in batches), 1)
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    mask: Tensor | None = None

    def watch(name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def add(gradient: Tensor) -> None:
            if isinstance(targets[name], (nn.Conv1d, nn.Conv2d)):
                gradient = gradient.movedim(1, -1)
            rows = gradient[mask] if mask is not None and gradient.shape[:2] == mask.shape else gradient.flatten(0, -2)
            # A batch is short: its products keep enough digits, their sum over batches is float64.
            sums[name] = sums.get(name, 0.0) + (rows.T @ rows).double()

        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            # A copy where the chain begins: what comes next may work in place, which a leaf does not allow.
            watched = output if output.requires_grad else output.detach().requires_grad_(True).clone()
            if not watched.requires_grad:
                # Within the model's own torch.no_grad.
                return output
            watched.register_hook(add)
            return watched

        return hook

    with contextlib.ExitStack() as stack:
        for module, mode in modes:
            stack.callback(setattr, module, "training", mode)
        for parameter, flag in flags:
            stack.callback(parameter.requires_grad_, flag)
            parameter.requires_grad_(False)
        model.eval()
        stack.enter_context(no_fast_path())
        stack.enter_context(torch.enable_grad())
        for name, module in targets.items():
            stack.callback(module.register_forward_hook(watch(name)).remove)
        for batch in _in_pieces(batches):
            mask = batch.mask
            output = (output_fn or model_tensor)(batch.run(model))
            if output.requires_grad:
                output.backward(_directions(output, mask, directions, generator))
    return {name: sums[name] / samples for name in targets if name in sums}


def _in_pieces(batches: Sequence[Batch]) -> Iterator[Batch]:
    for batch in batches:
        for indices in torch.arange(batch.size).split(SAMPLES_AT_ONCE):
            yield batch.select(indices) if len(indices) < batch.size else batch


def _directions(output: Tensor, mask: Tensor | None, kind: str, generator: torch.Generator) -> Tensor:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(output.device, output.dtype)

    inside = None
    if output.ndim == 3:
        inside = torch.ones_like(output[:, :, :1])
        if mask is not None and mask.shape == output.shape[:2]:
            inside = mask[:, :, None].to(output.dtype)
    if kind == "labels":
        shares = output.detach().float().softmax(dim=-1)
        # The first whose cumulative share passes a random number: the generator is on the CPU, the model may not be.
        passed = torch.rand((*shares.shape[:-1], 1), generator=generator).to(shares.device)
        drawn = (shares.cumsum(dim=-1) < passed).sum(dim=-1, keepdim=True).clamp_max(shares.shape[-1] - 1)
        found = shares.scatter_add(-1, drawn, -torch.ones_like(passed)).to(output.dtype)
    else:
        found = draw(*output.shape)
        if kind == "pooled" and inside is not None:
            # Errors at single positions weigh as much, in all, as the error of the mean over them.
            found = found + draw(output.shape[0], 1, output.shape[2]) / inside.sum(dim=1, keepdim=True).sqrt()
    return found if inside is None else found * inside


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
        self._metric = GradientWeighting(gradients, ridge=ridge, name=name)
        moment = statistics.moment(centred=shift_bias, ridge=ridge)
        self._curve: RankCurve = factorize_in_metric(self._metric.of(self._weight), moment, name=name)
        self.costs = self._curve.errors.square() * self._curve.energy

    def factors(self, rank: int) -> Factors:
        """The best factors of this rank."""
        found = self._curve.factors(rank)
        left = self._metric.back(found.left)
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
