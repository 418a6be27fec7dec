"""Two factors as codes, with one scale a rank component."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from lowrank.compression.formats.base import Measured, Probe, Request
from lowrank.compression.formats.factored import FactoredFormat, learn_truncation, truncation_probes
from lowrank.compression.formats.int8 import BITS, Int8, coarser
from lowrank.compression.formats.lowrank import LowRank, factored_layer
from lowrank.compression.layer_data import LayerData
from lowrank.layers import (
    CompressedLayer,
    QuantizedLowRankConv1d,
    QuantizedLowRankConv2d,
    QuantizedLowRankEmbedding,
    QuantizedLowRankLayer,
    SVDCompressedConv1d,
    SVDCompressedConv2d,
    SVDCompressedLinear,
)
from lowrank.layers.base import FLOAT_ACTIVATIONS, INTEGER_ACTIVATIONS
from lowrank.layers.spec import LayerSpec
from lowrank.numerics.conv_factors import ConvFactors
from lowrank.numerics.factors import Factors
from lowrank.numerics.rounding import dequantize_rows, quantize_rows
from lowrank.numerics.sampled_moments import SampledMoment, moment_squares

__all__ = ["LowRankInt8"]


class LowRankInt8(FactoredFormat):
    """Round both factors to the nearest of 255 levels.

    Args:
        plain: the format of float factors, in which truncation is measured.
        reference: the format of dense codes, whose measured cost of rounding is scaled to that of factors.
    """

    name = "lowrank-int8"
    fields: ClassVar[tuple[str, ...]] = ("rank", "bits", "activations", "scheme")
    colour: ClassVar[str] = "2"
    layers: ClassVar[Mapping[str, tuple[type[CompressedLayer], ...]]] = {
        "linear": (QuantizedLowRankLayer,),
        "conv": (QuantizedLowRankConv1d, QuantizedLowRankConv2d),
        "embedding": (QuantizedLowRankEmbedding,),
    }

    def __init__(self, plain: LowRank, reference: Int8) -> None:
        self.plain, self.reference = plain, reference

    def spec(self, rank: int, scheme: str | None, activations: str | None = None) -> LayerSpec:
        """Give the spec of a rank, 8 bits."""
        return LayerSpec(self.name, rank=rank, bits=BITS, activations=activations, scheme=scheme)

    def component_bytes(self, data: LayerData, scheme: str | None) -> int:
        """Count a byte a number and four a scale, one in each block."""
        return data.kind.component_size(data.target.shape, scheme, data.blocks) + 4 * data.blocks

    def ceiling(self, data: LayerData) -> int:
        """Count the bytes of dense codes, or of the layer as it is where that is less."""
        codes = self.reference.stored_bytes(data, self.reference.reference_spec(data))
        return min(codes, data.weight_bytes + data.other_bytes)

    def specs(self, data: LayerData, request: Request) -> list[LayerSpec]:
        """List a few dozen ranks, in each way of taking the activations."""
        modes = data.modes(request.activations)
        return [replace(spec, activations=mode) for spec in self.by_size(data) for mode in modes]

    def local_error(self, data: LayerData, spec: LayerSpec) -> float:
        """Add what truncation and rounding lose."""
        return super().local_error(data, spec) + self.rounding(data, spec) * coarser(spec)

    def rounding(self, data: LayerData, spec: LayerSpec) -> float:
        """Compute the squared relative error that 8-bit rounding adds to the factors of a rank.

        Rounding errors of different rank components are independent, so their squares add up.
        """
        assert spec.rank is not None
        by_rank = data.remembered((self.name, spec.scheme), lambda: _rounding_by_rank(data, spec.scheme))
        return float(by_rank[spec.rank])

    def probes(self, data: LayerData, request: Request, found: Measured, share: float) -> list[Probe]:
        """Ask for truncation, and for what rounding the activations adds to rounded factors."""
        probes = truncation_probes(data, found, share, self.plain)
        if probes and INTEGER_ACTIVATIONS in data.modes("auto") and request.activations != FLOAT_ACTIVATIONS:
            probes = [*probes, self._integer(probes[0].spec)]
        return probes

    def learn(self, data: LayerData, effects: Mapping[Probe, float], found: Measured, share: float) -> None:
        """Keep both; rounding the activations between the factors too costs no less than rounding those before them."""
        learn_truncation(data, effects, found, share, self.plain)
        probes = truncation_probes(data, found, share, self.plain)
        integer = effects.get(self._integer(probes[0].spec)) if probes else None
        if integer is not None:
            found.integer_factors = max(integer, found.integer)

    def _integer(self, spec: LayerSpec) -> Probe:
        assert spec.rank is not None
        modes = INTEGER_ACTIVATIONS, FLOAT_ACTIVATIONS
        return Probe(*(self.spec(spec.rank, spec.scheme, mode) for mode in modes))

    def _rounding_cost(self, found: Measured, data: LayerData, spec: LayerSpec) -> float:
        """Predict what 8-bit rounding of the factors costs the model: the dense codes' cost, scaled by the local errors."""
        own = self.rounding(data, spec)
        if found.rounding_error > 0.0:
            return found.rounding * own / found.rounding_error
        return found.truncation * own

    def predict(self, found: Measured, data: LayerData, spec: LayerSpec) -> float:
        """Predict truncation, rounding of the factors and rounding of the activations."""
        error = super().predict(found, data, spec)
        error += self._rounding_cost(found, data, spec) * coarser(spec)
        integer = found.integer if found.integer_factors is None else found.integer_factors
        error += integer if spec.activations == INTEGER_ACTIVATIONS else 0.0
        return error

    def build_layer(self, module: nn.Module, spec: LayerSpec, factors: Factors | ConvFactors | None) -> CompressedLayer:
        """Round the factors."""
        assert factors is not None
        bits, activations = spec.bits or BITS, spec.activations or INTEGER_ACTIVATIONS
        if isinstance(module, nn.Embedding):
            assert isinstance(factors, Factors)
            return QuantizedLowRankEmbedding.from_factors(factors, module, bits=bits)
        layer = factored_layer(module, factors, spec.scheme)
        if isinstance(layer, SVDCompressedConv1d):
            return QuantizedLowRankConv1d.from_factors(layer, bits=bits, activations=activations)
        if isinstance(layer, SVDCompressedConv2d):
            return QuantizedLowRankConv2d.from_factors(layer, bits=bits, activations=activations)
        assert isinstance(layer, SVDCompressedLinear)
        return QuantizedLowRankLayer.from_factors(layer, bits=bits, activations=activations)


def _rounding_by_rank(data: LayerData, scheme: str | None) -> Tensor:
    """(max_rank + 1,) squared relative error that rounding adds to the factors of each rank."""
    estimated = data.factor_rounding(scheme)
    if estimated is not None:
        return estimated.cpu()
    factors = data.factors(scheme, data.max_rank(scheme))
    lost = _conv_components(data, factors) if isinstance(factors, ConvFactors) else _components(data, factors)
    whole = data.weighed_energy
    total = torch.cumsum(lost, 0) / whole if whole > 0.0 else torch.zeros_like(lost)
    return torch.cat([total.new_zeros(1), total]).cpu()


def _rounding_error(components: Tensor) -> Tensor:
    """(components, numbers): what rounding each row to 8 bits takes away."""
    codes, scale = quantize_rows(components, BITS)
    return components - dequantize_rows(codes, scale).to(torch.float64)


def _components(data: LayerData, factors: Factors) -> Tensor:
    """(rank,) squared error of each component of a matrix."""
    left, right = factors.left, factors.right
    left_error = _rounding_error(left.T.contiguous()).T
    right_error = _rounding_error(right.contiguous())
    row_weights, moments = data.row_weights, data.moments

    def in_rows(matrix: Tensor) -> Tensor:
        squares = data.weighed(matrix).square()
        return (squares if row_weights is None else squares * row_weights[:, None]).sum(dim=0)

    def in_columns(matrix: Tensor) -> Tensor:
        squares = matrix.square().sum(dim=1) if moments is None else moment_squares(matrix, moments)
        return squares.clamp_min(0.0)

    return in_rows(left_error) * in_columns(right) + in_rows(left) * in_columns(right_error)


def _conv_components(data: LayerData, factors: ConvFactors) -> Tensor:
    """(rank,) squared error of each component of two kernels, summed over the groups."""
    groups = data.blocks
    rank = factors.first.shape[0] // groups
    wide = factors.second.shape[-1] if factors.second.ndim == 4 else 1
    # first (groups, rank, in·height) and second (groups, rank, out, wide): one component is an outer product.
    first = factors.first.to(torch.float64).reshape(groups * rank, -1)
    second = factors.second.to(torch.float64).reshape(groups, -1, rank, wide).permute(0, 2, 1, 3)
    second = second.reshape(groups * rank, -1)
    first_error, second_error = (_rounding_error(part) for part in (first, second))
    size = rank, wide
    return _outer_norms(data, first, second_error, size) + _outer_norms(data, first_error, second, size)


def _outer_norms(data: LayerData, first: Tensor, second: Tensor, size: tuple[int, int]) -> Tensor:
    """(rank,) ‖second ⊗ first‖² of each component in the norm of the patches, summed over the groups."""
    groups, (rank, wide) = data.blocks, size
    first = first.reshape(groups, rank, -1)
    second = second.reshape(groups, rank, -1, wide)
    if data.weighting is not None:
        by_output = second.transpose(1, 2).reshape(data.rows, rank, wide)
        second = data.weighting.of(by_output).view(groups, -1, rank, wide).transpose(1, 2)
    gram = torch.einsum("grow,grov->grwv", second, second)
    if data.moments is None:
        own = first.square().sum(dim=2)
        return (gram.diagonal(dim1=2, dim2=3).sum(dim=2) * own).sum(dim=0)
    tall = first.shape[2]
    if isinstance(data.moments, SampledMoment):
        # Kept for layers that are cut in the channel form alone, so that the second kernel is one number wide.
        return (gram[..., 0, 0] * data.moments.squares(first)).sum(dim=0).clamp_min(0.0)
    moments = data.moments.reshape(groups, tall, wide, tall, wide)
    total = first.new_zeros(groups, rank)
    for one in range(wide):
        for other in range(wide):
            total += gram[:, :, one, other] * ((first @ moments[:, :, one, :, other]) * first).sum(dim=2)
    return total.sum(dim=0).clamp_min(0.0)
