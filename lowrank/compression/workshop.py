"""One target at a time: what each format and rank would cost, and the layer itself once one is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from lowrank.errors import UsageError
from lowrank.layers import (
    CompressedLayer,
    LowRankEmbedding,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedLowRankEmbedding,
    QuantizedLowRankLayer,
    SVDCompressedLinear,
)
from lowrank.numerics.factors import Factors, RankCurve, factorize, factorize_embedding
from lowrank.numerics.gradient_metric import GradientMetric
from lowrank.numerics.moments import InputStatistics, TokenCounts
from lowrank.numerics.rounding import dequantize_rows, quantize_rows
from lowrank.targets.survey import Target, module_matrix

__all__ = ["FORMATS", "RIDGE", "Choice", "Workshop"]

FORMATS = ("int8", "lowrank", "lowrank-int8")
# Relative to the mean diagonal of the input moment. A heuristic: small enough to leave the data in charge, large enough that
# directions which few calibration tokens reached are not dropped for free.
RIDGE = 1e-3
# Ranks offered per layer and format. More make the plan's steps finer than the noise of the measurement.
RANKS_PER_FORMAT = 36


@dataclass(frozen=True)
class Choice:
    """A format with its numbers; the key of a built layer."""

    format: str
    rank: int | None = None
    bits: int | None = None
    activations: str | None = None
    scheme: str | None = None

    @property
    def factored(self) -> bool:
        """Whether there are two factors."""
        return "lowrank" in self.format

    @property
    def rounded(self) -> bool:
        """Whether there are integer codes."""
        return "int8" in self.format


class Workshop:
    """A target, the statistics of its inputs, its rank-error curve, and the layers built from it.

    This class is for matrices: linear layers and embedding tables. What differs for other modules is overridden:
    ``lowrank.workshop_conv``; :func:`lowrank.compression.workshops.open_workshop` picks the class.

    Args:
        target: modules that share one weight.
        inputs: moments of what flows into the (first) linear member, if any was reached.
        lookups: counts of the rows looked up in the embedding member, if any was reached.
        data_aware: use them; off for the "weight" metric, whose optimum is the plain SVD.
        gradients: C of the (first) linear member, from :func:`lowrank.calibration.gradients.output_gradients`. Factors are then those whose
            error costs the model's output least, and truncation and rounding are weighed in that metric.

    Attributes:
        formats: what the target can become besides dense.
        schemes: the ways to cut the weight in two; ``None`` is the only one of a matrix.
        rows, columns: of the weight as a matrix.

    Example:
        >>> from lowrank.targets.survey import survey
        >>> target = survey(nn.Sequential(nn.Linear(8, 4))).targets[0]
        >>> shop = Workshop(target, None, None)
        >>> shop.bytes(Choice("dense")), shop.bytes(Choice("int8", bits=8, activations="int8"))
        (144, 64)
    """

    formats: tuple[str, ...] = FORMATS
    schemes: tuple[str | None, ...] = (None,)

    def __init__(
        self,
        target: Target,
        inputs: InputStatistics | None,
        lookups: TokenCounts | None,
        *,
        data_aware: bool = True,
        gradients: Tensor | None = None,
    ) -> None:
        self.target = target
        self.inputs = inputs if data_aware else None
        self.lookups = lookups if data_aware else None
        self.gradients = gradients if self.inputs is not None else None
        self.weight = module_matrix(target.owner)
        self.rows, self.columns = self.weight.shape
        # A bias can take the correction of the mean only where the layer has one and no embedding shares the weight.
        self.centred = (
            len(target.members) == 1 and not target.has_embedding and getattr(target.owner, "bias", None) is not None
        )
        self._built: dict[Choice, dict[str, nn.Module]] = {}

    @property
    def name(self) -> str:
        """The target's name."""
        return self.target.name

    @property
    def reached(self) -> bool:
        """Whether any calibration token came by."""
        return self.inputs is not None or self.lookups is not None

    @property
    def unseen_rows(self) -> int:
        """Rows of an embedding that the calibration data never looked up."""
        return self.lookups.unseen if self.lookups is not None else 0

    @cached_property
    def curve(self) -> RankCurve:
        """One decomposition for every rank, of ``C^½ W`` where there are gradients: see :meth:`factors`."""
        if self.inputs is not None:
            return factorize(
                self._weighed(self.weight), self.inputs, ridge=RIDGE, shift_bias=self.centred, name=f"layer {self.name}"
            )
        if self.lookups is not None and not self.unseen_rows:
            return factorize_embedding(self.weight, self.lookups, name=f"layer {self.name}")
        return factorize(self.weight, name=f"layer {self.name}")

    def factors(self, rank: int) -> Factors:
        """The best factors of the weight of this rank.

        Raises:
            RankError: the rank is not an integer in [1, max_rank].
        """
        found = self.curve.factors(rank)
        if self.gradient_metric is None:
            return found
        shift = None if found.bias_shift is None else self.gradient_metric.back(found.bias_shift[:, None])[:, 0]
        return Factors(self.gradient_metric.back(found.left), found.right, shift)

    @cached_property
    def gradient_metric(self) -> GradientMetric | None:
        """What an error at the layer's outputs costs the model, where gradients tell."""
        if self.gradients is None:
            return None
        return GradientMetric(self.gradients, name=f"layer {self.name}")

    def _weighed(self, matrix: Tensor) -> Tensor:
        """``C^½ matrix``, or the matrix where there are no gradients."""
        return matrix if self.gradient_metric is None else self.gradient_metric.of(matrix)

    @cached_property
    def _moment(self) -> Tensor | None:
        return None if self.inputs is None else self.inputs.moment(centred=self.centred).to(self.weight.device)

    @cached_property
    def _row_weights(self) -> Tensor | None:
        if self.inputs is not None or self.lookups is None:
            return None
        return self.lookups.counts.to(self.weight.device, torch.float64) / self.lookups.count

    def _norm(self, matrix: Tensor) -> float:
        """‖matrix‖² in the metric of the inputs (or of the look-ups)."""
        matrix = matrix.to(torch.float64)
        weighted = matrix if self._moment is None else matrix @ self._moment
        squares = (weighted * matrix).sum(dim=1)
        return float((squares if self._row_weights is None else squares * self._row_weights).sum())

    @cached_property
    def energy(self) -> float:
        """What activation errors are relative to, squared."""
        return self._norm(self.weight)

    @cached_property
    def cost(self) -> float:
        """What :attr:`rounding`, :meth:`truncation` and :meth:`rounding_of_factors` are relative to: the energy, weighed by C."""
        return self.energy if self.gradient_metric is None else self._norm(self._weighed(self.weight))

    @cached_property
    def square_sum(self) -> float:
        """‖W‖²_F."""
        return float(self.weight.to(torch.float64).square().sum())

    def error_of(self, approximation: Tensor) -> tuple[float, float]:
        """(weight_error, activation_error) of a matrix in the weight's place."""
        difference = self.weight.to(torch.float64) - approximation.detach().to(self.weight.device, torch.float64)
        weight_error = (float(difference.square().sum()) / self.square_sum) ** 0.5 if self.square_sum else 0.0
        return weight_error, (max(self._norm(difference), 0.0) / self.energy) ** 0.5 if self.energy > 0.0 else 0.0

    def errors_of(self, layer: CompressedLayer) -> tuple[float, float | None]:
        """(weight_error, activation_error) of a layer built here, of its weights alone."""
        return self.error_of(layer.dense_weight())

    @cached_property
    def rounding(self) -> float:
        """Squared relative error of rounding the dense weight to 8 bits, in the metric of the inputs (and of the gradients)."""
        codes, scale = quantize_rows(self.weight, 8)
        difference = self.weight.to(torch.float64) - dequantize_rows(codes, scale).to(torch.float64)
        return max(self._norm(self._weighed(difference)), 0.0) / self.cost if self.cost > 0.0 else 0.0

    @cached_property
    def factor_rounding(self) -> Tensor:
        """(max_rank + 1,) squared relative error that 8-bit rounding adds to factors of each rank.

        Rounding errors of different rank components are independent, so their squares add up.
        """
        factors = self.factors(self.curve.max_rank)
        left, right = factors.left, factors.right
        left_codes, left_scale = quantize_rows(left.T.contiguous(), 8)
        right_codes, right_scale = quantize_rows(right.contiguous(), 8)
        left_error = (left.T - dequantize_rows(left_codes, left_scale).to(torch.float64)).T
        right_error = right - dequantize_rows(right_codes, right_scale).to(torch.float64)

        def in_rows(matrix: Tensor) -> Tensor:
            squares = self._weighed(matrix).square()
            return (squares if self._row_weights is None else squares * self._row_weights[:, None]).sum(dim=0)

        def in_columns(matrix: Tensor) -> Tensor:
            return ((matrix if self._moment is None else matrix @ self._moment) * matrix).sum(dim=1).clamp_min(0.0)

        per_component = in_rows(left_error) * in_columns(right) + in_rows(left) * in_columns(right_error)
        total = torch.cumsum(per_component, 0) / self.cost if self.cost > 0.0 else torch.zeros_like(per_component)
        return torch.cat([total.new_zeros(1), total]).cpu()

    def truncation(self, choice: Choice) -> float:
        """Squared relative error of the factors of a choice, before rounding, in the metric of the inputs (and of the gradients)."""
        assert choice.rank is not None
        return float(self.errors(choice.scheme)[choice.rank]) ** 2

    def rounding_of_factors(self, choice: Choice) -> float:
        """Squared relative error that 8-bit rounding adds to the factors of a choice."""
        assert choice.rank is not None
        return float(self.factor_rounding[choice.rank])

    def errors(self, scheme: str | None) -> Tensor:
        """(max_rank + 1,) relative error of the best factors of each rank."""
        return self.curve.errors

    def max_rank(self, scheme: str | None) -> int:
        """The largest rank that means anything."""
        return min(self.rows, self.columns)

    @cached_property
    def _bias_bytes(self) -> int:
        biases = [getattr(member.module, "bias", None) for member in self.target.linears]
        return sum(bias.nbytes for bias in biases if isinstance(bias, Tensor))

    def _elements(self, choice: Choice) -> tuple[int, int]:
        """How many numbers the choice's weight or factors hold, and how many scales go with them."""
        if choice.rank is None:
            return self.weight.numel(), self.rows
        return choice.rank * (self.rows + self.columns), choice.rank

    def bytes(self, choice: Choice) -> int:
        """Bytes of the tensors that the file will hold for this choice (codes, scales, factors, biases)."""
        numbers, scales = self._elements(choice)
        body = numbers + 4 * scales if choice.rounded else numbers * self.weight.element_size()
        return body + self._bias_bytes

    def ranks(self, format: str, scheme: str | None = None) -> list[int]:
        """The ranks worth offering, below the one at which the format stops being the smallest.

        Half of them evenly spread, half at evenly spread logarithms of the error: where a spectrum falls fast, that is where plans differ.
        """
        ceiling = self.bytes(Choice("dense"))
        if format == "lowrank-int8":
            ceiling = min(self.bytes(Choice("int8")), ceiling)
        per_rank = self.bytes(Choice(format, 1, scheme=scheme)) - self._bias_bytes
        largest = min((ceiling - self._bias_bytes - 1) // per_rank, self.max_rank(scheme))
        if largest <= RANKS_PER_FORMAT:
            return list(range(1, largest + 1))
        # Multiples of 8 are what integer kernels are laid out for; on small layers that grid would be too coarse.
        step = 8 if largest >= 256 else 4 if largest >= 128 else 1
        half = RANKS_PER_FORMAT // 2
        wanted = {largest * index // half for index in range(1, half + 1)}
        errors = self.errors(scheme)[1 : largest + 1].clamp_min(torch.finfo(torch.float32).tiny).log()
        levels = torch.linspace(float(errors[0]), float(errors[-1]), half, dtype=errors.dtype)
        wanted |= {int((errors <= level).nonzero()[0]) + 1 for level in levels}
        return sorted({max(rank // step * step, step) for rank in wanted})

    def by_size(self, format: str) -> list[Choice]:
        """The factored choices of a format, growing in bytes, without those that a smaller one beats in error."""
        every = [Choice(format, rank, scheme=scheme) for scheme in self.schemes for rank in self.ranks(format, scheme)]
        kept: list[Choice] = []
        for choice in sorted(every, key=lambda choice: (self.bytes(choice), self.truncation(choice))):
            if not kept or self.truncation(choice) < self.truncation(kept[-1]):
                kept.append(choice)
        return kept

    def modes(self, activations: str) -> tuple[str | None, ...]:
        """How a rounded layer may take its activations where ``activations`` is asked for ("auto": both ways)."""
        if not self.target.linears:
            return (None,)
        return ("int8", "float") if activations == "auto" else (activations,)

    def choices(self, formats: Sequence[str], activations: str, *, never_below_int8: bool = False) -> list[Choice]:
        """Every choice smaller than the dense layer."""
        modes = self.modes(activations)
        formats = [name for name in formats if name in self.formats]
        found = [Choice("int8", None, 8, mode) for mode in modes] if "int8" in formats else []
        if not never_below_int8 and "lowrank" in formats:
            found += self.by_size("lowrank")
        if not never_below_int8 and "lowrank-int8" in formats:
            found += [
                replace(choice, bits=8, activations=mode) for choice in self.by_size("lowrank-int8") for mode in modes
            ]
        dense = self.bytes(Choice("dense"))
        return [choice for choice in found if self.bytes(choice) < dense]

    def build(self, choice: Choice) -> dict[str, nn.Module]:
        """The new module of each member, by the member's first name; built once. For "dense" the original modules."""
        if choice.format == "dense":
            return {member.name: member.module for member in self.target.members}
        if choice not in self._built:
            self._built[choice] = self._build(choice)
        return self._built[choice]

    def keep_only(self, choice: Choice) -> None:
        """Forget the layers built for other choices."""
        self._built = {key: built for key, built in self._built.items() if key == choice}

    def _build(self, choice: Choice) -> dict[str, nn.Module]:
        factors = self.factors(choice.rank) if choice.rank is not None else None
        built: dict[str, nn.Module] = {}
        for member in self.target.members:
            layer = _layer(member.module, choice, factors)
            for first in list(built.values())[:1]:
                _share(first, layer)
            built[member.name] = layer
        return built


def _layer(module: nn.Module, choice: Choice, factors: Factors | None) -> CompressedLayer:
    bits, activations = choice.bits or 8, choice.activations or "int8"
    if isinstance(module, nn.Embedding):
        if factors is None:
            return QuantizedEmbedding.from_embedding(module, bits=bits)
        if choice.format == "lowrank":
            return LowRankEmbedding.from_factors(factors, module)
        return QuantizedLowRankEmbedding.from_factors(factors, module, bits=bits)
    if factors is None:
        return QuantizedLinear.from_linear(module, bits=bits, activations=activations)
    layer = SVDCompressedLinear.from_factors(factors, module)
    if choice.format == "lowrank":
        return layer
    if choice.format == "lowrank-int8":
        return QuantizedLowRankLayer.from_factors(layer, bits=bits, activations=activations)
    raise UsageError(f"format: unknown {choice.format!r}; this version knows dense, {', '.join(FORMATS)}")


def _share(owner: nn.Module, alias: nn.Module) -> None:
    """Make a tied layer hold the owner's tensors themselves."""
    for name in ("codes", "left_codes", "right_codes", "scale", "left", "right"):
        if hasattr(alias, name) and hasattr(owner, name):
            setattr(alias, name, getattr(owner, name))
