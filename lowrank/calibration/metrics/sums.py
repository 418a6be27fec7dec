"""Sums over the positions of a sample that are not padding: what the terms of metrics are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank.calibration.batches import Batch
from lowrank.calibration.masks import DECODER

__all__ = ["count_kept", "per_sample", "position_mask", "widen"]


def position_mask(output: Tensor, batch: Batch) -> Tensor | None:
    """Give (samples, positions) bool, False on padding, where the output has such positions.

    Example:
        >>> batch = Batch((), {"attention_mask": torch.tensor([[1, 0]])}, 1)
        >>> position_mask(torch.zeros(1, 2, 5), batch).tolist(), position_mask(torch.zeros(1, 5), batch)
        ([[True, False]], None)
    """
    return batch.kept(output.shape, side=DECODER) if output.ndim >= 3 else None


def widen(mask: Tensor, like: Tensor) -> Tensor:
    """Add dimensions of 1 to the mask until it broadcasts against ``like``.

    Example:
        >>> widen(torch.ones(2, 3), torch.zeros(2, 3, 4, 5)).shape
        torch.Size([2, 3, 1, 1])
    """
    return mask.reshape(*mask.shape, *([1] * (like.ndim - mask.ndim)))


def count_kept(keep: Tensor | None, like: Tensor) -> Tensor:
    """Ones of the shape of ``like``, float64; zeros on padding.

    Example:
        >>> count_kept(torch.tensor([[True, False]]), torch.zeros(1, 2)).tolist()
        [[1.0, 0.0]]
    """
    if keep is None:
        return torch.ones_like(like, dtype=torch.float64)
    return widen(keep, like).to(torch.float64).expand_as(like)


def per_sample(values: Tensor, batch: Batch) -> Tensor:
    """Sum over each sample, (samples,) on the CPU; one sum where dimension 0 does not count samples.

    Example:
        >>> per_sample(torch.ones(2, 3), Batch((), size=2)), per_sample(torch.ones(2, 3), Batch(()))
        (tensor([3., 3.]), tensor([6.]))
    """
    if batch.size == 1 or values.shape[0] != batch.size:
        return values.sum().reshape(1).cpu()
    return values.reshape(batch.size, -1).sum(dim=1).cpu()
