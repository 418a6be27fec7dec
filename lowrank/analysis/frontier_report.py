"""A measured frontier: its points, and how they are shown and kept."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowrank.calibration.metrics import METRICS, ErrorMetric, recorded_metric
from lowrank.compression.plan import Plan
from lowrank.errors import CheckpointError
from lowrank.io import atomic_directory, parse_json, write_text
from lowrank.reporting import html as report_html
from lowrank.reporting.html import Cell, Heading
from lowrank.reporting.points import (
    FRONTIER_COLUMNS,
    FrontierPoint,
    frontier_chart,
    lowest,
    points_as_json,
    points_from_json,
    points_texts,
)
from lowrank.reporting.text import (
    human_bytes,
    markdown_table,
    one_line,
    percent,
    stable_json,
    terminal_table,
    wrap,
)

__all__ = ["STATE_NAME", "FrontierReport"]

STATE_NAME = "frontier.json"
FORMAT_VERSION = 1


@dataclass
class FrontierReport:
    """Size against error of one model, see :func:`lowrank.measure_frontier`.

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

    points: list[FrontierPoint]
    plans: list[Plan]
    totals: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def metric(self) -> str:
        """The name of the error."""
        return one_line(str(self.totals.get("metric") or "error"))

    @property
    def _metric(self) -> ErrorMetric:
        return recorded_metric(self.metric)

    @property
    def _title(self) -> str:
        return self._metric.title if self.metric in METRICS else self.metric

    def summary(self) -> list[str]:
        """The frontier in plain sentences."""
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

    def to_text(self, width: int | None = None) -> str:
        """For the terminal: summary, table, notes.

        Args:
            width: characters a line; the terminal's (at least 60, at most 140) when ``None``.
        """
        if width is None:
            width = min(max(shutil.get_terminal_size((120, 24)).columns, 60), 140)
        rows = points_texts(self.points, self._metric.show)
        parts = ["\n".join(wrap(line, width) for line in self.summary())]
        parts.append(terminal_table(FRONTIER_COLUMNS, rows, width=width))
        if self.notes:
            parts.append("\n".join(wrap(f"note: {one_line(note)}", width) for note in self.notes))
        return "\n\n".join(parts) + "\n"

    def to_markdown(self) -> str:
        """The same as Markdown."""
        rows = points_texts(self.points, self._metric.show)
        safe = [[text.replace("|", "\\|").replace("<", "&lt;") for text in row] for row in rows]
        lines = ["# Size against error", "", *(f"{line}  " for line in self.summary()), ""]
        lines.append(markdown_table(FRONTIER_COLUMNS, safe))
        lines += ["", *(f"- {one_line(note).replace('<', '&lt;')}" for note in self.notes)] if self.notes else []
        return "\n".join(lines) + "\n"

    def to_json(self, **more: Any) -> str:
        """Deterministic: sorted keys, exact floats.

        Args:
            more: further plain data to keep beside it.
        """
        return stable_json(
            {
                "format_version": FORMAT_VERSION,
                "points": points_as_json(self.points),
                "totals": self.totals,
                "notes": self.notes,
                **more,
            }
        )

    @classmethod
    def from_json(cls, text: str | bytes, plans: list[Plan], *, source: str = STATE_NAME) -> FrontierReport:
        """Read :meth:`to_json`'s text back.

        Raises:
            CheckpointError: not such a text.
        """
        data = parse_json(text, source=source)
        if not isinstance(data, dict) or not isinstance(data.get("totals"), dict):
            raise CheckpointError(f"{source}: not a frontier; it must hold 'points' and 'totals'")
        if data.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{source}: format_version {data.get('format_version')!r}, this lowrank reads {FORMAT_VERSION}; "
                "it may be written by a newer lowrank"
            )
        notes = data.get("notes", [])
        if not isinstance(notes, list):
            raise CheckpointError(f"{source}: 'notes' must be a list of texts")
        return cls(points_from_json(data.get("points"), source), plans, data["totals"], [str(note) for note in notes])

    def to_html(self) -> str:
        """One self-contained page: tiles, the chart, the table."""
        show = self._metric.show
        best = [point for point in lowest(self.points) if point.size_ratio < 1.0]
        name = self._title
        tiles = [("Original", human_bytes(self.totals.get("bytes_before")), "stored bytes", "")]
        if best:
            tiles.append(("Smallest", percent(best[0].size_ratio, 3), f"at {show(best[0].error)} {name}", ""))
            tiles.append(("Closest", percent(best[-1].size_ratio, 3), f"at {show(best[-1].error)} {name}", ""))
        tiles.append(("Points", str(len(self.points)), "each a model that was built and run", ""))
        headings = [Heading(column.title, column.numeric, column.title == "formats") for column in FRONTIER_COLUMNS]
        cells = [
            [
                Cell(text, sort)
                for text, sort in zip(
                    texts, (None, point.budget, point.size_ratio, point.error, point.upper, None), strict=True
                )
            ]
            for point, texts in zip(self.points, points_texts(self.points, show), strict=True)
        ]
        parts = [report_html.tiles(tiles)]
        if self.points:
            unit = self._metric.unit
            chart = frontier_chart(self.points, show, factor=unit.factor, axis=unit.axis, suffix=unit.suffix)
            parts.append(report_html.section("The frontier", chart))
        parts.append(report_html.section("Points", report_html.table(headings, cells)))
        if self.notes:
            parts.append(report_html.section("Notes", report_html.notes_list(self.notes)))
        source, versions = self.totals.get("source"), self.totals.get("versions") or {}
        title = f"Size against error: {one_line(str(source))}" if source else "Size against error"
        footer = ", ".join(f"{key} {value}" for key, value in sorted(versions.items()))
        return report_html.page(title, self.summary(), parts, footer=footer)

    def save(self, directory: str | os.PathLike[str], *, overwrite: bool = True, **more: Any) -> Path:
        """Write ``frontier.json``, ``frontier.md``, ``frontier.html`` and ``plans/``, all at once or not at all.

        Args:
            overwrite: replace a directory that is not empty.
            more: for :meth:`to_json`.

        Raises:
            UsageError, StorageError: the directory cannot be written.
        """
        with atomic_directory(directory, overwrite=overwrite) as partial:
            write_text(partial / STATE_NAME, self.to_json(**more))
            write_text(partial / "frontier.md", self.to_markdown())
            write_text(partial / "frontier.html", self.to_html())
            (partial / "plans").mkdir()
            for index, plan in enumerate(self.plans):
                write_text(partial / "plans" / plan_name(index), plan.to_json())
        return Path(directory)


def plan_name(index: int) -> str:
    """The file of the plan of one point, by size.

    Example:
        >>> plan_name(0)
        'plan-01.json'
    """
    return f"plan-{index + 1:02d}.json"
