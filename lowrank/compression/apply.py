"""Making a plan's model again, or for another copy of the same weights: nothing is decided and nothing measured."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lowrank.calibration.batches import ForwardFn
from lowrank.calibration.groups import read_samples
from lowrank.calibration.metrics import METRICS
from lowrank.calibration.untouched import borrowed, set_modes
from lowrank.compression.lowered import geometries_of, plan_inside
from lowrank.compression.options import MOST_SEED, Options, default_metric
from lowrank.compression.plan import Plan
from lowrank.compression.prepare import fold_and_find, gather, planned, split_again
from lowrank.compression.working_copy import WorkingCopy
from lowrank.errors import CheckpointError, is_whole
from lowrank.integrations.methods import guard_methods
from lowrank.numerics.rounding_methods import TWO_SIDED
from lowrank.targets.lowering import lowered_again, raised
from lowrank.targets.model import unwrapped

__all__ = ["apply_plan"]

log = logging.getLogger("lowrank")


def apply_plan(
    model: nn.Module,
    plan: Plan,
    calibration: Iterable[Any] | None = None,
    *,
    output_fn: Callable[[Any], Tensor] | None = None,
    forward_fn: ForwardFn | None = None,
) -> nn.Module:
    """Make a copy of the model with the plan's layers in place; nothing is decided and nothing measured.

    With the calibration data that the plan was made with, the layers are the same to the last bit. Without any, factors come from
    the plain SVD and a message on the logger "lowrank" says so.

    Args:
        model: the one that the plan was made for; stays as it is.
        plan: from :func:`compress_model`, a file, or an edit by hand.
        calibration: batches, as for :func:`compress_model`.
        output_fn, forward_fn: those that the plan was made with, if any.

    Raises:
        LowRankError: the plan is for another model, or asks for something impossible.

    Example:
        >>> from lowrank.compression.compress import plan_model
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> plan = plan_model(model, error_budget=0.05, progress=False)
        >>> type(apply_plan(model, plan)[0]).__name__
        'QuantizedLinear'
    """
    metadata = plan.metadata
    seed = metadata.get("seed", 0)
    if not is_whole(seed, 0, MOST_SEED):
        raise CheckpointError(f"plan: metadata: seed must be an integer from 0, got {seed!r}")
    options = Options(
        seed=seed,
        progress=False,
        output_fn=output_fn,
        forward_fn=forward_fn,
        metric=default_metric(calibrated=calibration is not None and not _weights_only(metadata)),
        fold_batchnorm=bool(metadata.get("fold_batchnorm")),
    )
    if calibration is None:
        if metadata.get("data_aware") and any(entry.rank is not None for entry in plan.entries):
            log.warning(
                "apply_plan: the plan's factors were fitted to calibration data; without it they come from the plain SVD"
            )
    else:
        options = planned(options, metadata)
    if metadata.get("healed"):
        log.warning("apply_plan: the plan's model was healed afterwards, which applying the plan does not repeat")
    original = unwrapped(model)
    with borrowed(original) as modes:
        geometries = geometries_of(plan)
        inner = lowered_again(original, geometries) if geometries else original
        plan = plan_inside(plan, geometries)
        working, found, _ = fold_and_find(inner, options)
        batches = (
            None
            if calibration is None
            else read_samples(original, calibration, output_fn=output_fn, forward_fn=forward_fn)
        )
        split = split_again(batches, metadata) if batches is not None else None
        # What is fitted to the output's gradients: factors, and codes where the plan asks for it.
        factored = any(entry.rank is not None or entry.spec.rounding == TWO_SIDED for entry in plan.entries)
        copied = WorkingCopy(working, gather(working, found, split, options, factored=factored)[0])
        copied.install_plan(plan)
        finished = raised(copied.release())
    set_modes(finished, modes)
    return guard_methods(finished)


def _weights_only(metadata: Mapping[str, Any]) -> bool:
    """Whether a plan was made by its weights alone; a metric that is not known here was measured on data."""
    metric = METRICS.get(str(metadata.get("metric")))
    return metric is not None and metric.weights_only
