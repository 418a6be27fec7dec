"""Layers that hold several weights by the dense module's names: each as int8 codes and a float32 scale a row, or each in its own way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from lowrank.layers.base import CompressedLayer
from lowrank.layers.checks import FLOAT_ACTIVATIONS
from lowrank.layers.matrix_store import MatrixStore
from lowrank.layers.roles import Role, ScaleForm
from lowrank.layers.spec import LayerSpec
from lowrank.layers.weights import joined, split
from lowrank.numerics.rounding import dequantize_rows, quantize_rows

__all__ = ["NamedWeights"]

_Layer = TypeVar("_Layer", bound="NamedWeights")


class NamedWeights(CompressedLayer):
    """Base of recurrent layers and of modules that are decoded into a forward of their own; weight-only.

    Attributes:
        <weight>_codes: int8 buffer of the shape of each weight.
        <weight>_scale: (rows,) float32 buffer.
        weight_shapes: of each weight, by its name in the dense module.
        stores: how each weight is held; ``None`` where all are int8 codes with a scale a row.

    Example:
        >>> from torch import nn
        >>> from lowrank.layers import QuantizedLSTM
        >>> layer = QuantizedLSTM.from_module(nn.LSTM(4, 3))
        >>> isinstance(layer, NamedWeights), layer.weight_names[:2]
        (True, ('weight_ih_l0_codes', 'weight_ih_l0_scale'))
    """

    is_one_weight: ClassVar[bool] = False
    activations: str = FLOAT_ACTIVATIONS
    weight_shapes: dict[str, tuple[int, ...]]
    stores: Mapping[str, MatrixStore] | None = None

    def _prefix(self, name: str) -> str:
        """Before ``codes`` and ``scale`` of a weight."""
        return f"{name}_"

    def _rows(self, name: str) -> int:
        """How many scales a weight has."""
        return self.weight_shapes[name][0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the first weight."""
        return next(iter(self.weight_shapes.values()))

    @property
    def original_key(self) -> str:
        """See :meth:`CompressedLayer.original_key`."""
        return next(iter(self.weight_shapes))

    @property
    def weight_names(self) -> tuple[str, ...]:
        """See :meth:`CompressedLayer.weight_names`."""
        return tuple(f"{self._prefix(name)}{part}" for name in self.weight_shapes for part in self._tensor_names(name))

    def _tensor_names(self, name: str) -> tuple[str, ...]:
        """The last parts of the names of a weight's tensors."""
        return ("codes", "scale") if self.stores is None else tuple(self.stores[name].tensors(self.dtype))

    @property
    def spec(self) -> LayerSpec:
        """See :meth:`CompressedLayer.spec`."""
        if self.stores is None:
            return super().spec
        parts = tuple((name, store.spec) for name, store in self.stores.items())
        return LayerSpec(self.format, activations=self.activations, parts=parts)

    def scales(self) -> dict[str, ScaleForm]:
        """See :meth:`CompressedLayer.scales`."""
        if self.stores is None:
            return {f"{self._prefix(name)}scale": ScaleForm((self._rows(name),)) for name in self.weight_shapes}
        return {
            f"{self._prefix(name)}{part}": form
            for name, store in self.stores.items()
            for part, form in store.forms().items()
        }

    def _own_roles(self) -> dict[str, Role]:
        if self.stores is None:
            return super()._own_roles()
        return {
            f"{self._prefix(name)}{part}": role
            for name, store in self.stores.items()
            for part, role in store.roles().items()
        }

    def _matrix(self, name: str) -> tuple[Tensor, Tensor]:
        """Codes (rows, the rest) and scale of a weight."""
        prefix = self._prefix(name)
        return self.get_buffer(f"{prefix}codes").reshape(self._rows(name), -1), self.get_buffer(f"{prefix}scale")

    def dense_weights(self) -> dict[str, Tensor]:
        """Decode each weight, ``codes · scale``, by its name in the dense module; float32."""
        return {name: self._decoded(name).view(shape) for name, shape in self.weight_shapes.items()}

    def _decoded(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """A weight as (rows, the rest)."""
        if self.stores is not None:
            prefix = self._prefix(name)
            tensors = {part: self.get_buffer(f"{prefix}{part}") for part in self._tensor_names(name)}
            return self.stores[name].decode(tensors, dtype)
        codes, scale = self._matrix(name)
        return dequantize_rows(codes, scale) if dtype is torch.float32 else codes.to(dtype) * scale.to(dtype)[:, None]

    def dense_weight(self) -> Tensor:
        """Join all weights, flattened, in the order of :meth:`dense_weights`: (1, elements) float32."""
        return joined(self.dense_weights().values())

    def exact_weight(self) -> Tensor:
        """See :meth:`CompressedLayer.exact_weight`."""
        return joined(self._decoded(name, torch.float64) for name in self.weight_shapes)

    def with_weight(self: _Layer, weight: Tensor) -> _Layer:
        """Round other weights, joined as by :meth:`exact_weight`; see :meth:`CompressedLayer.with_weight`."""
        sizes = [(self._rows(name), math.prod(shape) // self._rows(name)) for name, shape in self.weight_shapes.items()]
        parts = split(weight, sizes, self.kind)
        layer = self._like(None, weight.device)
        for name, part in zip(self.weight_shapes, parts, strict=True):
            layer._round(name, part)
        return layer

    def _round(self, name: str, weight: Tensor) -> None:
        """Hold a weight, (rows, …), as codes, or as its store has it."""
        if self.stores is not None:
            matrix = weight.detach().reshape(self._rows(name), -1)
            for part, tensor in self.stores[name].encode(matrix, name).items():
                setattr(self, f"{self._prefix(name)}{part}", tensor)
            return
        assert self.n_bits is not None
        codes, scale = quantize_rows(weight.detach().reshape(self._rows(name), -1), self.n_bits, name=name)
        setattr(self, f"{self._prefix(name)}codes", codes.view(self.weight_shapes[name]))
        setattr(self, f"{self._prefix(name)}scale", scale)

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("weight_shapes", ()):
            # Decoded each time, as CompressedLayer.weight is.
            self.weight_decodings += 1
            return self.dense_weights()[name].detach().to(self.dtype)
        return super().__getattr__(name)
