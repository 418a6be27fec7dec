"""Recurrent layers whose weight matrices are int8 codes: smaller files, the same kernels."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lowrank.errors import UsageError
from lowrank.layers.recurrent_base import QuantizedRecurrent

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

_States = tuple[Tensor, ...]


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
        """Map (batch, input_size) or (input_size,), and the state(s), to the next state(s), as the dense module.

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
