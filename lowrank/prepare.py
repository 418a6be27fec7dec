"""Before anything is chosen: which layers, what flows into them, and what each format would cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lowrank.batches import Batch, Split, sample_count, split_batches
from lowrank.batchnorm import fold_sharing
from lowrank.bench import Bench
from lowrank.calibration import collect_statistics
from lowrank.errors import NumericsError, UsageError
from lowrank.evaluation import Evaluator
from lowrank.factors import check_rank
from lowrank.latency import Speed
from lowrank.linalg import check_finite
from lowrank.modules import Skipped, Survey, Target, matching, survey
from lowrank.options import Options, check_format
from lowrank.packed import packed_kind
from lowrank.planner import LayerChoices
from lowrank.probes import Sensitivity, exact_sensitivities, layer_choices, probe_layers
from lowrank.statistics import InputStatistics, TokenCounts
from lowrank.workshop import Choice, Workshop
from lowrank.workshops import open_workshop

__all__ = ["Job", "find_work", "fold_and_find", "forced_choices", "gather", "split_again", "split_samples", "weigh"]

# Samples on which single layers are probed. More would not change which layers are the sensitive ones, and the whole plan is measured
# on all search samples anyway.
PROBE_SAMPLES = 32
PROBE_BATCHES = 4
MAX_ROWS_IN_NOTE = 6


@dataclass
class Job:
    """What the choice is made from."""

    bench: Bench
    survey: Survey
    split: Split | None
    layers: list[LayerChoices]
    notes: list[str] = field(default_factory=list)
    speed: Speed | None = None

    def metadata(self, options: Options) -> dict[str, Any]:
        """What applying a plan again needs to know."""
        return {
            "data_aware": self.split is not None and options.metric != "weight",
            "metric": options.metric if isinstance(options.metric, str) else "callable",
            "seed": options.seed,
            "split": 0 if self.split is None else self.split.ways,
            **({"fold_batchnorm": True} if options.fold_batchnorm else {}),
            **({"objective": "latency", "timings": self.speed.table.name} if self.speed is not None else {}),
        }


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
    """Statistics, search and verification parts; a callable metric needs no verification samples."""
    if batches is None:
        return None
    return split_batches(batches, validation, options.seed, verify=not callable(options.metric))


def split_again(batches: Sequence[Batch], metadata: Mapping[str, Any]) -> Split:
    """The split that a plan's factors were fitted on; all samples where the plan does not say."""
    ways = metadata.get("split")
    if ways not in (2, 3):
        return Split(list(batches), [], [])
    return split_batches(batches, None, int(metadata.get("seed", 0)), verify=ways == 3)


def gather(model: nn.Module, found: Survey, split: Split | None, options: Options) -> list[Workshop]:
    """A workshop for every target, with the statistics of what flows into it."""
    statistics: Mapping[str, InputStatistics | TokenCounts] = {}
    data_aware = split is not None and options.metric != "weight"
    if split is not None and data_aware:
        modules = {
            member.name: member.module
            for target in found.targets
            for member in target.members
            if packed_kind(member.module) is None
        }
        statistics = collect_statistics(model, split.statistics, modules, progress=options.progress, seed=options.seed)
    shops = []
    for target in found.targets:
        gathered = [statistics[member.name] for member in target.members if member.name in statistics]
        inputs = next((item for item in gathered if isinstance(item, InputStatistics)), None)
        lookups = next((item for item in gathered if isinstance(item, TokenCounts)), None)
        shops.append(open_workshop(target, inputs, lookups, data_aware=data_aware))
    return shops


def weigh(bench: Bench, found: Survey, split: Split | None, options: Options) -> Job:
    """Predict what every choice costs the model, by probes on the search samples or, for the weight metric, by arithmetic."""
    shops = list(bench.workshops.values())
    forced = forced_choices(options.overrides, bench.workshops)
    if split is None or options.metric == "weight":
        sensitivities = exact_sensitivities(shops)
        activations = "int8" if options.activations == "auto" else options.activations
    else:
        metric = {"kl": "kl", "perplexity": "kl"}.get(str(options.metric), "output")
        evaluator = Evaluator(bench.reference, _spread(split.search, PROBE_SAMPLES), metric, options.output_fn)
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
    notes = _notes(shops, sensitivities, split, exact=split is None or options.metric == "weight")
    return Job(bench, Survey(found.targets, tuple(skipped), found.members), split, layers, notes)


def forced_choices(overrides: Mapping[str, Any] | None, workshops: Mapping[str, Workshop]) -> dict[str, list[Choice]]:
    """The only choices of the layers that ``overrides`` names.

    Raises:
        UsageError: a pattern that matches no target, an unknown key or format, a layer that would not get smaller.
        RankError: a rank outside the layer's range.
    """
    found: dict[str, list[Choice]] = {}
    if not overrides:
        return found
    aliases = {
        member_name: shop
        for shop in workshops.values()
        for member in shop.target.members
        for member_name in member.names
    }
    covered = matching(list(overrides), aliases, "overrides")
    for pattern, value in overrides.items():
        for name in sorted(covered[pattern]):
            shop = aliases[name]
            found[shop.name] = _forced(shop, value, f"overrides: {pattern!r}, layer {name}")
    return found


def _forced(shop: Workshop, value: Any, where: str) -> list[Choice]:
    wanted: Any = {"format": value} if isinstance(value, str) else value
    known = {"format", "rank", "bits", "activations", "scheme"}
    if not isinstance(wanted, Mapping) or not set(wanted) <= known or "format" not in wanted:
        raise UsageError(
            f'{where}: must be a format or a dict with "format" and maybe "rank", "bits", "activations", "scheme", got {value!r}'
        )
    name = wanted["format"]
    check_format(name, where)
    if name == "dense":
        return [Choice("dense")]
    if name not in shop.formats:
        raise UsageError(
            f"{where}: this {shop.target.kind} layer can be dense or {', '.join(shop.formats)}, got {name!r}"
        )
    factored, rounded = "lowrank" in name, "int8" in name
    rank, bits, scheme = wanted.get("rank"), wanted.get("bits"), wanted.get("scheme")
    if scheme is not None and (not factored or scheme not in shop.schemes):
        possible = [each for each in shop.schemes if each is not None] if factored else []
        raise UsageError(
            f"{where}: scheme of format {name!r} must be {' or '.join(possible) or 'left out'}, got {scheme!r}"
        )
    schemes = shop.schemes if scheme is None else (scheme,)
    if rank is not None:
        if not factored:
            raise UsageError(f"{where}: format {name!r} has no rank, got {rank!r}")
        check_rank(rank, max(map(shop.max_rank, schemes)), f"{where}, rank")
        schemes = tuple(each for each in schemes if rank <= shop.max_rank(each))
    if bits is not None and (not rounded or isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8):
        raise UsageError(
            f"{where}: bits must be an integer from 2 to 8, for the formats int8 and lowrank-int8, got {bits!r}"
        )
    modes: list[str | None] = [None]
    if rounded and shop.target.linears:
        modes = list(shop.modes(wanted.get("activations", "auto")))
        if wanted.get("activations", modes[0]) not in modes:
            raise UsageError(f"{where}: this {shop.target.kind} layer is weight-only, got {wanted['activations']!r}")
    thin: list[tuple[int | None, str | None]] = [(None, None)]
    if factored:
        thin = [(each, cut) for cut in schemes for each in ([rank] if rank is not None else shop.ranks(name, cut))]
    choices = [Choice(name, each, (bits or 8) if rounded else None, mode, cut) for each, cut in thin for mode in modes]
    small = [choice for choice in choices if shop.bytes(choice) < shop.bytes(Choice("dense"))]
    if not small:
        smallest = min((shop.bytes(choice) for choice in choices), default=0)
        raise UsageError(
            f"{where}: {value!r} would take {smallest:,} bytes, the dense layer takes {shop.bytes(Choice('dense')):,}"
        )
    return small


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
