"""Modules of several matrices, each matrix with bits of its own: ``mixed``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lowrank.compression.formats.base import Measured, Probe, Request, WeightFormat, shown
from lowrank.compression.formats.dense import DENSE
from lowrank.compression.layer_data import SAMPLED_ROWS, LayerData, spread_rows
from lowrank.errors import CheckpointError, LowRankError, RankError, UsageError
from lowrank.layers import RECURRENT, CompressedLayer
from lowrank.layers.base import FLOAT_ACTIVATIONS
from lowrank.layers.matrix_store import WIDE_BITS, MatrixStore
from lowrank.layers.spec import LayerSpec
from lowrank.numerics.conv_factors import ConvFactors
from lowrank.numerics.factors import Factors

__all__ = ["Mixed"]

# What one matrix may become, the finest first.
_LADDER = (
    DENSE,
    *(LayerSpec(f"int{bits}", bits=bits) for bits in sorted(WIDE_BITS, reverse=True)),
    *(LayerSpec(f"int{bits}", bits=bits, group=group) for bits in range(8, 1, -1) for group in (64, 32)),
)
_PROBED = LayerSpec("int8", bits=8, group=64)
_FINER = LayerSpec("int12", bits=12)
# Below what careful layers are not taken.
_CAREFUL_BITS = 8


@dataclass
class _Costs:
    """What each matrix costs the model: measured points of (squared relative error of the matrix, cost), by its name."""

    points: dict[str, list[tuple[float, float]]]

    def of(self, name: str, error: float) -> float:
        """Predict a cost: between two points along a power law, beyond them in proportion."""
        points = self.points[name]
        if error <= 0.0:
            return 0.0
        finest, coarsest = points[0], points[-1]
        if error >= coarsest[0] or len(points) == 1:
            return coarsest[1] * error / coarsest[0] if coarsest[0] > 0.0 else 0.0
        if error <= finest[0] or not (finest[1] > 0.0 and coarsest[1] > 0.0):
            return finest[1] * error / finest[0]
        slope = math.log(coarsest[1] / finest[1]) / math.log(coarsest[0] / finest[0])
        return finest[1] * math.exp(max(slope, 0.0) * math.log(error / finest[0]))


class Mixed(WeightFormat):
    """Give each matrix of a recurrent layer its own number of bits, or leave it in floats, by what its error costs the model.

    Candidates are the lower hull of bytes and predicted cost over all combinations of :data:`_LADDER`.
    """

    name: str = "mixed"
    fields: ClassVar[tuple[str, ...]] = ("activations", "parts")
    careful: ClassVar[bool] = True
    colour: ClassVar[str] = "6"
    layers: ClassVar[Mapping[str, tuple[type[CompressedLayer], ...]]] = {"recurrent": tuple(RECURRENT.values())}

    @property
    def rounded(self) -> bool:
        """Whether there are codes; how many bits, the parts say."""
        return True

    def holds(self, layer: CompressedLayer) -> bool:
        """Tell by the bits, which are not one number for all matrices."""
        return layer.bits is None

    # Candidates --------------------------------------------------------------------------------------------------------------

    def specs(self, data: LayerData, request: Request) -> list[LayerSpec]:
        """List the combinations on the lower hull, the largest first."""
        names = list(data.stacks)
        tables = []
        for name in names:
            offered = [part for part in _LADDER if not request.careful or (part.bits or _CAREFUL_BITS) >= _CAREFUL_BITS]
            tables.append([(self._bytes(data, name, part), self._cost(data, name, part), part) for part in offered])
        chosen = dict.fromkeys(names, DENSE)
        steps = [(rate, name, part) for name, table in zip(names, tables, strict=True) for rate, part in _hull(table)]
        found = []
        # The hull of all of them together: the cheapest step of any matrix next.
        for _, name, part in sorted(steps, key=lambda step: step[0]):
            chosen[name] = part
            found.append(self.spec(tuple(chosen.items())))
        return list(dict.fromkeys(found))

    def spec(self, parts: tuple[tuple[str, LayerSpec], ...]) -> LayerSpec:
        """Give the spec of matrices in these ways."""
        return LayerSpec(self.name, activations=FLOAT_ACTIVATIONS, parts=parts)

    def stored_bytes(self, data: LayerData, spec: LayerSpec) -> int:
        """Count each matrix as it is held, and the biases."""
        return data.other_bytes + sum(self._bytes(data, name, part) for name, part in spec.parts or ())

    @staticmethod
    def _bytes(data: LayerData, name: str, part: LayerSpec) -> int:
        weight = data.stacks[name][0]
        return data.remembered(
            ("part bytes", name, part), lambda: MatrixStore.of(weight, part).stored_bytes(weight.dtype)
        )

    def local_error(self, data: LayerData, spec: LayerSpec) -> float:
        """Estimate the squared relative error of all matrices together, on some rows of each."""
        if not data.square_sum > 0.0:
            return 0.0
        lost = sum(_error(data, name, part) * _energy(data, name) for name, part in spec.parts or ())
        return lost / data.square_sum

    def _cost(self, data: LayerData, name: str, part: LayerSpec) -> float:
        return _costs(data).of(name, _error(data, name, part))

    def probes(self, data: LayerData, request: Request, found: Measured, share: float) -> list[Probe]:
        """Ask for each matrix alone in 8 bits and in 12: between them what it costs may grow faster than its squared error."""
        return [Probe(self._alone(data, name, part)) for name in data.stacks for part in (_FINER, _PROBED)]

    def learn(self, data: LayerData, effects: Mapping[Probe, float], found: Measured, share: float) -> None:
        """Keep the points of each matrix, the finer first."""
        points = {
            name: [
                (_error(data, name, part), effects.get(Probe(self._alone(data, name, part)), 0.0))
                for part in (_FINER, _PROBED)
            ]
            for name in data.stacks
        }
        data.remember(("part costs",), _Costs(points))

    def _alone(self, data: LayerData, name: str, part: LayerSpec) -> LayerSpec:
        return self.spec(tuple((each, part if each == name else DENSE) for each in data.stacks))

    def predict(self, found: Measured, data: LayerData, spec: LayerSpec) -> float:
        """Predict the sum of what the matrices cost, or what the whole layer's error does where they were not measured."""
        if not data.remembers(("part costs",)):
            return super().predict(found, data, spec)
        return sum(self._cost(data, name, part) for name, part in spec.parts or ())

    # Building and checks -----------------------------------------------------------------------------------------------------

    def build_layer(self, module: nn.Module, spec: LayerSpec, factors: Factors | ConvFactors | None) -> CompressedLayer:
        """Round each matrix as its part says."""
        made = next((RECURRENT[each] for each in RECURRENT if isinstance(module, each)), None)
        if made is None:
            raise UsageError(f"module: format {self.name} takes recurrent layers, got {type(module).__name__}")
        return made.from_module(module, parts=dict(spec.parts or ()))

    def _check_bits(self, spec: LayerSpec, where: str) -> None:
        if spec.bits is not None:
            raise RankError(
                f"{where}: bits of format {self.name} must be null, its parts have their own; got {shown(spec.bits)}"
            )

    def check_fields(self, spec: LayerSpec, kind: str, shape: Sequence[int], where: str) -> None:
        """Refuse parts that no matrix can be held in, beyond what every format checks."""
        super().check_fields(spec, kind, shape, where)
        parts = spec.parts
        if not isinstance(parts, tuple) or not parts:
            raise LowRankError(
                f"{where}: parts of format {self.name} must map each matrix to its own spec, got {shown(parts)}"
            )
        for name, part in parts:
            if part not in _POSSIBLE:
                raise LowRankError(
                    f"{where}: parts: {name} must be dense, int2 to int8 with its bits and a group of null, 32, 64 or 128, "
                    f"or int10 to int12, int14 or int16 with its bits and no group; got {shown(part.to_json())}"
                )

    def check(self, data: LayerData, spec: LayerSpec) -> None:
        """Refuse a plan's spec whose parts are not the matrices of this target."""
        super().check(data, spec)
        given = [name for name, _ in spec.parts or ()]
        if given != list(data.stacks):
            raise CheckpointError(
                f"plan: layer {data.name}: parts must be {', '.join(data.stacks)}, in this order, got {', '.join(given)}"
            )


_POSSIBLE = {
    DENSE,
    *(LayerSpec(f"int{bits}", bits=bits) for bits in WIDE_BITS),
    *(LayerSpec(f"int{bits}", bits=bits, group=group) for bits in range(2, 9) for group in (None, 32, 64, 128)),
}


def _costs(data: LayerData) -> _Costs:
    """What was measured, else that every weight's error counts alike."""
    if data.remembers(("part costs",)):
        found: _Costs = data.remembered(("part costs",), lambda: _Costs({}))
        return found
    return _Costs({name: [(1.0, _energy(data, name))] for name in data.stacks})


def _energy(data: LayerData, name: str) -> float:
    return data.remembered(("part energy", name), lambda: float(data.stacks[name].double().square().sum()))


def _error(data: LayerData, name: str, part: LayerSpec) -> float:
    """Squared relative error of a matrix in a part, on some of its rows."""
    return data.remembered(("part error", name, part), lambda: _sampled_error(data.stacks[name][0], part))


def _sampled_error(weight: Tensor, part: LayerSpec) -> float:
    if part == DENSE:
        return 0.0
    some = weight[spread_rows(weight.shape[0], SAMPLED_ROWS, weight.device)]
    store = MatrixStore.of(some, part)
    exact = some.double()
    energy = float(exact.square().sum())
    lost = float((exact - store.decode(store.encode(some), torch.float64)).square().sum())
    return lost / energy if energy > 0.0 else 0.0


def _hull(table: Sequence[tuple[int, float, LayerSpec]]) -> list[tuple[float, LayerSpec]]:
    """The steps down the lower hull of (bytes, cost) from the first, each with the cost that a byte saved by it takes; those rise."""
    found: list[tuple[float, LayerSpec]] = []
    size, cost, _ = table[0]
    while True:
        smaller = [(max(c - cost, 0.0) / (size - b), b, c, part) for b, c, part in table if b < size]
        if not smaller:
            return found
        rate, size, cost, part = min(smaller, key=lambda step: (step[0], step[1]))
        found.append((rate, part))
