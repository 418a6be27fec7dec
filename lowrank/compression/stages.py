"""Seconds and memory of the stages of a run, and what it ran on."""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["Stages"]


@dataclass
class Stages:
    """Seconds and peak memory of each stage.

    Example:
        >>> stages = Stages()
        >>> with stages.stage("search"):
        ...     pass
        >>> list(stages.summary()["stages"])
        ['search']
    """

    stages: dict[str, dict[str, float]] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure what runs within."""
        start = time.perf_counter()
        yield
        # Kilobytes on Linux, bytes on macOS.
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        self.stages[name] = {"seconds": time.perf_counter() - start, "peak_memory_bytes": peak}

    def summary(self) -> dict[str, Any]:
        """Give the stages so far, their sum, and the host."""
        host = {
            "machine": platform.machine(),
            "system": platform.system(),
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
        }
        # The last stage is still running when this is called; it counts rows and takes no time worth naming.
        return {"stages": self.stages, "seconds": sum(item["seconds"] for item in self.stages.values()), "host": host}
