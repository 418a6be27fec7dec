"""End-to-end error of one model against another, sample by sample, with the confidence that the samples allow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn
from tqdm import tqdm

from lowrank.calibration.batches import Batch, evaluating, model_tensor
from lowrank.calibration.metrics import SampledMetric, sampled_metric, sampled_metrics
from lowrank.calibration.metrics.sums import count_kept, per_sample, position_mask
from lowrank.errors import CalibrationError, NumericsError, UsageError

__all__ = ["Evaluator", "Measurement", "compare_models"]

OutputFn = Callable[[Any], Tensor]
# Reference outputs up to this size are kept between measurements; larger ones are computed again each time.
CACHE_BYTES = 2**30


@dataclass(frozen=True)
class Measurement:
    """A ratio of sums over samples, and what it says about data not seen.

    Attributes:
        metric: makes a value of the ratio.
        numerators, denominators: (samples,) float64: squared error and squared size, or nats and tokens.

    Example:
        >>> m = Measurement(sampled_metric("output"), torch.tensor([1.0, 1.1, 0.9]), torch.tensor([100.0, 100.0, 100.0]))
        >>> round(m.value, 3), m.value < m.upper() < 0.12, m.passes(0.12), m.passes(0.1)
        (0.1, True, True, False)
    """

    metric: SampledMetric
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
        """Tell whether the one-sided test keeps the budget."""
        return self.upper(confidence) <= budget

    def _unit(self, ratio: float) -> float:
        if not math.isfinite(ratio):
            return ratio
        return self.metric.value(ratio)

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
        metric: one that is measured on samples, or its name: "output", "kl", "perplexity".
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
        self,
        original: nn.Module,
        batches: Sequence[Batch],
        metric: SampledMetric | str,
        output_fn: OutputFn | None = None,
    ) -> None:
        self.original = original
        self.batches = list(batches)
        self.metric = sampled_metric(metric)
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
                self.metric.check(output, batch)
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
        # The model may return a buffer of its own, which its next call overwrites.
        return tensor.detach().clone()


def _terms(metric: SampledMetric, reference: Tensor, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Per sample what was lost and what it is relative to, (samples,) float64."""
    if output.shape != reference.shape:
        raise CalibrationError(
            f"the compressed model's output has shape {tuple(output.shape)}, the original's {tuple(reference.shape)}"
        )
    return metric.terms(reference, output, batch)


class _Top1Agreement(SampledMetric):
    """The share of tokens whose likeliest class is the same. No error, since more is better, so it is not registered."""

    name = "top1_agreement"
    title = "top-1 agreement"
    needs_logits = True

    def terms(self, reference: Tensor, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        agree = (reference.argmax(dim=-1) == output.argmax(dim=-1)).to(torch.float64)
        counted = count_kept(position_mask(reference, batch), agree)
        return per_sample(agree * counted, batch), per_sample(counted, batch)

    def value(self, ratio: float) -> float:
        return ratio

    def ratio(self, value: float) -> float:
        return value


@dataclass
class _Sums:
    """Of one metric, over the batches to which it applies."""

    lost: list[Tensor] = field(default_factory=list)
    whole: list[Tensor] = field(default_factory=list)
    levels: dict[str, float] = field(default_factory=dict)


def compare_models(
    original: nn.Module,
    compressed: nn.Module,
    batches: Sequence[Batch],
    *,
    output_fn: OutputFn | None = None,
    progress: bool = False,
) -> dict[str, dict[str, float]]:
    """Measure every registered metric that applies to the outputs, and the top-1 agreement of logits, with 95 % intervals over samples.

    Returns:
        ``{"output_error": {"value", "low", "high"}, "samples": {"value"}, …}``; "kl" in nats per token, "perplexity_increase" relative.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2))
        >>> compare_models(model, model, [Batch((torch.ones(4, 3),), size=4)])["output_error"]["value"]
        0.0
    """
    metrics = (*sampled_metrics().values(), _Top1Agreement())
    sums = {metric.name: _Sums() for metric in metrics}
    samples = 0
    for batch in tqdm(batches, desc="evaluate", delay=2, disable=not progress):
        with evaluating(original):
            raw = batch.run(original)
            reference = (output_fn or model_tensor)(raw).detach().clone()
        with evaluating(compressed):
            other = batch.run(compressed)
        output = (output_fn or model_tensor)(other).detach()
        samples += batch.size
        # Only what calls itself logits is read as such: the last dimension of a hidden state holds no classes.
        logits = output_fn is None and (hasattr(raw, "logits") or (isinstance(raw, dict) and "logits" in raw))
        for metric in metrics:
            if (metric.needs_logits and not logits) or not metric.applies(reference, batch):
                continue
            own = sums[metric.name]
            lost, whole = _terms(metric, reference, output, batch)
            own.lost.append(lost)
            own.whole.append(whole)
            for side, tensor in (("original", reference), ("compressed", output)):
                level = metric.level(tensor, batch)
                if level is not None:
                    own.levels[side] = own.levels.get(side, 0.0) + level
    found: dict[str, dict[str, float]] = {}
    for metric in metrics:
        own = sums[metric.name]
        if not own.lost:
            continue
        measured = Measurement(metric, torch.cat(own.lost), torch.cat(own.whole))
        low, high = measured.interval()
        found[metric.figure] = {"value": measured.value, "low": low, "high": high}
        for side, total in own.levels.items():
            count = float(measured.denominators.sum())
            found[f"{metric.name}_{side}"] = {"value": metric.level_value(total / count)}
    found["samples"] = {"value": float(samples)}
    return found
