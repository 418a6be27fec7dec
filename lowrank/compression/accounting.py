"""What the finished model holds, module by module, against what the original held: the rows of the report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowrank import kernels
from lowrank.calibration.samples import PROVES_NOTHING
from lowrank.compression.formats import DENSE, FORMATS
from lowrank.compression.layer_data import LayerData
from lowrank.compression.options import Options
from lowrank.compression.plan import Plan
from lowrank.compression.report import CompressionReport, LayerRow, sum_rows
from lowrank.compression.trial import Outcome, Trial
from lowrank.io.version import versions
from lowrank.layers import CompressedLayer, DecodedLayer
from lowrank.layers.experts import ExpertsLayer
from lowrank.numerics.linalg import fallback_counts
from lowrank.reporting.points import FrontierPoint
from lowrank.reporting.text import counted, percent
from lowrank.targets.survey import Survey

__all__ = ["TargetBytes", "compression_report", "frontier_point", "layer_rows"]


@dataclass(frozen=True)
class TargetBytes:
    """Say what a model takes beside its targets.

    Attributes:
        before: bytes of the original model.
        rest: bytes of everything that is no target, as it will be stored.
    """

    before: int
    rest: int

    @classmethod
    def of(cls, rows: Sequence[LayerRow], target_bytes: int) -> TargetBytes:
        """Count them from rows in which the targets take so many bytes."""
        return cls(sum(row.bytes_before for row in rows), sum(row.bytes_after for row in rows) - target_bytes)

    @classmethod
    def of_original(cls, survey: Survey, original: nn.Module, layers: Mapping[str, LayerData]) -> TargetBytes:
        """Count them from the model before anything is replaced."""
        dense = sum(FORMATS[DENSE.format].stored_bytes(data, DENSE) for data in layers.values())
        return cls.of(layer_rows(survey, original, layers), dense)

    def ratio(self, plan: Plan) -> float:
        """Give stored bytes after / before of the whole model under a plan."""
        return (self.rest + plan.bytes) / self.before


def layer_rows(
    survey: Survey, compressed: nn.Module, layers: Mapping[str, LayerData], why: Mapping[str, str] | None = None
) -> list[LayerRow]:
    """Make one row for every module that holds weights, sizes counted from the tensors of the two models.

    A tied tensor counts in the row of its first owner and not in the others.

    Args:
        survey: of the original model, whose modules still hold its weights.
        compressed: the finished model, with the same module names.
        layers: by target name, for the errors.
        why: by target name, why it was left as it is.
    """
    reasons = {item.member.name: item.reason for item in survey.skipped}
    known = {member.name: data for data in layers.values() for member in data.target.members}
    before_seen: set[int] = set()
    after_seen: set[int] = set()
    named = {name for member in survey.members for name in member.names}
    rows = []
    for member in survey.members:
        module = compressed.get_submodule(member.name) if member.name else compressed
        before, weights = _own(member.module, before_seen)
        after = sum(_own(part, after_seen)[0] for part in _parts(module, member.name, named))
        data = known.get(member.name)
        row = LayerRow(
            name=member.name,
            kind=type(member.module).__name__,
            shape=tuple(_main_tensor(member.module).shape),
            bytes_before=before,
            bytes_after=after,
            weights=weights,
            bits_per_weight=8 * after / weights if weights else None,
            reason=reasons.get(member.name, "not a target"),
        )
        if isinstance(module, CompressedLayer) and module is not member.module:
            row = replace(
                row,
                spec=module.spec,
                reason=f"taken with {member.name.rpartition('.')[0]}",
            )
        if isinstance(module, CompressedLayer) and data is not None:
            weight_error, activation_error = data.errors_of(module)
            first = data.target.members[0].name
            row = replace(
                row,
                weight_error=weight_error,
                activation_error=activation_error if data.reached else None,
                reason=_how_decoded(module, member.module) if member.name == first else f"tied with {first}",
            )
        elif data is not None and member.name not in reasons:
            row = replace(
                row, weight_error=0.0, activation_error=0.0, reason=(why or {}).get(data.name, "dense in the plan")
            )
        rows.append(row)
    return rows


def _how_decoded(module: nn.Module, original: nn.Module) -> str | None:
    """What is to be said of a layer whose codes are decoded for a forward of its own, which is slower than products on codes."""
    if not isinstance(module, DecodedLayer):
        return None
    kind = type(original)
    base = next((each for each in kind.__mro__ if each.__module__.startswith("torch.nn.modules")), nn.Module)
    if isinstance(module, ExpertsLayer):
        return "a mixture's experts, each decoded in the module's own forward when tokens are routed to it"
    what = f"a subclass of nn.{base.__name__}" if base not in (kind, nn.Module) else "a layer"
    return f"{what} with a forward of its own, for which the weight is decoded on every call"


def _parts(module: nn.Module, name: str, named: Container[str]) -> Iterator[nn.Module]:
    """The module, and those that it has brought along: the projections of attention have no row of their own."""
    yield module
    if isinstance(module, CompressedLayer):
        for inner_name, inner in module.named_modules(prefix=name):
            if inner is not module and inner_name not in named:
                yield inner


def _stored(module: nn.Module) -> Iterator[Tensor]:
    """The tensors that a module itself contributes to the state dict."""
    for parameter in module._parameters.values():
        if parameter is not None and not torch.nn.parameter.is_lazy(parameter):
            yield parameter
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield buffer


def _own(module: nn.Module, seen: set[int]) -> tuple[int, int]:
    """(bytes, elements) of the tensors not counted before."""
    size = count = 0
    for tensor in _stored(module):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            size += tensor.nbytes
            count += tensor.numel()
    return size, count


def _main_tensor(module: nn.Module) -> Tensor:
    """The weight, or the largest tensor where none has that name."""
    weight = module._parameters.get("weight")
    return weight if weight is not None else max(_stored(module), key=Tensor.numel, default=torch.empty(0))


def compression_report(
    rows: list[LayerRow], outcome: Outcome, options: Options, notes: Sequence[str], warnings: Sequence[str] = ()
) -> CompressionReport:
    """Put together rows, the totals that they sum to, and what the reader should know."""
    chosen = outcome.chosen
    verified = chosen.verified or chosen.searched
    totals = sum_rows(rows) | {
        "metric": options.error_metric.label,
        "error_predicted": options.value(chosen.plan.error),
        "error_measured": verified.value,
        "error_upper": verified.upper if math.isfinite(verified.upper) else None,
        "error_budget": options.error_budget,
        "size_budget": options.size_budget,
        "seed": options.seed,
        "versions": versions(),
        "bytes_never_candidates": sum(row.bytes_before for row in rows if not _candidate(row, chosen.plan)),
        "finalists": [
            _trial(item, TargetBytes.of(rows, chosen.plan.bytes), outcome, options) for item in outcome.trials
        ],
    }
    if outcome.passes:
        totals["passes"] = outcome.passes
    told = [*notes, *_beside(rows, outcome, options)]
    loud = list(warnings)
    if verified.comparison is not None:
        totals |= {"samples": verified.samples} | verified.comparison.figures()
        constant = verified.comparison.notes()
        told, loud = [*constant, *told], [*constant, *loud]
    if loud:
        totals["warnings"] = loud
    if verified.comparison is not None:
        totals["confidence"] = None if any(PROVES_NOTHING in text for text in loud) else 0.95
    if chosen.healed is not None:
        healed = chosen.healed.report
        totals["heal"] = {key: value for key, value in healed.to_dict().items() if key != "losses"}
        told.append(
            f"healed: {counted(healed.steps, 'step')} on {counted(healed.samples, 'sample')} took the "
            f"{healed.metric} error on the search part from {healed.error_before:.4g} to {healed.error_after:.4g}"
        )
    counts = fallback_counts()
    if counts:
        told.append(
            "decompositions that needed a fallback: " + ", ".join(f"{name} ({count})" for name, count in counts.items())
        )
    routes = kernels.routes_in_use()
    if routes:
        told.append("integer products by " + ", ".join(sorted(routes)))
    report = CompressionReport(_with_shares(rows, chosen.plan), totals, notes=told)
    report.frontier = _frontier(rows, outcome, options)
    report.check_totals()
    return report


def _beside(rows: Sequence[LayerRow], outcome: Outcome, options: Options) -> list[str]:
    """Say what the next better and the next smaller plan would cost, and how much it took to know."""
    sizes = TargetBytes.of(rows, outcome.chosen.plan.bytes)
    show = options.error_metric.show
    told = [
        f"the next {kind} plan that was measured: {percent(sizes.ratio(item.plan), 4)} of the bytes at "
        f"{show(item.searched.value)} (the one chosen: {percent(sizes.ratio(outcome.chosen.plan), 4)} at "
        f"{show(outcome.chosen.searched.value)}; both on the search part)"
        for kind, item in zip(("better", "smaller"), outcome.neighbours, strict=True)
        if item is not None and sizes.before
    ]
    if outcome.passes:
        spent = ", ".join(f"{count} for {purpose}" for purpose, count in outcome.passes.items())
        told.append(f"the model ran {sum(outcome.passes.values())} times over the search samples: {spent}")
    return told


def _with_shares(rows: Sequence[LayerRow], plan: Plan) -> list[LayerRow]:
    """The rows with each layer's part of the error that the plan predicts."""
    if not 0.0 < plan.error < math.inf:
        return list(rows)
    shares = {entry.name: entry.error / plan.error for entry in plan.entries}
    return [replace(row, error_share=shares.get(row.name)) for row in rows]


def frontier_point(
    plan: Plan, sizes: TargetBytes, error: float, *, label: str, measured: bool, budget: float | None
) -> FrontierPoint:
    """Say what a plan makes of the whole model."""
    formats = tuple(sorted(Counter(entry.format for entry in plan.entries).items()))
    return FrontierPoint(sizes.ratio(plan), error, measured, budget, None, label, formats)


def _frontier(rows: Sequence[LayerRow], outcome: Outcome, options: Options) -> list[FrontierPoint]:
    """Errors on the search part of everything that was measured, and predictions for other budgets."""
    sizes = TargetBytes.of(rows, outcome.chosen.plan.bytes)
    if not sizes.before:
        return []
    points = []
    for item in outcome.trials:
        if math.isfinite(item.searched.value):
            budget = options.error_budget if item is outcome.chosen else None
            value = item.searched.value
            points.append(frontier_point(item.plan, sizes, value, label=item.label, measured=True, budget=budget))
    for budget, plan in outcome.predicted:
        error = options.value(plan.error * outcome.calibration)
        label = f"budget {budget:.3g}"
        points.append(frontier_point(plan, sizes, error, label=label, measured=False, budget=budget))
    return sorted(points, key=lambda item: (item.size_ratio, item.error))


def _candidate(row: LayerRow, plan: Plan) -> bool:
    """Whether a module's bytes were ever to be made fewer."""
    return row.compressed or row.name in {entry.name for entry in plan.entries}


def _trial(item: Trial, sizes: TargetBytes, outcome: Outcome, options: Options) -> dict[str, Any]:
    """One line of what else was tried: sizes of the whole model, errors on the search and verification parts, what became of it."""
    upper = None if item.verified is None else item.verified.upper
    became = "chosen" if item is outcome.chosen else ""
    if upper is not None and not became:
        became = "passed" if options.error_budget is None or upper <= options.error_budget else "failed"
    return {
        "label": item.label,
        "outcome": became,
        "size_ratio": sizes.ratio(item.plan),
        "error_foreseen": None if item.predicted is None else options.value(item.predicted),
        "error_search": item.searched.value,
        "error_measured": item.verified.value if item.verified is not None else None,
        "error_upper": upper if upper is not None and math.isfinite(upper) else None,
    }
