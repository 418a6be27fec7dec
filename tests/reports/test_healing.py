"""The healing study runs, and its results say what the README says."""

from __future__ import annotations

import itertools
from types import ModuleType

import pytest
import torch
from helpers import seeded
from studies import load_study, results_of
from torch import nn

from lowrank.calibration.batches import Batch
from lowrank.calibration.gradients import output_gradients
from lowrank.errors import RankError
from lowrank.numerics.moments import InputStatistics


@pytest.fixture
def study() -> ModuleType:
    return load_study("healing")


def test_every_case_was_run_and_healed() -> None:
    results = results_of("healing")
    assert [row["case"] for row in results["rows"]] == list(load_study("healing").CASES)
    for row in results["rows"]:
        assert row["error_after"] <= row["error_before"]


def test_what_the_readme_says_of_the_targets() -> None:
    rows = {row["case"]: row for row in results_of("healing")["rows"]}
    for case, drift in load_study("healing").TARGETS.items():
        assert rows[case]["after"]["drift"] <= drift
        assert rows[case]["after"]["spearman"] >= rows[case]["dense"]["spearman"] - 0.005
    images = {
        data: [rows["resnet56-50-lowrank"][when][data] for when in ("dense", "after")]
        for data in ("accuracy", "accuracy_jpeg")
    }
    assert all(dense - after < 0.01 for dense, after in images.values())


def test_the_smallest_case_heals() -> None:
    pytest.importorskip("sklearn")
    study = load_study("healing")
    row = study.run_case("digits-10-lowrank", study.SMOKE, 40)
    assert row["error_after"] < row["error_before"]
    assert row["samples"] + row["samples_held_out"] == 1200
    table = study.render({"rows": [row]})
    assert f"{row['after']['accuracy']:.1%}" in table
    assert "digits-10-lowrank" in table


def second_moment(size: int, seed: int) -> torch.Tensor:
    root = torch.randn(size, size, generator=seeded(seed), dtype=torch.float64)
    return root @ root.T


def test_the_factors_are_the_best_in_both_metrics(study: ModuleType) -> None:
    weight = torch.randn(7, 9, generator=seeded(), dtype=torch.float64)
    samples = torch.randn(300, 9, generator=seeded(1), dtype=torch.float64) @ second_moment(9, 2) + 1.0
    statistics, gradients = InputStatistics.from_samples(samples), second_moment(7, 3)
    curve = study.LossAwareCurve(weight, statistics, gradients, ridge=1e-9)
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


def test_ranks_are_those_that_no_other_choice_beats(study: ModuleType) -> None:
    shapes = {"a": (6, 6), "b": (4, 8), "c": (8, 8)}
    costs = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        squares = torch.rand(min(shape), generator=seeded(seed), dtype=torch.float64).sort(descending=True)[0] ** 3
        costs[name] = torch.cat([squares.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])

    def price(name: str, rank: int | None) -> int:
        rows, columns = shapes[name]
        return rows * columns if rank is None else rank * (rows + columns)

    for budget in (60, 80, 100, 132):
        chosen = study.ranks_for_budget(costs, shapes, budget)
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
        study.ranks_for_budget(costs, shapes, 39)


def test_the_pooled_directions_are_shared_by_positions(study: ModuleType) -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    batches = [Batch((torch.randn(50, 6, 3, generator=seeded(k)),), size=50) for k in range(40)]
    found = output_gradients(model, batches, {"0": model[0]}, directions=study.pooled)["0"]
    # Six positions a sample: one direction each, and one more in all of them over √6.
    torch.testing.assert_close(found, 7 * torch.eye(2, dtype=torch.float64), rtol=0.05, atol=0.3)
