"""The points of this package: uniform plans of each bit width, and what ``compress_model`` chooses."""

from __future__ import annotations

from typing import Any

from compared_models import Subject, stored
from torch import nn

import lowrank
from lowrank.compression.formats.packed import MOST_BITS_WITH_ZERO
from lowrank.compression.plan import Plan, PlanEntry
from lowrank.layers.spec import LayerSpec
from lowrank.targets import kind_of


def uniform(subject: Subject, scope: str, bits: int, group: int | None, rounding: str) -> nn.Module:
    """Give every matrix of the scope the same bits; tables, which have no inputs, are rounded to nearest."""
    entries = []
    for name in subject.scopes[scope]:
        module = subject.model.get_submodule(name)
        table = subject.is_table(name)
        spec = LayerSpec(
            f"int{bits}",
            bits=bits,
            activations=None if table else "float",
            group=group,
            # Int8 in rows, the fastest format, is rounded to nearest.
            rounding=None if table or (bits == 8 and group is None) else rounding,
            zero_point=True if bits <= MOST_BITS_WITH_ZERO else None,
        )
        kind = kind_of(module)
        assert kind is not None
        entries.append(PlanEntry(name, kind.name, tuple(module.weight.shape), spec, 0, 0.0))
    # Without this no gradients are gathered, and two-sided rounding has one side.
    metadata = {"loss_aware": "output"} if rounding == "two-sided" else {}
    return lowrank.apply_plan(subject.model, Plan(tuple(entries), metadata=metadata), calibration=subject.calibration)


def share(subject: Subject, scope: str, model: nn.Module) -> float:
    """Bytes of the scope's matrices, or of every tensor, after / before; biases stay and are left out of a scope of matrices."""
    if scope == "file":
        return stored(model) / subject.dense_bytes("file")
    after = 0
    for name in subject.scopes[scope]:
        tensors = model.get_submodule(name).state_dict()
        after += sum(tensor.nbytes for key, tensor in tensors.items() if key != "bias")
    return after / subject.dense_bytes(scope)


def planned(subject: Subject, scope: str, seed: int, **budget: float) -> tuple[nn.Module, dict[str, Any]]:
    """Let the planner choose under a budget of errors (``error_budget``) or of bytes (``size_budget``)."""
    left_out = [name for name in subject.scopes["file"] if name not in subject.scopes[scope]]
    result = lowrank.compress_model(
        subject.model,
        calibration=subject.calibration,
        ignore=tuple(left_out),
        activations="float",
        seed=seed,
        progress=False,
        **budget,  # type: ignore[arg-type]
    )
    formats: dict[str, int] = {}
    for entry in result.plan.entries:
        formats[entry.format] = formats.get(entry.format, 0) + 1
    return result.model, {"promised": result.report.totals["error_upper"], "formats": formats}
