"""``layer.weight`` of a compressed layer: shape and dtype at no cost, numbers made when somebody computes with them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lowrank.errors import UsageError

if TYPE_CHECKING:
    from lowrank.layers.base import CompressedLayer

__all__ = ["WeightView"]

log = logging.getLogger("lowrank")


class WeightView(Tensor):
    """The weight that a compressed layer stands for, as a tensor that may be read and not written.

    Shape, dtype and device cost nothing. An operation on it decodes the whole weight, each time anew: right, and slow. The layer counts
    these in ``weight_decodings`` and says so once on the logger ``lowrank``. It has no gradient of its own; gradients flow through it to
    what it is multiplied with.

    Raises:
        UsageError: an operation would write to it.

    Example:
        >>> from lowrank.layers import QuantizedLinear
        >>> layer = QuantizedLinear(4, 2)
        >>> layer.weight.shape, layer.weight.dtype, layer.weight_decodings
        (torch.Size([2, 4]), torch.float32, 0)
        >>> (layer.weight @ torch.ones(4)).shape, layer.weight_decodings
        (torch.Size([2]), 1)
    """

    _layer: CompressedLayer

    @staticmethod
    def __new__(cls, layer: CompressedLayer) -> WeightView:
        """Make the view of one layer's weight."""
        device = next((tensor.device for tensor in layer.state_dict().values()), torch.device("cpu"))
        made: WeightView = Tensor._make_wrapper_subclass(
            cls, layer.shape, dtype=layer.dtype, device=device, requires_grad=False
        )
        made._layer = layer
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Show the numbers, as of any tensor."""
        return repr(self._decoded())

    def _decoded(self) -> Tensor:
        layer = self._layer
        with torch.no_grad():
            weight = layer.dense_weight().detach().to(layer.dtype)
        if not layer.weight_decodings:
            log.warning(
                "%s of shape %s: its .weight is computed with outside its forward, so that it is decoded each time; that is right, but "
                "slower than the layer itself and than the dense one",
                layer.kind,
                layer.shape,
            )
        layer.weight_decodings += 1
        return weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse ``weight[...] = ...``, which writes by way of a view; all else goes on to :meth:`__torch_dispatch__`."""
        if func is Tensor.__setitem__ and isinstance(args[0], WeightView):
            raise args[0]._refusal("indexing")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def _refusal(self, operation: str) -> UsageError:
        return UsageError(
            f"weight: {self._layer.kind} holds codes or factors, so that its .weight is made on demand and cannot be written to by "
            f"{operation}; decode the layer first (its dequantize or to_linear), or compress the model after the change"
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Do the operation on the decoded weight."""
        kwargs = kwargs or {}
        for index, argument in enumerate(func._schema.arguments):
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, WeightView):
                raise value._refusal(func._schema.name)
        decoded: dict[int, Tensor] = {}

        def plain(value: Any) -> Any:
            if not isinstance(value, WeightView):
                return value
            if id(value) not in decoded:
                decoded[id(value)] = value._decoded()
            return decoded[id(value)]

        return func(*tree_map(plain, args), **tree_map(plain, kwargs))
