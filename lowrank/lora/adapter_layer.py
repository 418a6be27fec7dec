"""What all adapted layers share: several adapters on one frozen base, switched by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowrank.errors import UsageError
from lowrank.lora.bases import base_of
from lowrank.lora.changes import Change, MergeRow
from lowrank.lora.config import LoRAConfig

__all__ = ["DEPARTURES", "FORMS", "LoRALayer", "Magnitude"]

FORMS = ("separate", "merged")
# Of PEFT's adapters of convolutions, which know neither the padding mode nor the dilation of the base.
DEPARTURES = ("undilated", "zero_padded")


class Magnitude(nn.Module):
    """DoRA's learned norm of every output, under PEFT's name (``lora_magnitude_vector.<adapter>.weight``)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class LoRALayer(nn.Module):
    """Base of the adapted layers: ``y = base(x) + scaling · lora_B(lora_A(dropout(x)))``, summed over active adapters.

    With DoRA, ``y = d · (base(x) − b) + d · scaling · lora_B(lora_A(x)) + b`` where ``d = magnitude / ‖W + scaling·BA‖``
    by rows, the norm taken as a constant (PEFT does the same).

    Args:
        base_layer: the layer that is adapted; its parameters are frozen, its codes never change.

    Attributes:
        active_adapters: names of the adapters that count, in order.
        disabled: run the base alone.
        form: ``"separate"`` (two thin products beside the base) or ``"merged"`` (one product with ``W + scaling·BA``).
        merged_adapters: names of those that are merged into ``base_layer`` at the moment.
    """

    family: ClassVar[str] = ""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.base_layer.requires_grad_(False)
        base = base_of(base_layer)
        self.in_features, self.out_features = base.in_features, base.out_features
        # Any: torch types the entries of these as Tensor | Module.
        self.lora_A: Any = nn.ModuleDict()
        self.lora_B: Any = nn.ModuleDict()
        self.lora_dropout: Any = nn.ModuleDict()
        self.lora_magnitude_vector: Any = nn.ModuleDict()
        self.lora_scale: Any = nn.ParameterDict()
        self.configs: dict[str, LoRAConfig] = {}
        self.scaling: dict[str, float] = {}
        # Names of the token tables that came with an adapter's file, and go with it again.
        self.tables: dict[str, tuple[str, ...]] = {}
        self.active_adapters: tuple[str, ...] = ()
        self.form = "separate"
        self.disabled = False
        self.merged_adapters: tuple[str, ...] = ()
        self.merge_row: MergeRow | None = None
        self.train(base_layer.training)

    # Adding and removing

    def add_adapter(self, adapter: str, config: LoRAConfig, name: str) -> None:
        """Make the parameters of one more adapter; initialised by ``config`` where that needs no data.

        Args:
            adapter: its name.
            config: rank, alpha, dropout …
            name: of this layer in the model, for patterns and messages.

        Raises:
            AdapterError: the layer cannot carry this adapter.
            RankError: a rank that would take all memory.
        """
        base = base_of(self.base_layer)
        base.require_rank(config.rank_of(name), name)
        self._make(adapter, config, name, config.rank_of(name))
        self._start(adapter, config.init_lora_weights)
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.lora_dropout[adapter] = dropout.train(self.training)
        self.configs[adapter] = config
        self.scaling[adapter] = config.scaling_of(name)
        if config.learnable_scale:
            self.lora_scale[adapter] = nn.Parameter(torch.ones((), dtype=torch.float64))
        self._move(adapter, base.device, base.adapter_dtype)

    def start_magnitude(self, adapter: str) -> None:
        """Start DoRA from the norms as they are, so that nothing changes; called once A and B have their values."""
        if self.configs[adapter].use_dora:
            self.lora_magnitude_vector[adapter] = Magnitude(self._as_magnitude(self.norms(adapter)))

    def delete_adapter(self, adapter: str) -> None:
        """Forget an adapter; a name this layer does not have is fine."""
        for holder in self._holders():
            if adapter in holder:
                del holder[adapter]
        self.configs.pop(adapter, None)
        self.scaling.pop(adapter, None)
        self.tables.pop(adapter, None)
        self.active_adapters = tuple(name for name in self.active_adapters if name != adapter)

    def set_active(self, adapters: Sequence[str]) -> None:
        """Let these adapters count and be trained, and no others."""
        self.active_adapters = tuple(name for name in adapters if name in self.configs)
        for adapter in self.configs:
            for parameter in self.adapter_parameters(adapter):
                parameter.requires_grad_(adapter in self.active_adapters)

    def adapter_parameters(self, adapter: str) -> list[nn.Parameter]:
        """List the parameters of one adapter."""
        found: list[nn.Parameter] = []
        for holder in self._holders():
            if adapter in holder:
                entry = holder[adapter]
                found += [entry] if isinstance(entry, nn.Parameter) else list(entry.parameters())
        return found

    def parts(self, adapter: str) -> dict[str, nn.Parameter]:
        """Name an adapter's parameters as PEFT's files do; a learned scale is none of them."""
        found: dict[str, nn.Parameter] = self._sides(adapter)
        if adapter in self.lora_magnitude_vector:
            found["lora_magnitude_vector"] = self.lora_magnitude_vector[adapter].weight
        return found

    def _sides(self, adapter: str) -> dict[str, nn.Parameter]:
        return {"lora_A": self.lora_A[adapter].weight, "lora_B": self.lora_B[adapter].weight}

    def _holders(self) -> Iterable[Any]:
        return self.lora_A, self.lora_B, self.lora_dropout, self.lora_magnitude_vector, self.lora_scale

    def _move(self, adapter: str, device: torch.device, dtype: torch.dtype) -> None:
        # Over half precision PEFT rounds the start to it before it widens it again.
        half = base_of(self.base_layer).dtype
        for parameter in self.adapter_parameters(adapter):
            parameter.data = parameter.data.to(half).to(device, dtype)

    # What the kinds of layer differ in

    def _make(self, adapter: str, config: LoRAConfig, name: str, rank: int) -> None:
        """Put ``lora_A[adapter]`` and ``lora_B[adapter]`` in place."""
        raise NotImplementedError

    def _start(self, adapter: str, how: bool | str) -> None:
        """Random ``lora_A`` and zero ``lora_B``, drawn in PEFT's order, so that the same seed gives the same numbers."""
        if how is False:
            return
        down, up = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        assert isinstance(down, Tensor) and isinstance(up, Tensor)
        if how == "gaussian":
            nn.init.normal_(down, std=1.0 / down.shape[0])
        else:
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        nn.init.zeros_(up)

    def pair(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Give B (out, r) and A (r, in · kernel) as matrices, with their gradients."""
        raise NotImplementedError

    def set_pair(self, adapter: str, left: Tensor, right: Tensor) -> None:
        """Write B (out, r) and A (r, in · kernel), of the adapter's rank or another."""
        raise NotImplementedError

    def lora_product(self, adapter: str, x: Tensor, gain: float | Tensor) -> Tensor:
        """Compute ``lora_B(gain · lora_A(x))``, scaled between the two, where there are only r numbers a token."""
        raise NotImplementedError

    def product_with(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply the layer's inputs by another weight (out, in, *kernel)."""
        raise NotImplementedError

    def is_weight(self, adapter: str) -> bool:
        """Say whether base and adapter together are one weight of the base's shape."""
        return True

    def departures(self, adapter: str) -> tuple[str, ...]:
        """Say where ``lora_A`` departs from the base's geometry, as PEFT's does: of :data:`DEPARTURES`."""
        return ()

    def depart(self, adapter: str, departures: Iterable[str]) -> None:
        """Let ``lora_A`` depart from the base's geometry in these; in what no layer of its kind can, nothing happens."""

    def differs_in_peft(self, adapter: str) -> bool:
        """Say whether PEFT would compute another thing with these tensors, or refuse them."""
        return False

    def _as_magnitude(self, norms: Tensor) -> Tensor:
        """(out,) in the shape that PEFT stores."""
        return norms

    def _over_outputs(self, values: Tensor) -> Tensor:
        """(out,) in a shape that multiplies the layer's output."""
        return values

    # Forward

    def gain(self, adapter: str) -> float | Tensor:
        """Multiply the scaling by the learned factor where there is one."""
        if adapter in self.lora_scale:
            learned: Tensor = self.scaling[adapter] * self.lora_scale[adapter]
            return learned
        return self.scaling[adapter]

    def norms(self, adapter: str) -> Tensor:
        """Compute ‖W + scaling · BA‖ by rows, (out,), a constant for gradients."""
        left, right = self.pair(adapter)
        gain = self.gain(adapter)
        gain = gain.detach() if isinstance(gain, Tensor) else gain
        return base_of(self.unmerged_base).row_norms(left.detach() * gain, right.detach())

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Add the active adapters' contributions to the base's output, in the base's dtype."""
        if self.disabled:
            plain: Tensor = self.unmerged_base(x, *args, **kwargs)
            return plain
        running = () if self.merged_adapters else self.active_adapters
        if running and self.form == "merged" and all(self.is_weight(adapter) for adapter in running):
            return self._merged_forward(x)
        base: Tensor = self.base_layer(x, *args, **kwargs)
        result = base
        for adapter in running:
            result = result + self._contribution(adapter, x, base)
        return result if result.dtype is base.dtype else result.to(base.dtype)

    def _contribution(self, adapter: str, x: Tensor, base: Tensor) -> Tensor:
        x = self._cast(x, adapter)
        dropout = self.lora_dropout[adapter]
        dropped = self._drop(dropout, x)
        added = self.lora_product(adapter, dropped, self.gain(adapter))
        if adapter not in self.lora_magnitude_vector:
            return added
        magnitude = self.lora_magnitude_vector[adapter].weight.flatten()
        share = self._over_outputs(magnitude / _nonzero(self.norms(adapter), magnitude))
        if dropped is not x:
            # The adapter's dtype may be wider than the base's.
            base = self.base_layer(dropped.to(base.dtype) if dropped.is_floating_point() else dropped)
        bias = base_of(self.unmerged_base).bias
        plain = base if bias is None else base - self._over_outputs(bias)
        return (share - 1) * plain + share * added

    def _cast(self, x: Tensor, adapter: str) -> Tensor:
        dtype = self.lora_A[adapter].weight.dtype
        return x if x.dtype is dtype or torch.is_autocast_enabled(x.device.type) else x.to(dtype)

    def _drop(self, dropout: nn.Module, x: Tensor) -> Tensor:
        if isinstance(dropout, nn.Identity) or not dropout.training:
            return x
        dropped: Tensor = dropout(x)
        return dropped

    def _merged_forward(self, x: Tensor) -> Tensor:
        """One product with the changed weight. Gradients reach A, B and the magnitudes as in the separate form."""
        base = base_of(self.base_layer)
        if base.has_codes:
            raise UsageError(
                f'form: "merged" has no meaning on {type(base.layer).__name__}, whose products are of integer codes; '
                'use "separate"'
            )
        if self.training and any(self.configs[adapter].lora_dropout for adapter in self.active_adapters):
            raise UsageError(
                'form: "merged" cannot drop inputs of the adapter alone; set lora_dropout=0 or use "separate"'
            )
        weight, bias = self._changed_weight()
        x = x.to(weight.dtype) if x.is_floating_point() else x
        return self.product_with(x, weight, None if bias is None else bias.to(weight.dtype)).to(base.dtype)

    def _changed_weight(self) -> tuple[Tensor, Tensor | None]:
        base = base_of(self.base_layer)
        plain = base.weight().to(base.adapter_dtype)
        total = plain
        for adapter in self.active_adapters:
            left, right = self.pair(adapter)
            change = ((left * self.gain(adapter)) @ right).view(plain.shape)
            if adapter in self.lora_magnitude_vector:
                magnitude = self.lora_magnitude_vector[adapter].weight.flatten()
                share = (magnitude / _nonzero(self.norms(adapter), magnitude)).view(-1, *[1] * (plain.ndim - 1))
                change = (share - 1) * plain + share * change
            total = total + change
        return total, base.bias

    # Merging

    @property
    def unmerged_base(self) -> nn.Module:
        """The base without any adapter in it."""
        kept = self.__dict__.get("_unmerged")
        return self.base_layer if kept is None else kept

    def change(self, adapters: Sequence[str] | None = None) -> Change:
        """Compute what the adapters (default: the active ones) make of the weight, in float64, without gradients."""
        names = self.active_adapters if adapters is None else adapters
        lefts: list[Tensor] = []
        rights: list[Tensor] = []
        rows: Tensor | None = None
        with torch.no_grad():
            for adapter in names:
                left, right = (side.detach().double() for side in self.pair(adapter))
                gain = self.gain(adapter)
                left = left * (gain.double() if isinstance(gain, Tensor) else gain)
                if adapter in self.lora_magnitude_vector:
                    magnitude = self.lora_magnitude_vector[adapter].weight.detach().double().flatten()
                    share = magnitude / _nonzero(base_of(self.unmerged_base).row_norms(left, right), magnitude)
                    rows = share if rows is None else rows + share - 1.0
                    left = left * share[:, None]
                lefts.append(left)
                rights.append(right)
        return Change(torch.cat(lefts, dim=1), torch.cat(rights), rows)

    def take_merged(self, merged: nn.Module, adapters: Sequence[str], row: MergeRow) -> None:
        """Run on a base that holds these adapters; the old one is kept for :meth:`unmerge`."""
        self.__dict__["_unmerged"] = self.unmerged_base
        self.base_layer = merged
        self.merged_adapters, self.merge_row = tuple(adapters), row

    def unmerge(self) -> None:
        """Bring the base back as it was before merging, bit for bit; does nothing where nothing is merged."""
        kept = self.__dict__.pop("_unmerged", None)
        if kept is not None:
            self.base_layer = kept
        self.merged_adapters, self.merge_row = (), None

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        kept = self.__dict__.get("_unmerged")
        if kept is not None and recurse:
            kept._apply(fn, recurse)
        return self

    # What models read from the layer they hold

    @property
    def weight(self) -> Any:
        """The base's, for models that look at it."""
        if not hasattr(self.base_layer, "weight"):
            raise AttributeError(f"{type(self.base_layer).__name__} has no weight")
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        """The base's."""
        return self.base_layer.bias

    @property
    def activations(self) -> Any:
        """The base's, of a layer with integer codes."""
        return self.base_layer.activations

    @activations.setter
    def activations(self, value: str) -> None:
        base: Any
        for base in (self.base_layer, self.unmerged_base):
            base.activations = value

    def extra_repr(self) -> str:
        """Give what ``repr`` shows."""
        ranks = ", ".join(f"{name}: r={self.rank_of(name)}" for name in self.configs)
        return f"{ranks}, active={list(self.active_adapters)}, merged={list(self.merged_adapters)}"

    def rank_of(self, adapter: str) -> int:
        """Count the components of an adapter."""
        return self.pair(adapter)[1].shape[0]


def _nonzero(norms: Tensor, magnitude: Tensor) -> Tensor:
    """The norms, but for rows of zeros the magnitude itself: their ratio is 1, not NaN."""
    fixed = magnitude.detach()
    return torch.where(norms > 0, norms, torch.where(fixed > 0, fixed, torch.ones_like(fixed)))
