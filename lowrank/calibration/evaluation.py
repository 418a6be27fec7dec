"""End-to-end error of one model against another, sample by sample, with the confidence that the samples allow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from lowrank.calibration.batches import Batch, evaluating, model_tensor
from lowrank.errors import CalibrationError, NumericsError, UsageError

__all__ = ["METRICS", "Evaluator", "Measurement", "compare_models"]

METRICS = ("output", "kl", "perplexity")
OutputFn = Callable[[Any], Tensor]
# Reference outputs up to this size are kept between measurements; larger ones are computed again each time.
CACHE_BYTES = 2**30
# Elements that are turned into float64 at a time.
CHUNK_ELEMENTS = 2**22


@dataclass(frozen=True)
class Measurement:
    """A ratio of sums over samples, and what it says about data not seen.

    Attributes:
        metric: "output" (√ of the ratio), "kl" (the ratio) or "perplexity" (exp of the ratio − 1).
        numerators, denominators: (samples,) float64: squared error and squared size, or nats and tokens.

    Example:
        >>> m = Measurement("output", torch.tensor([1.0, 1.1, 0.9]), torch.tensor([100.0, 100.0, 100.0]))
        >>> round(m.value, 3), m.value < m.upper() < 0.12, m.passes(0.12), m.passes(0.1)
        (0.1, True, True, False)
    """

    metric: str
    numerators: Tensor
    denominators: Tensor

    @property
    def value(self) -> float:
        """The point estimate."""
        whole = float(self.denominators.sum())
        lost = float(self.numerators.sum())
        if whole <= 0.0:
            return 0.0 if lost <= 0.0 else math.inf
        return self._unit(lost / whole)

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Two-sided interval by Fieller's theorem: all ratios e for which mean(dᵢ − e·sᵢ) = 0 is not rejected by a t test."""
        quantile = float(stats.t.ppf((1.0 + confidence) / 2.0, max(len(self.numerators) - 1, 1)))
        low, high = self._fieller(quantile)
        return self._unit(low), self._unit(high)

    def upper(self, confidence: float = 0.95) -> float:
        """One-sided upper bound: the smallest ε whose test mean(dᵢ − ε²sᵢ) ≤ 0 passes; inf where the samples are too few."""
        if len(self.numerators) < 2:
            return math.inf
        quantile = float(stats.t.ppf(confidence, len(self.numerators) - 1))
        return self._unit(self._fieller(quantile)[1])

    def passes(self, budget: float, confidence: float = 0.95) -> bool:
        """Whether the one-sided test keeps the budget."""
        return self.upper(confidence) <= budget

    def _unit(self, ratio: float) -> float:
        if not math.isfinite(ratio):
            return ratio
        if self.metric == "output":
            return math.sqrt(max(ratio, 0.0))
        return math.expm1(ratio) if self.metric == "perplexity" and ratio < 700.0 else ratio

    def _fieller(self, quantile: float) -> tuple[float, float]:
        lost, whole = self.numerators, self.denominators
        count = len(lost)
        if not bool(torch.isfinite(lost).all()) or count < 2:
            return -math.inf, math.inf
        mean_lost, mean_whole = float(lost.mean()), float(whole.mean())
        if mean_whole <= 0.0:
            return (0.0, 0.0) if float(lost.abs().sum()) == 0.0 else (-math.inf, math.inf)
        # Scaled by the mean size, so that the quadratic's terms are of one order.
        lost, whole = lost / mean_whole, whole / mean_whole
        centre = mean_lost / mean_whole
        factor = quantile**2 / count
        variance_lost, variance_whole = float(lost.var()), float(whole.var())
        covariance = float(((lost - lost.mean()) * (whole - whole.mean())).sum() / (count - 1))
        a = 1.0 - factor * variance_whole
        b = centre - factor * covariance
        c = centre**2 - factor * variance_lost
        if a <= 0.0:
            return -math.inf, math.inf
        root = math.sqrt(max(b * b - a * c, 0.0))
        return (b - root) / a, (b + root) / a


class Evaluator:
    """The original model's outputs on some batches, and the error of other models against them.

    Args:
        original: the model to compare with; its outputs are cached up to 1 GiB.
        batches: from :func:`lowrank.calibration.batches.prepare_batches`.
        metric: "output", "kl" or "perplexity".
        output_fn: picks the tensor out of the model's output.

    Raises:
        UsageError: the metric does not fit the outputs.
        NumericsError: the original's outputs are not finite.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2))
        >>> Evaluator(model, [Batch((torch.ones(4, 3),), size=4)], "output").measure(model).value
        0.0
    """

    def __init__(
        self, original: nn.Module, batches: Sequence[Batch], metric: str, output_fn: OutputFn | None = None
    ) -> None:
        if metric not in METRICS:
            raise UsageError(f"metric: must be one of {', '.join(METRICS)} here, got {metric!r}")
        self.original = original
        self.batches = list(batches)
        self.metric = metric
        self.output_fn = output_fn
        self._cache: list[Tensor | None] = []
        size = 0
        with evaluating(original):
            for index, batch in enumerate(self.batches):
                output = self._output(original, batch)
                if not bool(torch.isfinite(output).all()):
                    raise NumericsError(
                        f"model: its own output on batch {index} holds NaN or Inf; repair the model or take the batch out"
                    )
                _check_fit(metric, output, batch)
                size += output.nbytes
                self._cache.append(output if size <= CACHE_BYTES else None)

    def measure(self, model: nn.Module, *, desc: str | None = None) -> Measurement:
        """Run the model on every batch and compare."""
        numerators, denominators = [], []
        batches = tqdm(
            list(zip(self.batches, self._cache, strict=True)), desc=desc, delay=2, disable=desc is None, leave=False
        )
        for batch, cached in batches:
            with evaluating(model):
                output = self._output(model, batch)
            reference = cached
            if reference is None:
                with evaluating(self.original):
                    reference = self._output(self.original, batch)
            lost, whole = _terms(self.metric, reference, output, batch)
            numerators.append(lost)
            denominators.append(whole)
        return Measurement(self.metric, torch.cat(numerators), torch.cat(denominators))

    def _output(self, model: nn.Module, batch: Batch) -> Tensor:
        output = batch.run(model)
        tensor = self.output_fn(output) if self.output_fn is not None else model_tensor(output)
        if not isinstance(tensor, Tensor):
            raise UsageError(f"output_fn: must return a tensor, got {type(tensor).__name__}")
        return tensor.detach()


def _check_fit(metric: str, output: Tensor, batch: Batch) -> None:
    if metric == "kl" and output.ndim < 2:
        raise UsageError(
            f"metric 'kl': needs logits with classes in the last dimension, the output has shape {tuple(output.shape)}"
        )
    if metric == "perplexity":
        ids = batch.token_ids
        if ids is None or output.ndim != 3 or output.shape[:2] != ids.shape:
            shape = None if ids is None else tuple(ids.shape)
            raise UsageError(
                "metric 'perplexity': needs a causal language model (token ids (samples, positions), logits (samples, positions, "
                f"vocabulary)); got ids {shape} and outputs {tuple(output.shape)}"
            )


def _terms(metric: str, reference: Tensor, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Per sample what was lost and what it is relative to, (samples,) float64."""
    if output.shape != reference.shape:
        raise CalibrationError(
            f"the compressed model's output has shape {tuple(output.shape)}, the original's {tuple(reference.shape)}"
        )
    if metric == "output":
        keep = _position_mask(reference, batch)
        lost, whole = _squares(output, keep, minus=reference), _squares(reference, keep)
        return _per_sample(lost, batch), _per_sample(whole, batch)
    if metric == "kl":
        divergence = _kl(reference, output)
        keep = _position_mask(reference, batch)
        tokens = torch.ones_like(divergence)
        if keep is not None:
            tokens = _widen(keep, divergence).to(torch.float64).expand_as(divergence)
            divergence = torch.where(tokens > 0.0, divergence, 0.0)
        return _per_sample(divergence, batch), _per_sample(tokens, batch)
    ids = batch.token_ids
    assert ids is not None
    keep = batch.mask
    tokens = (
        torch.ones(ids.shape[0], ids.shape[1] - 1, dtype=torch.float64, device=ids.device)
        if keep is None
        else keep[:, 1:].double()
    )
    return _per_sample((_nll(output, ids) - _nll(reference, ids)) * tokens, batch), _per_sample(tokens, batch)


def _position_mask(reference: Tensor, batch: Batch) -> Tensor | None:
    mask = batch.mask
    return mask if mask is not None and reference.ndim >= 3 and reference.shape[:2] == mask.shape else None


def _squares(tensor: Tensor, keep: Tensor | None, *, minus: Tensor | None = None) -> Tensor:
    """Σ (tensor − minus)² in float64 over all but dimension 0, in chunks: a vocabulary of logits in float64 is large."""
    if tensor.ndim == 0:
        return (tensor.to(torch.float64) - (0.0 if minus is None else minus.to(torch.float64))).square().reshape(1)
    rows = max(CHUNK_ELEMENTS * tensor.shape[0] // max(tensor.numel(), 1), 1)
    parts = []
    for start in range(0, tensor.shape[0], rows):
        chunk = slice(start, start + rows)
        values = tensor[chunk].to(torch.float64)
        squares = (values if minus is None else values - minus[chunk].to(torch.float64)).square()
        if keep is not None:
            squares = torch.where(_widen(keep[chunk], squares), squares, 0.0)
        parts.append(squares.flatten(1).sum(dim=1) if squares.ndim > 1 else squares)
    return torch.cat(parts)


def _widen(mask: Tensor, like: Tensor) -> Tensor:
    return mask.reshape(*mask.shape, *([1] * (like.ndim - mask.ndim)))


def _per_sample(values: Tensor, batch: Batch) -> Tensor:
    if batch.size == 1 or values.shape[0] != batch.size:
        return values.sum().reshape(1).cpu()
    return values.reshape(batch.size, -1).sum(dim=1).cpu()


def _kl(reference: Tensor, output: Tensor) -> Tensor:
    """KL(reference ‖ output) in nats over the last dimension, sample by sample so that a large vocabulary fits."""
    parts = []
    for ours, theirs in zip(reference, output, strict=True):
        log_p = F.log_softmax(ours.to(torch.float64), dim=-1)
        log_q = F.log_softmax(theirs.to(torch.float64), dim=-1)
        parts.append((log_p.exp() * (log_p - log_q)).sum(dim=-1))
    return torch.stack(parts)


def _nll(logits: Tensor, ids: Tensor) -> Tensor:
    """(samples, positions − 1) negative log-likelihood of each next token."""
    parts = [
        F.cross_entropy(row[:-1].to(torch.float64), target[1:].to(row.device), reduction="none")
        for row, target in zip(logits, ids, strict=True)
    ]
    return torch.stack(parts)


def compare_models(
    original: nn.Module,
    compressed: nn.Module,
    batches: Sequence[Batch],
    *,
    output_fn: OutputFn | None = None,
    progress: bool = False,
) -> dict[str, dict[str, float]]:
    """Output error, and where they apply KL, perplexity and top-1 agreement, each with a 95 % interval over samples.

    Returns:
        ``{"output_error": {"value", "low", "high"}, "samples": {"value"}, …}``; "kl" in nats per token, "perplexity_increase" relative.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2))
        >>> compare_models(model, model, [Batch((torch.ones(4, 3),), size=4)])["output_error"]["value"]
        0.0
    """
    lost: dict[str, list[Tensor]] = {}
    whole: dict[str, list[Tensor]] = {}
    nll: dict[str, float] = {"original": 0.0, "compressed": 0.0}
    samples = 0
    for batch in tqdm(batches, desc="evaluate", delay=2, disable=not progress):
        with evaluating(original):
            raw = batch.run(original)
        with evaluating(compressed):
            other = batch.run(compressed)
        reference, output = ((output_fn or model_tensor)(value).detach() for value in (raw, other))
        samples += batch.size
        terms = {"output_error": _terms("output", reference, output, batch)}
        # Only what calls itself logits is read as such: the last dimension of a hidden state holds no classes.
        if output_fn is None and (hasattr(raw, "logits") or (isinstance(raw, dict) and "logits" in raw)):
            terms["kl"] = _terms("kl", reference, output, batch)
            agree = (reference.argmax(dim=-1) == output.argmax(dim=-1)).to(torch.float64)
            keep = _position_mask(reference, batch)
            counted = torch.ones_like(agree) if keep is None else _widen(keep, agree).to(torch.float64).expand_as(agree)
            terms["top1_agreement"] = _per_sample(agree * counted, batch), _per_sample(counted, batch)
            ids = batch.token_ids
            if ids is not None and reference.ndim == 3 and reference.shape[:2] == ids.shape and ids.shape[1] > 1:
                terms["perplexity_increase"] = _terms("perplexity", reference, output, batch)
                tokens = torch.ones_like(ids[:, 1:]) if batch.mask is None else batch.mask[:, 1:]
                nll["original"] += float((_nll(reference, ids) * tokens).sum())
                nll["compressed"] += float((_nll(output, ids) * tokens).sum())
        for name, (numerator, denominator) in terms.items():
            lost.setdefault(name, []).append(numerator)
            whole.setdefault(name, []).append(denominator)
    units = {"output_error": "output", "perplexity_increase": "perplexity"}
    found: dict[str, dict[str, float]] = {}
    for name in lost:
        measured = Measurement(units.get(name, "kl"), torch.cat(lost[name]), torch.cat(whole[name]))
        low, high = measured.interval()
        found[name] = {"value": measured.value, "low": low, "high": high}
    if "perplexity_increase" in whole:
        count = float(torch.cat(whole["perplexity_increase"]).sum())
        for name, total in nll.items():
            found[f"perplexity_{name}"] = {"value": math.exp(total / count)}
    found["samples"] = {"value": float(samples)}
    return found
