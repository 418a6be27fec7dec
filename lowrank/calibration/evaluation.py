"""End-to-end error of one model against another, sample by sample, with the confidence that the samples allow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowrank.calibration.batches import Batch, ForwardFn, evaluating
from lowrank.calibration.measurement import Comparison, Measurement, named
from lowrank.calibration.metrics import SampledMetric, sampled_metric, sampled_metrics
from lowrank.calibration.metrics.sums import count_kept, per_sample, position_mask
from lowrank.calibration.metrics.variation import Centre
from lowrank.calibration.outputs import OutputFn, measured_tensors, model_tensor
from lowrank.calibration.preparing import prepare_batches, told
from lowrank.errors import CalibrationError, NumericsError

__all__ = ["Comparison", "Evaluator", "Measurement", "compare_models"]

# Reference outputs up to this size are kept between measurements; larger ones are computed again each time.
CACHE_BYTES = 2**30


class Evaluator:
    """The original model's outputs on some batches, and the error of other models against them.

    Args:
        original: the model to compare with; its outputs are cached up to ``cache_bytes``.
        batches: from :func:`lowrank.calibration.preparing.prepare_batches`.
        metric: one that is measured on samples, or its name: "output", "variation", "kl", "perplexity".
        output_fn: picks the tensor out of the model's output; else every floating tensor counts, or for metrics of logits the main one.

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
        *,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.original = original
        self.batches = list(batches)
        self.metric = sampled_metric(metric)
        self.output_fn = output_fn
        self._cache: list[dict[str, Tensor] | None] = []
        self._centres: dict[str, Centre] = {}
        size = 0
        for index, batch in enumerate(self.batches):
            outputs = self._outputs(original, batch)
            for path, tensor in outputs.items():
                if not bool(torch.isfinite(tensor).all()):
                    raise NumericsError(
                        f"model: {named(path)} of the original on batch {index} holds NaN or Inf; repair the model or take the batch out"
                    )
                self.metric.check(tensor, batch)
                size += tensor.nbytes
            self._add_to_centres(outputs, batch)
            self._cache.append(outputs if size <= cache_bytes else None)
        self._metrics = {path: self.metric.fitted(centre, named(path)) for path, centre in self._centres.items()}

    def _add_to_centres(self, outputs: Mapping[str, Tensor], batch: Batch) -> None:
        if self._centres and self._centres.keys() != outputs.keys():
            raise CalibrationError(
                f"the model's outputs differ from batch to batch: {', '.join(outputs)} on one, {', '.join(self._centres)} on another; "
                "pass output_fn=lambda output: <tensor>"
            )
        for path, tensor in outputs.items():
            self._centres.setdefault(path, Centre()).add(tensor, batch)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The paths of the outputs that are measured."""
        return tuple(self._metrics)

    def sizes(self) -> dict[str, float]:
        """Sum what the error of each output is relative to, over all samples."""
        found = dict.fromkeys(self._metrics, 0.0)
        for batch, cached in zip(self.batches, self._cache, strict=True):
            references = self._outputs(self.original, batch) if cached is None else cached
            for path, metric in self._metrics.items():
                found[path] += float(_terms(metric, references[path], references[path], batch, path)[1].sum())
        return found

    def measure(self, model: nn.Module, *, desc: str | None = None) -> Comparison:
        """Run the model on every batch and compare."""
        numerators: dict[str, list[Tensor]] = {path: [] for path in self._metrics}
        denominators: dict[str, list[Tensor]] = {path: [] for path in self._metrics}
        top1: tuple[int, int] | None = None
        batches = tqdm(
            list(zip(self.batches, self._cache, strict=True)), desc=desc, delay=2, disable=desc is None, leave=False
        )
        for batch, cached in batches:
            outputs = self._outputs(model, batch)
            references = self._outputs(self.original, batch) if cached is None else cached
            for path, metric in self._metrics.items():
                lost, whole = _terms(metric, references[path], _same_output(outputs, path), batch, path)
                numerators[path].append(lost)
                denominators[path].append(whole)
            top1 = _add(top1, _same_top1(references, outputs, batch))
        parts = {
            path: Measurement(metric, torch.cat(numerators[path]), torch.cat(denominators[path]))
            for path, metric in self._metrics.items()
        }
        return Comparison(parts, {path: centre.varying for path, centre in self._centres.items()}, top1)

    def _outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Copies of what is measured: a model may hand out a buffer that its next call writes over."""
        with evaluating(model):
            output = batch.run(model)
        if self.output_fn is None and not self.metric.every_output:
            return {"output": model_tensor(output).detach().clone()}
        return {path: tensor.detach().clone() for path, tensor in measured_tensors(output, self.output_fn).items()}


def _same_top1(references: Mapping[str, Tensor], outputs: Mapping[str, Tensor], batch: Batch) -> tuple[int, int] | None:
    """Samples whose likeliest class is unchanged, and samples, where the output is one vector of scores a sample."""
    path = "logits" if "logits" in references else next(iter(references)) if len(references) == 1 else None
    if path is None:
        return None
    reference = references[path]
    if reference.ndim != 2 or reference.shape[0] != batch.size or reference.shape[1] < 2:
        return None
    return int((reference.argmax(dim=1) == outputs[path].argmax(dim=1)).sum()), batch.size


def _add(total: tuple[int, int] | None, more: tuple[int, int] | None) -> tuple[int, int] | None:
    if more is None or total is None:
        return more or total
    return total[0] + more[0], total[1] + more[1]


def _same_output(outputs: Mapping[str, Tensor], path: str) -> Tensor:
    if path not in outputs:
        raise CalibrationError(f"the compressed model lacks {named(path)} of the original; it has {', '.join(outputs)}")
    return outputs[path].detach()


def _terms(
    metric: SampledMetric, reference: Tensor, output: Tensor, batch: Batch, path: str = "output"
) -> tuple[Tensor, Tensor]:
    """Per sample what was lost and what it is relative to, (samples,) float64."""
    if output.shape != reference.shape:
        raise CalibrationError(
            f"{named(path)} of the compressed model has shape {tuple(output.shape)}, the original's {tuple(reference.shape)}: where the "
            "model itself chooses how much it hands out (detections above a threshold), pass output_fn=lambda output: <tensor> for "
            "what comes before that choice"
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

    lost: dict[str, list[Tensor]] = field(default_factory=dict)
    whole: dict[str, list[Tensor]] = field(default_factory=dict)
    levels: dict[str, float] = field(default_factory=dict)

    def add(self, path: str, lost: Tensor, whole: Tensor) -> None:
        """Add the terms of one output on one batch."""
        self.lost.setdefault(path, []).append(lost)
        self.whole.setdefault(path, []).append(whole)


def compare_models(
    original: nn.Module,
    compressed: nn.Module,
    batches: Sequence[Batch] | Iterable[Any],
    *,
    output_fn: OutputFn | None = None,
    forward_fn: ForwardFn | None = None,
    progress: bool = False,
) -> dict[str, dict[str, float]]:
    """Measure every registered metric that applies to the outputs, and the top-1 agreement of logits, with 95 % intervals over samples.

    Args:
        original, compressed: the models.
        batches: as ``calibration`` of :func:`lowrank.compress_model`; copies of a sample count once.
        output_fn: picks the tensor to measure out of the models' output.
        forward_fn: ``forward_fn(model, batch) -> output`` calls models that take objects.
        progress: a bar on standard error.

    Returns:
        ``{"output_error": {"value", "low", "high"}, "samples": {"value"}, …}``; "kl" in nats per token, "perplexity_increase" relative.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2))
        >>> compare_models(model, model, [Batch((torch.ones(4, 3),), size=4)])["output_error"]["value"]
        0.0
    """
    if not (isinstance(batches, list) and batches and all(isinstance(batch, Batch) for batch in batches)):
        batches = told(prepare_batches(original, batches, "data", output_fn=output_fn, forward_fn=forward_fn))
    metrics = (*sampled_metrics().values(), _Top1Agreement())
    sums = {metric.name: _Sums() for metric in metrics}
    centres: dict[str, Centre] = {}
    samples = 0
    for batch in batches:
        with evaluating(original):
            for path, tensor in measured_tensors(batch.run(original), output_fn).items():
                centres.setdefault(path, Centre()).add(tensor.detach(), batch)
    for batch in tqdm(batches, desc="evaluate", delay=2, disable=not progress):
        with evaluating(original):
            raw = batch.run(original)
            reference = (output_fn or model_tensor)(raw).detach().clone()
            references = {path: each.detach().clone() for path, each in measured_tensors(raw, output_fn).items()}
        # Only what calls itself logits is read as such: the last dimension of a hidden state holds no classes.
        logits = output_fn is None and (hasattr(raw, "logits") or (isinstance(raw, dict) and "logits" in raw))
        with evaluating(compressed):
            other = batch.run(compressed)
        output = (output_fn or model_tensor)(other).detach()
        outputs = measured_tensors(other, output_fn)
        samples += batch.size
        for metric in metrics:
            if (metric.needs_logits and not logits) or not metric.applies(reference, batch):
                continue
            own = sums[metric.name]
            if metric.every_output:
                for path, tensor in references.items():
                    if metric.centred and centres[path].trouble is not None:
                        continue
                    fitted = metric.fitted(centres[path], named(path))
                    own.add(path, *_terms(fitted, tensor, _same_output(outputs, path), batch, path))
            else:
                own.add("output", *_terms(metric, reference, output, batch))
            for side, tensor in (("original", reference), ("compressed", output)):
                level = metric.level(tensor, batch)
                if level is not None:
                    own.levels[side] = own.levels.get(side, 0.0) + level
    found: dict[str, dict[str, float]] = {}
    for metric in metrics:
        own = sums[metric.name]
        if not own.lost:
            continue
        parts = {path: Measurement(metric, torch.cat(own.lost[path]), torch.cat(own.whole[path])) for path in own.lost}
        # Of several outputs the worst.
        measured = max(parts.values(), key=lambda part: part.value)
        low, high = measured.interval()
        high = max(part.interval()[1] for part in parts.values())
        found[metric.figure] = {"value": measured.value, "low": low, "high": high}
        for side, total in own.levels.items():
            count = float(measured.denominators.sum())
            found[f"{metric.name}_{side}"] = {"value": metric.level_value(total / count)}
    found["samples"] = {"value": float(samples)}
    return found
