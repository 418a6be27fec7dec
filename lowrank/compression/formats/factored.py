"""What formats with two factors have in common: which ranks are worth offering, and how truncation is measured on the model."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch

from lowrank.compression.formats.base import Measured, Probe, Request, WeightFormat
from lowrank.compression.formats.registry import FORMATS
from lowrank.compression.layer_data import LayerData
from lowrank.layers.spec import LayerSpec
from lowrank.targets import kind_named

__all__ = ["FactoredFormat", "learn_truncation", "truncation_probes"]

# Ranks offered per layer and format. More make the plan's steps finer than the noise of the measurement.
RANKS_PER_FORMAT = 36
# Of an even share of the budget: a probe that costs less is too far from where plans end to be extrapolated from. A heuristic: on
# ResNet-20 the cost over the layer's own error at one such probe, a millionth of its share, was a ten-thousandth of that at others.
NEGLIGIBLE = 0.03
# Times an even share: what the second rank is to lose, so that plans that put the error into a few layers are predicted too.
FAR = 16.0


class FactoredFormat(WeightFormat):
    """Describe a format of two factors; a subclass says what its numbers take and lose."""

    fields: ClassVar[tuple[str, ...]] = ("rank", "scheme")

    @abstractmethod
    def component_bytes(self, data: LayerData, scheme: str | None) -> int:
        """Count the bytes of one rank component, in all blocks."""

    @abstractmethod
    def ceiling(self, data: LayerData) -> int:
        """Count the bytes from which on the format is no longer the smallest of those that lose less."""

    def spec(self, rank: int, scheme: str | None, activations: str | None = None) -> LayerSpec:
        """Give the spec of a rank."""
        return LayerSpec(self.name, rank=rank, scheme=scheme)

    def stored_bytes(self, data: LayerData, spec: LayerSpec) -> int:
        """Count both factors, their scales and the biases."""
        assert spec.rank is not None
        return spec.rank * self.component_bytes(data, spec.scheme) + data.other_bytes

    def completed(self, spec: LayerSpec, kind: str, shape: Sequence[int]) -> LayerSpec:
        """Fill in the first scheme of a kind that has schemes."""
        known = kind_named(kind)
        if spec.scheme is None and known is not None:
            return replace(spec, scheme=known.schemes(tuple(shape))[0])
        return spec

    def ranks(self, data: LayerData, scheme: str | None) -> list[int]:
        """List the ranks worth offering, below the one at which the format stops being the smallest.

        Half of them evenly spread, half at evenly spread logarithms of the error: where a spectrum falls fast, that is where plans
        differ.
        """
        largest = (self.ceiling(data) - data.other_bytes - 1) // self.component_bytes(data, scheme)
        largest = min(largest, data.max_rank(scheme))
        if largest <= RANKS_PER_FORMAT:
            return list(range(1, largest + 1))
        # Multiples of 8 are what integer kernels are laid out for; on small layers that grid would be too coarse.
        step = 8 if largest >= 256 else 4 if largest >= 128 else 1
        half = RANKS_PER_FORMAT // 2
        wanted = {largest * index // half for index in range(1, half + 1)}
        errors = data.errors(scheme)[1 : largest + 1].clamp_min(torch.finfo(torch.float32).tiny).log()
        levels = torch.linspace(float(errors[0]), float(errors[-1]), half, dtype=errors.dtype)
        wanted |= {int((errors <= level).nonzero()[0]) + 1 for level in levels}
        return sorted({max(rank // step * step, step) for rank in wanted})

    def by_size(self, data: LayerData) -> list[LayerSpec]:
        """List the specs, growing in bytes, without those that a smaller one beats in error; activations are left open."""
        return data.remembered((self.name, "by_size"), lambda: self._by_size(data))

    def _by_size(self, data: LayerData) -> list[LayerSpec]:
        if not self.fits(data):
            return []
        every = [self.spec(rank, scheme) for scheme in data.schemes for rank in self.ranks(data, scheme)]
        kept: list[LayerSpec] = []
        for spec in sorted(every, key=lambda spec: (self.stored_bytes(data, spec), _truncation(data, spec))):
            if not kept or _truncation(data, spec) < _truncation(data, kept[-1]):
                kept.append(spec)
        return kept

    def specs(self, data: LayerData, request: Request) -> list[LayerSpec]:
        """List a few dozen ranks."""
        return self.by_size(data)

    def local_error(self, data: LayerData, spec: LayerSpec) -> float:
        """Give the error of truncation."""
        return _truncation(data, spec)

    def predict(self, found: Measured, data: LayerData, spec: LayerSpec) -> float:
        """Predict the measured cost of truncation, in proportion to the layer's own error."""
        return found.truncation * _truncation(data, spec)


def _truncation(data: LayerData, spec: LayerSpec) -> float:
    assert spec.rank is not None
    return data.truncation(spec.scheme, spec.rank)


def truncation_probes(data: LayerData, found: Measured, share: float, plain: FactoredFormat) -> list[Probe]:
    """List the ranks at which to ask what truncation costs the model, once for all formats with factors; the one of interest first.

    The cost of truncation is not quite proportional to the layer's own error, so it is asked for about where a plan would put it: at the
    rank that takes an even share of the budget if truncation costs what rounding does, and at one that loses far more.

    Args:
        share: of the contributions that the budget allows, an even part for this layer.
        plain: the format whose factors are floats, so that nothing but truncation is told.
    """
    candidates = [plain.spec(spec.rank, spec.scheme) for spec in _grid(data, plain) if spec.rank is not None]
    if not candidates:
        return []
    unit = found.rounding / found.rounding_error if found.rounding_error > 0.0 else 0.0
    middle = candidates[len(candidates) // 2]

    def reaching(allowed: float) -> LayerSpec:
        return next((each for each in candidates if unit * _truncation(data, each) <= allowed), candidates[-1])

    chosen = [reaching(share), reaching(FAR * share)] if unit > 0.0 and math.isfinite(share) else [middle]
    return [Probe(spec) for spec in dict.fromkeys(chosen)]


def learn_truncation(
    data: LayerData, effects: Mapping[Probe, float], found: Measured, share: float, plain: FactoredFormat
) -> None:
    """Keep what truncation costs the model, per squared relative error of the layer itself."""
    units: list[tuple[bool, float]] = []
    for probe in truncation_probes(data, found, share, plain):
        lost = _truncation(data, probe.spec)
        cost = effects.get(probe, 0.0)
        # A rank that leaves out only what the data never uses costs next to nothing, and says nothing about smaller ranks.
        if lost > 0.0 and (not units or cost > NEGLIGIBLE * share):
            units.append((cost > NEGLIGIBLE * share, cost / lost))
    telling = [unit for tells, unit in units if tells]
    found.truncation = telling[0] if telling else max((unit for _, unit in units), default=0.0)


def _grid(data: LayerData, plain: FactoredFormat) -> list[LayerSpec]:
    """The ranks of the format with the smallest components, which reach furthest; of the plain one where it has none."""
    formats = [format for format in FORMATS.values() if isinstance(format, FactoredFormat) and format.fits(data)]
    if not formats:
        return []
    finest = min(formats, key=lambda format: format.component_bytes(data, data.schemes[0]))
    return finest.by_size(data) or plain.by_size(data)
