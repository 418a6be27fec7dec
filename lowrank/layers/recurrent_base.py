"""What recurrent layers with int8 weights share: codes and scales by the dense module's names, and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from lowrank.errors import UsageError
from lowrank.layers.base import CompressedLayer
from lowrank.layers.checks import FLOAT_ACTIVATIONS
from lowrank.layers.source import is_plain
from lowrank.layers.weights import joined, split
from lowrank.numerics.rounding import check_bits, dequantize_rows, quantize_rows, require_finite

__all__ = ["QuantizedRecurrent"]

_Layer = TypeVar("_Layer", bound="QuantizedRecurrent")


class QuantizedRecurrent(CompressedLayer):
    """Base: every ``weight_*`` of the dense module as int8 codes with one float32 scale a row, biases as they are.

    Weight-only: each call multiplies codes by scales once and hands the result to torch's own kernel, so the file is a
    quarter of the size, but a call is no faster; it takes longer by that multiplication (nn.LSTM, 32 steps, batch 8,
    256 features: 0.2 ms on top of 3 ms on one core).

    Attributes:
        <weight>_codes: int8 buffer of the shape of each weight, ``weight_ih_l0_codes`` for ``weight_ih_l0``.
        <weight>_scale: (rows,) float32 buffer.
        options: the arguments of the dense module, also readable one by one (``layer.hidden_size``).
        activations: ``"float"``; there is no other way.
    """

    is_one_weight: ClassVar[bool] = False
    dense_kind: ClassVar[type[nn.Module]]
    option_names: ClassVar[tuple[str, ...]]
    activations: str = FLOAT_ACTIVATIONS
    n_bits: int
    options: dict[str, Any]
    weight_shapes: dict[str, tuple[int, int]]

    def __init__(
        self,
        *,
        n_bits: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.n_bits = check_bits(n_bits, "n_bits")
        self.dtype = dtype or torch.get_default_dtype()
        unknown = set(options) - set(self.option_names)
        if unknown:
            raise UsageError(f"{sorted(unknown)[0]}: {self.kind} takes {', '.join(self.option_names)}")
        # The dense module on the meta device checks the options and knows its tensors' names and shapes.
        dense = _dense(self.dense_kind, options, "meta", self.dtype)
        self.options = {name: getattr(dense, name) for name in self.option_names}
        self.weight_shapes = {}
        for name, tensor in dense.named_parameters():
            if name.startswith("weight_"):
                rows, columns = tensor.shape
                self.weight_shapes[name] = (rows, columns)
                self.register_buffer(f"{name}_codes", torch.zeros(rows, columns, dtype=torch.int8, device=device))
                self.register_buffer(f"{name}_scale", torch.ones(rows, dtype=torch.float32, device=device))
            else:
                self.register_parameter(name, nn.Parameter(torch.zeros_like(tensor, device=device or "cpu")))

    @classmethod
    def from_module(cls: type[_Layer], module: nn.Module, *, bits: int = 8) -> _Layer:
        """Round every weight matrix; biases, dtype, device, mode and ``requires_grad`` of the biases are carried over.

        Raises:
            UsageError: not a plain module of this kind, or one that is parametrized.
            RankError: bits outside 2 to 8.
            NumericsError: NaN or Inf in a tensor.
        """
        if not is_plain(module, cls.dense_kind):
            raise UsageError(f"module: must be an nn.{cls.dense_kind.__name__}, got {type(module).__name__}")
        options = {name: getattr(module, name) for name in cls.option_names}
        tensors = dict(module.named_parameters())
        first = next(iter(tensors.values()), None)
        layer = cls(**options, n_bits=bits, device="meta", dtype=None if first is None else first.dtype)
        missing = [name for name in (*layer.weight_shapes, *layer._parameters) if name not in tensors]
        if missing or first is None:
            raise UsageError(f"module: its {', '.join(missing)} is parametrized; remove the parametrization first")
        layer = layer.to_empty(device=first.device)
        with torch.no_grad():
            for name, tensor in tensors.items():
                if name in layer.weight_shapes:
                    codes, scale = quantize_rows(tensor, bits, name=name)
                    setattr(layer, f"{name}_codes", codes)
                    setattr(layer, f"{name}_scale", scale)
                else:
                    bias = layer.get_parameter(name)
                    bias.copy_(require_finite(tensor.detach(), name))
                    bias.requires_grad_(tensor.requires_grad)
        return layer.train(module.training)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the first weight; a recurrent layer has at least two."""
        return next(iter(self.weight_shapes.values()))

    @property
    def original_key(self) -> str:
        """See :meth:`CompressedLayer.original_key`."""
        return next(iter(self.weight_shapes))

    @property
    def weight_names(self) -> tuple[str, ...]:
        """See :meth:`CompressedLayer.weight_names`."""
        return tuple(f"{name}_{part}" for name in self.weight_shapes for part in ("codes", "scale"))

    def scale_lengths(self) -> dict[str, int]:
        """See :meth:`CompressedLayer.scale_lengths`."""
        return {f"{name}_scale": rows for name, (rows, _) in self.weight_shapes.items()}

    def dense_weights(self) -> dict[str, Tensor]:
        """Compute ``codes · scale`` of each weight by its name in the dense module, float32."""
        return {
            name: dequantize_rows(self.get_buffer(f"{name}_codes"), self.get_buffer(f"{name}_scale"))
            for name in self.weight_shapes
        }

    def dense_weight(self) -> Tensor:
        """Join all weights, flattened, in the order of :meth:`dense_weights`: (1, elements) float32."""
        return joined(self.dense_weights().values())

    def exact_weight(self) -> Tensor:
        """See :meth:`CompressedLayer.exact_weight`."""
        pairs = ((self.get_buffer(f"{name}_codes"), self.get_buffer(f"{name}_scale")) for name in self.weight_shapes)
        return joined(codes.double() * scale.double()[:, None] for codes, scale in pairs)

    def with_weight(self: _Layer, weight: Tensor) -> _Layer:
        """Round other weights, joined as by :meth:`exact_weight`; see :meth:`CompressedLayer.with_weight`."""
        parts = split(weight, list(self.weight_shapes.values()), self.kind)
        layer = self._like(None, weight.device)
        for name, part in zip(self.weight_shapes, parts, strict=True):
            codes, scale = quantize_rows(part, self.n_bits, name=name)
            setattr(layer, f"{name}_codes", codes)
            setattr(layer, f"{name}_scale", scale)
        return layer

    def dequantize(self) -> nn.Module:
        """Make a dense module of the rounded weights, in the dtype of the model."""
        device = next(self.buffers()).device
        module = _dense(self.dense_kind, self.options, "meta", self.dtype).to_empty(device=device)
        with torch.no_grad():
            for name, weight in self.dense_weights().items():
                module.get_parameter(name).copy_(weight)
            for name, bias in self.named_parameters():
                module.get_parameter(name).copy_(bias).requires_grad_(bias.requires_grad)
        return module.train(self.training)

    def config(self) -> dict[str, Any]:
        """See :meth:`CompressedLayer.config`."""
        return super().config() | {"activations": self.activations, "options": dict(self.options)}

    @classmethod
    def _arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return super()._arguments(config) | {"n_bits": config["bits"], **config["options"]}

    def __getattr__(self, name: str) -> Any:
        # Models read such options of the module they call, to make its first state.
        if name in type(self).option_names and "options" in self.__dict__:
            return self.__dict__["options"][name]
        if name in self.__dict__.get("weight_shapes", ()):
            # Decoded each time, as CompressedLayer.weight is.
            self.weight_decodings += 1
            return self.dense_weights()[name].detach().to(self.dtype)
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        """Say what ``repr`` shows."""
        return ", ".join([f"{key}={value}" for key, value in self.options.items()] + [f"bits={self.n_bits}"])

    def flatten_parameters(self) -> None:
        """Do nothing; models call it before a forward, for cuDNN's sake."""

    def _tensors(self, x: Tensor) -> dict[str, Tensor]:
        """Weights and biases as torch's kernels take them."""
        if not torch.is_autocast_enabled(x.device.type) and x.dtype != self.dtype:
            raise UsageError(f"input: {self.kind} is {self.dtype}, got {x.dtype}; convert the one or the other")
        tensors = {name: weight.to(self.dtype) for name, weight in self.dense_weights().items()}
        tensors.update(self.named_parameters())
        return tensors


def _dense(kind: type[nn.Module], options: Mapping[str, Any], device: str, dtype: torch.dtype) -> nn.Module:
    """A dense module of these options; no word about a dropout that a single layer does not use."""
    dropout = options.get("dropout", 0.0)
    alone = options.get("num_layers", 1) == 1 and isinstance(dropout, float) and 0.0 < dropout <= 1.0
    module = kind(**{**options, "dropout": 0.0} if alone else options, device=device, dtype=dtype)
    if alone:
        module.dropout = dropout
    return module
