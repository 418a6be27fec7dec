"""Which positions of a batch are padding: the masks that models take, each for the sequence it belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["DECODER", "ENCODER", "IGNORED_LABEL", "MASK_NAMES", "Mask", "mask_of", "masks_in"]

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
MASK_NAMES = frozenset(_KEPT) | frozenset(_PADDED)
# What a decoder reads, by name.
_WRITTEN = ("decoder_input_ids", "decoder_inputs_embeds", "tgt")
# Cross-attention reads the encoder's states for its keys and values, though its module stands in the decoder.
_CROSS = ("encoder_attn", "encdec", "enc_dec", "cross", "multihead_attn", "encoder_decoder")
_KEYS_AND_VALUES = ("k", "v", "k_proj", "v_proj", "key", "value", "kv_proj")


@dataclass(frozen=True)
class Mask:
    """Say which positions of one sequence count.

    Attributes:
        kept: (samples, positions) bool; of a decoder's sequence of which no padding is known: True throughout.
        side: "encoder" or "decoder" where a model has two sequences, else "".
        turns: it also fits tensors with positions first, as torch's layers have them unless told otherwise.
    """

    kept: Tensor
    side: str = ""
    turns: bool = True


def masks_in(arguments: Mapping[str, Any], *, writes: bool = False) -> tuple[Mask, ...]:
    """Find the masks among a call's arguments, by the names that transformers and torch give them.

    Labels of −100 are padding of the decoder where the batch has two sequences and no mask of the decoder's.

    Args:
        arguments: by name.
        writes: the model has a decoder, which reads the labels where it is given nothing else.

    Example:
        >>> masks_in({"src_key_padding_mask": torch.tensor([[False, True]])})[0].kept
        tensor([[ True, False]])
    """
    labels = arguments.get("labels")
    two = any(name.startswith("decoder_") or name in ("tgt", "tgt_key_padding_mask") for name in arguments)
    two = two or (writes and isinstance(labels, Tensor))
    found: list[Mask] = []
    for name, value in arguments.items():
        if not isinstance(value, Tensor) or value.ndim != 2:
            continue
        if name in _KEPT:
            side = _KEPT[name] or (ENCODER if two else "")
            found.append(Mask(_not_added(value) if _is_added(value) else value.bool(), side, turns=False))
        elif name in _PADDED and (name != "padding_mask" or value.dtype == torch.bool):
            # Of numbers a padding_mask is as often 1 for a token as 1 for padding.
            kept = _not_added(value) if value.is_floating_point() else ~value.bool()
            found.append(Mask(kept, (_PADDED[name] or ENCODER) if two else ""))
    if two and all(mask.side != DECODER for mask in found):
        written = next((arguments[name] for name in _WRITTEN if isinstance(arguments.get(name), Tensor)), None)
        if isinstance(labels, Tensor) and labels.ndim == 2:
            found.append(Mask(labels != IGNORED_LABEL, DECODER, turns=False))
        elif written is not None and written.ndim >= 2:
            # The encoder's mask is not the decoder's, however long both are.
            found.append(Mask(torch.ones(written.shape[:2], dtype=torch.bool, device=written.device), DECODER))
    return tuple(found)


def _is_added(mask: Tensor) -> bool:
    """Whether a mask is what is added to attention scores: nothing for a token, a large negative number for padding."""
    return mask.is_floating_point() and bool((mask < 0).any())


def _not_added(mask: Tensor) -> Tensor:
    return mask >= 0


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
    # By its name first; where no sequence of that side is so long, the tensor is of the other one, whatever its name.
    ordered = sorted(masks, key=lambda mask: mask.side not in ("", wanted or mask.side))
    fitting = [mask.kept for mask in ordered if tuple(mask.kept.shape) == size]
    turned = [mask.kept.T for mask in ordered if mask.turns and tuple(mask.kept.shape)[::-1] == size]
    return next(iter(fitting + turned), None)


def _side_of(name: str) -> str:
    """Which sequence flows into a module: the decoder's, but for what cross-attention makes of the encoder's states."""
    if not name:
        return ""
    parts = name.lower().split(".")
    crossing = any(mark in part for part in parts for mark in _CROSS)
    if any("decoder" in part and "encoder" not in part for part in parts):
        return ENCODER if crossing and parts[-1] in _KEYS_AND_VALUES else DECODER
    # What both share looks up the encoder's tokens first.
    return ENCODER if parts[0].startswith(("encoder", "src", "shared", "embed")) or "encoder" in parts else DECODER
