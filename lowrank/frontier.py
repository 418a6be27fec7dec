"""Size against error of one model: several budgets from one preparation, each measured, each kept once it is finished."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowrank.batches import Batch, prepare_batches, sample_count
from lowrank.choose import gauges_of, planner_of, uniform_plans
from lowrank.compress import prepare_job
from lowrank.errors import BudgetError, CheckpointError, UsageError
from lowrank.files import check_destination, lock_destination, parse_json, printable, read_bounded
from lowrank.frontier_report import STATE_NAME, FrontierReport, plan_name
from lowrank.ledger import frontier_point, layer_rows
from lowrank.modules import unwrapped
from lowrank.options import Options, check_budgets
from lowrank.plan import Plan
from lowrank.prepare import Job
from lowrank.report_frontier import FrontierPoint, points_from_json
from lowrank.search import Gauge, Reading
from lowrank.version import __version__
from lowrank.workshop import Choice

__all__ = ["FrontierPoint", "FrontierReport", "default_budgets", "measure_frontier"]

POINTS = 8
MOST_POINTS = 64
# The range of the default budgets: from about what int8 weights alone cost to where few models are of use. Nats for "kl".
RANGES = {"output": (0.01, 0.5), "weight": (0.005, 0.5), "kl": (0.002, 0.5), "perplexity": (0.003, 0.5)}
# Plans tried for a point until its error on the search part is this near to the budget.
ROUNDS = 3
NEAR = 0.05
# A state file of 64 points takes 30 kB, a plan of 10,000 layers 3 MB.
MOST_BYTES = 64 << 20


def default_budgets(metric: str, points: int = POINTS) -> tuple[float, ...]:
    """Error budgets in equal ratios, two digits each.

    Example:
        >>> default_budgets("output", 6)
        (0.01, 0.022, 0.048, 0.1, 0.23, 0.5)
    """
    low, high = RANGES[metric]
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
    arguments = _arguments(original, batches, checks, wanted, checked)
    with _held(directory) as folder:
        state = _State(arguments)
        if folder is not None:
            check_destination(folder, overwrite or (folder / STATE_NAME).is_file())
            if not overwrite:
                state.read(folder)
        if source is not None:
            state.totals["source"] = source
        if len(state.done) < len(_steps(wanted, checked)):
            _measure(original, batches, checks, wanted, checked, state, folder)
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
        raise UsageError("metric: a frontier is measured by name (output, weight, kl, perplexity), not by a callable")
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


def _arguments(
    model: nn.Module,
    batches: Sequence[Batch] | None,
    checks: Sequence[Batch] | None,
    budgets: Sequence[float],
    options: Options,
) -> dict[str, Any]:
    """Everything that the points depend on, as plain data."""
    chosen = {
        key: value for key, value in vars(options).items() if key not in ("progress", "error_budget", "output_fn")
    }
    if options.output_fn is not None:
        chosen["output_fn"] = getattr(options.output_fn, "__qualname__", type(options.output_fn).__qualname__)
    plain = {key: list(value) if isinstance(value, (tuple, list)) else value for key, value in chosen.items()}
    return {
        **{key: value for key, value in plain.items() if value is not None},
        "budgets": list(budgets),
        "lowrank": __version__,
        "model": _digest(sorted(model.state_dict().items())),
        "calibration": None if batches is None else _digest(_batch_items(batches)),
        "validation": None if checks is None else _digest(_batch_items(checks)),
    }


def _batch_items(batches: Sequence[Batch]) -> Iterator[tuple[str, Any]]:
    for batch in batches:
        yield "size", batch.size
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
class _Done:
    """A finished step: its point and plan (None where an earlier step gave the same plan), and the scale after it."""

    step: str
    scale: float
    point: FrontierPoint | None
    plan: Plan | None


class _State:
    """What a run has finished, and how it is kept."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        self.done: list[_Done] = []
        self.totals: dict[str, Any] = {}
        self.notes: list[str] = []

    def report(self) -> FrontierReport:
        """The finished points by size."""
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
        if not isinstance(steps, list) or not isinstance(data.get("totals"), dict):
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
            self.done.append(_Done(item["step"], item["scale"], point, plan))
        self.totals = data["totals"]
        self.notes = [str(note) for note in data.get("notes", [])]

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


def _steps(budgets: Sequence[float], options: Options) -> list[str]:
    """What is measured, in order; the uniform formats first, since they calibrate the predictions."""
    uniform = []
    if "int8" in options.formats and not options.overrides:
        modes = ("int8", "float") if options.activations == "auto" else (options.activations,)
        uniform = [f"uniform {mode}" for mode in modes]
    return [*uniform, *(f"budget {budget!r}" for budget in budgets)]


def _measure(
    model: nn.Module,
    batches: Sequence[Batch] | None,
    checks: Sequence[Batch] | None,
    budgets: Sequence[float],
    options: Options,
    state: _State,
    folder: Path | None,
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
        "samples": sample_count(verification) if options.metric != "weight" else 0,
        "seed": options.seed,
        "versions": {"lowrank": __version__, "torch": str(torch.__version__)},
    }
    state.notes = list(job.notes)
    uniform = dict(zip(_steps((), options), uniform_plans(job, options), strict=True))
    steps = _steps(budgets, options)
    scale = state.done[-1].scale if state.done else 1.0
    pending = steps[len(state.done) :]
    for step in tqdm(pending, desc="frontier", unit="point", delay=2, disable=not options.progress):
        if step in uniform:
            label, plan = uniform[step]
            budget = None
            scale = _corrected(plan, search(job.bench.install_plan(plan)), scale, options) if not state.done else scale
        else:
            budget = budgets[steps.index(step) - len(uniform)]
            label, (plan, scale) = f"budget {budget:.3g}", _plan_for(job, budget, scale, search, options)
        known = [item for item in state.done if item.plan is not None and _key(item.plan) == _key(plan)]
        if known:
            state.done.append(_Done(step, scale, None, None))
        else:
            reading = verify(job.bench.install_plan(plan)) if plan.error > 0.0 else Reading(0.0, math.inf)
            upper = reading.upper if math.isfinite(reading.upper) and state.totals["samples"] else None
            error = reading.value if math.isfinite(reading.value) else None
            point = None
            if error is not None:
                made = frontier_point(plan, rest, before, error, True, budget, label)
                point = replace(made, upper=upper)
            state.done.append(_Done(step, scale, point, plan if point is not None else None))
        if folder is not None:
            state.write(folder)


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
