"""What recurrent layers with coded weights share: codes and scales by the dense module's names, and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from lowrank.errors import UsageError
from lowrank.layers.matrix_store import MatrixStore
from lowrank.layers.named_weights import NamedWeights
from lowrank.layers.source import is_plain
from lowrank.layers.spec import LayerSpec
from lowrank.numerics.rounding import check_bits, require_finite

__all__ = ["QuantizedRecurrent"]

_Layer = TypeVar("_Layer", bound="QuantizedRecurrent")


class QuantizedRecurrent(NamedWeights):
    """Base: every ``weight_*`` of the dense module as int8 codes with one float32 scale a row, or each in its own way.

    Biases stay as they are.

    Weight-only: each call multiplies codes by scales once and hands the result to torch's own kernel, so the file is a
    quarter of the size, but a call is no faster; it takes longer by that multiplication (nn.LSTM, 32 steps, batch 8,
    256 features: 0.2 ms on top of 3 ms on one core).

    Attributes:
        <weight>_codes: int8 buffer of the shape of each weight, ``weight_ih_l0_codes`` for ``weight_ih_l0``.
        <weight>_scale: (rows,) float32 buffer.
        options: the arguments of the dense module, also readable one by one (``layer.hidden_size``).
        activations: ``"float"``; there is no other way.
    """

    dense_kind: ClassVar[type[nn.Module]]
    option_names: ClassVar[tuple[str, ...]]
    options: dict[str, Any]

    def __init__(
        self,
        *,
        n_bits: int | None = 8,
        stores: Mapping[str, MatrixStore] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.n_bits = None if stores is not None or n_bits is None else check_bits(n_bits, "n_bits")
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
                if stores is not None:
                    continue
                self.register_buffer(f"{name}_codes", torch.zeros(rows, columns, dtype=torch.int8, device=device))
                self.register_buffer(f"{name}_scale", torch.ones(rows, dtype=torch.float32, device=device))
            else:
                self.register_parameter(name, nn.Parameter(torch.zeros_like(tensor, device=device or "cpu")))
        if stores is not None:
            self._allocate_stores(stores, device)

    def _allocate_stores(self, stores: Mapping[str, MatrixStore], device: torch.device | str | None) -> None:
        """Register the tensors of each matrix's own way."""
        given = {name: (store.rows, store.columns) for name, store in stores.items()}
        if given != self.weight_shapes:
            raise UsageError(f"parts: must be of {self.weight_shapes}, in this order, got {given}")
        self.stores = {name: stores[name] for name in self.weight_shapes}
        for name, store in self.stores.items():
            for part, (shape, dtype) in store.tensors(self.dtype).items():
                filled = torch.ones if part in store.forms() else torch.zeros
                self.register_buffer(f"{name}_{part}", filled(shape, dtype=dtype, device=device))

    @classmethod
    def from_module(
        cls: type[_Layer], module: nn.Module, *, bits: int = 8, parts: Mapping[str, LayerSpec] | None = None
    ) -> _Layer:
        """Round every weight matrix; biases, dtype, device, mode and ``requires_grad`` of the biases are carried over.

        Args:
            bits: of all matrices, a byte a code and a float32 scale a row.
            parts: in its place, each matrix's own spec by its name: "dense", or codes of 2 to 8, 10 to 12, 14 or 16 bits; see
                :class:`MatrixStore`.

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
        stores = None if parts is None else stores_of(tensors, parts)
        layer = cls(**options, n_bits=bits, stores=stores, device="meta", dtype=None if first is None else first.dtype)
        missing = [name for name in (*layer.weight_shapes, *layer._parameters) if name not in tensors]
        if missing or first is None:
            raise UsageError(f"module: its {', '.join(missing)} is parametrized; remove the parametrization first")
        layer = layer.to_empty(device=first.device)
        with torch.no_grad():
            for name, tensor in tensors.items():
                if name in layer.weight_shapes:
                    layer._round(name, tensor)
                else:
                    bias = layer.get_parameter(name)
                    bias.copy_(require_finite(tensor.detach(), name))
                    bias.requires_grad_(tensor.requires_grad)
        return layer.train(module.training)

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
        own: dict[str, Any] = {"activations": self.activations, "options": dict(self.options)}
        if self.stores is not None:
            own["parts"] = [{"name": name} | store.to_json() for name, store in self.stores.items()]
        return super().config() | own

    @classmethod
    def _arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        own = {"n_bits": config["bits"], **config["options"]}
        if config.get("parts") is not None:
            # The dense module on the meta device knows the shapes.
            dense = _dense(cls.dense_kind, config["options"], "meta", torch.float32)
            shapes = {name: tuple(tensor.shape) for name, tensor in dense.named_parameters()}
            parts = {part["name"]: part for part in config["parts"]}
            unknown = next((name for name in parts if len(shapes.get(name, ())) != 2), None)
            if unknown is not None:
                raise UsageError(f"parts: this {cls.__name__} has no matrix {unknown!r}")
            own["stores"] = {name: MatrixStore.from_json(part, shapes[name]) for name, part in parts.items()}
        return super()._arguments(config) | own

    def __getattr__(self, name: str) -> Any:
        # Models read such options of the module they call, to make its first state.
        if name in type(self).option_names and "options" in self.__dict__:
            return self.__dict__["options"][name]
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        """Say what ``repr`` shows."""
        held = "parts" if self.stores is not None else f"bits={self.n_bits}"
        return ", ".join([*(f"{key}={value}" for key, value in self.options.items()), held])

    def flatten_parameters(self) -> None:
        """Do nothing; models call it before a forward, for cuDNN's sake."""

    def _tensors(self, x: Tensor) -> dict[str, Tensor]:
        """Weights and biases as torch's kernels take them."""
        if not torch.is_autocast_enabled(x.device.type) and x.dtype != self.dtype:
            raise UsageError(f"input: {self.kind} is {self.dtype}, got {x.dtype}; convert the one or the other")
        tensors = {name: weight.to(self.dtype) for name, weight in self.dense_weights().items()}
        tensors.update(self.named_parameters())
        return tensors


def stores_of(tensors: Mapping[str, Tensor], parts: Mapping[str, LayerSpec]) -> dict[str, MatrixStore]:
    """Describe how each matrix is held, in the order of the tensors.

    Raises:
        UsageError: a part without a matrix, or a matrix without a part.
    """
    matrices = {name: tensor for name, tensor in tensors.items() if tensor.ndim == 2}
    odd = next((name for name in (*parts, *matrices) if name not in matrices or name not in parts), None)
    if odd is not None:
        raise UsageError(f"parts: must name {', '.join(matrices)}, each once; {odd!r} is not in both")
    return {name: MatrixStore.of(tensor, parts[name]) for name, tensor in matrices.items()}


def _dense(kind: type[nn.Module], options: Mapping[str, Any], device: str, dtype: torch.dtype) -> nn.Module:
    """A dense module of these options; no word about a dropout that a single layer does not use."""
    dropout = options.get("dropout", 0.0)
    alone = options.get("num_layers", 1) == 1 and isinstance(dropout, float) and 0.0 < dropout <= 1.0
    module = kind(**{**options, "dropout": 0.0} if alone else options, device=device, dtype=dtype)
    if alone:
        module.dropout = dropout
    return module
