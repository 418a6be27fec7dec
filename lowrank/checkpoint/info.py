"""What ``lowrank info`` prints, from headers and reports alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from lowrank.checkpoint.manifest import Manifest, certified_digest, check_documents, open_checkpoint
from lowrank.errors import CheckpointError
from lowrank.io import printable, read_json

__all__ = ["describe"]

_NUMBERS = ("size_ratio", "bytes_before", "bytes_after", "error_budget", "error_measured", "error_upper")


def describe(directory: str | Path) -> dict[str, Any]:
    """Describe a compressed model without loading it.

    Args:
        directory: as written by :func:`lowrank.checkpoint.save_compressed`.

    Returns:
        Plain JSON: ``directory``, ``model_class``, ``versions``, ``tensor_bytes`` and ``file_bytes``, ``tensors`` and
        ``ties`` (counts), ``layers`` (count), ``formats`` and ``kinds`` (name -> count), ``ranks`` (lowest and highest,
        or ``None``), ``totals`` from ``report.json`` (``None`` without a report), and ``certificate`` (``None`` where there is none of
        these tensors).

    Raises:
        CheckpointError, ResourceError, StorageError: the directory would not load either.

    >>> import tempfile
    >>> from torch import nn
    >>> from lowrank.checkpoint.saving import save_compressed
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = save_compressed(nn.Linear(2, 2), Path(folder, "out"))
    ...     describe(Path(folder, "out"))["tensor_bytes"]
    24
    """
    directory = Path(directory)
    manifest, source = open_checkpoint(directory)
    check_documents(manifest, directory)
    configs = manifest.layers.values()
    ranks = [config["rank"] for config in configs if config.get("rank") is not None]
    report_path = directory / "report.json"
    totals = _totals(report_path) if report_path.exists() else None
    versions = ("format_version", "lowrank_version", "torch_version")
    return {
        "directory": printable(directory),
        "model_class": printable(manifest.raw.get("model_class")),
        "versions": {key: printable(manifest.raw.get(key)) for key in versions},
        "tensor_bytes": source.tensor_bytes,
        "file_bytes": source.file_bytes,
        "tensors": len(source.names) - (manifest.guard is not None),
        "ties": len(manifest.ties),
        "layers": len(manifest.layers),
        "formats": dict(sorted(Counter(printable(config.get("format")) for config in configs).items())),
        "kinds": dict(sorted(Counter(printable(config.get("kind")) for config in configs).items())),
        "ranks": [min(ranks), max(ranks)] if ranks else None,
        "totals": totals,
        "certificate": _certificate(manifest),
    }


def _certificate(manifest: Manifest) -> dict[str, Any] | None:
    """What the manifest says was proved, where it is of the tensors beside it."""
    found = manifest.raw.get("certificate")
    if not isinstance(found, dict) or found.get("tensors") != certified_digest(manifest.digests, manifest.guard):
        return None
    return found


def _totals(path: Path) -> dict[str, Any] | None:
    """The totals of a report, checked as far as they are printed."""
    totals = read_json(path).get("totals")
    if totals is None:
        return None
    where = f"{printable(path)}: totals"
    if not isinstance(totals, dict):
        raise CheckpointError(f"{where} must be an object; got {printable(repr(totals)[:60])}")
    for key, value in totals.items():
        numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
        if key in _NUMBERS and value is not None and not numeric:
            raise CheckpointError(f"{where}: {key} must be a number; got {printable(repr(value)[:60])}")
        if key == "metric" and value is not None and not isinstance(value, str):
            raise CheckpointError(f"{where}: metric must be text; got {printable(repr(value)[:60])}")
    return totals
