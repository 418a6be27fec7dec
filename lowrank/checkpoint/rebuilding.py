"""A finished model saved to memory and built anew from it: what loading it will give, before anything is written."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn

from lowrank.checkpoint.loading import fill
from lowrank.checkpoint.manifest import parse_manifest
from lowrank.checkpoint.saving import described
from lowrank.errors import CheckpointError
from lowrank.targets.batchnorm import fold_skeleton
from lowrank.targets.copying import copy_model
from lowrank.targets.references import reachable

__all__ = ["rebuilt"]


def rebuilt(finished: nn.Module, original: nn.Module) -> nn.Module:
    """Build a model from what a file of ``finished`` would hold and the structure of ``original``, as loading does.

    Every parameter of the structure is without values until one is loaded into it, also those that are not registered: what
    computes with one that no file holds fails. Tensors are those of ``finished``; nothing is copied.

    Returns:
        The model in eval mode.

    Raises:
        CheckpointError: ``finished`` holds what no file can, or its tensors do not fit the structure.

    Example:
        >>> layer = nn.Sequential(nn.Linear(2, 2))
        >>> torch.equal(rebuilt(layer, nn.Sequential(nn.Linear(2, 2)))[0].weight, layer[0].weight)
        True
    """
    document, tensors = described(finished)
    manifest = parse_manifest(json.loads(document), "memory")
    skeleton = _without_values(original).train()
    fold_skeleton(skeleton, manifest.folded, tensors, "memory")
    device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
    try:
        return fill(skeleton, manifest, tensors, device, None, "memory")
    except (RuntimeError, KeyError, AttributeError, TypeError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"model: what a file of it would hold does not load into the {type(original).__name__} again "
            f"({type(error).__name__}: {first}); let state_dict and load_state_dict of its class give and take the same tensors"
        ) from error


def _without_values(model: nn.Module) -> nn.Module:
    stored = {id(value) for value in model.state_dict(keep_vars=True).values()}
    memo: dict[int, Any] = {}
    for _, value in reachable(model):
        if isinstance(value, nn.Parameter):
            memo[id(value)] = nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=value.requires_grad)
        elif isinstance(value, torch.Tensor) and id(value) in stored:
            memo[id(value)] = torch.empty_like(value, device="meta")
    return copy_model(model, memo)
