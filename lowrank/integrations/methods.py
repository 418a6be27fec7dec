"""Methods of transformers' models that would lose a compressed model's layers: what they say, or do, instead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from lowrank.errors import UsageError

__all__ = ["guard_methods"]

_REFUSED = {
    "save_pretrained": (
        "it would write a directory that transformers fills with random weights; write the model with result.save(directory) "
        "and read it with lowrank.load_model(directory)"
    ),
    "push_to_hub": "it would write a directory that transformers fills with random weights; upload what result.save(directory) writes",
    "resize_token_embeddings": (
        "its tables are held in codes or factors; resize the dense model and compress it again, or add the new words' rows by an adapter "
        "with modules_to_save"
    ),
}


@dataclass(frozen=True)
class _Refusal:
    """Stand on a model in place of one of its methods; without a reference to it, so that copies and pickles are whole."""

    name: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise UsageError(f"{self.name}: this model was compressed by lowrank, and {_REFUSED[self.name]}")


@dataclass(frozen=True)
class _NothingToTie:
    """Stand in place of ``tie_weights``: tied tables stay tied through compression, so that there is nothing to do."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None


def guard_methods(model: nn.Module) -> nn.Module:
    """Make methods of a compressed model in transformers' manner say what to do instead of losing its layers.

    Args:
        model: any module; one without such methods stays as it is.

    Returns:
        The model itself.

    Example:
        >>> class Like(nn.Linear):
        ...     def save_pretrained(self, directory):
        ...         return "written"
        >>> try:
        ...     guard_methods(Like(2, 2)).save_pretrained("out")
        ... except UsageError as error:
        ...     print(str(error)[:60])
        save_pretrained: this model was compressed by lowrank, and i
    """
    for module in model.modules():
        for name in _REFUSED:
            if callable(getattr(type(module), name, None)):
                module.__dict__[name] = _Refusal(name)
        if "save_pretrained" in module.__dict__ and callable(getattr(type(module), "tie_weights", None)):
            module.__dict__["tie_weights"] = _NothingToTie()
    return model
