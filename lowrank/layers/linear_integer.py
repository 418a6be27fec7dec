"""What the linear layers with integer codes share: how they are called, and gradients through rounded activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowrank.errors import UsageError
from lowrank.kernels import IntegerWeight
from lowrank.kernels.activations import pieces_for
from lowrank.layers.base import graph_is_made
from lowrank.layers.checks import FLOAT_ACTIVATIONS, INTEGER_ACTIVATIONS
from lowrank.layers.integer_base import IntegerLayer, in_autocast_type
from lowrank.layers.linear import LinearLayer

__all__ = ["IntegerLinear"]


class IntegerLinear(LinearLayer, IntegerLayer):
    """Base of the linear layers whose weight is held as int8 codes; ``activations="int8"`` rounds each token."""

    def codes_to_multiply(self) -> tuple[Tensor, ...]:
        """Give the codes in the order of the products."""
        raise NotImplementedError

    def derive(self) -> Any:
        """See :meth:`IntegerLayer.derive`."""
        return IntegerWeight(self.codes_to_multiply(), self.codes_and_scale()[-1])

    def in_graph(self, x: Tensor) -> Tensor:
        """:meth:`forward` as one operator, for a graph of torch.compile or torch.export (:mod:`.operators`)."""
        raise NotImplementedError

    @staticmethod
    def input_gradient(gradient: Tensor, *tensors: Tensor) -> Tensor:
        """Compute ``gradient @ W'`` for (M, out), in its dtype."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features) of the same dtype; computed in float32 (weight-only float64 in
        float64).

        Gradients reach the input, as if its rounding were not there, and the bias.
        """
        bias = self.bias
        if graph_is_made():
            return in_autocast_type(self.in_graph(input))
        if torch.is_grad_enabled() and (input.requires_grad or (bias is not None and bias.requires_grad)):
            result: Tensor = _StraightThrough.apply(input, bias, self, *self.codes_and_scale())
            return in_autocast_type(result)
        return in_autocast_type(self._product(input, bias))

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if x.shape[-1] != self.in_features or not x.is_floating_point():
            raise UsageError(
                f"input: {self.kind} takes floating tensors of shape (..., {self.in_features}), "
                f"got {x.dtype} {tuple(x.shape)}"
            )
        dtype = x.dtype
        if dtype is torch.float32 or (dtype is torch.float64 and self.activations == FLOAT_ACTIVATIONS):
            working = dtype
        else:
            working = torch.float32
            x = x.to(working)
        if bias is not None and bias.dtype is not working:
            bias = bias.to(working)
        result = self._multiply(x, bias, dtype)
        return result if result.dtype is dtype else result.to(dtype)

    def _multiply(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The product of tokens in the dtype that is computed in, which came in ``dtype``."""
        result: Tensor = self.prepared().product(
            x, bias, 0 if self.activations == INTEGER_ACTIVATIONS else pieces_for(dtype)
        )
        return result

    def gradient_through(self) -> Callable[..., Tensor]:
        """Give what computes :meth:`input_gradient` of the tensors of :meth:`codes_and_scale`."""
        return type(self).input_gradient

    def extra_repr(self) -> str:
        """Say what ``repr`` shows."""
        rank = "" if self.rank is None else f"rank={self.rank}, "
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {rank}bits={self.n_bits}, "
            f"activations={self.activations}, bias={self.bias is not None}"
        )


class _StraightThrough(torch.autograd.Function):
    """The layer forward; backward as if activations had not been rounded, with the exact codes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: IntegerLinear, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.gradient_through = layer.gradient_through()
        ctx.bias_dtype = None if bias is None else bias.dtype
        return layer._product(x, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows = gradient.reshape(gradient.shape[:-1].numel(), gradient.shape[-1])
        to_input = to_bias = None
        # Read once: checkpointing without reentry unpacks each time, and forbids a second.
        saved = ctx.saved_tensors
        if ctx.needs_input_grad[0]:
            to_input = ctx.gradient_through(rows, *saved)
            to_input = to_input.view(*gradient.shape[:-1], to_input.shape[-1])
        if ctx.needs_input_grad[1]:
            to_bias = rows.sum(dim=0).to(ctx.bias_dtype)
        return (to_input, to_bias, None, *(None for _ in saved))
