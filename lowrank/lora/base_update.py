"""One base layer with adapters merged into it, in the base's own format; nothing is changed, a new layer is made."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank.errors import AdapterError, NumericsError
from lowrank.layers import (
    CompressedLayer,
    LowRankEmbedding,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedLowRankEmbedding,
    QuantizedLowRankLayer,
    SVDCompressedLinear,
)
from lowrank.layers.conv import FactoredConv, SVDCompressedConv
from lowrank.layers.conv_codes import QuantizedConv
from lowrank.layers.conv_factor_codes import QuantizedLowRankConv
from lowrank.layers.factors import balanced, dense_product, round_factors
from lowrank.layers.source import is_conv1d
from lowrank.lora.adapter_kinds import conv_geometry
from lowrank.lora.adapter_layer import Change, LoRALayer, MergeRow
from lowrank.lora.bases import base_bias, base_weight, exact_weight, factor_pair
from lowrank.numerics.factors import Factors
from lowrank.numerics.linalg import safe_svd
from lowrank.numerics.rounding import quantize_rows

__all__ = ["MergeOptions", "merged_base"]

FactoredCodes = QuantizedLowRankLayer | QuantizedLowRankEmbedding | QuantizedLowRankConv
FactoredFloats = SVDCompressedLinear | LowRankEmbedding | SVDCompressedConv


@dataclass(frozen=True)
class MergeOptions:
    """How far merging may go; see :func:`lowrank.merge_lora`."""

    rank: int | None = None
    max_error: float | None = None
    requantize: bool = False


def merged_base(
    name: str, layer: LoRALayer, adapters: Sequence[str], options: MergeOptions
) -> tuple[nn.Module, MergeRow]:
    """The base with the adapters in it, and what that cost.

    Raises:
        AdapterError: it cannot be done; says why, and what would help.
        NumericsError: NaN or Inf in the adapter or the result.
    """
    base = layer.unmerged_base
    _check_geometry(name, layer, adapters)
    change = layer.change(adapters)
    for side in (change.left, change.right, change.rows):
        if side is not None and not bool(torch.isfinite(side).all()):
            raise NumericsError(f"layer {name}: the adapter holds NaN or Inf; it was not merged")
    pair = factor_pair(base, torch.float64)
    if pair is not None:
        merged, note = _merge_factors(name, base, pair, change, options)
    elif isinstance(base, CompressedLayer):
        merged, note = _merge_codes(name, base, change, options)
    else:
        merged, note = _merge_dense(base, change)
    before, after = exact_weight(base).flatten(1), exact_weight(merged).flatten(1)
    if not bool(torch.isfinite(after).all()):
        raise NumericsError(
            f"layer {name}: NaN or Inf after merging (dtype {base_weight(merged).dtype}); nothing was changed"
        )
    exact = _changed(before, change)
    wanted = float(torch.linalg.vector_norm(exact - before))
    lost = float(torch.linalg.vector_norm(exact - after))
    row = MergeRow(
        name=name,
        kind=type(base).__name__,
        adapters=tuple(adapters),
        rank_before=getattr(base, "rank", None),
        rank_after=getattr(merged, "rank", None),
        bytes_before=_stored_bytes(base),
        bytes_after=_stored_bytes(merged),
        error=lost / wanted if wanted > 0.0 else lost,
        note=note,
    )
    return merged.train(base.training).requires_grad_(False), row


def _changed(weight: Tensor, change: Change) -> Tensor:
    kept = weight if change.rows is None else weight * change.rows[:, None]
    return kept + change.left @ change.right


def _check_geometry(name: str, layer: LoRALayer, adapters: Sequence[str]) -> None:
    if not layer.family.startswith("conv"):
        return
    at = conv_geometry(layer.unmerged_base)
    if at["groups"] > 1:
        raise AdapterError(
            f"layer {name}: groups={at['groups']}: the adapter mixes channels of different groups, which no weight of this "
            "convolution can express; keep the adapter separate, or exclude the layer from target_modules"
        )
    for adapter in adapters:
        if layer.is_zero_padded(adapter):
            raise AdapterError(
                f"layer {name}: adapter {adapter!r} pads with zeros, the base with padding_mode={at['padding_mode']!r} (PEFT "
                "trains it so); no single convolution does both"
            )


def _merge_dense(base: nn.Module, change: Change) -> tuple[nn.Module, str]:
    weight = base_weight(base)
    result = _changed(weight.double().flatten(1), change).view(weight.shape).to(weight.dtype)
    merged = copy.copy(base)
    merged._parameters = dict(base._parameters)
    stored = result.T if is_conv1d(base) or isinstance(base, nn.Embedding) else result
    merged._parameters["weight"] = nn.Parameter(stored.contiguous(), requires_grad=False)
    return merged, "added to the weight"


def _merge_factors(
    name: str, base: nn.Module, pair: tuple[Tensor, Tensor], change: Change, options: MergeOptions
) -> tuple[nn.Module, str]:
    """Append the adapter's components; past the smaller side of the weight, or where asked, truncate again."""
    integer = isinstance(base, FactoredCodes)
    if integer and change.rows is not None and not options.requantize:
        raise AdapterError(
            f"layer {name}: DoRA scales every output, which codes with one scale a component cannot follow; pass "
            "requantize=True to round the layer anew"
        )
    rank, limit = pair[0].shape[1] + change.left.shape[1], min(pair[0].shape[0], pair[1].shape[1])
    again = (options.rank is not None and options.rank < rank) or options.max_error is not None
    if rank <= limit and not again and not (integer and change.rows is not None):
        return _appended(base, change), f"{change.left.shape[1]} components appended"
    kept = pair[0] if change.rows is None else pair[0] * change.rows[:, None]
    left, right, lost = _truncated(
        torch.cat([kept, change.left], dim=1), torch.cat([pair[1], change.right]), options, name
    )
    note = f"truncated from rank {rank} to {left.shape[1]}, ‖ΔW‖/‖W‖ {lost:.3g}"
    return _rebuilt(base, left, right), note + (", all components rounded anew" if integer else "")


def _truncated(left: Tensor, right: Tensor, options: MergeOptions, name: str) -> tuple[Tensor, Tensor, float]:
    """The best product of the rank allowed, from the SVD of the small core; and its relative error."""
    basis, core = torch.linalg.qr(left)
    other, weights = torch.linalg.qr(right.T)
    u, sigma, v = safe_svd(core @ weights.T, name=name)
    limit = min(left.shape[0], right.shape[1], sigma.numel())
    tails = torch.cat([torch.flip(torch.cumsum(torch.flip(sigma.square(), [0]), 0), [0]), sigma.new_zeros(1)]).sqrt()
    total = max(float(tails[0]), torch.finfo(torch.float64).tiny)
    if options.rank is not None:
        limit = min(limit, options.rank)
    if options.max_error is not None:
        enough = int(torch.nonzero(tails[1:] <= options.max_error * total)[0]) + 1
        limit = min(limit, enough)
    return (basis @ u)[:, :limit], (sigma[:, None] * v)[:limit] @ other.T, float(tails[limit]) / total


def _appended(base: nn.Module, change: Change) -> nn.Module:
    if isinstance(base, FactoredCodes):
        flip = isinstance(base, QuantizedLowRankEmbedding)
        added = (change.right.T, change.left.T) if flip else (change.left, change.right)
        left_codes, right_codes, scale = _rounded(*added, base.n_bits)
        left_codes = torch.cat([base.left_codes.flatten(1), left_codes], dim=1)
        right_codes = torch.cat([base.right_codes.flatten(1), right_codes])
        return _quantized(base, left_codes, right_codes, torch.cat([base.scale, scale]))
    assert isinstance(base, FactoredFloats)
    kept = [base.left.detach().flatten(1), base.right.detach().flatten(1)]
    flip = isinstance(base, LowRankEmbedding)
    if change.rows is not None:
        # Outputs are the columns of an embedding's right side.
        side, rows = (1, change.rows) if flip else (0, change.rows[:, None])
        kept[side] = (kept[side].double() * rows).to(kept[side].dtype)
    added = (change.right.T, change.left.T) if flip else (change.left, change.right)
    left, right = balanced(Factors(*added), base.left.dtype)
    return _low_rank(base, torch.cat([kept[0], left], dim=1), torch.cat([kept[1], right]))


def _rounded(left: Tensor, right: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and scales of a product, in whichever basis rounds better: as trained, or its singular vectors."""
    exact = left @ right
    basis, core = torch.linalg.qr(left)
    other, weights = torch.linalg.qr(right.T)
    u, sigma, v = safe_svd(core @ weights.T, name="adapter")
    count = left.shape[1]
    turned = (basis @ u)[:, :count] * sigma[:count], (v @ other.T)[:count]
    tries = [round_factors(left, right, bits)]
    if turned[0].shape[1] == count:
        tries.append(round_factors(*turned, bits))
    errors = [float(torch.linalg.vector_norm(dense_product(*rounded[:3]) - exact)) for rounded in tries]
    best = tries[errors.index(min(errors))]
    return best.left_codes, best.right_codes, best.scale


def _rebuilt(base: nn.Module, left: Tensor, right: Tensor) -> nn.Module:
    """A layer of the base's kind with these factors (out, r) and (r, in)."""
    if isinstance(base, (LowRankEmbedding, QuantizedLowRankEmbedding)):
        left, right = right.T, left.T
    if isinstance(base, FactoredCodes):
        return _quantized(base, *round_factors(left, right, base.n_bits)[:3])
    assert isinstance(base, FactoredFloats)
    return _low_rank(base, *balanced(Factors(left, right), base.left.dtype))


def _quantized(base: FactoredCodes, left_codes: Tensor, right_codes: Tensor, scale: Tensor) -> nn.Module:
    """A layer like this one with other codes, given as matrices (… , rank) and (rank, …)."""
    layer = _like(base, scale.numel(), {"error_bound": None}, scale.device)
    assert isinstance(layer, FactoredCodes)
    layer.left_codes = left_codes.reshape(layer.left_codes.shape).contiguous()
    layer.right_codes = right_codes.reshape(layer.right_codes.shape).contiguous()
    layer.scale = scale
    return layer


def _low_rank(base: FactoredFloats, left: Tensor, right: Tensor) -> nn.Module:
    layer = _like(base, left.shape[1], {"truncation_error": None}, left.device)
    assert isinstance(layer, FactoredFloats)
    with torch.no_grad():
        layer.left.copy_(left.reshape(layer.left.shape))
        layer.right.copy_(right.reshape(layer.right.shape))
    return layer


def _like(base: CompressedLayer, rank: int | None, changes: dict[str, None], device: torch.device) -> CompressedLayer:
    """A layer of the same configuration and bias, its other tensors still to be filled."""
    layer = type(base).from_config(base.config() | changes | {"rank": rank}, device=device)
    mine, its = base_bias(layer), base_bias(base)
    if mine is not None and its is not None:
        with torch.no_grad():
            mine.copy_(its)
    return layer


def _merge_codes(name: str, base: CompressedLayer, change: Change, options: MergeOptions) -> tuple[nn.Module, str]:
    """One int8 matrix has no room beside its codes: it is rounded anew, only where that was asked for."""
    if isinstance(base, FactoredConv):
        raise AdapterError(
            f'layer {name}: scheme="{base.scheme}" is a product of two one-dimensional kernels, which an adapter\'s kernel is '
            'not; keep the adapter separate, or compress this layer with scheme="channel"'
        )
    if not isinstance(base, (QuantizedLinear, QuantizedEmbedding, QuantizedConv)):
        raise AdapterError(f"layer {name}: merging into a {base.kind} is not supported; keep the adapter separate")
    if not options.requantize:
        raise AdapterError(
            f"layer {name}: a {base.kind} holds one int8 matrix, and an adapter's change is often smaller than its steps; "
            "keep the adapter separate, or pass requantize=True (--requantize) to round the sum anew (the report says what that costs)"
        )
    result = _changed(exact_weight(base).flatten(1), change)
    codes, scale = quantize_rows(result.T if isinstance(base, QuantizedEmbedding) else result, base.n_bits)
    layer = _like(base, None, {"error_bound": None}, scale.device)
    assert isinstance(layer, (QuantizedLinear, QuantizedEmbedding, QuantizedConv))
    layer.codes, layer.scale = codes.view(layer.codes.shape), scale
    return layer, "rounded anew"


def _stored_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values())
