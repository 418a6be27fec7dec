"""Dense codes with one symmetric scale a row: the fastest format, and the reference of what rounding costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import nn

from lowrank.compression.formats.base import Measured, Probe, Request, WeightFormat
from lowrank.compression.layer_data import LayerData
from lowrank.layers import (
    RECURRENT,
    CompressedLayer,
    DecodedLayer,
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedMultiheadAttention,
)
from lowrank.layers.base import FLOAT_ACTIVATIONS, INTEGER_ACTIVATIONS
from lowrank.layers.spec import LayerSpec
from lowrank.numerics.conv_factors import ConvFactors
from lowrank.numerics.factors import Factors
from lowrank.numerics.rounding import dequantize_rows, quantize_rows
from lowrank.targets import DECODED, kind_of

__all__ = ["Int8"]

BITS = 8


class Int8(WeightFormat):
    """Round every weight to the nearest of 255 levels, fewer with fewer bits (each code is stored in a byte all the same)."""

    name: ClassVar[str] = "int8"
    fields: ClassVar[tuple[str, ...]] = ("bits", "activations")
    colour: ClassVar[str] = "1"
    layers: ClassVar[Mapping[str, tuple[type[CompressedLayer], ...]]] = {
        "linear": (QuantizedLinear,),
        "conv": (QuantizedConv1d, QuantizedConv2d),
        "embedding": (QuantizedEmbedding,),
        "recurrent": tuple(RECURRENT.values()),
        "attention": (QuantizedMultiheadAttention,),
        **{kind.name: (DecodedLayer,) for kind in DECODED},
    }

    def specs(self, data: LayerData, request: Request) -> list[LayerSpec]:
        """List 8 bits in each way of taking the activations."""
        return [self.spec(mode) for mode in data.modes(request.activations)]

    def spec(self, activations: str | None) -> LayerSpec:
        """Give 8 bits with these activations."""
        return LayerSpec(self.name, bits=BITS, activations=activations)

    def reference_spec(self, data: LayerData) -> LayerSpec:
        """Give what :attr:`Measured.rounding` is of: 8 bits, activations in float where there are any."""
        return self.spec(data.modes(FLOAT_ACTIVATIONS)[0])

    def stored_bytes(self, data: LayerData, spec: LayerSpec) -> int:
        """Count a byte a weight and four a row."""
        return data.other_bytes + sum(
            stack.numel() + 4 * stack.shape[0] * stack.shape[1] for stack in data.stacks.values()
        )

    def local_error(self, data: LayerData, spec: LayerSpec) -> float:
        """Compute what rounding to 8 bits loses, and estimate fewer bits: half a step is 2 to the missing bits as much."""
        exact = data.remembered((self.name, "rounding"), lambda: self._rounded(data))
        return exact * coarser(spec)

    def _rounded(self, data: LayerData) -> float:
        rounded = {}
        for name, stack in data.stacks.items():
            weight = data.weight if len(data.stacks) == 1 else stack.reshape(-1, stack.shape[2])
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
        """Predict the measured cost; of fewer bits in proportion to the squared step."""
        return found.rounding * coarser(spec) + (found.integer if spec.activations == INTEGER_ACTIVATIONS else 0.0)

    def build_layer(self, module: nn.Module, spec: LayerSpec, factors: Factors | ConvFactors | None) -> CompressedLayer:
        """Round a module's weights."""
        bits, activations = spec.bits or BITS, spec.activations or INTEGER_ACTIVATIONS
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
