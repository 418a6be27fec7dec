"""The loops of error feedback over a weight's columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Columns"]

# Columns rounded before what they lost reaches all later ones, by one product.
BLOCK = 64


class Columns:
    """A weight by columns, in the order in which they are rounded; (…, columns, rows) with blocks where there are several.

    The loop over columns is numpy's: its calls cost a third of torch's, and a column is short.

    Attributes:
        weight: float32, divided by a power of two.
        steps: of each weight, float32.
        codes: whole numbers in float32, counted from the zero.
    """

    def __init__(self, weight: Tensor, steps: Tensor, least: Tensor, top: int) -> None:
        self.weight, self.steps, self.codes = weight, steps, torch.empty_like(weight)
        self._least, self._most = least.numpy(), (least + top).numpy()

    @property
    def error(self) -> Tensor:
        """Give what is lost, in the weight's form."""
        return self.weight - self.codes * self.steps

    def first_pass(self, upper: Tensor) -> None:
        """Round every column from what those before it left undone; ``upper`` is I + U."""
        target, errors = self.weight.clone(), torch.empty_like(self.weight)
        weight, steps, codes, lower = (
            each.numpy() for each in (self.weight, self.steps, self.codes, upper.transpose(-1, -2).contiguous())
        )
        aims, lost = target.numpy(), errors.numpy()
        made = np.empty_like(aims[..., :1, :])
        for start, end in _runs(weight.shape[-2]):
            for index in range(start, end):
                here = slice(index, index + 1)
                if index > start:
                    np.matmul(lower[..., here, start:index], lost[..., start:index, :], out=made)
                    made += aims[..., here, :]
                else:
                    made[...] = aims[..., here, :]
                self._choose(codes, steps, here, made)
                np.multiply(codes[..., here, :], steps[..., here, :], out=made)
                np.subtract(weight[..., here, :], made, out=lost[..., here, :])
            if end < weight.shape[-2]:
                target[..., end:, :] += upper[..., start:end, end:].transpose(-1, -2) @ errors[..., start:end, :]

    def descend(self, metric: Tensor) -> None:
        """Set every code anew with all others as they are: ŵ_k to ŵ_k + ((W − Ŵ) Σ)_k / Σ_kk."""
        slope = metric @ self.error
        moves = torch.empty_like(slope)
        steps, codes, whole, pulls, moved = (
            each.numpy() for each in (self.steps, self.codes, metric.contiguous(), slope, moves)
        )
        own = metric.diagonal(dim1=-2, dim2=-1).reciprocal().numpy()[..., None, None]
        aim, before = np.empty_like(pulls[..., :1, :]), np.empty_like(pulls[..., :1, :])
        for start, end in _runs(pulls.shape[-2]):
            for index in range(start, end):
                here = slice(index, index + 1)
                np.multiply(codes[..., here, :], steps[..., here, :], out=before)
                if index > start:
                    np.matmul(whole[..., here, start:index], moved[..., start:index, :], out=aim)
                    np.subtract(pulls[..., here, :], aim, out=aim)
                else:
                    aim[...] = pulls[..., here, :]
                aim *= own[..., index, :, :]
                aim += before
                self._choose(codes, steps, here, aim)
                np.multiply(codes[..., here, :], steps[..., here, :], out=aim)
                np.subtract(aim, before, out=moved[..., here, :])
            if end < pulls.shape[-2]:
                slope[..., end:, :] -= metric[..., start:end, end:].transpose(-1, -2) @ moves[..., start:end, :]

    def _choose(self, codes: Any, steps: Any, here: slice, aim: Any) -> None:
        """Put the codes nearest to an aim in a column's place."""
        chosen = codes[..., here, :]
        np.divide(aim, steps[..., here, :], out=chosen)
        np.rint(chosen, out=chosen)
        np.minimum(chosen, self._most[..., here, :], out=chosen)
        np.maximum(chosen, self._least[..., here, :], out=chosen)


def _runs(columns: int) -> Iterator[tuple[int, int]]:
    """Where each run of columns starts and ends."""
    for start in range(0, columns, BLOCK):
        yield start, min(start + BLOCK, columns)
