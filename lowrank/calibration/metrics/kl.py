"""The Kullback-Leibler divergence of the predicted classes, in nats a token."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lowrank.calibration.batches import Batch
from lowrank.calibration.metrics.base import NATS, SampledMetric
from lowrank.calibration.metrics.sums import count_kept, per_sample, position_mask
from lowrank.errors import UsageError

__all__ = ["KL", "KLMetric"]


class KLMetric(SampledMetric):
    """KL(p ‖ p') of the classes in the last dimension of logits, averaged over tokens; divergences of layers add up as they are.

    Example:
        >>> batch = Batch((torch.zeros(1, 1),))
        >>> lost, tokens = KL.terms(torch.zeros(1, 2), torch.tensor([[0.0, 1.0986123]]), batch)
        >>> round(float(lost), 4), float(tokens)
        (0.1438, 1.0)
    """

    name = "kl"
    title = "KL divergence"
    usual = (0.002, 0.5)
    gradients = "labels"
    unit = NATS
    needs_logits = True

    def terms(self, reference: Tensor, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        divergence = _divergence(reference, output)
        keep = position_mask(reference, batch)
        tokens = count_kept(keep, divergence)
        if keep is not None:
            divergence = torch.where(tokens > 0.0, divergence, 0.0)
        return per_sample(divergence, batch), per_sample(tokens, batch)

    def check(self, output: Tensor, batch: Batch) -> None:
        if output.ndim < 2:
            raise UsageError(
                f"metric 'kl': needs logits with classes in the last dimension, the output has shape {tuple(output.shape)}"
            )

    def value(self, ratio: float) -> float:
        return ratio

    def ratio(self, value: float) -> float:
        return value

    def show(self, value: float, digits: int = 2) -> str:
        return f"{value:.{digits + 1}g} nats a token"


KL = KLMetric()


def _divergence(reference: Tensor, output: Tensor) -> Tensor:
    """KL(reference ‖ output) in nats over the last dimension, sample by sample so that a large vocabulary fits."""
    parts = []
    for ours, theirs in zip(reference, output, strict=True):
        log_p = F.log_softmax(ours.to(torch.float64), dim=-1)
        log_q = F.log_softmax(theirs.to(torch.float64), dim=-1)
        parts.append((log_p.exp() * (log_p - log_q)).sum(dim=-1))
    return torch.stack(parts)
