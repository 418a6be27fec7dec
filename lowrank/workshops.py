"""Which workshop a target is worked on in."""

from __future__ import annotations

from torch import Tensor

from lowrank.modules import Target
from lowrank.statistics import InputStatistics, TokenCounts
from lowrank.workshop import Workshop
from lowrank.workshop_conv import ConvWorkshop
from lowrank.workshop_packed import PackedWorkshop

__all__ = ["open_workshop"]

_OF_KIND: dict[str, type[Workshop]] = {
    "linear": Workshop,
    "embedding": Workshop,
    "conv": ConvWorkshop,
    "recurrent": PackedWorkshop,
    "attention": PackedWorkshop,
}


def open_workshop(
    target: Target,
    inputs: InputStatistics | None,
    lookups: TokenCounts | None,
    *,
    data_aware: bool = True,
    gradients: Tensor | None = None,
) -> Workshop:
    """The workshop for a target's kind; the arguments are those of :class:`lowrank.workshop.Workshop`.

    Example:
        >>> from torch import nn
        >>> from lowrank.modules import survey
        >>> type(open_workshop(survey(nn.Sequential(nn.Conv1d(4, 4, 3))).targets[0], None, None)).__name__
        'ConvWorkshop'
    """
    return _OF_KIND[target.kind](target, inputs, lookups, data_aware=data_aware, gradients=gradients)
