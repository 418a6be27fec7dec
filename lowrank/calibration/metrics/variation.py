"""The error against what varies in the output: ‖f(x) − f'(x)‖ / ‖f(x) − mean f‖."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lowrank.calibration.batches import Batch
from lowrank.calibration.metrics.base import SampledMetric
from lowrank.calibration.metrics.output import CHUNK_ELEMENTS, OutputMetric, squared_sums
from lowrank.calibration.metrics.sums import per_sample, position_mask
from lowrank.errors import UsageError

__all__ = ["CONSTANT", "VARIATION", "Centre", "VariationMetric"]

# Of the squared size of an output: what varies less is rounding of float32 numbers.
CONSTANT = 1e-13
# Numbers of one sample up to which each has a mean of its own: above it (logits of long texts) the means would take gigabytes.
MOST_NUMBERS = 2**22


class _Mean:
    """A sum and a count; nothing once the parts differ in shape."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0
        self._broken = False

    def add(self, sums: Tensor | None, count: int) -> None:
        """Add a part; ``None`` where it has no such sum."""
        if sums is None or (self._sum is not None and self._sum.shape != sums.shape):
            self._broken, self._sum = True, None
        if self._broken:
            return
        assert sums is not None
        self._sum = sums if self._sum is None else self._sum + sums
        self._count += count

    def mean(self, least: int) -> Tensor | None:
        """The mean, where it is one of so many parts."""
        return None if self._sum is None or self._count < least else self._sum / self._count

    def squares(self, least: int) -> float | None:
        """Count times the squared size of the mean."""
        mean = self.mean(least)
        return None if mean is None else self._count * float(mean.square().sum())


class Centre:
    """The mean of an output over samples, and how much of its size varies about that.

    Where all samples have one shape and nothing is padded, each number of the output has its own mean over the samples: what is
    constant in each place (a detector's anchors) is constant. Else (texts of many lengths, graphs) the mean is one number a feature, over
    samples and positions; features are the last dimension, and dimension 1 where there are four or more (images).

    Example:
        >>> centre = Centre()
        >>> centre.add(torch.tensor([[99.0, 5.0], [101.0, 5.0]]), Batch((torch.zeros(2, 1),), size=2))
        >>> centre.mean.tolist(), round(centre.varying, 6)
        ([100.0, 5.0], 0.0001)
    """

    def __init__(self) -> None:
        self._numbers, self._features = _Mean(), _Mean()
        self._squares = 0.0

    def add(self, output: Tensor, batch: Batch) -> None:
        """Add the original's output on a batch; padding does not count."""
        keep = position_mask(output, batch)
        rows = _rows(output, batch)
        if keep is not None and rows.ndim == 3:
            rows = rows[keep.to(rows.device)]
        rows = rows.reshape(-1, rows.shape[-1])
        sums = torch.zeros(rows.shape[-1], dtype=torch.float64)
        # In chunks: a vocabulary of logits in float64 is large.
        for part in rows.split(max(CHUNK_ELEMENTS // max(rows.shape[-1], 1), 1)):
            exact = part.double()
            sums += exact.sum(dim=0).cpu()
            self._squares += float(exact.square().sum())
        # Features of an image are not its last dimension: the mean has to broadcast against it.
        self._features.add(sums.reshape(-1, *([1] * (output.ndim - 2))) if output.ndim >= 4 else sums, len(rows))
        own = None
        if keep is None and output.ndim and output.shape[0] == batch.size and output[0].numel() <= MOST_NUMBERS:
            own = output.sum(dim=0, dtype=torch.float64).cpu()
        self._numbers.add(own, batch.size)

    @property
    def mean(self) -> Tensor | None:
        """float64, broadcasts against the output; ``None`` where the number of features differs from batch to batch."""
        own = self._numbers.mean(2)
        return self._features.mean(1) if own is None else own

    @property
    def varying(self) -> float | None:
        """The share of the squared size that varies: ‖f − mean f‖² / ‖f‖², from 0 to 1; ``None`` where there is no mean."""
        own = self._numbers.squares(2)
        common = self._features.squares(1) if own is None else own
        if common is None:
            return None
        if self._squares <= 0.0:
            return 1.0
        return min(max(1.0 - common / self._squares, 0.0), 1.0)

    @property
    def trouble(self) -> str | None:
        """Why nothing can be relative to what varies; ``None`` where it can."""
        varying = self.varying
        if varying is None:
            return "has another number of features from batch to batch, so that it has no mean"
        if varying <= CONSTANT or self._squares <= 0.0:
            return "is constant over the samples, so that nothing varies"
        return None


class VariationMetric(OutputMetric):
    """‖f(x) − f'(x)‖ / ‖f(x) − mean f‖: what :class:`OutputMetric` says, with what all samples have in common left out of the size.

    The mean is that of the original's outputs on the very samples on which the error is measured: see :class:`Centre`. A mean of n
    samples is nearer to them than the true one, which makes the size smaller and the error larger by up to √(n/(n−1)): to the safe side.

    Example:
        >>> VARIATION.value(0.25)
        0.5
    """

    name = "variation"
    title = "error of what varies in the output"
    centred: ClassVar[bool] = True

    def __init__(self, mean: Tensor | None = None) -> None:
        self._mean = mean

    @property
    def figure(self) -> str:
        return "variation_error"

    def fitted(self, centre: Centre, what: str = "the output") -> SampledMetric:
        """Give the metric with the mean of these outputs."""
        if centre.trouble is not None:
            raise UsageError(
                f"metric 'variation': {what} {centre.trouble}; use metric='output', or output_fn to measure other outputs"
            )
        return VariationMetric(centre.mean)

    def terms(self, reference: Tensor, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        if self._mean is None:
            raise UsageError("metric 'variation': needs the mean of the outputs first: fitted(centre)")
        keep = position_mask(reference, batch)
        mean = self._mean.to(reference.device).expand(reference.shape)
        lost, whole = squared_sums(output, keep, minus=reference), squared_sums(reference, keep, minus=mean)
        return per_sample(lost, batch), per_sample(whole, batch)


VARIATION = VariationMetric()


def _rows(output: Tensor, batch: Batch) -> Tensor:
    """The output with its features last, and at least one dimension before them."""
    if output.ndim >= 4:
        return output.movedim(1, -1)
    if output.ndim == 1:
        return output[:, None] if batch.size > 1 else output[None]
    return output if output.ndim else output.reshape(1, 1)
