"""How an adapter starts: at random, from the weight's leading directions, or from what compression removed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lowrank.errors import AdapterError, UsageError, is_whole
from lowrank.layers.factors import balanced
from lowrank.lora.adapter_layer import LoRALayer
from lowrank.lora.bases import base_of, family
from lowrank.numerics.factors import Factors, RankCurve, factorize, factorize_embedding
from lowrank.numerics.linalg import safe_svd
from lowrank.numerics.moments import InputStatistics, TokenCounts

__all__ = ["Residual", "drawn_from", "start_from_residual", "start_from_singular_vectors"]

# Relative to the mean diagonal, for the one inverse below. The mean lies in the gram's range, so that a singular gram needs
# no more than to be invertible in float64; 1e-6 already cost 3e-4 of the error on inputs of condition 4^11.
_RIDGE = 1e-10


@contextlib.contextmanager
def drawn_from(seed: int | None) -> Iterator[None]:
    """Draw random numbers of this seed within it, on the CPU and on CUDA devices; the caller's come back."""
    if seed is None:
        yield
        return
    if not is_whole(seed, 0, 2**63 - 1):
        raise UsageError(f"seed: must be an integer from 0 to 2**63 - 1, or None, got {seed!r}")
    # Parameters are drawn on torch's default device, which need not be the model's. Where CUDA has not started, seeding it
    # would reach its generators later, when nothing puts them back.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed_all(seed)
        yield


def start_from_singular_vectors(layer: LoRALayer, adapter: str, name: str) -> None:
    """Make the leading singular vectors the adapter and leave the base the rest (PiSSA, Meng et al. 2024).

    ``W = U S Vᵀ``: ``scaling · B A = U_r S_r V_rᵀ``, base ``W − scaling · B A``; the sum is W to rounding. The base weight
    is changed for good: without the adapter the layer is only the rest (as in PEFT).

    Raises:
        AdapterError: not a dense linear layer, or one that carries other adapters.
    """
    base = base_of(layer.base_layer)
    others = [known for known in layer.configs if known != adapter]
    if others:
        raise AdapterError(
            f'layer {name}: init_lora_weights="pissa" takes directions out of the weight under {", ".join(others)}, which '
            "would no longer compute what it was trained to; use another initialisation, or a copy of the model"
        )
    if base.is_compressed or base.family != "linear":
        raise AdapterError(
            f'layer {name}: init_lora_weights="pissa" takes directions out of a dense linear weight, and this is a '
            f'{type(base.layer).__name__}; use True, "gaussian" or, on a compressed layer, "residual"'
        )
    weight = base.exact_weight()
    left, sigma, right = safe_svd(weight, name=name)
    rank = min(layer.rank_of(adapter), sigma.numel())
    _write(layer, adapter, left[:, :rank], sigma[:rank, None] * right[:rank], name)
    up, down = layer.pair(adapter)
    # From the parameters as stored, so that base and adapter add up to W whatever their dtype rounds.
    base.set_weight(weight - layer.scaling[adapter] * (up.detach().double() @ down.detach().double()))


@dataclass(frozen=True)
class Residual:
    """What an adapter is fitted to that starts from what compression removed.

    Attributes:
        original: the model before compression.
        statistics: of the layers' inputs by name (look-ups, of an embedding); empty for a plain SVD of the weights' difference.
    """

    original: nn.Module
    statistics: Mapping[str, InputStatistics | TokenCounts] = field(default_factory=dict)

    def dense_layer(self, name: str) -> nn.Module:
        """Find the dense layer of this name.

        Raises:
            AdapterError: the original has none.
        """
        try:
            found = self.original.get_submodule(name)
        except AttributeError as error:
            raise AdapterError(f"original: has no module {name}") from error
        return found.unmerged_base if isinstance(found, LoRALayer) else found


def start_from_residual(layer: LoRALayer, adapter: str, name: str, residual: Residual) -> None:
    """Fit the best adapter of its rank to what compression removed, in the metric of the calibration inputs.

    With W the original weight, W' the compressed one and δ the shift of the bias, it minimises the mean square of
    ``(W − W')x − δ − scaling · B A x``. Regressing the target on x gives ``M = W − W' − δ μᵀ G⁻¹`` (G the gram), and the
    best rank-r map is that of M in the metric G. Without statistics G = I and δ is left out: a plain SVD of W − W'.

    Args:
        layer: with the adapter, as yet at random.
        adapter: its name.
        name: of the layer, in this model and in the original.
        residual: the original, and statistics of the layers' inputs.

    Raises:
        AdapterError: the original is not a dense layer of the same shape.
    """
    base, dense, statistics = base_of(layer.base_layer), residual.dense_layer(name), residual.statistics.get(name)
    if family(dense) != base.family or base_of(dense).is_compressed:
        raise AdapterError(f"layer {name}: its original must be a dense {base.family}, got a {type(dense).__name__}")
    original = base_of(dense)
    wanted, has = original.exact_weight(), base.exact_weight()
    if wanted.shape != has.shape:
        raise AdapterError(
            f"layer {name}: the original's weight is {tuple(wanted.shape)}, this one's {tuple(has.shape)}"
        )
    if base.family.startswith("conv") and layer.lora_A[adapter].groups > 1:
        raise AdapterError(
            f'layer {name}: init_lora_weights="residual" fits a weight, and the adapter of a convolution with groups is none; '
            "exclude the layer"
        )
    missing = (wanted.to(has.device) - has).flatten(1)
    if not bool(missing.any()):
        return
    if base.family == "embedding":
        counts = statistics if isinstance(statistics, TokenCounts) else None
        flipped = _best(factorize_embedding(missing.T, counts, name=name), layer.rank_of(adapter))
        _write(layer, adapter, flipped.right.T, flipped.left.T, name)
        return
    moments = statistics if isinstance(statistics, InputStatistics) and statistics.count else None
    if moments is not None:
        missing = missing - _bias_as_weight(original.bias, base.bias, moments, missing)
    best = _best(factorize(missing, moments, shift_bias=False, name=name), layer.rank_of(adapter))
    _write(layer, adapter, best.left, best.right, name)


def _best(curve: RankCurve, rank: int) -> Factors:
    return curve.factors(min(rank, curve.max_rank))


def _bias_as_weight(wanted: Tensor | None, has: Tensor | None, moments: InputStatistics, like: Tensor) -> Tensor:
    """The part of the bias shift that inputs of a mean other than zero can express: ``δ μᵀ G⁻¹``."""
    if wanted is None or has is None or torch.equal(wanted, has):
        return torch.zeros_like(like)
    shift = has.detach().double() - wanted.detach().to(has.device).double()
    return torch.outer(shift.to(like.device), moments.whitened_mean(_RIDGE).to(like.device))


def _write(layer: LoRALayer, adapter: str, left: Tensor, right: Tensor, name: str) -> None:
    """Set ``scaling · B A = left @ right``; components beyond those given keep their A and get a zero B."""
    scaling = layer.scaling[adapter]
    if scaling == 0.0:
        raise AdapterError(
            f"layer {name}: lora_alpha = 0 scales every adapter to nothing; this initialisation needs another"
        )
    up, down = balanced(Factors(left, right), torch.float64)
    root = math.sqrt(abs(scaling))
    up, down = up / math.copysign(root, scaling), down / root
    missing = layer.rank_of(adapter) - down.shape[0]
    if missing:
        down = torch.cat([down, layer.pair(adapter)[1].detach().double()[-missing:]])
        up = torch.cat([up, up.new_zeros(up.shape[0], missing)], dim=1)
    layer.set_pair(adapter, up, down)
