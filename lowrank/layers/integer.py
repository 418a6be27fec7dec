"""What the linear layers with integer codes share: how they are called, and gradients through rounded activations."""

from __future__ import annotations

from operator import is_
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowrank.errors import UsageError
from lowrank.kernels import IntegerWeight
from lowrank.kernels.activations import pieces_for
from lowrank.layers.base import CompressedLayer, check_activations

__all__ = ["IntegerLinear"]


class IntegerLinear(CompressedLayer):
    """Base of the linear layers whose weight is held as int8 codes.

    Attributes:
        activations: ``"int8"`` rounds each token and multiplies integers; ``"float"`` leaves the activations as they
            are
            (weight-only). May be set at any time.
        error_bound_value: bound of ‖W − W'‖_F, or ``None`` for a layer made from scratch.
    """

    _is_integer: ClassVar[bool] = True
    in_features: int
    out_features: int
    bias: nn.Parameter | None
    scale: Tensor

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "activations":
            value = check_activations(value)
        super().__setattr__(name, value)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.out_features, self.in_features

    def codes_and_scale(self) -> tuple[Tensor, ...]:
        """The integer tensors and the scale, as :meth:`input_gradient` takes them."""
        raise NotImplementedError

    def codes_to_multiply(self) -> tuple[Tensor, ...]:
        """The codes in the order of the products."""
        raise NotImplementedError

    def prepared(self) -> IntegerWeight:
        """What is derived from the codes and the scale, made anew when one of them is replaced or written to."""
        tensors = self.codes_and_scale()
        versions = [0 if tensor.is_inference() else tensor._version for tensor in tensors]
        kept: tuple[tuple[Tensor, ...], list[int], IntegerWeight] | None = self.__dict__.get("_derived")
        if kept is not None and kept[1] == versions and all(map(is_, kept[0], tensors)):
            return kept[2]
        made = IntegerWeight(self.codes_to_multiply(), tensors[-1])
        self.__dict__["_derived"] = (tensors, versions, made)
        return made

    def in_graph(self, x: Tensor) -> Tensor:
        """:meth:`forward` as one operator, for a graph of torch.compile or torch.export (:mod:`.operators`)."""
        raise NotImplementedError

    @staticmethod
    def input_gradient(gradient: Tensor, *tensors: Tensor) -> Tensor:
        """``gradient @ W'`` for (M, out), in its dtype."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features) of the same dtype; computed in float32 (weight-only float64 in
        float64).

        Gradients reach the input, as if its rounding were not there, and the bias.
        """
        bias = self.bias
        if torch.compiler.is_compiling():
            return self.in_graph(x)
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            result: Tensor = _StraightThrough.apply(x, bias, self, *self.codes_and_scale())
            return result
        return self._product(x, bias)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if x.shape[-1] != self.in_features or not x.is_floating_point():
            raise UsageError(
                f"input: {self.kind} takes floating tensors of shape (..., {self.in_features}), "
                f"got {x.dtype} {tuple(x.shape)}"
            )
        dtype = x.dtype
        if dtype is torch.float32 or (dtype is torch.float64 and self.activations == "float"):
            working = dtype
        else:
            working = torch.float32
            x = x.to(working)
        if bias is not None and bias.dtype is not working:
            bias = bias.to(working)
        result = self.prepared().product(x, bias, 0 if self.activations == "int8" else pieces_for(dtype))
        return result if result.dtype is dtype else result.to(dtype)

    def config(self) -> dict[str, Any]:
        """See :meth:`CompressedLayer.config`."""
        return super().config() | {
            "bias": self.bias is not None,
            "activations": self.activations,
            "error_bound": self.error_bound_value,
        }

    def error_bound(self) -> float:
        """A bound of ‖W − W'‖_F, W the weight that the layer was made from: truncation plus half a step of every scale.

        Raises:
            UsageError: the layer was made from scratch, so there is nothing to compare with.
        """
        if self.error_bound_value is None:
            raise UsageError(
                f"error_bound: this {self.kind} was not made from a weight; use from_linear or from_factors"
            )
        return self.error_bound_value

    def allocate_bias(self, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Register ``bias`` and note the dtype of the model."""
        self.dtype = dtype or torch.get_default_dtype()
        self.bias = nn.Parameter(torch.zeros(self.out_features, device=device, dtype=self.dtype)) if bias else None

    def take_bias(self, bias: Tensor | None) -> None:
        """Take a copy of another layer's bias, ``requires_grad`` included."""
        if bias is None or self.bias is None:
            return
        with torch.no_grad():
            self.bias.copy_(bias)
        self.bias.requires_grad_(bias.requires_grad)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        rank = "" if self.rank is None else f"rank={self.rank}, "
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {rank}bits={self.n_bits}, "
            f"activations={self.activations}, bias={self.bias is not None}"
        )

    activations: str
    error_bound_value: float | None


class _StraightThrough(torch.autograd.Function):
    """The layer forward; backward as if activations had not been rounded, with the exact codes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: IntegerLinear, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.layer_type = type(layer)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return layer._product(x, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows = gradient.reshape(gradient.shape[:-1].numel(), gradient.shape[-1])
        to_input = to_bias = None
        if ctx.needs_input_grad[0]:
            to_input = ctx.layer_type.input_gradient(rows, *ctx.saved_tensors)
            to_input = to_input.view(*gradient.shape[:-1], to_input.shape[-1])
        if ctx.needs_input_grad[1]:
            to_bias = rows.sum(dim=0).to(ctx.bias_dtype)
        return (to_input, to_bias, None, *(None for _ in ctx.saved_tensors))
