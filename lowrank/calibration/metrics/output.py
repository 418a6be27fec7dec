"""The relative error of the output: ‖f(x) − f'(x)‖ / ‖f(x)‖."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank.calibration.batches import Batch
from lowrank.calibration.metrics.base import SampledMetric
from lowrank.calibration.metrics.sums import per_sample, position_mask, widen

__all__ = ["OUTPUT", "OutputMetric", "squared_sums"]

# Elements that are turned into float64 at a time.
CHUNK_ELEMENTS = 2**22


class OutputMetric(SampledMetric):
    """‖f(x) − f'(x)‖ / ‖f(x)‖ over all numbers of the output; its squares are the terms.

    Example:
        >>> batch = Batch((torch.zeros(2, 1),), size=2)
        >>> OUTPUT.terms(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[3.0, 3.0], [1.0, 2.0]]), batch)
        (tensor([1., 4.], dtype=torch.float64), tensor([25.,  1.], dtype=torch.float64))
    """

    name = "output"
    title = "output error"
    relative = True
    usual = (0.01, 0.5)
    gradients = "output"
    every_output = True

    @property
    def figure(self) -> str:
        return "output_error"

    def terms(self, reference: Tensor, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        keep = position_mask(reference, batch)
        lost, whole = squared_sums(output, keep, minus=reference), squared_sums(reference, keep)
        return per_sample(lost, batch), per_sample(whole, batch)


OUTPUT = OutputMetric()


def squared_sums(tensor: Tensor, keep: Tensor | None, *, minus: Tensor | None = None) -> Tensor:
    """Sum (tensor − minus)² in float64 over all but dimension 0, in chunks: a vocabulary of logits in float64 is large.

    Example:
        >>> squared_sums(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), None)
        tensor([25.,  1.], dtype=torch.float64)
    """
    if tensor.ndim == 0:
        return (tensor.to(torch.float64) - (0.0 if minus is None else minus.to(torch.float64))).square().reshape(1)
    rows = max(CHUNK_ELEMENTS * tensor.shape[0] // max(tensor.numel(), 1), 1)
    parts = []
    for start in range(0, tensor.shape[0], rows):
        chunk = slice(start, start + rows)
        values = tensor[chunk].to(torch.float64)
        squares = (values if minus is None else values - minus[chunk].to(torch.float64)).square()
        if keep is not None:
            squares = torch.where(widen(keep[chunk], squares), squares, 0.0)
        parts.append(squares.flatten(1).sum(dim=1) if squares.ndim > 1 else squares)
    return torch.cat(parts)
