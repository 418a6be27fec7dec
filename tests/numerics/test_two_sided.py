"""Feedback over outputs as well as inputs: the second-order cost falls, and without gradients nothing changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowrank.errors import NumericsError, RankError
from lowrank.numerics.factored_moments import FactoredMoment
from lowrank.numerics.feedback import gptq
from lowrank.numerics.grids import Grid, Rounded, dequantize_groups
from lowrank.numerics.two_sided import two_sided


def correlated(features: int, seed: int, count: int = 600) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, features, dtype=torch.float64, generator=generator)
    rows = rows + 1.5 * torch.randn(count, 1, dtype=torch.float64, generator=generator)
    rows = rows * torch.logspace(-0.5, 0.5, features, dtype=torch.float64)
    return rows.T @ rows / count


def weights(rows: int = 48, columns: int = 70) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def cost(weight: Tensor, rounded: Rounded, grid: Grid, moment: Tensor, gradients: Tensor) -> float:
    lost = weight - dequantize_groups(*rounded, grid, torch.float64)
    return float(torch.trace(gradients @ lost @ moment @ lost.T))


@pytest.mark.parametrize("grid", [Grid(3, 32, True), Grid(4, 32), Grid(2)], ids=str)
def test_it_costs_the_model_less(grid: Grid) -> None:
    weight, moment, gradients = weights(), correlated(70, 1), correlated(48, 2)
    one = cost(weight, gptq(weight, grid, moment), grid, moment, gradients)
    costs = [
        cost(weight, two_sided(weight, grid, moment, gradients, rows_at_once=rows), grid, moment, gradients)
        for rows in (24, 4)
    ]
    assert costs[0] < 0.8 * one and costs[1] < costs[0]


def test_independent_outputs_are_rounded_as_by_the_inputs_alone() -> None:
    weight, grid, moment = weights(), Grid(4, 32), correlated(70, 1)
    alone = gptq(weight, grid, moment)
    for gradients in (torch.diag(torch.arange(1.0, 49.0)).double(), torch.zeros(48, 48).double(), None):
        found = two_sided(weight, grid, FactoredMoment.of(moment), gradients, rows_at_once=48)
        assert float((found.codes != alone.codes).float().mean()) < 0.01 and found.scale.dtype is alone.scale.dtype


def test_blocks_have_outputs_of_their_own() -> None:
    weight, grid, gradients = weights(), Grid(3, 35, True), correlated(48, 2)
    moments = torch.stack([correlated(70, 1), correlated(70, 3)])
    found = two_sided(weight, grid, moments, gradients)
    for index, rows in enumerate(torch.arange(48).chunk(2)):
        alone = two_sided(weight[rows], grid, moments[index], gradients[rows][:, rows])
        assert alone.zero is not None and found.zero is not None
        assert torch.equal(found.codes[rows], alone.codes) and torch.equal(found.zero[rows], alone.zero)


def test_what_is_wrong_is_named() -> None:
    weight, moment, gradients = weights(), correlated(70, 1), correlated(48, 2)
    with pytest.raises(RankError, match=r"has 48 outputs.*must be \(48, 48\), got \(47, 47\)"):
        two_sided(weight, Grid(4), moment, gradients[:47, :47])
    gradients[1, 2] = float("inf")
    with pytest.raises(NumericsError, match=r"fc \(gradients\).*inf at index \[1, 2\]"):
        two_sided(weight, Grid(4), moment, gradients, name="fc")
