"""One base layer with adapters merged into it, in the base's own format; nothing is changed, a new layer is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank.errors import AdapterError, NumericsError
from lowrank.lora.adapter_layer import LoRALayer
from lowrank.lora.bases import Base, base_of
from lowrank.lora.changes import Change, MergeRow
from lowrank.numerics.linalg import safe_svd

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
    """Make the base with the adapters in it, and say what that cost.

    Raises:
        AdapterError: it cannot be done; says why, and what would help.
        NumericsError: NaN or Inf in the adapter or the result.
    """
    base = base_of(layer.unmerged_base)
    _check_geometry(name, base, layer, adapters)
    change = layer.change(adapters)
    for side in (change.left, change.right, change.rows):
        if side is not None and not bool(torch.isfinite(side).all()):
            raise NumericsError(f"layer {name}: the adapter holds NaN or Inf; it was not merged")
    merged, note = _merged(name, base, change, options)
    before, after = base.exact_weight().flatten(1), base_of(merged).exact_weight().flatten(1)
    if not bool(torch.isfinite(after).all()):
        raise NumericsError(
            f"layer {name}: NaN or Inf after merging (dtype {base_of(merged).weight().dtype}); nothing was changed"
        )
    exact = _changed(before, change)
    wanted = float(torch.linalg.vector_norm(exact - before))
    lost = float(torch.linalg.vector_norm(exact - after))
    row = MergeRow(
        name=name,
        kind=type(base.layer).__name__,
        adapters=tuple(adapters),
        rank_before=base.rank,
        rank_after=base_of(merged).rank,
        bytes_before=_stored_bytes(base.layer),
        bytes_after=_stored_bytes(merged),
        error=lost / wanted if wanted > 0.0 else lost,
        note=note,
    )
    return merged.train(base.layer.training).requires_grad_(False), row


def _changed(weight: Tensor, change: Change) -> Tensor:
    kept = weight if change.rows is None else weight * change.rows[:, None]
    return kept + change.left @ change.right


def _check_geometry(name: str, base: Base, layer: LoRALayer, adapters: Sequence[str]) -> None:
    if base.groups > 1:
        raise AdapterError(
            f"layer {name}: groups={base.groups}: the adapter mixes channels of different groups, which no weight of this "
            "convolution can express; keep the adapter separate, or exclude the layer from target_modules"
        )
    for adapter in adapters:
        departures = layer.departures(adapter)
        if "zero_padded" in departures:
            raise AdapterError(
                f"layer {name}: adapter {adapter!r} pads with zeros, the base with "
                f"padding_mode={base.geometry.padding_mode!r} (PEFT trains it so); no single convolution does both"
            )
        if departures:
            raise AdapterError(
                f"layer {name}: adapter {adapter!r} has no dilation, the base dilation={base.geometry.dilation} (PEFT trains it so); "
                "no single convolution does both"
            )


def _merged(name: str, base: Base, change: Change, options: MergeOptions) -> tuple[nn.Module, str]:
    """Append components where the base has factors, else add to its weight: rounded anew, only where that was asked for."""
    pair = base.factors(torch.float64)
    if pair is not None:
        return _merge_factors(name, base, pair, change, options)
    if base.scheme is not None:
        raise AdapterError(
            f'layer {name}: scheme="{base.scheme}" is a product of two one-dimensional kernels, which an adapter\'s kernel is '
            'not; keep the adapter separate, or compress this layer with scheme="channel"'
        )
    if base.has_codes and not options.requantize:
        raise AdapterError(
            f"layer {name}: a {type(base.layer).__name__} holds one {base.format} matrix, and an adapter's change is often smaller "
            "than its steps; keep the adapter separate, or pass requantize=True (--requantize) to round the sum anew (the report "
            "says what that costs)"
        )
    merged = base.with_weight(_changed(base.exact_weight().flatten(1), change).view(base.shape))
    return merged, "rounded anew" if base.has_codes else "added to the weight"


def _merge_factors(
    name: str, base: Base, pair: tuple[Tensor, Tensor], change: Change, options: MergeOptions
) -> tuple[nn.Module, str]:
    """Append the adapter's components; past the smaller side of the weight, or where asked, truncate again."""
    scaled_codes = base.has_codes and change.rows is not None
    if scaled_codes and not options.requantize:
        raise AdapterError(
            f"layer {name}: DoRA scales every output, which codes with one scale a component cannot follow; pass "
            "requantize=True to round the layer anew"
        )
    rank, limit = pair[0].shape[1] + change.left.shape[1], min(pair[0].shape[0], pair[1].shape[1])
    again = (options.rank is not None and options.rank < rank) or options.max_error is not None
    if rank <= limit and not again and not scaled_codes:
        return base.appended(*change), f"{change.left.shape[1]} components appended"
    kept = pair[0] if change.rows is None else pair[0] * change.rows[:, None]
    left, right, lost = _truncated(
        torch.cat([kept, change.left], dim=1), torch.cat([pair[1], change.right]), options, name
    )
    note = f"truncated from rank {rank} to {left.shape[1]}, ‖ΔW‖/‖W‖ {lost:.3g}"
    return base.with_factors(left, right), note + (", all components rounded anew" if base.has_codes else "")


def _truncated(left: Tensor, right: Tensor, options: MergeOptions, name: str) -> tuple[Tensor, Tensor, float]:
    """Find the best product of the rank allowed, from the SVD of the small core; and its relative error."""
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


def _stored_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values())
