"""Packed codes of 2 to 8 bits with a scale for each group of inputs, perhaps a zero point: ``int2`` to ``int7``, and ``int8`` in groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from lowrank.compression.formats.base import Request, WeightFormat, shown
from lowrank.compression.formats.packed_experts import experts_error, rounded_experts
from lowrank.compression.layer_data import SAMPLED_ROWS, LayerData, spread_rows
from lowrank.compression.stacks import row_squares
from lowrank.errors import CheckpointError, RankError
from lowrank.layers import CompressedLayer, PackedConv1d, PackedConv2d, PackedEmbedding, PackedExperts, PackedLinear
from lowrank.layers.base import FLOAT_ACTIVATIONS
from lowrank.layers.experts import expert_scale_dtype
from lowrank.layers.packed import GROUPS, packed_bytes
from lowrank.layers.spec import LayerSpec
from lowrank.numerics.conv_factors import ConvFactors
from lowrank.numerics.factored_moments import FactoredMoment
from lowrank.numerics.factors import Factors
from lowrank.numerics.rounding_methods import (
    GPTQ,
    NEAREST,
    ROUNDINGS,
    Grid,
    Rounded,
    dequantize_groups,
    scale_dtype,
)
from lowrank.numerics.sampled_moments import Moment
from lowrank.targets import kind_of
from lowrank.targets.survey import Target

__all__ = ["Packed", "grid_of", "method_of"]

# A zero point of its own costs a group some bits, and pays where the levels are few.
MOST_BITS_WITH_ZERO = 4
# The grid on which it is found out what feedback brings a layer; so much the same on others.
_PROBED = Grid(4, 64)


def grid_of(spec: LayerSpec) -> Grid:
    """Give the levels of a spec's codes.

    Example:
        >>> grid_of(LayerSpec("int4", bits=4, group=64)).groups(128)
        2
    """
    assert spec.bits is not None
    return Grid(spec.bits, spec.group, bool(spec.zero_point))


def method_of(data: LayerData, spec: LayerSpec) -> str:
    """Name the rounding of a spec: the one it asks for, else error feedback where the moment of the inputs is known."""
    if spec.rounding is not None:
        return spec.rounding
    return NEAREST if data.moments is None and data.experts is None else GPTQ


class Packed(WeightFormat):
    """Round every weight to one of ``2**bits`` levels of its group, by error feedback where the inputs are known.

    Args:
        bits: of a code; the format is called after them.
    """

    fields: ClassVar[tuple[str, ...]] = ("bits", "activations", "group", "rounding", "zero_point")
    colour: ClassVar[str] = "5"
    packed_layers: ClassVar[Mapping[str, tuple[type[CompressedLayer], ...]]] = {
        "linear": (PackedLinear,),
        "conv": (PackedConv1d, PackedConv2d),
        "embedding": (PackedEmbedding,),
        "experts": (PackedExperts,),
    }
    layers: ClassVar[Mapping[str, tuple[type[CompressedLayer], ...]]] = packed_layers

    def __init__(self, bits: int) -> None:
        self.width = bits
        self.name = f"int{bits}"

    def holds(self, layer: CompressedLayer) -> bool:
        """Tell by the bits, since formats of all bits share their classes."""
        return layer.bits == self.width

    def packs(self, target: Target) -> bool:
        """Tell whether every member's kind has a packed layer."""
        return all(kind.name in self.packed_layers for kind in target.kinds)

    # Candidates --------------------------------------------------------------------------------------------------------------

    def specs(self, data: LayerData, request: Request) -> list[LayerSpec]:
        """List rows and groups, with zero points where levels are few, in each way of taking the activations."""
        columns = self._columns(data)
        groups: list[int | None] = [None, *(group for group in sorted(GROUPS, reverse=True) if group < columns)]
        zeros = (None, True) if self.width <= MOST_BITS_WITH_ZERO else (None,)
        return [
            LayerSpec(self.name, bits=self.width, activations=mode, group=group, zero_point=zero)
            for group in groups
            for zero in zeros
            for mode in Packed.modes(self, data, request.activations)
        ]

    def modes(self, data: LayerData, activations: str, spec: LayerSpec | None = None) -> tuple[str | None, ...]:
        """Give the ways of taking activations: as they are."""
        return tuple(mode for mode in data.modes(activations) if mode in (None, FLOAT_ACTIVATIONS))

    @staticmethod
    def _columns(data: LayerData) -> int:
        return max(stack.shape[2] for stack in data.stacks.values())

    def stored_bytes(self, data: LayerData, spec: LayerSpec) -> int:
        """Count codes, scales, zero points and biases."""
        grid = grid_of(spec)
        return data.other_bytes + sum(
            packed_bytes(stack.shape[0] * stack.shape[1], stack.shape[2], grid, self._scale_dtype(data, name, grid))
            for name, stack in data.stacks.items()
        )

    def _scale_dtype(self, data: LayerData, name: str, grid: Grid) -> torch.dtype:
        stack = data.stacks[name]

        def told() -> torch.dtype:
            if data.kind.stacked:
                return expert_scale_dtype(stack, grid)
            return scale_dtype(stack.reshape(-1, stack.shape[2]), grid)

        return data.remembered(("scale_dtype", name, grid.bits, grid.group), told)

    def local_error(self, data: LayerData, spec: LayerSpec) -> float:
        """Estimate what rounding loses on some rows: to the nearest level, times what feedback brings this layer."""
        grid, method = grid_of(spec), method_of(data, spec)
        nearest = data.remembered(("packed", grid), lambda: _sampled_error(data, grid, NEAREST))
        if method == NEAREST or nearest == 0.0:
            return nearest
        return nearest * data.remembered(("gain", method), lambda: _gain(data, method))

    # Building ----------------------------------------------------------------------------------------------------------------

    def build(self, data: LayerData, spec: LayerSpec) -> dict[str, nn.Module]:
        """Round once, and make each member of it; tied members share the tensors."""
        if data.kind.stacked:
            return {data.name: self._experts(data, spec)}
        rounded = self.chosen(data, spec)
        shift = _bias_shift(data, rounded, grid_of(spec))
        built: dict[str, nn.Module] = {}
        for member in data.target.members:
            layer = _layer_of(member.module, rounded, spec)
            if shift is not None:
                bias = layer.get_parameter("bias")
                with torch.no_grad():
                    bias.copy_(bias.double() + shift)
            for first in list(built.values())[:1]:
                assert isinstance(first, CompressedLayer)
                layer.share_tensors(first)
            built[member.name] = layer
        return built

    def _experts(self, data: LayerData, spec: LayerSpec) -> CompressedLayer:
        grid, method = grid_of(spec), method_of(data, spec)
        if method != NEAREST and data.experts is None:
            raise CheckpointError(_needs_inputs(data, method))
        return PackedExperts.from_rounded(data.target.owner, rounded_experts(data, grid, method), grid)

    def chosen(self, data: LayerData, spec: LayerSpec) -> Rounded:
        """Choose the codes of a target's matrix.

        Raises:
            CheckpointError: the spec's rounding needs statistics that are not there.
        """
        grid, method = grid_of(spec), method_of(data, spec)
        if method != NEAREST and data.moments is None:
            raise CheckpointError(_needs_inputs(data, method))
        return ROUNDINGS[method](data.weight, grid, _factored(data), data.gradients)

    def build_layer(self, module: nn.Module, spec: LayerSpec, factors: Factors | ConvFactors | None) -> CompressedLayer:
        """Round a module's weight to the nearest levels."""
        kind = kind_of(module)
        assert kind is not None
        if kind.stacked:
            return PackedExperts.from_rounded(module, {}, grid_of(spec))
        return _layer_of(module, ROUNDINGS[NEAREST](kind.matrix(module), grid_of(spec)), spec)

    # Checks ------------------------------------------------------------------------------------------------------------------

    def completed(self, spec: LayerSpec, kind: str, shape: Sequence[int]) -> LayerSpec:
        """Fill in the bits."""
        return replace(spec, bits=self.width) if spec.bits is None else spec

    def _check_bits(self, spec: LayerSpec, where: str) -> None:
        if spec.bits != self.width:
            raise RankError(f"{where}: bits of format {self.name} are {self.width}, got {shown(spec.bits)}")

    def check_fields(self, spec: LayerSpec, kind: str, shape: Sequence[int], where: str) -> None:
        """Refuse groups that no layer has, beyond what every format checks."""
        super().check_fields(spec, kind, shape, where)
        if spec.group not in (None, *GROUPS):
            raise RankError(
                f"{where}: group of format {self.name} must be null (a whole row) or one of {', '.join(map(str, GROUPS))}, "
                f"got {shown(spec.group)}"
            )

    def check(self, data: LayerData, spec: LayerSpec) -> None:
        """Refuse a plan's spec that this target cannot become."""
        super().check(data, spec)
        if spec.activations not in (None, *self.modes(data, "auto", spec)):
            raise CheckpointError(
                f"plan: layer {data.name}: packed layers are weight-only, got activations {spec.activations!r}; correct the plan"
            )


def _layer_of(module: nn.Module, rounded: Rounded, spec: LayerSpec) -> CompressedLayer:
    grid = grid_of(spec)
    if isinstance(module, nn.Embedding):
        return PackedEmbedding.from_rounded(rounded, module, grid=grid)
    if isinstance(module, nn.Conv1d):
        return PackedConv1d.from_rounded(rounded, module, grid=grid)
    if isinstance(module, nn.Conv2d):
        return PackedConv2d.from_rounded(rounded, module, grid=grid)
    activations = spec.activations or FLOAT_ACTIVATIONS
    return PackedLinear.from_rounded(rounded, module, grid=grid, activations=activations)


def _bias_shift(data: LayerData, rounded: Rounded, grid: Grid) -> Tensor | None:
    """``(W − Ŵ) μ``, (out,) float64, where the bias takes the mean of the error: the moments that codes are chosen by are centred there."""
    if data.inputs is None or not data.centred:
        return None
    lost = data.weight.to(torch.float64) - dequantize_groups(*rounded, grid, torch.float64)
    mean = data.inputs.mean.to(lost.device).view(data.blocks, -1, 1)
    shift: Tensor = (lost.view(data.blocks, -1, data.columns) @ mean).flatten()
    return shift


def _needs_inputs(data: LayerData, method: str) -> str:
    return f"plan: layer {data.name}: rounding {method!r} needs what flows into the layer; pass calibration=, or set rounding to null"


def _sampled_error(data: LayerData, grid: Grid, method: str) -> float:
    """Squared relative error of a rounding, in the norm of the inputs and gradients; errors of different rows count as unrelated."""
    if data.kind.stacked:
        return experts_error(data, grid, method)
    if not data.weighed_energy > 0.0:
        return 0.0
    rows, moment = _sampled_rows(data), data.moments
    weight = data.weight[rows]
    rounded = ROUNDINGS[method](weight, grid, moment if method == NEAREST else _factored(data))
    difference = weight.to(torch.float64) - dequantize_groups(*rounded, grid, torch.float64)
    parts = difference.view(data.blocks, -1, difference.shape[1]) if data.blocks > 1 else difference
    squares = row_squares(parts, moment).flatten()
    lost = float((squares * _row_costs(data)[rows]).sum()) * data.rows / len(rows)
    return max(lost, 0.0) / data.weighed_energy


def _factored(data: LayerData) -> Moment | FactoredMoment | None:
    """The moment, factored once for all grids where it is whole."""
    moments = data.moments
    if not isinstance(moments, Tensor):
        return moments
    return data.remembered("factored moment", lambda: FactoredMoment.of(moments, name=f"layer {data.name}"))


def _sampled_rows(data: LayerData) -> Tensor:
    """Some rows, evenly spread, as many of each block."""
    each = data.rows // data.blocks
    spread = spread_rows(each, SAMPLED_ROWS // data.blocks, data.weight.device)
    return torch.cat([spread + block * each for block in range(data.blocks)])


def _row_costs(data: LayerData) -> Tensor:
    """(rows,) what a squared error of each output costs: the diagonal of C, or how often a row is looked up."""
    if data.row_weights is not None:
        return data.row_weights
    if data.weighting is None:
        return torch.ones(data.rows, dtype=torch.float64, device=data.weight.device)
    costs: Tensor = data.weighting.root.square().sum(dim=1).to(data.weight.device)
    return costs


def _gain(data: LayerData, method: str) -> float:
    """What a method leaves of the error of rounding to the nearest, at most all of it."""
    columns = Packed._columns(data)
    grid = _PROBED if columns > (_PROBED.group or 0) else replace(_PROBED, group=None)
    nearest = data.remembered(("packed", grid), lambda: _sampled_error(data, grid, NEAREST))
    return min(_sampled_error(data, grid, method) / nearest, 1.0) if nearest > 0.0 else 1.0
