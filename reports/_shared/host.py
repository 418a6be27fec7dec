"""What measurements depend on: the machine, its instructions, threads, versions."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def processor() -> str:
    """Return the processor's name as Linux has it, or as Python does."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _route() -> str:
    from lowrank.kernels import route

    return route()


def _version() -> str:
    import lowrank

    return str(lowrank.__version__)


_FACTS: dict[str, Callable[[], Any]] = {
    "cpu": processor,
    "machine": platform.machine,
    "capability": torch.backends.cpu.get_cpu_capability,
    "threads": torch.get_num_threads,
    "load": lambda: round(os.getloadavg()[0], 1),
    "torch": lambda: str(torch.__version__),
    "route": _route,
    "lowrank": _version,
}


def host(*names: str) -> dict[str, Any]:
    """Return the facts of these names: cpu, machine, capability, threads, load, torch, route (of integer products), lowrank."""
    return {name: _FACTS[name]() for name in names}
