"""``objective="latency"``: candidates priced by the seconds that the timing table predicts, none slower than dense."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lowrank import kernels
from lowrank.calibration.batches import Batch, evaluating
from lowrank.calibration.inputs import no_fast_path
from lowrank.compression.candidates import LayerChoices
from lowrank.compression.formats import DENSE
from lowrank.compression.layer_data import LayerData
from lowrank.compression.plan import Plan
from lowrank.compression.timings import TimingTable
from lowrank.errors import UsageError
from lowrank.layers.spec import LayerSpec
from lowrank.targets import kind_of

__all__ = ["Speed", "record_calls", "speed_of"]

# Of several choices that take equally long (look-ups in tables of any format) the smaller one: a gigabyte counts as a
# nanosecond, less than any table can tell apart.
_SECONDS_PER_BYTE = 1e-18
# Batches that are run to see how many tokens a call brings; they are alike.
_BATCHES = 16


def record_calls(
    model: nn.Module, batches: Sequence[Batch], modules: Mapping[str, nn.Module]
) -> dict[str, dict[int, float]]:
    """Count how many calls of how many rows (tokens, padding included) one forward makes of each module, on average.

    Args:
        model: runs the batches; its modes and hooks are as before afterwards.
        batches: at least one.
        modules: by name.

    Returns:
        ``{name: {rows: calls per forward}}``; look-ups of an embedding and positions of a convolution's output count
        as rows.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(3, 2))
        >>> record_calls(model, [Batch((torch.zeros(4, 5, 3),))], {"0": model[0]})
        {'0': {20: 1.0}}
    """
    calls: dict[str, Counter[int]] = {name: Counter() for name in modules}
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(no_fast_path())
        for name, module in modules.items():

            def count(module: nn.Module, _: Any, output: Any, name: str = name) -> None:
                if isinstance(output, Tensor):
                    kind = kind_of(module)
                    rows = (
                        output.numel() // max(int(output.shape[-1]), 1) if kind is None else kind.rows(module, output)
                    )
                    calls[name][rows] += 1

            stack.callback(module.register_forward_hook(count).remove)
        for batch in batches:
            batch.run(model)
    return {name: {rows: n / len(batches) for rows, n in sorted(found.items())} for name, found in calls.items()}


@dataclass(frozen=True)
class Speed:
    """What every choice of every target takes in one forward, as far as the table knows.

    Attributes:
        table: of a machine.
        calls: from :func:`record_calls`, by the name of each target's members.
    """

    table: TimingTable
    calls: Mapping[str, Mapping[int, float]]

    def seconds(self, data: LayerData, spec: LayerSpec) -> float | None:
        """Predict the seconds of this target in one forward; ``None`` where the table does not know such a layer.

        A look-up in an embedding table counts as nothing in any format that only looks up.
        """
        total = 0.0
        for member in data.target.members:
            kind = kind_of(member.module)
            if kind is None:
                return None
            if not kind.multiplies:
                if spec.rank is not None:
                    return None
                continue
            prefix = kind.timed_as(member.module)
            # Kernels cut in two along their sides were never timed; what was is the first way of cutting.
            if prefix is None or spec.scheme not in (None, data.schemes[0]):
                return None
            dtype = str(data.weight.dtype).removeprefix("torch.")
            for rows, count in self.calls.get(member.name, {}).items():
                one = self.table.seconds(
                    prefix + spec.format, spec.activations, dtype, rows, data.rows, data.columns, spec.rank
                )
                if one is None:
                    return None
                total += count * one
        return total

    def priced(self, choices: Sequence[LayerChoices], layers: Mapping[str, LayerData]) -> list[LayerChoices]:
        """Give the candidates that are not slower than dense, with seconds as their cost.

        A layer whose choice was forced by ``overrides`` keeps all of its candidates; one that the table does not know
        keeps only dense.
        """
        return [self._priced(layer, layers[layer.name]) for layer in choices]

    def _priced(self, layer: LayerChoices, data: LayerData) -> LayerChoices:
        limit = self.seconds(data, DENSE)
        free = not all(candidate.compressed for candidate in layer.candidates)
        kept = []
        for candidate in layer.candidates:
            seconds = self.seconds(data, candidate.spec)
            if free and candidate.compressed and (seconds is None or limit is None or seconds > limit):
                continue
            kept.append(replace(candidate, cost=(seconds or 0.0) + _SECONDS_PER_BYTE * candidate.bytes))
        return replace(layer, candidates=tuple(kept))

    def summary(self, plan: Plan, layers: Mapping[str, LayerData]) -> dict[str, Any]:
        """Predicted seconds of the targets in one forward, dense and as planned, and by which table."""
        before = after = 0.0
        for entry in plan.entries:
            dense = self.seconds(layers[entry.name], DENSE)
            planned = self.seconds(layers[entry.name], entry.spec)
            if dense is not None and planned is not None:
                before, after = before + dense, after + planned
        return {
            "predicted_seconds_dense": before,
            "predicted_seconds": after,
            "predicted_speedup": before / after if after > 0.0 else 1.0,
            "timings": self.table.name,
        }

    def notes(self, layers: Mapping[str, LayerData], threads: int) -> list[str]:
        """Say what the reader of a report should know about the prices."""
        rows = sorted({rows for calls in self.calls.values() for rows in calls})
        told = [
            f"objective latency: by timings {self.table.name}, at {_span(rows)} rows a call as in the calibration data"
        ]
        if self.table.host.get("threads") != threads:
            told.append(
                f"the timings were taken with {self.table.host.get('threads')} threads, this process has {threads}: "
                "lowrank benchmark --tune measures this machine"
            )
        route = kernels.route()
        if self.table.host.get("route") != route:
            told.append(
                f"the timings are of integer route {self.table.host.get('route')}, layers take {route} here: "
                "lowrank benchmark --tune measures this machine"
            )
        unknown = [name for name, data in layers.items() if self.seconds(data, DENSE) is None]
        if unknown:
            shown = ", ".join(unknown[:6]) + (f" and {len(unknown) - 6} more" if len(unknown) > 6 else "")
            told.append(f"kept dense, since there are no timings for layers of their kind and dtype: {shown}")
        return told


def _span(rows: Sequence[int]) -> str:
    return "no" if not rows else f"{rows[0]:,}" if len(rows) == 1 else f"{rows[0]:,} to {rows[-1]:,}"


def speed_of(model: nn.Module, batches: Sequence[Batch], layers: Mapping[str, LayerData], table: TimingTable) -> Speed:
    """Run a few of the batches and look up what the targets are called with.

    Raises:
        UsageError: the model is not on a CPU, which is what the table is of.
    """
    modules = {member.name: member.module for data in layers.values() for member in data.target.members}
    away = next((data.name for data in layers.values() if data.weight.device.type != "cpu"), None)
    if away is not None:
        device = layers[away].weight.device
        raise UsageError(f'objective="latency": the timings are of a CPU, but layer {away} is on {device}; use "size"')
    return Speed(table, record_calls(model, _some(batches), modules))


def _some(batches: Sequence[Batch]) -> list[Batch]:
    count = min(len(batches), _BATCHES)
    return [batches[index * len(batches) // count] for index in range(count)]
