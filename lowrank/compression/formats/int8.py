"""Dense codes with one symmetric scale a row: the fastest format, and the reference of what rounding costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import nn

from lowrank.compression.formats.base import Measured, Probe, Request, WeightFormat, shown
from lowrank.compression.formats.packed import Packed
from lowrank.compression.layer_data import LayerData
from lowrank.errors import RankError
from lowrank.layers import (
    RECURRENT,
    CompressedLayer,
    DecodedLayer,
    PackedConv1d,
    PackedConv2d,
    PackedEmbedding,
    PackedExperts,
    PackedLinear,
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedEmbedding,
    QuantizedExperts,
    QuantizedLinear,
    QuantizedMultiheadAttention,
)
from lowrank.layers.base import FLOAT_ACTIVATIONS, INTEGER_ACTIVATIONS
from lowrank.layers.packed import PackedCodes
from lowrank.layers.spec import LayerSpec
from lowrank.numerics.conv_factors import ConvFactors
from lowrank.numerics.factors import Factors
from lowrank.numerics.rounding import dequantize_rows, quantize_rows
from lowrank.targets import DECODED, EXPERTS, kind_of

__all__ = ["Int8"]

BITS = 8


class Int8(Packed):
    """Round every weight to the nearest of 255 levels of its row, fewer with fewer bits (each code is stored in a byte all the same).

    In groups of inputs it is :class:`Packed` of 8 bits.
    """

    colour: ClassVar[str] = "1"
    layers: ClassVar[Mapping[str, tuple[type[CompressedLayer], ...]]] = {
        "linear": (QuantizedLinear, PackedLinear),
        "conv": (QuantizedConv1d, QuantizedConv2d, PackedConv1d, PackedConv2d),
        "embedding": (QuantizedEmbedding, PackedEmbedding),
        "recurrent": tuple(RECURRENT.values()),
        "attention": (QuantizedMultiheadAttention,),
        "experts": (QuantizedExperts, PackedExperts),
        **{kind.name: (DecodedLayer,) for kind in DECODED},
    }

    def __init__(self) -> None:
        super().__init__(BITS)

    def holds(self, layer: CompressedLayer) -> bool:
        """Tell packed layers by their bits; those with a byte a code are all of this format."""
        packed = isinstance(layer, (PackedCodes, PackedExperts))
        return super().holds(layer) if packed else layer.bits is not None

    def modes(self, data: LayerData, activations: str, spec: LayerSpec | None = None) -> tuple[str | None, ...]:
        """Give both ways for rows; groups take activations as they are."""
        if spec is not None and spec.group is not None:
            return super().modes(data, activations, spec)
        return data.modes(activations)

    def specs(self, data: LayerData, request: Request) -> list[LayerSpec]:
        """List rows of 8 bits in each way of taking the activations, then groups."""
        rows = [self.spec(mode) for mode in data.modes(request.activations)]
        groups = super().specs(data, request) if self.packs(data.target) else []
        return [*rows, *(spec for spec in groups if spec.group is not None)]

    def spec(self, activations: str | None) -> LayerSpec:
        """Give 8 bits with these activations."""
        return LayerSpec(self.name, bits=BITS, activations=activations)

    def reference_spec(self, data: LayerData) -> LayerSpec:
        """Give what :attr:`Measured.rounding` is of: 8 bits, activations in float where there are any."""
        return self.spec(data.modes(FLOAT_ACTIVATIONS)[0])

    def stored_bytes(self, data: LayerData, spec: LayerSpec) -> int:
        """Count a byte a weight and four a row; of groups what they take."""
        if spec.group is not None:
            return super().stored_bytes(data, spec)
        return data.other_bytes + sum(
            stack.numel() + 4 * stack.shape[0] * stack.shape[1] for stack in data.stacks.values()
        )

    def local_error(self, data: LayerData, spec: LayerSpec) -> float:
        """Compute what rounding to 8 bits loses, and estimate fewer bits: half a step is 2 to the missing bits as much."""
        if spec.group is not None:
            return super().local_error(data, spec)
        exact = data.remembered((self.name, "rounding"), lambda: self._rounded(data))
        return exact * coarser(spec)

    def _rounded(self, data: LayerData) -> float:
        rounded = {}
        for name, stack in data.stacks.items():
            single = len(data.stacks) == 1 and not data.kind.stacked
            weight = data.weight if single else stack.reshape(-1, stack.shape[2])
            rounded[name] = dequantize_rows(*quantize_rows(weight, BITS))
        return data.local_error(rounded)

    def probes(self, data: LayerData, request: Request, found: Measured, share: float) -> list[Probe]:
        """Ask for rounding with float activations, and for what integer ones add."""
        reference = self.reference_spec(data)
        integer = INTEGER_ACTIVATIONS in data.modes("auto") and request.activations != FLOAT_ACTIVATIONS
        return [Probe(reference), *([Probe(self.spec(INTEGER_ACTIVATIONS), reference)] if integer else [])]

    def learn(self, data: LayerData, effects: Mapping[Probe, float], found: Measured, share: float) -> None:
        """Keep both, with the layer's own error."""
        reference = self.reference_spec(data)
        found.rounding, found.rounding_error = effects[Probe(reference)], self.local_error(data, reference)
        found.integer = effects.get(Probe(self.spec(INTEGER_ACTIVATIONS), reference), 0.0)

    def predict(self, found: Measured, data: LayerData, spec: LayerSpec) -> float:
        """Predict the measured cost; of fewer bits in proportion to the squared step, of groups by their local error."""
        if spec.group is not None:
            return super().predict(found, data, spec)
        return found.rounding * coarser(spec) + (found.integer if spec.activations == INTEGER_ACTIVATIONS else 0.0)

    def build(self, data: LayerData, spec: LayerSpec) -> dict[str, nn.Module]:
        """Round rows to the nearest, groups as :class:`Packed` does."""
        return super().build(data, spec) if spec.group is not None else WeightFormat.build(self, data, spec)

    def completed(self, spec: LayerSpec, kind: str, shape: Sequence[int]) -> LayerSpec:
        """Leave rows as they are."""
        return spec if spec.group is None else super().completed(spec, kind, shape)

    def check_fields(self, spec: LayerSpec, kind: str, shape: Sequence[int], where: str) -> None:
        """Refuse for rows what only groups have."""
        if spec.group is None:
            for name in ("rounding", "zero_point"):
                if getattr(spec, name) is not None:
                    raise RankError(
                        f"{where}: {name} of format {self.name} needs a group, got {shown(getattr(spec, name))}"
                    )
        elif kind not in self.packed_layers:
            raise RankError(
                f"{where}: a {kind} layer has no groups of inputs, got group {shown(spec.group)}; leave it null"
            )
        super().check_fields(spec, kind, shape, where)

    def _check_bits(self, spec: LayerSpec, where: str) -> None:
        if spec.group is None:
            WeightFormat._check_bits(self, spec, where)
        else:
            super()._check_bits(spec, where)

    def check(self, data: LayerData, spec: LayerSpec) -> None:
        """Refuse a plan's spec that this target cannot become."""
        if spec.group is None:
            WeightFormat.check(self, data, spec)
        else:
            super().check(data, spec)

    def build_layer(self, module: nn.Module, spec: LayerSpec, factors: Factors | ConvFactors | None) -> CompressedLayer:
        """Round a module's weights."""
        if spec.group is not None:
            return super().build_layer(module, spec, factors)
        bits, activations = spec.bits or BITS, spec.activations or INTEGER_ACTIVATIONS
        if kind_of(module) is EXPERTS:
            return QuantizedExperts.from_module(module, bits=bits)
        if kind_of(module) in DECODED:
            return DecodedLayer.from_module(module, bits=bits)
        if isinstance(module, nn.Embedding):
            return QuantizedEmbedding.from_embedding(module, bits=bits)
        if isinstance(module, nn.Conv1d):
            return QuantizedConv1d.from_conv1d(module, bits=bits, activations=activations)
        if isinstance(module, nn.Conv2d):
            return QuantizedConv2d.from_conv2d(module, bits=bits, activations=activations)
        if isinstance(module, nn.MultiheadAttention):
            return QuantizedMultiheadAttention.from_module(module, bits=bits, activations=activations)
        recurrent = next((RECURRENT[each] for each in RECURRENT if isinstance(module, each)), None)
        if recurrent is not None:
            return recurrent.from_module(module, bits=bits)
        return QuantizedLinear.from_linear(module, bits=bits, activations=activations)


def coarser(spec: LayerSpec) -> float:
    """Give the squared step of a spec's codes over that of 8 bits: errors are squared.

    Example:
        >>> coarser(LayerSpec("", bits=6))
        16.0
    """
    return 4.0 ** (BITS - (spec.bits or BITS))
