"""What compressing would make of a model at named budgets, planned as :func:`lowrank.compress_model` plans.

Without data by its "weight" metric, from each weight alone; with data by its "output" metric, from probes of the model. The
candidates, their sizes and predicted errors and the choice among them are those of the compression itself; only its search and its
verification are left out.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.checkpoint.manifest import MANIFEST_NAME, open_checkpoint
from lowrank.compression.allocation import Allocator
from lowrank.compression.candidates import LayerChoices
from lowrank.compression.compress import prepare
from lowrank.compression.formats import DENSE, FORMATS
from lowrank.compression.layer_data import LayerData
from lowrank.compression.options import Options
from lowrank.compression.plan import Plan, PlanEntry
from lowrank.compression.prepare import find_work
from lowrank.compression.probes import computed_costs, layer_choices
from lowrank.errors import CalibrationError, UsageError
from lowrank.layers import compressed_layers
from lowrank.layers.base import INTEGER_ACTIVATIONS
from lowrank.targets.survey import Target, survey

__all__ = ["Outlook", "WeightPlanner", "compressed_formats", "kept_batches", "outlook_of_module"]

# Where probes measure truncation, which they do about where one budget would put it: the middle one of the usual three.
PROBED_BUDGET = 0.05


@dataclass(frozen=True)
class Outlook:
    """Say what compressing would choose.

    Attributes:
        plans: (budget, plan) with budgets ascending.
        dense_bytes: of each target as it is, by its name.
        metric: "weight" or "output": what the budgets are on.
        owners: by the name of every module of a target (tied ones too), the target's.
        left: by the name of a module that cannot be replaced, why.
        refused: why compressing would refuse the model, or its data; ``None`` where it would not.
        from_file: only tensors are known, not the modules that read them.
    """

    plans: tuple[tuple[float, Plan], ...] = ()
    dense_bytes: Mapping[str, int] = field(default_factory=dict)
    metric: str = "weight"
    owners: Mapping[str, str] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
    refused: str | None = None
    from_file: bool = False

    def entries(self, name: str) -> list[tuple[float, PlanEntry]]:
        """Give what becomes of a module at each budget; nothing where it is no target."""
        target = self.owners.get(name)
        return [] if target is None else [(budget, plan.entry(target)) for budget, plan in self.plans]

    def ratio(self, plan: Plan, whole: int) -> float | None:
        """Give stored bytes after / before of a model of so many bytes."""
        return (whole - sum(self.dense_bytes.values()) + plan.bytes) / whole if whole else None

    def totals(self, whole: int) -> dict[str, Any]:
        """Give, for a report's totals, the formats and the size of a model of so many bytes at each budget."""
        plans = {
            str(budget): {"formats": self.formats(plan), "size_ratio": self.ratio(plan, whole)}
            for budget, plan in self.plans
        }
        return {"plans": plans, "plans_metric": self.metric}

    def notes(self) -> list[str]:
        """Say what the plans rest on, and what compressing would refuse."""
        notes = [] if self.refused is None else [f"compressing would refuse this: {self.refused}"]
        if self.plans and self.metric == "weight":
            notes.append(
                "What compress would choose is by the weights alone, as where it is given no data: data tell what flows into each "
                "layer and what an error of it costs the output, and then the choice may be another, often with more low rank."
            )
        return notes

    def formats(self, plan: Plan) -> dict[str, int]:
        """Count the layers by format, the commonest first."""
        return dict(
            sorted(Counter(entry.format for entry in plan.entries).items(), key=lambda item: (-item[1], item[0]))
        )


class SpectralData(LayerData):
    """Know a weight by its singular values alone: no factors are made, and what rounding adds to them is estimated.

    Args:
        target: of one weight.
        sigma: (min(out, in · kernel),) singular values of the weight as a matrix.
    """

    def __init__(self, target: Target, sigma: Tensor) -> None:
        super().__init__(target)
        squares = sigma.to(torch.float64).square()
        whole = squares.sum().clamp_min(torch.finfo(torch.float64).tiny)
        self._shares = squares / whole

    @property
    def schemes(self) -> tuple[str | None, ...]:
        """The one way to cut the weight that its singular values speak of."""
        return super().schemes[:1]

    def errors(self, scheme: str | None) -> Tensor:
        """Give the relative error of the best factors of each rank."""
        tails = torch.flip(torch.cumsum(torch.flip(self._shares, [0]), 0), [0])
        return torch.cat([tails, tails.new_zeros(1)]).clamp(0.0, 1.0).sqrt()

    def factor_rounding(self, scheme: str | None) -> Tensor | None:
        """Estimate what rounding adds: of n normal numbers the largest is about √(2 ln n), and 127 steps reach that far."""
        spread = 2.0 * (math.log(max(self.rows, 2)) + math.log(max(self.columns, 2)))
        lost = self._shares * (spread / (12.0 * 127.0**2))
        return torch.cat([lost.new_zeros(1), torch.cumsum(lost, 0)])


class WeightPlanner:
    """Plan by the "weight" metric from one weight after the other, none of which is kept.

    Example:
        >>> planner = WeightPlanner()
        >>> planner.add("fc", torch.eye(64))
        >>> planner.outlook((0.02,)).plans[0][1].entry("fc").format
        'int8'
    """

    def __init__(self) -> None:
        self._choices: list[tuple[LayerChoices, float]] = []
        self._dense: dict[str, int] = {}

    def add(self, name: str, weight: Tensor, sigma: Tensor | None = None) -> None:
        """Take a weight that a file holds: (out, in), or (out, in, *kernel) of a convolution in 1 or 2 dimensions.

        Args:
            sigma: its singular values, where they are known.
        """
        self.add_target(survey(nn.Sequential(_layer_of(weight))).targets[0], sigma, name)

    def add_target(self, target: Target, sigma: Tensor | None = None, name: str | None = None) -> None:
        """Take a target, with the singular values of its weight where they are known."""
        data = LayerData(target) if sigma is None else SpectralData(target, sigma)
        (costs,) = computed_costs([data]).values()
        choices = layer_choices(data, costs, tuple(FORMATS), INTEGER_ACTIVATIONS)
        choices = choices if name is None else replace(choices, name=name)
        self._choices.append((choices, data.square_sum))
        self._dense[choices.name] = FORMATS[DENSE.format].stored_bytes(data, DENSE)

    def outlook(self, budgets: Sequence[float], **known: Any) -> Outlook:
        """Plan for each budget on √(Σ‖ΔW‖² / Σ‖W‖²).

        Args:
            known: ``owners`` and ``left`` of :class:`Outlook`; without owners each layer is its own.
        """
        whole = math.fsum(square for _, square in self._choices) or 1.0
        shared = [
            replace(
                choices,
                candidates=tuple(replace(item, error=item.error * square / whole) for item in choices.candidates),
            )
            for choices, square in self._choices
        ]
        known.setdefault("owners", {name: name for name in self._dense})
        return Outlook(_plans(Allocator(shared, {}), Options(metric="weight"), budgets), dict(self._dense), **known)


def outlook_of_module(
    model: nn.Module,
    budgets: Sequence[float],
    *,
    calibration: Iterable[Any] | None = None,
    ignore: Sequence[str] = (),
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    sigma: Mapping[str, Tensor] | None = None,
    progress: bool = False,
) -> Outlook:
    """Plan for a model as compressing it would, from its weights alone or, with calibration data, from probes.

    What compressing would refuse is said and not raised: a model of which no layer can be replaced, or has too few samples.

    Args:
        budgets: on the error, ascending.
        calibration: batches.
        ignore: globs over module names.
        forward_fn: runs the model on a batch, where calling it does not.
        sigma: singular values of weights by the module's name, to be used where there are no data.

    Example:
        >>> outlook_of_module(nn.Sequential(nn.LSTM(4, 4)), (0.1,)).plans[0][1].entry("0").format
        'mixed'
    """
    options = Options(
        metric="weight" if calibration is None else "output",
        error_budget=PROBED_BUDGET,
        ignore=ignore,
        forward_fn=forward_fn,
        progress=progress,
        on_nonfinite="copy",
    ).checked(calibrated=calibration is not None)
    try:
        found = find_work(model, options)
    except UsageError as error:
        left = {name: item.reason for item in survey(model, ignore=ignore).skipped for name in item.member.names}
        return Outlook(left=left, refused=str(error))
    owners = {name: target.name for target in found.targets for member in target.members for name in member.names}
    known: dict[str, Any] = {
        "owners": owners,
        "left": {name: item.reason for item in found.skipped for name in item.member.names},
    }
    refused = None
    if calibration is not None:
        try:
            prepared, _ = prepare(model, calibration, None, options, probing=True)
        except (CalibrationError, UsageError) as error:
            refused = str(error)
        else:
            layers = prepared.copy.layers
            dense = {name: FORMATS[DENSE.format].stored_bytes(data, DENSE) for name, data in layers.items()}
            known["left"] = {name: item.reason for item in prepared.survey.skipped for name in item.member.names}
            plans = _plans(Allocator(prepared.choices, {}), options, budgets)
            return Outlook(plans, dense, metric="output", **known)
    planner = WeightPlanner()
    for target in found.targets:
        # Of grouped convolutions the blocks are factored, of several matrices none.
        whole = not target.kind.composite and getattr(target.owner, "groups", 1) == 1
        planner.add_target(target, (sigma or {}).get(target.name) if whole else None)
    return replace(planner.outlook(budgets, **known), refused=refused)


def compressed_formats(subject: nn.Module | str | os.PathLike[str]) -> dict[str, int]:
    """Count the layers that are compressed already by their format; of a model, or of a directory that ``save`` wrote.

    Example:
        >>> compressed_formats(nn.Linear(2, 2))
        {}
    """
    if isinstance(subject, nn.Module):
        formats = [layer.format for layer in compressed_layers(subject).values()]
    elif os.path.isfile(os.path.join(subject, MANIFEST_NAME)):
        formats = [str(layer.get("format")) for layer in open_checkpoint(Path(subject))[0].layers.values()]
    else:
        return {}
    return dict(sorted(Counter(formats).items()))


def kept_batches(calibration: Iterable[Any]) -> Any:
    """Keep batches that an iterator would give once; what is no iterator is read again as it is."""
    return list(calibration) if isinstance(calibration, Iterator) else calibration


def _plans(allocator: Allocator, options: Options, budgets: Sequence[float]) -> tuple[tuple[float, Plan], ...]:
    if not allocator.choices:
        return ()
    return tuple((budget, allocator.plan(options.contribution(budget))) for budget in budgets)


def _layer_of(weight: Tensor) -> nn.Module:
    """A layer that holds a weight as it lies in a file, to ask its kind what it can become."""
    with torch.device("meta"):
        if weight.dim() == 2:
            layer: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        else:
            conv = nn.Conv1d if weight.dim() == 3 else nn.Conv2d
            layer = conv(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), bias=False)  # type: ignore[arg-type]
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer
