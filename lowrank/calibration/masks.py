"""Which positions of a batch are padding: the masks that models take, each for the sequence it belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["DECODER", "ENCODER", "IGNORED_LABEL", "Mask", "mask_of", "masks_in"]

ENCODER, DECODER = "encoder", "decoder"
IGNORED_LABEL = -100
# transformers: 1 where a position counts.
_KEPT = {"attention_mask": "", "encoder_attention_mask": ENCODER, "decoder_attention_mask": DECODER}
# torch: True (or −inf) where a position is padding.
_PADDED = {
    "key_padding_mask": "",
    "padding_mask": "",
    "src_key_padding_mask": ENCODER,
    "memory_key_padding_mask": ENCODER,
    "tgt_key_padding_mask": DECODER,
}
# Cross-attention reads the encoder's states for its keys and values, though its module stands in the decoder.
_CROSS = ("encoder_attn", "encdecattention", "crossattention", "cross_attn", "multihead_attn", "encoder_decoder_attn")
_KEYS_AND_VALUES = ("k", "v", "k_proj", "v_proj", "key", "value", "kv_proj")


@dataclass(frozen=True)
class Mask:
    """Say which positions of one sequence count.

    Attributes:
        kept: (samples, positions) bool.
        side: "encoder" or "decoder" where a model has two sequences, else "".
    """

    kept: Tensor
    side: str = ""


def masks_in(arguments: Mapping[str, Any]) -> tuple[Mask, ...]:
    """Find the masks among a call's arguments, by the names that transformers and torch give them.

    Labels of −100 are padding of the decoder where the batch has two sequences and no mask of the decoder's.

    Example:
        >>> masks_in({"src_key_padding_mask": torch.tensor([[False, True]])})[0].kept
        tensor([[ True, False]])
    """
    two = any(name.startswith("decoder_") or name in ("tgt", "tgt_key_padding_mask") for name in arguments)
    found: list[Mask] = []
    for name, value in arguments.items():
        if not isinstance(value, Tensor) or value.ndim != 2:
            continue
        if name in _KEPT:
            found.append(Mask(value.bool(), _KEPT[name] or (ENCODER if two else "")))
        elif name in _PADDED:
            padded = (
                value if value.dtype == torch.bool else torch.isneginf(value) if value.is_floating_point() else value
            )
            found.append(Mask(~padded.bool(), _PADDED[name] if two else ""))
    labels = arguments.get("labels")
    if two and isinstance(labels, Tensor) and labels.ndim == 2 and all(mask.side != DECODER for mask in found):
        found.append(Mask(labels != IGNORED_LABEL, DECODER))
    return tuple(found)


def mask_of(masks: Sequence[Mask], shape: Sequence[int], name: str = "", *, side: str = "") -> Tensor | None:
    """Give the mask of a tensor whose first two dimensions have these sizes, in that order; ``None`` where none fits.

    Args:
        masks: of the batch.
        shape: (samples, positions), or (positions, samples) for models with time first.
        name: of the module that the tensor belongs to; says which sequence it works on where two have one length.
        side: says so outright.

    Example:
        >>> mask_of([Mask(torch.ones(2, 5, dtype=torch.bool))], (5, 2)).shape
        torch.Size([5, 2])
    """
    wanted = side or _side_of(name)
    size = tuple(shape[:2])
    fitting = [mask.kept for mask in masks if tuple(mask.kept.shape) == size and mask.side in ("", wanted or mask.side)]
    if fitting:
        return fitting[0]
    turned = [
        mask.kept.T for mask in masks if tuple(mask.kept.shape) == size[::-1] and mask.side in ("", wanted or mask.side)
    ]
    return turned[0] if turned else None


def _side_of(name: str) -> str:
    parts = name.lower().split(".")
    if not any(part.startswith("decoder") for part in parts):
        return ENCODER if any(part.startswith("encoder") for part in parts) else ""
    crossing = any(part in _CROSS for part in parts)
    return ENCODER if crossing and parts[-1] in _KEYS_AND_VALUES else DECODER
