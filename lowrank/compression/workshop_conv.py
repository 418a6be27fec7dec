"""The workshop of convolutions: two ways to cut a kernel in two, compared in the metric of the patches."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn

from lowrank.compression.workshop import RIDGE, Choice, Workshop
from lowrank.layers import (
    CompressedLayer,
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedLowRankConv1d,
    QuantizedLowRankConv2d,
    SVDCompressedConv1d,
    SVDCompressedConv2d,
)
from lowrank.numerics.conv_factors import ConvCurve, ConvFactors, factorize_conv
from lowrank.numerics.gradient_metric import GradientMetric
from lowrank.numerics.moments import InputStatistics, TokenCounts
from lowrank.numerics.rounding import dequantize_rows, quantize_rows
from lowrank.targets.survey import Target

__all__ = ["ConvWorkshop"]


class ConvWorkshop(Workshop):
    """As :class:`lowrank.compression.workshop.Workshop`, of an ``nn.Conv1d`` or ``nn.Conv2d``.

    Args:
        inputs: moments of the patches, (in · kernel) features, in blocks where the convolution has groups.

    Example:
        >>> from lowrank.targets.survey import survey
        >>> target = survey(nn.Sequential(nn.Conv2d(8, 4, 3))).targets[0]
        >>> shop = ConvWorkshop(target, None, None)
        >>> [shop.bytes(Choice("lowrank", 2, scheme=scheme)) for scheme in shop.schemes]
        [624, 304]
    """

    def __init__(
        self,
        target: Target,
        inputs: InputStatistics | None,
        lookups: TokenCounts | None,
        *,
        data_aware: bool = True,
        gradients: Tensor | None = None,
    ) -> None:
        super().__init__(target, inputs, lookups, data_aware=data_aware, gradients=gradients)
        conv = target.owner
        assert isinstance(conv, (nn.Conv1d, nn.Conv2d))
        self.conv: nn.Conv1d | nn.Conv2d = conv
        self.groups = conv.groups
        self.kernel = conv.weight.detach()
        # A kernel one wide or high has nothing to cut in two along that side.
        cuttable = self.kernel.ndim == 4 and min(self.kernel.shape[2:]) > 1
        self.schemes = ("channel", "spatial") if cuttable else ("channel",)
        self._curves: dict[str | None, ConvCurve] = {}
        self._roundings: dict[str | None, Tensor] = {}

    def curve_of(self, scheme: str | None) -> ConvCurve:
        """One decomposition for every rank of one scheme, of ``C^½ W`` where there are gradients: see :meth:`factors_of`."""
        if scheme not in self._curves:
            self._curves[scheme] = factorize_conv(
                self._weighed(self.kernel),
                self.inputs,
                scheme=scheme or "channel",
                groups=self.groups,
                ridge=RIDGE if self.inputs is not None else 0.0,
                shift_bias=self.centred,
                name=f"layer {self.name}",
            )
        return self._curves[scheme]

    def factors_of(self, scheme: str | None, rank: int) -> ConvFactors:
        """The best factors of the kernel of this rank that are known."""
        found = self.curve_of(scheme).factors(rank)
        if self.gradient_metric is None:
            return found
        shift = None if found.bias_shift is None else self.gradient_metric.back(found.bias_shift[:, None])[:, 0]
        return ConvFactors(found.first, self.gradient_metric.back(found.second), shift)

    @cached_property
    def gradient_metric(self) -> GradientMetric | None:
        """What an error at the layer's outputs costs the model, group by group."""
        if self.gradients is None:
            return None
        return GradientMetric(self.gradients, groups=self.groups, name=f"layer {self.name}")

    def errors(self, scheme: str | None) -> Tensor:
        """(max_rank + 1,) relative error of the factors of each rank, in the metric of the patches (and of the gradients)."""
        return self.curve_of(scheme).errors

    def max_rank(self, scheme: str | None) -> int:
        """The smaller side of the matrix that is factored, in each group."""
        outputs, inputs, *kernel = self.kernel.shape
        outputs //= self.groups
        if scheme == "spatial":
            return min(inputs * kernel[0], outputs * kernel[1])
        return min(outputs, self.columns)

    def _elements(self, choice: Choice) -> tuple[int, int]:
        if choice.rank is None:
            return self.kernel.numel(), self.rows
        first, second = self.columns, 1
        if choice.scheme == "spatial":
            second = int(self.kernel.shape[3])
            first //= second
        return choice.rank * (self.groups * first + self.rows * second), choice.rank * self.groups

    @cached_property
    def _moments(self) -> Tensor | None:
        """(groups, features of a group, the same) float64."""
        if self.inputs is None:
            return None
        blocks = [self.inputs.block(index, self.groups) for index in range(self.groups)]
        return torch.stack([block.moment(centred=self.centred) for block in blocks]).to(self.kernel.device)

    def _norm(self, matrix: Tensor) -> float:
        """‖matrix‖² of (out, in / groups · kernel) in the metric of the patches."""
        parts = matrix.to(torch.float64).reshape(self.groups, -1, self.columns)
        weighted = parts if self._moments is None else parts @ self._moments
        return float((weighted * parts).sum())

    def error_of(self, approximation: Tensor) -> tuple[float, float]:
        """(weight_error, activation_error) of a kernel in the weight's place."""
        return super().error_of(approximation.flatten(1))

    def rounding_of_factors(self, choice: Choice) -> float:
        """Squared relative error that 8-bit rounding adds to the factors of a choice."""
        assert choice.rank is not None
        return float(self._rounding_by_rank(choice.scheme)[choice.rank])

    def _rounding_by_rank(self, scheme: str | None) -> Tensor:
        """(largest offered rank + 1,) what rounding adds, summed over rank components, whose errors are independent."""
        if scheme not in self._roundings:
            self._roundings[scheme] = self._component_rounding(self.factors_of(scheme, self.max_rank(scheme)))
        return self._roundings[scheme]

    def _component_rounding(self, factors: ConvFactors) -> Tensor:
        groups = self.groups
        rank = factors.first.shape[0] // groups
        wide = factors.second.shape[-1] if factors.second.ndim == 4 else 1
        # first (groups, rank, in·height) and second (groups, rank, out, wide): one component is an outer product.
        first = factors.first.to(torch.float64).reshape(groups * rank, -1)
        second = factors.second.to(torch.float64).reshape(groups, -1, rank, wide).permute(0, 2, 1, 3)
        second = second.reshape(groups * rank, -1)
        first_error, second_error = (_rounding_error(part) for part in (first, second))
        lost = self._outer_norms(first, second_error, rank, wide) + self._outer_norms(first_error, second, rank, wide)
        total = torch.cumsum(lost, 0) / self.cost if self.cost > 0.0 else torch.zeros_like(lost)
        return torch.cat([total.new_zeros(1), total]).cpu()

    def _outer_norms(self, first: Tensor, second: Tensor, rank: int, wide: int) -> Tensor:
        """(rank,) ‖second ⊗ first‖² of each component in the metric of the patches, summed over the groups."""
        groups = self.groups
        first = first.reshape(groups, rank, -1)
        second = second.reshape(groups, rank, -1, wide)
        if self.gradient_metric is not None:
            by_output = second.transpose(1, 2).reshape(self.rows, rank, wide)
            second = self.gradient_metric.of(by_output).view(groups, -1, rank, wide).transpose(1, 2)
        gram = torch.einsum("grow,grov->grwv", second, second)
        if self._moments is None:
            own = first.square().sum(dim=2)
            return (gram.diagonal(dim1=2, dim2=3).sum(dim=2) * own).sum(dim=0)
        tall = first.shape[2]
        moments = self._moments.reshape(groups, tall, wide, tall, wide)
        total = first.new_zeros(groups, rank)
        for one in range(wide):
            for other in range(wide):
                total += gram[:, :, one, other] * ((first @ moments[:, :, one, :, other]) * first).sum(dim=2)
        return total.sum(dim=0).clamp_min(0.0)

    def _build(self, choice: Choice) -> dict[str, nn.Module]:
        (member,) = self.target.members
        return {member.name: self._layer(choice)}

    def _layer(self, choice: Choice) -> CompressedLayer:
        bits, activations = choice.bits or 8, choice.activations or "int8"
        flat = isinstance(self.conv, nn.Conv1d)
        if choice.rank is None and flat:
            return QuantizedConv1d.from_conv1d(self.conv, bits=bits, activations=activations)
        if choice.rank is None:
            return QuantizedConv2d.from_conv2d(self.conv, bits=bits, activations=activations)
        factors, scheme = self.factors_of(choice.scheme, choice.rank), choice.scheme or "channel"
        if flat:
            thin = SVDCompressedConv1d.from_factors(factors, self.conv, scheme)
            if not choice.rounded:
                return thin
            return QuantizedLowRankConv1d.from_factors(thin, bits=bits, activations=activations)
        cut = SVDCompressedConv2d.from_factors(factors, self.conv, scheme)
        return QuantizedLowRankConv2d.from_factors(cut, bits=bits, activations=activations) if choice.rounded else cut


def _rounding_error(components: Tensor) -> Tensor:
    codes, scale = quantize_rows(components, 8)
    return components - dequantize_rows(codes, scale).to(torch.float64)
