"""Modules that hold several weight matrices, recurrent layers and attention: what they hold and which can be rounded."""

from __future__ import annotations

import re

from torch import Tensor, nn

from lowrank.layers import RECURRENT

__all__ = ["packed_kind", "unfit_packed", "weight_matrices"]

# Parametrized modules have others: weight_hh_l0_g, weight_ih_l0_orig …
_RECURRENT_NAME = re.compile(r"(weight|bias)_(ih|hh|hr)(_l\d+(_reverse)?)?")
_ATTENTION_NAME = re.compile(r"in_proj_(weight|bias)|[qkv]_proj_weight|bias_[kv]|out_proj\.(weight|bias)")


def packed_kind(module: nn.Module) -> str | None:
    """``"recurrent"`` or ``"attention"`` for a module of exactly such a type, else ``None``.

    Example:
        >>> packed_kind(nn.GRU(2, 2)), packed_kind(nn.MultiheadAttention(2, 1)), packed_kind(nn.Linear(2, 2))
        ('recurrent', 'attention', None)
    """
    if type(module) in RECURRENT:
        return "recurrent"
    return "attention" if type(module) is nn.MultiheadAttention else None


def weight_matrices(module: nn.Module) -> dict[str, Tensor]:
    """The matrices of such a module by name, those of its children included.

    Example:
        >>> {name: tuple(weight.shape) for name, weight in weight_matrices(nn.MultiheadAttention(4, 2)).items()}
        {'in_proj_weight': (12, 4), 'out_proj.weight': (4, 4)}
    """
    return {name: tensor for name, tensor in module.named_parameters() if tensor.ndim == 2}


def unfit_packed(module: nn.Module) -> str | None:
    """Why this recurrent layer or attention cannot be rounded; a single matrix is not looked into."""
    names = [name for name, _ in module.named_parameters()]
    pattern = _ATTENTION_NAME if isinstance(module, nn.MultiheadAttention) else _RECURRENT_NAME
    odd = next((name for name in names if not pattern.fullmatch(name)), None)
    if odd is not None or not weight_matrices(module):
        return f"parametrized (it holds {odd}): remove the parametrization first"
    if len({tensor.dtype for tensor in module.parameters()}) > 1:
        return "holds weights of more than one dtype"
    if isinstance(module, nn.MultiheadAttention):
        if module.bias_k is not None:
            return "nn.MultiheadAttention with add_bias_kv=True is not handled"
        if module.add_zero_attn:
            return "nn.MultiheadAttention with add_zero_attn=True is not handled"
        out: nn.Module = module.out_proj
        if not isinstance(out, nn.Linear):
            return f"its out_proj is a {type(out).__name__}, not an nn.Linear"
    return None
