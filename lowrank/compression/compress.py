"""The main path: a model in, a smaller one out whose error was measured on data the choice never saw."""

from __future__ import annotations

import copy
import logging
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank import checkpoint, kernels
from lowrank.calibration.batches import Batch, prepare_batches
from lowrank.calibration.metrics import METRICS
from lowrank.compression.accounting import compression_report, layer_rows
from lowrank.compression.choose import allocator_of, choose, measure_given
from lowrank.compression.formats import FORMATS, compressing_formats
from lowrank.compression.latency import speed_of
from lowrank.compression.options import MOST_SEED, Metric, Options, default_metric
from lowrank.compression.plan import Plan
from lowrank.compression.prepare import (
    Preparation,
    fold_and_find,
    gather,
    planned,
    split_again,
    split_samples,
    weigh,
)
from lowrank.compression.report import CompressionReport
from lowrank.compression.timings import load_timings
from lowrank.compression.working_copy import WorkingCopy
from lowrank.errors import BudgetError, CheckpointError, NumericsError, UsageError, is_whole
from lowrank.numerics.linalg import fallback_counts, reset_fallback_counts
from lowrank.targets import target_names
from lowrank.targets.model import unwrapped

__all__ = ["CompressionResult", "apply_plan", "compress_model", "plan_model", "prepare"]

log = logging.getLogger("lowrank")


@dataclass
class CompressionResult:
    """The smaller model, the plan it was made by, and the report of what was measured.

    Attributes:
        model: ready to run; of the original's class, in its mode and on its device.
        plan: plain data; ``apply_plan(model, plan, calibration)`` makes the same model again, but for what healing moved.
        report: rows and totals, see :class:`lowrank.CompressionReport`.
        source: the directory whose tokenizer and processor files :meth:`save` copies; found by itself where transformers loaded the
            model from a local one.
    """

    model: nn.Module
    plan: Plan
    report: CompressionReport
    source: Path | None = None

    def save(self, directory: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write model, plan and reports to a directory that :func:`lowrank.load_model` reads.

        Raises:
            UsageError: the directory exists, is not empty, and ``overwrite`` is off.
            StorageError: writing failed; what was there before is untouched.
        """
        checkpoint.save_compressed(
            self.model, Path(directory), plan=self.plan, report=self.report, overwrite=overwrite, source=self.source
        )


def compress_model(
    model: nn.Module,
    *,
    error_budget: float | str | None = None,
    size_budget: float | str | None = None,
    metric: Metric = "auto",
    higher_is_better: bool = False,
    calibration: Iterable[Any] | None = None,
    validation: Iterable[Any] | None = None,
    formats: Sequence[str] | str = compressing_formats(),
    targets: Sequence[str] = target_names(),
    ignore: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
    objective: str = "size",
    loss_aware: bool | str = "auto",
    heal: bool | Mapping[str, Any] = False,
    strict: bool = False,
    activations: str = "auto",
    output_fn: Callable[[Any], Tensor] | None = None,
    inplace: bool = False,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: bool = True,
    on_nonfinite: str = "raise",
    fold_batchnorm: bool = False,
    plan: Plan | None = None,
) -> CompressionResult:
    """Make a model as small as an error budget allows, and measure that it keeps it.

    Calibration samples (indices of dimension 0) are shuffled with the seed and split three ways. *Statistics*: what flows into each
    layer, for data-aware factors. *Search*: single-layer probes and whole-plan measurements that calibrate the predictions.
    *Verification*: touched only by a fixed sequence of plans from the safest to the smallest; the last one whose error passes a
    one-sided 95 % test against the budget is the result.

    Args:
        model: any module; it stays as it is unless ``inplace``.
        error_budget: the error allowed, in the metric's unit; 0.05 and "5%" are 5 %.
        size_budget: stored bytes after / before. Alone: the smallest error within it. With ``error_budget``: the promise is on both.
        metric: "output" (‖f(x)−f'(x)‖/‖f(x)‖), "weight" (√(Σ‖ΔW‖²/Σ‖W‖²)), "kl" (nats per token), "perplexity" (relative increase), a
            callable(model) -> float, or "auto": "output" with calibration data, "weight" without.
        higher_is_better: for a callable; the budget is its allowed relative loss.
        calibration: batches: a tensor or tuple (positional arguments), a dict (keyword arguments), or (inputs, labels). The "weight"
            metric does not use them.
        validation: batches for verification; else a quarter of the calibration samples is set aside.
        formats: out of "int8", "lowrank", "lowrank-int8", or "all"; "dense" is always a candidate.
        targets: kinds of layers to compress.
        ignore: globs over module names to leave alone.
        overrides: {glob: "dense" | format | {"format": …, "rank": …, "bits": …}}.
        objective: "size", or "latency": the fastest model within ``error_budget`` by the measured table of
            :func:`lowrank.compression.timings.load_timings`, at the tokens per call of the calibration batches; no layer that the table
            calls slower than dense is used.
        loss_aware: fit low-rank factors to what their error costs the model's output, by its gradients (no labels needed), not to
            the layer's own output. "auto": where the model can be differentiated; True: or raise; False: never.
        heal: also train plans that are smaller than the budget allows until they keep it (:func:`lowrank.heal`, no labels needed), on
            the statistics part of the calibration samples; what is promised is verified as ever, on samples that no training has seen.
            True, or a dict of ``steps, epochs, lr, hidden_weight, batch_size, vary, max_grad_norm``. Takes minutes: up to four plans
            are healed.
        strict: raise where a decomposition needed a fallback.
        activations: "int8" (integer products), "float" (weight-only), or "auto": integer, weight-only where that buys size.
        output_fn: picks the tensor to measure out of the model's output.
        inplace: replace the layers in the model itself.
        device: move a copy there first.
        seed: of the split; same input, seed and thread count give the same bytes.
        progress: bars on standard error for what takes over 2 seconds.
        on_nonfinite: "raise", or "copy" to leave a layer with NaN or Inf as it is.
        fold_batchnorm: take each BatchNorm into the convolution before it first; see :func:`lowrank.fold_batchnorm`.
        plan: apply this one instead of searching; its error is measured all the same, and tested where a budget is given.

    Raises:
        UsageError: an argument that means nothing, a pattern that matches nothing, no layer to compress.
        CalibrationError: data that cannot be used.
        NumericsError: NaN or Inf in weights or activations.
        BudgetError: the budget cannot be met; carries the best plan and the error it reaches.
        NotImplementedError: a format of a later version.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> result = compress_model(model, error_budget=0.05, calibration=[torch.randn(256, 64)], progress=False)
        >>> result.report.totals["error_upper"] <= 0.05, result.report.totals["size_ratio"] < 0.3
        (True, True)
    """
    options = Options(
        error_budget=error_budget,
        size_budget=size_budget,
        metric=metric,
        higher_is_better=higher_is_better,
        formats=formats,
        targets=targets,
        ignore=ignore,
        overrides=overrides,
        objective=objective,
        loss_aware=loss_aware,
        heal=heal,
        strict=strict,
        activations=activations,
        output_fn=output_fn,
        seed=seed,
        progress=progress,
        on_nonfinite=on_nonfinite,
        fold_batchnorm=fold_batchnorm or (plan is not None and bool(plan.metadata.get("fold_batchnorm"))),
    ).checked(calibrated=calibration is not None, planned=plan is not None)
    if plan is not None:
        options = planned(options, plan.metadata)
    stages = _Stages()
    original = _on_device(unwrapped(model), device)
    with stages.stage("prepare"):
        prepared, verification = prepare(original, calibration, validation, options, probing=plan is None)
    with stages.stage("search"):
        outcome = (
            choose(prepared, verification, options)
            if plan is None
            else measure_given(prepared, plan, verification, options)
        )
    with stages.stage("report"):
        healed = outcome.chosen.healed
        if healed is not None:
            finished = healed.model
        else:
            finished = prepared.copy.release() if not inplace else prepared.copy.model
        rows = layer_rows(prepared.survey, finished, prepared.copy.layers)
        report = compression_report(rows, outcome, options, prepared.notes)
        if prepared.speed is not None:
            report.totals |= prepared.speed.summary(outcome.chosen.plan, prepared.copy.layers)
        report.run = stages.summary()
        if options.size_budget is not None and report.totals["size_ratio"] > options.size_budget:
            raise BudgetError(
                f"size budget {options.size_budget:g}: the smallest model found that keeps the error budget {options.error_budget} has "
                f"{report.totals['size_ratio']:.4g} of the bytes; raise one of the two",
                plan=outcome.chosen.plan,
                error=report.totals["error_upper"],
            )
        if inplace:
            finished = prepared.copy.write_back(None if healed is None else healed.model)
    return CompressionResult(finished, outcome.chosen.plan, report, _local_source(original))


def plan_model(
    model: nn.Module,
    *,
    calibration: Iterable[Any] | None = None,
    validation: Iterable[Any] | None = None,
    **options: Any,
) -> Plan:
    """Make the plan that the predictions alone would choose: for looking before the work (``lowrank compress --dry-run``).

    Takes the arguments of :func:`compress_model`; nothing is verified, and the plan's error is a prediction.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> plan_model(model, error_budget=0.05, progress=False).entry("0").format
        'int8'
    """
    checked = Options(**options).checked(calibrated=calibration is not None)
    prepared, _ = prepare(unwrapped(model), calibration, validation, checked, probing=True)
    return allocator_of(prepared, checked).plan(checked.contribution(checked.error_budget))


def apply_plan(
    model: nn.Module,
    plan: Plan,
    calibration: Iterable[Any] | None = None,
    *,
    output_fn: Callable[[Any], Tensor] | None = None,
) -> nn.Module:
    """Make a copy of the model with the plan's layers in place; nothing is decided and nothing measured.

    With the calibration data that the plan was made with, the layers are the same to the last bit. Without any, factors come from
    the plain SVD and a message on the logger "lowrank" says so.

    Args:
        model: the one that the plan was made for; stays as it is.
        plan: from :func:`compress_model`, a file, or an edit by hand.
        calibration: batches, as for :func:`compress_model`.
        output_fn: the one that the plan was made with, if any.

    Raises:
        LowRankError: the plan is for another model, or asks for something impossible.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> plan = plan_model(model, error_budget=0.05, progress=False)
        >>> type(apply_plan(model, plan)[0]).__name__
        'QuantizedLinear'
    """
    metadata = plan.metadata
    seed = metadata.get("seed", 0)
    if not is_whole(seed, 0, MOST_SEED):
        raise CheckpointError(f"plan: metadata: seed must be an integer from 0, got {seed!r}")
    options = Options(
        seed=seed,
        progress=False,
        output_fn=output_fn,
        metric=default_metric(calibrated=calibration is not None and not _weights_only(metadata)),
        fold_batchnorm=bool(metadata.get("fold_batchnorm")),
    )
    if calibration is None:
        if metadata.get("data_aware") and any(entry.rank is not None for entry in plan.entries):
            log.warning(
                "apply_plan: the plan's factors were fitted to calibration data; without it they come from the plain SVD"
            )
    else:
        options = planned(options, metadata)
    if metadata.get("healed"):
        log.warning("apply_plan: the plan's model was healed afterwards, which applying the plan does not repeat")
    original = unwrapped(model)
    working, found, _ = fold_and_find(original, options)
    batches = prepare_batches(original, calibration) if calibration is not None else None
    split = split_again(batches, metadata) if batches is not None else None
    factored = any(entry.rank is not None for entry in plan.entries)
    copied = WorkingCopy(working, gather(working, found, split, options, factored=factored)[0])
    copied.install_plan(plan)
    return copied.release()


def _weights_only(metadata: Mapping[str, Any]) -> bool:
    """Whether a plan was made by its weights alone; a metric that is not known here was measured on data."""
    metric = METRICS.get(str(metadata.get("metric")))
    return metric is not None and metric.weights_only


def prepare(
    model: nn.Module,
    calibration: Iterable[Any] | None,
    validation: Iterable[Any] | None,
    options: Options,
    *,
    probing: bool,
) -> tuple[Preparation, list[Batch]]:
    """Gather what a choice is made from, and the samples it may not see.

    Args:
        options: checked.
        probing: measure what each layer's formats cost; not needed for a plan that is given.
    """
    reset_fallback_counts()
    working, found, notes = fold_and_find(model, options)
    latency = probing and options.objective == "latency"
    # The "weight" metric needs no samples: its optimum is the plain SVD.
    blind = options.error_metric.weights_only
    batches = prepare_batches(model, calibration) if calibration is not None and (latency or not blind) else None
    calls = batches
    if blind:
        batches = validation = None
    checks = prepare_batches(model, validation, "validation") if validation is not None else None
    split = split_samples(batches, checks, options)
    factored = not probing or bool(options.overrides) or any(FORMATS[name].factored for name in options.formats)
    layers, told = gather(working, found, split, options, factored=factored)
    notes += told
    copied = WorkingCopy(working, layers, model)
    if probing:
        prepared = weigh(copied, found, split, options)
        if latency and calls is not None:
            _price(prepared, working, calls)
    else:
        prepared = Preparation(copied, found, split, [])
    prepared.notes = notes + prepared.notes
    if options.strict and fallback_counts():
        raise NumericsError(f"strict: a decomposition did not converge and a fallback was used: {fallback_counts()}")
    return prepared, split.verification if split is not None else []


def _price(prepared: Preparation, model: nn.Module, batches: Sequence[Batch]) -> None:
    """Seconds in place of bytes as what the plan minimises."""
    layers = prepared.copy.layers
    speed = speed_of(model, batches, layers, load_timings(route=kernels.route()))
    prepared.speed, prepared.choices = speed, speed.priced(prepared.choices, layers)
    prepared.notes = [*prepared.notes, *speed.notes(layers, torch.get_num_threads())]


def _local_source(model: nn.Module) -> Path | None:
    """The directory that transformers loaded the model from, whose tokenizer files are worth copying."""
    path = getattr(model, "name_or_path", None)
    return Path(path) if isinstance(path, str) and path and Path(path).is_dir() else None


def _on_device(model: nn.Module, device: torch.device | str | None) -> nn.Module:
    """The model, or a copy of it on another device."""
    if device is None:
        return model
    try:
        wanted = torch.device(device)
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device: {device!r} is not available here ({str(error).splitlines()[0]})") from error
    current = next((tensor.device for tensor in model.parameters()), wanted)
    return model if current == wanted else copy.deepcopy(model).to(wanted)


@dataclass
class _Stages:
    """Seconds and peak memory of each stage."""

    stages: dict[str, dict[str, float]] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        # Kilobytes on Linux, bytes on macOS.
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        self.stages[name] = {"seconds": time.perf_counter() - start, "peak_memory_bytes": peak}

    def summary(self) -> dict[str, Any]:
        host = {
            "machine": platform.machine(),
            "system": platform.system(),
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
        }
        # The last stage is still running when this is called; it counts rows and takes no time worth naming.
        return {"stages": self.stages, "seconds": sum(item["seconds"] for item in self.stages.values()), "host": host}
