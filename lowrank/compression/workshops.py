"""Which workshop a target is worked on in."""

from __future__ import annotations

from torch import Tensor

from lowrank.compression.workshop import Workshop
from lowrank.compression.workshop_conv import ConvWorkshop
from lowrank.compression.workshop_packed import PackedWorkshop
from lowrank.numerics.moments import InputStatistics, TokenCounts
from lowrank.targets.survey import Target

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
    """The workshop for a target's kind; the arguments are those of :class:`lowrank.compression.workshop.Workshop`.

    Example:
        >>> from torch import nn
        >>> from lowrank.targets.survey import survey
        >>> type(open_workshop(survey(nn.Sequential(nn.Conv1d(4, 4, 3))).targets[0], None, None)).__name__
        'ConvWorkshop'
    """
    return _OF_KIND[target.kind](target, inputs, lookups, data_aware=data_aware, gradients=gradients)
