"""A module's own forward around one product with its weight: what it does before, such as padding, is done as before."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from lowrank.errors import CheckpointError, UsageError
from lowrank.layers.base import CompressedLayer
from lowrank.layers.product_weight import GEOMETRY, ProductCall, ProductWeight

__all__ = ["Around", "PaddedLayer"]

_Layer = TypeVar("_Layer", bound="PaddedLayer")


class _Around:
    """What :class:`Around` and :class:`PaddedLayer` share: a source, which has no weight of its own, and the product inside it."""

    product: nn.Module

    def adopt(self, module: nn.Module, name: str) -> None:
        """Take over the class, the attributes and the forward of a module; its numbers do not count.

        Args:
            module: like the one that the layer was made from; stays as it is.
            name: for messages.

        Raises:
            CheckpointError: it has another weight, no bias where there was one, or other tensors beside these.
        """
        held = {key: tuple(value.shape) for key, value in module._parameters.items() if value is not None}
        own = {"weight": tuple(self.shape)}  # type: ignore[attr-defined]
        bias = getattr(self.product, "bias", None)
        if bias is not None:
            own["bias"] = tuple(bias.shape)
        if held != own:
            raise CheckpointError(
                f"layer {name}: the {type(module).__name__} of the model holds {held}, the one that was compressed held {own}"
            )
        source = copy.deepcopy(module, {id(value): None for value in module._parameters.values() if value is not None})
        for key in list(source._parameters):
            del source._parameters[key]
        self.__dict__["source"] = source
        self._bind()

    def _bind(self) -> None:
        """Give the source a weight that leads here; again wherever this layer is a copy, or moved."""
        source = self.__dict__.get("source")
        if source is not None:
            vars(source)["weight"] = ProductWeight(self)  # type: ignore[arg-type]
            self.__dict__["_bound"] = self._place()

    def _place(self) -> tuple[Any, ...]:
        tensor: Tensor | None = next(iter(self.product.parameters()), None)
        if tensor is None:
            tensor = next(iter(self.product.buffers()))
        return tensor.device, self.dtype  # type: ignore[attr-defined]

    def takes(self, function: Any, call: ProductCall) -> bool:
        """Tell whether a call of a product is the one that the inner layer makes."""
        return call.bias is getattr(self.product, "bias", None) and call.geometry == self.geometry  # type: ignore[attr-defined]

    def _run(self, args: Any, kwargs: Any) -> Any:
        source = self.__dict__["source"]
        if source is None:
            raise UsageError(
                f"{type(self).__name__}: has no forward yet; lowrank.load_model takes it from the structure passed as model="
            )
        if self.__dict__["_bound"] != self._place():
            self._bind()
        # Anew on each call: training, or loading, may have put another one in its place.
        vars(source)["bias"] = getattr(self.product, "bias", None)
        return source.forward(*args, **kwargs)

    def restored(self, product: nn.Module | None = None) -> nn.Module:
        """Make the module again, of its own class, with the weight and bias of a dense product.

        Args:
            product: the inner one, or what it stands for.
        """
        product = self.product if product is None else product
        module: nn.Module = copy.deepcopy(_stripped(self.__dict__["source"]))
        for key in ("weight", "bias"):
            module._parameters[key] = product._parameters[key]
        return module.train(self.training)  # type: ignore[attr-defined]

    def _source_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state without what leads back here."""
        state.pop("_bound", None)
        if state.get("source") is not None:
            state["source"] = _stripped(state["source"])
        return state


def _stripped(source: nn.Module) -> nn.Module:
    """The same source without weight and bias."""
    twin: nn.Module = object.__new__(type(source))
    twin.__dict__ = {key: value for key, value in vars(source).items() if key not in ("weight", "bias")}
    return twin


class Around(_Around, nn.Module):
    """Hold a module's forward and, as a layer inside, the product that it makes; what is compressed is the layer inside.

    Stands in a working copy for a module of a class that pads, or does anything else that needs no weight, and then is a layer of
    torch's. See :class:`PaddedLayer` for what it becomes.

    Args:
        module: the user's; keeps its parameters, which the product shares.
        product: a dense layer of torch's with the same parameters.

    Example:
        >>> import torch.nn.functional as F
        >>> class Twice(nn.Linear):
        ...     def forward(self, x):
        ...         return F.linear(2 * x, self.weight, self.bias)
        >>> module = Twice(3, 2)
        >>> inner = nn.Linear(3, 2)
        >>> inner.weight, inner.bias = module.weight, module.bias
        >>> torch.equal(Around(module, inner)(torch.ones(1, 3)), module(torch.ones(1, 3)))
        True
    """

    weight_decodings: int = 0

    def __init__(self, module: nn.Module, product: nn.Module) -> None:
        super().__init__()
        self.product = product
        weight = product.weight
        assert isinstance(weight, Tensor)
        self.shape, self.dtype = tuple(weight.shape), weight.dtype
        # Whatever is put in its place, training forms included.
        self.geometry = {key: value for key, value in vars(product).items() if key in GEOMETRY}
        self.__dict__["source"] = None
        self.adopt(module, type(module).__name__)
        self.train(module.training)

    kind = "Around"

    def dense_weight(self) -> Tensor:
        """Give the weight of the layer inside."""
        product = self.product
        weight = product.dense_weight() if isinstance(product, CompressedLayer) else product.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward, with the layer inside where it multiplies."""
        return self._run(args, kwargs)

    def train(self, mode: bool = True) -> Around:
        """Set the mode of the module too."""
        super().train(mode)
        self.__dict__["source"].train(mode)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self._source_state(dict(self.__dict__))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._bind()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if self.__dict__.get("source") is None or name.startswith("__"):
                raise
            return getattr(self.__dict__["source"], name)


class PaddedLayer(_Around, CompressedLayer):
    """A compressed convolution or linear layer inside the forward of a user's own class, which pads first.

    The user's forward runs as it is, on a weight that stands for the layer inside: where it calls the one ``F.conv1d``, ``F.conv2d`` or
    ``F.linear`` that was seen when it was made, that layer computes, with integer products if it has such. A call with another
    geometry (a padding that the forward works out itself from the input's size) decodes the weight: right, and slower. The class itself
    and its attributes are not stored: loading takes them from the structure that is passed to it.

    Args:
        product: the layer inside.

    Attributes:
        source: the user's module, without its weight; ``None`` until :meth:`adopt`.

    Example:
        >>> from lowrank.layers import QuantizedLinear
        >>> import torch.nn.functional as F
        >>> class Twice(nn.Linear):
        ...     def forward(self, x):
        ...         return F.linear(2 * x, self.weight, self.bias)
        >>> module = Twice(3, 2)
        >>> layer = PaddedLayer(QuantizedLinear.from_linear(module))
        >>> layer.adopt(module, "0")
        >>> layer(torch.ones(1, 3)).shape, layer.format, sorted(layer.state_dict())
        (torch.Size([1, 2]), 'int8', ['product.bias', 'product.codes', 'product.scale'])
    """

    # Adapters go on the layer inside, which is the one that computes.
    is_one_weight: ClassVar[bool] = False

    def __init__(self, product: CompressedLayer) -> None:
        super().__init__()
        self.product: nn.Module = product
        self.__dict__["source"] = None
        # For the time that a training form stands in the product's place.
        self.geometry = (
            {name: getattr(product.geometry, name) for name in GEOMETRY} if hasattr(product, "geometry") else {}
        )
        self.__dict__["_known"] = product.shape, product.dtype

    @property
    def inner(self) -> CompressedLayer:
        """The layer inside; where it carries an adapter, the one that is adapted."""
        found = next((module for module in self.product.modules() if isinstance(module, CompressedLayer)), None)
        if found is None:
            raise UsageError(f"{self.kind}: its layer is being trained; this can be asked of it afterwards")
        return found

    # What the layer inside says of itself.

    @property
    def format(self) -> str:
        """Of the layer inside."""
        return self.inner.format

    @property
    def bits(self) -> int | None:
        """Of the layer inside."""
        return self.inner.bits

    @property
    def rank(self) -> int | None:
        """Of the layer inside."""
        return self.inner.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the layer inside."""
        shape: tuple[int, ...] = self.__dict__["_known"][0]
        return shape

    @property
    def spec(self) -> Any:
        """Of the layer inside."""
        return self.inner.spec

    @property
    def groups(self) -> int:
        """Of the layer inside."""
        return self.inner.groups

    @property
    def dtype(self) -> torch.dtype:
        """Of the layer inside."""
        dtype: torch.dtype = self.__dict__["_known"][1]
        return dtype

    @dtype.setter
    def dtype(self, value: torch.dtype) -> None:
        self.__dict__["_known"] = self.shape, value

    @property
    def activations(self) -> str | None:  # type: ignore[override]
        """Of the layer inside."""
        return self.inner.activations

    @property
    def scheme(self) -> str | None:  # type: ignore[override]
        """Of the layer inside."""
        return self.inner.scheme

    @property
    def weight_names(self) -> tuple[str, ...]:
        """None: all tensors are the layer's inside."""
        return ()

    def dense_weight(self) -> Tensor:
        """Of the layer inside."""
        return self.inner.dense_weight()

    def exact_weight(self) -> Tensor:
        """Of the layer inside."""
        return self.inner.exact_weight()

    def factors(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor] | None:
        """Of the layer inside."""
        return self.inner.factors(dtype)

    def with_weight(self, weight: Tensor) -> CompressedLayer:
        """See :meth:`CompressedLayer.with_weight`."""
        return self._with(self.inner.with_weight(weight))

    def with_factors(self, left: Tensor, right: Tensor) -> CompressedLayer:
        """See :meth:`CompressedLayer.with_factors`."""
        return self._with(self.inner.with_factors(left, right))

    def appended(self, left: Tensor, right: Tensor, rows: Tensor | None = None) -> CompressedLayer:
        """See :meth:`CompressedLayer.appended`."""
        return self._with(self.inner.appended(left, right, rows))

    def forget_source(self) -> None:
        """See :meth:`CompressedLayer.forget_source`."""
        self.inner.forget_source()

    def dequantize(self) -> nn.Module:
        """Make the user's module again, with the weight that the layer stands for, in the dtype of the model."""
        product: Any = self.inner
        dense = product.dequantize() if hasattr(product, "dequantize") else product
        for name in ("to_linear", "to_conv1d", "to_conv2d"):
            if isinstance(dense, CompressedLayer) and hasattr(dense, name):
                dense = getattr(dense, name)()
        return self.restored(dense)

    def _with(self: _Layer, product: CompressedLayer) -> _Layer:
        layer = type(self)(product)
        source = self.__dict__["source"]
        if source is not None:
            layer.__dict__["source"] = copy.deepcopy(_stripped(source))
            layer._bind()
        return layer.train(self.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's forward, with the layer inside where it multiplies."""
        return self._run(args, kwargs)

    def train(self: _Layer, mode: bool = True) -> _Layer:
        """Set the mode of the user's module too."""
        super().train(mode)
        if self.__dict__.get("source") is not None:
            self.__dict__["source"].train(mode)
        return self

    def _apply(self: _Layer, fn: Any, recurse: bool = True) -> _Layer:
        super()._apply(fn, recurse)
        source = self.__dict__.get("source")
        if source is not None:
            for module in source.modules():
                for name, buffer in module._buffers.items():
                    module._buffers[name] = None if buffer is None else fn(buffer)
            self._bind()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self._source_state(super().__getstate__())

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._bind()

    def config(self) -> dict[str, Any]:
        """See :meth:`CompressedLayer.config`; the layer's inside stands under ``product``."""
        own = {"activations": self.activations, "scheme": self.scheme, "product": self.inner.config()}
        return super().config() | own

    @classmethod
    def from_config(cls: type[_Layer], config: Mapping[str, Any], device: torch.device | str | None = None) -> _Layer:
        """See :meth:`CompressedLayer.from_config`."""
        from lowrank.layers import LAYER_KINDS

        inner = {**config["product"], "dtype": config["dtype"]}
        if inner["kind"] == cls.__name__ or list(inner["shape"]) != list(config["shape"]):
            raise UsageError(
                f"product: a {inner['kind']} of shape {inner['shape']} is no layer for shape {config['shape']}"
            )
        return cls(LAYER_KINDS[inner["kind"]].from_config(inner, device))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Models read what the module says of itself: its stride, its size.
            if self.__dict__.get("source") is None or name.startswith("__"):
                raise
            if name == "weight" and self.__dict__["_bound"] != self._place():
                self._bind()
            return getattr(self.__dict__["source"], name)

    def extra_repr(self) -> str:
        """Say what ``repr`` shows."""
        source = self.__dict__.get("source")
        return "?" if source is None else type(source).__name__
