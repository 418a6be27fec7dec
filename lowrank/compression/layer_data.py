"""What is known of one target: its weights, what flows into it, what an error of it costs, and what was decomposed so far."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from lowrank.calibration.experts import ExpertInputs
from lowrank.compression.stacks import stacked_error
from lowrank.layers import CompressedLayer
from lowrank.layers.base import ACTIVATIONS, FLOAT_ACTIVATIONS
from lowrank.numerics.conv_factors import ConvCurve, ConvFactors
from lowrank.numerics.factors import Factors, RankCurve
from lowrank.numerics.gradient_weighting import GradientWeighting
from lowrank.numerics.moments import InputStatistics, TokenCounts
from lowrank.numerics.sampled_moments import Moment
from lowrank.targets import LayerKind
from lowrank.targets.kind import Factoring
from lowrank.targets.survey import Target

__all__ = ["RIDGE", "SAMPLED_ROWS", "LayerData", "spread_rows"]

# Relative to the mean diagonal of the input moment. A heuristic: small enough to leave the data in charge, large enough that
# directions which few calibration tokens reached are not dropped for free.
RIDGE = 1e-3
# Rows of a weight that errors of roundings are estimated on: those of one layer are much alike.
SAMPLED_ROWS = 256
_T = TypeVar("_T")


def spread_rows(rows: int, wanted: int, device: torch.device) -> Tensor:
    """Give the places of so many rows, evenly spread; of all where there are no more.

    Example:
        >>> spread_rows(10, 3, torch.device("cpu")).tolist()
        [0, 3, 6]
    """
    count = max(min(rows, wanted), 1)
    return torch.arange(count, device=device) * rows // count


class LayerData:
    """Hold a target with its statistics; measure approximations of its weight in the norm of its inputs; decompose it once.

    One class for every kind of layer: what differs is the kind's to say (:mod:`lowrank.targets`). What the target can become, and
    at which size and error, is the formats' (:mod:`lowrank.compression.formats`).

    Args:
        target: modules that share one weight.
        inputs: moments of what flows into the (first) member that multiplies, if any was reached.
        lookups: counts of the rows looked up in the embedding member, if any was reached.
        data_aware: use them; off for the "weight" metric, whose optimum is the plain SVD.
        gradients: C of the (first) member that multiplies, from :func:`lowrank.calibration.gradients.output_gradients`. Factors are
            then those whose error costs the model's output least, and truncation and rounding are weighed so.
        experts: what flows into each expert of a mixture.

    Attributes:
        weight: as a matrix (out, in · kernel); of a module of several matrices one row with all of them.
        rows, columns: of the (first) weight as a matrix.
        blocks: of the weight, which never meet: a convolution's groups.
        centred: whether a bias takes the correction of the mean of the inputs.

    Example:
        >>> from torch import nn
        >>> from lowrank.targets.survey import survey
        >>> data = LayerData(survey(nn.Sequential(nn.Linear(8, 4))).targets[0])
        >>> data.rows, data.columns, data.reached, data.error_of(torch.zeros(4, 8))
        (4, 8, False, (1.0, 1.0))
    """

    def __init__(
        self,
        target: Target,
        inputs: InputStatistics | None = None,
        lookups: TokenCounts | None = None,
        *,
        data_aware: bool = True,
        gradients: Tensor | None = None,
        experts: ExpertInputs | None = None,
    ) -> None:
        self.target = target
        self.experts = experts if data_aware and target.kind.stacked and experts and experts.statistics else None
        known = data_aware and not target.kind.composite
        self.inputs = inputs if known else None
        self.lookups = lookups if known else None
        self.gradients = gradients if self.inputs is not None else None
        self.stacks = target.kind.weights(target.owner)
        self.weight = target.kind.matrix(target.owner)
        first = next(iter(self.stacks.values()))
        self.blocks, rows, self.columns = first.shape
        self.rows = self.blocks * rows
        # A bias can take the correction of the mean only where the layer has one and no embedding shares the weight.
        self.centred = (
            not target.kind.composite
            and len(target.members) == 1
            and not target.looked_up
            and getattr(target.owner, "bias", None) is not None
        )
        self._known: dict[Hashable, Any] = {}

    @property
    def name(self) -> str:
        """The target's name."""
        return self.target.name

    @property
    def kind(self) -> LayerKind:
        """The kind of the first member."""
        return self.target.kind

    @property
    def reached(self) -> bool:
        """Whether any calibration token came by; of modules that are not observed a lack of effect shows it."""
        return self.kind.composite or self.inputs is not None or self.lookups is not None

    @property
    def unseen_rows(self) -> int:
        """Rows of an embedding that the calibration data never looked up."""
        return self.lookups.unseen if self.lookups is not None else 0

    def remembered(self, key: Hashable, make: Callable[[], _T]) -> _T:
        """Make something once, for the formats that ask again and again."""
        if key not in self._known:
            self._known[key] = make()
        found: _T = self._known[key]
        return found

    def remember(self, key: Hashable, value: object) -> None:
        """Keep something that was measured, for the formats that ask for it by :meth:`remembered`."""
        self._known[key] = value

    def remembers(self, key: Hashable) -> bool:
        """Tell whether there is something under a key."""
        return key in self._known

    def curve(self, scheme: str | None) -> RankCurve | ConvCurve:
        """Decompose once for every rank, ``C^½ W`` where there are gradients: see :meth:`factors`."""
        return self.remembered(("curve", scheme), lambda: self._decomposed(scheme))

    def _decomposed(self, scheme: str | None) -> RankCurve | ConvCurve:
        known = Factoring(
            f"layer {self.name}", self.inputs, self.lookups, scheme, self.blocks, RIDGE, shift_bias=self.centred
        )
        return self.kind.factorize(self.weighed(self.kind.factored_weight(self.target.owner)), known)

    def factors(self, scheme: str | None, rank: int) -> Factors | ConvFactors:
        """Give the best factors of the weight of this rank that are known.

        Raises:
            RankError: the rank is not an integer in [1, max_rank].
        """
        found = self.curve(scheme).factors(rank)
        weighting = self.weighting
        if weighting is None:
            return found
        shift = None if found.bias_shift is None else weighting.back(found.bias_shift[:, None])[:, 0]
        if isinstance(found, ConvFactors):
            return ConvFactors(found.first, weighting.back(found.second), shift)
        return Factors(weighting.back(found.left), found.right, shift)

    @property
    def schemes(self) -> tuple[str | None, ...]:
        """The ways to cut the weight in two; the first alone where rows of the inputs stand for their moment, which others need whole."""
        schemes = self.kind.schemes(self.target.shape)
        return schemes[:1] if self.inputs is not None and self.inputs.sampled else schemes

    def max_rank(self, scheme: str | None) -> int:
        """Give the largest rank that means anything."""
        return self.kind.rank_limit(self.target.shape, scheme, self.blocks)

    def truncation(self, scheme: str | None, rank: int) -> float:
        """Give the squared relative error of the factors of a rank, in the norm of the inputs (and of the gradients)."""
        return float(self.errors(scheme)[rank]) ** 2

    def errors(self, scheme: str | None) -> Tensor:
        """Give the relative error of the factors of each rank from 0, (max_rank + 1,) float64."""
        return self.curve(scheme).errors

    def factor_rounding(self, scheme: str | None) -> Tensor | None:
        """Give what rounding adds to the factors of each rank, where it is estimated; ``None``: it is computed from the factors."""
        return None

    @cached_property
    def weighting(self) -> GradientWeighting | None:
        """What an error at the layer's outputs costs the model, where gradients tell; block by block."""
        if self.gradients is None:
            return None
        return GradientWeighting(self.gradients, groups=self.blocks, name=f"layer {self.name}")

    def weighed(self, matrix: Tensor) -> Tensor:
        """Give ``C^½ matrix``, or the matrix where there are no gradients."""
        return matrix if self.weighting is None else self.weighting.of(matrix)

    @cached_property
    def moments(self) -> Moment | None:
        """Σ of what flows in, (in, in) or (blocks, in, in) as the kind has it, or the rows it is made of; ``None`` where unknown."""
        if self.inputs is None:
            return None
        return self.kind.moments(self.inputs, blocks=self.blocks, centred=self.centred, device=self.weight.device)

    @cached_property
    def row_weights(self) -> Tensor | None:
        """How often each row is looked up, as a share; ``None`` where rows are multiplied or nothing is known."""
        if self.inputs is not None or self.lookups is None:
            return None
        return self.lookups.counts.to(self.weight.device, torch.float64) / self.lookups.count

    def squared_norm(self, matrix: Tensor) -> float:
        """Compute ‖matrix‖² in the norm of the inputs (or of the look-ups)."""
        return self.kind.squared_norm(matrix, self.moments, self.row_weights, self.blocks)

    @cached_property
    def energy(self) -> float:
        """What activation errors are relative to, squared."""
        return self.squared_norm(self.weight)

    @cached_property
    def weighed_energy(self) -> float:
        """What predicted local errors are relative to, squared: the energy, weighed by C."""
        return self.energy if self.weighting is None else self.squared_norm(self.weighed(self.weight))

    @cached_property
    def square_sum(self) -> float:
        """‖W‖²_F."""
        return float(self.weight.to(torch.float64).square().sum())

    def local_error(self, approximations: dict[str, Tensor]) -> float:
        """Compute the squared relative error of other matrices in the weights' place, in the norm of the inputs (and gradients).

        Args:
            approximations: (out, in · kernel) by the names of :attr:`stacks`, any floating dtype.
        """
        if self.kind.stacked:
            return stacked_error(self.stacks, approximations, self.experts)
        if not self.weighed_energy > 0.0:
            return 0.0
        lost = 0.0
        for name, stack in self.stacks.items():
            weight = self.weight if len(self.stacks) == 1 else stack.reshape(-1, stack.shape[2])
            difference = weight.to(torch.float64) - approximations[name].to(torch.float64)
            lost += self.squared_norm(self.weighed(difference))
        return max(lost, 0.0) / self.weighed_energy

    def error_of(self, approximation: Tensor) -> tuple[float, float]:
        """Compute (weight_error, activation_error) of a weight in the weight's place."""
        approximation = approximation.detach().flatten(1)
        difference = self.weight.to(torch.float64) - approximation.to(self.weight.device, torch.float64)
        weight_error = (float(difference.square().sum()) / self.square_sum) ** 0.5 if self.square_sum else 0.0
        return weight_error, (max(self.squared_norm(difference), 0.0) / self.energy) ** 0.5 if self.energy > 0 else 0.0

    def errors_of(self, layer: CompressedLayer) -> tuple[float, float | None]:
        """Compute (weight_error, activation_error) of a layer's weights alone; ``None`` between several matrices that are not observed."""
        weight = layer.dense_weight()
        weight_error, activation_error = self.error_of(weight)
        if self.experts is not None:
            sizes = [stack.numel() for stack in self.stacks.values()]
            parts = weight.flatten().split(sizes)
            named = {name: part.view(self.stacks[name].shape) for name, part in zip(self.stacks, parts, strict=True)}
            return weight_error, stacked_error(self.stacks, named, self.experts) ** 0.5
        return weight_error, None if self.kind.composite else activation_error

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights alone, which other formats replace."""
        return sum(stack.numel() * stack.element_size() for stack in self.stacks.values())

    @cached_property
    def other_bytes(self) -> int:
        """Bytes that stay in any format: the biases of the members that multiply."""
        if self.kind.composite:
            return sum(tensor.nbytes for tensor in self.target.owner.parameters()) - self.weight_bytes
        biases = [getattr(member.module, "bias", None) for member in self.target.multiplying]
        return sum(bias.nbytes for bias in biases if isinstance(bias, Tensor))

    def modes(self, activations: str) -> tuple[str | None, ...]:
        """Give the ways in which a rounded layer may take its activations where ``activations`` is asked for ("auto": both)."""
        if not self.target.multiplying:
            return (None,)
        if self.kind.weight_only:
            return (FLOAT_ACTIVATIONS,)
        return ACTIVATIONS if activations == "auto" else (activations,)
