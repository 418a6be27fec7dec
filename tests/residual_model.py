"""A small residual network whose compressed layers can make up for each other, and inputs for it."""

from __future__ import annotations

import torch
from helpers import seeded
from torch import nn


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.down(torch.tanh(self.up(x))))


class Net(nn.Module):
    def __init__(self, width: int = 24) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def inputs(count: int = 256, seed: int = 0, width: int = 24) -> list[torch.Tensor]:
    # Most of the variance in few directions, as in real hidden states: factors of plain SVD do not know that.
    mix = torch.randn(width, width, generator=seeded(9)) * torch.logspace(0.5, -1.5, width)[:, None]
    return list((torch.randn(count, width, generator=seeded(seed)) @ mix).split(32))
