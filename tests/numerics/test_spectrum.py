"""The ranks of a spectrum against prescribed singular values, and their definitions written out in numpy."""

from __future__ import annotations

import json
import math
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import eps, matrix_with_spectrum, seeded

from lowrank.errors import LowRankError, NumericsError, RankError, UsageError
from lowrank.numerics.linalg import fallback_counts, reset_fallback_counts
from lowrank.numerics.moments import InputStatistics
from lowrank.numerics.spectrum import Spectrum, analyze_weight, marchenko_pastur_median

F64 = torch.float64
SHAPES = {"tall": (20, 8), "wide": (8, 20), "square": (12, 12), "row": (1, 9), "column": (9, 1), "single": (1, 1)}


def decaying(count: int) -> torch.Tensor:
    return torch.tensor([3.0 * 0.7**k for k in range(count)], dtype=F64)


@pytest.mark.parametrize("case", SHAPES)
def test_every_number_follows_its_definition(case):
    m, n = SHAPES[case]
    sigma = decaying(min(m, n))
    spectrum = analyze_weight(matrix_with_spectrum(m, n, sigma, seeded(1)))
    values = sigma.numpy()
    energy = np.cumsum(values**2) / np.sum(values**2)
    assert spectrum.singular_values.dtype == F64
    assert spectrum.singular_values.tolist() == pytest.approx(values.tolist(), rel=1e-12)
    assert spectrum.full_rank == min(m, n)
    for fraction in (0.5, 0.9, 0.99, 0.999999):
        assert spectrum.energy_rank(fraction) == int(np.argmax(energy >= fraction)) + 1
    assert spectrum.energy_rank(0.0) == 0
    assert spectrum.energy_rank(1.0) == min(m, n)
    share = values / values.sum()
    assert spectrum.effective_rank == pytest.approx(float(np.exp(-np.sum(share * np.log(share)))), rel=1e-12)
    assert spectrum.stable_rank == pytest.approx(float(np.sum(values**2) / values[0] ** 2), rel=1e-12)
    assert spectrum.numerical_rank == min(m, n)
    assert spectrum.break_even_rank == pytest.approx(m * n / (m + n))
    for rank in range(min(m, n) + 1):
        tail = math.sqrt(float(np.sum(values[rank:] ** 2) / np.sum(values**2)))
        assert spectrum.tail_error(rank) == pytest.approx(tail, rel=1e-12)
        assert spectrum.rank_for_error(tail * (1 + 1e-9)) == rank
        assert spectrum.parameter_ratio(rank) == pytest.approx(rank * (m + n) / (m * n))
    assert (spectrum.tail_error(0), spectrum.tail_error(min(m, n))) == (1.0, 0.0)
    assert (spectrum.rank_for_error(0.0), spectrum.rank_for_error(1.0)) == (min(m, n), 0)


def test_tail_error_is_the_error_of_the_best_approximation():
    matrix = matrix_with_spectrum(9, 7, decaying(7), seeded(2))
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    spectrum = analyze_weight(matrix)
    for rank in range(8):
        approximation = u[:, :rank] * s[:rank] @ vh[:rank]
        measured = float((matrix - approximation).norm() / matrix.norm())
        assert spectrum.tail_error(rank) == pytest.approx(measured, abs=1e-14)


def test_small_tails_keep_their_digits():
    sigma = [1.0, 1e-6, 1e-9]
    spectrum = Spectrum((3, 3), torch.tensor(sigma, dtype=F64), eps(F64))
    assert spectrum.tail_error(2) == pytest.approx(1e-9, rel=1e-6)
    assert spectrum.rank_for_error(2e-9) == 2
    assert spectrum.energy_rank(1.0 - 1e-13) == 2


def test_repeated_singular_values():
    spectrum = analyze_weight(matrix_with_spectrum(6, 9, [2.0] * 6, seeded(3)))
    assert spectrum.effective_rank == pytest.approx(6.0, rel=1e-12)
    assert spectrum.stable_rank == pytest.approx(6.0, rel=1e-12)
    assert [spectrum.energy_rank(k / 6) for k in range(7)] == list(range(7))
    assert spectrum.tail_error(3) == pytest.approx(math.sqrt(0.5), rel=1e-12)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (1, 1)])
def test_a_zero_matrix_has_rank_0(shape):
    spectrum = analyze_weight(torch.zeros(shape))
    ranks = (spectrum.effective_rank, spectrum.stable_rank, spectrum.numerical_rank, spectrum.noise_rank)
    assert ranks == (0.0, 0.0, 0, 0)
    assert (spectrum.energy_rank(1.0), spectrum.rank_for_error(0.0), spectrum.tail_error(0)) == (0, 0, 0.0)
    summary = spectrum.summary()
    assert (summary["effective_rank"], summary["compression_ratio"], summary["energy_captured"]) == (0, math.inf, 1.0)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (2, 0, 3)])
def test_empty_matrices_are_defined(shape):
    spectrum = analyze_weight(torch.zeros(shape))
    assert spectrum.singular_values.shape == (0,)
    ranks = (spectrum.effective_rank, spectrum.stable_rank, spectrum.numerical_rank, spectrum.noise_rank)
    assert ranks == (0.0, 0.0, 0, 0)
    assert (spectrum.energy_rank(0.99), spectrum.tail_error(0), spectrum.parameter_ratio(0)) == (0, 0.0, 0.0)
    assert spectrum.break_even_rank == 0.0
    assert spectrum.summary()["original_params"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_rank_1(dtype):
    matrix = torch.outer(torch.arange(1.0, 7.0), torch.arange(1.0, 5.0)).to(dtype)
    spectrum = analyze_weight(matrix)
    assert (spectrum.numerical_rank, spectrum.energy_rank(1.0), spectrum.rank_for_error(0.0)) == (1, 1, 1)
    assert (spectrum.noise_rank, spectrum.tail_error(1)) == (1, 0.0)
    assert spectrum.effective_rank == pytest.approx(1.0)
    assert spectrum.stable_rank == pytest.approx(1.0)


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e160, 1e300])
def test_scale_changes_nothing(scale):
    matrix = matrix_with_spectrum(10, 6, decaying(6), seeded(4))
    one, other = analyze_weight(matrix), analyze_weight(matrix * scale)
    assert (other.singular_values / scale).tolist() == pytest.approx(one.singular_values.tolist(), rel=1e-12)
    assert other.tail_errors.tolist() == pytest.approx(one.tail_errors.tolist(), rel=1e-12)
    for name in ("effective_rank", "stable_rank"):
        assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-12)
    for name in ("numerical_rank", "noise_rank"):
        assert getattr(other, name) == getattr(one, name)


def test_numerical_rank_goes_by_the_stored_dtype():
    matrix = matrix_with_spectrum(8, 8, [1.0, 1e-2, 1e-4, 1e-10], seeded(5))
    assert analyze_weight(matrix).numerical_rank == 4
    assert analyze_weight(matrix.float()).numerical_rank == 3
    assert analyze_weight(matrix.half()).numerical_rank == 2
    assert analyze_weight(torch.eye(200, dtype=torch.bfloat16)).numerical_rank == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_analysed_in_float64(dtype):
    matrix = matrix_with_spectrum(7, 11, decaying(7), seeded(6)).to(dtype)
    expected = torch.linalg.svdvals(matrix.double())
    assert torch.allclose(analyze_weight(matrix).singular_values, expected, rtol=0, atol=1e-14 * float(expected[0]))


def test_kernels_are_flattened_to_out_by_rest():
    kernel = torch.randn(6, 4, 3, 3, generator=seeded(7))
    spectrum = analyze_weight(kernel)
    assert spectrum.shape == (6, 36)
    assert torch.equal(spectrum.singular_values, analyze_weight(kernel.reshape(6, 36)).singular_values)
    assert torch.equal(
        analyze_weight(kernel.to(memory_format=torch.channels_last)).singular_values, spectrum.singular_values
    )


@pytest.mark.parametrize(("beta", "omega"), [(0.1, 1.6089), (0.5, 2.1711), (1.0, 2.8582)])
def test_threshold_agrees_with_the_published_table(beta, omega):
    # Table I of Gavish and Donoho 2014; its last digit is off by up to 2.
    lam = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1)))
    assert lam / math.sqrt(marchenko_pastur_median(beta)) == pytest.approx(omega, abs=3e-4)


def test_marchenko_pastur_median_is_the_median_of_random_spectra():
    noise = torch.randn(300, 900, dtype=F64, generator=seeded(8)) / 30.0
    assert float(torch.linalg.svdvals(noise).square().median()) == pytest.approx(
        marchenko_pastur_median(1 / 3), rel=0.01
    )
    for beta in (0.0, -1.0, 1.1, float("nan")):
        with pytest.raises(UsageError, match=r"^marchenko_pastur_median: "):
            marchenko_pastur_median(beta)


@pytest.mark.parametrize("shape", [(80, 120), (120, 80), (100, 100)])
def test_noise_rank_finds_the_signal(shape):
    generator = seeded(9)
    noise = torch.randn(shape, dtype=F64, generator=generator) / math.sqrt(max(shape))
    signal = matrix_with_spectrum(*shape, [9.0, 7.0, 5.0, 4.0], generator)
    assert analyze_weight(signal + noise).noise_rank == 4
    assert analyze_weight(noise).noise_rank == 0
    assert analyze_weight(signal).noise_rank == 4


def test_summary():
    spectrum = analyze_weight(matrix_with_spectrum(10, 6, decaying(6), seeded(10)))
    summary = spectrum.summary(energy=0.9)
    rank = spectrum.energy_rank(0.9)
    assert set(summary) == {
        "original_params",
        "full_rank",
        "effective_rank",
        "compressed_params",
        "compression_ratio",
        "energy_captured",
        "singular_values",
    }
    assert (summary["original_params"], summary["full_rank"], summary["effective_rank"]) == (60, 6, rank)
    assert summary["compressed_params"] == rank * 16
    assert summary["compression_ratio"] == pytest.approx(60 / (rank * 16))
    assert 0.9 <= summary["energy_captured"] < 1.0
    assert json.loads(json.dumps(summary)) == summary


# in the metric of the inputs


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
@pytest.mark.parametrize("tokens", [3, 200])
def test_with_statistics_it_is_the_spectrum_of_the_outputs(shape, tokens):
    generator = seeded(11)
    weight = torch.randn(shape, dtype=F64, generator=generator)
    inputs = torch.randn(tokens, shape[1], dtype=F64, generator=generator) * torch.arange(1, shape[1] + 1) + 0.5
    spectrum = analyze_weight(weight, InputStatistics.from_samples(inputs))
    # ‖W Σ^½‖ is the root mean square of the outputs, so both have the singular values of X Wᵀ / √tokens.
    expected = torch.zeros(min(shape), dtype=F64)
    outputs = torch.linalg.svdvals(inputs @ weight.T / math.sqrt(tokens))[: min(shape)]
    expected[: outputs.numel()] = outputs
    assert spectrum.singular_values.tolist() == pytest.approx(expected.tolist(), abs=1e-7 * float(expected[0]))
    assert spectrum.shape == shape


@pytest.mark.parametrize("scale", [1e-100, 1e100])
def test_with_statistics_scale_is_no_concern(scale):
    weight = matrix_with_spectrum(7, 5, decaying(5), seeded(12))
    inputs = torch.randn(50, 5, dtype=F64, generator=seeded(13))
    one = analyze_weight(weight, InputStatistics.from_samples(inputs)).singular_values
    other = analyze_weight(weight * scale**2, InputStatistics.from_samples(inputs * scale)).singular_values
    assert (other / scale**3).tolist() == pytest.approx(one.tolist(), rel=1e-9)


def test_statistics_of_no_tokens_mean_none_and_of_other_features_are_refused():
    weight = matrix_with_spectrum(4, 3, [2.0, 1.0], seeded(14))
    empty = analyze_weight(weight, InputStatistics(3)).singular_values
    assert torch.equal(empty, analyze_weight(weight).singular_values)
    with pytest.raises(LowRankError, match=r"^fc: has 3 input features, but its statistics have 4"):
        analyze_weight(weight, InputStatistics(4), name="fc")


# bad input


def test_non_finite_weights_are_named():
    weight = torch.zeros(3, 2, 2)
    weight[1, 0, 1] = float("nan")
    with pytest.raises(NumericsError, match=r"^conv1: .* nan at index \[1, 0, 1\]") as caught:
        analyze_weight(weight, name="conv1")
    assert caught.value.exit_code == 4
    statistics = InputStatistics.from_samples(torch.full((2, 4), float("inf")))
    with pytest.raises(NumericsError, match=r"^fc \(input moment\): "):
        analyze_weight(torch.ones(2, 4), statistics, name="fc")


def test_vectors_and_meta_tensors_are_refused_by_name():
    for bad in (torch.ones(3), torch.tensor(1.0), torch.ones(2, 2, device="meta")):
        with pytest.raises(LowRankError, match=r"^norm: "):
            analyze_weight(bad, name="norm")


@pytest.mark.parametrize("bad", [-1, 4, 10**12, 2.0, True, "2", None])
def test_impossible_ranks_are_refused(bad):
    spectrum = analyze_weight(torch.eye(3))
    for ask in (spectrum.tail_error, spectrum.parameter_ratio):
        with pytest.raises(RankError, match=r"^rank: must be an integer from 0 to 3 "):
            ask(bad)


def test_impossible_fractions_and_errors_are_refused():
    spectrum = analyze_weight(torch.eye(3))
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(UsageError, match=r"^energy_rank: "):
            spectrum.energy_rank(bad)
    for bad in (-0.1, float("nan")):
        with pytest.raises(UsageError, match=r"^rank_for_error: "):
            spectrum.rank_for_error(bad)


def test_a_failing_decomposition_is_counted_or_refused():
    reset_fallback_counts()
    error = torch.linalg.LinAlgError("failed to converge")
    with mock.patch("torch.linalg.svdvals", side_effect=error):
        assert analyze_weight(torch.eye(3, dtype=torch.float64)).numerical_rank == 3
        assert fallback_counts() == {"svd:gesvd": 1}
        with pytest.raises(NumericsError, match=r"^fc: svd did not converge"):
            analyze_weight(torch.eye(3, dtype=torch.float64), strict=True, name="fc")
    reset_fallback_counts()


def test_one_decomposition_answers_everything():
    spectrum = analyze_weight(matrix_with_spectrum(6, 5, decaying(5), seeded(15)))
    forbidden = AssertionError("a second decomposition")
    with (
        mock.patch("torch.linalg.svdvals", side_effect=forbidden),
        mock.patch("torch.linalg.svd", side_effect=forbidden),
    ):
        assert spectrum.rank_for_error(0.1) > 0
        assert spectrum.noise_rank >= 0
        assert spectrum.summary()["full_rank"] == 5
