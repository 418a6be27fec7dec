"""Two float factors in the weight's place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import nn

from lowrank.compression.formats.base import Measured, Probe, Request
from lowrank.compression.formats.factored import FactoredFormat, learn_truncation, truncation_probes
from lowrank.compression.layer_data import LayerData
from lowrank.layers import (
    CompressedLayer,
    LowRankEmbedding,
    SVDCompressedConv1d,
    SVDCompressedConv2d,
    SVDCompressedLinear,
)
from lowrank.layers.spec import LayerSpec
from lowrank.numerics.conv_factors import SCHEMES, ConvFactors
from lowrank.numerics.factors import Factors

__all__ = ["LowRank", "factored_layer"]


class LowRank(FactoredFormat):
    """Keep the best factors of a rank, in the weight's dtype."""

    name = "lowrank"
    colour: ClassVar[str] = "4"
    layers: ClassVar[Mapping[str, tuple[type[CompressedLayer], ...]]] = {
        "linear": (SVDCompressedLinear,),
        "conv": (SVDCompressedConv1d, SVDCompressedConv2d),
        "embedding": (LowRankEmbedding,),
    }

    def component_bytes(self, data: LayerData, scheme: str | None) -> int:
        """Count the numbers of a component in the weight's dtype."""
        return data.kind.component_size(data.target.shape, scheme, data.blocks) * data.weight.element_size()

    def ceiling(self, data: LayerData) -> int:
        """Count the bytes of the layer as it is."""
        return data.weight_bytes + data.other_bytes

    def probes(self, data: LayerData, request: Request, found: Measured, share: float) -> list[Probe]:
        """Ask for truncation."""
        return truncation_probes(data, found, share, self)

    def learn(self, data: LayerData, effects: Mapping[Probe, float], found: Measured, share: float) -> None:
        """Keep what truncation costs."""
        learn_truncation(data, effects, found, share, self)

    def build_layer(self, module: nn.Module, spec: LayerSpec, factors: Factors | ConvFactors | None) -> CompressedLayer:
        """Put the factors into a layer."""
        assert factors is not None
        return factored_layer(module, factors, spec.scheme)


def factored_layer(module: nn.Module, factors: Factors | ConvFactors, scheme: str | None) -> CompressedLayer:
    """Make the float layer of some factors that takes a module's place.

    Args:
        scheme: of a convolution.
    """
    if isinstance(factors, ConvFactors):
        conv = SVDCompressedConv1d if isinstance(module, nn.Conv1d) else SVDCompressedConv2d
        layer: CompressedLayer = conv.from_factors(factors, module, scheme or SCHEMES[0])
        return layer
    if isinstance(module, nn.Embedding):
        return LowRankEmbedding.from_factors(factors, module)
    return SVDCompressedLinear.from_factors(factors, module)
