"""A measured frontier: its points, and how they are shown and kept."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowrank.calibration.metrics import METRICS, ErrorMetric, recorded_metric
from lowrank.compression.plan import Plan
from lowrank.io import atomic_directory, write_text
from lowrank.reporting import html
from lowrank.reporting.points import (
    FRONTIER_COLUMNS,
    FrontierPoint,
    frontier_chart,
    lowest,
    points_as_json,
    points_from_json,
    points_table,
    points_texts,
)
from lowrank.reporting.report import Report, Table
from lowrank.reporting.text import human_bytes, one_line, percent, stable_json

__all__ = ["STATE_NAME", "FrontierReport"]

STATE_NAME = "frontier.json"


@dataclass
class FrontierReport(Report):
    """Hold size against error of one model, see :func:`lowrank.measure_frontier`.

    Attributes:
        points: by size; all measured.
        plans: of the points, in their order; to be applied by :func:`lowrank.apply_plan` or ``lowrank compress --plan``.
        totals: ``metric``, ``bytes_before``, ``samples`` (on which the errors were measured), ``source``, ``seed``, ``versions``.
        notes: sentences for the reader.

    Example:
        >>> points = [FrontierPoint(0.25, 0.05, True, label="int8 throughout")]
        >>> report = FrontierReport(points, [Plan(())], {"metric": "output", "bytes_before": 4000, "samples": 64})
        >>> print(report.summary()[0])
        1 point of output error against size, measured on 64 samples that no plan was made from; the original takes 4.00 kB.
        >>> FrontierReport.from_json(report.to_json(), report.plans).points == points
        True
    """

    heading = "Size against error"
    stem = "frontier"
    what = "a frontier"
    rows_key = "points"
    most_width = 140

    points: list[FrontierPoint]
    plans: list[Plan]
    totals: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def metric(self) -> str:
        """Name the error."""
        return one_line(str(self.totals.get("metric") or "error"))

    @property
    def _metric(self) -> ErrorMetric:
        return recorded_metric(self.metric)

    @property
    def _title(self) -> str:
        return self._metric.title if self.metric in METRICS else self.metric

    def summary(self) -> list[str]:
        """Say the frontier in plain sentences."""
        count = f"{len(self.points)} point{'' if len(self.points) == 1 else 's'}"
        samples = self.totals.get("samples")
        where = (
            f"measured on {samples:,} samples that no plan was made from" if samples else "computed from the weights"
        )
        lines = [
            f"{count} of {self._title} against size, {where}; the original takes "
            f"{human_bytes(self.totals.get('bytes_before'))}."
        ]
        show = self._metric.show
        best = [point for point in lowest(self.points) if point.size_ratio < 1.0]
        if best:
            parts = [f"{percent(point.size_ratio, 3)} at {show(point.error)}" for point in best]
            lines.append(f"Smallest size at each error: {', '.join(parts)}.")
        return lines

    def to_json(self, **more: Any) -> str:
        """Render as JSON, the same for the same report: sorted keys, exact floats.

        Args:
            more: further plain data to keep beside it.
        """
        return stable_json({"format_version": self.version, **self._content(), **more})

    @classmethod
    def from_json(cls, text: str | bytes, plans: list[Plan], *, source: str = STATE_NAME) -> FrontierReport:
        """Read :meth:`to_json`'s text back.

        Raises:
            CheckpointError: not such a text.
        """
        data = cls._read(text, source)
        return cls(points_from_json(data["points"], source), plans, data["totals"], data["notes"])

    def files(self, **more: Any) -> dict[str, str]:
        """Render everything that :meth:`save` writes, ``plans/`` apart.

        Args:
            more: for :meth:`to_json`.
        """
        return super().files() | {STATE_NAME: self.to_json(**more)}

    def save(self, directory: str | os.PathLike[str], *, overwrite: bool = True, **more: Any) -> Path:
        """Write ``frontier.json``, ``frontier.md``, ``frontier.html`` and ``plans/``, all at once or not at all.

        Args:
            overwrite: replace a directory that is not empty.
            more: for :meth:`to_json`.

        Raises:
            UsageError, StorageError: the directory cannot be written.
        """
        with atomic_directory(directory, overwrite=overwrite) as partial:
            (partial / "plans").mkdir()
            plans = {f"plans/{plan_name(index)}": plan.to_json() for index, plan in enumerate(self.plans)}
            for name, text in (self.files(**more) | plans).items():
                write_text(partial / name, text)
        return Path(directory)

    def _content(self) -> dict[str, Any]:
        return super()._content() | {"points": points_as_json(self.points)}

    def _tables(self, full: bool) -> list[Table]:
        return [Table(FRONTIER_COLUMNS, points_texts(self.points, self._metric.show), named=False)]

    def _sections(self) -> list[str]:
        show = self._metric.show
        best = [point for point in lowest(self.points) if point.size_ratio < 1.0]
        name = self._title
        tiles = [("Original", human_bytes(self.totals.get("bytes_before")), "stored bytes", "")]
        if best:
            tiles.append(("Smallest", percent(best[0].size_ratio, 3), f"at {show(best[0].error)} {name}", ""))
            tiles.append(("Closest", percent(best[-1].size_ratio, 3), f"at {show(best[-1].error)} {name}", ""))
        tiles.append(("Points", str(len(self.points)), "each a model that was built and run", ""))
        parts = [html.tiles(tiles)]
        if self.points:
            unit = self._metric.unit
            chart = frontier_chart(self.points, show, factor=unit.factor, axis=unit.axis, suffix=unit.suffix)
            parts.append(html.section("The frontier", chart))
        parts.append(html.section("Points", points_table(self.points, show, wide=True)))
        return parts


def plan_name(index: int) -> str:
    """Name the file of the plan of one point, by size.

    Example:
        >>> plan_name(0)
        'plan-01.json'
    """
    return f"plan-{index + 1:02d}.json"
