"""Any module that owns matrices or kernels, with int8 codes in their place: decoded into its own forward on each call."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lowrank.errors import CheckpointError, UsageError, is_whole
from lowrank.layers.named_weights import NamedWeights
from lowrank.numerics.rounding import check_bits, require_finite

__all__ = ["DecodedLayer", "matrices_of", "rows_of"]

_Layer = TypeVar("_Layer", bound="DecodedLayer")

# A scale takes four bytes; over so many codes they are an eighth. Fewer and the row is joined to its neighbours.
SHORTEST_ROW = 32


def matrices_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """Give the parameters of a module itself that are matrices or kernels: at least two sizes above 1.

    Example:
        >>> list(matrices_of(nn.Conv3d(2, 4, 3))), list(matrices_of(nn.PReLU(4)))
        (['weight'], [])
    """
    return {
        name: parameter
        for name, parameter in module._parameters.items()
        if parameter is not None
        and not torch.nn.parameter.is_lazy(parameter)
        and parameter.is_floating_point()
        and sum(size > 1 for size in parameter.shape) >= 2
    }


def rows_of(shape: Sequence[int], *, kernel: bool) -> int:
    """Say into how many rows, each with a scale, a tensor is cut: by the first size of a kernel, else as finely as pays.

    Example:
        >>> rows_of((64, 32, 3, 3), kernel=True), rows_of((8, 64, 128), kernel=False), rows_of((64, 8, 3), kernel=False)
        (64, 512, 64)
    """
    for axis in range(len(shape) - 1, 0, -1):
        if not kernel and math.prod(shape[axis:]) >= SHORTEST_ROW:
            return math.prod(shape[:axis])
    return shape[0]


class DecodedLayer(NamedWeights):
    """A module of the user's own, with each of its matrices and kernels as int8 codes and a float32 scale a row.

    Weight-only: each call multiplies codes by scales and runs the module's own ``forward`` on the result. So whatever that does with its
    weight (pads first, standardises it, multiplies it by a gain) is done as before, at the speed of before and the time of decoding.
    Other parameters and the buffers are this layer's own, by their names. The class itself and its attributes are not stored: loading
    takes them from the structure that is passed to it (:meth:`adopt`).

    Args:
        weights: shapes of what is held as codes, by name.
        rows: of each, see :func:`rows_of`.
        others: shapes of the other parameters.
        stored: (dtype, shape) of the buffers that a file holds.
        n_bits: of a code, 2 to 8.

    Attributes:
        codes, scale: of a module whose only matrix is ``weight``; else ``<name>_codes`` and ``<name>_scale`` of each.
        source: the module, without numbers in the places of what this layer holds; ``None`` until :meth:`adopt`.

    Example:
        >>> layer = DecodedLayer.from_module(nn.ConvTranspose1d(4, 6, 3))
        >>> layer(torch.ones(1, 4, 5)).shape, layer.codes.dtype, layer.stored_bytes
        (torch.Size([1, 6, 7]), torch.int8, 112)
    """

    def __init__(
        self,
        weights: Mapping[str, Sequence[int]],
        rows: Mapping[str, int],
        others: Mapping[str, Sequence[int]] | None = None,
        stored: Mapping[str, tuple[str, Sequence[int]]] | None = None,
        *,
        n_bits: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.n_bits = check_bits(n_bits, "n_bits")
        self.dtype = dtype or torch.get_default_dtype()
        self.__dict__["source"] = None
        self.weight_shapes = {name: tuple(shape) for name, shape in weights.items()}
        self.weight_rows = dict(rows)
        others, stored = others or {}, stored or {}
        for name, shape in self.weight_shapes.items():
            count = self.weight_rows.get(name)
            if not is_whole(count, 1) or math.prod(shape) % count:
                raise UsageError(f"rows: a weight of shape {shape} cannot be cut into {count!r} rows")
        odd = next(
            (kind for kind, _ in stored.values() if not isinstance(getattr(torch, kind, None), torch.dtype)), None
        )
        if odd is not None:
            raise UsageError(f"stored: {odd!r} is no dtype")
        short = list(weights) == ["weight"] and not {"codes", "scale"} & {*others, *stored}
        self.prefixes = {name: "" if short else f"{name}_" for name in self.weight_shapes}
        for name in self.weight_shapes:
            self._make_room(name, device)
        for name, size in others.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(tuple(size), dtype=self.dtype, device=device)))
        for name, (kind, size) in stored.items():
            self.register_buffer(name, torch.zeros(tuple(size), dtype=getattr(torch, kind), device=device))

    @classmethod
    def from_module(cls: type[_Layer], module: nn.Module, *, bits: int = 8) -> _Layer:
        """Round every matrix and kernel of a module; everything else is carried over.

        Raises:
            UsageError: it holds none, or has children with tensors of their own.
            RankError: bits outside 2 to 8.
            NumericsError: NaN or Inf in a parameter.
        """
        layer = cls._empty_for(module, n_bits=bits)
        with torch.no_grad():
            for name in layer.weight_shapes:
                layer._round(name, module.get_parameter(name))
        return layer._completed(module)

    @classmethod
    def _held_as_codes(cls, module: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters of a module that become codes."""
        return matrices_of(module)

    @classmethod
    def _empty_for(cls: type[_Layer], module: nn.Module, **own: Any) -> _Layer:
        """A layer with room for what a module holds.

        Args:
            own: what the class takes beside shapes and rows.
        """
        matrices = cls._held_as_codes(module)
        first = next(iter(matrices.values()), None)
        if first is None or any(True for child in module.children() for _ in child.state_dict()):
            raise UsageError(
                f"module: must hold a matrix or kernel, and no children with tensors, got {type(module).__name__}"
            )
        return cls(
            {name: tuple(each.shape) for name, each in matrices.items()},
            {name: cls._rows_for(module, each) for name, each in matrices.items()},
            {
                name: tuple(each.shape)
                for name, each in module._parameters.items()
                if each is not None and name not in matrices
            },
            {
                name: (str(each.dtype).removeprefix("torch."), tuple(each.shape))
                for name, each in _stored(module).items()
            },
            **own,
            device=first.device,
            dtype=first.dtype,
        )

    @classmethod
    def _rows_for(cls, module: nn.Module, weight: Tensor) -> int:
        return rows_of(weight.shape, kernel=_is_kernel(module))

    def _completed(self: _Layer, module: nn.Module) -> _Layer:
        """Carry over everything of a module that is not held as codes."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                given = module._parameters[name]
                assert given is not None
                parameter.copy_(require_finite(given.detach(), name)).requires_grad_(given.requires_grad)
            for name, buffer in _stored(module).items():
                self._buffers[name] = buffer.detach().clone()
        self.adopt(module, module.__class__.__name__)
        return self.train(module.training)

    def _make_room(self, name: str, device: torch.device | str | None) -> None:
        """Register the codes of one weight."""
        prefix = self.prefixes[name]
        self.register_buffer(f"{prefix}codes", torch.zeros(self.weight_shapes[name], dtype=torch.int8, device=device))
        self.register_buffer(f"{prefix}scale", torch.ones(self.weight_rows[name], device=device))

    def _prefix(self, name: str) -> str:
        return self.prefixes[name]

    def _rows(self, name: str) -> int:
        return self.weight_rows[name]

    def adopt(self, module: nn.Module, name: str) -> None:
        """Take over the class, the attributes and the forward of a module; its numbers do not count.

        Args:
            module: like the one that the layer was made from; stays as it is.
            name: for messages.

        Raises:
            CheckpointError: it has other parameters or buffers.
        """
        held = {key: tuple(value.shape) for key, value in module._parameters.items() if value is not None}
        held |= {key: tuple(value.shape) for key, value in _stored(module).items()}
        own = {key: tuple(value.shape) for key, value in self._kept().items()} | self.weight_shapes
        if held != own:
            raise CheckpointError(
                f"layer {name}: the {type(module).__name__} of the model holds {held}, the one that was compressed held {own}"
            )
        empty: dict[int, Any] = {}
        for value in (*module._parameters.values(), *_stored(module).values()):
            if isinstance(value, nn.Parameter):
                empty[id(value)] = nn.Parameter(value.detach().to("meta"), value.requires_grad)
            elif value is not None:
                empty[id(value)] = value.to("meta")
        # Not a child: its tensors are no tensors of the model.
        self.__dict__["source"] = copy.deepcopy(module, empty)

    def _kept(self) -> dict[str, Tensor]:
        """The tensors that the module had as they are."""
        codes = set(self.weight_names)
        tensors: dict[str, Tensor] = dict(self.named_parameters(recurse=False))
        return tensors | {name: value for name, value in self.named_buffers(recurse=False) if name not in codes}

    def _like(self: _Layer, rank: int | None, device: torch.device) -> _Layer:
        layer = super()._like(rank, device)
        layer.__dict__["source"] = None if self.source is None else copy.deepcopy(self.source)
        for name, value in self._kept().items():
            if not isinstance(value, nn.Parameter):
                layer._buffers[name] = value.detach().clone()
        return layer

    def dequantize(self) -> nn.Module:
        """Make the module again, with the rounded weights, in the dtype of the model."""
        module = copy.deepcopy(self._adopted())
        for name, value in self.dense_weights().items():
            was = module._parameters[name]
            module._parameters[name] = nn.Parameter(value.to(self.dtype), was is not None and was.requires_grad)
        for name, value in self._kept().items():
            if isinstance(value, nn.Parameter):
                module._parameters[name] = nn.Parameter(value.detach().clone(), value.requires_grad)
            else:
                module._buffers[name] = value.detach().clone()
        found: nn.Module = module.train(self.training)
        return found

    def _adopted(self) -> nn.Module:
        source: nn.Module | None = self.__dict__["source"]
        if source is None:
            raise UsageError(
                f"{self.kind}: has no forward yet; lowrank.load_model takes it from the structure passed as model="
            )
        return source

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward on the decoded weights."""
        tensors = {name: weight.to(self.dtype) for name, weight in self.dense_weights().items()}
        return functional_call(self._adopted(), tensors | self._kept(), args, kwargs)

    def train(self: _Layer, mode: bool = True) -> _Layer:
        """Set the mode of the module too."""
        super().train(mode)
        if self.__dict__.get("source") is not None:
            self._adopted().train(mode)
        return self

    def _apply(self: _Layer, fn: Any, recurse: bool = True) -> _Layer:
        # float32 scales and int8 codes whatever the model becomes; the base sees to that for every layer.
        super()._apply(fn, recurse)
        source = self.__dict__.get("source")
        if source is not None:
            for name in source._non_persistent_buffers_set:
                if source._buffers[name] is not None:
                    source._buffers[name] = fn(source._buffers[name])
        return self

    def config(self) -> dict[str, Any]:
        """See :meth:`CompressedLayer.config`."""
        kept = self._kept()
        return super().config() | {
            "activations": self.activations,
            "weights": {name: list(shape) for name, shape in self.weight_shapes.items()},
            "rows": dict(self.weight_rows),
            "others": {name: list(value.shape) for name, value in kept.items() if isinstance(value, nn.Parameter)},
            "stored": {
                name: [str(value.dtype).removeprefix("torch."), list(value.shape)]
                for name, value in kept.items()
                if not isinstance(value, nn.Parameter)
            },
        }

    @classmethod
    def _arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        own = {name: config[name] for name in ("weights", "rows", "others", "stored")}
        return super()._arguments(config) | {"n_bits": config["bits"]} | own

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Models read what the module says of itself: its stride, its size.
            if self.__dict__.get("source") is None or name.startswith("__"):
                raise
            return getattr(self.__dict__["source"], name)

    def extra_repr(self) -> str:
        """Say what ``repr`` shows."""
        source = self.__dict__.get("source")
        return f"{'?' if source is None else source}, bits={self.n_bits}"


def _is_kernel(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd)


def _stored(module: nn.Module) -> dict[str, Tensor]:
    """The buffers of a module itself that a file holds."""
    return {
        name: buffer
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }
