"""What the commands print: plans, comparisons and descriptions as text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tabulate import tabulate
from torch import nn

from lowrank.calibration.metrics import sampled_metrics
from lowrank.checkpoint import stored_tensors
from lowrank.compression.plan import Plan
from lowrank.io import printable
from lowrank.reporting.text import human_bytes, percent

__all__ = ["comparison_text", "info_text", "plan_text"]


def plan_text(plan: Plan, model: nn.Module) -> str:
    """Say what a plan would do to the model.

    Example:
        >>> print(plan_text(Plan(()), nn.Linear(4, 4)).splitlines()[-1])
        Nothing was measured and nothing written (--dry-run).
    """
    stored = {tensor.data_ptr(): tensor.nbytes for tensor in stored_tensors(model).values()}
    rows = [
        (
            printable(entry.name),
            entry.kind,
            "x".join(map(str, entry.shape)),
            entry.format,
            entry.rank,
            entry.bits,
            human_bytes(entry.bytes),
        )
        for entry in plan.entries
    ]
    table = tabulate(rows, headers=("layer", "kind", "shape", "format", "rank", "bits", "predicted"), missingval="-")
    now = human_bytes(sum(stored.values()))
    total = f"{human_bytes(plan.bytes)} predicted for these layers; the whole model takes {now} now."
    return f"{table}\n\n{total}\nNothing was measured and nothing written (--dry-run)."


def comparison_text(found: dict[str, dict[str, float]]) -> str:
    """Make a table of what :func:`lowrank.calibration.evaluation.compare_models` found.

    Example:
        >>> error = {"value": 0.05, "low": 0.04, "high": 0.06}
        >>> print(comparison_text({"output_error": error, "samples": {"value": 8.0}}))
        measure         value     95 % interval
        ------------  -------  ----------------
        output error   5.00 %  4.00 % to 6.00 %
        <BLANKLINE>
        over 8 samples
    """
    names: dict[str, tuple[str, Callable[[float], str]]] = {
        "output_error": ("output error", _share),
        "kl": ("KL divergence, nats a token", lambda value: f"{value:.4g}"),
        "top1_agreement": ("top-1 agreement", _share),
        "perplexity_increase": ("increase of the perplexity", _share),
        "perplexity_original": ("perplexity of the original", lambda value: f"{value:.4f}"),
        "perplexity_compressed": ("perplexity of the compressed", lambda value: f"{value:.4f}"),
    }
    for metric in sampled_metrics().values():
        names.setdefault(metric.figure, (metric.title, metric.show))
    rows = []
    for key, (name, show) in names.items():
        if key in found:
            measured = found[key]
            span = f"{show(measured['low'])} to {show(measured['high'])}" if "low" in measured else "-"
            rows.append((name, show(measured["value"]), span))
    headers = ("measure", "value", "95 % interval")
    table = tabulate(rows, headers=headers, colalign=("left", "right", "right"), disable_numparse=True)
    return f"{table}\n\nover {found['samples']['value']:.0f} samples"


def info_text(found: dict[str, Any]) -> str:
    """Say what :func:`lowrank.checkpoint.describe` found, one line a fact."""
    totals = found["totals"] or {}
    rows = [
        ("directory", found["directory"]),
        ("model", found["model_class"]),
        ("layers compressed", found["layers"]),
        ("formats", ", ".join(f"{name} {count}" for name, count in found["formats"].items()) or "none"),
        ("ranks", "-" if found["ranks"] is None else f"{found['ranks'][0]} to {found['ranks'][1]}"),
        ("tensors", f"{found['tensors']}, {human_bytes(found['tensor_bytes'])}"),
        ("files", human_bytes(found["file_bytes"])),
        ("written by", ", ".join(f"{name} {version}" for name, version in found["versions"].items())),
    ]
    if totals.get("size_ratio") is not None:
        rows.insert(3, ("size", f"{percent(totals['size_ratio'], 3)} of {human_bytes(totals.get('bytes_before'))}"))
    errors = (("error_budget", "budget"), ("error_measured", "error measured"), ("error_upper", "error at most"))
    for key, name in errors:
        if totals.get(key) is not None:
            rows.append((name, f"{totals[key]:.4g} ({printable(totals.get('metric'))})"))
    if found.get("certificate") is not None:
        groups = found["certificate"].get("groups")
        told = f"; in each of {', '.join(map(printable, groups))}" if isinstance(groups, dict) and groups else ""
        rows.append(("certificate", f"for these tensors{told}"))
    return tabulate(rows, tablefmt="plain", disable_numparse=True)


def _share(value: float) -> str:
    return percent(value, 3)
