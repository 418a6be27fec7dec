"""Checkpoints in place of kept activations: the same numbers, and the model afterwards as before."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from training_batches import batches

from lowrank.training import TrainingResult, finetune
from lowrank.training.blocks import checkpointed


def test_a_forward_set_on_the_instance_comes_back() -> None:
    block = lambda: nn.Sequential(nn.Linear(2, 2))  # noqa: E731
    model = nn.Sequential(block(), block())
    own = model[0].forward
    model[0].forward = own
    with checkpointed(model) as count:
        assert count == 2
        assert model[0].forward is not own
    assert model[0].__dict__["forward"] is own
    assert "forward" not in model[1].__dict__


def test_checkpointing_goes_with_a_model_that_caches_keys() -> None:
    pytest.importorskip("transformers", reason="the extra hf is not installed")
    from tiny_models import make_causal_model

    ids = torch.randint(4, 20, (4, 9), generator=torch.Generator().manual_seed(0))
    losses = []
    for checkpointing in (False, True):
        model = make_causal_model()
        data = [{"input_ids": ids, "labels": ids}]
        result = finetune(model, data, steps=2, lr=1e-2, gradient_checkpointing=checkpointing, progress=False)
        losses.append([row["loss"] for row in result.history])
    assert losses[0] == losses[1]


def test_checkpointing_changes_no_number() -> None:
    def run(checkpointing: bool) -> tuple[TrainingResult, nn.Module]:
        torch.manual_seed(0)
        block = [nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.3), nn.Tanh()) for _ in range(2)]
        model = nn.Sequential(nn.Sequential(*block), nn.Linear(6, 3))
        return finetune(
            model, batches(), epochs=1, lr=0.01, gradient_checkpointing=checkpointing, progress=False
        ), model

    (plain, one), (checked, other) = run(False), run(True)
    assert plain == checked
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
