"""What a frontier run depends on and has finished: kept point by point, read back, refused where it is of another run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.analysis.frontier_report import STATE_NAME, FrontierReport, plan_name
from lowrank.calibration.batches import Batch
from lowrank.compression.options import Options
from lowrank.compression.plan import Plan
from lowrank.errors import CheckpointError
from lowrank.io import parse_json, printable, read_bounded
from lowrank.io.version import PACKAGE, __version__
from lowrank.reporting.points import FrontierPoint, points_from_json

__all__ = ["Done", "State", "arguments_of"]

# A state file of 64 points takes 30 kB, a plan of 10,000 layers 3 MB.
MOST_BYTES = 64 << 20


def arguments_of(
    model: nn.Module,
    batches: Sequence[Batch] | None,
    checks: Sequence[Batch] | None,
    budgets: Sequence[float],
    options: Options,
) -> dict[str, Any]:
    """Everything that the points depend on, as plain data."""
    chosen = {
        key: value
        for key, value in vars(options).items()
        # Of a frontier every point is shown, so that the knee of a single plan says nothing.
        if key not in ("progress", "error_budget", "output_fn", "forward_fn", "smallest")
    }
    if options.output_fn is not None:
        chosen["output_fn"] = options.output_fn_name
    plain = {key: list(value) if isinstance(value, (tuple, list)) else value for key, value in chosen.items()}
    return {
        **{key: value for key, value in plain.items() if value is not None},
        "budgets": list(budgets),
        PACKAGE: __version__,
        "model": _digest(sorted(model.state_dict().items())),
        "calibration": None if batches is None else _digest(_batch_items(batches)),
        "validation": None if checks is None else _digest(_batch_items(checks)),
    }


def _batch_items(batches: Sequence[Batch]) -> Iterator[tuple[str, Any]]:
    for batch in batches:
        yield "size", batch.size
        if batch.group:
            yield "group", batch.group
        yield from ((str(index), value) for index, value in enumerate(batch.args))
        yield from sorted(batch.kwargs.items())


def _digest(items: Iterable[tuple[str, Any]]) -> str:
    """SHA-256 of names, dtypes, shapes and numbers."""
    found = hashlib.sha256()
    for name, value in items:
        if isinstance(value, Tensor) and not value.is_meta:
            dense = value.detach().cpu().contiguous()
            found.update(f"{name}\0{dense.dtype}\0{tuple(dense.shape)}\0".encode())
            found.update(dense.flatten().view(torch.uint8).numpy().data if dense.numel() else b"")
        else:
            found.update(f"{name}\0{value!r}\0".encode())
    return found.hexdigest()


@dataclass
class Done:
    """A finished step: its point and plan (None where an earlier step gave the same plan), and the scale after it."""

    step: str
    scale: float
    point: FrontierPoint | None
    plan: Plan | None


class State:
    """What a run has finished, and how it is kept."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        self.done: list[Done] = []
        self.totals: dict[str, Any] = {}
        self.notes: list[str] = []

    def report(self) -> FrontierReport:
        """Give the finished points by size."""
        found = [(item.point, item.plan) for item in self.done if item.point is not None and item.plan is not None]
        found.sort(key=lambda pair: (pair[0].size_ratio, pair[0].error, pair[0].label))
        return FrontierReport([point for point, _ in found], [plan for _, plan in found], self.totals, self.notes)

    def write(self, folder: Path) -> None:
        """Keep what is finished, all at once or not at all."""
        report = self.report()
        steps = [
            {
                "step": item.step,
                "scale": item.scale,
                "point": None if item.point is None else report.points.index(item.point),
            }
            for item in self.done
        ]
        report.save(folder, arguments=self.arguments, steps=steps)

    def read(self, folder: Path) -> None:
        """Take up what an earlier run of the same arguments finished.

        Raises:
            CheckpointError: it had other arguments, or the directory is damaged.
        """
        path = folder / STATE_NAME
        if not path.is_file():
            return
        where = printable(path)
        data = parse_json(read_bounded(path, MOST_BYTES), source=where)
        before = data.get("arguments") if isinstance(data, dict) else None
        if not isinstance(before, dict):
            raise CheckpointError(
                f"{where}: does not say what its points were measured with; overwrite it (--overwrite)"
            )
        self._compare(before, where)
        steps, points = data.get("steps"), points_from_json(data.get("points"), where)
        totals, notes = data.get("totals"), data.get("notes", [])
        known = isinstance(totals, dict) and {"metric", "bytes_before", "samples"} <= totals.keys()
        if not isinstance(steps, list) or not known or not isinstance(notes, list):
            raise CheckpointError(f"{where}: damaged; overwrite it (--overwrite)")
        plans = [
            Plan.from_json(read_bounded(folder / "plans" / plan_name(index), MOST_BYTES), source=plan_name(index))
            for index in range(len(points))
        ]
        for item in steps:
            index = item.get("point") if isinstance(item, dict) else -1
            good = index is None or (type(index) is int and 0 <= index < len(points))
            if not good or not isinstance(item.get("step"), str) or not isinstance(item.get("scale"), float):
                raise CheckpointError(f"{where}: damaged steps; overwrite it (--overwrite)")
            point, plan = (None, None) if index is None else (points[index], plans[index])
            self.done.append(Done(item["step"], item["scale"], point, plan))
        self.totals = data["totals"]
        self.notes = [str(note) for note in notes]

    def _compare(self, before: dict[str, Any], where: str) -> None:
        now = self.arguments
        differing = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        if not differing:
            return
        words = [
            f"another {key}"
            if key in ("model", "calibration", "validation")
            else f"{key} {before.get(key)!r} then, {now.get(key)!r} now"
            for key in differing
        ]
        raise CheckpointError(
            f"{where}: its points were measured with {'; '.join(words)}; give the same again, name another directory, or "
            "overwrite it (--overwrite)"
        )
