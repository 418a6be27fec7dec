"""A linear layer as int8 codes with one scale an output."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowrank.layers.checks import INTEGER_ACTIVATIONS, check_activations
from lowrank.layers.linear_integer import IntegerLinear
from lowrank.layers.source import linear_parts
from lowrank.layers.weights import RowCodes
from lowrank.numerics.rounding import quantize_rows

__all__ = ["QuantizedLinear"]


class QuantizedLinear(RowCodes, IntegerLinear):
    """``y = scale · (x @ codesᵀ) + bias``: the weight is ``codes · scale`` row by row.

    Args:
        in_features, out_features: of the layer.
        bias: whether there is one.
        n_bits: bits of a code, 2 to 8; each is stored in a byte.
        activations: ``"int8"`` or ``"float"``, see :class:`IntegerLinear`.
        device: of all tensors.
        dtype: of the bias.

    Attributes:
        codes: (out, in) int8 buffer.
        scale: (out,) float32 buffer.

    Raises:
        RankError: a size or number of bits out of range.
        UsageError: unknown activations.

    Example:
        >>> layer = QuantizedLinear.from_linear(nn.Linear(6, 4))
        >>> layer(torch.zeros(2, 6)).shape, layer.codes.dtype
        (torch.Size([2, 4]), torch.int8)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        n_bits: int = 8,
        activations: str = INTEGER_ACTIVATIONS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._set_features(in_features, out_features)
        self.activations = check_activations(activations)
        self._allocate_codes({"codes": (out_features, in_features)}, out_features, n_bits, device)
        self.allocate_bias(bias, device, dtype)

    @classmethod
    def from_linear(
        cls, linear: nn.Module, *, bits: int = 8, activations: str = INTEGER_ACTIVATIONS
    ) -> QuantizedLinear:
        """Round the weight of ``nn.Linear`` or transformers' ``Conv1D``; see
        :func:`lowrank.numerics.rounding.quantize_rows`.

        Raises:
            RankError: bits outside 2 to 8, or an empty weight.
            NumericsError: NaN or Inf in the weight.
        """
        weight, bias = linear_parts(linear)
        codes, scale = quantize_rows(weight, bits)
        layer = cls.from_tensors(codes, scale, bias, bits=bits, activations=activations, dtype=weight.dtype)
        layer._bound_error_from(weight)
        return layer.train(linear.training)

    @classmethod
    def from_tensors(
        cls,
        codes: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
        *,
        bits: int = 8,
        activations: str = INTEGER_ACTIVATIONS,
        dtype: torch.dtype | None = None,
    ) -> QuantizedLinear:
        """Make a layer that holds these very tensors (an embedding may share them); the bias is copied.

        Args:
            codes: (out, in) int8.
            scale: (out,) float32.
            dtype: of the bias; default the given bias's.
        """
        outputs, inputs = codes.shape
        dtype = dtype or (None if bias is None else bias.dtype)
        layer = cls(inputs, outputs, bias is not None, bits, activations, "meta", dtype)
        layer.codes, layer.scale = codes, scale
        layer.allocate_bias(bias is not None, codes.device, dtype)
        layer.take_bias(bias)
        return layer

    def codes_to_multiply(self) -> tuple[Tensor, ...]:
        """See :meth:`IntegerLinear.codes_to_multiply`."""
        return (self.codes,)

    def in_graph(self, x: Tensor) -> Tensor:
        """See :meth:`IntegerLinear.in_graph`."""
        result: Tensor = torch.ops.lowrank.int8_linear(x, self.codes, self.scale, self.bias, self.activations)
        return result

    @staticmethod
    def input_gradient(gradient: Tensor, *tensors: Tensor) -> Tensor:
        """Compute ``(gradient · scale) @ codes``."""
        codes, scale = tensors
        working = torch.float64 if gradient.dtype is torch.float64 else torch.float32
        return ((gradient.to(working) * scale) @ codes.to(working)).to(gradient.dtype)

    def dequantize(self) -> nn.Linear:
        """Make a dense layer of the rounded weight, in the dtype of the model."""
        return self._dense(self.codes.device)

    def _from_floats(self, floats: nn.Module) -> QuantizedLinear:
        return self.from_linear(floats, bits=self.n_bits, activations=self.activations)
