"""A small classification task that a linear map can learn, and a model that is killed on the way."""

from __future__ import annotations

import torch
from helpers import seeded
from torch import nn


class Stopped(RuntimeError):
    """Stands for a killed process."""


class Stoppable(nn.Module):
    """Runs ``body``, which a subclass makes, and is killed in the given call of training (0: in none)."""

    body: nn.Module

    def __init__(self, stop_at: int = 0) -> None:
        super().__init__()
        self.calls, self.stop_at = 0, stop_at

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.calls += 1
            if self.calls == self.stop_at:
                raise Stopped
        return self.body(x)


def batches(count: int = 6, size: int = 8, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(inputs (size, 6), classes (size,) out of 3); the same task whatever the seed."""
    generator = seeded(seed)
    wanted = torch.randn(6, 3, generator=seeded(99))
    found = []
    for _ in range(count):
        x = torch.randn(size, 6, generator=generator)
        found.append((x, (x @ wanted).argmax(dim=1)))
    return found
