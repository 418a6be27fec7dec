"""Factors and ranks by what an error costs the model, against dense float64 references."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from helpers import seeded
from torch import nn

from lowrank.calibration.batches import Batch
from lowrank.calibration.gradients import GradientMetric, LossAwareCurve, output_gradients, ranks_for_budget
from lowrank.errors import NumericsError, RankError, UsageError
from lowrank.numerics.moments import InputStatistics


def metric(size: int, seed: int) -> torch.Tensor:
    root = torch.randn(size, size, generator=seeded(seed), dtype=torch.float64)
    return root @ root.T


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
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
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
    # Five positions in two samples: one direction for each, and one in all positions of a sample over the root of their number.
    torch.testing.assert_close(found, 3.5 * torch.eye(3, dtype=torch.float64), rtol=0.1, atol=0.3)


def test_the_gradients_of_a_convolution_are_summed_over_its_positions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten())
    batches = [Batch((torch.randn(100, 2, 4, 5, generator=seeded(k)),), size=100) for k in range(5)]
    found = output_gradients(model, batches, {"0": model[0]})["0"]
    torch.testing.assert_close(found, 20 * torch.eye(3, dtype=torch.float64), rtol=0.05, atol=1.0)


def test_the_factors_are_the_best_in_both_metrics() -> None:
    weight = torch.randn(7, 9, generator=seeded(), dtype=torch.float64)
    samples = torch.randn(300, 9, generator=seeded(1), dtype=torch.float64) @ metric(9, 2) + 1.0
    statistics, gradients = InputStatistics.from_samples(samples), metric(7, 3)
    curve = LossAwareCurve(weight, statistics, gradients, ridge=1e-9)
    for rank in (1, 3, 6):
        found = curve.factors(rank)
        lost = weight - found.left @ found.right
        cost = float(torch.trace(gradients @ lost @ statistics.covariance @ lost.T))
        values, vectors = torch.linalg.eigh(gradients)
        inputs, directions = torch.linalg.eigh(statistics.covariance)
        whitened = (vectors * values.sqrt()).T @ weight @ (directions * inputs.clamp_min(0).sqrt())
        best = float(torch.linalg.svdvals(whitened)[rank:].square().sum())
        assert cost == pytest.approx(best, rel=1e-5)
        assert float(curve.costs[rank]) == pytest.approx(best, rel=1e-5)
        assert found.bias_shift is not None
        torch.testing.assert_close(found.bias_shift, lost @ statistics.mean)


def test_ranks_are_those_that_no_other_choice_beats() -> None:
    shapes = {"a": (6, 6), "b": (4, 8), "c": (8, 8)}
    costs = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        squares = torch.rand(min(shape), generator=seeded(seed), dtype=torch.float64).sort(descending=True)[0] ** 3
        costs[name] = torch.cat([squares.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])

    def price(name: str, rank: int | None) -> int:
        rows, columns = shapes[name]
        return rows * columns if rank is None else rank * (rows + columns)

    for budget in (60, 80, 100, 132):
        chosen = ranks_for_budget(costs, shapes, budget)
        assert sum(price(name, rank) for name, rank in chosen.items()) <= budget
        total = sum(0.0 if rank is None else float(costs[name][rank]) for name, rank in chosen.items())
        choices = [[*range(1, min(shape) + 1), None] for shape in shapes.values()]
        best = min(
            sum(0.0 if rank is None else float(costs[name][rank]) for name, rank in zip(shapes, ranks, strict=True))
            for ranks in itertools.product(*choices)
            if sum(price(name, rank) for name, rank in zip(shapes, ranks, strict=True)) <= budget
        )
        assert total == pytest.approx(best, rel=1e-9, abs=1e-12)
    with pytest.raises(RankError, match="39 parameters do not pay for rank 1 in each of 3 layers"):
        ranks_for_budget(costs, shapes, 39)


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


def test_only_the_pooled_directions_are_shared_by_positions() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    batches = [Batch((torch.randn(50, 6, 3, generator=seeded(k)),), size=50) for k in range(40)]
    own = output_gradients(model, batches, {"0": model[0]}, directions="output")["0"]
    pooled = output_gradients(model, batches, {"0": model[0]}, directions="pooled")["0"]
    # Six positions a sample: one direction each; and, pooled, one more in all of them over √6.
    torch.testing.assert_close(own, 6 * torch.eye(2, dtype=torch.float64), rtol=0.05, atol=0.2)
    torch.testing.assert_close(pooled, 7 * torch.eye(2, dtype=torch.float64), rtol=0.05, atol=0.3)
    with pytest.raises(UsageError, match="directions: must be one of output, pooled, labels, got 'all'"):
        output_gradients(model, batches, {"0": model[0]}, directions="all")


def test_models_that_work_in_place_are_differentiated() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3), nn.ReLU(inplace=True))
    plain = nn.Sequential(model[0], nn.ReLU(), model[2], nn.ReLU())
    batches = [Batch((torch.randn(40, 4, generator=seeded(3)),), size=40)]
    targets = {"0": model[0], "2": model[2]}
    found, expected = output_gradients(model, batches, targets), output_gradients(plain, batches, targets)
    assert all(torch.equal(found[name], expected[name]) for name in targets)


def test_the_roots_of_a_metric_undo_each_other_group_by_group() -> None:
    gradients = metric(6, 4)
    whole, cut = GradientMetric(gradients, ridge=0.0), GradientMetric(gradients, ridge=0.0, groups=2)
    torch.testing.assert_close(whole.root @ whole.root, gradients)
    assert float(cut.root[:3, 3:].abs().max()) == 0.0
    torch.testing.assert_close((cut.root @ cut.root)[3:, 3:], gradients[3:, 3:])
    kernel = torch.randn(6, 2, 3, 3, generator=seeded(5), dtype=torch.float64)
    for one in (whole, cut):
        torch.testing.assert_close(one.back(one.of(kernel)), kernel)
    with pytest.raises(NumericsError, match=r"layer x: gradients whose mean square is 0\.0"):
        GradientMetric(torch.zeros(2, 2, dtype=torch.float64), name="layer x")
