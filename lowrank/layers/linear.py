"""A linear layer as two thin ones, trainable."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.errors import RankError
from lowrank.layers.base import CompressedLayer
from lowrank.layers.checks import check_size
from lowrank.layers.factors import balanced
from lowrank.layers.source import carry_over, choose_rank, error_in, linear_parts
from lowrank.layers.weights import FloatFactors
from lowrank.numerics.factors import Factors, check_rank, factorize
from lowrank.numerics.moments import InputStatistics

__all__ = ["LinearLayer", "SVDCompressedLinear"]


class LinearLayer(CompressedLayer):
    """Base of the layers that take the place of ``nn.Linear``: features, a bias, and the way back to a dense layer."""

    in_features: int
    out_features: int
    bias: nn.Parameter | None

    def _set_features(self, in_features: int, out_features: int) -> None:
        self.in_features = check_size(in_features, "in_features")
        self.out_features = check_size(out_features, "out_features")

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.out_features, self.in_features

    @classmethod
    def _arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        outputs, inputs = config["shape"]
        sizes = {"in_features": inputs, "out_features": outputs, "bias": config["bias"]}
        return super()._arguments(config) | sizes

    def _dense(self, device: torch.device) -> nn.Linear:
        """``nn.Linear`` of the same weight and bias, in the dtype of the model."""
        # Not initialised: nothing is drawn from the caller's random numbers.
        linear: nn.Linear = torch.nn.utils.skip_init(
            nn.Linear, self.in_features, self.out_features, self.bias is not None, device=device, dtype=self.dtype
        )
        with torch.no_grad():
            linear.weight.copy_(self.dense_weight())
            if self.bias is not None:
                linear.bias.copy_(self.bias)
                linear.bias.requires_grad_(self.bias.requires_grad)
        return linear.train(self.training)


class SVDCompressedLinear(FloatFactors, LinearLayer):
    """``y = (x @ rightᵀ) @ leftᵀ + bias``: the weight is ``left @ right``.

    Args:
        in_features: n.
        out_features: m.
        rank: 1 to min(m, n).
        bias: whether there is one.
        device, dtype: of the parameters.

    Attributes:
        left: (m, rank).
        right: (rank, n).
        bias: (m,) or ``None``.
        truncation_error: ‖W − left right‖_F of the weight it was made from; ``None`` for one made from scratch.

    Raises:
        RankError: a rank or size out of range.

    Example:
        >>> layer = SVDCompressedLinear.from_linear(nn.Linear(6, 4), rank=4)
        >>> layer(torch.zeros(2, 6)).shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._set_features(in_features, out_features)
        rank = check_rank(rank, min(in_features, out_features))
        self.left = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.right = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.dtype = self.left.dtype
        self.truncation_error: float | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw factors whose product has the variance of ``nn.Linear``'s initial weight, 1 / (3 · in_features)."""
        bound = 1.0 / math.sqrt(self.in_features)
        # var(left right) = rank · var(left) · var(right), split evenly.
        each = (3.0 * bound * bound / self.left.shape[1]) ** 0.25
        with torch.no_grad():
            self.left.uniform_(-each, each)
            self.right.uniform_(-each, each)
            if self.bias is not None:
                self.bias.uniform_(-bound, bound)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        rank: int | None = None,
        max_error: float | None = None,
        statistics: InputStatistics | None = None,
        ridge: float = 0.0,
    ) -> SVDCompressedLinear:
        """Make the best layer of this rank, or the one of the smallest rank within an error.

        Args:
            linear: ``nn.Linear`` or transformers' ``Conv1D``.
            rank: 1 to min(out, in).
            max_error: largest ‖W − W'‖_F/‖W‖_F; with statistics, the same in the norm of the (centred) inputs.
            statistics: of the layer's inputs; makes the factors those of the least output error.
            ridge: relative, see :func:`lowrank.numerics.factors.factorize`.

        Raises:
            RankError: rank out of range, or no rank is within ``max_error``.
            NumericsError: NaN or Inf in the weight.
        """
        weight, bias = linear_parts(linear)
        centred = bias is not None
        curve = factorize(weight, statistics, ridge=ridge, shift_bias=centred)

        def measure(candidate: int) -> float:
            left, right = balanced(curve.factors(candidate), weight.dtype)
            return error_in(weight, left.double() @ right.double(), statistics, centred=centred, ridge=ridge)

        return cls.from_factors(curve.factors(choose_rank(curve, rank, max_error, measure)), linear)

    @classmethod
    def from_factors(cls, factors: Factors, linear: nn.Module) -> SVDCompressedLinear:
        """Make the layer of these factors; bias, dtype, device, mode and ``requires_grad`` are the linear layer's.

        Args:
            factors: left (out, rank), right (rank, in), and a shift that is added to the bias.
            linear: the layer it takes the place of.

        Raises:
            RankError: the factors do not fit the layer, or shift a bias that it does not have.
        """
        weight, bias = linear_parts(linear)
        out_features, in_features = weight.shape
        if factors.left.shape[0] != out_features or factors.right.shape[1] != in_features:
            raise RankError(
                f"factors: {tuple(factors.left.shape)} @ {tuple(factors.right.shape)} do not fit a layer of "
                f"{tuple(weight.shape)}"
            )
        if factors.bias_shift is not None and bias is None:
            raise RankError("factors: carry a bias shift, but the layer has no bias; factorize with shift_bias=False")
        left, right = balanced(factors, weight.dtype)
        sizes = {"in_features": in_features, "out_features": out_features, "rank": factors.rank}
        layer = cls._allocate(sizes | {"bias": bias is not None, "dtype": weight.dtype}, weight.device)
        with torch.no_grad():
            layer.left.copy_(left)
            layer.right.copy_(right)
            if layer.bias is not None and bias is not None:
                shift = 0.0 if factors.bias_shift is None else factors.bias_shift.to(bias.device)
                layer.bias.copy_(bias.double() + shift)
        layer.truncation_error = error_in(
            weight, layer.left.detach().double() @ layer.right.detach().double(), None
        ) * float(torch.linalg.vector_norm(weight.detach().double()))
        carry_over(linear, layer)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return F.linear(F.linear(input, self.right), self.left, self.bias)

    def dense_weight(self) -> Tensor:
        """Compute ``left @ right``, (out, in), multiplied in float64 and rounded once."""
        return (self.left.double() @ self.right.double()).to(self.left.dtype)

    def to_linear(self) -> nn.Linear:
        """Make a dense layer with the same weight and bias."""
        linear = self._dense(self.left.device)
        linear.weight.requires_grad_(self.left.requires_grad)
        return linear

    def reconstruction_error(self, weight: Tensor) -> float:
        """Compute ‖W − left right‖_F / ‖W‖_F for a weight (out, in)."""
        return error_in(weight, (self.left.double() @ self.right.double()).detach(), None)

    def config(self) -> dict[str, Any]:
        """See :meth:`CompressedLayer.config`."""
        return super().config() | {"bias": self.bias is not None, "truncation_error": self.truncation_error}

    def _restore(self, config: Mapping[str, Any]) -> None:
        self.truncation_error = config.get("truncation_error")

    def extra_repr(self) -> str:
        """Say what ``repr`` shows."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
        return f"{sizes}, bias={self.bias is not None}"
