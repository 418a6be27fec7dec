"""Training and evaluation mode, changed for a while and given back by the model's own ``train()``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

__all__ = ["evaluating", "modes_kept"]


@contextlib.contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Give every module its own mode back afterwards, by calling its ``train()``, which may do more than set a flag.

    Adapters that fold their branch into the weight for evaluation (as loralib does) take it out again this way; a flag
    set by hand would leave it there.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout().eval())
        >>> with modes_kept(model):
        ...     _ = model.eval()
        >>> model.training, model[1].training
        (True, False)
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        # Parents come before what is inside them, whose modes their train() sets too.
        for module, mode in modes:
            if module.training != mode:
                module.train(mode)
        for module, mode in modes:
            # Set by hand, to what its train() does not do.
            module.training = mode


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode comes back afterwards.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> with evaluating(model):
        ...     model.training, torch.is_grad_enabled()
        (False, False)
        >>> model.training
        True
    """
    with modes_kept(model):
        # Where it is evaluated already nothing is asked of it, so that a fold is made once and not at every measurement.
        if any(module.training for module in model.modules()):
            model.eval()
        with torch.no_grad():
            yield
