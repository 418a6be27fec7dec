"""Recurrent layers and their cells."""

from __future__ import annotations

import re
from typing import ClassVar

from torch import nn

from lowrank.layers import RECURRENT
from lowrank.targets.composite import Composite

__all__ = ["Recurrent"]


class Recurrent(Composite):
    """Describe ``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` and their cells; they are weight-only whatever is asked."""

    name: ClassVar[str] = "recurrent"
    described: ClassVar[str] = "recurrent layers"
    types: ClassVar[tuple[type[nn.Module], ...]] = tuple(RECURRENT)
    weight_only: ClassVar[bool] = True
    # Parametrized modules have others: weight_hh_l0_g, weight_ih_l0_orig …
    parameter_name: ClassVar[re.Pattern[str]] = re.compile(r"(weight|bias)_(ih|hh|hr)(_l\d+(_reverse)?)?")
