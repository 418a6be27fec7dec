"""Two thin matrices for one wide one: truncated SVD and its data-aware closed form, every rank from one decomposition."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank.errors import RankError, is_whole
from lowrank.numerics.linalg import safe_eigh, safe_svd
from lowrank.numerics.moments import InputStatistics, TokenCounts
from lowrank.numerics.sampled_moments import Moment, SampledMoment

__all__ = ["Factors", "RankCurve", "check_rank", "factorize", "factorize_embedding", "factorize_in_metric"]


@dataclass(frozen=True)
class Factors:
    """``weight ≈ left @ right``, and what to add to the bias.

    Attributes:
        left: (out, rank) float64.
        right: (rank, in) float64.
        bias_shift: (out,) float64, ``(W − W')μ``; ``None`` where inputs were not centred.
    """

    left: Tensor
    right: Tensor
    bias_shift: Tensor | None = None

    @property
    def rank(self) -> int:
        """Number of rank components."""
        return self.left.shape[1]


@dataclass(frozen=True)
class RankCurve:
    """The whole rank-error curve of one matrix, from one decomposition.

    Attributes:
        errors: (max_rank + 1,) float64; ``errors[r]`` is the relative error of the best rank-r layer in the metric named by ``method``.
        energy: ‖W Σ^½‖²_F, the square of what the errors are relative to.
        method: ``"svd"`` (Σ = I) or ``"output"`` (Σ from calibration).

    Example:
        >>> curve = factorize(torch.diag(torch.tensor([3.0, 2.0, 1.0])))
        >>> curve.rank_for_error(0.3), round(float(curve.errors[1]), 4)
        (2, 0.5976)
    """

    errors: Tensor
    energy: float
    method: str
    _left: Tensor
    _right: Tensor
    _weight: Tensor | None = None
    _mean: Tensor | None = None

    @property
    def max_rank(self) -> int:
        """min(out, in): the rank at which the layer is reproduced."""
        return self.errors.numel() - 1

    def factors(self, rank: int) -> Factors:
        """Give the best factors of this rank.

        Raises:
            RankError: the rank is not an integer in [1, max_rank].
        """
        rank = check_rank(rank, self.max_rank)
        left, right = self._left[:, :rank], self._right[:rank]
        shift = None
        if self._mean is not None and self._weight is not None:
            shift = self._weight @ self._mean - left @ (right @ self._mean)
        return Factors(left, right, shift)

    def rank_for_error(self, max_error: float) -> int:
        """Find the smallest rank (at least 1) whose error is at most ``max_error``."""
        enough = torch.nonzero(self.errors[1:] <= max_error)
        return int(enough[0]) + 1 if enough.numel() else self.max_rank


def check_rank(rank: object, max_rank: int, name: str = "rank") -> int:
    """Return the rank as an int.

    Args:
        rank: what was asked for.
        max_rank: the largest one the layer allows: the smaller side of its weight.
        name: for messages.

    Raises:
        RankError: not an integer in [1, max_rank].

    Example:
        >>> check_rank(3, 8)
        3
    """
    if not is_whole(rank):
        raise RankError(
            f"{name}: must be an integer from 1 to {max_rank} (the smaller side of the weight), got {rank!r}"
        )
    if not is_whole(rank, 1, max_rank):
        raise RankError(f"{name}: must be from 1 to {max_rank} (the smaller side of the weight), got {rank}")
    return rank


def factorize(
    weight: Tensor,
    statistics: InputStatistics | None = None,
    *,
    ridge: float = 0.0,
    shift_bias: bool = True,
    name: str = "weight",
) -> RankCurve:
    """Find every rank's best factors of one weight.

    Without statistics the truncated SVD (Eckart and Young 1936). With them the minimiser of the layer's mean squared output error
    ``tr(ΔW Σ ΔWᵀ)``: by the same theorem the best rank-r ``W'`` has ``W' Σ^½`` equal to the truncated SVD of ``W Σ^½``, which is
    ``W' = U Uᵀ W`` with U the leading eigenvectors of ``W Σ Wᵀ``. With Σ the covariance the best bias adds ``(W − W')μ``. No inverse
    is taken, so a singular Σ is fine. Directions that no input reached are ordered by the plain SVD of what is left.

    Args:
        weight: (out, in), any floating dtype; computed in float64.
        statistics: moments of the inputs; a count of 0 means none.
        ridge: relative to the mean diagonal of Σ; moves towards the plain SVD.
        shift_bias: centre the inputs and correct the mean in the bias; off for layers that may have no bias.
        name: for messages.

    Raises:
        NumericsError: NaN or Inf in the weight or the statistics.
        RankError: a side of the matrix is 0.

    Example:
        >>> factorize(torch.ones(2, 3)).factors(1).left.shape
        torch.Size([2, 1])
    """
    if weight.ndim != 2 or 0 in weight.shape:
        raise RankError(f"{name}: a matrix with both sides at least 1 can be factored, got shape {tuple(weight.shape)}")
    matrix = weight.detach().to(torch.float64)
    if statistics is None or statistics.count == 0:
        return _plain(matrix, name)
    moment = statistics.metric(centred=shift_bias, ridge=ridge).to(matrix.device)
    mean = statistics.mean.to(matrix.device) if shift_bias else None
    return factorize_in_metric(matrix, moment, mean, name=name)


def factorize_in_metric(
    matrix: Tensor, moment: Moment, mean: Tensor | None = None, *, name: str = "weight"
) -> RankCurve:
    """Find every rank's best factors in the metric of a given moment; see :func:`factorize`.

    Args:
        matrix: (out, in) float64.
        moment: Σ, (in, in) float64, or the rows that it is made of.
        mean: (in,) of the inputs, where the bias is to be corrected.

    Example:
        >>> factorize_in_metric(torch.eye(2).double(), torch.diag(torch.tensor([4.0, 0.0])).double()).errors.tolist()
        [1.0, 0.0, 0.0]
    """
    out_features, in_features = matrix.shape
    max_rank = min(out_features, in_features)
    if isinstance(moment, SampledMoment):
        # Also of more outputs than inputs, for which nobody keeps rows unasked.
        eigenvalues, basis = safe_eigh(moment.between(matrix), name=name)
    elif out_features <= in_features:
        eigenvalues, basis = safe_eigh(matrix @ moment @ matrix.T, name=name)
    else:
        values, vectors = safe_eigh(moment, name=f"{name} (input moment)")
        whitened = matrix @ (vectors * values.sqrt())
        eigenvalues, vectors = safe_eigh(whitened.T @ whitened, name=name)
        basis = torch.linalg.qr(whitened @ vectors)[0]
    energy = float(eigenvalues.sum())
    # eps · size of a gram: below it an eigenvalue, and with it the direction, is rounding noise.
    floor = torch.finfo(torch.float64).eps * max(matrix.shape) * float(eigenvalues[0])
    known = int((eigenvalues > floor).sum())
    if energy <= 0.0:
        known = 0
    if known < max_rank:
        kept = basis[:, :known]
        rest = safe_svd(matrix - kept @ (kept.T @ matrix), name=name)[0]
        basis = torch.linalg.qr(torch.cat([kept, rest], dim=1))[0]
    basis = basis[:, :max_rank]
    return RankCurve(
        errors=_tails(torch.where(eigenvalues[:max_rank] > floor, eigenvalues[:max_rank], 0.0)),
        energy=energy,
        method="output",
        _left=basis,
        _right=basis.T @ matrix,
        _weight=matrix,
        _mean=mean,
    )


def factorize_embedding(weight: Tensor, counts: TokenCounts | None = None, *, name: str = "embedding") -> RankCurve:
    """Find every rank's best factors of an embedding table, rows weighted by how often they are looked up.

    Minimises ``Σ_v p_v ‖e_v − ê_v‖²``: ``right`` holds the leading eigenvectors of ``Eᵀ diag(p) E``, ``left = E rightᵀ``.

    Args:
        weight: (num_embeddings, embedding_dim).
        counts: look-ups; ``None`` weighs every row alike (truncated SVD).

    Example:
        >>> factorize_embedding(torch.eye(4)[:, :2]).max_rank
        2
    """
    if weight.ndim != 2 or 0 in weight.shape:
        raise RankError(f"{name}: a matrix with both sides at least 1 can be factored, got shape {tuple(weight.shape)}")
    table = weight.detach().to(torch.float64)
    if counts is None or counts.count == 0:
        return _plain(table, name)
    rows = torch.sqrt(counts.counts.to(table) / counts.count)[:, None] * table
    max_rank = min(table.shape)
    eigenvalues, vectors = safe_eigh(rows.T @ rows, name=name)
    floor = torch.finfo(torch.float64).eps * max(table.shape) * float(eigenvalues[0])
    known = min(int((eigenvalues > floor).sum()), max_rank)
    if known < max_rank:
        kept = vectors[:, :known]
        rest = safe_svd(table - (table @ kept) @ kept.T, name=name)[2].T
        vectors = torch.linalg.qr(torch.cat([kept, rest], dim=1))[0]
    vectors = vectors[:, :max_rank]
    return RankCurve(
        errors=_tails(torch.where(eigenvalues[:max_rank] > floor, eigenvalues[:max_rank], 0.0)),
        energy=float(eigenvalues.sum()),
        method="output",
        _left=table @ vectors,
        _right=vectors.T.contiguous(),
    )


def _plain(matrix: Tensor, name: str) -> RankCurve:
    left, sigma, right = safe_svd(matrix, name=name)
    # Relative to the largest, so that squares neither overflow nor vanish; left keeps unit columns, right carries the scale.
    largest = float(sigma[0])
    errors = _tails((sigma / largest).square() if largest > 0.0 else sigma)
    return RankCurve(
        errors=errors, energy=float(sigma.square().sum()), method="svd", _left=left, _right=sigma[:, None] * right
    )


def _tails(squares: Tensor) -> Tensor:
    """Sum up the relative error of keeping the first r of these squared values, for r = 0 … n; 1 at 0 unless all are 0."""
    total = float(squares.sum())
    if not total > 0.0 or not math.isfinite(total):
        return torch.zeros(squares.numel() + 1, dtype=torch.float64)
    # Summed from the small end, so that small tails keep their digits.
    tails = torch.flip(torch.cumsum(torch.flip(squares / total, [0]), 0), [0])
    tails[0] = 1.0
    return torch.cat([tails, tails.new_zeros(1)]).clamp_(0.0, 1.0).sqrt()
