"""Whole models that adapters go on: an encoder of blocks, a small one with norms, two linear layers."""

from __future__ import annotations

import torch
from helpers import seeded
from torch import Tensor, nn

import lowrank


class Block(nn.Module):
    """Two linear layers and a norm around a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(8, 8)
        self.key = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x + torch.tanh(self.query(x)) * self.key(x))
        return out


class Encoder(nn.Module):
    """An embedding, three blocks, an attention and a head: (batch, tokens) ids out of 9 to (batch, tokens, 4)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 8)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(Block() for _ in range(3))})
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.score = nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.encoder["layers"]:  # type: ignore[union-attr]
            x = block(x)
        out: Tensor = self.score(self.attention(x, x, x)[0])
        return out


IDS = torch.arange(10).reshape(2, 5) % 9


def run(model: nn.Module) -> Tensor:
    """Without gradients: nn.MultiheadAttention takes another path, with other rounding, where something requires one."""
    with torch.no_grad():
        out: Tensor = model(IDS)
    return out


BLOCKS = {f"encoder.layers.{index}.{name}" for index in range(3) for name in ("query", "key")}


class Normed(nn.Module):
    """Norms of which one's name is the other's end."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleDict({"linear": nn.Linear(6, 6), "input_norm": nn.LayerNorm(6)})
        self.mlp = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.mlp(self.first["input_norm"](self.first["linear"](x))))


def two_linear(*, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """8 → 12 → 5; its linear layers are "0" and "2"."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 12, dtype=dtype), nn.Tanh(), nn.Linear(12, 5, dtype=dtype))


def random_adapter(*names: str, **options: object) -> lowrank.LoRAConfig:
    """A configuration whose A and B are both random, so that the adapter changes the outputs."""
    return lowrank.LoRAConfig(r=2, target_modules=list(names), init_lora_weights=False, **options)  # type: ignore[arg-type]


def rows(dtype: torch.dtype = torch.float32) -> Tensor:
    """(7, 8), inputs of :func:`two_linear`."""
    return torch.randn(7, 8, generator=seeded(1)).to(dtype)


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """In evaluation mode, without gradients."""
    out: Tensor = model.eval()(x)
    return out
