"""A linear layer as int8 codes with one scale an output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowrank.layers.base import check_activations, check_size, dtype_from_name
from lowrank.layers.integer import IntegerLinear
from lowrank.layers.source import linear_parts
from lowrank.numerics.rounding import check_bits, dequantize_rows, quantize_rows, rounding_bound

__all__ = ["QuantizedLinear"]


class QuantizedLinear(IntegerLinear):
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

    _format: ClassVar[str] = "int8"
    codes: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        n_bits: int = 8,
        activations: str = "int8",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = check_size(in_features, "in_features")
        self.out_features = check_size(out_features, "out_features")
        self.n_bits = check_bits(n_bits, "n_bits")
        self.activations = check_activations(activations)
        self.register_buffer("codes", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.ones(out_features, dtype=torch.float32, device=device))
        self.allocate_bias(bias, device, dtype)
        self.error_bound_value = None

    @classmethod
    def from_linear(cls, linear: nn.Module, *, bits: int = 8, activations: str = "int8") -> QuantizedLinear:
        """Round the weight of ``nn.Linear`` or transformers' ``Conv1D``; see
        :func:`lowrank.numerics.rounding.quantize_rows`.

        Raises:
            RankError: bits outside 2 to 8, or an empty weight.
            NumericsError: NaN or Inf in the weight.
        """
        weight, bias = linear_parts(linear)
        codes, scale = quantize_rows(weight, bits)
        layer = cls.from_tensors(codes, scale, bias, bits=bits, activations=activations, dtype=weight.dtype)
        used = scale[(codes != 0).any(dim=1)]
        # Rows too small for their scale round to nothing: what they held counts whole.
        lost = weight.detach().double()[(codes == 0).all(dim=1)]
        layer.error_bound_value = rounding_bound(used, weight.shape[1]) + float(torch.linalg.vector_norm(lost))
        return layer.train(linear.training)

    @classmethod
    def from_tensors(
        cls,
        codes: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
        *,
        bits: int = 8,
        activations: str = "int8",
        dtype: torch.dtype | None = None,
    ) -> QuantizedLinear:
        """A layer that holds these very tensors (an embedding may share them); the bias is copied.

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

    def codes_and_scale(self) -> tuple[Tensor, ...]:
        """Codes and scale."""
        return self.codes, self.scale

    def codes_to_multiply(self) -> tuple[Tensor, ...]:
        """See :meth:`IntegerLinear.codes_to_multiply`."""
        return (self.codes,)

    def in_graph(self, x: Tensor) -> Tensor:
        """See :meth:`IntegerLinear.in_graph`."""
        result: Tensor = torch.ops.lowrank.int8_linear(x, self.codes, self.scale, self.bias, self.activations)
        return result

    @staticmethod
    def input_gradient(gradient: Tensor, *tensors: Tensor) -> Tensor:
        """``(gradient · scale) @ codes``."""
        codes, scale = tensors
        working = torch.float64 if gradient.dtype is torch.float64 else torch.float32
        return ((gradient.to(working) * scale) @ codes.to(working)).to(gradient.dtype)

    def dense_weight(self) -> Tensor:
        """``codes · scale``, (out, in) float32."""
        return dequantize_rows(self.codes, self.scale)

    def dequantize(self) -> nn.Linear:
        """A dense layer of the rounded weight, in the dtype of the model."""
        linear: nn.Linear = torch.nn.utils.skip_init(
            nn.Linear,
            self.in_features,
            self.out_features,
            self.bias is not None,
            device=self.codes.device,
            dtype=self.dtype,
        )
        with torch.no_grad():
            linear.weight.copy_(self.dense_weight())
            if self.bias is not None:
                linear.bias.copy_(self.bias)
                linear.bias.requires_grad_(self.bias.requires_grad)
        return linear.train(self.training)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], device: torch.device | str | None = None) -> QuantizedLinear:
        """See :meth:`CompressedLayer.from_config`."""
        outputs, inputs = config["shape"]
        dtype = dtype_from_name(config["dtype"])
        layer = cls(inputs, outputs, config["bias"], config["bits"], config["activations"], device, dtype)
        layer.error_bound_value = config["error_bound"]
        return layer
