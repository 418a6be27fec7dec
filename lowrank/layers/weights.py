"""The ways in which a layer holds its weight: two float factors, two factors of codes, or one matrix of codes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from lowrank.errors import RankError, UsageError
from lowrank.layers.base import CompressedLayer
from lowrank.layers.factors import balanced, dense_product, round_factors, rounded_in_best_basis
from lowrank.layers.roles import ScaleForm
from lowrank.numerics.factors import Factors, factorize
from lowrank.numerics.rounding import check_bits, dequantize_rows, largest_code, quantize_rows, rounding_bound

__all__ = [
    "Codes",
    "FactorCodes",
    "FactoredWeight",
    "FloatFactors",
    "RowCodes",
    "joined",
    "matrix_for",
    "split",
    "straight_through",
]

_Factored = TypeVar("_Factored", bound="FactoredWeight")
_Floats = TypeVar("_Floats", bound="FloatFactors")
_Codes = TypeVar("_Codes", bound="FactorCodes")
_Rows = TypeVar("_Rows", bound="RowCodes")


class FactoredWeight(CompressedLayer):
    """Base of the layers whose weight is made of two factors, stored as matrices or as the kernels of two convolutions."""

    @property
    def is_product(self) -> bool:
        """Whether the weight, as a matrix (out, in · kernel), is the product of the two."""
        return True

    def with_weight(self: _Factored, weight: Tensor) -> _Factored:
        """Factor another weight; see :meth:`CompressedLayer.with_weight`."""
        factors = factorize(matrix_for(self, weight), shift_bias=False).factors(self._components)
        return self.with_factors(factors.left, factors.right)

    def with_factors(self: _Factored, left: Tensor, right: Tensor) -> _Factored:
        """See :meth:`CompressedLayer.with_factors`."""
        raise NotImplementedError

    @property
    def _components(self) -> int:
        assert self.rank is not None
        return self.rank

    def _stored(self, left: Tensor, right: Tensor, method: str) -> tuple[Tensor, Tensor]:
        """Two factors (out, r) and (r, in · kernel) in the orientation in which they are stored."""
        if not self.is_product:
            raise UsageError(
                f"{method}: this {self.kind} (scheme {self.scheme!r}) is no product of two matrices; give it a weight by with_weight"
            )
        return (right.T, left.T) if self.looks_up else (left, right)


class FloatFactors(FactoredWeight):
    """Base of the layers with two float factors.

    Attributes:
        left, right: the factors, (out, rank) and (rank, in) or kernels.
        truncation_error: ‖W − W'‖_F of the weight it was made from; ``None`` for one made from scratch.
    """

    left: nn.Parameter
    right: nn.Parameter
    truncation_error: float | None = None

    @property
    def rank(self) -> int:
        """Number of rank components (of each group)."""
        return self.left.shape[1]

    @property
    def weight_names(self) -> tuple[str, ...]:
        """See :meth:`CompressedLayer.weight_names`."""
        return "left", "right"

    def factors(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor] | None:
        """See :meth:`CompressedLayer.factors`."""
        if not self.is_product:
            return None
        left, right = self.left.detach().to(dtype).flatten(1), self.right.detach().to(dtype).flatten(1)
        return (right.T, left.T) if self.looks_up else (left, right)

    def with_factors(self: _Floats, left: Tensor, right: Tensor) -> _Floats:
        """See :meth:`CompressedLayer.with_factors`."""
        return self._of_matrices(*balanced(Factors(*self._stored(left, right, "with_factors")), self.left.dtype))

    def appended(self: _Floats, left: Tensor, right: Tensor, rows: Tensor | None = None) -> _Floats:
        """See :meth:`CompressedLayer.appended`."""
        added = balanced(Factors(*self._stored(left, right, "appended")), self.left.dtype)
        kept = [self.left.detach().flatten(1), self.right.detach().flatten(1)]
        if rows is not None:
            # Outputs are the columns of an embedding's right side.
            side, gains = (1, rows) if self.looks_up else (0, rows[:, None])
            kept[side] = (kept[side].double() * gains).to(kept[side].dtype)
        return self._of_matrices(torch.cat([kept[0], added[0]], dim=1), torch.cat([kept[1], added[1]]))

    def _of_matrices(self: _Floats, left: Tensor, right: Tensor) -> _Floats:
        layer = self._like(left.shape[1], left.device)
        with torch.no_grad():
            layer.left.copy_(left.reshape(layer.left.shape)).requires_grad_(self.left.requires_grad)
            layer.right.copy_(right.reshape(layer.right.shape)).requires_grad_(self.right.requires_grad)
        return layer

    def forget_source(self) -> None:
        """See :meth:`CompressedLayer.forget_source`."""
        self.truncation_error = None

    @classmethod
    def _arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return super()._arguments(config) | {"rank": config["rank"]}

    @classmethod
    def _allocate(cls: type[_Floats], arguments: Mapping[str, Any], device: torch.device | str | None) -> _Floats:
        # By way of meta, so that nothing is drawn from the caller's random numbers.
        layer = cls(**arguments, device="meta")
        return layer if str(device) == "meta" else layer.to_empty(device=device or "cpu")


class Codes(CompressedLayer):
    """Base of the layers whose weight is held as codes, with a float32 scale for each row or component.

    Attributes:
        scale: float32 buffer.
        n_bits: bits of a code, 2 to 8.
        error_bound_value: bound of ‖W − W'‖_F, or ``None`` for a layer made from scratch.
    """

    scale: Tensor
    n_bits: int
    error_bound_value: float | None
    # What an error without a bound says.
    source_words: ClassVar[str] = "a weight; make it from the dense or the factored layer"

    def _allocate_codes(
        self, codes: Mapping[str, Sequence[int]], scales: int, n_bits: int, device: torch.device | str | None
    ) -> None:
        """Register tensors of codes by their shapes, and a scale of so many numbers."""
        self.n_bits = check_bits(n_bits, "n_bits")
        for name, shape in codes.items():
            self.register_buffer(name, torch.zeros(*shape, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.ones(scales, dtype=torch.float32, device=device))
        self.error_bound_value = None

    def codes_and_scale(self) -> tuple[Tensor, ...]:
        """Give the integer tensors and, last, the scale."""
        raise NotImplementedError

    def error_bound(self) -> float:
        """Give a bound of ‖W − W'‖_F, W the weight that the layer was made from: truncation plus half a step of every scale.

        Raises:
            UsageError: the layer was made from scratch, so there is nothing to compare with.
        """
        if self.error_bound_value is None:
            raise UsageError(f"error_bound: this {self.kind} was not made from {self.source_words}")
        return self.error_bound_value

    def config(self) -> dict[str, Any]:
        """See :meth:`CompressedLayer.config`."""
        return super().config() | {"error_bound": self.error_bound_value}

    @classmethod
    def _arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return super()._arguments(config) | {"n_bits": config["bits"]}

    def _restore(self, config: Mapping[str, Any]) -> None:
        self.error_bound_value = config["error_bound"]

    def forget_source(self) -> None:
        """See :meth:`CompressedLayer.forget_source`."""
        self.error_bound_value = None


class RowCodes(Codes):
    """Base of the layers with one matrix or kernel of codes: ``weight[i] = codes[i] · scale[i]``.

    Attributes:
        codes: (rows, …) int8 buffer.
        scale: (rows,) float32 buffer.
    """

    codes: Tensor

    @property
    def weight_names(self) -> tuple[str, ...]:
        """See :meth:`CompressedLayer.weight_names`."""
        return "codes", "scale"

    def scales(self) -> dict[str, ScaleForm]:
        """See :meth:`CompressedLayer.scales`."""
        return {"scale": ScaleForm((self.shape[0],))}

    def codes_and_scale(self) -> tuple[Tensor, ...]:
        """Give codes and scale."""
        return self.codes, self.scale

    def dense_weight(self) -> Tensor:
        """Make ``codes · scale``, of the layer's shape, float32."""
        return dequantize_rows(self.codes.flatten(1), self.scale).view(self.codes.shape)

    def exact_weight(self) -> Tensor:
        """See :meth:`CompressedLayer.exact_weight`."""
        weight = self.codes.double() * self.scale.double().view(-1, *[1] * (self.codes.ndim - 1))
        return weight.T if self.looks_up else weight

    def with_weight(self: _Rows, weight: Tensor) -> _Rows:
        """Round another weight; see :meth:`CompressedLayer.with_weight`."""
        matrix = matrix_for(self, weight)
        codes, scale = quantize_rows(matrix.T if self.looks_up else matrix, self.n_bits)
        layer = self._like(None, scale.device)
        layer.codes, layer.scale = codes.view(layer.codes.shape), scale
        return layer

    def _bound_error_from(self, weight: Tensor) -> None:
        """Note how far the codes can be from the weight, of their shape, that was rounded to them."""
        rows, codes = weight.detach().flatten(1), self.codes.flatten(1)
        used = (codes != 0).any(dim=1)
        # Rows too small for their scale round to nothing: what they held counts whole.
        lost = float(torch.linalg.vector_norm(rows.double()[~used]))
        self.error_bound_value = rounding_bound(self.scale[used], rows.shape[1]) + lost

    def _sharpen(self, floats: nn.Module, dense: nn.Module) -> None:
        """Start training from the numbers before they were rounded, where their rounding is this layer."""
        weight = getattr(dense, "weight", None)
        if not isinstance(dense, (nn.Linear, nn.Conv1d, nn.Conv2d)) or not isinstance(weight, Tensor):
            return
        if weight.shape != self.codes.shape or not bool(torch.isfinite(weight).all()):
            return
        codes, scale = quantize_rows(weight.flatten(1), self.n_bits)
        if torch.equal(codes.view_as(self.codes), self.codes) and torch.equal(scale, self.scale):
            with torch.no_grad():
                floats.get_parameter("weight").copy_(weight)

    def _rounded_weights(self, floats: nn.Module) -> dict[str, Tensor]:
        weight = floats.get_parameter("weight")
        return {"weight": straight_through(weight, tuple(range(1, weight.ndim)), self.n_bits)}


class FactorCodes(FactoredWeight, Codes):
    """Base of the layers with two factors of codes and one scale a rank component between them.

    Attributes:
        left_codes, right_codes: int8 buffers, (out, rank) and (rank, in) or kernels.
        scale: (rank · groups,) float32 buffer.
    """

    left_codes: Tensor
    right_codes: Tensor

    @property
    def rank(self) -> int:
        """Number of rank components (of each group)."""
        return self.left_codes.shape[1]

    @property
    def weight_names(self) -> tuple[str, ...]:
        """See :meth:`CompressedLayer.weight_names`."""
        return "left_codes", "right_codes", "scale"

    def scales(self) -> dict[str, ScaleForm]:
        """See :meth:`CompressedLayer.scales`."""
        return {"scale": ScaleForm((self.rank * self.groups,))}

    def codes_and_scale(self) -> tuple[Tensor, ...]:
        """Give left codes, right codes and scale."""
        return self.left_codes, self.right_codes, self.scale

    def dense_weight(self) -> Tensor:
        """Make ``left_codes · diag(scale) · right_codes``, float32, multiplied in float64."""
        return dense_product(self.left_codes, self.right_codes, self.scale).to(torch.float32)

    def factors(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor] | None:
        """See :meth:`CompressedLayer.factors`; the scales are in the left factor as it is stored."""
        if not self.is_product:
            return None
        left = self.left_codes.to(dtype).flatten(1) * self.scale.to(dtype)
        right = self.right_codes.to(dtype).flatten(1)
        return (right.T, left.T) if self.looks_up else (left, right)

    def with_factors(self: _Codes, left: Tensor, right: Tensor) -> _Codes:
        """Round other factors; see :meth:`CompressedLayer.with_factors`."""
        return self._of_codes(*round_factors(*self._stored(left, right, "with_factors"), self.n_bits)[:3])

    def appended(self: _Codes, left: Tensor, right: Tensor, rows: Tensor | None = None) -> _Codes:
        """Round the new components only; see :meth:`CompressedLayer.appended`."""
        added = self._stored(left, right, "appended")
        if rows is not None:
            raise UsageError(
                f"appended: rows are given, but the codes of a {self.kind} have one scale a component; multiply the factors by "
                "them and round anew by with_factors"
            )
        left_codes, right_codes, scale = rounded_in_best_basis(*added, self.n_bits)[:3]
        left_codes = torch.cat([self.left_codes.flatten(1), left_codes], dim=1)
        right_codes = torch.cat([self.right_codes.flatten(1), right_codes])
        return self._of_codes(left_codes, right_codes, torch.cat([self.scale, scale]))

    def _of_codes(self: _Codes, left_codes: Tensor, right_codes: Tensor, scale: Tensor) -> _Codes:
        """A layer like this one with other codes, given as matrices (… , rank) and (rank, …)."""
        layer = self._like(scale.numel() // self.groups, scale.device)
        layer.left_codes = left_codes.reshape(layer.left_codes.shape).contiguous()
        layer.right_codes = right_codes.reshape(layer.right_codes.shape).contiguous()
        layer.scale = scale
        return layer

    @classmethod
    def _arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return super()._arguments(config) | {"rank": config["rank"]}

    def _rounded_weights(self, floats: nn.Module) -> dict[str, Tensor]:
        left, right = floats.get_parameter("left"), floats.get_parameter("right")
        # A component is a column of the left factor: (groups, out of a group, rank, *kernel).
        parts = left.view(self.groups, -1, *left.shape[1:])
        return {
            "left": straight_through(parts, (1, *range(3, parts.ndim)), self.n_bits).view_as(left),
            "right": straight_through(right, tuple(range(1, right.ndim)), self.n_bits),
        }


def straight_through(values: Tensor, dims: tuple[int, ...], bits: int) -> Tensor:
    """Round to steps of the largest value along these dimensions, with the gradient of the values themselves.

    Example:
        >>> straight_through(torch.tensor([[1.0, 0.4]]), (1,), 2).tolist()
        [[1.0, 0.0]]
    """
    step = values.detach().abs().amax(dim=dims, keepdim=True) / largest_code(bits)
    step = torch.where(step > 0, step, torch.ones_like(step))
    rounded = torch.round(values.detach() / step) * step
    return values + (rounded - values.detach())


def matrix_for(layer: CompressedLayer, weight: Tensor) -> Tensor:
    """Check a weight (out, in, *kernel), flattened or not, against a layer and give it as a matrix (out, in · kernel).

    Raises:
        RankError: another shape.
    """
    rows, *others = layer.shape[::-1] if layer.looks_up else layer.shape
    flat = (rows, math.prod(others))
    if tuple(weight.shape) not in ((rows, *others), flat):
        raise RankError(f"weight: must be of shape {(rows, *others)} for this {layer.kind}, got {tuple(weight.shape)}")
    return weight.detach().reshape(flat)


def joined(weights: Iterable[Tensor]) -> Tensor:
    """Join several weights, flattened, to (1, elements).

    Example:
        >>> joined([torch.ones(1, 2), torch.zeros(1)]).tolist()
        [[1.0, 1.0, 0.0]]
    """
    return torch.cat([weight.flatten() for weight in weights])[None]


def split(weight: Tensor, shapes: Sequence[tuple[int, int]], kind: str) -> list[Tensor]:
    """Take weights apart that :func:`joined` joined.

    Raises:
        RankError: the weight does not hold so many numbers.
    """
    sizes = [rows * columns for rows, columns in shapes]
    if tuple(weight.shape) != (1, sum(sizes)):
        raise RankError(f"weight: must be of shape {(1, sum(sizes))} for this {kind}, got {tuple(weight.shape)}")
    parts = weight.detach()[0].split(sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
