"""A small module with one of each layer kind, and stand-ins for a plan and a report."""

from __future__ import annotations

import json

import torch
from torch import nn

from lowrank.layers import QuantizedEmbedding, QuantizedLinear, QuantizedLowRankLayer, SVDCompressedLinear


class Tiny(nn.Module):
    """One of each: embedding, shared layer, tied head, buffers stored and not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 12)
        self.mid = nn.Linear(12, 12)
        self.again = self.mid
        self.down = nn.Linear(12, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.full((8,), 0.25))
        self.register_buffer("mask", torch.arange(8) / 7, persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens) * self.mask + self.shift
        hidden = self.down(torch.tanh(self.again(torch.tanh(self.mid(self.up(hidden))))))
        return self.head(self.norm(hidden))


TOKENS = torch.arange(33).reshape(3, 11) % 11


def compressed(dtype: torch.dtype = torch.float32) -> Tiny:
    torch.manual_seed(1)
    model = Tiny().to(dtype).eval()
    model.up = SVDCompressedLinear.from_linear(model.up, rank=4)  # type: ignore[assignment]
    model.mid = model.again = QuantizedLinear.from_linear(model.mid)  # type: ignore[assignment]
    model.down = QuantizedLowRankLayer.from_linear(model.down, rank=5)  # type: ignore[assignment]
    embed = QuantizedEmbedding.from_embedding(model.embed)
    head = QuantizedLinear.from_linear(model.head)
    head.codes, head.scale = embed.codes, embed.scale
    model.embed, model.head = embed, head  # type: ignore[assignment]
    return model


class Report:
    def __init__(self, total: int, seconds: float = 1.5) -> None:
        self.run = {"seconds": seconds}
        self.totals = {"bytes_after": total, "error_budget": 0.1}

    def files(self) -> dict[str, str]:
        return {
            "report.json": json.dumps({"totals": self.totals}),
            "report.md": "# report\n",
            "report.html": "<html></html>\n",
            "run.json": json.dumps(self.run),
        }


class Plan:
    def to_json(self) -> str:
        return "{}\n"
