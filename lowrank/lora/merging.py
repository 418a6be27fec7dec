"""One base layer with adapters merged into it, in the base's own format; nothing is changed, a new layer is made."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank.errors import AdapterError, NumericsError
from lowrank.factors import Factors
from lowrank.layers import (
    CompressedLayer,
    LowRankEmbedding,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedLowRankEmbedding,
    QuantizedLowRankLayer,
    SVDCompressedLinear,
)
from lowrank.layers.linear import balanced
from lowrank.layers.quantized_lowrank import dense_product, round_factors
from lowrank.layers.source import is_conv1d
from lowrank.linalg import safe_svd
from lowrank.lora.bases import base_bias, base_weight, exact_weight, factor_pair
from lowrank.lora.layer import Change, LoRALayer, MergeRow
from lowrank.lora.layers import conv_geometry
from lowrank.quantization import quantize_rows

__all__ = ["MergeOptions", "merged_base"]


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
        if layer.lora_A[adapter].padding_mode != at["padding_mode"]:
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
    integer = isinstance(base, (QuantizedLowRankLayer, QuantizedLowRankEmbedding))
    if integer and change.rows is not None and not options.requantize:
        raise AdapterError(
            f"layer {name}: DoRA scales every output, which codes with one scale a component cannot follow; pass "
            "requantize=True to round the layer anew"
        )
    rank, limit = pair[0].shape[1] + change.left.shape[1], min(pair[0].shape[0], pair[1].shape[1])
    again = options.rank is not None or options.max_error is not None
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
    if isinstance(base, (QuantizedLowRankLayer, QuantizedLowRankEmbedding)):
        flip = isinstance(base, QuantizedLowRankEmbedding)
        left, right = (change.right.T, change.left.T) if flip else (change.left, change.right)
        left_codes, right_codes, scale = _rounded(left, right, base.n_bits)
        codes = torch.cat([base.left_codes, left_codes], dim=1), torch.cat([base.right_codes, right_codes])
        return _quantized(base, *codes, torch.cat([base.scale, scale]))
    if isinstance(base, LowRankEmbedding):
        left, right = balanced(Factors(change.right.T, change.left.T), base.left.dtype)
        kept = base.right.detach()
        if change.rows is not None:
            kept = (kept.double() * change.rows).to(kept.dtype)
        return _low_rank(base, torch.cat([base.left.detach(), left], dim=1), torch.cat([kept, right]))
    assert isinstance(base, SVDCompressedLinear)
    left, right = balanced(Factors(change.left, change.right), base.left.dtype)
    kept = base.left.detach()
    if change.rows is not None:
        kept = (kept.double() * change.rows[:, None]).to(kept.dtype)
    return _low_rank(base, torch.cat([kept, left], dim=1), torch.cat([base.right.detach(), right]))


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
    if isinstance(base, (QuantizedLowRankLayer, QuantizedLowRankEmbedding)):
        return _quantized(base, *round_factors(left, right, base.n_bits)[:3])
    assert isinstance(base, (SVDCompressedLinear, LowRankEmbedding))
    return _low_rank(base, *balanced(Factors(left, right), base.left.dtype))


def _quantized(base: nn.Module, left_codes: Tensor, right_codes: Tensor, scale: Tensor) -> nn.Module:
    if isinstance(base, QuantizedLowRankEmbedding):
        return QuantizedLowRankEmbedding.from_tensors(
            left_codes, right_codes, scale, base.padding_idx, bits=base.n_bits, dtype=base.dtype
        )
    assert isinstance(base, QuantizedLowRankLayer)
    return QuantizedLowRankLayer.from_tensors(
        left_codes, right_codes, scale, base.bias, bits=base.n_bits, activations=base.activations, dtype=base.dtype
    )


def _low_rank(base: SVDCompressedLinear | LowRankEmbedding, left: Tensor, right: Tensor) -> nn.Module:
    config = base.config() | {"rank": left.shape[1], "truncation_error": None}
    layer = type(base).from_config(config, device=left.device)
    with torch.no_grad():
        layer.left.copy_(left)
        layer.right.copy_(right)
        mine, its = base_bias(layer), base_bias(base)
        if mine is not None and its is not None:
            mine.copy_(its)
    return layer


def _merge_codes(name: str, base: CompressedLayer, change: Change, options: MergeOptions) -> tuple[nn.Module, str]:
    """A dense int8 matrix has no room beside its codes: it is rounded anew, only where that was asked for."""
    if not isinstance(base, (QuantizedLinear, QuantizedEmbedding)):
        raise AdapterError(f"layer {name}: merging into a {base.kind} is not supported; keep the adapter separate")
    if not options.requantize:
        raise AdapterError(
            f"layer {name}: a {base.kind} holds one int8 matrix, and an adapter's change is often smaller than its steps; "
            "keep the adapter separate, or pass requantize=True to round the sum anew (the report says what that costs)"
        )
    result = _changed(exact_weight(base), change)
    note = "rounded anew"
    if isinstance(base, QuantizedEmbedding):
        codes, scale = quantize_rows(result.T, base.n_bits)
        return QuantizedEmbedding.from_tensors(codes, scale, base.padding_idx, bits=base.n_bits, dtype=base.dtype), note
    codes, scale = quantize_rows(result, base.n_bits)
    return QuantizedLinear.from_tensors(
        codes, scale, base.bias, bits=base.n_bits, activations=base.activations, dtype=base.dtype
    ), note


def _stored_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values())
