"""Compressed models on disk: written whole or not at all, checked in full before they are loaded, equal bit for bit."""

from __future__ import annotations

from lowrank.checkpoint.info import describe
from lowrank.checkpoint.loading import load_model
from lowrank.checkpoint.manifest import FORMAT_VERSION, MANIFEST_NAME
from lowrank.checkpoint.saving import require_storable, save_compressed, stored_tensors

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "describe",
    "load_model",
    "require_storable",
    "save_compressed",
    "stored_tensors",
]
