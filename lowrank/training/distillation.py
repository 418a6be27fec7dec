"""How far a model is from the one it stands for, as something to train on: hidden states and outputs, no labels."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank.calibration.batches import Batch
from lowrank.calibration.outputs import measured_tensors, model_tensor
from lowrank.layers import CompressedLayer
from lowrank.training.blocks import repeated_blocks

__all__ = ["Distillation", "tapped_modules"]

OutputFn = Callable[[Any], Tensor]
# Of the original's hidden states and outputs; beyond it they are computed again.
KEPT_BYTES = 2**30


def tapped_modules(compressed: nn.Module, original: nn.Module) -> list[str]:
    """Name the modules whose outputs are compared: repeated blocks that both models have; else the compressed layers.

    Example:
        >>> tapped_modules(nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2)))
        []
    """
    theirs = set(repeated_blocks(original))
    shared = [name for name in repeated_blocks(compressed) if name in theirs]
    if shared:
        return shared
    names = {name for name, _ in original.named_modules()}
    layers = [name for name, module in compressed.named_modules() if isinstance(module, CompressedLayer)]
    return [name for name in layers if name in names]


class Distillation:
    """The loss of a compressed model against its original on a batch.

    ``hidden_weight · mean over taps of ‖h' − h‖²/‖h − h̄‖² + mean over outputs of ‖f' − f‖²/‖f − f̄‖²``; where an output is logits,
    its term is KL(f ‖ f') in nats, and where it has positions, ``‖m' − m‖²/‖m‖²`` of its means over the positions is added:
    an error that is alike at all positions adds up there. Padding counts nowhere.

    Args:
        compressed, original: the models.
        hidden_weight: of the first term; 0 for none.
        output_fn: picks the tensor out of the model's output.
        again: batches that come more than once: what the original makes of them is kept, up to ``KEPT_BYTES``.
    """

    def __init__(
        self,
        compressed: nn.Module,
        original: nn.Module,
        hidden_weight: float,
        output_fn: OutputFn | None = None,
        again: Sequence[Batch] = (),
    ) -> None:
        self.compressed, self.original = compressed, original
        self.hidden_weight = hidden_weight
        self.output_fn = output_fn
        self.taps = tapped_modules(compressed, original) if hidden_weight else []
        self._again = {id(batch) for batch in again}
        self._room = KEPT_BYTES
        self._kept: dict[int, tuple[Batch, tuple[dict[str, Tensor], str | None, dict[str, Tensor]]]] = {}

    def loss(self, batch: Batch) -> Tensor:
        """Compute a scalar with a gradient; the original runs without one."""
        references, logits, wanted = self._of_original(batch)
        with _recorded(self.compressed, self.taps) as found:
            outputs = measured_tensors(batch.run(self.compressed), self.output_fn)
        terms = [
            self._of_output(outputs[path], reference, batch, path == logits) for path, reference in references.items()
        ]
        total = torch.stack(terms).mean() if len(terms) > 1 else terms[0]
        pairs = [(found[name], wanted[name]) for name in self.taps if name in found and name in wanted]
        pairs = [(ours, theirs) for ours, theirs in pairs if ours.shape == theirs.shape]
        if pairs:
            hidden = torch.stack([_relative(ours, theirs, _mask(theirs, batch)) for ours, theirs in pairs])
            total = total + self.hidden_weight * hidden.mean()
        return total

    def _of_original(self, batch: Batch) -> tuple[dict[str, Tensor], str | None, dict[str, Tensor]]:
        """Outputs, which of them is logits, and taps; kept for a batch that comes again."""
        if id(batch) in self._kept:
            return self._kept[id(batch)][1]
        with torch.no_grad(), _recorded(self.original, self.taps) as wanted:
            reference = batch.run(self.original)
            # Copies, since the model may return a buffer of its own, which its next call overwrites.
            picked = {path: tensor.clone() for path, tensor in measured_tensors(reference, self.output_fn).items()}
        wanted = {name: tensor.clone() for name, tensor in wanted.items()}
        logits = "logits" if self.output_fn is None and is_logits(reference) else None
        found = picked, logits, wanted
        size = sum(tensor.nbytes for tensor in (*found[0].values(), *wanted.values()))
        if id(batch) in self._again and size <= self._room:
            self._room -= size
            # The batch too: as long as it lives no other has its id.
            self._kept[id(batch)] = batch, found
        return found

    @staticmethod
    def _of_output(ours: Tensor, theirs: Tensor, batch: Batch, logits: bool) -> Tensor:
        mask = _mask(theirs, batch)
        if logits:
            log_p, log_q = F.log_softmax(theirs.float(), dim=-1), F.log_softmax(ours.float(), dim=-1)
            nats = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
            return nats.mean() if mask is None else (nats * mask[..., 0]).sum() / mask.sum().clamp_min(1.0)
        loss = _relative(ours, theirs, mask)
        if mask is not None:
            count = mask.sum(dim=1).clamp_min(1.0)
            mine, wanted = (ours * mask).sum(dim=1) / count, (theirs * mask).sum(dim=1) / count
            loss = loss + (mine - wanted).square().sum() / _positive(wanted.square().sum())
        return loss


def is_logits(output: Any) -> bool:
    """Say whether a model calls its output logits; only then is it read as such."""
    return "logits" in output if isinstance(output, Mapping) else isinstance(getattr(output, "logits", None), Tensor)


@contextlib.contextmanager
def _recorded(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            found[name] = model_tensor(output)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _mask(tensor: Tensor, batch: Batch) -> Tensor | None:
    """(samples, positions, 1) of the tensor's dtype, 1 where it counts; ``None`` for a tensor without positions.

    Without an attention mask all positions of a (samples, positions, features) tensor count.
    """
    if tensor.ndim != 3:
        return None
    mask = batch.mask
    if mask is None or mask.shape != tensor.shape[:2]:
        return tensor.new_ones(*tensor.shape[:2], 1)
    return mask.to(tensor.device, tensor.dtype)[:, :, None]


def _relative(ours: Tensor, theirs: Tensor, mask: Tensor | None) -> Tensor:
    """Squared error over the squared distance from the mean over samples (and positions)."""
    if mask is None:
        whole = (theirs - theirs.mean(dim=0, keepdim=True)).square().sum() if len(theirs) > 1 else theirs.square().sum()
        return (ours - theirs).square().sum() / _positive(whole)
    mean = (theirs * mask).sum(dim=(0, 1)) / mask.sum().clamp_min(1.0)
    return ((ours - theirs).square() * mask).sum() / _positive(((theirs - mean).square() * mask).sum())


def _positive(value: Tensor) -> Tensor:
    # A constant output has no spread to be relative to; then the error itself is the loss.
    return torch.where(value > 0, value, torch.ones_like(value))
