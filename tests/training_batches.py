"""A small classification task that a linear map can learn, models for it, and one that is killed on the way."""

from __future__ import annotations

import copy

import torch
from helpers import seeded
from torch import nn

from lowrank.layers import QuantizedLinear, QuantizedLowRankLayer, SVDCompressedLinear
from lowrank.lora import LoRAConfig


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


def loader(size: int) -> torch.utils.data.DataLoader[object]:
    """So many samples of the task, shuffled into batches of 8."""
    pairs = batches(1, size=size)[0]
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*pairs), batch_size=8, shuffle=True)


def normed() -> nn.Sequential:
    """A norm between two linear layers, "0" and "2"."""
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 24), nn.LayerNorm(24), nn.Linear(24, 3))


BOTH_LAYERS = LoRAConfig(r=2, target_modules=["0", "2"])


def original_and_compressed(dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, nn.Sequential]:
    """An original, and the same with its three linear layers compressed in three formats."""
    torch.manual_seed(3)
    layers = [nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 12), nn.LayerNorm(12)]
    original = nn.Sequential(*layers).to(dtype).eval()
    model = copy.deepcopy(original)
    model[0] = SVDCompressedLinear.from_linear(original[0], rank=5)
    model[2] = QuantizedLowRankLayer.from_linear(original[2], rank=6)
    model[4] = QuantizedLinear.from_linear(original[4], bits=4)
    return original, model


def classifier() -> nn.Sequential:
    """Two linear layers, "0" and "2"; three classes."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def three_layers() -> nn.Sequential:
    """Three linear layers, "0", "2" and "4"."""
    torch.manual_seed(2)
    layers = [nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 3)]
    return nn.Sequential(*layers)


def three_formats() -> nn.Sequential:
    """:func:`three_layers`, each compressed in another format."""
    model = three_layers()
    model[0] = QuantizedLinear.from_linear(model[0], bits=3)
    model[2] = QuantizedLowRankLayer.from_linear(model[2], rank=6)
    model[4] = SVDCompressedLinear.from_linear(model[4], rank=2)
    return model
