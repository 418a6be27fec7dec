"""What the singular values of one matrix say about its compressibility. Pure numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from lowrank.errors import LowRankError, NumericsError, RankError, UsageError, is_whole
from lowrank.numerics.linalg import check_finite, power_of_two_scale, safe_eigh, scale_by_power_of_two, singular_values
from lowrank.numerics.moments import InputStatistics
from lowrank.numerics.sampled_moments import SampledMoment

__all__ = ["Spectrum", "analyze_weight", "marchenko_pastur_median"]


# Relative rounding of a sum of squares that still counts as equality.
_SLACK = 4.0 * torch.finfo(torch.float64).eps


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The singular values σ of one matrix and the ranks that follow from them.

    Multiplying the matrix by a number changes none of the ranks. A zero or empty matrix has rank 0 in every sense, and
    errors of 0. σ up to ``2^-52 · max(m, n) · σ₁`` are rounding of the decomposition and count as 0 (but for
    ``singular_values`` itself).

    Attributes:
        shape: (m, n) of the matrix; a convolution kernel counts as (out, rest).
        singular_values: (min(m, n),) float64, CPU, descending.
        eps: machine epsilon of the dtype that the matrix was stored in.

    Example:
        >>> spectrum = analyze_weight(torch.diag(torch.tensor([4.0, 2.0, 1.0])))
        >>> spectrum.energy_rank(0.9), spectrum.stable_rank, spectrum.rank_for_error(0.25)
        (2, 1.3125, 2)
    """

    shape: tuple[int, int]
    singular_values: Tensor
    eps: float

    @property
    def full_rank(self) -> int:
        """min(m, n)."""
        return min(self.shape)

    def energy_rank(self, fraction: float = 0.99) -> int:
        """Count the fewest singular values that hold this fraction of Σσ².

        Args:
            fraction: from 0 to 1; 1 gives the number of σ that are not 0.

        Raises:
            UsageError: a fraction outside [0, 1].

        Example:
            >>> analyze_weight(torch.eye(4)).energy_rank(0.75)
            3
        """
        if not 0.0 <= fraction <= 1.0:
            raise UsageError(f"energy_rank: fraction must be from 0 to 1, got {fraction}")
        # In terms of what is lost: 1 − Σ_{j≤r} σ² / Σσ² has lost all digits of a small tail.
        # 1 − fraction is itself good to 2^-53 only; without that slack energy_rank(0.75) of four equal σ would be 4.
        lost = (1.0 - fraction) * (1.0 + _SLACK) + _SLACK
        return int((self.tail_errors.square() > lost).sum())

    @cached_property
    def effective_rank(self) -> float:
        """exp of the entropy of σ/Σσ (Roy and Vetterli 2007), from 1 to min(m, n); 0 for a zero matrix."""
        sigma = self._scaled
        total = float(sigma.sum())
        if total == 0.0:
            return 0.0
        share = sigma / total
        return math.exp(-float(torch.special.xlogy(share, share).sum()))

    @cached_property
    def stable_rank(self) -> float:
        """‖W‖²_F / ‖W‖²₂ = Σσ² / σ₁² (Rudelson and Vershynin 2007); 0 for a zero matrix."""
        sigma = self._scaled
        if not sigma.numel() or float(sigma[0]) == 0.0:
            return 0.0
        return float((sigma / sigma[0]).square().sum())

    @cached_property
    def numerical_rank(self) -> int:
        """Number of σ above ``eps · max(m, n) · σ₁``, eps that of the dtype the weight was stored in.

        At least 1 unless the matrix is zero: in bfloat16 the threshold exceeds σ₁ from 128 rows or columns on.
        """
        sigma = self._scaled
        if not sigma.numel() or float(sigma[0]) == 0.0:
            return 0
        return max(1, int((sigma > self.eps * max(self.shape) * float(sigma[0])).sum()))

    @property
    def break_even_rank(self) -> float:
        """mn / (m + n), not rounded: factors of a rank at or above it are no smaller than the matrix."""
        m, n = self.shape
        return m * n / (m + n) if m + n else 0.0

    @cached_property
    def noise_rank(self) -> int:
        """Number of σ above ω(β) · median(σ), the optimal hard threshold for white noise of unknown level.

        ``ω(β) = λ(β) / √μ_β`` with ``λ(β) = √(2(β+1) + 8β / (β+1+√(β²+14β+1)))``, β = min(m,n)/max(m,n), and μ_β the
        median of the Marchenko-Pastur law (Gavish and Donoho 2014, "The optimal hard threshold for singular values is
        4/√3", section III). Where more than half of the σ are 0 the threshold is 0: the rank of a noiseless matrix.
        """
        sigma = self._scaled
        count = sigma.numel()
        if not count:
            return 0
        # Of an even number of values the mean of the middle two; torch.median takes the lower.
        median = float(sigma[(count - 1) // 2] + sigma[count // 2]) / 2
        return int((sigma > _omega(self.full_rank / max(self.shape)) * median).sum())

    @cached_property
    def tail_errors(self) -> Tensor:
        """(min(m, n) + 1,) float64: :meth:`tail_error` of every rank from 0."""
        squares = self._scaled.square()
        # From the small end, so that small tails keep their digits.
        tails = torch.flip(torch.cumsum(torch.flip(squares, [0]), 0), [0])
        tails = torch.cat([tails, tails.new_zeros(1)])
        total = float(tails[0])
        return (tails / total).sqrt() if total > 0.0 else torch.zeros_like(tails)

    def tail_error(self, rank: int) -> float:
        """Return ‖W − W_r‖_F / ‖W‖_F of the best rank-r approximation (Eckart and Young 1936): 1 at rank 0, 0 at full rank.

        Raises:
            RankError: a rank that is not an integer from 0 to min(m, n).

        Example:
            >>> analyze_weight(torch.diag(torch.tensor([4.0, 3.0]))).tail_error(1)
            0.6
        """
        self._check_rank(rank)
        return float(self.tail_errors[rank])

    def rank_for_error(self, max_error: float) -> int:
        """Find the smallest rank whose :meth:`tail_error` is at most ``max_error``.

        Raises:
            UsageError: a negative or NaN error.

        Example:
            >>> analyze_weight(torch.diag(torch.tensor([4.0, 3.0]))).rank_for_error(0.7)
            1
        """
        if not max_error >= 0.0:
            raise UsageError(f"rank_for_error: max_error must be a number from 0, got {max_error}")
        return int((self.tail_errors > max_error).sum())

    def parameter_ratio(self, rank: int) -> float:
        """Return numbers in the factors over numbers in the matrix, ``rank · (m+n) / (m·n)``; 0 for an empty matrix.

        Raises:
            RankError: a rank that is not an integer from 0 to min(m, n).
        """
        self._check_rank(rank)
        m, n = self.shape
        return rank * (m + n) / (m * n) if m * n else 0.0

    def summary(self, energy: float = 0.99) -> dict[str, Any]:
        """Give the classic analysis at one energy, as plain data.

        Returns:
            ``original_params`` mn, ``full_rank`` min(m, n), ``effective_rank`` here the :meth:`energy_rank` r at this
            energy, ``compressed_params`` r(m+n), ``compression_ratio`` original over compressed (``inf`` at rank 0),
            ``energy_captured`` Σ_{j≤r}σ²/Σσ² (1 for a zero matrix), ``singular_values`` as a list.

        Example:
            >>> analyze_weight(torch.ones(4, 6)).summary()["compression_ratio"]
            2.4
        """
        m, n = self.shape
        rank = self.energy_rank(energy)
        compressed = rank * (m + n)
        return {
            "original_params": m * n,
            "full_rank": self.full_rank,
            "effective_rank": rank,
            "compressed_params": compressed,
            "compression_ratio": m * n / compressed if compressed else math.inf,
            "energy_captured": 1.0 - float(self.tail_errors[rank]) ** 2,
            "singular_values": self.singular_values.tolist(),
        }

    @cached_property
    def _scaled(self) -> Tensor:
        """σ with the largest in [½, 1), as 1e-300² and 1e300² are outside float64, and rounding set to 0."""
        sigma = scale_by_power_of_two(self.singular_values, -power_of_two_scale(self.singular_values))
        if not sigma.numel():
            return sigma
        floor = torch.finfo(torch.float64).eps * max(self.shape) * float(sigma[0])
        return torch.where(sigma > floor, sigma, 0.0)

    def _check_rank(self, rank: int) -> None:
        if not is_whole(rank, 0, self.full_rank):
            raise RankError(
                f"rank: must be an integer from 0 to {self.full_rank} (the smaller side of shape {list(self.shape)}), "
                f"got {rank!r}"
            )


def analyze_weight(
    weight: Tensor, statistics: InputStatistics | None = None, *, strict: bool = False, name: str = "weight"
) -> Spectrum:
    """Compute the spectrum of a weight, or of ``W Σ^½`` with Σ the gram of its inputs, which is what its output feels.

    Args:
        weight: (out, in), any real dtype and device; kernels of more dimensions are flattened to (out, rest).
        statistics: moments of inputs of ``in`` (or ``rest``) features; a count of 0 means none. The σ then come from
            a gram in float64: those below about 1e-8 · √max(m, n) of the largest are rounding, and given as 0.
        strict: a fallback of the decomposition raises instead of being counted.
        name: for messages.

    Raises:
        NumericsError: NaN or Inf, naming the index; a decomposition that does not converge.
        LowRankError: not a matrix or kernel, or statistics of other features.

    Example:
        >>> analyze_weight(torch.eye(3).reshape(3, 3, 1, 1)).singular_values.tolist()
        [1.0, 1.0, 1.0]
    """
    if weight.ndim < 2:
        raise LowRankError(
            f"{name}: must have at least 2 dimensions to have a spectrum, got shape {list(weight.shape)}"
        )
    check_finite(weight, name)
    columns = math.prod(weight.shape[1:])
    matrix = weight.detach().reshape(weight.shape[0], columns)
    eps = torch.finfo(weight.dtype).eps if weight.dtype.is_floating_point else torch.finfo(torch.float64).eps
    if statistics is not None and statistics.n_features != columns:
        raise LowRankError(f"{name}: has {columns} input features, but its statistics have {statistics.n_features}")
    if statistics is None or statistics.count == 0:
        sigma = singular_values(matrix, strict=strict, name=name)
    else:
        sigma = _felt_values(matrix, statistics, strict=strict, name=name)
    return Spectrum((weight.shape[0], columns), sigma.cpu(), eps)


def _felt_values(matrix: Tensor, statistics: InputStatistics, *, strict: bool, name: str) -> Tensor:
    """Compute the singular values of W Σ^½, from the gram on the smaller side."""
    if statistics.sampled:
        return _felt_by_rows(matrix, statistics, strict=strict, name=name)
    moment = statistics.gram.to(matrix.device)
    check_finite(moment, f"{name} (input moment)")
    weight_scale, moment_scale = power_of_two_scale(matrix.double()), power_of_two_scale(moment)
    # An even exponent, so that its square root is a power of two as well.
    moment_scale += moment_scale % 2
    scaled = scale_by_power_of_two(matrix.double(), -weight_scale)
    moment = scale_by_power_of_two(moment, -moment_scale)
    if matrix.shape[0] <= matrix.shape[1]:
        squares = safe_eigh(scaled @ moment @ scaled.T, strict=strict, name=name)[0]
    else:
        values, vectors = safe_eigh(moment, strict=strict, name=f"{name} (input moment)")
        root = scaled @ (vectors * values.sqrt())
        squares = safe_eigh(root.T @ root, strict=strict, name=name)[0]
    return _roots(squares, matrix, weight_scale + moment_scale // 2, name)


def _felt_by_rows(matrix: Tensor, statistics: InputStatistics, *, strict: bool, name: str) -> Tensor:
    """As :func:`_felt_values`, by the outputs on the rows that were kept: σ² of W Xᵀ / √count, and no Σ."""
    moment = statistics.metric(centred=False).to(matrix.device)
    assert isinstance(moment, SampledMoment)
    check_finite(moment.rows, f"{name} (inputs)")
    scale = power_of_two_scale(matrix.double())
    seen = moment.seen(scale_by_power_of_two(matrix.double(), -scale)) / math.sqrt(moment.count)
    side = seen if seen.shape[0] <= seen.shape[1] else seen.T
    squares = safe_eigh(side @ side.T, strict=strict, name=name)[0]
    # Ranks beyond the number of rows are not known, and 0.
    full = min(matrix.shape)
    squares = torch.cat([squares, squares.new_zeros(max(full - squares.numel(), 0))])[:full]
    return _roots(squares, matrix, scale, name)


def _roots(squares: Tensor, matrix: Tensor, exponent: int, name: str) -> Tensor:
    # Eigenvalues of a gram are good to eps · size · the largest.
    floor = torch.finfo(torch.float64).eps * max(matrix.shape) * squares[:1]
    squares = torch.where(squares > floor, squares, 0.0)
    sigma = scale_by_power_of_two(squares.sqrt(), exponent)
    if not bool(torch.isfinite(sigma).all()):
        raise NumericsError(f"{name}: singular values of W Σ^½ exceed float64; divide the weight by a power of two")
    return sigma


@lru_cache(maxsize=1024)
def _omega(beta: float) -> float:
    """Compute ω(β) of Gavish and Donoho (2014): threshold over the median singular value; 2.858 at β = 1."""
    threshold = math.sqrt(2.0 * (beta + 1.0) + 8.0 * beta / (beta + 1.0 + math.sqrt(beta * beta + 14.0 * beta + 1.0)))
    return threshold / math.sqrt(marchenko_pastur_median(beta))


def marchenko_pastur_median(beta: float) -> float:
    """Compute the median of the Marchenko-Pastur law ``√((β₊−t)(t−β₋)) / (2πβt)`` on ``[β₋, β₊] = [(1−√β)², (1+√β)²]``.

    By numerical integration: midpoint rule in the angle θ of ``t = 1 + β + 2√β cos θ``, which removes the square roots
    at the ends. Good to about 1e-8.

    Args:
        beta: aspect ratio min(m, n)/max(m, n), in (0, 1].

    Raises:
        UsageError: β outside (0, 1].

    Example:
        >>> round(marchenko_pastur_median(1.0), 4), round(marchenko_pastur_median(1e-9), 4)
        (0.6528, 1.0)
    """
    if not 0.0 < beta <= 1.0:
        raise UsageError(f"marchenko_pastur_median: beta must be in (0, 1], got {beta}")
    steps = 1 << 14
    # From θ = π, the small end of the law. The mass per angle is 4β sin²θ / (2πβt) = 2 sin²θ / (πt).
    edges = torch.linspace(math.pi, 0.0, steps + 1, dtype=torch.float64)
    middle = (edges[1:] + edges[:-1]) / 2
    mass = 2.0 * middle.sin().square() / (math.pi * (1.0 + beta + 2.0 * math.sqrt(beta) * middle.cos()))
    cumulated = torch.cumsum(mass, 0) * (math.pi / steps)
    half = 0.5 * float(cumulated[-1])
    index = int(torch.searchsorted(cumulated, half))
    before = float(cumulated[index - 1]) if index else 0.0
    part = (half - before) / (float(cumulated[index]) - before)
    angle = float(edges[index]) + part * float(edges[index + 1] - edges[index])
    return 1.0 + beta + 2.0 * math.sqrt(beta) * math.cos(angle)
