"""A parameter with one matrix for each expert of a mixture, whose numbers are made for the expert that is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowrank.layers.weight_view import WeightView

if TYPE_CHECKING:
    from lowrank.layers.experts import ExpertsLayer

__all__ = ["ExpertStack"]

_GROUPED = ("_grouped_mm", "grouped_mm_fallback")


class ExpertStack(WeightView):
    """What stands in for ``gate_up_proj (experts, out, in)`` and its like while a mixture's own forward runs.

    Indexed by one expert it decodes that one, by several only those, and in a product of tokens sorted by expert
    (``grouped_mm``) one after the other. Anything else decodes all of them, and is counted in ``weight_decodings``.

    Example:
        >>> from torch import nn
        >>> from lowrank.layers import QuantizedExperts
        >>> class Experts(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.up = nn.Parameter(torch.ones(3, 4, 32))
        ...     def forward(self, x):
        ...         return x @ self.up[1].T
        >>> layer = QuantizedExperts.from_module(Experts())
        >>> ExpertStack.of(layer, "up")[1].shape, layer.weight_decodings
        (torch.Size([4, 32]), 0)
    """

    _name: str
    _turned: bool

    @classmethod
    def of(cls, layer: ExpertsLayer, name: str, turned: bool = False) -> ExpertStack:
        """Make the stand-in of one parameter.

        Args:
            turned: with the last two dimensions exchanged.
        """
        experts, first, second = layer.weight_shapes[name]
        # Strides of the parameter that it stands for, which forwards read to tell which way a matrix lies.
        shape, strides = ((experts, first, second), (first * second, second, 1))
        if turned:
            shape, strides = (experts, second, first), (first * second, 1, second)
        device = layer.get_buffer(f"{layer.prefixes[name]}codes").device
        made: ExpertStack = Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, dtype=layer.dtype, device=device, requires_grad=False
        )
        made._layer, made._held, made._name, made._turned = layer, None, name, turned
        return made

    def expert(self, index: int) -> Tensor:
        """Decode one expert's matrix, as it lies in the parameter."""
        layer: Any = self._layer
        matrix: Tensor = layer.expert(self._name, index)
        return matrix.T if self._turned else matrix

    def chosen(self, ids: Tensor) -> Tensor:
        """Decode the experts of these ids, each once: (…) to (…, rows, columns)."""
        found, places = torch.unique(ids, return_inverse=True)
        return torch.stack([self.expert(int(index)) for index in found])[places]

    def grouped(self, x: Tensor, ends: Tensor) -> Tensor:
        """Multiply tokens that are sorted by expert: (tokens, columns) to (tokens, rows); those past the last end give zeros."""
        result = x.new_zeros(x.shape[0], self.shape[2])
        start = 0
        for index, end in enumerate(ends.tolist()):
            if end > start:
                torch.mm(x[start:end], self.expert(index), out=result[start:end])
            start = max(start, end)
        return result

    def _decoded(self) -> Tensor:
        layer: Any = self._layer
        layer.weight_decodings += 1
        whole: Tensor = layer.dense_weights()[self._name].detach().to(layer.dtype)
        return whole.transpose(1, 2) if self._turned else whole

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Decode no more than the operation reads."""
        kwargs = kwargs or {}
        first = args[0] if args and isinstance(args[0], ExpertStack) else None
        if first is not None:
            found = _part_of(first, func, args)
            if found is not None:
                return found
        elif len(args) > 1 and isinstance(args[1], ExpertStack) and func._schema.name.partition("::")[2] in _GROUPED:
            ends = args[2] if len(args) > 2 else kwargs.get("offs")
            if isinstance(ends, Tensor) and args[0].ndim == 2:
                return args[1].grouped(args[0], ends)
        return super().__torch_dispatch__(func, types, args, kwargs)


def _part_of(stack: ExpertStack, func: Any, args: Any) -> Tensor | None:
    """The result of an operation that needs only some experts, or none; ``None`` of any other."""
    aten = torch.ops.aten
    if func is aten.detach.default or func is aten.alias.default:
        return ExpertStack.of(stack._layer, stack._name, stack._turned)  # type: ignore[arg-type]
    if func is aten.select.int and args[1] == 0:
        index = int(args[2])
        return WeightView(stack._layer, stack.expert(index + stack.shape[0] if index < 0 else index))
    if (
        func is aten.index.Tensor
        and len(args[1]) == 1
        and args[1][0] is not None
        and not args[1][0].is_floating_point()
    ):
        ids = args[1][0]
        if ids.dtype is not torch.bool:
            return stack.chosen(torch.where(ids < 0, ids + stack.shape[0], ids))
    if func in (aten.transpose.int, aten.mT.default):
        dims = {dim % 3 for dim in args[1:3]} or {1, 2}
        if dims == {1, 2}:
            return ExpertStack.of(stack._layer, stack._name, not stack._turned)  # type: ignore[arg-type]
    return None
