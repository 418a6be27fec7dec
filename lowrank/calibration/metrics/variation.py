"""The error against what varies in the output: ‖f(x) − f'(x)‖ / ‖f(x) − mean f‖."""

from __future__ import annotations

from torch import Tensor

from lowrank.calibration.batches import Batch
from lowrank.calibration.metrics.base import SampledMetric
from lowrank.calibration.metrics.output import OutputMetric, squared_sums
from lowrank.calibration.metrics.sums import per_sample, position_mask
from lowrank.errors import UsageError

__all__ = ["VARIATION", "Centre", "VariationMetric"]


class Centre:
    """The mean of an output over samples and positions, one number a feature, and how much of its size varies about that.

    Features are the last dimension; of outputs with four dimensions or more (images) they are dimension 1.

    Example:
        >>> import torch
        >>> centre = Centre()
        >>> centre.add(torch.tensor([[99.0], [101.0]]), Batch((torch.zeros(2, 1),), size=2))
        >>> centre.mean, round(centre.varying, 6)
        (tensor([100.], dtype=torch.float64), 0.0001)
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._squares = 0.0
        self._count = 0

    def add(self, output: Tensor, batch: Batch) -> None:
        """Add the original's output on a batch; padding does not count."""
        rows = _rows(output, batch)
        keep = position_mask(output, batch)
        if keep is not None and rows.ndim == 3:
            rows = rows[keep.to(rows.device)]
        rows = rows.flatten(0, -2).double()
        own = rows.sum(dim=0).cpu()
        if self._sum is not None and self._sum.shape != own.shape:
            raise UsageError(
                f"metric 'variation': the output has {own.numel()} features on one batch and {self._sum.numel()} on another, so "
                "that it has no mean; use metric='output'"
            )
        self._sum = own if self._sum is None else self._sum + own
        self._squares += float(rows.square().sum())
        self._count += rows.shape[0]

    @property
    def mean(self) -> Tensor:
        """(features,) float64."""
        assert self._sum is not None, "add() comes first"
        return self._sum / max(self._count, 1)

    @property
    def varying(self) -> float:
        """The share of the squared size that varies: ‖f − mean f‖² / ‖f‖², between 0 and 1."""
        if self._squares <= 0.0:
            return 1.0
        return min(max(1.0 - self._count * float(self.mean.square().sum()) / self._squares, 0.0), 1.0)


class VariationMetric(OutputMetric):
    """‖f(x) − f'(x)‖ / ‖f(x) − mean f‖: what :class:`OutputMetric` says, with what all samples have in common left out of the size.

    The mean is that of the samples on which it is measured, one number a feature, over samples and positions.

    Example:
        >>> VARIATION.value(0.25)
        0.5
    """

    name = "variation"
    title = "error of what varies in the output"

    def __init__(self, mean: Tensor | None = None) -> None:
        self._mean = mean

    @property
    def figure(self) -> str:
        return "variation_error"

    def fitted(self, centre: Centre) -> SampledMetric:
        """Give the metric with the mean of these outputs."""
        return VariationMetric(centre.mean)

    def terms(self, reference: Tensor, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        if self._mean is None:
            raise UsageError("metric 'variation': needs the mean of the outputs first: fitted(centre)")
        keep = position_mask(reference, batch)
        mean = self._mean.to(reference.device)
        if reference.ndim >= 4:
            mean = mean.reshape(1, -1, *([1] * (reference.ndim - 2)))
        elif batch.size > 1 and reference.ndim == 1:
            mean = mean.reshape(())
        lost = squared_sums(output, keep, minus=reference)
        return per_sample(lost, batch), per_sample(
            squared_sums(reference, keep, minus=mean.expand(reference.shape)), batch
        )


VARIATION = VariationMetric()


def _rows(output: Tensor, batch: Batch) -> Tensor:
    """The output with its features last, and at least one dimension before them."""
    if output.ndim >= 4:
        return output.movedim(1, -1)
    if output.ndim == 1:
        return output[:, None] if batch.size > 1 else output[None]
    return output if output.ndim else output.reshape(1, 1)
