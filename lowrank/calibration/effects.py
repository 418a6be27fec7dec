"""What other layers in the layers' places cost the model's output, to first order, for all layers in one sweep."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.calibration.batches import Batch
from lowrank.calibration.gradients import DIRECTIONS, differentiable, differentiated, watchable
from lowrank.calibration.metrics.sums import position_mask
from lowrank.calibration.outputs import OutputFn
from lowrank.errors import CalibrationError

__all__ = ["BREAKING", "Difference", "local_effects"]

# What one layer computes otherwise than the other: (the module that stands for a target's member, what it is compared with), by the
# member's name. ``None`` is the layer as it is.
Difference = Mapping[str, tuple[nn.Module, nn.Module | None]]
# The differences of every layer are kept until the gradients arrive: so many samples at a time bound what that takes.
SAMPLES_AT_ONCE = 16
# What a model may raise that finds something else than the layer it knows.
BREAKING = (AttributeError, TypeError, RuntimeError, ValueError, LookupError, AssertionError, CalibrationError)
# Random directions for each sample: every one is an estimate with one degree of freedom.
DRAWS = 2


def local_effects(
    model: nn.Module,
    batches: Sequence[Batch],
    differences: Mapping[str, Sequence[Difference]],
    *,
    sizes: Mapping[str, float],
    directions: str = "output",
    output_fn: OutputFn | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Estimate what each difference of each target adds to the model's error, to first order: E (gᵀ δ)², summed over samples.

    While the model runs as it is, every other layer is run on the same inputs; δ is what it gives otherwise, over all positions of a
    sample. g is the gradient at the layer's outputs of ⟨v, y⟩ for a random direction v, so that E (gᵀ δ)² = ‖J δ‖²: what the output y
    moves by. One forward and ``draws`` backward passes tell it for all targets, and no layer is replaced. Correlations between
    positions and the rounding of activations are in δ, and no statistic of the layer is needed: it works for any module that gives
    floating tensors.

    Args:
        model: run in evaluation mode; it may keep what it computes.
        batches: from :func:`lowrank.calibration.preparing.prepare_batches`.
        differences: of each target, by its name.
        sizes: what the error of each output is relative to, summed over the batches; only these outputs count.
        directions: one of :data:`lowrank.calibration.gradients.DIRECTIONS`; with ``"labels"`` the cost is in nats.
        output_fn: picks the tensor out of the model's output.
        draws: of directions for each sample.
        seed: of the directions.

    Returns:
        An effect for each difference, in the unit in which contributions add up; a target that no gradient reached, or
        whose other layers cannot be called as it is, is absent.

    Raises:
        RuntimeError: torch's own, where the model cannot be differentiated.

    Example:
        >>> model, other = nn.Sequential(nn.Linear(3, 2)), nn.Linear(3, 2)
        >>> batch = Batch((torch.ones(64, 3),), size=64)
        >>> found = local_effects(model, [batch], {"0": [{"0": (other, None)}]}, sizes={"output": 1.0}, draws=64)
        >>> exact = float((model(torch.ones(64, 3)) - other(torch.ones(64, 3))).detach().square().sum())
        >>> 0.9 < found["0"][0] / exact < 1.1
        True
    """
    sweep = _Sweep(differences)
    generator = torch.Generator().manual_seed(seed)
    with contextlib.ExitStack() as stack:
        stack.enter_context(differentiable(model))
        for name, owners in sweep.owners.items():
            module = model.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(sweep.before(name), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(sweep.after(name, owners)).remove)
        for piece in (piece for batch in batches for piece in batch.pieces(SAMPLES_AT_ONCE)):
            sweep.samples = piece.size
            outputs = differentiated(piece.run(model), output_fn, every=directions == "output")
            wanted = [(path, tensor) for path, tensor in outputs.items() if path in sizes]
            for draw in range(draws if wanted else 0):
                back = []
                for path, tensor in wanted:
                    drawn = DIRECTIONS[directions](tensor, position_mask(tensor, piece), generator)
                    # Half the Fisher information is what a small change costs in nats.
                    whole = sizes[path] * (1.0 if directions == "output" else 2.0)
                    back.append(drawn / max(whole, 1e-300) ** 0.5 if whole > 0.0 else drawn)
                torch.autograd.backward([tensor for _, tensor in wanted], back, retain_graph=draw + 1 < draws)
                sweep.close()
            sweep.forget()
    told = sweep.arrived - sweep.failed
    return {name: [total / draws for total in totals] for name, totals in sweep.totals.items() if name in told}


class _Sweep:
    """Hooks that run the other layers beside the model's own, and what the gradients make of the differences."""

    def __init__(self, differences: Mapping[str, Sequence[Difference]]) -> None:
        self.differences = differences
        self.totals = {name: [0.0] * len(each) for name, each in differences.items()}
        self.arrived: set[str] = set()
        self.failed: set[str] = set()
        self.samples = 1
        # Targets by the members that are hooked; a tied weight has several.
        self.owners: dict[str, list[str]] = {}
        for target, each in differences.items():
            for member in dict.fromkeys(name for difference in each for name in difference):
                self.owners.setdefault(member, []).append(target)
        self._others: dict[str, list[list[tuple[Tensor, ...]]]] = {}
        self._sums: dict[tuple[str, int], Tensor] = {}

    def before(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        """Run the other layers before the layer itself, which may write to its inputs."""

        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            found: dict[int, list[Tensor]] = {}
            with torch.no_grad():
                for target in self.owners[name]:
                    for difference in self.differences[target]:
                        for each in difference.get(name, ()):
                            if each is None or id(each) in found or target in self.failed:
                                continue
                            try:
                                found[id(each)] = _floating(each(*_copied(args), **_copied(kwargs)))
                            except BREAKING:
                                # Called in a way that only the layer itself takes: measuring will tell.
                                self.failed.add(target)
            self._others.setdefault(name, []).append(found)  # type: ignore[arg-type]

        return hook

    def after(self, name: str, owners: Sequence[str]) -> Callable[[nn.Module, Any, Any], Any]:
        """Watch the gradients at the layer's outputs."""

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            others: Any = self._others[name].pop()
            if not torch.is_grad_enabled():
                # Within the model's own torch.no_grad: what comes of it is seen by measuring.
                return output
            own = [tensor.detach() for tensor in _floating(output)]
            deltas: list[list[tuple[str, int, Tensor]]] = [[] for _ in own]
            for target in owners:
                for index, difference in enumerate(self.differences[target]):
                    if name not in difference or target in self.failed:
                        continue
                    layer, against = difference[name]
                    left = others[id(layer)]
                    right = own if against is None else others[id(against)]
                    for place, (one, other) in enumerate(zip(left, right, strict=True)):
                        deltas[place].append((target, index, one.to(torch.float32) - other.to(torch.float32)))
            places = iter(range(len(own)))

            def watch(tensor: Tensor) -> Tensor:
                place = next(places)
                watched = watchable(tensor)
                watched.register_hook(lambda gradient: self._add(gradient, deltas[place]))
                return watched

            return _mapped(output, watch)

        return hook

    def _add(self, gradient: Tensor, deltas: Sequence[tuple[str, int, Tensor]]) -> None:
        gradient = gradient.detach().to(torch.float32)
        # Dimension 0 counts samples, alone or with positions; else all samples together are one draw.
        rows = self.samples if gradient.ndim and gradient.shape[0] % self.samples == 0 and gradient.numel() else 1
        flat = gradient.reshape(rows, -1)
        for target, index, delta in deltas:
            self.arrived.add(target)
            products = torch.linalg.vecdot(flat, delta.reshape(rows, -1)).double().cpu()
            key = target, index
            known = self._sums.get(key)
            if known is not None and known.shape != products.shape:
                known, products = known.sum().reshape(1), products.sum().reshape(1)
            self._sums[key] = products if known is None else known + products

    def close(self) -> None:
        """Square what one draw gave."""
        for (target, index), sums in self._sums.items():
            self.totals[target][index] += float(sums.square().sum())
        self._sums.clear()

    def forget(self) -> None:
        """Drop what belongs to the calls of a batch."""
        self._others.clear()


def _copied(value: Any) -> Any:
    """Copies of the tensors of a call, without their graph."""
    return _mapped(value, lambda tensor: tensor.detach().clone(), every=True)


def _floating(output: Any) -> list[Tensor]:
    """The floating tensors of a layer's output, in order."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _mapped(output, keep)
    return found


def _mapped(value: Any, fn: Callable[[Tensor], Tensor], *, every: bool = False) -> Any:
    """Nested tuples, lists and dicts with their floating (or all) tensors mapped; anything else as it is."""
    if isinstance(value, Tensor):
        return fn(value) if every or value.is_floating_point() else value
    if isinstance(value, tuple):
        parts = [_mapped(item, fn, every=every) for item in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if type(value) is list:
        return [_mapped(item, fn, every=every) for item in value]
    if type(value) is dict:
        return {key: _mapped(item, fn, every=every) for key, item in value.items()}
    return value
