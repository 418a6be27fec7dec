"""What a format of weights says of itself: candidates, sizes, errors, what to measure, and how its layers are built.

One file a format, the only place where its name is written, registered in ``lowrank/compression/formats/__init__.py``. Sizes, checks,
candidates, predictions, fields of plans and reports, overrides and the command line's choices follow from it.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lowrank.compression.layer_data import LayerData
from lowrank.errors import CheckpointError, LowRankError, RankError, is_whole
from lowrank.layers import CompressedLayer
from lowrank.layers.base import ACTIVATIONS, INTEGER_ACTIVATIONS
from lowrank.layers.spec import LayerSpec
from lowrank.numerics.conv_factors import ConvFactors
from lowrank.numerics.factors import Factors, check_rank
from lowrank.numerics.rounding import LEAST_BITS, MOST_BITS
from lowrank.numerics.rounding_methods import ROUNDINGS
from lowrank.targets import LINEAR, kind_named
from lowrank.targets.survey import Target

__all__ = ["Measured", "Probe", "Request", "WeightFormat", "shown"]


@dataclass(frozen=True)
class Request:
    """Say what candidates are wanted.

    Attributes:
        activations: "int8", "float", or "auto" for both.
        careful: the data says nothing about (part of) the layer, so that only formats that are ``careful`` may be offered.
        silent: the metric does not depend on the layer, so that nothing says what fewer than 8 bits would cost.
    """

    activations: str
    careful: bool = False
    silent: bool = False


@dataclass
class Measured:
    """Hold what a layer's formats cost the whole model: additive contributions to its error (squared, or nats for KL).

    Predictions start from here: squared relative local error, times what one unit of it costs.

    Attributes:
        rounding: of the reference format (dense codes of 8 bits), activations in float.
        rounding_error: the layer's own squared relative error there.
        integer: what rounding the activations adds to that.
        truncation: of a low-rank layer, per squared relative error of the layer itself.
        integer_factors: what rounding the activations (also those between the factors) adds to rounded factors; ``None`` where it was
            not measured: then as much as :attr:`integer`.
        refused: why the layer cannot be replaced, where replacing it broke the model.
        silent: the metric does not depend on this layer.
        careful: the measured cost says nothing about inputs that the data does not hold (a silent layer, one that no input reached,
            embedding rows that were never looked up), so the layer is rounded row by row and takes no low rank.
        assumed: what a unit of squared relative local error beyond the reference's is taken to cost, where no data tells.
    """

    rounding: float = 0.0
    rounding_error: float = 0.0
    integer: float = 0.0
    truncation: float = 0.0
    integer_factors: float | None = None
    refused: str | None = None
    silent: bool = False
    careful: bool = False
    assumed: float = 0.0


@dataclass(frozen=True)
class Probe:
    """Ask what one target in a spec, instead of in another, adds to the model's error.

    Attributes:
        spec: the one that is asked about.
        against: what it is compared with; the target as it is where ``None``.
    """

    spec: LayerSpec
    against: LayerSpec | None = None


class WeightFormat(ABC):
    """Describe one format; a subclass is one file.

    Attributes:
        name: as users write it.
        fields: of :class:`LayerSpec`, beside ``format``, that it takes.
        layers: kind of layer -> the classes that its modules become; a kind that is absent is not offered.
        colour: of the format in charts, a number of the palette in ``reporting/style.py``.
        dense: whether layers stay as they are.
    """

    name: str
    fields: ClassVar[tuple[str, ...]] = ()
    layers: ClassVar[Mapping[str, tuple[type[CompressedLayer], ...]]] = {}
    colour: ClassVar[str] = "4"
    dense: ClassVar[bool] = False

    @property
    def factored(self) -> bool:
        """Whether there are two factors."""
        return "rank" in self.fields

    @property
    def rounded(self) -> bool:
        """Whether there are codes."""
        return "bits" in self.fields

    @property
    def careful(self) -> bool:
        """Whether a layer, or rows of one, that the data never met may take it: its error acts row by row."""
        return not self.factored

    def builds(self, target: Target) -> bool:
        """Tell whether every member of a target can become this, by its kind."""
        return all(kind.name in self.layers for kind in target.kinds)

    def fits(self, data: LayerData) -> bool:
        """Tell whether every member of the target can become this."""
        return self.builds(data.target)

    def holds(self, layer: CompressedLayer) -> bool:
        """Tell whether a layer of one of the classes is of this format, where several share a class; all are unless overridden."""
        return True

    def modes(self, data: LayerData, activations: str, spec: LayerSpec | None = None) -> tuple[str | None, ...]:
        """Give the ways in which a rounded layer of this format may take its activations; see :meth:`LayerData.modes`.

        Args:
            spec: of the layer, where it matters.
        """
        return data.modes(activations)

    # Candidates --------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def specs(self, data: LayerData, request: Request) -> list[LayerSpec]:
        """List the candidates worth planning with, whatever their size."""

    @abstractmethod
    def stored_bytes(self, data: LayerData, spec: LayerSpec) -> int:
        """Count the bytes of the tensors that a file will hold for this target (codes, scales, factors, biases)."""

    @abstractmethod
    def local_error(self, data: LayerData, spec: LayerSpec) -> float:
        """Compute or estimate the squared relative error of the weights, in the norm of the inputs (and of the gradients)."""

    def probes(self, data: LayerData, request: Request, found: Measured, share: float) -> list[Probe]:
        """List what predictions of this format rest on, beside the reference's; nothing unless overridden.

        Args:
            found: what the reference's probes have told.
            share: of the contributions that the budget allows, an even part for this layer; where truncation is worth probing.
        """
        return []

    def learn(self, data: LayerData, effects: Mapping[Probe, float], found: Measured, share: float) -> None:
        """Keep in ``found`` what the probes have told; nothing unless overridden."""
        return None

    def predict(self, found: Measured, data: LayerData, spec: LayerSpec) -> float:
        """Predict what a spec costs the model: the reference's measured cost, scaled by the local errors, unless overridden."""
        error = self.local_error(data, spec)
        cost = found.rounding * error / found.rounding_error if found.rounding_error > 0.0 else 0.0
        cost += found.assumed * max(error - found.rounding_error, 0.0)
        return cost + (found.integer if spec.activations == INTEGER_ACTIVATIONS else 0.0)

    # Building ----------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def build_layer(
        self, module: nn.Module, spec: LayerSpec, factors: Factors | ConvFactors | None
    ) -> CompressedLayer | nn.Module:
        """Make the layer that takes a module's place.

        Args:
            factors: of the weight, of the spec's rank; ``None`` where the format has none.
        """

    def build(self, data: LayerData, spec: LayerSpec) -> dict[str, nn.Module]:
        """Make the new module of each member, by the member's first name; tied members share the weight's tensors."""
        factors = data.factors(spec.scheme, spec.rank) if spec.rank is not None else None
        built: dict[str, nn.Module] = {}
        for member in data.target.members:
            layer = self.build_layer(member.module, spec, factors)
            for first in list(built.values())[:1]:
                assert isinstance(first, CompressedLayer) and isinstance(layer, CompressedLayer)
                layer.share_tensors(first)
            built[member.name] = layer
        return built

    # Checks ------------------------------------------------------------------------------------------------------------------

    def completed(self, spec: LayerSpec, kind: str, shape: Sequence[int]) -> LayerSpec:
        """Fill in what a spec may leave out; as it is unless overridden."""
        return spec

    def check_fields(self, spec: LayerSpec, kind: str, shape: Sequence[int], where: str) -> None:
        """Refuse a spec that no layer of this kind and shape can have, by the plan's data alone.

        Args:
            kind: name of the layer's kind.
            shape: of the weight.
            where: for messages, such as "plan, layer 'fc'".

        Raises:
            RankError: a rank or number of bits that the format or the shape does not allow.
            LowRankError: another field that is not what it has to be.
        """
        self._check_scheme(spec, kind, tuple(shape), where)
        self._check_rank(spec, kind, tuple(shape), where)
        self._check_bits(spec, where)
        allowed = (None, *ACTIVATIONS) if "activations" in self.fields else (None,)
        _check_choice(spec.activations, allowed, f"{where}: activations of format {self.name}")
        for name in ("group", "rounding", "parts"):
            value = getattr(spec, name)
            if name not in self.fields and value is not None:
                raise LowRankError(f"{where}: {name} of format {self.name} must be null, got {shown(value)}")
        if spec.zero_point is not None and not ("zero_point" in self.fields and spec.zero_point is True):
            legal = "null or true" if "zero_point" in self.fields else "null"
            raise LowRankError(
                f"{where}: zero_point of format {self.name} must be {legal}, got {shown(spec.zero_point)}"
            )
        if spec.group is not None and not is_whole(spec.group, 1):
            raise LowRankError(f"{where}: group must be null or an integer from 1, got {shown(spec.group)}")
        if spec.rounding is not None and spec.rounding not in ROUNDINGS:
            raise LowRankError(
                f"{where}: rounding must be null or one of {', '.join(ROUNDINGS)}, got {shown(spec.rounding)}"
            )

    def _check_scheme(self, spec: LayerSpec, kind: str, shape: tuple[int, ...], where: str) -> None:
        known = kind_named(kind)
        allowed = known.schemes(shape) if known is not None and self.factored else (None,)
        _check_choice(
            spec.scheme, allowed, f"{where}: scheme of a {kind} layer of shape {list(shape)} in format {self.name}"
        )

    def _check_rank(self, spec: LayerSpec, kind: str, shape: tuple[int, ...], where: str) -> None:
        if not self.factored:
            if spec.rank is not None:
                raise RankError(f"{where}: rank of format {self.name} must be null, got {shown(spec.rank)}")
            return
        limit = (kind_named(kind) or LINEAR).rank_limit(shape, spec.scheme)
        if not is_whole(spec.rank, 1, limit):
            raise RankError(
                f"{where}: rank of format {self.name} must be an integer from 1 to {limit} "
                f"(the smaller side of shape {list(shape)}), got {shown(spec.rank)}"
            )

    def _check_bits(self, spec: LayerSpec, where: str) -> None:
        if self.rounded:
            if not is_whole(spec.bits, LEAST_BITS, MOST_BITS):
                raise RankError(
                    f"{where}: bits of format {self.name} must be an integer from {LEAST_BITS} to {MOST_BITS}, "
                    f"got {shown(spec.bits)}"
                )
        elif spec.bits is not None:
            raise RankError(f"{where}: bits of format {self.name} must be null, got {shown(spec.bits)}")

    def check(self, data: LayerData, spec: LayerSpec) -> None:
        """Refuse a plan's spec that this target cannot become.

        Raises:
            CheckpointError: activations or a scheme that it does not have.
            RankError: a rank beyond what its blocks and kernel allow.
        """
        if self.rounded and spec.activations not in (None, *data.modes("auto")):
            raise CheckpointError(
                f"plan: layer {data.name} is weight-only or looked up: activations cannot be {spec.activations!r}; "
                "correct the plan"
            )
        if not self.factored:
            return
        if spec.scheme not in data.schemes:
            possible = " or ".join(str(scheme) for scheme in data.schemes)
            raise CheckpointError(
                f"plan: layer {data.name} of shape {list(data.target.shape)}: scheme must be {possible}, got {spec.scheme!r}"
            )
        check_rank(spec.rank, data.max_rank(spec.scheme), f"plan: layer {data.name}, rank")


def _check_choice(value: object, allowed: Sequence[str | None], what: str) -> None:
    if value not in allowed:
        names = " or ".join("null" if each is None else json.dumps(each) for each in allowed)
        raise LowRankError(f"{what} must be {names}, got {shown(value)}")


def shown(value: object) -> str:
    """Show a value in a one-line message, whatever its size.

    Example:
        >>> shown("x" * 100)[-5:], shown(10**60)
        ('xx...', 'an integer of 200 bits')
    """
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
