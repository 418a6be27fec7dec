"""``layer.weight`` of a compressed layer: shape and dtype at no cost, numbers made when somebody computes with them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lowrank.errors import UsageError

if TYPE_CHECKING:
    from lowrank.layers.base import CompressedLayer

__all__ = ["WeightView"]

log = logging.getLogger("lowrank")

# What torch refuses to do for a subclass, and the decoded numbers do as well.
_AS_PLAIN = (Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__deepcopy__, Tensor.__reduce_ex__)


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
    _held: Tensor | None

    @staticmethod
    def __new__(cls, layer: CompressedLayer, held: Tensor | None = None) -> WeightView:
        """Make the view of one layer's weight, or of a part of it that was decoded already: its transpose, a row."""
        if held is None:
            device = next((tensor.device for tensor in layer.state_dict().values()), torch.device("cpu"))
            made: WeightView = Tensor._make_wrapper_subclass(
                cls, layer.shape, dtype=layer.dtype, device=device, requires_grad=False
            )
        else:
            made = Tensor._make_wrapper_subclass(
                cls,
                held.shape,
                strides=held.stride(),
                storage_offset=held.storage_offset(),
                dtype=held.dtype,
                device=held.device,
                requires_grad=False,
            )
        made._layer, made._held = layer, held
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Show the numbers, as of any tensor."""
        return repr(self._decoded())

    def _decoded(self) -> Tensor:
        if self._held is not None:
            return self._held
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
        """Do here what torch does for no subclass; all else goes on to :meth:`__torch_dispatch__`.

        ``weight[...] = ...`` would write by way of a view, and a weight that asks for a gradient would never get one.
        """
        view = args[0] if args and isinstance(args[0], WeightView) else None
        if view is not None:
            if func is Tensor.__setitem__:
                raise view._refusal("indexing")
            wanted = args[1] if len(args) > 1 else (kwargs or {}).get("requires_grad", True)
            if func in (Tensor.requires_grad_, Tensor.requires_grad.__set__) and wanted:  # type: ignore[attr-defined]
                raise view._refusal("training (requires_grad)")
            if func in _AS_PLAIN:
                result = func(view._decoded(), *args[1:], **(kwargs or {}))
                if isinstance(result, np.ndarray):
                    result.flags.writeable = False
                return result
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
        if func is torch.ops.aten.detach.default:
            # What ``.data`` and ``.detach()`` do; nothing is decoded for it.
            return WeightView(args[0]._layer, args[0]._held)
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

        result = func(*tree_map(plain, args), **tree_map(plain, kwargs))
        source = next((value for value in args if isinstance(value, WeightView)), None)
        if source is None or not any(each.alias_info is not None for each in func._schema.returns):
            return result
        # A transpose, a row, another shape: a write into it would be lost, so it is read-only too.
        layer = source._layer
        return tree_map(lambda each: WeightView(layer, each) if isinstance(each, Tensor) else each, result)
