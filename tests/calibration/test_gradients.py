"""Gradients that say what an error costs the model, against dense float64 references."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_same_state, seeded
from torch import nn

from lowrank.calibration.batches import Batch
from lowrank.calibration.gradients import output_gradients
from lowrank.errors import UsageError


def test_the_gradients_of_a_linear_chain_are_its_own_gram() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3)).train()
    model[0].weight.requires_grad_(False)
    batches = [Batch((torch.randn(500, 4, generator=seeded(k)),), size=500) for k in range(20)]
    before = copy.deepcopy(model.state_dict())
    found = output_gradients(model, batches, {"0": model[0], "2": model[2]})
    # With directions of unit covariance: E[(Wᵀv)(Wᵀv)ᵀ] = WᵀW; 10,000 of them leave about 1 % of noise.
    weight = model[2].weight.detach().double()
    torch.testing.assert_close(found["0"], weight.T @ weight, rtol=0.1, atol=0.03)
    torch.testing.assert_close(found["2"], torch.eye(3, dtype=torch.float64), rtol=0.1, atol=0.05)
    assert model.training and model[1].training
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert_same_state(model, before)
    again = output_gradients(model, batches, {"0": model[0], "2": model[2]})
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_layers_that_the_output_does_not_depend_on_are_absent() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    batch = Batch((torch.ones(4, 3),), size=4)
    assert output_gradients(model, [batch], {}) == {}
    assert output_gradients(model, [batch], {"elsewhere": nn.Linear(3, 2)}) == {}


def test_padding_counts_nowhere() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(9, 5), nn.Linear(5, 3)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(input_ids))

    torch.manual_seed(0)
    model = Tokens()
    ids = torch.tensor([[1, 2, 3, 0], [4, 5, 0, 0]])
    batch = Batch((), {"input_ids": ids, "attention_mask": (ids > 0).long()}, 2)
    found = output_gradients(model, [batch] * 400, {"head": model.head})["head"]
    # Five positions in two samples: one direction for each.
    torch.testing.assert_close(found, 2.5 * torch.eye(3, dtype=torch.float64), rtol=0.1, atol=0.3)


def test_the_gradients_of_a_convolution_are_summed_over_its_positions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten())
    batches = [Batch((torch.randn(100, 2, 4, 5, generator=seeded(k)),), size=100) for k in range(5)]
    found = output_gradients(model, batches, {"0": model[0]})["0"]
    torch.testing.assert_close(found, 20 * torch.eye(3, dtype=torch.float64), rtol=0.05, atol=1.0)


def test_drawn_labels_give_the_fisher_information_of_the_logits() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    x = torch.randn(8000, 4, generator=seeded(1))
    found = output_gradients(model, [Batch((x,), size=len(x))], {"0": model[0]}, directions="labels")["0"]
    with torch.no_grad():
        shares = model(x).double().softmax(dim=-1)
    # E[(p − onehot)(p − onehot)ᵀ] = diag(p) − ppᵀ, averaged over the samples.
    fisher = torch.diag(shares.mean(dim=0)) - shares.T @ shares / len(x)
    torch.testing.assert_close(found, fisher, rtol=0.05, atol=0.01)


def test_models_that_work_in_place_are_differentiated() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3), nn.ReLU(inplace=True))
    plain = nn.Sequential(model[0], nn.ReLU(), model[2], nn.ReLU())
    batches = [Batch((torch.randn(40, 4, generator=seeded(3)),), size=40)]
    targets = {"0": model[0], "2": model[2]}
    found, expected = output_gradients(model, batches, targets), output_gradients(plain, batches, targets)
    assert all(torch.equal(found[name], expected[name]) for name in targets)


def test_every_position_has_directions_of_its_own_unless_a_function_draws_others() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    batches = [Batch((torch.randn(50, 6, 3, generator=seeded(k)),), size=50) for k in range(40)]
    own = output_gradients(model, batches, {"0": model[0]})["0"]
    torch.testing.assert_close(own, 6 * torch.eye(2, dtype=torch.float64), rtol=0.05, atol=0.2)

    def ones(output: torch.Tensor, mask: torch.Tensor | None, generator: torch.Generator) -> torch.Tensor:
        return torch.ones_like(output)

    alike = output_gradients(model, batches, {"0": model[0]}, directions=ones)["0"]
    torch.testing.assert_close(alike, torch.full((2, 2), 6.0, dtype=torch.float64))
    with pytest.raises(UsageError, match="directions: must be one of output, labels, got 'pooled'"):
        output_gradients(model, batches, {"0": model[0]}, directions="pooled")
