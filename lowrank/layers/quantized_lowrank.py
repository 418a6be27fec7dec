"""A linear layer as two int8 factors with one scale a rank component between them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lowrank.errors import NumericsError
from lowrank.layers.base import check_activations, check_size, dtype_from_name
from lowrank.layers.integer import IntegerLinear
from lowrank.layers.linear import SVDCompressedLinear
from lowrank.layers.source import choose_rank, error_in, linear_parts
from lowrank.numerics.factors import check_rank, factorize
from lowrank.numerics.moments import InputStatistics
from lowrank.numerics.rounding import SMALLEST_SCALE, check_bits, largest_code, require_finite

__all__ = ["QuantizedLowRankLayer", "RoundedFactors", "dense_product", "round_factors"]


class RoundedFactors(NamedTuple):
    """Codes and scale of two factors, and a bound of ‖left @ right − their product‖_F."""

    left_codes: Tensor
    right_codes: Tensor
    scale: Tensor
    bound: float


def round_factors(left: Tensor, right: Tensor, bits: int = 8) -> RoundedFactors:
    """Round both factors, every rank component to the full range of the codes, with one scale for the pair.

    ``scale[j] = max|left[:, j]| · max|right[j, :]| / q²``, q the largest code. The bound holds each rounding error to
    half a step: with e = ½ step, ‖ΔL R‖²_F = Σ_i ΔL_i G ΔL_iᵀ ≤ m · eᵀ|G|e, G = R Rᵀ, and likewise ‖L̂ ΔR‖_F with
    L̂ᵀL̂.

    Args:
        left: (out, r).
        right: (r, in).
        bits: 2 to 8.

    Raises:
        RankError: bits out of range.
        NumericsError: NaN, Inf, or a component too large for a float32 scale.

    Example:
        >>> rounded = round_factors(torch.tensor([[1.0], [-0.5]]), torch.tensor([[127.0, 0.0]]))
        >>> rounded.left_codes.tolist(), rounded.right_codes.tolist(), rounded.scale.tolist()
        ([[127], [-64]], [[127, 0]], [0.007874015718698502])
    """
    limit = largest_code(bits)
    left = require_finite(left.detach(), "left").double()
    right = require_finite(right.detach(), "right").double()
    left_step = left.abs().amax(dim=0) / limit
    right_step = right.abs().amax(dim=1) / limit
    used = (left_step > 0) & (right_step > 0)
    # A component with a zero side is zero: codes 0, scale 1.
    left_step = torch.where(used, left_step, torch.ones_like(left_step))
    right_step = torch.where(used, right_step, torch.ones_like(right_step))
    wanted = left_step * right_step
    scale = wanted.clamp_min(SMALLEST_SCALE).to(torch.float32)
    if not bool(torch.isfinite(scale).all()):
        raise NumericsError(
            "left, right: a rank component is too large for a float32 scale; rescale the layer or leave it dense"
        )
    # What rounding to float32 (or the smallest scale) changed goes into one side, so that the product keeps its size.
    right_step = right_step * (scale.double() / wanted)
    left_codes = (left / left_step).round_().clamp_(-limit, limit).mul_(used)
    right_codes = (right / right_step[:, None]).round_().clamp_(-limit, limit).mul_(used[:, None])
    # An entry that rounding the scale pushed past the largest code is clamped: at most 128 eps of a step more.
    slack = 1.0 + 256.0 * torch.finfo(torch.float32).eps
    half_left, half_right = 0.5 * left_step * used, 0.5 * slack * right_step * used
    rounded_left = left_codes * left_step
    bound = math.sqrt(left.shape[0] * float(half_left @ (right @ right.T).abs() @ half_left))
    bound += math.sqrt(right.shape[1] * float(half_right @ (rounded_left.T @ rounded_left).abs() @ half_right))
    return RoundedFactors(left_codes.to(torch.int8), right_codes.to(torch.int8), scale, bound)


def dense_product(left_codes: Tensor, right_codes: Tensor, scale: Tensor) -> Tensor:
    """``left_codes · diag(scale) · right_codes`` in float64."""
    return (left_codes.double() * scale.double()) @ right_codes.double()


class QuantizedLowRankLayer(IntegerLinear):
    """``y = (scale · (x @ right_codesᵀ)) @ left_codesᵀ + bias``, both products on integers.

    Args:
        in_features, out_features, rank: of the layer; rank from 1 to min(out, in).
        bias: whether there is one.
        n_bits: bits of a code, 2 to 8; each is stored in a byte.
        activations: ``"int8"`` or ``"float"``, see :class:`IntegerLinear`.
        device: of all tensors.
        dtype: of the bias.

    Attributes:
        left_codes: (out, rank) int8 buffer.
        right_codes: (rank, in) int8 buffer.
        scale: (rank,) float32 buffer.

    Raises:
        RankError: a rank, size or number of bits out of range.
        UsageError: unknown activations.

    Example:
        >>> layer = QuantizedLowRankLayer.from_linear(nn.Linear(6, 4), rank=2)
        >>> layer(torch.zeros(2, 6)).shape, layer.stored_bytes
        (torch.Size([2, 4]), 44)
    """

    _format: ClassVar[str] = "lowrank-int8"
    left_codes: Tensor
    right_codes: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        n_bits: int = 8,
        activations: str = "int8",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = check_size(in_features, "in_features")
        self.out_features = check_size(out_features, "out_features")
        rank = check_rank(rank, min(in_features, out_features))
        self.n_bits = check_bits(n_bits, "n_bits")
        self.activations = check_activations(activations)
        self.register_buffer("left_codes", torch.zeros(out_features, rank, dtype=torch.int8, device=device))
        self.register_buffer("right_codes", torch.zeros(rank, in_features, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.ones(rank, dtype=torch.float32, device=device))
        self.allocate_bias(bias, device, dtype)
        self.error_bound_value = None

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        rank: int | None = None,
        max_error: float | None = None,
        bits: int = 8,
        statistics: InputStatistics | None = None,
        activations: str = "int8",
        ridge: float = 0.0,
    ) -> QuantizedLowRankLayer:
        """The rounded layer of this rank, or of the smallest rank whose error, rounding included, is within
        ``max_error``.

        Args:
            linear: ``nn.Linear`` or transformers' ``Conv1D``.
            rank, max_error, statistics, ridge: as :meth:`SVDCompressedLinear.from_linear`.
            bits: 2 to 8.
            activations: ``"int8"`` or ``"float"``.

        Raises:
            RankError: rank or bits out of range, or no rank is within ``max_error``.
            NumericsError: NaN or Inf in the weight.
        """
        check_bits(bits)
        weight, bias = linear_parts(linear)
        centred = bias is not None
        curve = factorize(weight, statistics, ridge=ridge, shift_bias=centred)

        def measure(candidate: int) -> float:
            factors = curve.factors(candidate)
            rounded = round_factors(factors.left, factors.right, bits)
            return error_in(weight, dense_product(*rounded[:3]), statistics, centred=centred, ridge=ridge)

        chosen = curve.factors(choose_rank(curve, rank, max_error, measure))
        return cls.from_factors(SVDCompressedLinear.from_factors(chosen, linear), bits=bits, activations=activations)

    @classmethod
    def from_factors(
        cls, layer: SVDCompressedLinear, *, bits: int = 8, activations: str = "int8"
    ) -> QuantizedLowRankLayer:
        """Round the factors of a low-rank layer; bias, mode and dtype are carried over."""
        rounded = round_factors(layer.left, layer.right, bits)
        quantized = cls.from_tensors(
            *rounded[:3], layer.bias, bits=bits, activations=activations, dtype=layer.left.dtype
        )
        quantized.error_bound_value = rounded.bound + (layer.truncation_error or 0.0)
        return quantized.train(layer.training)

    @classmethod
    def from_tensors(
        cls,
        left_codes: Tensor,
        right_codes: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
        *,
        bits: int = 8,
        activations: str = "int8",
        dtype: torch.dtype | None = None,
    ) -> QuantizedLowRankLayer:
        """A layer that holds these very tensors (an embedding may share them); the bias is copied.

        Args:
            left_codes: (out, rank) int8.
            right_codes: (rank, in) int8.
            scale: (rank,) float32.
            dtype: of the bias; default the given bias's.
        """
        (outputs, rank), inputs = left_codes.shape, right_codes.shape[1]
        dtype = dtype or (None if bias is None else bias.dtype)
        layer = cls(inputs, outputs, rank, bias is not None, bits, activations, "meta", dtype)
        layer.left_codes, layer.right_codes, layer.scale = left_codes, right_codes, scale
        layer.allocate_bias(bias is not None, left_codes.device, dtype)
        layer.take_bias(bias)
        return layer

    @property
    def rank(self) -> int:
        """Number of rank components."""
        return self.left_codes.shape[1]

    def codes_and_scale(self) -> tuple[Tensor, ...]:
        """Left codes, right codes and scale."""
        return self.left_codes, self.right_codes, self.scale

    def codes_to_multiply(self) -> tuple[Tensor, ...]:
        """See :meth:`IntegerLinear.codes_to_multiply`."""
        return self.right_codes, self.left_codes

    def in_graph(self, x: Tensor) -> Tensor:
        """See :meth:`IntegerLinear.in_graph`."""
        result: Tensor = torch.ops.lowrank.lowrank_int8_linear(
            x, self.left_codes, self.right_codes, self.scale, self.bias, self.activations
        )
        return result

    @staticmethod
    def input_gradient(gradient: Tensor, *tensors: Tensor) -> Tensor:
        """``((gradient @ left_codes) · scale) @ right_codes``."""
        left, right, scale = tensors
        working = torch.float64 if gradient.dtype is torch.float64 else torch.float32
        components = (gradient.to(working) @ left.to(working)) * scale
        return (components @ right.to(working)).to(gradient.dtype)

    def dense_weight(self) -> Tensor:
        """``left_codes · diag(scale) · right_codes``, (out, in) float32, multiplied in float64."""
        return dense_product(self.left_codes, self.right_codes, self.scale).to(torch.float32)

    def dequantize(self) -> SVDCompressedLinear:
        """A low-rank layer of the rounded factors, in the dtype of the model."""
        layer = SVDCompressedLinear(
            self.in_features, self.out_features, self.rank, self.bias is not None, "meta", self.dtype
        ).to_empty(device=self.left_codes.device)
        root = self.scale.double().sqrt()
        with torch.no_grad():
            layer.left.copy_(self.left_codes.double() * root)
            layer.right.copy_(self.right_codes.double() * root[:, None])
            if self.bias is not None and layer.bias is not None:
                layer.bias.copy_(self.bias)
                layer.bias.requires_grad_(self.bias.requires_grad)
        return layer.train(self.training)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], device: torch.device | str | None = None) -> QuantizedLowRankLayer:
        """See :meth:`CompressedLayer.from_config`."""
        outputs, inputs = config["shape"]
        dtype = dtype_from_name(config["dtype"])
        layer = cls(
            inputs, outputs, config["rank"], config["bias"], config["bits"], config["activations"], device, dtype
        )
        layer.error_bound_value = config["error_bound"]
        return layer
