"""What an error in each layer costs the model: second moments of gradients, without labels."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.calibration.batches import Batch
from lowrank.calibration.inputs import no_fast_path
from lowrank.calibration.metrics.sums import position_mask
from lowrank.calibration.observers import AnyObserver, observer_of
from lowrank.calibration.outputs import OutputFn, measured_tensors, model_tensor
from lowrank.calibration.untouched import in_evaluation, untouched
from lowrank.errors import UsageError

__all__ = ["DIRECTIONS", "Directions", "differentiated", "output_gradients"]

# From the output, its mask of padding (or None) and a generator to what is back-propagated, of the output's shape.
Directions = Callable[[Tensor, Tensor | None, torch.Generator], Tensor]
# Activations are kept for the backward pass: so many samples at a time bound what that takes.
SAMPLES_AT_ONCE = 16


def output_gradients(
    model: nn.Module,
    batches: Sequence[Batch],
    targets: Mapping[str, nn.Module],
    *,
    directions: str | Directions = "output",
    output_fn: OutputFn | None = None,
    observers: Mapping[str, AnyObserver] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Gather the second moment C of the gradients with respect to each layer's outputs: an error ΔW costs about ½ tr(C ΔW Σ ΔWᵀ).

    One gradient is of one position (a token, a pixel); their products are summed over the positions of a sample and averaged over
    samples, so that layers with more positions count for more. Padding is left out. Neither values nor flags of the model change.

    What is back-propagated from the output y is, by ``directions``:

    * ``"output"``: random directions, independent for every number (Gauss-Newton of ‖Δy‖²).
    * ``"labels"``: ``softmax(y) − onehot(c)`` with c drawn from ``softmax(y)`` (Fisher information: the cost is in nats).
    * a function of the caller's own: (output, mask or ``None``, generator) to a tensor like the output.

    Args:
        model: run in evaluation mode.
        batches: from :func:`lowrank.calibration.batches.prepare_batches`.
        targets: linear layers and convolutions by name.
        observers: of these, which say what a row is; else those that fit torch's layers.
        directions: see above.
        output_fn: picks the tensor out of the model's output.
        seed: of the directions.

    Returns:
        (out, out) float64 by name; a layer that the output does not depend on is absent.

    Raises:
        UsageError: unknown directions.
        RuntimeError: torch's own, where the model cannot be differentiated.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2))
        >>> output_gradients(model, [Batch((torch.ones(5, 3),), size=5)], {"0": model[0]})["0"].shape
        torch.Size([2, 2])
    """
    if isinstance(directions, str) and directions not in DIRECTIONS:
        raise UsageError(f"directions: must be one of {', '.join(DIRECTIONS)}, got {directions!r}")
    drawn = DIRECTIONS[directions] if isinstance(directions, str) else directions
    observed = {name: observer_of(module) for name, module in targets.items()} if observers is None else observers
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, Tensor] = {}
    samples = max(sum(batch.size for batch in batches), 1)
    current = Batch(())

    def watch(name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def add(gradient: Tensor) -> None:
            rows = observed[name].gradient_rows(gradient, current, name)
            # A batch is short: its products keep enough digits, their sum over batches is float64.
            sums[name] = sums.get(name, 0.0) + (rows.T @ rows).double()

        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            watched = watchable(output)
            if not watched.requires_grad:
                # Within the model's own torch.no_grad.
                return output
            watched.register_hook(add)
            return watched

        return hook

    with contextlib.ExitStack() as stack:
        stack.enter_context(differentiable(model))
        for name, module in targets.items():
            stack.callback(module.register_forward_hook(watch(name)).remove)
        for current in (piece for batch in batches for piece in batch.pieces(SAMPLES_AT_ONCE)):
            outputs = list(differentiated(current.run(model), output_fn, every=directions == "output").values())
            if outputs:
                back = [drawn(output, position_mask(output, current), generator) for output in outputs]
                if len(outputs) > 1:
                    # Each output's error counts by its own size.
                    back = [
                        each / _positive(output.detach().norm()) for each, output in zip(back, outputs, strict=True)
                    ]
                torch.autograd.backward(outputs, back)
    return {name: sums[name] / samples for name in targets if name in sums}


@contextlib.contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Let gradients flow between a model's layers and into no parameter; values, flags and modes are afterwards as they were."""
    with contextlib.ExitStack() as stack:
        # Also what the model keeps of a run: with its graph it could not even be copied.
        stack.enter_context(untouched(model))
        stack.enter_context(in_evaluation(model))
        for parameter in model.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        stack.enter_context(no_fast_path())
        stack.enter_context(torch.enable_grad())
        yield


def watchable(output: Tensor) -> Tensor:
    """Give a layer's output as a tensor whose gradient can be seen."""
    # A copy where the chain begins: what comes next may work in place, which a leaf does not allow.
    return output if output.requires_grad else output.detach().requires_grad_(True).clone()


def differentiated(output: Any, output_fn: OutputFn | None, *, every: bool) -> dict[str, Tensor]:
    """Give the tensors of an output that can be back-propagated from, by their path.

    Args:
        every: all floating tensors; else the main one, as ``"output"``.
    """
    if every or output_fn is not None:
        found = measured_tensors(output, output_fn)
    else:
        found = {"output": model_tensor(output)}
    return {path: tensor for path, tensor in found.items() if tensor.requires_grad}


def _positive(norm: Tensor) -> Tensor:
    return torch.where(norm > 0.0, norm, torch.ones_like(norm))


def _gaussian(output: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
    return _inside(torch.randn(output.shape, generator=generator).to(output.device, output.dtype), mask)


def _drawn_labels(output: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
    shares = output.detach().float().softmax(dim=-1)
    # The first whose cumulative share passes a random number: the generator is on the CPU, the model may not be.
    passed = torch.rand((*shares.shape[:-1], 1), generator=generator).to(shares.device)
    drawn = (shares.cumsum(dim=-1) < passed).sum(dim=-1, keepdim=True).clamp_max(shares.shape[-1] - 1)
    return _inside(shares.scatter_add(-1, drawn, -torch.ones_like(passed)).to(output.dtype), mask)


def _inside(found: Tensor, mask: Tensor | None) -> Tensor:
    """Zeros on padding, where the output has positions."""
    if mask is None or found.ndim != 3 or mask.shape != found.shape[:2]:
        return found
    return found * mask[:, :, None].to(found.dtype)


DIRECTIONS: dict[str, Directions] = {"output": _gaussian, "labels": _drawn_labels}
