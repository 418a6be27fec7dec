"""What ``lowrank info`` prints, from headers and reports alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from lowrank.checkpoint.manifest import open_checkpoint
from lowrank.io import printable, read_json

__all__ = ["describe"]


def describe(directory: str | Path) -> dict[str, Any]:
    """Describe a compressed model without loading it.

    Args:
        directory: as written by :func:`lowrank.checkpoint.save_compressed`.

    Returns:
        Plain JSON: ``directory``, ``model_class``, ``versions``, ``tensor_bytes`` and ``file_bytes``, ``tensors`` and
        ``ties`` (counts), ``layers`` (count), ``formats`` and ``kinds`` (name -> count), ``ranks`` (lowest and highest,
        or ``None``), and ``totals`` from ``report.json`` (``None`` without a report).

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
    configs = manifest.layers.values()
    ranks = [config["rank"] for config in configs if config.get("rank") is not None]
    report_path = directory / "report.json"
    report = read_json(report_path) if report_path.exists() else {}
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
        "totals": report.get("totals"),
    }
