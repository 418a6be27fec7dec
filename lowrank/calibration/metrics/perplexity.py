"""The relative increase of a causal language model's perplexity."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lowrank.calibration.batches import Batch
from lowrank.calibration.masks import IGNORED_LABEL
from lowrank.calibration.metrics.base import SampledMetric
from lowrank.calibration.metrics.kl import KL
from lowrank.calibration.metrics.sums import per_sample
from lowrank.errors import UsageError

__all__ = ["PERPLEXITY", "PerplexityMetric"]

# exp leaves float64 from 709 on.
MOST_NATS = 700.0


class PerplexityMetric(SampledMetric):
    """Perplexity of the compressed model / of the original − 1, on the batches' own next tokens.

    The terms are log-likelihoods: lost ones of layers add up, and exp(Σ lost / tokens) − 1 is the increase. Probes are measured as KL
    divergence, the expectation of what is lost, which varies less.

    Example:
        >>> round(PERPLEXITY.value(PERPLEXITY.ratio(0.02)), 12)
        0.02
    """

    name = "perplexity"
    title = "increase of the perplexity"
    usual = (0.003, 0.5)
    gradients = "labels"
    needs_logits = True

    @property
    def figure(self) -> str:
        return "perplexity_increase"

    @property
    def probe(self) -> SampledMetric:
        return KL

    def terms(self, reference: Tensor, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        ids, tokens = _ids(batch), _tokens(batch)
        lost = (_nll(output, ids) - _nll(reference, ids)) * tokens
        return per_sample(lost, batch), per_sample(tokens, batch)

    def check(self, output: Tensor, batch: Batch) -> None:
        ids = batch.token_ids
        if ids is None or output.ndim != 3 or output.shape[:2] != ids.shape:
            shape = None if ids is None else tuple(ids.shape)
            raise UsageError(
                "metric 'perplexity': needs a causal language model (token ids (samples, positions), logits (samples, positions, "
                f"vocabulary)); got ids {shape} and outputs {tuple(output.shape)}"
            )

    def applies(self, output: Tensor, batch: Batch) -> bool:
        # One token has no next one.
        return super().applies(output, batch) and _ids(batch).shape[1] > 1

    def level(self, output: Tensor, batch: Batch) -> float:
        return float((_nll(output, _ids(batch)) * _tokens(batch)).sum())

    def level_value(self, ratio: float) -> float:
        return math.exp(ratio)

    def value(self, ratio: float) -> float:
        return math.expm1(ratio) if ratio < MOST_NATS else ratio

    def ratio(self, value: float) -> float:
        return math.log1p(value)


PERPLEXITY = PerplexityMetric()


def _ids(batch: Batch) -> Tensor:
    ids = batch.token_ids
    assert ids is not None, "check() comes first"
    return ids


def _tokens(batch: Batch) -> Tensor:
    """(samples, positions − 1) float64: 1 for each next token that is no padding, follows none, and is not labelled −100.

    Where the padding stands on the left, what the model says at its last position is no guess of a text's first token.
    """
    ids, keep, labels = _ids(batch), batch.mask, batch.arguments.get("labels")
    counted = torch.ones(ids.shape[0], ids.shape[1] - 1, dtype=torch.float64, device=ids.device)
    if keep is not None and keep.shape == ids.shape:
        counted *= keep[:, 1:] & keep[:, :-1]
    if isinstance(labels, Tensor) and labels.shape == ids.shape:
        counted *= labels[:, 1:] != IGNORED_LABEL
    return counted


def _nll(logits: Tensor, ids: Tensor) -> Tensor:
    """(samples, positions − 1) negative log-likelihood of each next token."""
    parts = [
        F.cross_entropy(row[:-1].to(torch.float64), target[1:].to(row.device), reduction="none")
        for row, target in zip(logits, ids, strict=True)
    ]
    return torch.stack(parts)
