"""Spectra and training runs as pictures; the only room that imports matplotlib (extra ``plot``)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Protocol

from lowrank.errors import UsageError
from lowrank.io.version import PACKAGE

__all__ = ["FORMATS", "draw_history", "draw_spectra"]

FORMATS = ("png", "svg", "pdf")


class SpectrumRow(Protocol):
    """What is drawn of a layer: a row of :class:`lowrank.AnalysisReport`, for one."""

    @property
    def name(self) -> str:
        """Of the layer."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its weight; layers of one shape share a colour."""

    @property
    def spectrum(self) -> tuple[float, ...]:
        """σ/σ₁ at equal steps of the rank from 1 to full; empty where nothing was computed."""

    @property
    def energy(self) -> tuple[float, ...]:
        """Cumulative share of Σσ² at the same ranks."""


def draw_spectra(rows: Sequence[SpectrumRow], kind: str = "png") -> bytes:
    """Draw singular values and cumulative energy against the rank, a line a layer, a colour a shape.

    Args:
        rows: of an analysis; those without a spectrum are left out.
        kind: of the picture: png, svg or pdf.

    Returns:
        The content of the file.

    Raises:
        UsageError: matplotlib is not installed, or another kind.

    Example:
        >>> draw_spectra([], "gif")
        Traceback (most recent call last):
            ...
        lowrank.errors.UsageError: a plot is a png, svg or pdf file, not 'gif'
    """
    if kind not in FORMATS:
        raise UsageError(f"a plot is a png, svg or pdf file, not {kind!r}")
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("plots need matplotlib, which is not installed; pip install 'lowrank[plot]'") from error
    drawn = [row for row in rows if row.spectrum]
    shapes = list(dict.fromkeys(row.shape for row in drawn))
    # Not pyplot: that keeps every figure and picks a backend for the whole process.
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    labelled: set[tuple[int, ...]] = set()
    for row in drawn:
        steps = [100 * step / max(len(row.spectrum) - 1, 1) for step in range(len(row.spectrum))]
        style = {"color": f"C{shapes.index(row.shape) % 10}", "alpha": 0.6, "linewidth": 1.0}
        label = "x".join(map(str, row.shape)) if row.shape not in labelled else None
        labelled.add(row.shape)
        left.plot(steps, [value if value > 0 else float("nan") for value in row.spectrum], label=label, **style)
        right.plot(steps, [100 * value for value in row.energy], **style)
    left.set(yscale="log", xlabel="rank, % of full", ylabel="singular value / largest", title="Spectra")
    right.set(xlabel="rank, % of full", ylabel="share of the energy, %", title="Cumulative energy", ylim=(0, 102))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    if drawn:
        left.legend(title="shape", fontsize="small")
    picture = BytesIO()
    with rc_context({"svg.hashsalt": PACKAGE}):
        figure.savefig(picture, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return picture.getvalue()


def draw_history(
    history: Sequence[Mapping[str, float | None]],
    evaluations: Sequence[Mapping[str, float]],
    metric: str = "loss",
    kind: str = "png",
) -> bytes:
    """Draw the loss of a training run, its evaluations and its learning rate against the step.

    Args:
        history: rows with ``step``, ``loss`` (``None`` leaves a gap) and, for a second panel, ``learning_rate``.
        evaluations: rows with ``step`` and ``value``; drawn on an axis of their own unless the metric is the loss.
        metric: what the evaluations are of.
        kind: of the picture: png, svg or pdf.

    Raises:
        UsageError: matplotlib is not installed, or another kind.
    """
    if kind not in FORMATS:
        raise UsageError(f"a plot is a png, svg or pdf file, not {kind!r}")
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise UsageError("plots need matplotlib, which is not installed; pip install 'lowrank[plot]'") from error
    rates = [row["learning_rate"] for row in history if "learning_rate" in row]
    figure = Figure(figsize=(11 if rates else 6.5, 4.5), layout="constrained")
    left, *others = figure.subplots(1, 2 if rates else 1, squeeze=False)[0]
    steps = [row["step"] for row in history]
    # A line through one point or two is not seen.
    marker = "." if len(steps) < 10 else ""
    losses = [math.nan if row["loss"] is None else row["loss"] for row in history]
    lines = left.plot(steps, losses, marker=marker, linewidth=1.0, label="training loss")
    if evaluations:
        axes = left if metric == "loss" else left.twinx()
        found = [row["value"] for row in evaluations]
        lines += axes.plot([row["step"] for row in evaluations], found, "o-", color="C1", label=f"validation {metric}")
        if axes is not left:
            axes.set_ylabel(metric)
    left.set(xlabel="step", ylabel="loss", title="Training")
    # In the margin, where it hides neither line.
    left.legend(
        handles=lines, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, fontsize="small", frameon=False
    )
    for right in others:
        right.plot(steps, rates, marker=marker, linewidth=1.0)
        right.set(xlabel="step", ylabel="learning rate", title="Learning rate")
    for each in (left, *others):
        each.xaxis.set_major_locator(MaxNLocator(integer=True))
        each.grid(alpha=0.3)
    picture = BytesIO()
    with rc_context({"svg.hashsalt": PACKAGE}):
        figure.savefig(picture, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return picture.getvalue()
