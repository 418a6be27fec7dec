"""What every compressed layer has: a format, a shape, a size in bytes, a configuration, its dense weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from lowrank.errors import CheckpointError, RankError, UsageError

__all__ = [
    "ACTIVATIONS",
    "FLOAT_ACTIVATIONS",
    "INTEGER_ACTIVATIONS",
    "CompressedLayer",
    "check_activations",
    "check_scales",
    "check_size",
    "compressed_layers",
    "dtype_from_name",
    "graph_is_made",
]

# How products are made where weights are codes: activations rounded to integers too, or left as they are (weight-only).
INTEGER_ACTIVATIONS = "int8"
FLOAT_ACTIVATIONS = "float"
ACTIVATIONS = (INTEGER_ACTIVATIONS, FLOAT_ACTIVATIONS)
_Layer = TypeVar("_Layer", bound="CompressedLayer")


class CompressedLayer(nn.Module):
    """Base of the layers that stand in for a dense one.

    Attributes:
        kind: the class name; the key of ``LAYER_KINDS``.
        dtype: of the model around it: of the parameters, and of an embedding's output. Scales are float32 whatever it
            is.

    Example:
        >>> from lowrank.layers import QuantizedLinear
        >>> layer = QuantizedLinear(4, 2)
        >>> layer.kind, layer.format, layer.bits, layer.rank, layer.shape, layer.stored_bytes
        ('QuantizedLinear', 'int8', 8, None, (2, 4), 24)
    """

    kind: ClassVar[str] = "CompressedLayer"
    _format: ClassVar[str] = ""
    _is_integer: ClassVar[bool] = False
    dtype: torch.dtype
    n_bits: int

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.kind = cls.__name__

    @property
    def format(self) -> str:
        """``"lowrank"``, ``"lowrank-int8"`` or ``"int8"``."""
        return self._format

    @property
    def bits(self) -> int | None:
        """Bits a code uses (each is stored in a byte); ``None`` for float factors."""
        return self.n_bits if self._is_integer else None

    @property
    def rank(self) -> int | None:
        """Number of rank components; ``None`` for a layer that is not factored."""
        return None

    @property
    def shape(self) -> tuple[int, ...]:
        """(out_features, in_features), (num_embeddings, embedding_dim), or (out, in / groups, *kernel)."""
        raise NotImplementedError

    @property
    def stored_bytes(self) -> int:
        """Bytes of the tensors that a file holds for this layer."""
        return sum(tensor.nbytes for tensor in self.state_dict().values())

    @property
    def original_key(self) -> str:
        """A tensor that the dense layer has in a file and this one has not."""
        return "weight"

    def scale_lengths(self) -> dict[str, int]:
        """How many numbers each scale of this layer has, by its name; empty for float factors."""
        return {"scale": self.shape[0] if self.rank is None else self.rank} if self._is_integer else {}

    def dense_weight(self) -> Tensor:
        """The weight that this layer stands for, (out, in) or (num, dim), in its dtype or float32 for integer codes."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """All that is needed to build a layer of the same tensors, as plain JSON."""
        return {
            "kind": self.kind,
            "format": self.format,
            "shape": list(self.shape),
            "rank": self.rank,
            "bits": self.bits,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @classmethod
    def from_config(cls: type[_Layer], config: Mapping[str, Any], device: torch.device | str | None = None) -> _Layer:
        """A layer with tensors of the configured shapes; loading fills in the values.

        Args:
            config: what :meth:`config` gave.
            device: where to allocate, ``"meta"`` included.
        """
        raise NotImplementedError

    def _apply(self: _Layer, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Layer:
        before = {name: buffer for name, buffer in self._buffers.items() if name in self.scale_lengths()}
        super()._apply(fn, recurse)
        scale = None
        for name, scale in before.items():
            moved = self._buffers.get(name)
            if scale is not None and moved is not None and moved.dtype != torch.float32:
                # ``.half()`` and ``.to(torch.bfloat16)`` are meant for the model's numbers; a scale in them would move
                # every weight.
                self._buffers[name] = scale.to(moved.device)
        # What the function does to a tensor of the layer's dtype is what it asks the layer to be.
        changed = fn(torch.empty(0, dtype=self.dtype, device="cpu" if scale is None else scale.device)).dtype
        if changed.is_floating_point:
            self.dtype = changed
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        # Recomputed on the next forward; a copy made for the original's tensors would only take space.
        state.pop("_derived", None)
        return state


def graph_is_made() -> bool:
    """Whether this call is being recorded, by torch.compile, torch.export or torch.jit.trace: only operators may compute.

    Example:
        >>> graph_is_made()
        False
    """
    # torch.jit.trace does not see what the native library writes: it would record memory that nobody filled.
    return torch.compiler.is_compiling() or torch._C._is_tracing()


def compressed_layers(model: nn.Module) -> dict[str, CompressedLayer]:
    """The compressed layers of a model by name, without those that are part of another one.

    Example:
        >>> from lowrank.layers import QuantizedLinear, QuantizedMultiheadAttention
        >>> list(compressed_layers(nn.Sequential(QuantizedLinear(4, 2), QuantizedMultiheadAttention(4, 2))))
        ['0', '1']
    """
    found: dict[str, CompressedLayer] = {}
    parts: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, CompressedLayer) and id(module) not in parts:
            found[name] = module
            parts.update(id(part) for part in module.modules())
    return found


def check_scales(layer: nn.Module, name: str) -> None:
    """Refuse a loaded layer whose scale is missing, of the wrong shape or dtype, or not positive and finite.

    Args:
        layer: any compressed layer; one without integer codes has no scale and passes.
        name: of the layer, for the message.

    Raises:
        CheckpointError: says which rule the scale breaks, and where.

    Example:
        >>> from lowrank.layers import QuantizedLinear
        >>> check_scales(QuantizedLinear(4, 2), "head")
    """
    for prefix, module in layer.named_modules(prefix=name):
        if isinstance(module, CompressedLayer):
            for leaf, length in module.scale_lengths().items():
                _check_scale(getattr(module, leaf, None), prefix, leaf, length)


def _check_scale(scale: object, name: str, leaf: str, length: int) -> None:
    if not isinstance(scale, Tensor):
        raise CheckpointError(
            f"layer {name}: has integer codes but no {leaf}; the file is damaged, compress the model again"
        )
    if scale.shape != (length,) or scale.dtype != torch.float32:
        raise CheckpointError(
            f"layer {name}: {leaf} must be float32 of shape ({length},), got {scale.dtype} of shape {tuple(scale.shape)}"
        )
    wrong = ~(torch.isfinite(scale) & (scale > 0))
    if bool(wrong.any()):
        index = int(torch.nonzero(wrong)[0])
        raise CheckpointError(
            f"layer {name}: {leaf}[{index}] is {float(scale[index])}; every scale must be positive and finite"
        )


def check_size(value: object, name: str, low: int = 1) -> int:
    """A size as an int.

    Raises:
        RankError: not an integer of at least ``low``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise RankError(f"{name}: must be an integer of at least {low}, got {value!r}")
    return value


def check_activations(value: object) -> str:
    """``"int8"`` or ``"float"``.

    Raises:
        UsageError: anything else.
    """
    if value not in ACTIVATIONS:
        raise UsageError(f'activations: must be "int8" (integer products) or "float" (weight-only), got {value!r}')
    return str(value)


def dtype_from_name(name: object) -> torch.dtype:
    """``torch.float32`` for ``"float32"``.

    Raises:
        UsageError: not the name of a floating dtype.
    """
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UsageError(f'dtype: must name a floating dtype such as "float32", got {name!r}')
    return dtype
