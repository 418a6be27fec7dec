"""Before anything is chosen: which layers, what flows into them, and what each format would cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.calibration.batches import Batch, Split, sample_count, split_batches
from lowrank.calibration.evaluation import Evaluator
from lowrank.calibration.experts import ExpertInputs, collect_expert_inputs
from lowrank.calibration.gradients import DIRECTIONS, output_gradients
from lowrank.calibration.inputs import collect_statistics
from lowrank.calibration.metrics import SampledMetric
from lowrank.calibration.observers import AnyObserver
from lowrank.compression.candidates import LayerChoices
from lowrank.compression.formats import FORMATS, REFERENCE, Measured, Request
from lowrank.compression.latency import Speed
from lowrank.compression.layer_data import LayerData
from lowrank.compression.options import Options
from lowrank.compression.overrides import forced_specs
from lowrank.compression.passes import Passes
from lowrank.compression.plan import Plan
from lowrank.compression.probes import Prober, computed_costs, layer_choices
from lowrank.compression.stacks import few_tokens
from lowrank.compression.working_copy import WorkingCopy
from lowrank.errors import CheckpointError, NumericsError, UsageError
from lowrank.layers.base import INTEGER_ACTIVATIONS
from lowrank.numerics.linalg import check_finite
from lowrank.numerics.moments import InputStatistics, TokenCounts
from lowrank.reporting.text import counted
from lowrank.targets import kind_of, layer_kinds
from lowrank.targets.batchnorm import fold_sharing
from lowrank.targets.copying import sharing_copy
from lowrank.targets.model import refuse_adapters
from lowrank.targets.survey import Member, Skipped, Survey, Target, survey

__all__ = [
    "Preparation",
    "find_work",
    "fold_and_find",
    "gather",
    "planned",
    "split_again",
    "split_samples",
    "weigh",
]

# Samples on which predictions are made: measured, and by derivatives, whose random directions want more. More would not change which
# layers are the sensitive ones, and whole plans are measured on all search samples anyway.
PROBE_SAMPLES = 32
DERIVATIVE_SAMPLES = 64
PROBE_BATCHES = 4
MAX_ROWS_IN_NOTE = 6
# The gradients' moment is outputs × outputs in float64: 128 MB a layer at this width, and its roots twice that again.
MAX_GRADIENT_OUTPUTS = 4096


@dataclass
class Preparation:
    """What the choice is made from: the targets, what is known of them, and every candidate with its predicted cost."""

    copy: WorkingCopy
    survey: Survey
    split: Split | None
    choices: list[LayerChoices]
    notes: list[str] = field(default_factory=list)
    speed: Speed | None = None
    warnings: list[str] = field(default_factory=list)
    passes: Passes = field(default_factory=Passes)

    @property
    def refused(self) -> dict[str, str]:
        """Why targets cannot be replaced, by name."""
        skipped = {item.member.name: item.reason for item in self.survey.skipped}
        return {name: skipped[name] for name in self.copy.layers if name in skipped}

    @property
    def loss_aware(self) -> bool:
        """Whether the factors of any layer are fitted to what its errors cost the model."""
        return any(data.gradients is not None for data in self.copy.layers.values())

    def fitted_notes(self, plan: Plan) -> list[str]:
        """Say of how many layers that the plan factors the factors are fitted to the model's gradients."""
        factored = [entry.name for entry in plan.entries if entry.rank is not None]
        count = sum(self.copy.layers[name].gradients is not None for name in factored)
        if not count:
            return []
        return [
            f"low-rank factors of {counted(count, 'layer')}: those whose error costs the output least, by its gradients"
        ]

    def metadata(self, options: Options) -> dict[str, Any]:
        """Say what applying a plan again needs to know."""
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
    """Give the options with what a plan says of how its factors were fitted.

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
    """Find the targets, with weights that are not finite refused or set aside.

    Raises:
        UsageError: nothing to compress.
        NumericsError: NaN or Inf in a target.
    """
    found = survey(model, targets=options.targets, ignore=options.ignore)
    sound: list[Target] = []
    skipped = list(found.skipped)
    for target in found.targets:
        if not any(format.builds(target) for format in FORMATS.values() if not format.dense):
            reason = f"left as it is: no format builds {target.kind.described}"
            skipped += [Skipped(member, reason) for member in target.members]
            continue
        try:
            for member in target.members:
                for name, tensor in member.module.named_parameters():
                    check_finite(tensor.detach(), f"layer {member.name}, {name}")
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
            f"model: has no layer that can be compressed ({', '.join(kind.described for kind in layer_kinds())}); "
            f"modules with weights: {held}"
        )
    return Survey(tuple(sound), tuple(skipped), found.members)


def fold_and_find(model: nn.Module, options: Options) -> tuple[nn.Module, Survey, list[str]]:
    """Give the model to work on (the original, or a copy with BatchNorm folded), its targets beside the original's modules, and a note.

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
    """Split into statistics, search and verification parts; only what is measured on samples needs some to verify on."""
    if batches is None:
        return None
    return split_batches(batches, validation, options.seed, verify=isinstance(options.error_metric, SampledMetric))


def split_again(batches: Sequence[Batch], metadata: Mapping[str, Any]) -> Split:
    """Split as the samples were that a plan's factors were fitted on; all are statistics where the plan does not say."""
    ways = metadata.get("split")
    if ways not in (2, 3):
        return Split(list(batches), [], [])
    return split_batches(batches, None, int(metadata.get("seed", 0)), verify=ways == 3)


def gather(
    model: nn.Module, found: Survey, split: Split | None, options: Options, *, factored: bool
) -> tuple[list[LayerData], list[str]]:
    """Gather what flows into every target and what an error of it costs; and notes.

    Args:
        factored: low-rank formats may be built; else nothing needs the gradients.

    Raises:
        UsageError: ``loss_aware=True``, or a plan made so, and the model cannot be differentiated.
    """
    statistics: Mapping[str, InputStatistics | TokenCounts] = {}
    data_aware = split is not None and not options.error_metric.weights_only
    if split is not None and data_aware:
        modules, observers = _observed(member for target in found.targets for member in target.members)
        statistics = collect_statistics(
            model, split.statistics, modules, observers=observers, progress=options.progress, seed=options.seed
        )
    experts: Mapping[str, ExpertInputs] = {}
    stacked = {target.name: target.kind.weights(target.owner) for target in found.targets if target.kind.stacked}
    if split is not None and data_aware and stacked:
        experts = collect_expert_inputs(model, split.statistics, stacked, seed=options.seed)
    gradients: Mapping[str, Tensor] = {}
    notes: list[str] = []
    if split is not None and data_aware and factored and options.directions is not None:
        gradients, notes = _gradients(model, found, split, options)
    layers = []
    for target in found.targets:
        costs = [gradients[member.name] for member in target.members if member.name in gradients]
        gathered = [statistics[member.name] for member in target.members if member.name in statistics]
        inputs = next((item for item in gathered if isinstance(item, InputStatistics)), None)
        lookups = next((item for item in gathered if isinstance(item, TokenCounts)), None)
        costs_here = costs[0] if costs else None
        known = experts.get(target.name)
        layers.append(LayerData(target, inputs, lookups, data_aware=data_aware, gradients=costs_here, experts=known))
        if known is not None:
            notes += few_tokens(target.name, stacked[target.name], known)
    return layers, notes


def _gradients(
    model: nn.Module, found: Survey, split: Split, options: Options
) -> tuple[Mapping[str, Tensor], list[str]]:
    """C of every linear layer and convolution, and what the report should say of it."""
    assert options.directions is not None
    members = [member for target in found.targets if target.kind.differentiated for member in target.multiplying]
    wide = [member.name for member in members if _outputs(member.module) > MAX_GRADIENT_OUTPUTS]
    modules, observers = _observed(member for member in members if member.name not in wide)
    try:
        # In a copy, since modules that keep an activation would keep its graph.
        scratch = sharing_copy(model)
        gradients = output_gradients(
            scratch,
            split.statistics,
            {name: scratch.get_submodule(name) for name in modules},
            directions=options.directions,
            output_fn=options.output_fn,
            observers=observers,
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
    if not sound and modules and options.loss_aware is True:
        raise UsageError("loss_aware=True: no gradient of the output reaches any layer; is it detached?")
    if wide:
        notes.append(
            f"{_named(wide)}: over {MAX_GRADIENT_OUTPUTS:,} outputs, so its factors are fitted to its inputs alone"
        )
    return sound, notes


def _observed(members: Iterable[Member]) -> tuple[dict[str, nn.Module], dict[str, AnyObserver]]:
    """The modules of which something can be gathered, and what says which rows they work on; by name."""
    modules: dict[str, nn.Module] = {}
    observers: dict[str, AnyObserver] = {}
    for member in members:
        kind = kind_of(member.module)
        observer = None if kind is None else kind.observer(member.module)
        if observer is not None:
            modules[member.name], observers[member.name] = member.module, observer
    return modules, observers


def _outputs(module: nn.Module) -> int:
    """Of a linear layer (transformers' ``Conv1D`` too, which stores its weight the other way) or a convolution."""
    kind = kind_of(module)
    assert kind is not None
    return kind.shape(module)[0]


def weigh(copy: WorkingCopy, found: Survey, split: Split | None, options: Options) -> Preparation:
    """Predict what every choice costs the model, by probes on the search samples or, for the weight metric, by arithmetic."""
    layers = list(copy.layers.values())
    forced = forced_specs(options.overrides, copy.layers)
    activations = options.activations
    computed = split is None or options.error_metric.weights_only
    passes, notes = Passes(), []
    if split is None or computed:
        costs = computed_costs(layers)
        activations = INTEGER_ACTIVATIONS if activations == "auto" else activations
    else:
        samples = _spread(split.search, PROBE_SAMPLES)
        evaluator = Evaluator(copy.reference, samples, options.error_metric.probe, options.output_fn)
        prober = Prober(
            copy,
            evaluator,
            _spread(split.statistics, DERIVATIVE_SAMPLES),
            options.formats,
            Request(activations),
            options.contribution(options.error_budget),
            output_fn=options.output_fn,
            seed=options.seed,
            progress=options.progress,
            passes=passes,
        )
        costs, notes = prober.run(), prober.notes
    choices = [
        layer_choices(data, costs[data.name], options.formats, activations, forced=forced.get(data.name))
        for data in layers
    ]
    skipped = list(found.skipped)
    for data in layers:
        refused = costs[data.name].refused
        if refused is not None:
            skipped += [Skipped(member, refused) for member in data.target.members]
    notes = _notes(layers, None if computed else costs, split) + notes
    return Preparation(copy, Survey(found.targets, tuple(skipped), found.members), split, choices, notes, passes=passes)


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


def _notes(layers: Sequence[LayerData], costs: Mapping[str, Measured] | None, split: Split | None) -> list[str]:
    """What the reader should know of the data.

    Args:
        costs: as they were measured; ``None`` where they were computed.
    """
    notes: list[str] = []
    observed = [(data, data.inputs) for data in layers if data.inputs is not None]
    if split is not None:
        tokens = max((inputs.count for _, inputs in observed), default=0)
        notes.append(
            f"calibration: {sample_count(split.statistics)} samples for statistics ({tokens:,} tokens), "
            f"{sample_count(split.search)} for the search, {sample_count(split.verification)} for verification"
        )
        drawn = [inputs for _, inputs in observed if inputs.offered > inputs.count]
        if drawn:
            notes.append(
                f"statistics of {len(drawn)} layers from patches or tokens drawn at random: at most "
                f"{max(inputs.count for inputs in drawn):,} of {max(inputs.offered for inputs in drawn):,} in one layer"
            )
        few = [data.name for data, inputs in observed if inputs.is_thin(data.rows)]
        if few:
            notes.append(f"fewer tokens than input channels in {_named(few)}: their statistics are thin")
    if costs is None:
        return notes
    silent = [data.name for data in layers if costs[data.name].silent and data.reached]
    if silent:
        notes.append(f"the metric does not depend on {_named(silent)}: not taken below {REFERENCE.name}")
    unreached = [data.name for data in layers if not data.reached]
    if unreached:
        notes.append(f"no calibration input reached {_named(unreached)}: rounded without data, taken in no low rank")
    for data in layers:
        if data.unseen_rows:
            notes.append(
                f"{data.name}: {data.unseen_rows:,} of {data.rows:,} rows were never looked up on the calibration data: rounded like "
                "the others, taken in no low rank"
            )
    return notes


def _named(names: Sequence[str]) -> str:
    listed = ", ".join(names[:MAX_ROWS_IN_NOTE])
    return listed if len(names) <= MAX_ROWS_IN_NOTE else f"{listed} and {len(names) - MAX_ROWS_IN_NOTE} more"
