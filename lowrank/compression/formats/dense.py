"""Layers as they are."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from lowrank.compression.formats.base import Measured, Request, WeightFormat
from lowrank.compression.layer_data import LayerData
from lowrank.layers.spec import LayerSpec
from lowrank.numerics.conv_factors import ConvFactors
from lowrank.numerics.factors import Factors

__all__ = ["DENSE", "Dense"]

DENSE = LayerSpec("dense")


class Dense(WeightFormat):
    """Leave a layer alone: no error, and the bytes it has."""

    name = DENSE.format
    colour: ClassVar[str] = "3"
    dense: ClassVar[bool] = True

    def fits(self, data: LayerData) -> bool:
        """Tell that anything can stay as it is."""
        return True

    def specs(self, data: LayerData, request: Request) -> list[LayerSpec]:
        """List the one way of leaving a layer alone."""
        return [DENSE]

    def stored_bytes(self, data: LayerData, spec: LayerSpec) -> int:
        """Count the weights and biases."""
        return data.weight_bytes + data.other_bytes

    def local_error(self, data: LayerData, spec: LayerSpec) -> float:
        """Compute nothing: there is none."""
        return 0.0

    def predict(self, found: Measured, data: LayerData, spec: LayerSpec) -> float:
        """Predict no cost."""
        return 0.0

    def build_layer(self, module: nn.Module, spec: LayerSpec, factors: Factors | ConvFactors | None) -> nn.Module:
        """Give the module itself."""
        return module
