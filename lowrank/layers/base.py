"""What every compressed layer has: a format, a shape, a size in bytes, a configuration, its dense weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.fx.proxy import Proxy

from lowrank.errors import UsageError
from lowrank.layers.checks import ACTIVATIONS, FLOAT_ACTIVATIONS, INTEGER_ACTIVATIONS, dtype_from_name
from lowrank.layers.roles import CODES, FLOAT, SCALE, Role, ScaleForm
from lowrank.layers.spec import LayerSpec
from lowrank.layers.tracing import recorded
from lowrank.layers.weight_view import WeightView, no_other_weight
from lowrank.numerics.conv_factors import largest_rank

__all__ = [
    "ACTIVATIONS",
    "FLOAT_ACTIVATIONS",
    "INTEGER_ACTIVATIONS",
    "CompressedLayer",
    "Role",
    "declare_format",
    "graph_is_made",
]

_Layer = TypeVar("_Layer", bound="CompressedLayer")
_Holds = Callable[["CompressedLayer"], bool]
_declared: dict[type[nn.Module], dict[str, _Holds | None]] = {}


def declare_format(kind: type[CompressedLayer], name: str, holds: _Holds | None = None) -> None:
    """Say which format the layers of a class are of; subclasses inherit it, and the format declared first wins.

    Args:
        kind: the class.
        name: of the format.
        holds: tells the layers that are of this format, where a class serves several; all of them if left out.
    """
    _declared.setdefault(kind, {})[name] = holds


class CompressedLayer(nn.Module):
    """Base of the layers that stand in for a dense one.

    A layer says for itself what it holds (:meth:`roles`, :attr:`spec`), which weight that makes (:meth:`dense_weight`,
    :meth:`exact_weight`, :meth:`factors`), and how a layer like it holds another one (:meth:`with_weight`, :meth:`with_factors`,
    :meth:`appended`).

    Attributes:
        kind: the class name; the key of ``LAYER_KINDS``.
        dtype: of the model around it: of the parameters, and of an embedding's output. Scales are float32 whatever it
            is.
        activations: how products with codes are made, ``"int8"`` or ``"float"``; ``None`` where there are none.
        scheme: how a convolution's kernel is cut in two; ``None`` where it is not.
        looks_up: whether rows are looked up and not multiplied, so that the weight is held as (in, out).
        is_one_weight: whether there is one matrix or kernel; not so for recurrent layers and attention.
        weight_decodings: how often :attr:`weight` was decoded for code that computes with it.
        trains_rounded: whether :meth:`rounded_forward` and what belongs to it are there.

    Example:
        >>> from lowrank.layers import QuantizedLinear
        >>> layer = QuantizedLinear(4, 2)
        >>> layer.kind, layer.format, layer.bits, layer.rank, layer.shape, layer.stored_bytes
        ('QuantizedLinear', 'int8', 8, None, (2, 4), 24)
        >>> layer.roles()["codes"], layer.spec.activations
        (Role(kind='codes', bits=8, packed=False, signed=False), 'int8')
    """

    kind: ClassVar[str] = "CompressedLayer"
    looks_up: ClassVar[bool] = False
    is_one_weight: ClassVar[bool] = True
    trains_rounded: ClassVar[bool] = False
    dtype: torch.dtype
    n_bits: int | None = None
    activations: str | None = None
    scheme: str | None = None
    weight_decodings: int = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer; for ``torch.fx.symbolic_trace`` it is a leaf, as torch's own layers are."""
        for value in (*args, *kwargs.values()) if kwargs else args:
            if isinstance(value, Proxy):
                return recorded(self, value, args, kwargs)
        return super().__call__(*args, **kwargs)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.kind = cls.__name__

    # What it is

    @property
    def format(self) -> str:
        """Name of the format that was declared for the layer; see :func:`declare_format`.

        Raises:
            UsageError: none was.
        """
        for kind in type(self).__mro__:
            for name, holds in _declared.get(kind, {}).items():
                if holds is None or holds(self):
                    return name
        raise UsageError(f"format: none is declared for {self.kind}; call declare_format for it")

    @property
    def spec(self) -> LayerSpec:
        """Format, rank, bits, activations and scheme in one value."""
        return LayerSpec(self.format, self.rank, self.bits, self.activations, self.scheme)

    @property
    def bits(self) -> int | None:
        """Bits a code uses (each is stored in a byte); ``None`` for float factors."""
        return self.n_bits

    @property
    def rank(self) -> int | None:
        """Number of rank components; ``None`` for a layer that is not factored."""
        return None

    @property
    def shape(self) -> tuple[int, ...]:
        """(out_features, in_features), (num_embeddings, embedding_dim), or (out, in / groups, *kernel)."""
        raise NotImplementedError

    @property
    def groups(self) -> int:
        """Into so many runs a convolution's channels are cut, each with rank components of its own; 1 for all else."""
        return 1

    @staticmethod
    def rank_limit(shape: Sequence[int], scheme: str | None = None, groups: int = 1) -> int:
        """Give the largest rank (of each group) that a weight of this shape can use."""
        return largest_rank(shape, scheme, groups)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the tensors that a file holds for this layer."""
        return sum(tensor.nbytes for tensor in self.state_dict().values())

    @property
    def original_key(self) -> str:
        """A tensor that the dense layer has in a file and this one has not."""
        return "weight"

    # What it holds

    @property
    def weight_names(self) -> tuple[str, ...]:
        """Names of the layer's own tensors that make its weight: all but biases, and but those of layers inside."""
        raise NotImplementedError

    def scales(self) -> dict[str, ScaleForm]:
        """Say what each scale of this layer looks like, by its name; empty for float factors."""
        return {}

    def roles(self) -> dict[str, Role]:
        """Say what every tensor of the ``state_dict`` is, those of layers inside included."""
        own: dict[str, dict[str, Role]] = {}
        found: dict[str, Role] = {}
        for name in self.state_dict():
            path, _, leaf = name.rpartition(".")
            if path not in own:
                part = self.get_submodule(path)
                own[path] = part._own_roles() if isinstance(part, CompressedLayer) else {}
            found[name] = own[path].get(leaf, Role(FLOAT))
        return found

    def _own_roles(self) -> dict[str, Role]:
        """Say what the layer's own tensors are that are no floats."""
        if self.bits is None:
            return {}
        scales = self.scales()
        return {name: Role(SCALE) if name in scales else Role(CODES, self.bits) for name in self.weight_names}

    def share_tensors(self, owner: CompressedLayer) -> None:
        """Hold the very tensors that make the weight of another layer, which is tied to this one.

        Raises:
            UsageError: that layer holds its weight in another way.
        """
        if owner.weight_names != self.weight_names or owner.shape != self.shape:
            raise UsageError(
                f"owner: a {self.kind} of shape {self.shape} cannot share the tensors of a {owner.kind} of shape {owner.shape}"
            )
        for name in self.weight_names:
            setattr(self, name, getattr(owner, name))

    # The weight that it stands for

    @property
    def weight(self) -> Tensor:
        """The weight as code reads it that was written for the dense layer: right shape, dtype and device, read-only, decoded on demand.

        Float factors that are being trained give their product, with its gradient. See :class:`lowrank.layers.weight_view.WeightView`.

        Raises:
            AttributeError: a layer with several weights has none of this name.
        """
        if not self.is_one_weight:
            raise AttributeError(f"{self.kind} has no attribute 'weight': it holds several")
        trained = torch.is_grad_enabled() and any(
            name in self.weight_names and parameter.requires_grad
            for name, parameter in self.named_parameters(recurse=False)
        )
        return self.dense_weight() if trained or graph_is_made() else WeightView(self)

    @weight.setter
    def weight(self, value: object) -> None:
        raise no_other_weight(self.kind)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter; one called ``weight`` is refused, as :attr:`weight` says."""
        if name == "weight":
            raise no_other_weight(self.kind)
        super().register_parameter(name, param)

    def dense_weight(self) -> Tensor:
        """Make the weight that this layer stands for, (out, in) or (num, dim), in its dtype or float32 for integer codes."""
        raise NotImplementedError

    def factors(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor] | None:
        """Compute ``left`` (out, rank) and ``right`` (rank, in · kernel), whose product the weight is, without a gradient.

        An embedding counts as a linear layer on one-hot inputs: out is the embedding's dimension, in the number of its rows.

        Returns:
            ``None`` where the layer is no such product: codes of one matrix, convolutions in the spatial form or with groups.
        """
        return None

    def exact_weight(self) -> Tensor:
        """Make the weight in float64, products of factors, codes and scales not rounded on the way.

        Returns:
            (out, in, *kernel), an embedding's transposed; of layers with several weights as :meth:`dense_weight` joins them.
        """
        pair = self.factors()
        if pair is not None:
            product = pair[0] @ pair[1]
            return product if self.looks_up else product.view(self.shape)
        dense = self.dense_weight().detach().double()
        return dense.T if self.looks_up else dense

    # Layers like it

    def with_weight(self, weight: Tensor) -> CompressedLayer:
        """Make a layer of the same configuration and bias for another weight: codes rounded anew, factors the best of this rank.

        Args:
            weight: as :meth:`exact_weight` gives it; a kernel may be flattened to (out, in · kernel).

        Raises:
            RankError: another shape.
            NumericsError: NaN or Inf in it.
        """
        raise UsageError(f"with_weight: a {self.kind} takes no other weight")

    def with_factors(self, left: Tensor, right: Tensor) -> CompressedLayer:
        """Make a layer of the same configuration and bias with other factors, of any rank: balanced, or rounded anew.

        Args:
            left: (out, r) float64, oriented as of :meth:`factors`.
            right: (r, in · kernel) float64.

        Raises:
            UsageError: the layer is no product of two factors (:meth:`factors` gives ``None``).
            RankError: more components than the weight can use.
        """
        raise UsageError(f"with_factors: a {self.kind} has no factors; give it a weight by with_weight")

    def appended(self, left: Tensor, right: Tensor, rows: Tensor | None = None) -> CompressedLayer:
        """Make a layer with components beside its own; codes that it has stay as they are.

        Args:
            left: (out, r) float64, oriented as of :meth:`factors`.
            right: (r, in · kernel) float64.
            rows: (out,), what the outputs of its own components are multiplied by; only without codes.

        Raises:
            UsageError: as :meth:`with_factors`; or rows are given, which codes with one scale a component cannot follow.
            RankError: more components than the weight can use.
        """
        raise UsageError(f"appended: a {self.kind} has no factors to append to; give it a weight by with_weight")

    def _like(self: _Layer, rank: int | None, device: torch.device) -> _Layer:
        """A layer of the same configuration and bias, its other tensors still to be filled."""
        layer = type(self).from_config(self.config() | {"rank": rank}, device=device)
        layer.forget_source()
        with torch.no_grad():
            for name, bias in self.named_parameters(recurse=False):
                if name not in self.weight_names:
                    layer.get_parameter(name).copy_(bias).requires_grad_(bias.requires_grad)
        return layer.train(self.training)

    def forget_source(self) -> None:
        """Drop what is known of the weight that the layer was made from, once its numbers have moved."""

    # Training it

    def trainable(self, dense: nn.Module | None = None) -> nn.Module:
        """Make a module of floats that training moves: the layer's numbers, or those that they were rounded from.

        Args:
            dense: the layer that this one was made from, if that is still known; it counts where its rounding is this layer itself.
        """
        raise UsageError(f"trainable: a {self.kind} has no codes that training could round anew")

    def rounded_forward(self, floats: nn.Module, x: Tensor) -> Tensor:
        """Do what the layer of these numbers rounded would do to x, activations in float; gradients go straight through the rounding.

        Args:
            floats: what :meth:`trainable` gave.
        """
        raise UsageError(f"rounded_forward: a {self.kind} has no codes that training could round anew")

    def with_floats(self, floats: nn.Module) -> CompressedLayer:
        """Make a layer of the same kind, rank, bits and activations of numbers that were trained."""
        raise UsageError(f"with_floats: a {self.kind} has no codes that training could round anew")

    # On disk

    def config(self) -> dict[str, Any]:
        """Give all that is needed to build a layer of the same tensors, as plain JSON; :class:`LayerSpec` reads its spec out of it."""
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
        """Make a layer with tensors of the configured shapes; loading fills in the values.

        Args:
            config: what :meth:`config` gave.
            device: where to allocate, ``"meta"`` included.
        """
        layer = cls._allocate(cls._arguments(config), device)
        layer._restore(config)
        return layer

    @classmethod
    def _arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The constructor's arguments that a configuration holds."""
        return {"dtype": dtype_from_name(config["dtype"])}

    @classmethod
    def _allocate(cls: type[_Layer], arguments: Mapping[str, Any], device: torch.device | str | None) -> _Layer:
        """A layer whose values are about to be overwritten."""
        return cls(**arguments, device=device)

    def _restore(self, config: Mapping[str, Any]) -> None:
        """Take over what a configuration holds beside the constructor's arguments."""

    def _apply(self: _Layer, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Layer:
        before = {name: buffer for name, buffer in self._buffers.items() if name in self.scales()}
        super()._apply(fn, recurse)
        scale = None
        for name, scale in before.items():
            moved = self._buffers.get(name)
            if scale is not None and moved is not None and moved.dtype != scale.dtype:
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
        state.pop("weight_decodings", None)
        return state


def graph_is_made() -> bool:
    """Whether this call is being recorded, by torch.compile, torch.export or torch.jit.trace: only operators may compute.

    Example:
        >>> graph_is_made()
        False
    """
    # torch.jit.trace does not see what the native library writes: it would record memory that nobody filled.
    return torch.compiler.is_compiling() or torch._C._is_tracing()
