"""The repeated blocks of a model, and running them with checkpoints instead of kept activations."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["checkpointed", "repeated_blocks"]


def repeated_blocks(model: nn.Module) -> list[str]:
    """Name the modules that a model repeats: members of the outermost ``ModuleList`` or ``Sequential`` whose
    members (two at least) are of one class and hold parameters. Empty where there is no such list.

    Example:
        >>> block = lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> repeated_blocks(nn.Sequential(nn.Linear(2, 2), nn.ModuleList([block(), block()])))
        ['1.0', '1.1']
    """
    found: list[str] = []
    for name, module in model.named_modules():
        if any(name == block or name.startswith(f"{block}.") for block in found):
            continue
        members = dict(module.named_children()) if isinstance(module, (nn.ModuleList, nn.Sequential)) else {}
        kinds = {type(member) for member in members.values()}
        # One Linear after another is no block: checkpoints around single layers would save nothing.
        composite = all(any(True for _ in member.children()) for member in members.values())
        if (
            len(members) > 1
            and len(kinds) == 1
            and composite
            and all(any(True for _ in m.parameters()) for m in members.values())
        ):
            found += [f"{name}.{key}" if name else key for key in members]
    return found


@contextlib.contextmanager
def checkpointed(model: nn.Module) -> Iterator[int]:
    """Recompute the repeated blocks' activations in the backward pass instead of keeping them.

    Models in transformers' manner keep no cache of keys meanwhile: a block that runs again would add to it again.

    Yields:
        How many blocks there are; without any the model runs as ever.
    """
    blocks = [model.get_submodule(name) for name in repeated_blocks(model)]
    own = [block.__dict__.get("forward") for block in blocks]
    caching = _caching(model) if blocks else []
    try:
        for config in caching:
            config.use_cache = False
        for block in blocks:
            # On the instance, so that the class and every other model stay as they are.
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        yield len(blocks)
    finally:
        for config in caching:
            config.use_cache = True
        for block, forward in zip(blocks, own, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.forward = forward


def _caching(model: nn.Module) -> list[Any]:
    """Configurations of the model and of its parts that ask for a cache, each once."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    return list({id(config): config for config in configs if getattr(config, "use_cache", None) is True}.values())
