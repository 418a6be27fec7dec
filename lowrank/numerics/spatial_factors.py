"""A kernel as a vertical and a horizontal one: plain SVD, or least squares in the metric of the patches."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank.numerics.factors import Factors, factorize, factorize_in_metric

__all__ = ["SpatialCurve"]

# Relative to the mean diagonal: keeps normal equations solvable where patches leave directions unseen.
_JITTER = 1e-12
# Alternations and conjugate gradient steps in each. On ResNet-20's layers one takes 1 to 5 % off the nested factors' error; thirty
# take 1 % more off most of them, and thirty times as long.
ROUNDS = 1
STEPS = 2


class SpatialCurve:
    """Errors and factors of ``W[o, i, a, b] ≈ Σ_r second[o, b, r] · first[r, i, a]`` for every rank r.

    Without a moment: the truncated SVD of the (out · width, in · height) matrix. With one there is no closed form. The rows of
    ``first`` come from the SVD in the separable metric nearest at hand, Σ_h ⊗ Σ_w with Σ_h and Σ_w the moments of columns and rows of the
    patch; ``second`` is then the exact least-squares fit under the full moment, whose error at all (nested) ranks follows from one
    Cholesky factor. :meth:`factors` refines its one rank by alternating least squares. What the plain SVD does better, it keeps.

    Args:
        kernel: (out, in, height, width) float64.
        moment: Σ of the patches, (in · height · width) square, or ``None``.
        mean: of the patches, where the bias is to be corrected.
        name: for messages.

    Attributes:
        errors: (max_rank + 1,) float64, relative, in the metric of the patches.
        energy: ‖W Σ^½‖²_F.
        method: ``"svd"`` or ``"output"``.

    Example:
        >>> curve = SpatialCurve(torch.ones(2, 3, 3, 3).double())
        >>> curve.errors.numel(), round(float(curve.errors[1]), 6)
        (7, 0.0)
    """

    def __init__(
        self, kernel: Tensor, moment: Tensor | None = None, mean: Tensor | None = None, *, name: str = "weight"
    ) -> None:
        self._kernel, self._mean = kernel, mean
        outputs, inputs, height, width = kernel.shape
        self._tall = inputs * height
        matrix = kernel.permute(0, 3, 1, 2).reshape(outputs * width, self._tall)
        plain = factorize(matrix, name=name)
        self._plain = plain.factors(plain.max_rank)
        self.errors, self.energy, self.method = plain.errors, plain.energy, plain.method
        self._moment: Tensor | None = None
        if moment is None:
            return
        self.method = "output"
        blocks = moment.view(self._tall, width, self._tall, width)
        self._target = (kernel.flatten(1) @ moment).view(outputs, self._tall, width)
        self.energy = float((self._target * kernel.reshape(outputs, self._tall, width)).sum())
        if not self.energy > 0.0:
            self.errors = torch.zeros_like(self.errors)
            return
        self._moment = moment
        # moment as (m, (c, b, n)): one product gives rows @ Σ for every pair of offsets (b, c) along the width.
        self._by_offset = blocks.permute(2, 3, 1, 0).reshape(self._tall, -1)
        self._tall_moment = blocks.diagonal(dim1=1, dim2=3).sum(dim=-1)
        wide_moment = blocks.diagonal(dim1=0, dim2=2).sum(dim=-1)
        values, vectors = torch.linalg.eigh(wide_moment / wide_moment.diagonal().mean())
        root = (vectors * values.clamp_min(1e-6).sqrt()) @ vectors.T
        weighted = torch.einsum("bc,ocn->obn", root, matrix.view(outputs, width, self._tall)).reshape(matrix.shape)
        curve = factorize_in_metric(weighted, self._tall_moment, name=name)
        best = curve.factors(curve.max_rank)
        left = best.left.view(outputs, width, -1)
        left = torch.einsum("bc,ocr->obr", torch.linalg.inv(root), left).reshape(outputs * width, -1)
        self._nested = Factors(left, best.right)
        self._of_plain, self._of_nested = self._plain_errors(), self._nested_errors()
        self.errors = torch.minimum(self._of_plain, self._of_nested)

    @property
    def max_rank(self) -> int:
        """min(in · height, out · width)."""
        return self.errors.numel() - 1

    def factors(self, rank: int) -> Factors:
        """Give left (out · width, rank), right (rank, in · height), and the shift of the bias."""
        left, right = self._plain.left[:, :rank], self._plain.right[:rank]
        if self._moment is not None and rank < self.max_rank:
            left, right = self._refined(rank, left, right)
        shift = None
        if self._mean is not None:
            shift = (self._kernel - self._product(left, right)).flatten(1) @ self._mean
        return Factors(left, right, shift)

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        outputs, inputs, height, width = self._kernel.shape
        return (left @ right).view(outputs, width, inputs, height).permute(0, 2, 3, 1)

    def _error(self, left: Tensor, right: Tensor) -> float:
        """Compute ‖(W − W') Σ^½‖²."""
        assert self._moment is not None
        lost = (self._kernel - self._product(left, right)).flatten(1)
        return float(((lost @ self._moment) * lost).sum())

    def _refined(self, rank: int, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        best, least = (left, right), self._error(left, right)
        left, right = self._nested.left[:, :rank], self._nested.right[:rank]
        for round_number in range(ROUNDS + 1):
            if round_number:
                right = self._fitted_right(left, right)
            left = self._fitted_left(left, right)
            error = self._error(left, right)
            if error < least:
                best, least = (left, right), error
        return best

    def _normal(self, right: Tensor) -> Tensor:
        """Give (r · width, r · width): Σ between the horizontally shifted rows of ``right``."""
        rank, width = right.shape[0], self._kernel.shape[3]
        shifted = (right @ self._by_offset).view(rank, width, width, self._tall)
        gram = (shifted @ right.T).permute(0, 1, 3, 2).reshape(rank * width, rank * width)
        gram = (gram + gram.T) / 2
        gram.diagonal().add_(_JITTER * gram.diagonal().mean())
        return gram

    def _fitted_left(self, left: Tensor, right: Tensor) -> Tensor:
        """Fit ``left`` to this ``right`` by least squares; where it is undetermined, the one given."""
        outputs, _, _, width = self._kernel.shape
        rank = right.shape[0]
        lost = self._lost(left, right)
        wanted = torch.einsum("onb,rn->orb", lost, right).reshape(outputs, rank * width)
        factor, failed = torch.linalg.cholesky_ex(self._normal(right))
        if int(failed):
            return left
        step = torch.cholesky_solve(wanted.T, factor).T.view(outputs, rank, width)
        return left + step.transpose(1, 2).reshape(outputs * width, rank)

    def _lost(self, left: Tensor, right: Tensor) -> Tensor:
        """Give (W − W') Σ as (out, in · height, width)."""
        assert self._moment is not None
        product = self._product(left, right).flatten(1) @ self._moment
        return self._target - product.view(self._target.shape)

    def _fitted_right(self, left: Tensor, right: Tensor) -> Tensor:
        """Take a few steps of preconditioned conjugate gradients towards the least-squares ``right`` for this ``left``."""
        outputs, _, _, width = self._kernel.shape
        rank = right.shape[0]
        parts = left.view(outputs, width, rank)
        gram = torch.einsum("obr,ocs->rscb", parts, parts).reshape(rank, rank * width * width)
        small, ready = torch.linalg.cholesky_ex(_regular(torch.einsum("obr,obs->rs", parts, parts)))
        large, also = torch.linalg.cholesky_ex(_regular(self._tall_moment))
        if int(ready) or int(also):
            return right

        def normal(x: Tensor) -> Tensor:
            return gram @ (x @ self._by_offset).view(rank * width * width, self._tall)

        def preconditioned(x: Tensor) -> Tensor:
            return torch.cholesky_solve(torch.cholesky_solve(x, small).T, large).T

        rest = torch.einsum("onb,obr->rn", self._lost(left, right), parts)
        direction = ahead = preconditioned(rest)
        size = (rest * ahead).sum()
        for _ in range(STEPS):
            if not float(size) > 0.0:
                break
            pushed = normal(direction)
            length = size / (direction * pushed).sum()
            right, rest = right + length * direction, rest - length * pushed
            ahead = preconditioned(rest)
            before, size = size, (rest * ahead).sum()
            direction = ahead + (size / before) * direction
        return right

    def _plain_errors(self) -> Tensor:
        """Compute the error of the truncated SVD in the metric: what is left out at rank r are the components from r on."""
        width = self._kernel.shape[3]
        left, right = self._plain.left, self._plain.right
        rank = right.shape[0]
        parts = left.view(-1, width, rank)
        total = left.new_zeros(rank, rank)
        shifted = (right @ self._by_offset).view(rank, width, width, self._tall)
        for one in range(width):
            for other in range(width):
                between = shifted[:, other, one] @ right.T
                total += (parts[:, other].T @ parts[:, one]) * between
        # Summed from the small end, so that small tails keep their digits.
        tails = torch.flip(torch.flip(total, (0, 1)).cumsum(0).cumsum(1).diagonal(), (0,))
        return self._relative(torch.cat([tails, tails.new_zeros(1)]))

    def _nested_errors(self) -> Tensor:
        """Compute the error after fitting ``left`` to the first r rows of ``right``, for every r from one Cholesky factor."""
        outputs, _, _, width = self._kernel.shape
        right = self._nested.right
        rank = right.shape[0]
        wanted = torch.einsum("onb,rn->rbo", self._target, right).reshape(rank * width, outputs)
        factor, failed = torch.linalg.cholesky_ex(self._normal(right))
        if int(failed):
            return torch.full((rank + 1,), torch.inf, dtype=right.dtype, device=right.device)
        explained = torch.linalg.solve_triangular(factor, wanted, upper=False).square().sum(dim=1)
        explained = explained.view(rank, width).sum(dim=1).cumsum(0)
        return self._relative(self.energy - torch.cat([explained.new_zeros(1), explained]))

    def _relative(self, squares: Tensor) -> Tensor:
        squares = squares.clamp_min(0.0)
        squares[0] = self.energy
        return (squares / self.energy).sqrt()


def _regular(matrix: Tensor) -> Tensor:
    """Make it positive definite, for a preconditioner."""
    matrix = matrix.clone()
    matrix.diagonal().add_(1e-6 * matrix.diagonal().mean())
    return matrix
