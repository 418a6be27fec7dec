"""What flows into a layer: second moments and means over calibration tokens, always in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowrank.errors import CalibrationError
from lowrank.numerics.sampled_moments import Moment, SampledMoment, moment_squares

__all__ = ["InputStatistics", "TokenCounts", "activation_error"]


class InputStatistics:
    """Mean and uncentred second moment (``gram``) of a layer's inputs.

    With tokens as rows of X: ``mean = Xᵀ1 / tokens``, ``gram = XᵀX / tokens``, ``covariance = gram − mean meanᵀ``.
    Sums are kept in float64 whatever the model's dtype: a float32 gram has negative
    eigenvalues of the size of its rounding, about 1e-7 of the largest.

    Args:
        n_features: number of input features of the layer.
        device: where the sums live.
        blocks: of a grouped convolution, whose groups never meet: only the moments within each of so many equal runs of features
            are kept, all others count as 0.
        sampled: keep the rows as they come in place of their second moment, which of very many features is too large
            (:func:`lowrank.numerics.sampled_moments.rows_to_keep`); whoever adds rows draws few enough.

    Attributes:
        count: tokens summed.
        offered: tokens that came by; more than ``count`` where only some of a convolution's patches were drawn.

    Example:
        >>> statistics = InputStatistics.from_samples(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        >>> statistics.count, statistics.mean.tolist(), statistics.gram[0, 0].item(), statistics.covariance[0, 0].item()
        (2, [2.0, 0.0], 5.0, 1.0)
    """

    def __init__(
        self, n_features: int, device: torch.device | str | None = None, blocks: int = 1, *, sampled: bool = False
    ) -> None:
        self.n_features = n_features
        self.blocks = blocks
        self.sampled = sampled
        self._rows: list[Tensor] = []
        self.count = self.offered = 0
        width = n_features // blocks
        self._sum = torch.zeros(n_features, dtype=torch.float64, device=device)
        sizes = (blocks, 0, 0) if sampled else (blocks, width, width)
        self._outer = torch.zeros(sizes, dtype=torch.float64, device=device)

    @classmethod
    def from_samples(cls, samples: Tensor) -> InputStatistics:
        """Make statistics of one tensor of shape (..., n_features)."""
        statistics = cls(samples.shape[-1], device=samples.device)
        statistics.update(samples)
        return statistics

    def update(self, samples: Tensor, offered: int | None = None) -> None:
        """Add tokens of shape (..., n_features), any floating dtype.

        Args:
            offered: out of how many these were drawn, where not all are given.

        Raises:
            CalibrationError: the last dimension is not ``n_features``.
        """
        if samples.shape[-1] != self.n_features:
            raise CalibrationError(
                f"statistics: inputs of shape {tuple(samples.shape)} given to a layer of {self.n_features} features; "
                "the last dimension must be the features"
            )
        kept = samples.detach().reshape(-1, self.n_features).to(self._sum.device)
        rows = kept.to(torch.float64)
        self.count += rows.shape[0]
        self.offered += rows.shape[0] if offered is None else offered
        self._sum += rows.sum(dim=0)
        if self.sampled:
            # A copy: what was handed in may be changed afterwards.
            self._rows.append(kept.clone() if kept.is_floating_point() else rows)
            return
        parts = rows.view(rows.shape[0], self.blocks, self._outer.shape[-1]).transpose(0, 1)
        self._outer.baddbmm_(parts.transpose(1, 2), parts)

    def block(self, index: int, of: int) -> InputStatistics:
        """Cut out the statistics of the features of one group out of ``of``, as a convolution with groups cuts them.

        Example:
            >>> InputStatistics.from_samples(torch.eye(4)).block(1, 2)
            InputStatistics(n_features=2, count=4)
        """
        width = self.n_features // of
        wanted = slice(index * width, (index + 1) * width)
        found = InputStatistics(width, device=self._sum.device, sampled=self.sampled)
        found.count, found.offered, found._sum = self.count, self.offered, self._sum[wanted]
        if self.sampled:
            found._rows = [rows[:, wanted] for rows in self._rows]
            return found
        found._outer = self._outer[index, None] if self.blocks == of else self._full()[None, wanted, wanted]
        return found

    def is_thin(self, outputs: int) -> bool:
        """Tell whether fewer tokens came by than the layer has inputs (of sampled ones: outputs), so that directions are unseen.

        Example:
            >>> InputStatistics.from_samples(torch.ones(3, 4)).is_thin(2)
            True
        """
        features = self.n_features // self.blocks
        return self.count < (min(features, outputs) if self.sampled else features)

    def _full(self) -> Tensor:
        if self.sampled:
            rows = self._joined().to(torch.float64)
            parts = rows.view(rows.shape[0], self.blocks, -1).transpose(0, 1)
            return _block_diagonal([part.T @ part for part in parts])
        return self._outer[0] if self.blocks == 1 else _block_diagonal(list(self._outer))

    @property
    def mean(self) -> Tensor:
        """(n_features,) float64."""
        return self._sum / max(self.count, 1)

    @property
    def gram(self) -> Tensor:
        """(n_features, n_features) float64, uncentred."""
        return self._full() / max(self.count, 1)

    @property
    def covariance(self) -> Tensor:
        """(n_features, n_features) float64, centred."""
        mean = self.mean
        return self.gram - torch.outer(mean, mean)

    def _joined(self) -> Tensor:
        """(count, n_features): the rows that were kept."""
        return torch.cat(self._rows) if self._rows else self._sum.new_zeros(0, self.n_features)

    def metric(self, *, centred: bool, ridge: float = 0.0) -> Moment:
        """Return :meth:`moment`, as the rows it is made of where those were kept.

        Example:
            >>> kept = InputStatistics(2, sampled=True)
            >>> kept.update(torch.eye(2))
            >>> moment_squares(torch.eye(2), kept.metric(centred=False)).tolist()
            [0.5, 0.5]
        """
        if not self.sampled:
            return self.moment(centred=centred, ridge=ridge)
        found = SampledMoment(self._joined(), self.mean if centred else None)
        if not ridge:
            return found
        diagonal = sum(float(part.square().sum()) for part in found.parts()) / max(self.count, 1) / self.n_features
        return SampledMoment(found.rows, found.mean, ridge * diagonal)

    def block_metric(self, blocks: int, *, centred: bool) -> Moment:
        """Return the moments within each of so many groups: (blocks, features of a group, the same), or the rows they are made of."""
        if not self.sampled:
            groups = [self.block(index, blocks) for index in range(blocks)]
            return torch.stack([group.moment(centred=centred) for group in groups])
        rows = self._joined()
        parts = rows.view(rows.shape[0], blocks, -1).transpose(0, 1)
        return SampledMoment(parts, self.mean.view(blocks, 1, -1) if centred else None)

    def whitened_mean(self, ridge: float) -> Tensor:
        """Compute ``(gram + ridge · mean(diagonal) · I)⁻¹ mean``, (n_features,) float64; of rows that were kept without the gram.

        Example:
            >>> InputStatistics.from_samples(torch.tensor([[2.0]])).whitened_mean(0.0).tolist()
            [0.5]
        """
        metric = self.metric(centred=False, ridge=ridge)
        if isinstance(metric, Tensor):
            solved: Tensor = torch.linalg.solve(metric, self.mean)
            return solved
        # Woodbury, for Σ = XᵀX / n + λ I and μ = Xᵀ1 / n: Σ⁻¹ μ = Xᵀ (X Xᵀ + n λ I)⁻¹ 1.
        rows = metric.rows.to(torch.float64)
        small = rows @ rows.T
        small.diagonal().add_(metric.count * metric.ridge)
        whitened: Tensor = rows.T @ torch.linalg.solve(small, torch.ones_like(rows[:, 0]))
        return whitened

    def moment(self, *, centred: bool, ridge: float = 0.0) -> Tensor:
        """Return the metric of a layer's inputs: covariance or gram, plus ``ridge · mean(diagonal) · I``."""
        moment = self.covariance if centred else self.gram
        if ridge:
            # A relative ridge: the same factor does the same whatever the scale of the inputs.
            moment.diagonal().add_(ridge * moment.diagonal().mean())
        return moment

    def __repr__(self) -> str:
        return f"InputStatistics(n_features={self.n_features}, count={self.count})"


def _block_diagonal(parts: list[Tensor]) -> Tensor:
    whole: Tensor = torch.block_diag(*parts)
    return whole


class TokenCounts:
    """How often each row of an embedding table was looked up.

    Example:
        >>> counts = TokenCounts(4)
        >>> counts.update(torch.tensor([[0, 2, 2]]))
        >>> counts.counts.tolist(), counts.unseen
        ([1, 0, 2, 0], 2)
    """

    def __init__(self, num_embeddings: int, device: torch.device | str | None = None) -> None:
        self.counts = torch.zeros(num_embeddings, dtype=torch.int64, device=device)

    def update(self, ids: Tensor) -> None:
        """Count ids of any shape and integer dtype."""
        flat = ids.detach().reshape(-1).to(self.counts.device, torch.int64)
        self.counts += torch.bincount(flat, minlength=self.counts.numel())

    @property
    def count(self) -> int:
        """Number of look-ups."""
        return int(self.counts.sum())

    @property
    def unseen(self) -> int:
        """Number of rows that were never looked up."""
        return int((self.counts == 0).sum())


def activation_error(weight: Tensor, approximation: Tensor, moment: Moment) -> float:
    """Compute ‖ΔW Σ^½‖_F / ‖W Σ^½‖_F for weights (out, in) and an input moment Σ (in, in); 0 where both norms are 0.

    Example:
        >>> activation_error(torch.eye(2), torch.diag(torch.tensor([1.0, 0.0])), torch.eye(2))
        0.7071067811865476
    """
    if isinstance(moment, Tensor):
        moment = moment.to(weight.device, torch.float64)
    weight = weight.detach().to(torch.float64)
    difference = weight - approximation.detach().to(weight.device, torch.float64)
    lost = float(moment_squares(difference, moment).sum())
    whole = float(moment_squares(weight, moment).sum())
    if whole <= 0.0:
        return 0.0 if lost <= 0.0 else math.inf
    return math.sqrt(max(lost, 0.0) / whole)
