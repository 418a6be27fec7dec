"""A module that is trained whole beside the adapters and saved with them (``modules_to_save``)."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from lowrank.errors import AdapterError
from lowrank.layers import CompressedLayer
from lowrank.lora.bases import dense_twin, family
from lowrank.targets.model import replace_module

__all__ = ["SavedModule"]


class SavedModule(nn.Module):
    """Holds the original and one trainable copy an adapter, and runs the copy of the active one.

    Args:
        original_module: what it takes the place of; frozen.

    Example:
        >>> module = SavedModule(nn.Linear(2, 2))
        >>> module.add_adapter("default")
        >>> module.set_active(["default"])
        >>> [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        ['modules_to_save.default.weight', 'modules_to_save.default.bias']
    """

    def __init__(self, original_module: nn.Module) -> None:
        super().__init__()
        self.original_module = original_module.requires_grad_(False)
        self.modules_to_save = nn.ModuleDict()
        self.active: str | None = None
        self.train(original_module.training)

    def add_adapter(self, adapter: str, *, decoded: bool = False) -> None:
        """Copy the original for an adapter.

        Args:
            adapter: its name.
            decoded: make dense what holds integer codes, for numbers that a file brings.

        Raises:
            AdapterError: it holds integer codes, which cannot be trained.
        """
        copied = copy.deepcopy(self.original_module)
        for name, part in self.original_module.named_modules():
            if not isinstance(part, CompressedLayer) or part.bits is None:
                continue
            if not decoded or family(part) not in ("embedding", "linear"):
                raise AdapterError(
                    f"modules_to_save: {part.kind} holds integer codes, which cannot be trained whole; put an adapter "
                    "on it (target_modules) or leave it dense when compressing"
                )
            if name:
                replace_module(copied, [name], dense_twin(part, {}))
            else:
                copied = dense_twin(part, {})
        self.modules_to_save[adapter] = copied.requires_grad_(True)

    def delete_adapter(self, adapter: str) -> None:
        """Forget an adapter's copy."""
        if adapter in self.modules_to_save:
            del self.modules_to_save[adapter]
        if self.active == adapter:
            self.active = None

    def set_active(self, adapters: tuple[str, ...] | list[str]) -> None:
        """Run the copy of the first of these adapters that has one, else the original."""
        self.active = next((name for name in adapters if name in self.modules_to_save), None)
        for name, module in self.modules_to_save.items():
            module.requires_grad_(name == self.active)

    @property
    def running(self) -> nn.Module:
        """The module that :meth:`forward` calls."""
        return self.original_module if self.active is None else self.modules_to_save[self.active]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the running module."""
        return self.running(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # Models read a head's weight or sizes; anything this wrapper lacks is the running module's.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "original_module" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.running, name)
