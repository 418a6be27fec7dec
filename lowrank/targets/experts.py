"""The experts of a mixture: parameters of three dimensions, one matrix for each expert."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from lowrank.layers import CompressedLayer
from lowrank.layers.experts import QuantizedExperts, experts_of, is_turned
from lowrank.targets.composite import Composite

__all__ = ["Experts"]

_COUNTS = ("num_experts", "num_local_experts", "n_experts", "n_routed_experts")


class Experts(Composite):
    """Describe a module that holds the matrices of all experts in parameters (experts, out, in) or (experts, in, out) and runs them itself.

    It says that it does: its class is called after experts, or one of its attributes (``num_experts``, …) is how many there are. Its
    own forward stays, whichever implementation transformers has chosen for it (``eager``, ``batched_mm``, ``grouped_mm``). Blocks are
    the experts, each with moments of its own (:mod:`lowrank.calibration.experts`). Weight-only.
    """

    name: ClassVar[str] = "experts"
    target: ClassVar[str] = "experts"
    described: ClassVar[str] = "the experts of a mixture in parameters of three dimensions"
    weight_only: ClassVar[bool] = True
    stacked: ClassVar[bool] = True

    def matches(self, module: nn.Module) -> bool:
        """Tell whether a module holds experts, and nothing that is not its own."""
        if isinstance(module, CompressedLayer) or type(module).forward is nn.Module.forward:
            return False
        if type(module).__module__.startswith("torch.nn.") or not experts_of(module):
            return False
        count = next(iter(experts_of(module).values())).shape[0]
        told = any(getattr(module, name, None) == count for name in _COUNTS)
        alone = not any(True for child in module.children() for _ in child.state_dict(keep_vars=True))
        return alone and (told or "expert" in type(module).__name__.lower())

    def refusal(self, module: nn.Module) -> str | None:
        """Refuse what cannot be carried over."""
        if len({tensor.dtype for tensor in module._parameters.values() if tensor is not None}) > 1:
            return "holds weights of more than one dtype"
        names = (*module._parameters, *module._buffers)
        taken = next(
            (name for name in names if hasattr(QuantizedExperts, name) and name not in experts_of(module)), None
        )
        if taken is not None:
            return f"its tensor {taken} has the name of something that every compressed layer has"
        narrow = next((name for name, each in experts_of(module).items() if min(each.shape[1:]) < 2), None)
        if narrow is not None:
            return f"its parameter {narrow} holds no matrices"
        return None

    def parameters(self, module: nn.Module) -> dict[str, Tensor | None]:
        """Give the parameters of three dimensions by name."""
        return dict(experts_of(module))

    def dimensions(self, module: nn.Module) -> int:
        """Give 3."""
        return 3

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """Give each as (experts, out, in), whichever way the module keeps it."""
        turned = is_turned(module)
        return {
            name: each.detach().transpose(1, 2) if turned else each.detach()
            for name, each in experts_of(module).items()
        }

    def shape(self, module: nn.Module) -> tuple[int, ...]:
        """Give the shape of the first as the module has it."""
        return tuple(next(iter(experts_of(module).values())).shape)
