"""Names of layers that are inside a user's forward while a model is compressed, and have its module's name before and after."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lowrank.calibration.batches import Batches
from lowrank.calibration.groups import read_samples
from lowrank.compression.options import Options
from lowrank.compression.plan import Plan
from lowrank.compression.report import CompressionReport
from lowrank.errors import CheckpointError, UsageError
from lowrank.layers import call_every_layer, compressed_layers
from lowrank.targets.copying import become
from lowrank.targets.lowering import INSIDE, Like, check_like, lower

__all__ = [
    "geometries_of",
    "lowered_for",
    "overrides_inside",
    "plan_inside",
    "plan_outside",
    "put_into",
    "report_outside",
]

Geometries = Mapping[str, Mapping[str, Any]]


def _inside(name: str) -> str:
    return f"{name}.{INSIDE}" if name else INSIDE


def lowered_for(
    model: nn.Module, like: Like, calibration: Iterable[Any] | None, options: Options
) -> tuple[Batches, Options, nn.Module, Geometries]:
    """Take a model apart for compression.

    Args:
        model: the user's; stays as it is.
        like: class -> the class of torch's that it is.
        calibration: on whose first batch that is checked.
        options: checked.

    Returns:
        The calibration batches, the options with names of the copy, the copy, and how to make it again.

    Raises:
        UsageError: no data, or ``fold_batchnorm`` too; and what :func:`lowrank.targets.lowering.lower` raises.
    """
    check_like(like)
    if calibration is None:
        raise UsageError("like: needs calibration batches, on which it is checked what the modules of these classes do")
    if options.fold_batchnorm:
        raise UsageError("like: cannot be combined with fold_batchnorm yet; leave one of the two out")
    batches = read_samples(model, calibration, output_fn=options.output_fn, forward_fn=options.forward_fn)
    working, geometries = lower(model, like, batches[0], options.ignore)
    if not geometries:
        # All of them are ignored, or compute as torch's own.
        return batches, options, model, {}
    return batches, replace(options, overrides=overrides_inside(options.overrides, geometries)), working, geometries


def geometries_of(plan: Plan) -> Geometries:
    """Read from a plan which modules it was made for with the layer inside them; {} where there are none.

    Raises:
        CheckpointError: its metadata says something else.
    """
    found = plan.metadata.get("like", {})
    if not isinstance(found, Mapping) or not all(isinstance(item, Mapping) for item in found.values()):
        raise CheckpointError(f"plan: metadata: like must map layers to their geometry, got {found!r:.80}")
    return found


def plan_inside(plan: Plan, geometries: Geometries) -> Plan:
    """Give a plan with the names of the working copy."""
    entries = tuple(
        replace(entry, name=_inside(entry.name)) if entry.name in geometries else entry for entry in plan.entries
    )
    return replace(plan, entries=entries)


def plan_outside(plan: Plan, geometries: Geometries) -> Plan:
    """Give a plan with the names of the user's model, and what :func:`plan_inside` needs to know."""
    names = {_inside(name): name for name in geometries}
    entries = tuple(replace(entry, name=names.get(entry.name, entry.name)) for entry in plan.entries)
    like = {name: dict(geometry) for name, geometry in geometries.items()}
    return replace(plan, entries=entries, metadata={**plan.metadata, "like": like})


def overrides_inside(overrides: Mapping[str, Any] | None, geometries: Geometries) -> Mapping[str, Any] | None:
    """Give overrides whose globs also reach the layers inside the modules that they match."""
    if not overrides:
        return overrides
    found: dict[str, Any] = {}
    for pattern, wanted in overrides.items():
        inside = [name for name in geometries if fnmatchcase(name, pattern)]
        # A glob such as "*" matches what is inside anyway; one that names the module itself has nothing else to match.
        if not inside or any(character in pattern for character in "*?["):
            found[pattern] = wanted
        found |= {glob.escape(_inside(name)): wanted for name in inside}
    return found


def report_outside(report: CompressionReport, geometries: Geometries, model: nn.Module) -> None:
    """Put the names and classes of the user's model into a report.

    Args:
        report: changed in place.
        geometries: by name of the module.
        model: the user's.
    """
    names = {_inside(name): name for name in geometries}
    rows = []
    for row in report.rows:
        if row.name in names:
            name = names[row.name]
            what = f"in the forward of {type(model.get_submodule(name)).__name__}, which is like nn.{geometries[name]['of']}"
            row = replace(row, name=name, kind=type(model.get_submodule(name)).__name__, reason=row.reason or what)
        rows.append(row)
    report.rows = [replace(row, reason=None if row.reason is None else _told(row.reason, names)) for row in rows]
    report.notes = [_told(note, names) for note in report.notes]
    if report.totals.get("warnings"):
        report.totals["warnings"] = [_told(text, names) for text in report.totals["warnings"]]


def _told(text: str, names: Mapping[str, str]) -> str:
    for inside, name in names.items():
        if name:
            text = re.sub(rf"(?<![\w.]){re.escape(inside)}(?![\w.]*\w)", name.replace("\\", r"\\"), text)
    return text


def put_into(model: nn.Module, finished: nn.Module, *, healed: bool) -> nn.Module:
    """Put the compressed layers of a finished model into the caller's own (``inplace=True``).

    Args:
        healed: its other tensors have moved too.
    """
    for name, layer in compressed_layers(finished).items():
        become(model.get_submodule(name), layer)
    if healed:
        model.load_state_dict(finished.state_dict())
    call_every_layer(model)
    return model
