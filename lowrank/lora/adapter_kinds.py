"""Adapted linear layers, convolutions and embeddings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.errors import AdapterError
from lowrank.layers.conv_base import float_conv
from lowrank.lora.adapter_layer import LoRALayer
from lowrank.lora.bases import base_of
from lowrank.lora.config import LoRAConfig

__all__ = ["LoRAConv1d", "LoRAConv2d", "LoRAEmbedding", "LoRALinear", "adapted"]


class LoRALinear(LoRALayer):
    """A linear layer (dense, transformers' ``Conv1D``, low-rank, int8) with adapters.

    Example:
        >>> layer = LoRALinear(nn.Linear(64, 10))
        >>> layer.add_adapter("default", LoRAConfig(r=4), "head")
        >>> sum(parameter.numel() for parameter in layer.adapter_parameters("default"))
        296
    """

    family: ClassVar[str] = "linear"

    def _make(self, adapter: str, config: LoRAConfig, name: str, rank: int) -> None:
        self.lora_A[adapter] = _linear(self.in_features, rank)
        self.lora_B[adapter] = _linear(rank, self.out_features)

    def pair(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Give B and A as matrices; see :meth:`LoRALayer.pair`."""
        return self.lora_B[adapter].weight, self.lora_A[adapter].weight

    def set_pair(self, adapter: str, left: Tensor, right: Tensor) -> None:
        """Write B and A; see :meth:`LoRALayer.set_pair`."""
        _write(self.lora_B[adapter], left)
        _write(self.lora_A[adapter], right)

    def lora_product(self, adapter: str, x: Tensor, gain: float | Tensor) -> Tensor:
        """Multiply by A, the gain and B; see :meth:`LoRALayer.lora_product`."""
        product: Tensor = self.lora_B[adapter](self.lora_A[adapter](x) * gain)
        return product

    def product_with(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply by another weight; see :meth:`LoRALayer.product_with`."""
        return F.linear(x, weight, bias)


class LoRAEmbedding(LoRALayer):
    """An embedding (dense, low-rank, int8) with adapters: ``table[ids] + scaling · (Aᵀ)[ids] @ Bᵀ``.

    The parameters have PEFT's names and shapes: ``lora_embedding_A (r, num_embeddings)``, which starts at zero, and
    ``lora_embedding_B (embedding_dim, r)``.
    """

    family: ClassVar[str] = "embedding"

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.lora_embedding_A: Any = nn.ParameterDict()
        self.lora_embedding_B: Any = nn.ParameterDict()

    def _holders(self) -> tuple[Any, ...]:
        return (*super()._holders(), self.lora_embedding_A, self.lora_embedding_B)

    def _sides(self, adapter: str) -> dict[str, nn.Parameter]:
        return {
            "lora_embedding_A": self.lora_embedding_A[adapter],
            "lora_embedding_B": self.lora_embedding_B[adapter],
        }

    def _make(self, adapter: str, config: LoRAConfig, name: str, rank: int) -> None:
        self.lora_embedding_A[adapter] = nn.Parameter(torch.randn(rank, self.in_features))
        self.lora_embedding_B[adapter] = nn.Parameter(torch.randn(self.out_features, rank))

    def _start(self, adapter: str, how: bool | str) -> None:
        if how is not False:
            nn.init.zeros_(self.lora_embedding_A[adapter])
            nn.init.normal_(self.lora_embedding_B[adapter])

    def pair(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Give B and A as matrices; see :meth:`LoRALayer.pair`."""
        return self.lora_embedding_B[adapter], self.lora_embedding_A[adapter]

    def set_pair(self, adapter: str, left: Tensor, right: Tensor) -> None:
        """Write B and A; see :meth:`LoRALayer.set_pair`."""
        for holder, values in ((self.lora_embedding_B, left), (self.lora_embedding_A, right)):
            old = holder[adapter]
            old.data = values.to(old.device, old.dtype).contiguous()

    def lora_product(self, adapter: str, x: Tensor, gain: float | Tensor) -> Tensor:
        """Multiply by A, the gain and B; see :meth:`LoRALayer.lora_product`."""
        rows = F.embedding(x, self.lora_embedding_A[adapter].T, getattr(self.base_layer, "padding_idx", None))
        product: Tensor = (rows * gain) @ self.lora_embedding_B[adapter].T
        return product

    def product_with(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply by another weight; see :meth:`LoRALayer.product_with`."""
        return F.embedding(x, weight.T, getattr(self.base_layer, "padding_idx", None))

    def _cast(self, x: Tensor, adapter: str) -> Tensor:
        return x

    def _drop(self, dropout: nn.Module, x: Tensor) -> Tensor:
        # Ids cannot be dropped; PEFT leaves dropout out as well.
        return x


class _LoRAConvNd(LoRALayer):
    """``lora_A`` is a convolution of the base's geometry to r channels, ``lora_B`` one of kernel size 1 to the outputs."""

    _conv: ClassVar[Any] = None

    def _make(self, adapter: str, config: LoRAConfig, name: str, rank: int) -> None:
        geometry = base_of(self.base_layer).geometry
        if rank % geometry.groups:
            raise AdapterError(
                f"layer {name}: r = {rank} does not divide into its {geometry.groups} groups; give it a multiple by rank_pattern"
            )
        if geometry.groups > 1 and config.use_dora:
            raise AdapterError(
                f"layer {name}: groups={geometry.groups}: the adapter mixes channels of different groups, so that DoRA has no "
                "weight to take norms of; set use_dora=False or exclude the layer"
            )
        self.lora_A[adapter] = self._conv(self.in_features, rank, bias=False, **asdict(geometry))
        self.lora_B[adapter] = self._conv(rank, self.out_features, 1, bias=False)

    def pair(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Give B and A as matrices; see :meth:`LoRALayer.pair`.

        Raises:
            AdapterError: with groups there are no such matrices.
        """
        down, up = self.lora_A[adapter], self.lora_B[adapter]
        if down.groups > 1 or up.groups > 1:
            raise AdapterError(f"groups={max(down.groups, up.groups)}: the adapter has no weight of the base's shape")
        return up.weight.flatten(1), down.weight.flatten(1)

    def rank_of(self, adapter: str) -> int:
        """Count the channels between the two convolutions."""
        return int(self.lora_A[adapter].weight.shape[0])

    def set_pair(self, adapter: str, left: Tensor, right: Tensor) -> None:
        """Write B and A; see :meth:`LoRALayer.set_pair`."""
        down, up = self.lora_A[adapter], self.lora_B[adapter]
        _write(up, left.reshape(*left.shape, *[1] * (up.weight.ndim - 2)))
        _write(down, right.reshape(right.shape[0], *down.weight.shape[1:]))
        down.out_channels = up.in_channels = right.shape[0]

    def lora_product(self, adapter: str, x: Tensor, gain: float | Tensor) -> Tensor:
        """Multiply by A, the gain and B; see :meth:`LoRALayer.lora_product`."""
        product: Tensor = self.lora_B[adapter](self.lora_A[adapter](x) * gain)
        return product

    def product_with(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply by another weight; see :meth:`LoRALayer.product_with`."""
        return float_conv(x, weight, bias, base_of(self.base_layer).geometry)

    def is_weight(self, adapter: str) -> bool:
        """Say no with groups, and where base and adapter pad or reach differently; see :meth:`LoRALayer.is_weight`."""
        down, up = self.lora_A[adapter], self.lora_B[adapter]
        return down.groups == up.groups == 1 and not self.departures(adapter)

    def departures(self, adapter: str) -> tuple[str, ...]:
        """Compare ``lora_A`` with the base; see :meth:`LoRALayer.departures`."""
        geometry, down = base_of(self.unmerged_base).geometry, self.lora_A[adapter]
        undilated = tuple(down.dilation) != tuple(geometry.dilation)
        zero_padded = geometry.padding_mode != "zeros" and down.padding_mode == "zeros"
        return ("undilated",) * undilated + ("zero_padded",) * zero_padded

    def depart(self, adapter: str, departures: Iterable[str]) -> None:
        """Change where ``lora_A`` looks; see :meth:`LoRALayer.depart`.

        Raises:
            AdapterError: an adapter without the base's dilation has outputs of another size.
        """
        down = self.lora_A[adapter]
        if "zero_padded" in departures:
            down.padding_mode = "zeros"
        if "undilated" in departures and _reaches_further(down):
            if down.padding != "same":
                raise AdapterError(
                    f"dilation={down.dilation} with padding={down.padding}: PEFT's adapter has no dilation, so that its outputs "
                    'are of another size than the layer\'s; only with padding="same" does it compute anything'
                )
            down.dilation = (1,) * len(down.dilation)
            # torch works the padding out once, when a convolution is made.
            down._reversed_padding_repeated_twice = type(down)(
                1, 1, down.kernel_size, padding="same", device="meta"
            )._reversed_padding_repeated_twice

    def differs_in_peft(self, adapter: str) -> bool:
        """Say yes to groups, to dilation and to padding other than zeros; see :meth:`LoRALayer.differs_in_peft`."""
        down = self.lora_A[adapter]
        return bool(down.groups > 1 or down.padding_mode != "zeros" or _reaches_further(down))

    def _as_magnitude(self, norms: Tensor) -> Tensor:
        return norms.view(1, -1, *[1] * (2 if self.family == "conv2d" else 1))

    def _over_outputs(self, values: Tensor) -> Tensor:
        return values.view(-1, *[1] * (2 if self.family == "conv2d" else 1))


class LoRAConv1d(_LoRAConvNd):
    """A 1-d convolution with adapters; see :class:`LoRAConv2d`."""

    family: ClassVar[str] = "conv1d"
    _conv: ClassVar[Any] = nn.Conv1d


class LoRAConv2d(_LoRAConvNd):
    """A 2-d convolution with adapters.

    ``lora_A (r, in / groups, *kernel)`` has the base's stride, padding, dilation, groups and padding mode; ``lora_B
    (out, r, 1, 1)``. With groups > 1 the adapter mixes groups, so that it cannot be merged.

    Example:
        >>> layer = LoRAConv2d(nn.Conv2d(3, 8, 3, stride=2, padding=1))
        >>> layer.add_adapter("default", LoRAConfig(r=2), "stem")
        >>> layer.lora_A["default"].weight.shape, layer.lora_B["default"].weight.shape
        (torch.Size([2, 3, 3, 3]), torch.Size([8, 2, 1, 1]))
    """

    family: ClassVar[str] = "conv2d"
    _conv: ClassVar[Any] = nn.Conv2d


_CLASSES: dict[str, type[LoRALayer]] = {
    layer.family: layer for layer in (LoRALinear, LoRAEmbedding, LoRAConv1d, LoRAConv2d)
}


def adapted(base: nn.Module) -> LoRALayer:
    """Put the adapted layer around a base, as yet without adapters.

    Raises:
        AdapterError: a module that no adapter fits.
    """
    return _CLASSES[base_of(base).family](base)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def _reaches_further(convolution: Any) -> bool:
    """Whether a convolution's dilation matters."""
    return any(step > 1 and taps > 1 for step, taps in zip(convolution.dilation, convolution.kernel_size, strict=True))


def _write(module: nn.Module, values: Tensor) -> None:
    parameter = module.weight
    assert isinstance(parameter, nn.Parameter)
    parameter.data = values.to(parameter.device, parameter.dtype).contiguous()
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = values.shape
