"""Input statistics against a dense float64 reference."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import seeded

from lowrank.errors import CalibrationError
from lowrank.numerics.moments import InputStatistics, TokenCounts, activation_error

EPS = torch.finfo(torch.float64).eps


def test_moments_of_several_updates_equal_the_dense_reference() -> None:
    rows = torch.randn(200, 7, dtype=torch.float64) * 3.0 + 1.0
    statistics = InputStatistics(7)
    statistics.update(rows[:50].reshape(5, 10, 7))
    statistics.update(rows[50:])
    assert statistics.count == 200
    tolerance = 200 * EPS * float(rows.abs().max()) ** 2
    torch.testing.assert_close(statistics.mean, rows.mean(dim=0), rtol=0.0, atol=tolerance)
    torch.testing.assert_close(statistics.gram, rows.T @ rows / 200, rtol=0.0, atol=tolerance)
    torch.testing.assert_close(statistics.covariance, torch.cov(rows.T, correction=0), rtol=0.0, atol=4 * tolerance)


def test_float32_inputs_are_summed_in_float64() -> None:
    # At 1e4 ± 1 a float32 gram loses the variance altogether.
    rows = (1e4 + torch.randn(1000, 3)).float()
    covariance = InputStatistics.from_samples(rows).covariance
    reference = torch.cov(rows.double().T, correction=0)
    torch.testing.assert_close(covariance, reference, rtol=0.0, atol=1e8 * 1000 * EPS)
    assert float(torch.linalg.eigvalsh(covariance)[0]) > 0.5


def test_wrong_feature_count_is_refused() -> None:
    with pytest.raises(CalibrationError, match="3 features"):
        InputStatistics(3).update(torch.zeros(2, 4))


def test_ridge_is_relative_to_the_scale() -> None:
    rows = torch.randn(50, 4, dtype=torch.float64)
    one, large = InputStatistics.from_samples(rows), InputStatistics.from_samples(1e6 * rows)
    torch.testing.assert_close(
        one.moment(centred=True, ridge=0.1) * 1e12, large.moment(centred=True, ridge=0.1), rtol=1e-9, atol=0.0
    )


def test_activation_error_is_the_relative_error_of_the_outputs() -> None:
    rows = torch.randn(300, 6, dtype=torch.float64)
    weight, other = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    expected = torch.linalg.norm(rows @ (weight - other).T) / torch.linalg.norm(rows @ weight.T)
    found = activation_error(weight, other, InputStatistics.from_samples(rows).gram)
    assert math.isclose(found, float(expected), rel_tol=1e-12)


def test_activation_error_of_zero_weight() -> None:
    moment = torch.eye(2, dtype=torch.float64)
    assert activation_error(torch.zeros(2, 2), torch.zeros(2, 2), moment) == 0.0
    assert activation_error(torch.zeros(2, 2), torch.ones(2, 2), moment) == math.inf


def test_token_counts() -> None:
    counts = TokenCounts(5)
    counts.update(torch.tensor([[1, 1], [4, 0]]))
    counts.update(torch.tensor([4]))
    assert counts.counts.tolist() == [1, 2, 0, 0, 2]
    assert (counts.count, counts.unseen) == (5, 2)


def test_blocks_are_the_diagonal_blocks_of_the_whole_moment() -> None:
    samples = torch.randn(50, 12, generator=seeded(), dtype=torch.float64) + 0.3
    whole, blocked = InputStatistics(12), InputStatistics(12, blocks=3)
    for statistics in (whole, blocked):
        statistics.update(samples[:20])
        statistics.update(samples[20:])
    for index in range(3):
        wanted = slice(4 * index, 4 * index + 4)
        for statistics in (whole, blocked):
            part = statistics.block(index, 3)
            torch.testing.assert_close(part.gram, whole.gram[wanted, wanted], rtol=1e-14, atol=1e-14)
            torch.testing.assert_close(part.covariance, whole.covariance[wanted, wanted], rtol=1e-13, atol=1e-13)
            assert part.count == 50
    assert blocked.gram.shape == (12, 12) and float(blocked.gram[0, 4:].abs().max()) == 0.0
