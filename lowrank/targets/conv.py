"""Convolutions along one or two dimensions: kernels as matrices of patches, cut in two in either of two ways."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from lowrank.numerics.conv_factors import SCHEMES, ConvCurve, factorize_conv
from lowrank.numerics.factors import RankCurve
from lowrank.numerics.moments import InputStatistics
from lowrank.numerics.sampled_moments import Moment, moment_squares
from lowrank.targets.kind import Factoring, LayerKind

__all__ = ["Conv"]

CHANNEL, SPATIAL = SCHEMES


class Conv(LayerKind):
    """Describe ``nn.Conv1d`` and ``nn.Conv2d``, whose groups are blocks that never meet."""

    name: ClassVar[str] = "conv"
    target: ClassVar[str] = "conv"
    described: ClassVar[str] = "nn.Conv1d, nn.Conv2d"
    types: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv1d, nn.Conv2d)
    differentiated: ClassVar[bool] = True

    def resembles(self, module: nn.Module) -> str | None:
        """Say what is the matter with the convolutions that are of no kind."""
        if isinstance(module, nn.modules.conv._ConvTransposeNd):
            return "a transposed convolution: its outputs overlap, so that no patch of its input determines one; left as it is"
        if isinstance(module, nn.modules.conv._ConvNd) and not isinstance(module, self.types):
            return "a three-dimensional convolution: only nn.Conv1d and nn.Conv2d are handled"
        return super().resembles(module)

    def tie_refusal(self, module: nn.Module) -> str | None:
        """Refuse shared kernels."""
        return "a convolution whose weight is tied to another module's"

    def dimensions(self, module: nn.Module) -> int:
        """Give 2 and the spatial dimensions."""
        assert isinstance(module, self.types)
        return 2 + len(module.kernel_size)  # type: ignore[arg-type]

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """Give the kernel as (groups, out / groups, in / groups · kernel)."""
        kernel = self.factored_weight(module)
        groups = module.groups
        assert isinstance(groups, int)
        return {"weight": kernel.reshape(groups, kernel.shape[0] // groups, -1)}

    def matrix(self, module: nn.Module) -> Tensor:
        """Give the kernel as (out, in / groups · kernel)."""
        return self.factored_weight(module).flatten(1)

    def factored_weight(self, module: nn.Module) -> Tensor:
        """Give the kernel as it is."""
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    def shape(self, module: nn.Module) -> tuple[int, ...]:
        """Give (out, in / groups, *kernel)."""
        return tuple(self.factored_weight(module).shape)

    def rows(self, module: nn.Module, output: Tensor) -> int:
        """Count the positions of the output: its features are the channels, wherever they stand."""
        channels = module.out_channels
        assert isinstance(channels, int)
        return output.numel() // max(channels, 1)

    def timed_as(self, module: nn.Module) -> str | None:
        """Give the prefix of plain two-dimensional convolutions, which are what was timed."""
        plain = type(module) is nn.Conv2d and module.groups == 1 and module.padding_mode == "zeros"
        return "conv-" if plain else None

    def schemes(self, shape: tuple[int, ...]) -> tuple[str | None, ...]:
        """Give both forms where the kernel has two sides to cut along; one wide or high it has nothing to cut."""
        return SCHEMES if len(shape) == 4 and min(shape[2:]) > 1 else (CHANNEL,)

    def component_size(self, shape: tuple[int, ...], scheme: str | None, blocks: int = 1) -> int:
        """Count the numbers of one component of each group: both kernels."""
        first, second = math.prod(shape[1:]), 1
        if scheme == SPATIAL:
            second = shape[3]
            first //= second
        return blocks * first + shape[0] * second

    def factorize(self, weight: Tensor, known: Factoring) -> RankCurve | ConvCurve:
        """Decompose in the form of the scheme; see :meth:`LayerKind.factorize`."""
        return factorize_conv(
            weight,
            known.inputs,
            scheme=known.scheme or CHANNEL,
            groups=known.blocks,
            ridge=known.ridge if known.inputs is not None else 0.0,
            shift_bias=known.shift_bias,
            name=known.name,
        )

    def moments(self, inputs: InputStatistics, *, blocks: int, centred: bool, device: torch.device) -> Moment:
        """Give Σ of the patches, (groups, features of a group, the same) float64, or the rows it is made of."""
        return inputs.block_metric(blocks, centred=centred).to(device)

    def squared_norm(self, matrix: Tensor, moments: Moment | None, row_weights: Tensor | None, blocks: int) -> float:
        """Compute ‖matrix‖² in the norm of the patches, group by group; see :meth:`LayerKind.squared_norm`."""
        parts = matrix.to(torch.float64).reshape(blocks, -1, matrix.shape[1])
        return float((parts.square() if moments is None else moment_squares(parts, moments)).sum())
