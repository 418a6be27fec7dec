"""``nn.MultiheadAttention``: the projections of queries, keys and values, and the one of the output."""

from __future__ import annotations

import re
from typing import ClassVar

from torch import nn

from lowrank.targets.composite import Composite

__all__ = ["Attention"]


class Attention(Composite):
    """Describe ``nn.MultiheadAttention``."""

    name: ClassVar[str] = "attention"
    described: ClassVar[str] = "nn.MultiheadAttention"
    types: ClassVar[tuple[type[nn.Module], ...]] = (nn.MultiheadAttention,)
    parameter_name: ClassVar[re.Pattern[str]] = re.compile(
        r"in_proj_(weight|bias)|[qkv]_proj_weight|bias_[kv]|out_proj\.(weight|bias)"
    )

    def refusal(self, module: nn.Module) -> str | None:
        """Refuse what the compressed layer does not compute."""
        reason = super().refusal(module)
        if reason is not None:
            return reason
        assert isinstance(module, nn.MultiheadAttention)
        if module.bias_k is not None:
            return "nn.MultiheadAttention with add_bias_kv=True is not handled"
        if module.add_zero_attn:
            return "nn.MultiheadAttention with add_zero_attn=True is not handled"
        out: nn.Module = module.out_proj
        return None if isinstance(out, nn.Linear) else f"its out_proj is a {type(out).__name__}, not an nn.Linear"
