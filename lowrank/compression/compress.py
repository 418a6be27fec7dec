"""The main path: a model in, a smaller one out whose error was measured on data the choice never saw."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank import checkpoint, kernels
from lowrank.calibration.batches import Batch, ForwardFn
from lowrank.calibration.groups import read_samples, refuse_untested
from lowrank.calibration.samples import without_shared
from lowrank.calibration.untouched import borrowed, set_modes
from lowrank.compression.accounting import compression_report, layer_rows
from lowrank.compression.certificate import certificate_of, plan_digest, signed_for
from lowrank.compression.choose import allocator_of, choose, measure_given
from lowrank.compression.formats import FORMATS, compressing_formats
from lowrank.compression.latency import speed_of
from lowrank.compression.lowered import (
    geometries_of,
    lowered_for,
    plan_inside,
    plan_outside,
    put_into,
    report_outside,
)
from lowrank.compression.options import Metric, Options, budget_of
from lowrank.compression.plan import Plan
from lowrank.compression.prepare import (
    Preparation,
    fold_and_find,
    gather,
    planned,
    split_samples,
    weigh,
)
from lowrank.compression.reasons import reasons_for_dense
from lowrank.compression.rehearsal import rehearse
from lowrank.compression.report import CompressionReport
from lowrank.compression.stages import Stages
from lowrank.compression.timings import load_timings
from lowrank.compression.working_copy import WorkingCopy
from lowrank.errors import BudgetError, NumericsError, UsageError
from lowrank.integrations.methods import guard_methods
from lowrank.numerics.linalg import fallback_counts, reset_fallback_counts
from lowrank.targets import target_names
from lowrank.targets.copying import copy_model
from lowrank.targets.lowering import Like, lowered_again, raised
from lowrank.targets.model import unwrapped

__all__ = ["CompressionResult", "compress_model", "plan_model", "prepare"]

log = logging.getLogger("lowrank")


@dataclass
class CompressionResult:
    """The smaller model, the plan it was made by, and the report of what was measured.

    Attributes:
        model: ready to run; of the original's class, in its mode and on its device.
        plan: plain data; ``apply_plan(model, plan, calibration)`` makes the same model again, but for what healing moved.
        report: rows and totals, see :class:`lowrank.CompressionReport`.
        certificate: what was proved, as plain JSON: metric, budget, measured error and bound, confidence, method, samples, groups,
            digests of the data's parts, of the plan and of the model's tensors, versions, processor; :meth:`save` writes it into
            ``lowrank_config.json``, as long as the tensors are the ones that it is for.
        source: the directory whose tokenizer and processor files :meth:`save` copies; found by itself where transformers loaded the
            model from a local one.
    """

    model: nn.Module
    plan: Plan
    report: CompressionReport
    source: Path | None = None
    certificate: dict[str, Any] = field(default_factory=dict)

    def save(self, directory: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write model, plan and reports to a directory that :func:`lowrank.load_model` reads.

        Raises:
            UsageError: the directory exists, is not empty, and ``overwrite`` is off.
            StorageError: writing failed; what was there before is untouched.
        """
        checkpoint.save_compressed(
            self.model,
            Path(directory),
            plan=self.plan,
            report=self.report,
            overwrite=overwrite,
            source=self.source,
            certificate=self.certificate,
        )


def compress_model(
    model: nn.Module,
    *,
    error_budget: float | str | None = None,
    size_budget: float | str | None = None,
    metric: Metric = "auto",
    higher_is_better: bool = False,
    calibration: Iterable[Any] | None = None,
    validation: Iterable[Any] | Mapping[str, Iterable[Any]] | None = None,
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
    forward_fn: ForwardFn | None = None,
    like: Like | None = None,
    inplace: bool = False,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: bool = True,
    on_nonfinite: str = "raise",
    fold_batchnorm: bool = False,
    smallest: bool = False,
    plan: Plan | None = None,
) -> CompressionResult:
    """Make a model as small as an error budget allows, and measure that it keeps it.

    Calibration samples (indices of dimension 0) are shuffled with the seed and split three ways. *Statistics*: what flows into each
    layer, for data-aware factors, and by derivatives what an error of it costs. *Search*: whole-plan measurements that correct these
    predictions, at most 40 passes whatever the depth.
    *Verification*: touched only by a fixed sequence of plans from the safest to the smallest; the last one whose error passes a
    one-sided 95 % test against the budget is the result.

    Args:
        model: any module; it stays as it is unless ``inplace``.
        error_budget: the error allowed, in the metric's unit; 0.05 is 5 %, and so is "5%".
        size_budget: stored bytes after / before. Alone: the smallest error within it. With ``error_budget``: the promise is on both.
        metric: "output" (‖f(x)−f'(x)‖/‖f(x)‖, pooled over the samples, of every floating output by itself), "variation" (the same over
            ‖f(x)−mean f‖), "weight" (√(Σ‖ΔW‖²/Σ‖W‖²)), "kl" (nats per token), "perplexity" (relative increase), a
            callable(model) -> float, or "auto": "output" with calibration data, "weight" without.
        higher_is_better: for a callable; the budget is its allowed relative loss.
        calibration: one tensor or array (samples along dimension 0), or batches: a tensor or tuple (positional arguments), a dict
            (keyword arguments), (inputs, labels) of a ``DataLoader``, nested lists and dicts of tensors, or what the model's one argument
            takes. Only distinct samples count. The "weight" metric does not use them. Or {group: such data}: the search then aims at
            the budget in each group, and the promise holds in each where no ``validation`` is given.
        validation: batches for verification, none of them calibration samples; else a quarter of the calibration samples (of each
            group) is set aside. Or {group: batches}, such as {"news": …, "captions": …}: the budget then holds in *each* group, each
            passing its own test, and the report shows each. Groups named like those of ``calibration`` let the search see them coming.
        formats: out of "int8" … "int2", "mixed", "lowrank", "lowrank-int8", or "all"; "dense" is always a candidate.
        targets: kinds of layers to compress.
        ignore: globs over module names to leave alone.
        overrides: {glob: "dense" | format | {"format": …, "rank": …, "bits": …, "group": …}}.
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
        output_fn: picks the tensor to measure out of the model's output; else every floating tensor counts.
        forward_fn: ``forward_fn(model, batch) -> output`` calls the model with a batch of the data as it is: for models that take objects.
        like: {MyConv: nn.Conv2d}: modules of this class pad (or do anything else that needs no weight) and then are that layer, one of
            ``nn.Conv1d``, ``nn.Conv2d``, ``nn.Linear``: they then take every format, integer products too, inside their own forward.
            Checked on the first calibration batch.
        inplace: replace the layers in the model itself.
        device: move a copy there first.
        seed: of the split; same input, seed and thread count give the same bytes.
        progress: bars on standard error for what takes over 2 seconds.
        on_nonfinite: "raise", or "copy" to leave a layer with NaN or Inf as it is.
        fold_batchnorm: take each BatchNorm into the convolution before it first; see :func:`lowrank.fold_batchnorm`.
        smallest: take the smallest plan within the budget; else no step that saves under 0.5 % of the bytes for a tenth of the budget.
        plan: apply this one instead of searching; its error is measured all the same, and tested where a budget is given.

    Raises:
        UsageError: an argument that means nothing, a pattern that matches nothing, no layer to compress.
        CalibrationError: data that cannot be used.
        NumericsError: NaN or Inf in weights or activations.
        BudgetError: the budget cannot be met; carries the best plan and the error it reaches.
        NotImplementedError: a format, or an option, of a later version.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> result = compress_model(model, error_budget=0.05, calibration=[torch.randn(256, 64)], progress=False)
        >>> result.report.totals["error_upper"] <= 0.05, result.report.totals["size_ratio"] < 0.3
        (True, True)
    """
    options = Options(
        error_budget=budget_of(error_budget, "error_budget"),
        size_budget=budget_of(size_budget, "size_budget"),
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
        forward_fn=forward_fn,
        seed=seed,
        progress=progress,
        on_nonfinite=on_nonfinite,
        smallest=smallest,
        fold_batchnorm=fold_batchnorm or (plan is not None and bool(plan.metadata.get("fold_batchnorm"))),
    ).checked(calibrated=calibration is not None, planned=plan is not None)
    if plan is not None:
        options = planned(options, plan.metadata)
    original = _on_device(unwrapped(model), device)
    geometries = {} if plan is None else geometries_of(plan)
    if geometries and options.fold_batchnorm:
        raise UsageError("fold_batchnorm: a plan with like has no place for it; make the plan without one of the two")
    with borrowed(original) as modes:
        working = original
        if like and plan is not None and not geometries:
            raise UsageError(
                "like: the plan was made without it, for other layers; leave like out, or make the plan with it"
            )
        if like and plan is None:
            calibration, options, working, geometries = lowered_for(original, like, calibration, options)
        elif geometries:
            assert plan is not None
            working, plan = lowered_again(original, geometries), plan_inside(plan, geometries)
        # What is inside a forward is put into the caller's model at the end.
        within = inplace and not geometries
        result, copied, healed, batch = _compressed(working, calibration, validation, options, plan, inplace=within)
        if geometries:
            result.model, result.plan = raised(result.model), plan_outside(result.plan, geometries)
            report_outside(result.report, geometries, original)
            result.certificate["plan"] = plan_digest(result.plan)
        if within:
            # The model shares its weights with the one that is in evaluation mode.
            rehearse(result.model, copied.reference, batch, None)
    if not within:
        # By now the original has lost what runs left on it, as what somebody loads into never had it.
        rehearse(result.model, original if geometries else copied.reference, batch, modes)
    if inplace and geometries:
        result.model = put_into(original, result.model, healed=healed is not None)
    elif inplace:
        # Only now: until here whatever was done to the caller's model is taken back.
        result.model = copied.write_back(healed)
    set_modes(result.model, modes)
    guard_methods(result.model)
    result.certificate = signed_for(result.certificate, result.model)
    return result


def _compressed(
    original: nn.Module,
    calibration: Iterable[Any] | None,
    validation: Iterable[Any] | None,
    options: Options,
    plan: Plan | None,
    *,
    inplace: bool,
) -> tuple[CompressionResult, WorkingCopy, nn.Module | None, Batch | None]:
    """The result, the copy that it was made in, the healed model if it is one, and a batch to run them on."""
    stages = Stages()
    with stages.stage("prepare"):
        prepared, verification = prepare(original, calibration, validation, options, probing=plan is None)
    with stages.stage("search"):
        outcome = (
            choose(prepared, verification, options)
            if plan is None
            else measure_given(prepared, plan, verification, options)
        )
    with stages.stage("report"):
        healed = None if outcome.chosen.healed is None else outcome.chosen.healed.model
        if healed is not None:
            finished = healed
        else:
            finished = prepared.copy.release() if not inplace else prepared.copy.model
        why = reasons_for_dense(prepared.choices, outcome.chosen.plan, outcome.calibration, options)
        rows = layer_rows(prepared.survey, finished, prepared.copy.layers, why)
        notes = [*prepared.notes, *prepared.fitted_notes(outcome.chosen.plan)]
        report = compression_report(rows, outcome, options, notes, prepared.warnings)
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
    batches = [] if prepared.split is None else [*verification, *prepared.split.search, *prepared.split.statistics]
    certificate = certificate_of(report.totals, options, outcome.chosen.plan, prepared.split)
    result = CompressionResult(finished, outcome.chosen.plan, report, _local_source(original), certificate)
    return result, prepared.copy, healed, next(iter(batches), None)


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
    original = unwrapped(model)
    with borrowed(original):
        prepared, _ = prepare(original, calibration, validation, checked, probing=True)
        return allocator_of(prepared, checked).plan(checked.contribution(checked.error_budget))


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
    checkpoint.require_storable(model)
    working, found, notes = fold_and_find(model, options)
    latency = probing and options.objective == "latency"
    # The "weight" metric needs no samples: its optimum is the plain SVD.
    blind = options.error_metric.weights_only
    called: dict[str, Any] = {"output_fn": options.output_fn, "forward_fn": options.forward_fn}
    batches = read_samples(model, calibration, **called) if calibration is not None and (latency or not blind) else None
    calls = batches
    if blind:
        refuse_untested(options.error_metric, validation)
        batches = validation = None
    checks = read_samples(model, validation, "validation", **called) if validation is not None else None
    if checks is not None and batches is not None:
        checks = without_shared(checks, batches)
    refuse_untested(options.error_metric, validation, [*(batches or ()), *(checks or ())])
    warnings = [text for read in (batches, checks) if read is not None for text in read.warnings]
    notes += [*warnings, *(text for read in (batches, checks) if read is not None for text in read.notes)]
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
    prepared.notes, prepared.warnings = notes + prepared.notes, warnings
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
    return model if current == wanted else copy_model(model).to(wanted)
