"""Size against error of one model: several budgets from one preparation, each measured, each kept once it is finished."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from lowrank.analysis.frontier_report import STATE_NAME, FrontierReport
from lowrank.analysis.frontier_state import Done, State, arguments_of
from lowrank.calibration.batches import Batch, prepare_batches, sample_count
from lowrank.calibration.metrics import METRICS, metric_named
from lowrank.compression.accounting import frontier_point, layer_rows
from lowrank.compression.choose import gauges_of, planner_of, uniform_plans
from lowrank.compression.compress import prepare_job
from lowrank.compression.options import Options, check_budgets
from lowrank.compression.plan import Plan
from lowrank.compression.prepare import Job
from lowrank.compression.trial import Gauge, Reading
from lowrank.compression.workshop import Choice
from lowrank.errors import BudgetError, UsageError
from lowrank.io import check_destination, lock_destination
from lowrank.io.version import __version__
from lowrank.reporting.points import FrontierPoint
from lowrank.targets.survey import unwrapped

__all__ = ["FrontierPoint", "FrontierReport", "default_budgets", "measure_frontier"]

POINTS = 8
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
            ``seed``, ``progress``, ``on_nonfinite``, ``strict``, ``fold_batchnorm`` of :func:`lowrank.compress_model`.

    Raises:
        UsageError: budgets that mean nothing, an option that has no place here, a directory of something else.
        CheckpointError: the directory's points were measured with other arguments, on another model or data; says which.
        StorageError: the directory cannot be written.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> inputs = [torch.randn(256, 64)]
        >>> report = measure_frontier(model, calibration=inputs, budgets=[0.02, 0.2], progress=False)
        >>> all(point.measured for point in report.points), len(report.points) == len(report.plans)
        (True, True)
    """
    original = unwrapped(model)
    wanted, checked = _checked(budgets, points, options, calibrated=calibration is not None)
    # Read once here: an iterator may not be read twice.
    batches = None if calibration is None else prepare_batches(original, calibration)
    checks = None if validation is None else prepare_batches(original, validation, "validation")
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
        if _next_step(state.done, wanted, checked, fill) is not None:
            _measure(original, batches, checks, wanted, checked, state, folder, fill)
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
    if isinstance(count, bool) or not isinstance(count, int) or not 2 <= count <= MOST_POINTS:
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
    """The formats that are given to every layer alike; measured first, since they calibrate the predictions."""
    if "int8" not in options.formats or options.overrides:
        return []
    modes = ("int8", "float") if options.activations == "auto" else (options.activations,)
    return [f"uniform {mode}" for mode in modes]


def _next_step(
    done: Sequence[Done], budgets: Sequence[float], options: Options, fill: int
) -> tuple[str, float | None] | None:
    """What is measured next, and at which budget; a function of what is finished, so that a run goes on where it stopped."""
    uniform = _uniform_steps(options)
    index = len(done)
    if index < len(uniform):
        return uniform[index], None
    index -= len(uniform)
    if index < len(budgets):
        return f"budget {budgets[index]!r}", budgets[index]
    points = sorted((item.point for item in done if item.point is not None and item.point.error > 0.0), key=_size)
    if len(points) >= fill or index >= 2 * fill:
        return None
    gaps = [
        (above.size_ratio / below.size_ratio, math.sqrt(below.error * above.error))
        for below, above in pairwise(points)
        if below.error > above.error
    ]
    tried = {item.step for item in done}
    for _, budget in sorted(gaps, reverse=True):
        step = f"between {budget!r}"
        if step not in tried:
            return step, budget
    return None


def _size(point: FrontierPoint) -> float:
    return point.size_ratio


def _measure(
    model: nn.Module,
    batches: Sequence[Batch] | None,
    checks: Sequence[Batch] | None,
    budgets: Sequence[float],
    options: Options,
    state: State,
    folder: Path | None,
    fill: int,
) -> None:
    """Measure the steps that are not done yet, and keep each as soon as it is."""
    job, verification = prepare_job(model, batches, checks, options, probing=True)
    search, verify = gauges_of(job, verification, options)
    rows = layer_rows(job.survey, job.bench.model, job.bench.workshops)
    dense = sum(shop.bytes(Choice("dense")) for shop in job.bench.workshops.values())
    rest = sum(row.bytes_after for row in rows) - dense
    before = sum(row.bytes_before for row in rows)
    state.totals |= {
        "metric": options.metric,
        "bytes_before": before,
        "samples": sample_count(verification) if not options.error_metric.weights_only else 0,
        "seed": options.seed,
        "versions": {"lowrank": __version__, "torch": str(torch.__version__)},
    }
    state.notes = list(job.notes)
    uniform = dict(zip(_uniform_steps(options), uniform_plans(job, options), strict=True))
    scale = state.done[-1].scale if state.done else 1.0
    bar = tqdm(desc="frontier", unit="point", delay=2, disable=not options.progress)
    while (following := _next_step(state.done, budgets, options, fill)) is not None:
        step, budget = following
        if budget is None:
            label, plan = uniform[step]
            if not state.done:
                scale = _corrected(plan, search(job.bench.install_plan(plan)), scale, options)
        else:
            label, (plan, scale) = f"budget {budget:.3g}", _plan_for(job, budget, scale, search, options)
        known = [item for item in state.done if item.plan is not None and _key(item.plan) == _key(plan)]
        if known:
            state.done.append(Done(step, scale, None, None))
        else:
            reading = verify(job.bench.install_plan(plan)) if plan.error > 0.0 else Reading(0.0, math.inf)
            upper = reading.upper if math.isfinite(reading.upper) and state.totals["samples"] else None
            error = reading.value if math.isfinite(reading.value) else None
            point = None
            if error is not None:
                made = frontier_point(plan, rest, before, error, True, budget, label)
                point = replace(made, upper=upper)
            state.done.append(Done(step, scale, point, plan if point is not None else None))
        if folder is not None:
            state.write(folder)
        bar.update()
    bar.close()


def _plan_for(job: Job, budget: float, scale: float, search: Gauge, options: Options) -> tuple[Plan, float]:
    """The plan whose error on the search part is nearest to the budget after a few corrections, and measured over predicted."""
    plan_for = planner_of(job, options)
    wanted = options.contribution(budget)
    best: tuple[float, Plan, float] | None = None
    tried: list[object] = []
    for _ in range(ROUNDS):
        try:
            plan = plan_for(wanted / scale)
        except BudgetError:
            raise BudgetError(f"budget {budget:g}: the formats that overrides asks for cannot hold it") from None
        if _key(plan) in tried:
            break
        tried.append(_key(plan))
        if plan.error <= 0.0:
            return (best[1], best[2]) if best is not None else (plan, scale)
        reading = search(job.bench.install_plan(plan))
        if not math.isfinite(reading.value):
            scale *= 4.0
            continue
        distance = abs(math.log(max(reading.value, 1e-300) / budget))
        scale = _corrected(plan, reading, scale, options)
        if best is None or distance < best[0]:
            best = distance, plan, scale
        if distance < NEAR:
            break
    if best is None:
        return plan, scale
    return best[1], best[2]


def _corrected(plan: Plan, reading: Reading, scale: float, options: Options) -> float:
    """Measured over predicted contributions; the old scale where one of them says nothing."""
    measured = options.contribution(reading.value) if math.isfinite(reading.value) else math.inf
    ratio = measured / plan.error if plan.error > 0.0 else 0.0
    return ratio if 0.0 < ratio < math.inf else scale


def _key(plan: Plan) -> list[tuple[object, ...]]:
    return [
        (entry.name, entry.format, entry.rank, entry.bits, entry.activations, entry.scheme) for entry in plan.entries
    ]
