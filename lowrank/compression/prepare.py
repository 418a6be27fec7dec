"""Before anything is chosen: which layers, what flows into them, and what each format would cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.calibration.batches import Batch, Split, sample_count, split_batches
from lowrank.calibration.evaluation import Evaluator
from lowrank.calibration.gradients import DIRECTIONS, output_gradients
from lowrank.calibration.inputs import collect_statistics
from lowrank.calibration.metrics import SampledMetric
from lowrank.compression.candidates import LayerChoices
from lowrank.compression.latency import Speed
from lowrank.compression.options import Options
from lowrank.compression.overrides import forced_choices
from lowrank.compression.probes import Sensitivity, exact_sensitivities, layer_choices, probe_layers
from lowrank.compression.working_copy import Bench
from lowrank.compression.workshop import Workshop
from lowrank.compression.workshops import open_workshop
from lowrank.errors import CheckpointError, NumericsError, UsageError
from lowrank.numerics.linalg import check_finite
from lowrank.numerics.moments import InputStatistics, TokenCounts
from lowrank.targets.batchnorm import fold_sharing
from lowrank.targets.packed import packed_kind
from lowrank.targets.survey import Skipped, Survey, Target, module_matrix, refuse_adapters, survey

__all__ = [
    "Job",
    "find_work",
    "fold_and_find",
    "gather",
    "planned",
    "split_again",
    "split_samples",
    "weigh",
]

# Samples on which single layers are probed. More would not change which layers are the sensitive ones, and the whole plan is measured
# on all search samples anyway.
PROBE_SAMPLES = 32
PROBE_BATCHES = 4
MAX_ROWS_IN_NOTE = 6
# The gradients' moment is outputs × outputs in float64: 128 MB a layer at this width, and its roots twice that again.
MAX_GRADIENT_OUTPUTS = 4096


@dataclass
class Job:
    """What the choice is made from."""

    bench: Bench
    survey: Survey
    split: Split | None
    layers: list[LayerChoices]
    notes: list[str] = field(default_factory=list)
    speed: Speed | None = None

    @property
    def loss_aware(self) -> bool:
        """Whether the factors of any layer are fitted to what its errors cost the model."""
        return any(shop.gradients is not None for shop in self.bench.workshops.values())

    def metadata(self, options: Options) -> dict[str, Any]:
        """What applying a plan again needs to know."""
        return {
            "data_aware": self.split is not None and not options.error_metric.weights_only,
            "metric": options.error_metric.name,
            "seed": options.seed,
            "split": 0 if self.split is None else self.split.ways,
            **({"loss_aware": options.directions} if self.loss_aware else {}),
            **({"output_fn": options.output_fn_name} if self.loss_aware and options.output_fn else {}),
            **({"fold_batchnorm": True} if options.fold_batchnorm else {}),
            **({"objective": "latency", "timings": self.speed.table.name} if self.speed is not None else {}),
        }


def planned(options: Options, metadata: Mapping[str, Any]) -> Options:
    """The options with what a plan says of how its factors were fitted.

    Raises:
        CheckpointError: the plan asks for gradients of an unknown kind.
        UsageError: they are of a tensor that ``output_fn`` picked, and none is given.
    """
    wanted = metadata.get("loss_aware")
    if wanted not in (None, *DIRECTIONS):
        raise CheckpointError(
            f"plan: metadata: loss_aware must be one of {', '.join(DIRECTIONS)}, got {wanted!r}; written by a newer lowrank?"
        )
    if wanted is not None and metadata.get("output_fn") is not None and options.output_fn is None:
        raise UsageError(
            f"plan: its factors were fitted to what output_fn={metadata['output_fn']} picks; pass the same output_fn"
        )
    return replace(options, directions=wanted, loss_aware=wanted is not None)


def find_work(model: nn.Module, options: Options) -> Survey:
    """The targets, with weights that are not finite refused or set aside.

    Raises:
        UsageError: nothing to compress.
        NumericsError: NaN or Inf in a target.
    """
    found = survey(model, targets=options.targets, ignore=options.ignore)
    sound: list[Target] = []
    skipped = list(found.skipped)
    for target in found.targets:
        try:
            for member in target.members:
                for kind, tensor in member.module.named_parameters():
                    check_finite(tensor.detach(), f"layer {member.name}, {kind}")
        except NumericsError as error:
            if options.on_nonfinite == "raise":
                raise NumericsError(f'{error}; on_nonfinite="copy" leaves such a layer as it is') from error
            skipped += [Skipped(member, f"left as it is: {error}") for member in target.members]
        else:
            sound.append(target)
    if not sound:
        reasons = sorted({f"{item.member.name} ({item.reason})" for item in skipped})[:MAX_ROWS_IN_NOTE]
        held = "; ".join(reasons) or "none at all"
        raise UsageError(
            "model: has no layer that can be compressed (nn.Linear, transformers' Conv1D, nn.Conv1d, nn.Conv2d, nn.Embedding, recurrent "
            f"layers, nn.MultiheadAttention); modules with weights: {held}"
        )
    return Survey(tuple(sound), tuple(skipped), found.members)


def fold_and_find(model: nn.Module, options: Options) -> tuple[nn.Module, Survey, list[str]]:
    """The model to work on (the original, or a copy with BatchNorm folded), its targets beside the original's modules, and a note.

    Raises:
        UsageError: nothing to compress, or the model cannot be traced.
    """
    refuse_adapters(model, "compression would take for layers")
    if not options.fold_batchnorm:
        return model, find_work(model, options), []
    folded, pairs = fold_sharing(model)
    found = find_work(folded, options)
    members = survey(model).members
    by_name = {member.name: member for member in members}
    gone = [Skipped(by_name[norm], f"folded into {conv}") for conv, norm in pairs]
    left = [member.name for member in found.members if isinstance(member.module, nn.modules.batchnorm._BatchNorm)]
    notes = [f"BatchNorm: {len(pairs)} folded into the convolution before it"]
    if left:
        notes[0] += f"; {_named(left)} stay: what comes before is not one convolution that goes nowhere else"
    return folded, Survey(found.targets, (*found.skipped, *gone), members), notes


def split_samples(
    batches: Sequence[Batch] | None, validation: Sequence[Batch] | None, options: Options
) -> Split | None:
    """Statistics, search and verification parts; only what is measured on samples needs some to verify on."""
    if batches is None:
        return None
    return split_batches(batches, validation, options.seed, verify=isinstance(options.error_metric, SampledMetric))


def split_again(batches: Sequence[Batch], metadata: Mapping[str, Any]) -> Split:
    """The split that a plan's factors were fitted on; all samples where the plan does not say."""
    ways = metadata.get("split")
    if ways not in (2, 3):
        return Split(list(batches), [], [])
    return split_batches(batches, None, int(metadata.get("seed", 0)), verify=ways == 3)


def gather(
    model: nn.Module, found: Survey, split: Split | None, options: Options, *, factored: bool
) -> tuple[list[Workshop], list[str]]:
    """A workshop for every target, with the statistics of what flows into it and what an error of it costs; and notes.

    Args:
        factored: low-rank formats may be built; else nothing needs the gradients.

    Raises:
        UsageError: ``loss_aware=True``, or a plan made so, and the model cannot be differentiated.
    """
    statistics: Mapping[str, InputStatistics | TokenCounts] = {}
    data_aware = split is not None and not options.error_metric.weights_only
    if split is not None and data_aware:
        modules = {
            member.name: member.module
            for target in found.targets
            for member in target.members
            if packed_kind(member.module) is None
        }
        statistics = collect_statistics(model, split.statistics, modules, progress=options.progress, seed=options.seed)
    gradients: Mapping[str, Tensor] = {}
    notes: list[str] = []
    if split is not None and data_aware and factored and options.directions is not None:
        gradients, notes = _gradients(model, found, split, options)
    shops = []
    for target in found.targets:
        costs = [gradients[member.name] for member in target.members if member.name in gradients]
        gathered = [statistics[member.name] for member in target.members if member.name in statistics]
        inputs = next((item for item in gathered if isinstance(item, InputStatistics)), None)
        lookups = next((item for item in gathered if isinstance(item, TokenCounts)), None)
        shops.append(
            open_workshop(target, inputs, lookups, data_aware=data_aware, gradients=costs[0] if costs else None)
        )
    return shops, notes


def _gradients(
    model: nn.Module, found: Survey, split: Split, options: Options
) -> tuple[Mapping[str, Tensor], list[str]]:
    """C of every linear layer and convolution, and what the report should say of it."""
    assert options.directions is not None
    modules = {
        member.name: member.module
        for target in found.targets
        for member in target.members
        if target.kind in ("linear", "conv") and not isinstance(member.module, nn.Embedding)
    }
    wide = [name for name, module in modules.items() if _outputs(module) > MAX_GRADIENT_OUTPUTS]
    modules = {name: module for name, module in modules.items() if name not in wide}
    try:
        gradients = output_gradients(
            model,
            split.statistics,
            modules,
            directions=options.directions,
            output_fn=options.output_fn,
            seed=options.seed,
        )
    except RuntimeError as error:
        reason = f"the model cannot be differentiated ({str(error).splitlines()[0]})"
        if options.loss_aware != "auto":
            raise UsageError(f'loss_aware: {reason}; pass loss_aware="auto" or False') from error
        return {}, [f"factors are fitted to the layers' inputs alone: {reason}"]
    sound = {
        name: moment
        for name, moment in gradients.items()
        if bool(torch.isfinite(moment).all()) and float(moment.diagonal().sum()) > 0.0
    }
    notes = []
    if sound:
        notes.append(f"low-rank factors of {len(sound)} layers are those whose error costs the output least")
    elif modules and options.loss_aware is True:
        raise UsageError("loss_aware=True: no gradient of the output reaches any layer; is it detached?")
    if wide:
        notes.append(
            f"{_named(wide)}: over {MAX_GRADIENT_OUTPUTS:,} outputs, so its factors are fitted to its inputs alone"
        )
    return sound, notes


def _outputs(module: nn.Module) -> int:
    """Of a linear layer (transformers' ``Conv1D`` too, which stores its weight the other way) or a convolution."""
    return int(module_matrix(module).shape[0])


def weigh(bench: Bench, found: Survey, split: Split | None, options: Options) -> Job:
    """Predict what every choice costs the model, by probes on the search samples or, for the weight metric, by arithmetic."""
    shops = list(bench.workshops.values())
    forced = forced_choices(options.overrides, bench.workshops)
    exact = split is None or options.error_metric.weights_only
    if split is None or exact:
        sensitivities = exact_sensitivities(shops)
        activations = "int8" if options.activations == "auto" else options.activations
    else:
        samples = _spread(split.search, PROBE_SAMPLES)
        evaluator = Evaluator(bench.reference, samples, options.error_metric.probe, options.output_fn)
        sensitivities = probe_layers(
            bench,
            shops,
            evaluator,
            options.formats,
            options.activations,
            allowed=options.contribution(options.error_budget),
            progress=options.progress,
        )
        activations = options.activations
    layers = [
        layer_choices(shop, sensitivities[shop.name], options.formats, activations, forced=forced.get(shop.name))
        for shop in shops
    ]
    skipped = list(found.skipped)
    for shop in shops:
        refused = sensitivities[shop.name].refused
        if refused is not None:
            skipped += [Skipped(member, refused) for member in shop.target.members]
    notes = _notes(shops, sensitivities, split, exact=exact)
    return Job(bench, Survey(found.targets, tuple(skipped), found.members), split, layers, notes)


def _spread(batches: Sequence[Batch], samples: int) -> list[Batch]:
    """About this many samples, out of a few batches from all over the list, which may be sorted by length."""
    count = min(PROBE_BATCHES, len(batches))
    picked = [batches[(2 * index + 1) * len(batches) // (2 * count)] for index in range(count)]
    if sample_count(picked) < samples:
        # Batches of few samples: take as many as it needs.
        average = sample_count(batches) / len(batches)
        count = min(len(batches), int(samples / average) + 1)
        picked = [batches[(2 * index + 1) * len(batches) // (2 * count)] for index in range(count)]
    share = -(-samples // count)
    return [batch if batch.size <= share else batch.select(torch.arange(share)) for batch in picked]


def _notes(
    shops: Sequence[Workshop], sensitivities: Mapping[str, Sensitivity], split: Split | None, *, exact: bool
) -> list[str]:
    notes: list[str] = []
    if split is not None:
        tokens = max((shop.inputs.count for shop in shops if shop.inputs is not None), default=0)
        notes.append(
            f"calibration: {sample_count(split.statistics)} samples for statistics ({tokens:,} tokens), "
            f"{sample_count(split.search)} for the search, {sample_count(split.verification)} for verification"
        )
        drawn = [shop.inputs for shop in shops if shop.inputs is not None and shop.inputs.offered > shop.inputs.count]
        if drawn:
            notes.append(
                f"statistics of {len(drawn)} convolutions from patches drawn at random: at most "
                f"{max(inputs.count for inputs in drawn):,} of {max(inputs.offered for inputs in drawn):,} in one layer"
            )
        few = [shop.name for shop in shops if shop.inputs is not None and shop.inputs.count < shop.columns]
        if few:
            notes.append(f"fewer tokens than input channels in {_named(few)}: their statistics are thin")
    if exact:
        return notes
    silent = [shop.name for shop in shops if sensitivities[shop.name].silent and shop.reached]
    if silent:
        notes.append(f"the metric does not depend on {_named(silent)}: not taken below int8")
    unreached = [shop.name for shop in shops if not shop.reached]
    if unreached:
        notes.append(f"no calibration input reached {_named(unreached)}: rounded without data, not taken below int8")
    for shop in shops:
        if shop.unseen_rows:
            notes.append(
                f"{shop.name}: {shop.unseen_rows:,} of {shop.rows:,} rows were never looked up on the calibration data: "
                "not taken below int8"
            )
    return notes


def _named(names: Sequence[str]) -> str:
    listed = ", ".join(names[:MAX_ROWS_IN_NOTE])
    return listed if len(names) <= MAX_ROWS_IN_NOTE else f"{listed} and {len(names) - MAX_ROWS_IN_NOTE} more"
