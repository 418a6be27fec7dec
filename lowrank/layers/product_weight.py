"""The weight that a user's forward is given in the place of its own: the one product with it is somebody else's to make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.layers.weight_view import WeightView

__all__ = ["GEOMETRY", "PRODUCTS", "ProductCall", "ProductWeight", "call_of"]

# The functions that layers of torch multiply with, by the class that calls them; their first three arguments have these meanings.
PRODUCTS: dict[Any, type[nn.Module]] = {F.conv1d: nn.Conv1d, F.conv2d: nn.Conv2d, F.linear: nn.Linear}
GEOMETRY = ("stride", "padding", "dilation", "groups")
_ARGUMENTS = ("input", "weight", "bias", *GEOMETRY)
_DEFAULTS: dict[str, Any] = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}


class ProductCall(NamedTuple):
    """One call of a product.

    Attributes:
        geometry: stride, padding, dilation and groups of a convolution, sizes as tuples; empty for a linear layer.
    """

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    geometry: Mapping[str, Any]


def call_of(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> ProductCall:
    """Read the arguments of one of :data:`PRODUCTS`.

    Example:
        >>> import torch
        >>> call_of(F.conv2d, (torch.ones(1, 2, 3, 3), torch.ones(4, 2, 1, 1)), {"stride": 2}).geometry["stride"]
        (2, 2)
    """
    given = _DEFAULTS | dict(zip(_ARGUMENTS, args, strict=False)) | dict(kwargs)
    dims = given["weight"].dim() - 2
    geometry: dict[str, Any] = {}
    if PRODUCTS[function] is not nn.Linear:
        for name in GEOMETRY[:3]:
            value = given[name]
            if isinstance(value, int):
                value = (value,) * dims
            elif not isinstance(value, str):
                value = tuple(value) * (dims if len(value) == 1 else 1)
            geometry[name] = value
        geometry["groups"] = given["groups"]
    return ProductCall(given["input"], given["weight"], given["bias"], geometry)


class ProductWeight(WeightView):
    """The weight that a module's own forward is given: the product with it is the inner layer's, all else decodes it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Hand the product to the inner layer, where it is the one that the layer was made for."""
        kwargs = kwargs or {}
        if func in PRODUCTS:
            call = call_of(func, args, kwargs)
            weight = call.weight
            if type(weight) is ProductWeight and weight._held is None and type(call.input) is not ProductWeight:
                around: Any = weight._layer
                if around.takes(func, call):
                    return around.product(call.input)
        return super().__torch_function__(func, types, args, kwargs)
