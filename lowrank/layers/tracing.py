"""Compressed layers in ``torch.fx.symbolic_trace``: leaves, as torch's own layers are."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx.proxy import Proxy

__all__ = ["recorded"]


def recorded(layer: nn.Module, proxy: Proxy, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Record a call of a layer in the graph that is being traced.

    Args:
        layer: of the traced model.
        proxy: one of the arguments, which knows the tracer.
        args, kwargs: of the call.

    Returns:
        A proxy of the result.

    Example:
        >>> import torch
        >>> from lowrank.layers import QuantizedLinear
        >>> traced = torch.fx.symbolic_trace(nn.Sequential(QuantizedLinear(4, 2)))
        >>> [node.op for node in traced.graph.nodes]
        ['placeholder', 'call_module', 'output']
    """
    tracer: Any = proxy.tracer

    def leaf(*values: Any, **named: Any) -> Any:
        return tracer.create_proxy("call_module", tracer.path_of_module(layer), values, named)

    # By way of the tracer's own method: those of feature extractors note there which module they are in.
    return tracer.call_module(layer, leaf, args, kwargs)
