"""The compressed layers of a model: finding them, and refusing those whose scales are damaged."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowrank.errors import CheckpointError
from lowrank.layers.base import CompressedLayer
from lowrank.layers.roles import ScaleForm, damaged_scales

__all__ = ["check_scales", "compressed_layers"]


def compressed_layers(model: nn.Module) -> dict[str, CompressedLayer]:
    """Find the compressed layers of a model by name, without those that are part of another one.

    Example:
        >>> from lowrank.layers import QuantizedLinear, QuantizedMultiheadAttention
        >>> list(compressed_layers(nn.Sequential(QuantizedLinear(4, 2), QuantizedMultiheadAttention(4, 2))))
        ['0', '1']
    """
    found: dict[str, CompressedLayer] = {}
    parts: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, CompressedLayer) and id(module) not in parts:
            found[name] = module
            parts.update(id(part) for part in module.modules())
    return found


def check_scales(layer: nn.Module, name: str) -> None:
    """Refuse a loaded layer whose scale is missing, of the wrong shape or dtype, or not positive and finite.

    Args:
        layer: any compressed layer; one without integer codes has no scale and passes.
        name: of the layer, for the message.

    Raises:
        CheckpointError: says which rule the scale breaks, and where.

    Example:
        >>> from lowrank.layers import QuantizedLinear
        >>> check_scales(QuantizedLinear(4, 2), "head")
    """
    for prefix, module in layer.named_modules(prefix=name):
        if isinstance(module, CompressedLayer):
            for leaf, form in module.scales().items():
                _check_scale(getattr(module, leaf, None), prefix, leaf, form)


def _check_scale(scale: object, name: str, leaf: str, form: ScaleForm) -> None:
    if not isinstance(scale, Tensor):
        raise CheckpointError(
            f"layer {name}: has integer codes but no {leaf}; the file is damaged, compress the model again"
        )
    if scale.shape != form.shape or scale.dtype != form.dtype:
        wanted = str(form.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"layer {name}: {leaf} must be {wanted} of shape {form.shape}, got {scale.dtype} of shape {tuple(scale.shape)}"
        )
    wrong, rule = damaged_scales(scale, signed=form.signed)
    if bool(wrong.any()):
        index = [int(at) for at in torch.nonzero(wrong)[0]]
        raise CheckpointError(f"layer {name}: {leaf}{index} is {float(scale[tuple(index)])}; {rule}")
