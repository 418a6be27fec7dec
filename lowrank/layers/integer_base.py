"""What all layers with integer codes and rounded activations share, linear layers and convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from operator import is_
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lowrank.layers.checks import check_activations
from lowrank.layers.weights import Codes

__all__ = ["IntegerLayer", "in_autocast_type"]

_Layer = TypeVar("_Layer", bound="IntegerLayer")


class _Derived(NamedTuple):
    """What was made of a layer's tensors, and how they were then: address and version of each."""

    tensors: tuple[Tensor, ...]
    aliases: tuple[Tensor, ...]
    addresses: list[int]
    versions: list[int]
    made: Any


class IntegerLayer(Codes):
    """Base of the layers that multiply int8 codes, with a bias or without.

    Attributes:
        activations: ``"int8"`` rounds what comes in and multiplies integers; ``"float"`` leaves the activations as they are
            (weight-only). May be set at any time.
    """

    trains_rounded: ClassVar[bool] = True
    activations: str
    bias: nn.Parameter | None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "activations":
            value = check_activations(value)
        super().__setattr__(name, value)

    def derive(self) -> Any:
        """Make what :meth:`prepared` keeps."""
        raise NotImplementedError

    def prepared(self) -> Any:
        """Give what is derived from the codes and the scale, made anew when one of them is replaced, moved or written to.

        What is derived holds addresses. ``tensor.data = …``, ``share_memory()`` and a copy sent to another process move the numbers and
        leave the tensor and its version as they are, so the address itself is compared. An alias keeps the memory until then: freed, its
        address might come back with other numbers in it.

        Writes of which torch keeps no count are not seen: into ``tensor.data`` or its NumPy array, by another process that shares the
        memory, and into tensors made in inference mode. Replace the tensor instead, or write into the tensor itself.
        """
        tensors = self.codes_and_scale()
        # By map: this stands before every product, and a tiny layer takes few microseconds.
        addresses = [*map(Tensor.data_ptr, tensors)]
        versions = [0 if tensor.is_inference() else tensor._version for tensor in tensors]
        kept: _Derived | None = self.__dict__.get("_derived")
        if (
            kept is not None
            and kept.addresses == addresses
            and kept.versions == versions
            # An alias moves with what is shared in place, and then holds the old address no longer.
            and [*map(Tensor.data_ptr, kept.aliases)] == addresses
            and all(map(is_, kept.tensors, tensors))
        ):
            return kept.made
        made = self.derive()
        aliases = tuple(tensor.detach() for tensor in tensors)
        self.__dict__["_derived"] = _Derived(tensors, aliases, addresses, versions, made)
        return made

    def config(self) -> dict[str, Any]:
        """See :meth:`CompressedLayer.config`."""
        config = super().config()
        # Last, where directories that are on disk already have it.
        bound = config.pop("error_bound")
        return config | {"bias": self.bias is not None, "activations": self.activations, "error_bound": bound}

    @classmethod
    def _arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return super()._arguments(config) | {"activations": config["activations"]}

    def trainable(self, dense: nn.Module | None = None) -> nn.Module:
        """See :meth:`CompressedLayer.trainable`."""
        floats = self.dequantize()
        if dense is not None:
            self._sharpen(floats, dense)
        return floats

    def dequantize(self) -> nn.Module:
        """Make a float layer of the rounded numbers, in the dtype of the model."""
        raise NotImplementedError

    def _sharpen(self, floats: nn.Module, dense: nn.Module) -> None:
        """Let the floats begin at the numbers of a dense layer, where this one is its rounding."""

    def rounded_forward(self, floats: nn.Module, x: Tensor) -> Tensor:
        """See :meth:`CompressedLayer.rounded_forward`."""
        result: Tensor = torch.func.functional_call(floats, self._rounded_weights(floats), (x,))
        return result

    def _rounded_weights(self, floats: nn.Module) -> dict[str, Tensor]:
        """The floats' weights by name, rounded, with gradients straight through."""
        raise NotImplementedError

    def with_floats(self: _Layer, floats: nn.Module) -> _Layer:
        """See :meth:`CompressedLayer.with_floats`."""
        layer = self._from_floats(floats)
        if layer.bias is not None:
            layer.bias.requires_grad_(self.bias is not None and self.bias.requires_grad)
        return layer.train(self.training)

    def _from_floats(self: _Layer, floats: Any) -> _Layer:
        raise NotImplementedError

    def allocate_bias(self, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Register ``bias`` and note the dtype of the model."""
        self.dtype = dtype or torch.get_default_dtype()
        self.bias = nn.Parameter(torch.zeros(self.shape[0], device=device, dtype=self.dtype)) if bias else None

    def take_bias(self, bias: Tensor | None) -> None:
        """Take a copy of another layer's bias, ``requires_grad`` included."""
        if bias is None or self.bias is None:
            return
        with torch.no_grad():
            self.bias.copy_(bias)
        self.bias.requires_grad_(bias.requires_grad)


def in_autocast_type(result: Tensor) -> Tensor:
    """Give a product in the type that torch's own layers answer in under autocast.

    Example:
        >>> with torch.autocast("cpu", dtype=torch.bfloat16):
        ...     in_autocast_type(torch.zeros(2)).dtype
        torch.bfloat16
    """
    kind = result.device.type
    # float64 is left alone, as by autocast itself.
    if torch.is_autocast_enabled(kind) and result.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return result.to(torch.get_autocast_dtype(kind))
    return result
