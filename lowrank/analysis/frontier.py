"""Size against error of one model: several budgets from one preparation, each measured, each kept once it is finished."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from lowrank.analysis.frontier_report import STATE_NAME, FrontierReport
from lowrank.analysis.frontier_state import Done, State, arguments_of
from lowrank.calibration.batches import Batch, sample_count
from lowrank.calibration.groups import groups_of, read_samples
from lowrank.calibration.metrics import METRICS, metric_named
from lowrank.calibration.samples import without_shared
from lowrank.calibration.untouched import borrowed
from lowrank.compression.accounting import TargetBytes, frontier_point
from lowrank.compression.allocation import Allocator
from lowrank.compression.choose import allocator_of, search_of
from lowrank.compression.compress import prepare
from lowrank.compression.corrections import Corrections
from lowrank.compression.formats import REFERENCE
from lowrank.compression.options import Options, check_budgets
from lowrank.compression.passes import Passes
from lowrank.compression.plan import Plan, same_specs
from lowrank.compression.search import Search
from lowrank.compression.trial import Reading, corrected
from lowrank.errors import BudgetError, UsageError, is_whole
from lowrank.io import check_destination, lock_destination
from lowrank.io.version import versions
from lowrank.layers.base import ACTIVATIONS
from lowrank.reporting.points import FrontierPoint
from lowrank.reporting.text import counted
from lowrank.targets.model import unwrapped

__all__ = ["FrontierPoint", "FrontierReport", "default_budgets", "measure_frontier"]

POINTS = 8
# Passes over the search samples: a few for each point.
MOST_STEPS = 10_000
MOST_POINTS = 64
# Plans tried for a point until its error on the search part is this near to the budget.
ROUNDS = 3
NEAR = 0.05


def default_budgets(metric: str, points: int = POINTS) -> tuple[float, ...]:
    """Spread error budgets over the usual range of the metric of this name, in equal ratios, two digits each.

    Raises:
        UsageError: no such metric.

    Example:
        >>> default_budgets("output", 6)
        (0.01, 0.022, 0.048, 0.1, 0.23, 0.5)
    """
    low, high = metric_named(metric).usual
    ratio = (high / low) ** (1.0 / max(points - 1, 1))
    return tuple(float(f"{low * ratio**index:.2g}") for index in range(points))


def measure_frontier(
    model: nn.Module,
    *,
    calibration: Iterable[Any] | None = None,
    validation: Iterable[Any] | None = None,
    budgets: Sequence[float] | None = None,
    points: int | None = None,
    directory: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    source: str | None = None,
    **options: Any,
) -> FrontierReport:
    """Measure size against error for several error budgets, with one calibration and one set of probes for all of them.

    For each budget the plan that is expected to reach it is built, corrected on the search part of the samples and then measured
    on the verification part, from which no plan is made. Where int8 is allowed, the model in int8 throughout is a point as well.
    A budget here says where to look; what counts is the error beside it. A promise comes from
    :func:`lowrank.compress_model`, which tests one budget.

    Args:
        model: any module; it stays as it is.
        calibration, validation: as for :func:`lowrank.compress_model`; without any the errors are weight errors.
        budgets: errors to aim at, in the metric's unit.
        points: how many budgets to spread over the metric's usual range (8) where none are given.
        directory: where each finished point is kept, so that a run that was stopped goes on; without it nothing is written.
        overwrite: start anew in a directory that holds something else, or points of other arguments.
        source: the model's name, for the report.
        options: ``metric``, ``formats``, ``targets``, ``ignore``, ``overrides``, ``activations``, ``output_fn``,
            ``forward_fn``, ``seed``, ``progress``, ``on_nonfinite``, ``strict``, ``fold_batchnorm`` of :func:`lowrank.compress_model`.

    Raises:
        UsageError: budgets that mean nothing, an option that has no place here, a directory of something else.
        CheckpointError: the directory's points were measured with other arguments, on another model or data; says which.
        StorageError: the directory cannot be written.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> inputs = [torch.randn(256, 64)]
        >>> report = measure_frontier(model, calibration=inputs, budgets=[0.02, 0.2], progress=False)
        >>> all(point.measured for point in report.points), len(report.points) == len(report.plans)
        (True, True)
    """
    original = unwrapped(model)
    wanted, checked = _checked(budgets, points, options, calibrated=calibration is not None)
    # Read once here: an iterator may not be read twice.
    called: dict[str, Any] = {"output_fn": checked.output_fn, "forward_fn": checked.forward_fn}
    batches = None if calibration is None else read_samples(original, calibration, **called)
    checks = None if validation is None else read_samples(original, validation, "validation", **called)
    if batches is not None and checks is not None:
        checks = without_shared(checks, batches)
    arguments = arguments_of(original, batches, checks, wanted, checked)
    with _held(directory) as folder:
        state = State(arguments)
        if folder is not None:
            check_destination(folder, overwrite or (folder / STATE_NAME).is_file())
            if not overwrite:
                state.read(folder)
        if source is not None:
            state.totals["source"] = source
        # Given budgets are measured as they are; only those of our own are filled up where several gave the same plan.
        fill = 0 if budgets is not None else len(wanted)
        run = _Run(wanted, checked, state, folder, fill)
        if run.following() is not None:
            with borrowed(original):
                run.measure(original, batches, checks)
        return state.report()


@contextmanager
def _held(directory: str | os.PathLike[str] | None) -> Iterator[Path | None]:
    with nullcontext() if directory is None else lock_destination(directory):
        yield None if directory is None else Path(directory)


def _checked(
    budgets: Sequence[float] | None, points: int | None, options: dict[str, Any], *, calibrated: bool
) -> tuple[tuple[float, ...], Options]:
    for name in ("error_budget", "size_budget", "plan", "inplace", "heal", "objective"):
        if name in options:
            raise UsageError(f"measure_frontier: {name} has no place here; budgets=[…] says which errors to aim at")
    if budgets is not None and points is not None:
        raise UsageError("budgets or points: give one of them; points spreads budgets of its own")
    count = POINTS if points is None else points
    if not is_whole(count, 2, MOST_POINTS):
        raise UsageError(f"points: must be an integer from 2 to {MOST_POINTS}, got {points!r}")
    metric = options.get("metric", "auto")
    if not isinstance(metric, str):
        raise UsageError(f"metric: a frontier is measured by name ({', '.join(METRICS)}), not by a callable")
    if budgets is not None:
        if not isinstance(budgets, (list, tuple)) or not budgets or len(budgets) > MOST_POINTS:
            raise UsageError(
                f"budgets: must be a list of 1 to {MOST_POINTS} errors such as [0.02, 0.05], got {budgets!r}"
            )
        for budget in budgets:
            check_budgets(budget, None, metric)
    # Probes look at truncation about where a plan would put it: in the middle of the budgets.
    resolved = Options(**options, error_budget=1e-3).checked(calibrated=calibrated)
    assert isinstance(resolved.metric, str)
    wanted = tuple(sorted(set(budgets))) if budgets is not None else default_budgets(resolved.metric, count)
    middle = math.exp(math.fsum(map(math.log, wanted)) / len(wanted))
    return wanted, replace(resolved, error_budget=middle)


def _uniform_steps(options: Options) -> list[str]:
    """The plans that give every layer the same format; measured first, since they calibrate the predictions."""
    if REFERENCE.name not in options.formats or options.overrides:
        return []
    return [f"uniform {mode}" for mode in (ACTIVATIONS if options.activations == "auto" else (options.activations,))]


def _uniform_plans(options: Options, allocator: Allocator) -> list[tuple[str, Plan]]:
    return allocator.uniform((REFERENCE.name,), options.activations) if _uniform_steps(options) else []


@dataclass
class _Run:
    """Budgets, what is finished, and where it is kept.

    Attributes:
        budgets: errors to aim at.
        options: of the compression.
        state: what is finished.
        folder: where it is kept; ``None`` where nothing is written.
        fill: how many points there should be at least.
    """

    budgets: Sequence[float]
    options: Options
    state: State
    folder: Path | None
    fill: int

    def following(self) -> tuple[str, float | None] | None:
        """What is measured next, and at which budget; a function of what is finished, so that a run goes on where it stopped."""
        uniform = _uniform_steps(self.options)
        index = len(self.state.done)
        if index < len(uniform):
            return uniform[index], None
        index -= len(uniform)
        if index < len(self.budgets):
            return f"budget {self.budgets[index]!r}", self.budgets[index]
        points = sorted(
            (item.point for item in self.state.done if item.point is not None and item.point.error > 0.0), key=_size
        )
        if len(points) >= self.fill or index >= 2 * self.fill:
            return None
        gaps = [
            (above.size_ratio / below.size_ratio, math.sqrt(below.error * above.error))
            for below, above in pairwise(points)
            if below.error > above.error
        ]
        tried = {item.step for item in self.state.done}
        for _, budget in sorted(gaps, reverse=True):
            step = f"between {budget!r}"
            if step not in tried:
                return step, budget
        return None

    def measure(self, model: nn.Module, batches: Sequence[Batch] | None, checks: Sequence[Batch] | None) -> None:
        """Measure the steps that are not done yet, and keep each as soon as it is."""
        prepared, verification = prepare(model, batches, checks, self.options, probing=True)
        allocator = allocator_of(prepared, self.options)
        search = search_of(prepared, verification, self.options, Corrections(allocator))
        search.passes = Passes(limit=MOST_STEPS)
        sizes = TargetBytes.of_original(prepared.survey, prepared.copy.model, prepared.copy.layers)
        self.state.totals |= {
            "metric": self.options.metric,
            "bytes_before": sizes.before,
            "samples": sample_count(verification) if not self.options.error_metric.weights_only else 0,
            "seed": self.options.seed,
            "versions": versions(),
        }
        groups = [group for group in groups_of(verification) if group]
        told = (
            [f"errors are those of the worst of {counted(len(groups), 'group')}: {', '.join(groups)}"] if groups else []
        )
        self.state.notes = [*told, *prepared.notes]
        uniform = dict(zip(_uniform_steps(self.options), _uniform_plans(self.options, allocator), strict=True))
        search.scale = self.state.done[-1].scale if self.state.done else 1.0
        bar = tqdm(desc="frontier", unit="point", delay=2, disable=not self.options.progress)
        while (following := self.following()) is not None:
            step, budget = following
            _forget(search, allocator)
            if budget is None:
                label, plan = uniform[step]
                if not self.state.done:
                    reading = search.attempt(label, plan).searched
                    search.scale = corrected(search.predicted(plan), reading, search.scale, search.total)
            else:
                label, plan = f"budget {budget:.3g}", _plan_for(search, budget)
            known = any(item.plan is not None and same_specs(item.plan, plan) for item in self.state.done)
            point = None if known else _point(search, plan, sizes, label, budget)
            if point is not None and not self.state.totals["samples"]:
                point = replace(point, upper=None)
            self.state.done.append(Done(step, search.scale, point, None if point is None else plan))
            if self.folder is not None:
                self.state.write(self.folder)
            bar.update()
        bar.close()


def _forget(search: Search, allocator: Allocator) -> None:
    """Begin a step with nothing but the scale of those before, so that a run that was stopped goes on alike."""
    corrections = Corrections(allocator)
    search.plan_for, search.predicted, search.learn = corrections.plan, corrections.predicted, corrections.learn
    search.trials = []


def _size(point: FrontierPoint) -> float:
    return point.size_ratio


def _point(search: Search, plan: Plan, sizes: TargetBytes, label: str, budget: float | None) -> FrontierPoint | None:
    """The plan measured on the verification part; ``None`` where its error is not finite."""
    reading = search.verify(search.copy.install_plan(plan)) if plan.error > 0.0 else Reading(0.0, math.inf)
    if not math.isfinite(reading.value):
        return None
    made = frontier_point(plan, sizes, reading.value, label=label, measured=True, budget=budget)
    return replace(made, upper=reading.upper if math.isfinite(reading.upper) else None)


def _plan_for(search: Search, budget: float) -> Plan:
    """The plan whose error on the search part is nearest to the budget after a few corrections; leaves its scale in the search."""
    best: tuple[float, Plan, float] | None = None
    search.target = budget
    try:
        for step in search.approach(ROUNDS):
            if step.reading is None:
                best = best or (math.inf, step.plan, step.scale)
                break
            if not math.isfinite(step.reading.value):
                continue
            distance = abs(math.log(max(step.reading.value, 1e-300) / budget))
            if best is None or distance < best[0]:
                best = distance, step.plan, search.scale
            if distance < NEAR:
                break
    except BudgetError:
        raise BudgetError(f"budget {budget:g}: the formats that overrides asks for cannot hold it") from None
    if best is None:
        # Every plan that was tried broke the model: the last one, made with what that taught.
        return step.plan
    _, plan, search.scale = best
    return plan
