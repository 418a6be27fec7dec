"""What compression did, layer by layer: rows and totals that add up, as terminal text, Markdown, JSON, HTML."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lowrank.calibration.metrics import recorded_metric
from lowrank.compression import page as report_page
from lowrank.compression.rows import (
    COLUMNS,
    FINALIST_COLUMNS,
    LayerRow,
    finalist_texts,
    row_from_json,
    row_texts,
    same_total,
    sum_rows,
    total_texts,
)
from lowrank.errors import CheckpointError, LowRankError
from lowrank.io import parse_json
from lowrank.reporting.points import FrontierPoint, points_as_json, points_from_json
from lowrank.reporting.text import (
    human_bytes,
    markdown_name,
    markdown_table,
    one_line,
    percent,
    stable_json,
    terminal_table,
    wrap,
    write_files,
)

__all__ = ["CompressionReport", "LayerRow", "sum_rows"]

REPORT_FORMAT_VERSION = 1


@dataclass
class CompressionReport:
    """Rows, totals, notes and, kept apart because it differs from run to run, ``run``.

    Attributes:
        rows: one per module that holds weights, also the skipped.
        totals: see :func:`sum_rows`, and ``metric``, ``error_predicted``, ``error_measured``, ``error_upper`` (95 %),
            ``error_budget``, ``size_budget``, ``source``, ``versions``, ``seed`` where they are known.
        run: seconds and peak memory per stage, host; written to ``run.json`` alone.
        notes: sentences for the reader.
        frontier: what other budgets would have given, by size; measured or predicted.

    Example:
        >>> rows = [LayerRow("a", "Linear", (4, 4), "int8", bits=8, bytes_before=64, bytes_after=32, weights=16)]
        >>> report = CompressionReport(rows, sum_rows(rows) | {"metric": "weight", "error_measured": 0.004})
        >>> report.check_totals()
        >>> print(report.summary()[0])
        50.0 % of the original size (64 B -> 32 B, 16.0 bits a weight), weight error 0.40 % measured.
        >>> CompressionReport.from_json(report.to_json()).rows == rows
        True
    """

    rows: list[LayerRow]
    totals: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    frontier: list[FrontierPoint] = field(default_factory=list)

    @property
    def answer(self) -> str:
        """Which formats won, in words.

        ``"int8, no low rank"`` where every compressed layer is plain int8.
        """
        formats = Counter(row.format for row in self.rows if row.format != "dense")
        if not formats:
            return "nothing was compressed"
        if set(formats) == {"int8"}:
            return "int8, no low rank"
        parts = [f"{name} in {number} layer{'s' if number > 1 else ''}" for name, number in sorted(formats.items())]
        return ", ".join(parts)

    def check_totals(self) -> None:
        """Verify that the rows sum to the totals.

        Raises:
            LowRankError: a total differs from the sum of its rows, or a row's bits per weight from its bytes.
        """
        sums = sum_rows(self.rows)
        for key, expected in sums.items():
            if key not in self.totals:
                raise LowRankError(
                    f"report: totals lack {key!r}, which the rows give as {expected}; start from sum_rows(rows)"
                )
            value = self.totals[key]
            if not same_total(value, expected):
                raise LowRankError(f"report: totals[{key!r}] is {value}, the rows sum to {expected}")
        for row in self.rows:
            if row.bits_per_weight is None or not row.weights:
                continue
            bits = 8 * row.bytes_after / row.weights
            if not same_total(row.bits_per_weight, bits):
                raise LowRankError(
                    f"report: {one_line(row.name)}: {row.bits_per_weight} bits per weight stated, "
                    f"{row.bytes_after} bytes for {row.weights} weights give {bits}"
                )

    def summary(self) -> list[str]:
        """The report in plain sentences: size and error, which formats, how the bytes are used, what was skipped."""
        totals = self.totals
        size = (
            f"{percent(totals.get('size_ratio'), 3)} of the original size "
            f"({human_bytes(totals.get('bytes_before'))} -> {human_bytes(totals.get('bytes_after'))}"
        )
        if totals.get("bits_per_weight") is not None:
            size += f", {totals['bits_per_weight']:.1f} bits a weight"
        parts = [size + ")", *self._error_phrases()]
        if totals.get("size_budget") is not None:
            parts.append(f"size budget {percent(totals['size_budget'], 3)}")
        lines = [", ".join(parts) + "."]
        lines.append(f"Answer: {self.answer}.")
        after = totals.get("bytes_after") or 0
        if after:
            shares = [
                f"{human_bytes(totals.get(key, 0))} in {words}"
                for key, words in (
                    ("bytes_integer", "integer products"),
                    ("bytes_weight_only", "weight-only int8"),
                    ("bytes_dense", "floating point"),
                )
            ]
            lines.append(f"Of the bytes: {', '.join(shares)}.")
        dense = [row for row in self.rows if row.format == "dense"]
        if dense:
            count = f"{len(dense)} of {len(self.rows)} modules"
            size_text = human_bytes(sum(row.bytes_after for row in dense))
            lines.append(f"{count} stay as they were ({size_text}); the table says why.")
        return lines

    def _error_phrases(self) -> list[str]:
        totals, metric = self.totals, one_line(str(self.totals.get("metric") or "error"))
        known = recorded_metric(metric)
        name, show = metric if metric == "error" else known.title, known.show
        phrases = []
        if totals.get("error_measured") is not None:
            phrases.append(f"{name} {show(totals['error_measured'])} measured")
        elif totals.get("error_predicted") is not None:
            phrases.append(f"{name} {show(totals['error_predicted'])} predicted, not measured")
        if totals.get("error_upper") is not None and totals.get("error_upper") != totals.get("error_measured"):
            phrases.append(f"at most {show(totals['error_upper'])} with 95 % confidence")
        if totals.get("error_budget") is not None:
            phrases.append(f"budget {show(totals['error_budget'])}")
        return phrases

    def to_text(self, width: int | None = None) -> str:
        """For the terminal: summary, table, notes; names shortened from the left to fit.

        Args:
            width: characters a line; the terminal's (at least 60, at most 160) when ``None``.
        """
        if width is None:
            width = min(max(shutil.get_terminal_size((120, 24)).columns, 60), 160)
        body = [row_texts(row, one_line(row.name)) for row in self.rows]
        summary = "\n".join(wrap(line, width) for line in self.summary())
        parts = [summary, terminal_table(COLUMNS, body, total_texts(self.rows), width=width)]
        tried = self._finalists()
        if tried:
            parts.append("Plans that were measured:\n" + terminal_table(FINALIST_COLUMNS, tried, width=width))
        if self.notes:
            parts.append("\n".join(wrap(f"note: {one_line(note)}", width) for note in self.notes))
        return "\n\n".join(parts) + "\n"

    def to_markdown(self) -> str:
        """The same with full names, for ``report.md``."""
        body = []
        for row in self.rows:
            texts = [text.replace("|", "\\|").replace("<", "&lt;") for text in row_texts(row, "")]
            body.append([markdown_name(one_line(row.name)), *texts[1:]])
        total = [f"**{text}**" if text else "" for text in total_texts(self.rows)]
        lines = ["# Compression report", "", *(f"{line}  " for line in self.summary()), ""]
        lines.append(markdown_table(COLUMNS, [*body, total]))
        tried = self._finalists()
        if tried:
            safe = [[text.replace("|", "\\|").replace("<", "&lt;") for text in row] for row in tried]
            lines += ["", "## Plans that were measured", "", markdown_table(FINALIST_COLUMNS, safe)]
        if self.notes:
            lines += ["", *(f"- {one_line(note).replace('<', '&lt;')}" for note in self.notes)]
        return "\n".join(lines) + "\n"

    def to_json(self) -> str:
        """Deterministic: sorted keys, exact floats, NaN and infinities as null, nothing of ``run``."""
        return stable_json(
            {
                "format_version": REPORT_FORMAT_VERSION,
                "rows": [asdict(row) for row in self.rows],
                "totals": self.totals,
                "notes": self.notes,
                "frontier": points_as_json(self.frontier),
            }
        )

    @classmethod
    def from_json(cls, text: str | bytes, *, source: str = "report.json") -> CompressionReport:
        """Read :meth:`to_json`'s text back; ``run`` is empty.

        Raises:
            CheckpointError: not such a text.
        """
        data = parse_json(text, source=source)
        if (
            not isinstance(data, dict)
            or not isinstance(data.get("rows"), list)
            or not isinstance(data.get("totals"), dict)
        ):
            raise CheckpointError(f"{source}: not a compression report; it must hold 'rows' and 'totals'")
        if data.get("format_version") != REPORT_FORMAT_VERSION:
            raise CheckpointError(
                f"{source}: format_version {data.get('format_version')!r}, this lowrank reads {REPORT_FORMAT_VERSION}; "
                "it may be written by a newer lowrank"
            )
        notes = data.get("notes", [])
        if not isinstance(notes, list):
            raise CheckpointError(f"{source}: 'notes' must be a list of texts")
        return cls(
            [row_from_json(item, source) for item in data["rows"]],
            data["totals"],
            {},
            [str(note) for note in notes],
            points_from_json(data.get("frontier", []), source),
        )

    def to_html(self) -> str:
        """One self-contained page: tiles, budget bar, frontier, where the bytes are and the error comes from, the sortable
        table with bars, notes."""
        return report_page.render(self.rows, self.totals, self.notes, self.summary(), self.answer, self.frontier)

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write ``report.json``, ``report.md``, ``report.html`` and ``run.json``.

        Raises:
            StorageError: the directory cannot be written.
        """
        return write_files(
            directory,
            {
                "report.json": self.to_json(),
                "report.md": self.to_markdown(),
                "report.html": self.to_html(),
                "run.json": stable_json(self.run),
            },
        )

    def _finalists(self) -> list[list[str]]:
        return finalist_texts(self.totals, recorded_metric(str(self.totals.get("metric"))).show)
