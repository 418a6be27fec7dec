"""Recurrent layers whose weight matrices are int8 codes: smaller files, the same kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lowrank.errors import UsageError
from lowrank.layers.base import CompressedLayer, dtype_from_name
from lowrank.quantization import check_bits, dequantize_rows, quantize_rows, require_finite

__all__ = [
    "RECURRENT",
    "QuantizedGRU",
    "QuantizedGRUCell",
    "QuantizedLSTM",
    "QuantizedLSTMCell",
    "QuantizedRNN",
    "QuantizedRNNCell",
    "QuantizedRecurrent",
]

_Layer = TypeVar("_Layer", bound="QuantizedRecurrent")
_States = tuple[Tensor, ...]


class QuantizedRecurrent(CompressedLayer):
    """Base: every ``weight_*`` of the dense module as int8 codes with one float32 scale a row, biases as they are.

    Weight-only: each call multiplies codes by scales once and hands the result to torch's own kernel, so the file is a
    quarter of the size, but a call is no faster; it takes longer by that multiplication (measured on 32 steps, batch 8,
    256 features: OVERHEAD).

    Attributes:
        <weight>_codes: int8 buffer of the shape of each weight, ``weight_ih_l0_codes`` for ``weight_ih_l0``.
        <weight>_scale: (rows,) float32 buffer.
        options: the arguments of the dense module, also readable one by one (``layer.hidden_size``).
        activations: ``"float"``; there is no other way.
    """

    _format: ClassVar[str] = "int8"
    _is_integer: ClassVar[bool] = True
    dense_kind: ClassVar[type[nn.Module]]
    option_names: ClassVar[tuple[str, ...]]
    activations: ClassVar[str] = "float"
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
        if type(module) is not cls.dense_kind:
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

    def scale_lengths(self) -> dict[str, int]:
        """See :meth:`CompressedLayer.scale_lengths`."""
        return {f"{name}_scale": rows for name, (rows, _) in self.weight_shapes.items()}

    def dense_weights(self) -> dict[str, Tensor]:
        """``codes · scale`` of each weight by its name in the dense module, float32."""
        return {
            name: dequantize_rows(self.get_buffer(f"{name}_codes"), self.get_buffer(f"{name}_scale"))
            for name in self.weight_shapes
        }

    def dense_weight(self) -> Tensor:
        """All weights, flattened and joined in the order of :meth:`dense_weights`, (1, elements) float32."""
        return torch.cat([weight.flatten() for weight in self.dense_weights().values()])[None]

    def dequantize(self) -> nn.Module:
        """A dense module of the rounded weights, in the dtype of the model."""
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
    def from_config(cls: type[_Layer], config: Mapping[str, Any], device: torch.device | str | None = None) -> _Layer:
        """See :meth:`CompressedLayer.from_config`."""
        dtype = dtype_from_name(config["dtype"])
        return cls(**config["options"], n_bits=config["bits"], device=device, dtype=dtype)

    def __getattr__(self, name: str) -> Any:
        # Models read such options of the module they call, to make its first state.
        if name in type(self).option_names and "options" in self.__dict__:
            return self.__dict__["options"][name]
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return ", ".join([f"{key}={value}" for key, value in self.options.items()] + [f"bits={self.n_bits}"])

    def flatten_parameters(self) -> None:
        """Nothing to do; models call it before a forward, for cuDNN's sake."""

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


class _Sequence(QuantizedRecurrent):
    """What the layers over whole sequences share."""

    option_names: ClassVar[tuple[str, ...]] = (
        "input_size",
        "hidden_size",
        "num_layers",
        "bias",
        "batch_first",
        "dropout",
        "bidirectional",
    )
    _states: ClassVar[int] = 1

    def _kernel(self) -> Any:
        """The function of torch that computes it."""
        raise NotImplementedError

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:
        """As the dense module: (steps, batch, input_size), batch first where so configured, unbatched or packed.

        Returns:
            output and last state(s), as the dense module does. Gradients reach the input, the states and the biases.

        Raises:
            UsageError: a shape or dtype that the layer does not take.
        """
        packed = isinstance(input, PackedSequence)
        x = input.data if isinstance(input, PackedSequence) else input
        batch_dimension = 0 if self.batch_first else 1
        allowed = (2,) if packed else (2, 3)
        if x.ndim not in allowed or x.shape[-1] != self.input_size:
            raise UsageError(
                f"input: {self.kind} takes 2-d (unbatched) or 3-d tensors of {self.input_size} features, "
                f"got {tuple(x.shape)}"
            )
        unbatched = not packed and x.ndim == 2
        states = self._given(hx, unbatched)
        if unbatched:
            x = x.unsqueeze(batch_dimension)
        batch = int(input.batch_sizes[0]) if isinstance(input, PackedSequence) else x.shape[batch_dimension]
        states = self._checked(states, x, batch)
        tensors = self._tensors(x)
        # In the order of the dense module's own list: layer by layer, direction by direction.
        flat = [tensors[name] for name in self._flat_names()]
        head = self._kernel()
        state: Any = states if self._states > 1 else states[0]
        common = (self.bias, self.num_layers, self.dropout, self.training, self.bidirectional)
        if isinstance(input, PackedSequence):
            if input.sorted_indices is not None:
                states = tuple(each.index_select(1, input.sorted_indices) for each in states)
                state = states if self._states > 1 else states[0]
            result = head(x, input.batch_sizes, state, flat, *common)
            last = result[1:]
            if input.unsorted_indices is not None:
                last = tuple(each.index_select(1, input.unsorted_indices) for each in last)
            output: Any = PackedSequence(result[0], input.batch_sizes, input.sorted_indices, input.unsorted_indices)
        else:
            result = head(x, state, flat, *common, self.batch_first)
            output, last = result[0], result[1:]
            if unbatched:
                output, last = output.squeeze(batch_dimension), tuple(each.squeeze(1) for each in last)
        return output, tuple(last) if self._states > 1 else last[0]

    def _flat_names(self) -> list[str]:
        directions = ("", "_reverse") if self.bidirectional else ("",)
        kinds = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if self.bias else [])]
        kinds += ["weight_hr"] if self.options.get("proj_size") else []
        return [f"{kind}_l{layer}{way}" for layer in range(self.num_layers) for way in directions for kind in kinds]

    def _state_sizes(self) -> tuple[int, ...]:
        return (self.options.get("proj_size") or self.hidden_size, self.hidden_size)[: self._states]

    def _given(self, hx: Any, unbatched: bool) -> _States | None:
        """The states passed in, batched."""
        if hx is None:
            return None
        states = tuple(hx) if self._states > 1 else (hx,)
        if len(states) != self._states or any(each.ndim != (2 if unbatched else 3) for each in states):
            raise UsageError(
                f"hx: {self.kind} takes {self._states} state(s), 2-d for an unbatched input and 3-d otherwise, "
                f"got {[tuple(each.shape) for each in states]}"
            )
        return tuple(each.unsqueeze(1) for each in states) if unbatched else states

    def _checked(self, states: _States | None, x: Tensor, batch: int) -> _States:
        """The first states: zeros where none were passed."""
        count = self.num_layers * (2 if self.bidirectional else 1)
        shapes = [(count, batch, size) for size in self._state_sizes()]
        if states is None:
            return tuple(torch.zeros(shape, dtype=x.dtype, device=x.device) for shape in shapes)
        for state, shape in zip(states, shapes, strict=True):
            if state.shape != shape:
                raise UsageError(f"hx: must be of shape {shape}, got {tuple(state.shape)}")
        return states


class QuantizedLSTM(_Sequence):
    """``nn.LSTM`` with int8 weights; see :class:`QuantizedRecurrent`.

    Example:
        >>> layer = QuantizedLSTM.from_module(nn.LSTM(6, 4, bidirectional=True))
        >>> output, (hidden, cell) = layer(torch.zeros(5, 2, 6))
        >>> output.shape, hidden.shape, layer.weight_hh_l0_codes.dtype
        (torch.Size([5, 2, 8]), torch.Size([2, 2, 4]), torch.int8)
    """

    dense_kind: ClassVar[type[nn.Module]] = nn.LSTM
    option_names: ClassVar[tuple[str, ...]] = (*_Sequence.option_names, "proj_size")
    _states: ClassVar[int] = 2

    def _kernel(self) -> Any:
        return torch.lstm


class QuantizedGRU(_Sequence):
    """``nn.GRU`` with int8 weights; see :class:`QuantizedRecurrent`.

    Example:
        >>> layer = QuantizedGRU.from_module(nn.GRU(6, 4))
        >>> layer(torch.zeros(5, 6))[0].shape
        torch.Size([5, 4])
    """

    dense_kind: ClassVar[type[nn.Module]] = nn.GRU

    def _kernel(self) -> Any:
        return torch.gru


class QuantizedRNN(_Sequence):
    """``nn.RNN`` with int8 weights; see :class:`QuantizedRecurrent`.

    Example:
        >>> layer = QuantizedRNN.from_module(nn.RNN(6, 4, nonlinearity="relu"))
        >>> layer(torch.zeros(5, 6))[0].shape
        torch.Size([5, 4])
    """

    dense_kind: ClassVar[type[nn.Module]] = nn.RNN
    option_names: ClassVar[tuple[str, ...]] = (*_Sequence.option_names, "nonlinearity")

    def _kernel(self) -> Any:
        return torch.rnn_tanh if self.nonlinearity == "tanh" else torch.rnn_relu


class _Cell(QuantizedRecurrent):
    """What the layers of a single step share."""

    option_names: ClassVar[tuple[str, ...]] = ("input_size", "hidden_size", "bias")
    _states: ClassVar[int] = 1

    def _kernel(self) -> Any:
        """The function of torch that computes it."""
        raise NotImplementedError

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """(batch, input_size) or (input_size,), and the state(s), to the next state(s), as the dense module.

        Raises:
            UsageError: a shape or dtype that the layer does not take.
        """
        if input.ndim not in (1, 2) or input.shape[-1] != self.input_size:
            raise UsageError(
                f"input: {self.kind} takes (batch, {self.input_size}) or ({self.input_size},), got {tuple(input.shape)}"
            )
        unbatched = input.ndim == 1
        x = input.unsqueeze(0) if unbatched else input
        if hx is None:
            states: _States = (torch.zeros(x.shape[0], self.hidden_size, dtype=x.dtype, device=x.device),)
            states = states * self._states
        else:
            states = tuple(hx) if self._states > 1 else (hx,)
            if len(states) != self._states or any(
                each.shape != (*input.shape[:-1], self.hidden_size) for each in states
            ):
                raise UsageError(
                    f"hx: {self.kind} takes {self._states} state(s) of shape {(*input.shape[:-1], self.hidden_size)}, "
                    f"got {[tuple(each.shape) for each in states]}"
                )
            states = tuple(each.unsqueeze(0) for each in states) if unbatched else states
        tensors = self._tensors(x)
        flat = [tensors.get(name) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        result = self._kernel()(x, states if self._states > 1 else states[0], *flat)
        following: _States = tuple(result) if self._states > 1 else (result,)
        following = tuple(each.squeeze(0) for each in following) if unbatched else following
        return following if self._states > 1 else following[0]


class QuantizedLSTMCell(_Cell):
    """``nn.LSTMCell`` with int8 weights; see :class:`QuantizedRecurrent`.

    Example:
        >>> hidden, cell = QuantizedLSTMCell.from_module(nn.LSTMCell(6, 4))(torch.zeros(2, 6))
        >>> hidden.shape
        torch.Size([2, 4])
    """

    dense_kind: ClassVar[type[nn.Module]] = nn.LSTMCell
    _states: ClassVar[int] = 2

    def _kernel(self) -> Any:
        return torch.lstm_cell


class QuantizedGRUCell(_Cell):
    """``nn.GRUCell`` with int8 weights; see :class:`QuantizedRecurrent`.

    Example:
        >>> QuantizedGRUCell.from_module(nn.GRUCell(6, 4))(torch.zeros(6)).shape
        torch.Size([4])
    """

    dense_kind: ClassVar[type[nn.Module]] = nn.GRUCell

    def _kernel(self) -> Any:
        return torch.gru_cell


class QuantizedRNNCell(_Cell):
    """``nn.RNNCell`` with int8 weights; see :class:`QuantizedRecurrent`.

    Example:
        >>> QuantizedRNNCell.from_module(nn.RNNCell(6, 4))(torch.zeros(6)).shape
        torch.Size([4])
    """

    dense_kind: ClassVar[type[nn.Module]] = nn.RNNCell
    option_names: ClassVar[tuple[str, ...]] = (*_Cell.option_names, "nonlinearity")

    def _kernel(self) -> Any:
        return torch.rnn_tanh_cell if self.nonlinearity == "tanh" else torch.rnn_relu_cell


RECURRENT: dict[type[nn.Module], type[QuantizedRecurrent]] = {
    kind.dense_kind: kind
    for kind in (QuantizedLSTM, QuantizedGRU, QuantizedRNN, QuantizedLSTMCell, QuantizedGRUCell, QuantizedRNNCell)
}
