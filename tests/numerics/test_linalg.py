"""Decompositions against prescribed spectra, at the edges of float64, and with LAPACK failing on purpose."""

from __future__ import annotations

import math
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import eps, matrix_with_spectrum, seeded

from lowrank.errors import LowRankError, NumericsError
from lowrank.numerics.linalg import (
    check_finite,
    fallback_counts,
    power_of_two_scale,
    reset_fallback_counts,
    safe_eigh,
    safe_svd,
    scale_by_power_of_two,
    singular_values,
)

F64 = torch.float64
SPECTRA = {
    "tall": (9, 4, [5.0, 3.0, 1.0, 1e-3]),
    "wide": (4, 9, [5.0, 3.0, 1.0, 1e-3]),
    "square": (6, 6, [4.0, 4.0, 4.0, 2.0, 2.0, 1.0]),
    "rank 1": (7, 5, [2.0]),
    "row": (1, 8, [3.0]),
    "column": (8, 1, [3.0]),
    "single": (1, 1, [0.5]),
}


@pytest.fixture(autouse=True)
def _no_counts():
    reset_fallback_counts()
    yield
    reset_fallback_counts()


def assert_is_svd(matrix: torch.Tensor, u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor, accuracy: float) -> None:
    k = min(matrix.shape)
    assert u.shape == (matrix.shape[0], k)
    assert s.shape == (k,)
    assert vh.shape == (k, matrix.shape[1])
    assert u.dtype == s.dtype == vh.dtype == F64
    assert bool((s[:-1] >= s[1:]).all())
    assert bool((s >= 0).all())
    size = float(matrix.double().norm())
    assert float((u * s @ vh - matrix.double()).norm()) <= accuracy * size
    for basis in (u, vh.T):
        assert float((basis.T @ basis - torch.eye(k, dtype=F64)).norm()) <= 100 * k * eps(F64)


@pytest.mark.parametrize("case", SPECTRA)
def test_svd_gives_the_prescribed_spectrum(case):
    m, n, sigma = SPECTRA[case]
    matrix = matrix_with_spectrum(m, n, sigma, seeded(1))
    expected = torch.zeros(min(m, n), dtype=F64)
    expected[: len(sigma)] = torch.tensor(sigma, dtype=F64)
    u, s, vh = safe_svd(matrix)
    assert_is_svd(matrix, u, s, vh, 50 * eps(F64))
    assert float((s - expected).abs().max()) <= 50 * eps(F64) * max(sigma)
    assert torch.allclose(singular_values(matrix), s, rtol=0, atol=50 * eps(F64) * max(sigma))
    assert fallback_counts() == {}


@pytest.mark.parametrize("exponent", [-1060, -997, -500, 500, 990, 1020])
def test_scale_is_no_concern(exponent):
    matrix = scale_by_power_of_two(matrix_with_spectrum(5, 7, [3.0, 2.0, 1.0, 0.5, 0.25], seeded(2)), exponent)
    u, s, vh = safe_svd(matrix)
    back = scale_by_power_of_two(s, -exponent)
    # Denormals keep fewer bits: at 2^-1060 the entries themselves are rounded to 2^-1074.
    accuracy = max(50 * eps(F64), 20 * 2.0 ** (-1074 - exponent))
    assert float((back - torch.tensor([3.0, 2.0, 1.0, 0.5, 0.25], dtype=F64)).abs().max()) <= 3 * accuracy
    assert bool(torch.isfinite(u).all())
    assert bool(torch.isfinite(vh).all())


def test_values_beyond_float64_are_named():
    with pytest.raises(NumericsError, match=r"fc1: .*exceeds float64"):
        safe_svd(torch.full((64, 64), 1.7e308, dtype=F64), name="fc1")


def test_zero_and_empty():
    u, s, vh = safe_svd(torch.zeros(3, 5))
    assert_is_svd(torch.zeros(3, 5), u, s, vh, 0.0)
    assert s.tolist() == [0.0, 0.0, 0.0]
    for shape in [(0, 4), (4, 0), (0, 0)]:
        u, s, vh = safe_svd(torch.zeros(shape))
        assert u.shape == (shape[0], 0)
        assert s.shape == (0,)
        assert vh.shape == (0, shape[1])
        assert (u @ vh).shape == shape
        assert singular_values(torch.zeros(shape)).shape == (0,)
    values, vectors = safe_eigh(torch.zeros(0, 0))
    assert values.shape == (0,)
    assert vectors.shape == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int8])
def test_every_dtype_is_computed_in_float64(dtype):
    matrix = torch.randint(-9, 10, (6, 4), generator=seeded(3)).to(dtype)
    assert_is_svd(matrix, *safe_svd(matrix), 50 * eps(F64))


def test_transposed_and_strided_views():
    matrix = matrix_with_spectrum(8, 6, [3.0, 2.0, 1.0], seeded(4))
    assert_is_svd(matrix.T, *safe_svd(matrix.T), 50 * eps(F64))
    assert_is_svd(matrix[::2, ::3], *safe_svd(matrix[::2, ::3]), 50 * eps(F64))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_first_non_finite_entry_is_named(value):
    matrix = torch.ones(4, 5)
    matrix[2, 3] = value
    matrix[3, 0] = float("nan")
    for call in (safe_svd, singular_values):
        with pytest.raises(NumericsError, match=rf"encoder\.0: .*{value} at index \[2, 3\]") as caught:
            call(matrix, name="encoder.0")
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 4
    with pytest.raises(NumericsError, match=r"\[1\]"):
        check_finite(torch.tensor([0.0, value]))
    with pytest.raises(NumericsError, match=r"\[\]"):
        check_finite(torch.tensor(value))


def test_what_is_no_real_matrix_is_refused_by_name():
    for bad in (
        torch.zeros(2, 2, device="meta"),
        torch.zeros(2, 2, dtype=torch.complex64),
        torch.zeros(3),
        torch.zeros(2, 2, 2),
    ):
        with pytest.raises(LowRankError, match=r"^head: "):
            safe_svd(bad, name="head")
    with pytest.raises(LowRankError, match=r"^head: must be square"):
        safe_eigh(torch.zeros(2, 3), name="head")


def test_power_of_two_scale_is_exact():
    for value in (5e-324, 1e-310, 1e-30, 0.5, 1.0, 3.0, 1.7e308):
        scaled = scale_by_power_of_two(
            torch.tensor([[value]], dtype=F64), -power_of_two_scale(torch.tensor([[value]], dtype=F64))
        )
        assert 0.5 <= float(scaled) < 1.0
        assert float(scale_by_power_of_two(scaled, power_of_two_scale(torch.tensor([[value]], dtype=F64)))) == value
    assert power_of_two_scale(torch.zeros(2, 2)) == 0 == power_of_two_scale(torch.zeros(0, 2))


def broken(*_args, **_kwargs):
    raise torch.linalg.LinAlgError("linalg.svd: the algorithm failed to converge")


def silent_nan(matrix, *_args, **_kwargs):
    k = min(matrix.shape)
    nan = float("nan")
    return torch.full((matrix.shape[0], k), nan), torch.full((k,), nan), torch.full((k, matrix.shape[1]), nan)


@pytest.mark.parametrize("failure", [broken, silent_nan])
@pytest.mark.parametrize("case", SPECTRA)
def test_gesvd_is_the_counted_fallback(failure, case):
    m, n, sigma = SPECTRA[case]
    matrix = matrix_with_spectrum(m, n, sigma, seeded(5))
    with mock.patch("torch.linalg.svd", failure), mock.patch("torch.linalg.svdvals", broken):
        assert_is_svd(matrix, *safe_svd(matrix), 50 * eps(F64))
        assert fallback_counts() == {"svd:gesvd": 1}
        assert float(singular_values(matrix)[0]) == pytest.approx(max(sigma), rel=50 * eps(F64))
        assert fallback_counts() == {"svd:gesvd": 2}


@pytest.mark.parametrize("case", [*SPECTRA, "zero"])
def test_the_gram_is_the_last_resort(case):
    m, n, sigma = SPECTRA.get(case, (5, 3, [0.0]))
    matrix = matrix_with_spectrum(m, n, sigma, seeded(6))
    no_scipy = mock.patch("scipy.linalg.svd", side_effect=np.linalg.LinAlgError("SVD did not converge"))
    with mock.patch("torch.linalg.svd", broken), mock.patch("torch.linalg.svdvals", broken), no_scipy:
        u, s, vh = safe_svd(matrix)
        assert_is_svd(matrix, u, s, vh, 1e-7)
        assert fallback_counts() == {"svd:gram": 1}
        assert torch.allclose(singular_values(matrix), s)
    assert float(s[0]) == pytest.approx(max(sigma), abs=1e-12)


def test_strict_makes_a_fallback_an_error():
    with (
        mock.patch("torch.linalg.svd", broken),
        pytest.raises(NumericsError, match=r"^fc: svd did not converge.*strict") as caught,
    ):
        safe_svd(torch.eye(3), strict=True, name="fc")
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)
    assert fallback_counts() == {}


def test_when_nothing_converges_the_layer_is_named():
    everything = [
        mock.patch("torch.linalg.svd", broken),
        mock.patch("torch.linalg.eigh", broken),
        mock.patch("scipy.linalg.svd", side_effect=np.linalg.LinAlgError("no")),
        mock.patch("scipy.linalg.eigh", side_effect=np.linalg.LinAlgError("no")),
    ]
    for patch in everything:
        patch.start()
    try:
        with pytest.raises(NumericsError, match=r"^layer.7: svd did not converge"):
            safe_svd(torch.eye(3), name="layer.7")
        with pytest.raises(NumericsError, match=r"^layer.7: eigh did not converge"):
            safe_eigh(torch.eye(3), name="layer.7")
    finally:
        mock.patch.stopall()
    assert fallback_counts() == {}


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e300])
def test_eigh_is_descending_and_clipped(scale):
    root = matrix_with_spectrum(6, 6, [4.0, 2.0, 1.0], seeded(7))
    gram = root @ root.T * scale
    values, vectors = safe_eigh(gram)
    assert bool((values >= 0).all())
    assert bool((values[:-1] >= values[1:]).all())
    assert (values[:3] / scale).tolist() == pytest.approx([16.0, 4.0, 1.0], rel=1e-12)
    assert float((vectors * (values / scale) @ vectors.T - gram / scale).norm()) <= 1e-13 * 16
    assert float((vectors.T @ vectors - torch.eye(6, dtype=F64)).norm()) <= 1e-13


def test_eigh_keeps_negative_eigenvalues_when_asked():
    matrix = torch.diag(torch.tensor([1.0, -3.0, 2.0]))
    assert safe_eigh(matrix, psd=False)[0].tolist() == [2.0, 1.0, -3.0]
    assert safe_eigh(matrix)[0].tolist() == [2.0, 1.0, 0.0]


def test_eigh_falls_back_and_counts():
    root = matrix_with_spectrum(5, 5, [3.0, 2.0, 1.0], seeded(8))
    expected = safe_eigh(root @ root.T)[0]
    with mock.patch("torch.linalg.eigh", broken):
        values, vectors = safe_eigh(root @ root.T)
    assert fallback_counts() == {"eigh:ev": 1}
    assert torch.allclose(values, expected, rtol=0, atol=1e-13 * 9)
    assert float((vectors * values @ vectors.T - root @ root.T).norm()) <= 1e-13 * 9


def test_the_input_is_left_alone():
    matrix = matrix_with_spectrum(4, 4, [2.0, 1.0], seeded(9)).requires_grad_()
    before = matrix.detach().clone()
    u, s, _ = safe_svd(matrix)
    safe_eigh(matrix @ matrix.T)
    assert torch.equal(matrix.detach(), before)
    assert not u.requires_grad
    assert not s.requires_grad


# ---- values alone, of the dtypes whose gram in float64 tells everything that they can


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("m", "n"), [(300, 40), (40, 300), (64, 64), (3, 2), (1, 9), (9, 1), (1, 1), (9000, 5)])
def test_values_from_the_gram_are_those_of_the_svd(dtype, m, n):
    # Down to below the dtype's own resolution.
    k = min(m, n)
    sigma = torch.logspace(0, math.log10(eps(dtype)) - 1, k, dtype=F64) if k > 1 else torch.ones(1, dtype=F64)
    generator = seeded(11)
    left = torch.linalg.qr(torch.randn(m, k, dtype=F64, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(n, k, dtype=F64, generator=generator))[0]
    matrix = ((left * sigma) @ right.T).to(dtype)
    exact = torch.linalg.svdvals(matrix.double())
    found = singular_values(matrix)
    largest, size = float(exact[0]), max(m, n)
    threshold = eps(dtype) * size * largest
    told = exact > threshold
    assert int((found > threshold).sum()) == int(told.sum()), "the numerical rank"
    assert bool(((found - exact).abs()[told] <= 1e-4 * exact[told]).all())
    assert float((found - exact).abs().max()) <= 2.0**-25 * math.sqrt(size) * largest * 2
    assert bool((found.diff() <= 0).all())
    assert found.dtype == F64


@pytest.mark.parametrize("scale", [1e-42, 1e-20, 1e19, 3e37])
def test_values_of_very_small_and_large_float32(scale):
    matrix = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]]) * scale
    assert torch.allclose(singular_values(matrix), torch.linalg.svdvals(matrix.double()), rtol=1e-12, atol=0)


def test_an_exact_rank_leaves_exact_zeros():
    matrix = matrix_with_spectrum(200, 60, [5.0, 2.0, 1.0], seeded(3)).float()
    assert singular_values(matrix)[3:].tolist() == [0.0] * 57


def test_a_gram_that_does_not_converge_is_a_counted_fallback():
    matrix = matrix_with_spectrum(6, 4, [2.0, 1.0], seeded(4)).float()
    expected = torch.linalg.svdvals(matrix.double())
    for failure in (broken, lambda gram: torch.full((gram.shape[0],), math.nan, dtype=F64)):
        reset_fallback_counts()
        with mock.patch("torch.linalg.eigvalsh", failure):
            assert torch.allclose(singular_values(matrix), expected)
            assert fallback_counts() == {"svd:default": 1}
            with pytest.raises(NumericsError, match="gram did not converge"):
                singular_values(matrix, strict=True)


def test_the_fast_way_needs_no_svd():
    with mock.patch("torch.linalg.svdvals", side_effect=AssertionError), mock.patch("torch.linalg.svd", broken):
        assert float(singular_values(torch.eye(3))[2]) == pytest.approx(1.0, rel=1e-14)
