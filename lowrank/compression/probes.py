"""What each layer's formats cost the whole model: by derivatives for all layers at once, checked and mended by a few measurements."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from statistics import median

from tqdm import tqdm

from lowrank.calibration.batches import Batch
from lowrank.calibration.effects import BREAKING, Difference, local_effects
from lowrank.calibration.evaluation import Evaluator
from lowrank.calibration.outputs import OutputFn
from lowrank.compression.candidates import Candidate, LayerChoices
from lowrank.compression.formats import DENSE, FORMATS, REFERENCE, Measured, Probe, Request, format_of
from lowrank.compression.layer_data import LayerData
from lowrank.compression.passes import Passes
from lowrank.compression.working_copy import WorkingCopy
from lowrank.layers.base import FLOAT_ACTIVATIONS, INTEGER_ACTIVATIONS
from lowrank.layers.spec import LayerSpec
from lowrank.numerics.rounding import MOST_BITS
from lowrank.targets.copying import sharing_copy

__all__ = ["Prober", "computed_costs", "layer_choices", "smaller_specs", "stored_bytes"]

# What a weight-only layer is charged above its bytes: integer products are faster, so a layer gives them up only where that buys
# more than this share of its size. A heuristic.
WEIGHT_ONLY_CHARGE = 1.05
# A contribution that no budget allows, where an output of size 0 becomes something: finite, so that it can be added up.
NOTHING_LEFT = 1e300
# Groups of neighbouring layers that are measured together where derivatives tell nothing; for rounded activations there are fewer.
MOST_GROUPS = 8
INTEGER_GROUPS = 3
# Blocks of neighbouring layers whose predictions are mended, where all of them together are off by more than this factor.
MENDED_BLOCKS = 6
TRUSTED = 1.5
# A block's own correction is taken no further than this from one: a measurement of what is next to nothing says little.
MOST_CORRECTION = 30.0


def computed_costs(layers: Sequence[LayerData]) -> dict[str, Measured]:
    """Compute what each layer's formats cost the "weight" metric: ‖ΔW‖² of each layer over Σ‖W‖², by arithmetic alone."""
    whole = sum(data.square_sum for data in layers) or 1.0
    found = {}
    for data in layers:
        share = data.square_sum / whole
        error = REFERENCE.local_error(data, REFERENCE.reference_spec(data))
        found[data.name] = Measured(rounding=error * share, rounding_error=error, truncation=share, integer_factors=0.0)
    return found


@dataclass
class Prober:
    """Find what every target's formats cost the model, in a number of passes that the number of layers does not change.

    Derivatives of the output with respect to what each layer gives say what any other layer in its place would cost, to first order and
    all in one sweep (:func:`lowrank.calibration.effects.local_effects`). The model with every layer in the reference format is then
    measured: it says whether anything breaks, and how far off the sum is; where it is far off, so do blocks of neighbouring layers.
    What no derivative reaches (NumPy or ``torch.no_grad`` inside, steps, integers) is measured in groups of neighbours.

    Attributes:
        copy: with every target as it is.
        evaluator: on samples of the search part.
        samples: of the statistics part, on which derivatives are taken.
        formats: names of those that are asked for; the reference is always probed.
        request: which activations.
        allowed: the sum of contributions that the budget allows; truncation is probed about where a plan would put it.
        output_fn: picks the tensor out of the model's output.
        seed: of the random directions.
        progress: bars on standard error.
        passes: counted here.
        notes: for the reader.
    """

    copy: WorkingCopy
    evaluator: Evaluator
    samples: Sequence[Batch]
    formats: Sequence[str]
    request: Request
    allowed: float
    output_fn: OutputFn | None = None
    seed: int = 0
    progress: bool = False
    passes: Passes = field(default_factory=Passes)
    notes: list[str] = field(default_factory=list)
    _factors: dict[str, float] = field(default_factory=dict)

    def run(self) -> dict[str, Measured]:
        """Probe every target."""
        self.passes.add("predictions")  # The evaluator's own, of the original.
        layers = list(self.copy.layers.values())
        found = {data.name: Measured() for data in layers}
        refused = self._broken([data.name for data in layers])
        for name, reason in refused.items():
            found[name].refused = reason
        sound = [data for data in layers if data.name not in refused]
        whole = self._measure({data.name: _reference(data) for data in sound})
        asked = {data.name: REFERENCE.probes(data, self.request, found[data.name], self.share) for data in sound}
        effects = self._effects(asked)
        known = {name for name, told in effects.items() if told[asked[name][0]] > 0.0}
        self._mend([data for data in sound if data.name in known], effects, whole, alone=len(known) == len(sound))
        effects |= self._grouped([data for data in sound if data.name not in known])
        for data in sound:
            one = found[data.name]
            REFERENCE.learn(data, effects[data.name], one, self.share)
            one.silent = one.rounding == 0.0
            one.careful = one.silent or not data.reached or data.unseen_rows > 0
        self._truncate(sound, found, known)
        self._assume(sound, found)
        return found

    @property
    def share(self) -> float:
        """An even part of what is allowed, for one layer."""
        return self.allowed / max(len(self.copy.layers), 1)

    # Measurements ------------------------------------------------------------------------------------------------------------

    def _measure(self, specs: Mapping[str, LayerSpec]) -> float:
        """The contribution of some targets together, all others as they are."""
        self.passes.add("predictions")
        try:
            for name, spec in specs.items():
                self.copy.install(name, spec)
            return min(self.evaluator.measure(self.copy.model).ratio, NOTHING_LEFT)
        finally:
            for name in specs:
                self.copy.install(name, DENSE)

    def _broken(self, names: Sequence[str]) -> dict[str, str]:
        """Why targets cannot be replaced at all: a model may write to .weight, or call a layer in ways only a dense one takes.

        All are replaced at once and run on one batch; where that raises, halves tell which.
        """
        batch = self.evaluator.batches[0]
        first = Evaluator(self.copy.reference, [batch], self.evaluator.metric, self.output_fn)

        def trouble(some: Sequence[str]) -> Exception | None:
            try:
                for name in some:
                    self.copy.install(name, _reference(self.copy.layers[name]))
                first.measure(self.copy.model)
            except BREAKING as error:
                return error
            finally:
                for name in some:
                    self.copy.install(name, DENSE)
            return None

        found: dict[str, str] = {}
        waiting: list[Sequence[str]] = [names]
        while waiting:
            some = waiting.pop()
            error = trouble(some) if some else None
            if error is None:
                continue
            if len(some) == 1:
                found[some[0]] = f"replacing it breaks the model ({type(error).__name__}: {error})"
            else:
                waiting += [some[: len(some) // 2], some[len(some) // 2 :]]
        return {name: found[name] for name in names if name in found}

    def _grouped(self, layers: Sequence[LayerData]) -> dict[str, dict[Probe, float]]:
        """Effects of targets that no derivative reaches, from measured groups; within a group by the layers' own errors."""
        if not layers:
            return {}
        asked = {data.name: REFERENCE.probes(data, self.request, Measured(), self.share) for data in layers}
        found: dict[str, dict[Probe, float]] = {data.name: dict.fromkeys(asked[data.name], 0.0) for data in layers}
        together = {data.name: _reference(data) for data in layers}
        if self._measure(together) == 0.0:
            return found
        for group in _groups(layers, MOST_GROUPS):
            cost = self._measure({data.name: together[data.name] for data in group})
            for data, part in zip(group, _parts(group, cost), strict=True):
                found[data.name][asked[data.name][0]] = part
        integer = [data for data in layers if len(asked[data.name]) > 1]
        for group in _groups(integer, INTEGER_GROUPS):
            own = {data.name: found[data.name][asked[data.name][0]] for data in group}
            both = self._measure({data.name: asked[data.name][1].spec for data in group})
            added = max(both - sum(own.values()), 0.0)
            whole = sum(own.values())
            for data in group:
                part = own[data.name] / whole if whole > 0.0 else 1.0 / len(group)
                found[data.name][asked[data.name][1]] = min(added * part, NOTHING_LEFT)
        return found

    def _mend(
        self, layers: Sequence[LayerData], effects: dict[str, dict[Probe, float]], whole: float, *, alone: bool
    ) -> None:
        """Scale the effects so that they sum to what was measured: all alike, or block by block where they are far off.

        Args:
            alone: nothing but these layers was in what was measured.
        """
        if not layers:
            return
        references = {data.name: Probe(_reference(data)) for data in layers}
        predicted = math.fsum(effects[data.name][references[data.name]] for data in layers)
        if not alone:
            whole = self._measure({data.name: _reference(data) for data in layers})
        factor = _correction(whole, predicted)
        blocks = [layers]
        if not 1.0 / TRUSTED <= factor <= TRUSTED and len(layers) > 1:
            blocks = _groups(layers, MENDED_BLOCKS)
        for block in blocks:
            if len(blocks) > 1:
                cost = self._measure({data.name: _reference(data) for data in block})
                factor = _correction(cost, math.fsum(effects[data.name][references[data.name]] for data in block))
            for data in block:
                self._factors[data.name] = factor
                effects[data.name] = {probe: value * factor for probe, value in effects[data.name].items()}

    # Derivatives -------------------------------------------------------------------------------------------------------------

    def _effects(self, asked: Mapping[str, Sequence[Probe]]) -> dict[str, dict[Probe, float]]:
        """Effects by derivatives, of the targets that they reach."""
        differences = {name: [self._difference(name, probe) for probe in probes] for name, probes in asked.items()}
        directions = self.evaluator.metric.gradients
        if not any(differences.values()) or directions is None:
            return {}
        self.passes.add("predictions")
        try:
            # In a copy, since modules that keep an activation would keep its graph.
            told = local_effects(
                sharing_copy(self.copy.original),
                self.samples,
                differences,
                sizes=self._sizes,
                directions=directions,
                output_fn=self.output_fn,
                seed=self.seed,
            )
        except RuntimeError as error:
            self.notes.append(
                f"what layers cost was measured in groups: the model cannot be differentiated ({str(error).splitlines()[0]})"
            )
            return {}
        return {
            name: dict(zip(asked[name], values, strict=True))
            for name, values in told.items()
            if all(math.isfinite(value) for value in values)
        }

    @cached_property
    def _sizes(self) -> dict[str, float]:
        """What the errors of the outputs are relative to; of one that is zero no derivative tells what becoming something costs."""
        sized = Evaluator(self.copy.reference, self.samples, self.evaluator.metric, self.output_fn)
        self.passes.add("predictions")
        return {path: size for path, size in sized.sizes().items() if size > 0.0}

    def _difference(self, name: str, probe: Probe) -> Difference:
        spec, against = self.copy.build(name, probe.spec), None
        if probe.against is not None:
            against = self.copy.build(name, probe.against)
        return {member: (module, None if against is None else against[member]) for member, module in spec.items()}

    def _truncate(self, layers: Sequence[LayerData], found: Mapping[str, Measured], known: Iterable[str]) -> None:
        """Probe the formats beside the reference, once it is known what a unit of a layer's error costs."""
        wanted = [
            (data, format)
            for data in layers
            if not found[data.name].careful
            for format in FORMATS.values()
            if format is not REFERENCE and format.name in self.formats and format.fits(data)
        ]
        asked: dict[str, list[Probe]] = {}
        reached = set(known)
        for data, format in tqdm(wanted, desc="decomposing layers", delay=2, disable=not self.progress):
            probes = format.probes(data, self.request, found[data.name], self.share)
            if data.name in reached:
                asked.setdefault(data.name, []).extend(probes)
        told = self._effects({name: list(dict.fromkeys(probes)) for name, probes in asked.items()})
        for data, format in wanted:
            one = found[data.name]
            if data.name in told:
                # As far off as the first sweep's effects of this layer were.
                factor = self._factors.get(data.name, 1.0)
                told_here = {probe: value * factor for probe, value in told[data.name].items()}
                format.learn(data, told_here, one, self.share)
            elif one.rounding_error > 0.0:
                one.truncation = one.rounding / one.rounding_error

    def _assume(self, layers: Sequence[LayerData], found: Mapping[str, Measured]) -> None:
        """What layers that the data says nothing about are taken to cost beyond the reference's error: what others cost."""
        units = [one.rounding / one.rounding_error for one in found.values() if one.rounding_error and one.rounding]
        for data in layers:
            if found[data.name].silent or not data.reached:
                found[data.name].assumed = median(units) if units else 0.0


def _reference(data: LayerData) -> LayerSpec:
    return REFERENCE.reference_spec(data)


def _groups(layers: Sequence[LayerData], most: int) -> list[Sequence[LayerData]]:
    """Runs of neighbours, of even numbers of layers."""
    count = min(most, len(layers))
    edges = [index * len(layers) // count for index in range(count + 1)] if count else []
    return [layers[start:end] for start, end in pairwise(edges)]


def _parts(group: Sequence[LayerData], cost: float) -> list[float]:
    """A group's cost among its layers, by their own relative errors."""
    errors = [REFERENCE.local_error(data, _reference(data)) for data in group]
    whole = math.fsum(errors)
    return [cost * error / whole if whole > 0.0 else cost / len(group) for error in errors]


def _correction(measured: float, predicted: float) -> float:
    if not 0.0 < predicted < math.inf or not 0.0 < measured < NOTHING_LEFT:
        return 1.0
    return min(max(measured / predicted, 1.0 / MOST_CORRECTION), MOST_CORRECTION)


def smaller_specs(data: LayerData, formats: Iterable[str], request: Request) -> list[LayerSpec]:
    """List every candidate of these formats that is smaller than the layer as it is."""
    limit = stored_bytes(data, DENSE)
    found = []
    for format in FORMATS.values():
        if (
            format.name in formats
            and not format.dense
            and format.fits(data)
            and (format.careful or not request.careful)
        ):
            found += format.specs(data, request)
    fine = [spec for spec in found if not request.silent or spec.bits is None or spec.bits >= MOST_BITS]
    return [spec for spec in fine if stored_bytes(data, spec) < limit]


def stored_bytes(data: LayerData, spec: LayerSpec) -> int:
    """Count the bytes of the tensors that the file will hold for a target in this spec."""
    return format_of(spec).stored_bytes(data, spec)


def layer_choices(
    data: LayerData,
    found: Measured,
    formats: Sequence[str],
    activations: str,
    *,
    forced: Sequence[LayerSpec] | None = None,
) -> LayerChoices:
    """Give the planner's view of one target: every choice with its true bytes and predicted contribution.

    Args:
        forced: the only choices allowed, from ``overrides``.
    """
    if forced is not None:
        specs = list(forced)
    elif found.refused is not None:
        specs = [DENSE]
    else:
        specs = [DENSE, *smaller_specs(data, formats, Request(activations, found.careful, found.silent))]
    candidates = []
    for spec in specs:
        stored = stored_bytes(data, spec)
        charged = spec.activations == FLOAT_ACTIVATIONS and activations == "auto"
        error = format_of(spec).predict(found, data, spec)
        candidates.append(
            Candidate(
                spec,
                bytes=stored,
                error=error,
                cost=stored * WEIGHT_ONLY_CHARGE if charged else float(stored),
                parts=_parts_of(spec, error, lambda other: format_of(other).predict(found, data, other)),
            )
        )
    return LayerChoices(data.name, data.kind.name, tuple(data.target.shape), tuple(candidates))


def _parts_of(spec: LayerSpec, error: float, predict: Callable[[LayerSpec], float]) -> tuple[tuple[str, float], ...]:
    """What is corrected by measurements of its own: the weights of a format, and its rounded activations."""
    if spec.activations != INTEGER_ACTIVATIONS:
        return ((spec.format, error),)
    weights = min(predict(replace(spec, activations=FLOAT_ACTIVATIONS)), error)
    return ((spec.format, weights), (f"{spec.format} activations", error - weights))
