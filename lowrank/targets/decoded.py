"""Modules of no other kind that own a matrix or kernel: subclasses with a forward of their own, transposed convolutions, users' layers."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from lowrank.layers import CompressedLayer, DecodedLayer
from lowrank.layers.decoded import matrices_of, rows_of
from lowrank.targets.composite import Composite

__all__ = ["Decoded", "DecodedConv", "DecodedEmbedding"]

# Gains and offsets, whatever their shape: nothing is multiplied with them as a matrix.
_NO_MATRICES = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
    nn.modules.batchnorm._NormBase,
    # Belongs to the module that is parametrized by it.
    nn.utils.parametrize.ParametrizationList,
)


class Decoded(Composite):
    """Describe modules whose own forward computes with their weights in a way that is theirs: these are decoded into it on each call.

    A module belongs here if no kind before it takes it, it has a forward, it holds at least one matrix or kernel itself and all of its
    parameters, and codes would be smaller. Weight-only.

    Attributes:
        of: the classes whose subclasses belong to this kind; the ones of the other kinds here are left to them.
    """

    name: ClassVar[str] = "decoded"
    target: ClassVar[str] = "linear"
    described: ClassVar[str] = "modules that compute with a matrix in a forward of their own"
    weight_only: ClassVar[bool] = True
    of: ClassVar[tuple[type[nn.Module], ...]] = ()

    def matches(self, module: nn.Module) -> bool:
        """Tell whether a module owns a matrix, and nothing that is not its own."""
        if self.of and not isinstance(module, self.of):
            return False
        if isinstance(module, (CompressedLayer, *_NO_MATRICES)) or type(module).forward is nn.Module.forward:
            return False
        alone = not any(True for child in module.children() for _ in child.state_dict(keep_vars=True))
        return alone and bool(matrices_of(module))

    def refusal(self, module: nn.Module) -> str | None:
        """Refuse what cannot be carried over, or is not a function of its weights."""
        if getattr(module, "max_norm", None) is not None:
            return "changes its weight while it runs (max_norm)"
        if getattr(module, "sparse", False) is True:
            return "its gradients are sparse, which a decoded weight has none of"
        if len({tensor.dtype for tensor in module._parameters.values() if tensor is not None}) > 1:
            return "holds weights of more than one dtype"
        taken = next((name for name in (*module._parameters, *module._buffers) if _is_taken(name, module)), None)
        if taken is not None:
            return f"its tensor {taken} has the name of something that every compressed layer has"
        stored = sum(weight.numel() + 4 * self._rows(module, weight) for weight in matrices_of(module).values())
        if stored >= sum(weight.nbytes for weight in matrices_of(module).values()):
            return "codes with their scales would be no smaller"
        return None

    def parameters(self, module: nn.Module) -> dict[str, Tensor | None]:
        """Give the module's own matrices and kernels by name."""
        return dict(matrices_of(module))

    def dimensions(self, module: nn.Module) -> int:
        """Give 0: any number of them will do."""
        return 0

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """Give each as (1, rows with a scale, the rest)."""
        return {
            name: weight.detach().reshape(1, self._rows(module, weight), -1)
            for name, weight in matrices_of(module).items()
        }

    def shape(self, module: nn.Module) -> tuple[int, ...]:
        """Give the shape of the first as the module has it."""
        return tuple(next(iter(matrices_of(module).values())).shape)

    def _rows(self, module: nn.Module, weight: Tensor) -> int:
        return rows_of(weight.shape, kernel=isinstance(module, nn.modules.conv._ConvNd))


class DecodedConv(Decoded):
    """Describe convolutions of other kinds, transposed and three-dimensional ones, and subclasses with a forward of their own."""

    name: ClassVar[str] = "decoded-conv"
    target: ClassVar[str] = "conv"
    described: ClassVar[str] = "other convolutions and their subclasses"
    of: ClassVar[tuple[type[nn.Module], ...]] = (nn.modules.conv._ConvNd,)


class DecodedEmbedding(Decoded):
    """Describe subclasses of ``nn.Embedding`` with a forward of their own, and ``nn.EmbeddingBag``."""

    name: ClassVar[str] = "decoded-embedding"
    target: ClassVar[str] = "embedding"
    described: ClassVar[str] = "nn.EmbeddingBag and tables with a forward of their own"
    of: ClassVar[tuple[type[nn.Module], ...]] = (nn.Embedding, nn.EmbeddingBag)


def _is_taken(name: str, module: nn.Module) -> bool:
    """Whether a kept tensor's name is an attribute of every compressed layer."""
    return hasattr(DecodedLayer, name) and name not in matrices_of(module)
