"""Error feedback against the textbook's loop, on moments of every condition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowrank.errors import NumericsError, RankError
from lowrank.numerics.feedback import choose_damping, gptq, lost_energy
from lowrank.numerics.grids import Grid, Rounded, dequantize_groups, spread
from lowrank.numerics.moments import InputStatistics
from lowrank.numerics.rounding_methods import nearest


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(count: int, features: int, seed: int = 0, shared: float = 1.0) -> Tensor:
    """Correlated inputs, of sizes that differ."""
    mixing = torch.randn(features, features, dtype=torch.float64, generator=seeded(99))
    plain = torch.randn(count, features, dtype=torch.float64, generator=seeded(seed))
    common = torch.randn(count, 1, dtype=torch.float64, generator=seeded(seed + 1000))
    return (plain @ mixing * 0.3 + shared * common) * torch.logspace(-1, 0.5, features, dtype=torch.float64)


def moment_of(rows: Tensor) -> Tensor:
    return rows.T @ rows / rows.shape[0]


def weights(rows: int = 24, columns: int = 100) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=seeded(5))


def by_the_inverse(weight: Tensor, grid: Grid, moment: Tensor, damping: float, start: Rounded) -> Tensor:
    """GPTQ as its authors wrote it: errors pushed on through the Cholesky factor of the inverse, in float64."""
    columns = weight.shape[1]
    order = torch.argsort(moment.diagonal(), descending=True, stable=True)
    damped = moment + damping * moment.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)
    steps = spread(start.scale.double(), grid.span(columns), columns).expand(-1, columns)
    middle = torch.full_like(start.scale, grid.middle) if start.zero is None else start.zero
    zeros = spread(middle.double(), grid.span(columns), columns).expand(-1, columns)
    left, codes = weight.clone(), torch.zeros(weight.shape, dtype=torch.float64)
    for place, index in enumerate(order.tolist()):
        aim = left[:, index]
        codes[:, index] = (torch.round(aim / steps[:, index]) + zeros[:, index]).clamp(0, grid.top)
        lost = (aim - steps[:, index] * (codes[:, index] - zeros[:, index])) / factor[place, place]
        later = order[place + 1 :]
        left[:, later] -= lost[:, None] * factor[place, place + 1 :]
    return codes.to(torch.uint8)


@pytest.mark.parametrize("grid", [Grid(4, 32), Grid(3, 32, True), Grid(2), Grid(8, 64)], ids=str)
def test_the_first_pass_is_that_of_the_paper(grid: Grid) -> None:
    weight, moment = weights(), moment_of(tokens(400, 100))
    found = gptq(weight, grid, moment, damping=0.01, sweeps=0)
    expected = by_the_inverse(weight, grid, moment, 0.01, found)
    # float32 may take the other of two levels that are equally near, and what follows differs then.
    assert float((found.codes != expected).float().mean()) < 0.01
    lost = lost_energy(weight, found, grid, moment)
    assert lost == pytest.approx(lost_energy(weight, found._replace(codes=expected), grid, moment), rel=0.02)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("zero_point", [False, True])
def test_feedback_errs_less_than_nearest_and_each_sweep_less_still(bits: int, zero_point: bool) -> None:
    weight, moment, grid = weights(), moment_of(tokens(400, 100)), Grid(bits, 32, zero_point)
    costs = [lost_energy(weight, nearest(weight, grid, moment), grid, moment)]
    costs += [
        lost_energy(weight, gptq(weight, grid, moment, damping=1e-4, sweeps=sweeps), grid, moment)
        for sweeps in (0, 1, 3)
    ]
    assert costs[1] < (0.9 if bits == 2 else 0.6) * costs[0] and costs[2] < costs[1] and costs[3] <= costs[2]


def test_no_code_alone_could_be_better_after_many_sweeps() -> None:
    weight, moment, grid = weights(4, 20), moment_of(tokens(100, 20)), Grid(3, 10)
    damping = 0.01
    found = gptq(weight, grid, moment, damping=damping, sweeps=30)
    damped = moment + damping * moment.diagonal().mean() * torch.eye(20, dtype=torch.float64)
    least = lost_energy(weight, found, grid, damped)
    for row in range(4):
        for column in range(20):
            for code in range(grid.top + 1):
                other = found.codes.clone()
                other[row, column] = code
                assert lost_energy(weight, found._replace(codes=other), grid, damped) >= least * (1 - 1e-5)


@pytest.mark.parametrize("grid", [Grid(4, 32), Grid(3, None, True)], ids=str)
def test_blocks_are_rounded_each_by_its_own_moment(grid: Grid) -> None:
    weight = weights(24, 50)
    stacked = torch.stack([moment_of(tokens(300, 50, seed, shared=seed)) for seed in range(3)])
    found = gptq(weight, grid, stacked)
    for index, rows in enumerate(torch.arange(24).split(8)):
        alone = gptq(weight[rows], grid, stacked[index])
        assert float((found.codes[rows] != alone.codes).float().mean()) < 0.02
        assert torch.equal(
            nearest(weight, grid, stacked).scale[rows], nearest(weight[rows], grid, stacked[index]).scale
        )


def test_a_block_that_nothing_reached_is_rounded_to_the_nearest_levels() -> None:
    weight, grid = weights(16, 40), Grid(4, 20)
    moments = torch.stack([moment_of(tokens(300, 40)), torch.zeros(40, 40, dtype=torch.float64)])
    found, plain = gptq(weight, grid, moments, sweeps=0), nearest(weight, grid)
    assert torch.equal(found.codes[8:], plain.codes[8:]) and torch.equal(found.scale[8:], plain.scale[8:])
    assert not torch.equal(found.codes[:8], plain.codes[:8])
    alone = gptq(weight, grid, None, sweeps=0)
    assert torch.equal(alone.codes, plain.codes)


def test_no_moment_makes_it_fail() -> None:
    """Dead inputs, one token, two inputs that are always equal, sizes at both ends of float64, not quite positive."""
    weight, grid = weights(8, 30), Grid(4, 10)
    rows = tokens(200, 30)
    dead, twins = rows.clone(), rows.clone()
    dead[:, 3:20] = 0.0
    twins[:, 1::2] = twins[:, ::2]
    wrong = moment_of(rows)
    wrong[0, 1] = wrong[1, 0] = 10.0 * wrong.diagonal().max()
    good = moment_of(rows)
    for moment in (
        moment_of(dead),
        moment_of(rows[:1]),
        moment_of(twins),
        1e-280 * good,
        1e280 * good,
        wrong,
        0 * good,
    ):
        for damping in (0.0, 0.01):
            found = gptq(weight, grid, moment, damping=damping)
            made = dequantize_groups(*found, grid, torch.float64)
            assert bool(torch.isfinite(made).all())
            assert float((made - weight).square().sum() / weight.square().sum()) < 0.5
    tiny = 1e-30 * weight
    assert torch.equal(gptq(tiny, grid, good).codes, gptq(tiny, grid, 7.0 * good).codes)
    assert gptq(weight[:0], grid, good).codes.shape == (0, 30)


def test_rows_that_stand_for_a_moment_are_used() -> None:
    weight, grid, rows = weights(8, 1100), Grid(3, 64), tokens(3000, 1100, shared=5.0)
    kept = InputStatistics(1100, sampled=True)
    kept.update(rows)
    for centred in (False, True):
        metric = kept.metric(centred=centred, ridge=1e-3)
        lost = lost_energy(weight, gptq(weight, grid, metric), grid, metric)
        assert lost < 0.8 * lost_energy(weight, nearest(weight, grid, metric), grid, metric)
    blocks = InputStatistics(200, blocks=2, sampled=True)
    blocks.update(rows[:, :200])
    metric = blocks.block_metric(2, centred=False)
    own = weights(8, 100)
    for grid in (Grid(3, 64), Grid(3)):
        found = gptq(own, grid, metric)
        assert lost_energy(own, found, grid, metric) < lost_energy(own, nearest(own, grid, metric), grid, metric)


def test_held_out_tokens_choose_more_damping_where_there_are_few() -> None:
    weight, grid = weights(16, 60), Grid(3, 20)
    held_out = moment_of(tokens(2000, 60, seed=8))
    thin, thick = moment_of(tokens(20, 60, seed=1)), moment_of(tokens(5000, 60, seed=1))
    assert choose_damping(weight, grid, thin, held_out) > choose_damping(weight, grid, thick, held_out)


def test_the_same_bytes_every_time_and_what_is_wrong_is_named() -> None:
    weight, grid, moment = weights(), Grid(4, 64), moment_of(tokens(200, 100))
    before = weight.clone(), moment.clone()
    one, other = gptq(weight, grid, moment), gptq(weight, grid, moment)
    assert torch.equal(one.codes, other.codes) and torch.equal(one.scale, other.scale)
    assert torch.equal(weight, before[0]) and torch.equal(moment, before[1])
    broken = moment.clone()
    broken[2, 3] = float("nan")
    with pytest.raises(NumericsError, match=r"layer fc \(input moment\).*nan at index \[2, 3\]"):
        gptq(weight, grid, broken, name="layer fc")
    with pytest.raises(RankError, match=r"must be \(100, 100\).*got shape \(99, 99\)"):
        gptq(weight, grid, moment[:99, :99])
    with pytest.raises(RankError, match="blocks that divide the rows"):
        gptq(weight, grid, moment.expand(5, 100, 100))
