"""Digests of tensors and documents: whether what is loaded is what was saved."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["ALGORITHM", "document_digest", "tensor_digest"]

ALGORITHM = "sha256"


def tensor_digest(tensor: torch.Tensor) -> str:
    """Digest dtype, shape and bytes of a dense tensor, as hexadecimal.

    Example:
        >>> tensor_digest(torch.zeros(2)) == tensor_digest(torch.zeros(1, 2)), len(tensor_digest(torch.zeros(2)))
        (False, 64)
    """
    found = hashlib.new(ALGORITHM, f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    dense = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    if dense.numel():
        found.update(dense.view(torch.uint8).numpy().data)
    return found.hexdigest()


def document_digest(document: Mapping[str, Any]) -> str:
    """Digest what a JSON document says, however it is laid out.

    Example:
        >>> document_digest({"a": 1, "b": 2}) == document_digest({"b": 2, "a": 1})
        True
    """
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.new(ALGORITHM, text.encode()).hexdigest()
