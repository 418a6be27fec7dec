"""A linear layer of packed codes of 2 to 8 bits, in groups of inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.kernels.packed import PackedWeight
from lowrank.layers.checks import FLOAT_ACTIVATIONS
from lowrank.layers.linear_integer import IntegerLinear
from lowrank.layers.packed import PackedCodes
from lowrank.layers.source import linear_parts
from lowrank.numerics.rounding_methods import NEAREST, ROUNDINGS, Grid, Rounded

__all__ = ["PackedLinear", "packed_input_gradient"]


class PackedLinear(PackedCodes, IntegerLinear):
    """``y = x @ Wᵀ + bias`` with ``W = scale · (code − zero)``, multiplied from the packed codes.

    Args:
        in_features, out_features: of the layer.
        bias: whether there is one.
        n_bits: bits of a code, 2 to 8.
        group: inputs that share a scale: 32, 64, 128, or ``None`` for a whole row.
        zero_point: whether each group has a zero of its own.
        activations: ``"float"``: weight-only; there is no other way.
        scale_dtype: float16 or float32.
        device: of all tensors.
        dtype: of the bias.

    Attributes:
        codes, scale, zero_point, grid: see :class:`PackedCodes`.

    Raises:
        RankError: a size or number of bits out of range.
        UsageError: unknown activations or group.

    Example:
        >>> layer = PackedLinear.from_linear(nn.Linear(64, 4), bits=4, group=32)
        >>> layer(torch.zeros(2, 64)).shape, layer.codes.shape, layer.scale.shape, layer.stored_bytes
        (torch.Size([2, 4]), torch.Size([4, 32]), torch.Size([4, 2]), 160)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        n_bits: int = 4,
        group: int | None = 64,
        zero_point: bool = False,
        activations: str = FLOAT_ACTIVATIONS,
        scale_dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._set_features(in_features, out_features)
        self.activations = activations
        self._allocate_packed(Grid(n_bits, group, zero_point), scale_dtype, device)
        self.allocate_bias(bias, device, dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        bits: int = 4,
        group: int | None = 64,
        zero_point: bool = False,
        activations: str = FLOAT_ACTIVATIONS,
        rounding: str = NEAREST,
        moment: Tensor | None = None,
    ) -> PackedLinear:
        """Round the weight of ``nn.Linear`` or transformers' ``Conv1D``.

        Args:
            rounding: a name out of :data:`lowrank.numerics.rounding_methods.ROUNDINGS`.
            moment: Σ of the inputs, (in, in), for methods that use it.

        Raises:
            RankError: bits outside 2 to 8.
            NumericsError: NaN or Inf in the weight.
        """
        weight, _ = linear_parts(linear)
        grid = Grid(bits, group, zero_point)
        return cls.from_rounded(ROUNDINGS[rounding](weight, grid, moment), linear, grid=grid, activations=activations)

    @classmethod
    def from_rounded(
        cls, rounded: Rounded, linear: nn.Module, *, grid: Grid, activations: str = FLOAT_ACTIVATIONS
    ) -> PackedLinear:
        """Make the layer of codes that were chosen for a linear layer, whose bias is copied."""
        weight, bias = linear_parts(linear)
        outputs, inputs = weight.shape
        layer = cls(
            inputs,
            outputs,
            bias is not None,
            grid.bits,
            grid.group,
            grid.zero_point,
            activations,
            rounded.scale.dtype,
            "meta",
            weight.dtype,
        )
        layer._hold(rounded, weight)
        layer.allocate_bias(bias is not None, weight.device, weight.dtype)
        layer.take_bias(bias)
        return layer.train(linear.training)

    def derive(self) -> PackedWeight:
        """See :meth:`IntegerLayer.derive`."""
        return self.packed_weight()

    def in_graph(self, x: Tensor) -> Tensor:
        """See :meth:`IntegerLinear.in_graph`."""
        result: Tensor = torch.ops.lowrank.packed_linear(
            x,
            self.codes,
            self.scale,
            self.zero_point,
            self.bias,
            self.n_bits,
            self.grid.group or 0,
        )
        return result

    def _multiply(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        result: Tensor = self.prepared().product(x, bias)
        return result

    def gradient_through(self) -> Callable[..., Tensor]:
        """See :meth:`IntegerLinear.gradient_through`."""
        return self._input_gradient

    def _input_gradient(self, gradient: Tensor, *tensors: Tensor) -> Tensor:
        codes, scale, zero = tensors[0], tensors[-1], tensors[1] if len(tensors) == 3 else None
        return packed_input_gradient(gradient, codes, scale, zero, self.grid, self.in_features)

    def dequantize(self) -> nn.Linear:
        """Make a dense layer of the rounded weight, in the dtype of the model."""
        return self._dense(self.codes.device)

    def _from_floats(self, floats: Any) -> PackedLinear:
        return self.from_rounded(
            self._nearest_here(floats.weight), floats, grid=self.grid, activations=self.activations
        )


def packed_input_gradient(
    gradient: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid, columns: int
) -> Tensor:
    """Compute ``gradient @ W`` for (M, out), in its dtype, some hundred rows of the weight at a time.

    Args:
        codes, scale, zero: as a :class:`PackedLinear` holds them.
    """
    working = torch.float64 if gradient.dtype is torch.float64 else torch.float32
    weight = PackedWeight(codes, scale, zero, bits=grid.bits, group=grid.group, columns=columns)
    left = gradient.to(working)
    found = left.new_zeros(left.shape[0], columns)
    for rows in torch.arange(codes.shape[0], device=codes.device).split(_ROWS_AT_ONCE):
        found += left[:, rows] @ weight.rows(rows, working)
    return found.to(gradient.dtype)


_ROWS_AT_ONCE = 512
