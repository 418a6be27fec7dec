"""Measuring time so that comparisons mean something: interleaved rounds, medians and quartiles, the host named."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowrank.kernels import route

__all__ = ["Spread", "host_facts", "interleaved", "seconds_of", "spread"]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    lower_quartile: float
    upper_quartile: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of at least one value.

    Example:
        >>> spread([3.0, 1.0, 2.0])
        Spread(median=2.0, lower_quartile=1.5, upper_quartile=2.5)
    """
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(middle, low, high)


def seconds_of(call: Callable[[], Any], at_least: float) -> float:
    """Mean seconds of a call, over as many as fill ``at_least`` seconds; never zero.

    Example:
        >>> seconds_of(lambda: None, 0.001) > 0.0
        True
    """
    count, start = 0, time.perf_counter()
    while True:
        call()
        count += 1
        spent = time.perf_counter() - start
        if spent >= at_least and spent > 0.0:
            return spent / count


def interleaved(calls: Mapping[str, Callable[[], Any]], rounds: int, at_least: float) -> dict[str, list[float]]:
    """Measure the seconds of each call in each round; within a round one after the other, every other round backwards.

    What slows the machine for a while slows all of them, so ratios within a round stand.

    Args:
        calls: what to time, by name; each is called once before, unmeasured.
        rounds: 1 or more.
        at_least: seconds for which a call is repeated in a round.

    Example:
        >>> found = interleaved({"a": lambda: None, "b": lambda: None}, 2, 0.0)
        >>> {name: len(values) for name, values in found.items()}
        {'a': 2, 'b': 2}
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    names = list(calls)
    for index in range(rounds):
        for name in names if index % 2 == 0 else reversed(names):
            found[name].append(seconds_of(calls[name], at_least))
    return found


def host_facts() -> dict[str, Any]:
    """Say what timings depend on: processor, threads, instruction set, route of the integer products, torch.

    Example:
        >>> sorted(host_facts())
        ['capability', 'cpu', 'isa_limit', 'route', 'threads', 'torch']
    """
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "isa_limit": os.environ.get("ONEDNN_MAX_CPU_ISA", "none"),
        "route": route(),
        "torch": torch.__version__,
    }
