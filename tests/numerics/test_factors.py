"""Factors against dense references: optimal in the metric asked for, exact at full rank, one decomposition for all ranks."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from helpers import matrix_with_spectrum
from torch import Tensor

from lowrank.errors import NumericsError, RankError
from lowrank.numerics import factors as factors_module
from lowrank.numerics.factors import factorize, factorize_embedding
from lowrank.numerics.moments import InputStatistics, TokenCounts

EPS = torch.finfo(torch.float64).eps
SHAPES = [(12, 8), (8, 12), (10, 10)]


def _output_error(weight: Tensor, layer: Tensor, shift: Tensor | None, rows: Tensor) -> float:
    difference = rows @ (weight - layer).T - (0.0 if shift is None else shift)
    return float(difference.square().sum() / rows.shape[0])


def _best_output_error(weight: Tensor, rows: Tensor, rank: int) -> float:
    """By the SVD of the outputs themselves: no layer of this rank can do better."""
    outputs = rows @ weight.T
    return float(torch.linalg.svdvals(outputs)[rank:].square().sum() / rows.shape[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_plain_factors_have_the_error_of_the_spectrum(shape: tuple[int, int]) -> None:
    sigma = torch.logspace(0, -3, min(shape), dtype=torch.float64)
    weight = matrix_with_spectrum(*shape, sigma, torch.Generator().manual_seed(0))
    curve = factorize(weight)
    for rank in (1, 4, min(shape)):
        kept = curve.factors(rank)
        assert kept.left.shape == (shape[0], rank) and kept.right.shape == (rank, shape[1]) and kept.bias_shift is None
        lost = torch.linalg.norm(weight - kept.left @ kept.right)
        tail = torch.linalg.norm(sigma[rank:])
        assert abs(float(lost - tail)) <= 100 * EPS
        assert abs(float(curve.errors[rank]) - float(tail / torch.linalg.norm(sigma))) <= 100 * EPS
    assert curve.errors[0] == 1.0 and curve.errors[-1] == 0.0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("centred", [True, False])
def test_data_aware_factors_are_optimal_on_the_outputs(shape: tuple[int, int], centred: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(400, shape[1], generator=generator, dtype=torch.float64) @ torch.diag(
        torch.logspace(0, -2, shape[1], dtype=torch.float64)
    ) + torch.arange(shape[1])
    weight = torch.randn(*shape, generator=generator, dtype=torch.float64)
    curve = factorize(weight, InputStatistics.from_samples(rows), shift_bias=centred)
    reference_rows = rows - rows.mean(dim=0) if centred else rows
    for rank in (1, 3, 6):
        kept = curve.factors(rank)
        best = _best_output_error(weight, reference_rows, rank)
        found = _output_error(weight, kept.left @ kept.right, kept.bias_shift, rows)
        assert best <= found * (1 + 1e-9)
        assert found <= best * (1 + 1e-8) + 1e-12
        whole = float((reference_rows @ weight.T).square().sum() / rows.shape[0])
        assert abs(float(curve.errors[rank]) ** 2 - best / whole) <= 1e-10


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 3, 500])
def test_full_rank_gives_the_weight_back_even_for_a_singular_moment(shape: tuple[int, int], tokens: int) -> None:
    rows = torch.randn(tokens, shape[1], dtype=torch.float64)
    rows[:, 0] = 0.0  # a dead channel
    rows[:, 2] = rows[:, 1]  # and a duplicate one
    weight = torch.randn(*shape, dtype=torch.float64)
    kept = factorize(weight, InputStatistics.from_samples(rows)).factors(min(shape))
    tolerance = 100 * EPS * float(torch.linalg.norm(weight))
    assert float(torch.linalg.norm(weight - kept.left @ kept.right)) <= tolerance
    assert kept.bias_shift is not None and float(kept.bias_shift.abs().max()) <= 10 * tolerance


def test_constant_inputs_fall_back_to_the_plain_svd() -> None:
    weight = torch.randn(6, 5, dtype=torch.float64)
    statistics = InputStatistics.from_samples(torch.ones(20, 5))
    kept = factorize(weight, statistics).factors(2)
    plain = factorize(weight).factors(2)
    torch.testing.assert_close(kept.left @ kept.right, plain.left @ plain.right, rtol=0.0, atol=1e-12)
    assert kept.bias_shift is not None
    constant = torch.ones(5, dtype=torch.float64)
    torch.testing.assert_close(
        kept.left @ (kept.right @ constant) + kept.bias_shift, weight @ constant, rtol=0.0, atol=1e-12
    )


def test_ridge_moves_towards_the_plain_svd() -> None:
    rows = torch.randn(100, 8, dtype=torch.float64) @ torch.diag(torch.logspace(0, -4, 8, dtype=torch.float64))
    weight = torch.randn(8, 8, dtype=torch.float64)
    statistics = InputStatistics.from_samples(rows)
    plain = factorize(weight).factors(3)

    def distance(ridge: float) -> float:
        kept = factorize(weight, statistics, ridge=ridge).factors(3)
        return float(torch.linalg.norm(kept.left @ kept.right - plain.left @ plain.right))

    assert distance(1e9) < 1e-6 < distance(1.0) < distance(0.0)


def test_every_rank_comes_from_one_decomposition() -> None:
    curve = factorize(torch.randn(9, 7), InputStatistics.from_samples(torch.randn(50, 7)))
    with (
        mock.patch.object(factors_module, "safe_eigh", side_effect=AssertionError),
        mock.patch.object(factors_module, "safe_svd", side_effect=AssertionError),
    ):
        assert [curve.factors(rank).rank for rank in range(1, 8)] == list(range(1, 8))


def test_zero_matrix_and_repeated_values() -> None:
    zero = factorize(torch.zeros(4, 3))
    assert float((zero.factors(1).left @ zero.factors(1).right).abs().max()) == 0.0
    assert zero.errors.tolist() == [0.0] * 4
    equal = factorize(torch.eye(4))
    torch.testing.assert_close(equal.errors, torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0], dtype=torch.float64).sqrt())


def test_rank_for_error_is_the_smallest() -> None:
    curve = factorize(torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0])))
    for wanted in (0.9, 0.5, 0.3, 0.1, 0.0):
        rank = curve.rank_for_error(wanted)
        assert curve.errors[rank] <= wanted
        assert rank == 1 or curve.errors[rank - 1] > wanted


@pytest.mark.parametrize("rank", [0, -1, 5, 10**12, True, 2.0, "2", float("nan")])
def test_impossible_ranks_are_refused(rank: object) -> None:
    with pytest.raises(RankError, match="from 1 to 4"):
        factorize(torch.randn(4, 6)).factors(rank)  # type: ignore[arg-type]


def test_bad_weights_are_refused() -> None:
    weight = torch.ones(3, 3)
    weight[1, 2] = float("nan")
    with pytest.raises(NumericsError, match="fc"):
        factorize(weight, name="fc")
    with pytest.raises(RankError, match=r"\(0, 4\)"):
        factorize(torch.zeros(0, 4))


@pytest.mark.parametrize("shape", [(20, 6), (4, 6)])
def test_embedding_factors_weigh_rows_by_their_look_ups(shape: tuple[int, int]) -> None:
    table = torch.randn(*shape, dtype=torch.float64)
    counts = TokenCounts(shape[0])
    counts.update(torch.randint(0, shape[0], (200,)))
    curve = factorize_embedding(table, counts)
    root = torch.sqrt(counts.counts / counts.count)[:, None]
    sigma = torch.linalg.svdvals(root * table)
    for rank in (1, 3, min(shape)):
        kept = curve.factors(rank)
        lost = float(torch.linalg.norm(root * (table - kept.left @ kept.right)))
        assert abs(lost - float(torch.linalg.norm(sigma[rank:]))) <= 1e-12


def test_embedding_rows_never_looked_up_are_kept_at_full_rank() -> None:
    table = torch.randn(20, 6, dtype=torch.float64)
    counts = TokenCounts(20)
    counts.update(torch.tensor([3, 3, 5]))
    kept = factorize_embedding(table, counts).factors(6)
    torch.testing.assert_close(kept.left @ kept.right, table, rtol=0.0, atol=1e-12)
