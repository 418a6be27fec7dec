"""How compressible a model is, layer by layer: the rows of an analysis, rendered as text, Markdown, JSON and HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lowrank.analysis import page
from lowrank.analysis.rows import SIZES, AnalysisRow
from lowrank.compression.plan import PlanEntry
from lowrank.reporting import html
from lowrank.reporting.report import Report, Table
from lowrank.reporting.text import Column, count_text, human_bytes, one_line, percent, shown_name

__all__ = ["AnalysisReport"]


@dataclass
class AnalysisReport(Report):
    """Hold rows, totals and notes of :func:`lowrank.analyze_model`.

    Attributes:
        rows: one per layer, also those without a matrix or skipped, with the reason.
        totals: ``layers``, ``analysed``, ``parameters``, ``parameters_analysed``, ``bytes``, ``size_ratio_at_energy``
            (all layers factored at that energy, whole where that is no smaller), ``error_at_size``, ``curve``
            (:func:`size_error_curve`), ``buffers`` (elements that are no parameters), ``plans`` (by budget: ``formats``,
            ``size_ratio``), ``plans_metric``, ``compressed`` (layers that are so already, by format), ``source``, ``energy``, ``versions``.
        notes: sentences for the reader.
    """

    heading = "Low-rank analysis"
    stem = "analysis"
    what = "an analysis"
    usual_width = 140
    most_width = 200

    rows: list[AnalysisRow]
    totals: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def summary(self) -> list[str]:
        """Say the analysis in plain sentences."""
        totals = self.totals
        lines = [
            f"{count_text(totals['analysed'])} of {count_of_noun(totals['layers'], 'layer')} "
            f"{'holds' if totals['analysed'] == 1 else 'hold'} a matrix: "
            f"{count_text(totals['parameters_analysed'])} of {count_of_noun(totals['parameters'], 'parameter')} "
            f"({human_bytes(totals['bytes'])} stored{_buffers_text(totals)})."
        ]
        compressed = totals.get("compressed", {})
        if compressed:
            formats = ", ".join(f"{name} {count}" for name, count in compressed.items())
            lines.append(f"The model is compressed already ({formats}): what follows is about the rest of it.")
        if not totals["analysed"]:
            return lines
        ratios = totals["size_ratio_at_energy"]
        shares = ", ".join(f"{percent(ratio, 3)} at {percent(float(level))} energy" for level, ratio in ratios.items())
        lines.append(f"Factors alone, without quantisation, would take {shares} of the matrices' bytes.")
        errors = ", ".join(
            f"{percent(error)} at {percent(float(size))}" for size, error in totals["error_at_size"].items()
        )
        lines.append(f"Weight error with the ranks divided best among the layers: {errors} of the bytes.")
        if totals.get("plans"):
            what = "weights" if totals["plans_metric"] == "weight" else "output"
            lines.append(f"Verdict: compress would choose, for an error of the {what}, {self.verdict}.")
        return lines

    @property
    def verdict(self) -> str:
        """Say what compressing would make of the layers that can be replaced, at each budget."""
        said = []
        for budget, plan in self.totals.get("plans", {}).items():
            formats = ", ".join(f"{name} {count}" for name, count in plan["formats"].items())
            ratio = plan["size_ratio"]
            size = "" if ratio is None else f" ({percent(ratio, 3)} of the bytes)"
            said.append(f"at {percent(float(budget))} {formats}{size}")
        return "; ".join(said) or "no layer that can be replaced"

    @property
    def columns(self) -> tuple[Column, ...]:
        """Head the table; with columns for W Σ^½ only where there was calibration."""
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

    def _content(self) -> dict[str, Any]:
        return super()._content() | {"rows": [asdict(row) for row in self.rows]}

    def _tables(self, full: bool) -> list[Table]:
        columns = self.columns
        rows = [self._texts(row, columns) for row in self.rows if full or row.analysed]
        return [Table(columns, rows, self._total_texts(columns))]

    def _remarks(self, full: bool) -> list[str]:
        skipped = [] if full else [f"not analysed: {line}" for line in self._skipped()]
        return ["\n".join(skipped), self._legend()]

    def _sections(self) -> list[str]:
        columns = self.columns
        # The verdict beside the name, where a narrow screen still shows it.
        order = [0, len(columns) - 1, *range(1, len(columns) - 1)]
        headings = [html.Heading(columns[i].title, columns[i].numeric, i == order[1]) for i in order]
        body = []
        for row in self.rows:
            name, *others = self._texts(row, columns)
            texts = [shown_name(name), *others]
            body.append([html.Cell(texts[i], _number(texts[i]) if columns[i].numeric else None) for i in order])
        total = self._total_texts(columns)
        muted = [not row.analysed for row in self.rows]
        table = html.table(headings, body, total=[total[i] for i in order], muted=muted)
        return page.sections(self.rows, self.totals, table, self._legend())

    def _texts(self, row: AnalysisRow, columns: Sequence[Column]) -> list[str]:
        first = [one_line(row.name), "x".join(map(str, row.shape)), count_text(row.parameters)]
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

    def _total_texts(self, columns: Sequence[Column]) -> list[str]:
        texts = [""] * len(columns)
        texts[0] = count_of_noun(self.totals["layers"], "layer")
        texts[2] = count_text(self.totals["parameters"])
        errors = self.totals.get("error_at_size", {})
        for index, column in enumerate(columns):
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


def count_of_noun(count: int, noun: str) -> str:
    """Write a number with its noun.

    Example:
        >>> count_of_noun(1, "layer"), count_of_noun(1200, "layer")
        ('1 layer', '1,200 layers')
    """
    return f"{count_text(count)} {noun}{'' if count == 1 else 's'}"


def verdict_of(entries: Sequence[tuple[float, PlanEntry]]) -> str:
    """Say what becomes of a layer at budgets that ascend.

    Example:
        >>> from lowrank.compression.formats import DENSE
        >>> verdict_of([(0.02, PlanEntry("fc", "linear", (8, 8), DENSE, 256, 0.0))])
        'dense'
    """
    groups: dict[str, list[str]] = {}
    for budget, entry in entries:
        text = entry.format if entry.rank is None else f"{entry.format} r{entry.rank}"
        groups.setdefault(text, []).append(f"{100 * budget:g}")
    if len(groups) == 1:
        return next(iter(groups))
    return "; ".join(f"{text} at {', '.join(levels)} %" for text, levels in groups.items())


def _buffers_text(totals: Mapping[str, Any]) -> str:
    count = totals.get("buffers", 0)
    return f", with {count_of_noun(count, 'element')} in buffers" if count else ""


def _level(level: float | str) -> str:
    return f"{100 * float(level):g}"


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", "").removesuffix(" %"))
    except ValueError:
        return None
