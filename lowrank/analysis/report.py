"""How compressible a model is, layer by layer: the rows of an analysis, rendered as text, Markdown, JSON and HTML."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lowrank.analysis import page as analysis_page
from lowrank.analysis.rows import SIZES, AnalysisRow
from lowrank.reporting.html import Heading
from lowrank.reporting.text import (
    Column,
    count_text,
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

__all__ = ["AnalysisReport"]

ANALYSIS_FORMAT_VERSION = 1


@dataclass
class AnalysisReport:
    """Rows, totals and notes of :func:`lowrank.analyze_model`.

    Attributes:
        rows: one per layer, also those without a matrix or skipped, with the reason.
        totals: ``layers``, ``analysed``, ``parameters``, ``parameters_analysed``, ``bytes``, ``size_ratio_at_energy``
            (all layers factored at that energy, whole where that is no smaller), ``error_at_size``, ``curve``
            (:func:`size_error_curve`), ``source``, ``energy``, ``versions``.
        notes: sentences for the reader.
    """

    rows: list[AnalysisRow]
    totals: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def summary(self) -> list[str]:
        """The analysis in plain sentences."""
        totals = self.totals
        lines = [
            f"{count_text(totals['analysed'])} of {count_text(totals['layers'])} layers hold a matrix: "
            f"{count_text(totals['parameters_analysed'])} of {count_text(totals['parameters'])} parameters "
            f"({human_bytes(totals['bytes'])} stored)."
        ]
        if not totals["analysed"]:
            return lines
        ratios = totals["size_ratio_at_energy"]
        shares = ", ".join(f"{percent(ratio, 3)} at {percent(float(level))} energy" for level, ratio in ratios.items())
        lines.append(f"Factors alone, without quantisation, would take {shares} of the matrices' bytes.")
        errors = ", ".join(
            f"{percent(error)} at {percent(float(size))}" for size, error in totals["error_at_size"].items()
        )
        lines.append(f"Weight error with the ranks divided best among the layers: {errors} of the bytes.")
        lines.append(f"Verdict: {self.verdict}.")
        return lines

    @property
    def verdict(self) -> str:
        """The model's layers counted by what to do with them."""
        counts: dict[str, int] = {}
        for row in self.rows:
            if row.analysed:
                action = row.verdict.rpartition(": ")[2]
                counts[action] = counts.get(action, 0) + 1
        return ", ".join(f"{action} {count}" for action, count in sorted(counts.items(), key=lambda item: -item[1]))

    @property
    def columns(self) -> tuple[Column, ...]:
        """Headings of the table; those for W Σ^½ only where there was calibration."""
        levels = [_level(level) for level in self.totals["energy"]]
        calibrated = any(row.data_ranks is not None for row in self.rows)
        columns = [
            Column("layer", keep="right", least=26),
            Column("shape"),
            Column("parameters", numeric=True, drop=5),
            *(
                Column(f"r{level}", numeric=True, drop=0 if i == len(levels) - 1 else 7)
                for i, level in enumerate(levels)
            ),
            *(Column(f"r{level} data", numeric=True) for level in levels if calibrated),
            Column("eff.", numeric=True, drop=7),
            *([Column("eff. data", numeric=True, drop=8)] if calibrated else []),
            Column("stable", numeric=True, drop=4),
            Column("num.", numeric=True, drop=2),
            Column("noise", numeric=True, drop=1),
            Column("even", numeric=True, drop=3),
            *(Column(f"err {100 * size:.0f}%", numeric=True, drop=9 if size == 0.5 else 6) for size in SIZES),
            *([Column("err 50% data", numeric=True, drop=10)] if calibrated else []),
            Column("verdict", keep="right", least=30),
        ]
        return tuple(columns)

    def to_text(self, width: int | None = None) -> str:
        """For the terminal: summary, table, notes.

        Args:
            width: characters a line; the terminal's (at least 60, at most 200) when ``None``.
        """
        if width is None:
            width = min(max(shutil.get_terminal_size((140, 24)).columns, 60), 200)
        columns = self.columns
        rows = [self._texts(row, one_line(row.name), columns) for row in self.rows if row.analysed]
        parts = ["\n".join(wrap(line, width) for line in self.summary())]
        parts.append(terminal_table(columns, rows, self._total_texts(), width=width))
        skipped = self._skipped()
        if skipped:
            parts.append("\n".join(wrap(f"not analysed: {line}", width) for line in skipped))
        parts.append(wrap(self._legend(), width))
        if self.notes:
            parts.append("\n".join(wrap(f"note: {one_line(note)}", width) for note in self.notes))
        return "\n\n".join(parts) + "\n"

    def to_markdown(self) -> str:
        """The same with full names and a line for every skipped layer."""
        body = []
        columns = self.columns
        for row in self.rows:
            texts = [text.replace("|", "\\|").replace("<", "&lt;") for text in self._texts(row, "", columns)]
            body.append([markdown_name(one_line(row.name)), *texts[1:]])
        total = [f"**{text}**" if text else "" for text in self._total_texts()]
        lines = ["# Low-rank analysis", "", *(f"{line}  " for line in self.summary()), ""]
        lines += [markdown_table(columns, [*body, total]), "", self._legend()]
        lines += ["", *(f"- {one_line(note).replace('<', '&lt;')}" for note in self.notes)] if self.notes else []
        return "\n".join(lines) + "\n"

    def to_json(self) -> str:
        """Deterministic: sorted keys, exact floats, NaN and infinities as null."""
        return stable_json(
            {
                "format_version": ANALYSIS_FORMAT_VERSION,
                "rows": [asdict(row) for row in self.rows],
                "totals": self.totals,
                "notes": self.notes,
            }
        )

    def to_html(self) -> str:
        """One self-contained page: tiles, the model's size-error curve, spectra, effective rank by depth, the table."""
        columns = self.columns
        # The verdict beside the name, where a narrow screen still shows it.
        order = [0, len(columns) - 1, *range(1, len(columns) - 1)]
        total = self._total_texts()
        cells = [self._texts(row, one_line(row.name), columns) for row in self.rows]
        return analysis_page.render(
            self.rows,
            self.totals,
            self.notes,
            summary=self.summary(),
            headings=[Heading(columns[i].title, columns[i].numeric, columns[i].title == "verdict") for i in order],
            cells=[[texts[i] for i in order] for texts in cells],
            total=[total[i] for i in order],
            key=self._legend(),
        )

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write ``analysis.json``, ``analysis.md`` and ``analysis.html``.

        Raises:
            StorageError: the directory cannot be written.
        """
        files = {"analysis.json": self.to_json(), "analysis.md": self.to_markdown(), "analysis.html": self.to_html()}
        return write_files(directory, files)

    def _texts(self, row: AnalysisRow, name: str, columns: Sequence[Column]) -> list[str]:
        shape = "x".join(map(str, row.shape))
        first = [name or "(the model itself)", shape, count_text(row.parameters)]
        if not row.analysed:
            return [*first, *([""] * (len(columns) - 4)), one_line(row.reason or "")]
        levels = [str(level) for level in self.totals["energy"]]
        calibrated = any(column.title == "eff. data" for column in columns)
        cells = [str((row.ranks or {})[level]) for level in levels]
        if calibrated:
            cells += [str(row.data_ranks[level]) if row.data_ranks else "" for level in levels]
        cells.append(count_text(row.effective_rank))
        if calibrated:
            cells.append("" if row.data_effective_rank is None else count_text(row.data_effective_rank))
        cells += [
            count_text(row.stable_rank),
            str(row.numerical_rank),
            str(row.noise_rank),
            count_text(row.break_even_rank),
        ]
        cells += [percent((row.errors or {})[str(size)]) for size in SIZES]
        if calibrated:
            cells.append(percent(row.data_errors["0.5"]) if row.data_errors else "")
        return [*first, *cells, row.verdict]

    def _total_texts(self) -> list[str]:
        texts = [""] * len(self.columns)
        texts[0] = f"{count_text(self.totals['layers'])} layers"
        texts[2] = count_text(self.totals["parameters"])
        errors = self.totals.get("error_at_size", {})
        for index, column in enumerate(self.columns):
            for size in SIZES:
                if column.title == f"err {100 * size:.0f}%" and str(size) in errors:
                    texts[index] = percent(errors[str(size)])
        return texts

    def _legend(self) -> str:
        levels = "/".join(f"r{_level(level)}" for level in self.totals["energy"])
        data = (
            "; data: of the weight in the metric of the calibration inputs"
            if any(r.data_ranks for r in self.rows)
            else ""
        )
        return (
            f"{levels}: singular values that hold so many per cent of the energy; eff., stable, num., noise: "
            "effective, stable, numerical and noise rank; even: rank from which factors are no smaller; err 25/50/75%: "
            "relative error of the best factors in that share of the bytes (totals: ranks divided best among the "
            f"layers){data}."
        )

    def _skipped(self) -> list[str]:
        names: dict[str, list[str]] = {}
        for row in self.rows:
            if not row.analysed:
                names.setdefault(one_line(row.reason or ""), []).append(one_line(row.name))
        return [
            f"{reason}: {', '.join(group[:3])}{f' and {len(group) - 3} more' if len(group) > 3 else ''}"
            for reason, group in names.items()
        ]


def _level(level: float | str) -> str:
    return f"{100 * float(level):g}"
