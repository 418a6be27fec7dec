"""Fine-tuning with gradient checkpointing: what is computed again in the backward pass is what was computed before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowrank
from lowrank.layers import QuantizedLinear, QuantizedLowRankLayer, SVDCompressedLinear


class Checkpointed(nn.Module):
    """Three blocks, each computed again in the backward pass where ``again`` says how."""

    def __init__(self, *, compressed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers: list[Any] = [nn.Linear(16, 16) for _ in range(3)]
        if compressed:
            layers = [
                QuantizedLinear.from_linear(layers[0]),
                QuantizedLowRankLayer.from_linear(layers[1], rank=6),
                SVDCompressedLinear.from_linear(layers[2], rank=6),
            ]
        self.blocks = nn.ModuleList(nn.Sequential(layer, nn.Tanh()) for layer in layers)
        self.first, self.head = nn.Linear(16, 16), nn.Linear(16, 3)
        self.again = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.again else block(x)
        out: Tensor = self.head(x)
        return out


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_dropout": 0.2}], ids=["plain", "dora", "dropout"])
@pytest.mark.parametrize("compressed", [False, True], ids=["dense", "compressed"])
def test_checkpointing_changes_nothing_but_the_memory(compressed: bool, options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 16, generator=generator)
    data = [(x, (x.sum(1) > 0).long())]
    weights = []
    for again in (False, True):
        config = lowrank.LoRAConfig(r=2, target_modules="all-linear", **options)
        model = lowrank.add_lora(Checkpointed(compressed=compressed), config, seed=2)
        start = [parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad]
        model.again = again  # type: ignore[assignment]
        lowrank.finetune(model, data, epochs=3, lr=1e-2, seed=0, progress=False)
        trained = [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]
        assert all(not torch.equal(*pair) for pair in zip(start, trained, strict=True))
        weights.append(torch.cat([parameter.flatten() for parameter in trained]))
    assert torch.equal(*weights)
