"""What was proved of a compressed model, on which data, for which tensors: small, plain, and the same for the same run."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowrank import checkpoint, kernels
from lowrank.calibration.batches import Batch, Split
from lowrank.calibration.groups import groups_of
from lowrank.calibration.metrics import CallableMetric, SampledMetric
from lowrank.calibration.samples import data_digest
from lowrank.checkpoint.manifest import certified_digest
from lowrank.compression.options import Options
from lowrank.compression.plan import Plan
from lowrank.io.digests import ALGORITHM, tensor_digest

__all__ = ["certificate_of", "plan_digest", "processor_flags", "signed_for"]

CERTIFICATE_VERSION = 1
# Of the processor's flags those on which products, and with them the last bits of a measured error, depend.
_FAMILIES = ("avx", "amx", "fma", "sse4", "f16c", "asimd", "sve", "i8mm", "bf16")
_CPU_INFO = Path("/proc/cpuinfo")


def certificate_of(totals: Mapping[str, Any], options: Options, plan: Plan, split: Split | None) -> dict[str, Any]:
    """State a promise as plain JSON: what was promised, what was measured, how, and on which samples.

    Args:
        totals: of the report.
        options: of the run, checked.
        plan: of the model.
        split: of the samples; ``None`` where none were used.

    Returns:
        ``version``, ``metric``, ``budget``, ``size_budget``, ``measured``, ``upper`` (the bound), ``confidence`` (``None`` where the bound
        needs no statistics, or is none), ``method``, ``samples``, ``groups`` (by name: samples, measured, upper), ``outputs``, ``seed``,
        ``plan`` (the digest of ``plan.json``), ``data`` (digests of what the model reads in each part, of a group's own under
        ``verification``; ``None`` for objects without content), ``versions``, ``processor``. :func:`signed_for` adds ``tensors``.
    """
    metric = options.error_metric
    sampled = isinstance(metric, SampledMetric)
    return {
        "version": CERTIFICATE_VERSION,
        "metric": totals["metric"],
        "budget": options.error_budget,
        "size_budget": options.size_budget,
        "measured": totals["error_measured"],
        "upper": totals["error_upper"],
        "confidence": totals.get("confidence") if sampled else None,
        "method": _method(options),
        "samples": totals.get("samples", 0),
        "groups": {
            name: {"samples": item["samples"], "measured": item["error"], "upper": item["upper"]}
            for name, item in totals.get("groups", {}).items()
        },
        "outputs": {
            name: {"measured": item["error"], "upper": item["upper"]}
            for name, item in totals.get("outputs", {}).items()
        },
        "seed": options.seed,
        "algorithm": ALGORITHM,
        "plan": plan_digest(plan),
        "data": {} if split is None else _data(split),
        "versions": {**totals["versions"], "python": platform.python_version()},
        "processor": {
            "machine": platform.machine(),
            "flags": processor_flags(),
            "route": kernels.route(),
            "threads": torch.get_num_threads(),
        },
    }


def plan_digest(plan: Plan) -> str:
    """Digest a plan as ``plan.json`` holds it.

    Example:
        >>> len(plan_digest(Plan(())))
        64
    """
    return hashlib.new(ALGORITHM, plan.to_json().encode()).hexdigest()


def signed_for(certificate: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Give the certificate with a digest of the tensors that it is for, as they are saved.

    Example:
        >>> signed_for({}, nn.Linear(2, 2)) == signed_for({}, nn.Linear(2, 2))
        False
    """
    digests = {name: tensor_digest(tensor) for name, tensor in checkpoint.stored_tensors(model).items()}
    return {**certificate, "tensors": certified_digest(digests)}


def _method(options: Options) -> str:
    metric = options.error_metric
    if isinstance(metric, CallableMetric):
        return "the callable's own value on the finished model; no statistics"
    if not isinstance(metric, SampledMetric):
        return "computed from the weights; no statistics"
    return (
        "one-sided 95 % test of the finished model on samples that chose nothing (Fieller bound by the t distribution), for every output "
        "and group, all of which pass (intersection-union); plans in a fixed sequence from safe to small, up to the first that fails"
    )


def _data(split: Split) -> dict[str, Any]:
    return {
        "statistics": data_digest(split.statistics),
        "search": data_digest(split.search),
        "verification": _by_group(split.verification),
    }


def _by_group(batches: Sequence[Batch]) -> Any:
    found = {group: data_digest(own) for group, own in groups_of(batches).items()}
    return found.get("") if set(found) <= {""} else found


def processor_flags() -> list[str]:
    """List the processor's flags for wide arithmetic, as Linux names them; elsewhere what torch makes of them.

    Example:
        >>> processor_flags() == sorted(processor_flags())
        True
    """
    if not _CPU_INFO.is_file():
        return [str(torch.backends.cpu.get_cpu_capability()).lower()]
    lines = _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    flags = next(
        (line.partition(":")[2].split() for line in lines if line.lower().startswith(("flags", "features"))), []
    )
    return sorted(flag for flag in set(flags) if flag.startswith(_FAMILIES))
