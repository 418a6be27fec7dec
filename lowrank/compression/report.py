"""What compression did, layer by layer: rows and totals that add up, as terminal text, Markdown, JSON, HTML."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from lowrank.calibration.metrics import recorded_metric
from lowrank.compression import page
from lowrank.compression.formats import is_plain_rounding
from lowrank.compression.rows import (
    ARITHMETICS,
    COLUMNS,
    GROUP_COLUMNS,
    TRIAL_COLUMNS,
    LayerRow,
    group_texts,
    row_from_json,
    row_texts,
    same_total,
    sum_rows,
    total_texts,
    trial_texts,
)
from lowrank.errors import LowRankError
from lowrank.reporting import html
from lowrank.reporting.points import FrontierPoint, points_as_json, points_from_json
from lowrank.reporting.report import Report, Table
from lowrank.reporting.text import counted, human_bytes, one_line, percent, stable_json

__all__ = ["CompressionReport", "LayerRow", "sum_rows"]

# Characters of a remark in a terminal's table; longer ones stand in full under it.
WIDEST_REMARK = 24


@dataclass
class CompressionReport(Report):
    """Hold rows, totals, notes and, kept apart because it differs from run to run, ``run``.

    Attributes:
        rows: one per module that holds weights, also the skipped.
        totals: see :func:`sum_rows`, and ``metric``, ``error_predicted``, ``error_measured``, ``error_upper`` (95 %),
            ``error_budget``, ``size_budget``, ``source``, ``versions``, ``seed`` where they are known.
        run: seconds and peak memory per stage, host; written to ``run.json`` alone.
        notes: sentences for the reader.
        frontier: what other budgets would have given, by size; measured or predicted.

    Example:
        >>> from lowrank.layers.spec import LayerSpec
        >>> spec = LayerSpec("int8", bits=8, activations="int8")
        >>> rows = [LayerRow("a", "Linear", (4, 4), spec, bytes_before=64, bytes_after=32, weights=16)]
        >>> report = CompressionReport(rows, sum_rows(rows) | {"metric": "weight", "error_measured": 0.004})
        >>> report.check_totals()
        >>> print(report.summary()[0])
        50.0 % of the original size (64 B -> 32 B, 16.0 bits a weight), weight error 0.40 % measured.
        >>> CompressionReport.from_json(report.to_json()).rows == rows
        True
    """

    heading = "Compression report"
    stem = "report"
    what = "a compression report"

    rows: list[LayerRow]
    totals: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    frontier: list[FrontierPoint] = field(default_factory=list)

    @property
    def answer(self) -> str:
        """Say in words which formats won.

        ``"int8, no low rank"`` where every compressed layer is plain int8.
        """
        formats = Counter(row.format for row in self.rows if row.compressed)
        if not formats:
            return "nothing was compressed"
        first, *others = formats
        if not others and is_plain_rounding(first):
            return f"{first}, no low rank"
        parts = [f"{name} in {counted(number, 'layer')}" for name, number in sorted(formats.items())]
        return ", ".join(parts)

    @property
    def reached(self) -> float | None:
        """Give the share of the original bytes in modules that could have become smaller; ``None`` where the report does not say.

        What is no target (and why, its row says) is not within reach.
        """
        never, before = self.totals.get("bytes_never_candidates"), self.totals.get("bytes_before")
        return None if never is None or not before else 1.0 - float(never) / float(before)

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
        """Say the report in plain sentences: size and error, which formats, how the bytes are used, what was skipped."""
        totals = self.totals
        size = (
            f"{percent(totals.get('size_ratio'), 3)} of the original size "
            f"({human_bytes(totals.get('bytes_before'))} -> {human_bytes(totals.get('bytes_after'))}"
        )
        if totals.get("bits_per_weight") is not None:
            size += f", {totals['bits_per_weight']:.1f} bits a weight"
        reached = self.reached
        if reached is not None:
            size += f"; {percent(reached, 3)} of the weights were within reach"
        parts = [size + ")", *self._error_phrases()]
        if totals.get("size_budget") is not None:
            parts.append(f"size budget {percent(totals['size_budget'], 3)}")
        lines = [", ".join(parts) + ".", *self._samples_lines()]
        lines.append(f"Answer: {self.answer}.")
        after = totals.get("bytes_after") or 0
        if after:
            shares = [f"{human_bytes(totals.get(each.key, 0))} in {each.words}" for each in ARITHMETICS]
            lines.append(f"Of the bytes: {', '.join(shares)}.")
        left = [row for row in self.rows if not row.compressed]
        if left:
            count = f"{len(left)} of {counted(len(self.rows), 'module')}"
            size_text = human_bytes(sum(row.bytes_after for row in left))
            never = totals.get("bytes_never_candidates")
            told = "" if never is None else f", of which {human_bytes(never)} were never candidates"
            lines.append(
                f"{count} stay{'s' if len(left) == 1 else ''} as before ({size_text}{told}); the table says why."
            )
        lines += [f"Attention: {one_line(str(text))}." for text in totals.get("warnings") or ()]
        return lines

    def _samples_lines(self) -> list[str]:
        """What single samples lose, and how many outputs were measured."""
        totals, lines = self.totals, []
        show = recorded_metric(str(totals.get("metric"))).show
        outputs = totals.get("outputs") or {}
        groups = totals.get("groups") or {}
        if groups and totals.get("error_budget") is not None:
            few = "one group" if len(groups) == 1 else f"each of {len(groups)} groups by itself"
            lines.append(f"The budget holds in {few}: {', '.join(map(one_line, groups))}.")
        if len(outputs) > 1:
            each = ", ".join(
                f"{one_line(name)} {show(item['error'])}" for name, item in outputs.items() if item["error"] is not None
            )
            lines.append(f"{len(outputs)} outputs were measured, and the budget holds for each: {each}.")
        if totals.get("error_worst") is not None:
            told = f"Pooled over {counted(totals.get('samples', 0), 'sample')}"
            if groups:
                worst = str(totals.get("worst_group"))
                told = f"In {one_line(worst)}, {counted(groups.get(worst, {}).get('samples', 0), 'sample')}"
            line = (
                f"{told}; of the samples' own errors the median is "
                f"{show(totals['error_median'])}, the worst tenth begins at {show(totals['error_worst_tenth'])}, the worst is "
                f"{show(totals['error_worst'])}"
            )
            if totals.get("top1_unchanged") is not None:
                line += f"; the likeliest class (top-1) is unchanged in {percent(totals['top1_unchanged'], 3)}"
            lines.append(line + ".")
        return lines

    def _error_phrases(self) -> list[str]:
        totals, metric = self.totals, one_line(str(self.totals.get("metric") or "error"))
        known = recorded_metric(metric)
        name, show = metric if metric == "error" else known.title, known.show
        phrases = []
        if totals.get("error_measured") is not None:
            groups = totals.get("groups") or {}
            where = f" in {one_line(str(totals.get('worst_group')))}, the worst of {len(groups)} groups"
            phrases.append(f"{name} {show(totals['error_measured'])} measured{where if len(groups) > 1 else ''}")
        elif totals.get("error_predicted") is not None:
            phrases.append(f"{name} {show(totals['error_predicted'])} predicted, not measured")
        if totals.get("error_upper") is not None and totals.get("error_upper") != totals.get("error_measured"):
            upper, budget = totals["error_upper"], totals.get("error_budget")
            bound = show(upper) if budget is None or metric == "error" else known.show_beside(upper, budget)
            sure = totals.get("confidence", 0.95) is not None
            each = " in each" if len(totals.get("groups") or {}) > 1 else ""
            phrases.append(f"at most {bound} with 95 % confidence{each}" if sure else "proved for no other samples")
        if totals.get("error_budget") is not None:
            shown = show if metric == "error" else known.show_limit
            phrases.append(f"budget {shown(totals['error_budget'])}")
        return phrases

    def files(self) -> dict[str, str]:
        """Render everything that :meth:`save` writes; :attr:`run` stands in ``run.json`` alone."""
        return super().files() | {"run.json": stable_json(self.run)}

    @classmethod
    def from_json(cls, text: str | bytes, *, source: str = "report.json") -> CompressionReport:
        """Read :meth:`to_json`'s text back; ``run`` is empty.

        Raises:
            CheckpointError: not such a text.
        """
        data = cls._read(text, source)
        return cls(
            [row_from_json(item, source) for item in data["rows"]],
            data["totals"],
            {},
            data["notes"],
            points_from_json(data.get("frontier", []), source),
        )

    def _content(self) -> dict[str, Any]:
        rows = [row.to_json() for row in self.rows]
        return super()._content() | {"rows": rows, "frontier": points_as_json(self.frontier)}

    def _tables(self, full: bool) -> list[Table]:
        rows = [row_texts(row) for row in self.rows]
        if not full:
            footnotes = self._footnotes()
            rows = [[*cells[:-1], footnotes.get(cells[-1], cells[-1])] for cells in rows]
        return [*self._groups(), Table(COLUMNS, rows, total_texts(self.rows)), *self._plans_tried()]

    def _remarks(self, full: bool) -> list[str]:
        return [] if full else [f"{mark} {text}" for text, mark in self._footnotes().items()]

    def _footnotes(self) -> dict[str, str]:
        """Remarks that a terminal's table would cut, with the mark that stands for each."""
        long = dict.fromkeys(text for row in self.rows if len(text := row_texts(row)[-1]) > WIDEST_REMARK)
        return {text: f"[{number}]" for number, text in enumerate(long, start=1)}

    def _groups(self) -> list[Table]:
        metric = recorded_metric(str(self.totals.get("metric")))
        rows = group_texts(self.totals, metric.show_beside, metric.show)
        return [Table(GROUP_COLUMNS, rows, title="Groups of samples", named=False)] if rows else []

    def _plans_tried(self) -> list[Table]:
        tried = trial_texts(self.totals, recorded_metric(str(self.totals.get("metric"))).show_beside)
        return [Table(TRIAL_COLUMNS, tried, title="Plans that were measured", named=False)] if tried else []

    def _sections(self) -> list[str]:
        groups, tried = (
            [html.section(table.title, table.to_html()) for table in tables]
            for tables in (self._groups(), self._plans_tried())
        )
        # The tiles stand first.
        first, *others = page.sections(self.rows, self.totals, self.answer, self.frontier)
        return [first, *groups, *others, *tried]

    def _footer(self) -> list[str]:
        seed = self.totals.get("seed")
        return super()._footer() + ([] if seed is None else [f"seed {seed}"])
