"""A linear layer as two int8 factors with one scale a rank component between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowrank.layers.checks import INTEGER_ACTIVATIONS, check_activations
from lowrank.layers.factors import dense_product, round_factors
from lowrank.layers.linear import SVDCompressedLinear
from lowrank.layers.linear_integer import IntegerLinear
from lowrank.layers.source import choose_rank, error_in, linear_parts
from lowrank.layers.weights import FactorCodes
from lowrank.numerics.factors import check_rank, factorize
from lowrank.numerics.moments import InputStatistics
from lowrank.numerics.rounding import check_bits

__all__ = ["QuantizedLowRankLayer"]


class QuantizedLowRankLayer(FactorCodes, IntegerLinear):
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

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        n_bits: int = 8,
        activations: str = INTEGER_ACTIVATIONS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._set_features(in_features, out_features)
        rank = check_rank(rank, min(in_features, out_features))
        self.activations = check_activations(activations)
        codes = {"left_codes": (out_features, rank), "right_codes": (rank, in_features)}
        self._allocate_codes(codes, rank, n_bits, device)
        self.allocate_bias(bias, device, dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        rank: int | None = None,
        max_error: float | None = None,
        bits: int = 8,
        statistics: InputStatistics | None = None,
        activations: str = INTEGER_ACTIVATIONS,
        ridge: float = 0.0,
    ) -> QuantizedLowRankLayer:
        """Make the rounded layer of this rank, or of the smallest rank whose error, rounding included, is within
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
        cls, layer: SVDCompressedLinear, *, bits: int = 8, activations: str = INTEGER_ACTIVATIONS
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
        activations: str = INTEGER_ACTIVATIONS,
        dtype: torch.dtype | None = None,
    ) -> QuantizedLowRankLayer:
        """Make a layer that holds these very tensors (an embedding may share them); the bias is copied.

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
        """Compute ``((gradient @ left_codes) · scale) @ right_codes``."""
        left, right, scale = tensors
        working = torch.float64 if gradient.dtype is torch.float64 else torch.float32
        components = (gradient.to(working) @ left.to(working)) * scale
        return (components @ right.to(working)).to(gradient.dtype)

    def dequantize(self) -> SVDCompressedLinear:
        """Make a low-rank layer of the rounded factors, in the dtype of the model."""
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

    def _from_floats(self, floats: Any) -> QuantizedLowRankLayer:
        codes = round_factors(floats.left, floats.right, self.n_bits)
        how: dict[str, Any] = {"bits": self.n_bits, "activations": self.activations, "dtype": self.dtype}
        return self.from_tensors(*codes[:3], floats.bias, **how)
