"""Compressed layers in a form that gradients can move, and back into the format and the bytes they had."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import Tensor, nn

from lowrank.errors import UsageError
from lowrank.layers import CompressedLayer
from lowrank.lora import LoRALayer
from lowrank.targets.copying import become, same_module

__all__ = ["RoundedForm", "TrainableForm"]

WHAT = ("auto", "factors", "adapters")


class RoundedForm(nn.Module):
    """An int8 layer while its numbers are trained: rounded in the forward pass, straight through in the backward.

    Linear layers and convolutions, of one matrix or of two factors; activations are floats meanwhile.

    Args:
        layer: the layer that it stands in for.
        dense: the layer that it was made from, if that is still known: where its rounding is ``layer`` itself, training starts
            from the numbers before they were rounded.

    Attributes:
        floats: what is trained.

    Example:
        >>> import torch
        >>> from lowrank.layers import QuantizedLowRankLayer
        >>> layer = QuantizedLowRankLayer.from_linear(nn.Linear(6, 4), rank=3)
        >>> again = RoundedForm(layer).rounded()
        >>> torch.equal(again.left_codes, layer.left_codes), again.stored_bytes == layer.stored_bytes
        (True, True)
    """

    def __init__(self, layer: CompressedLayer, dense: nn.Module | None = None) -> None:
        super().__init__()
        self.floats: nn.Module = layer.trainable(dense)
        # Not registered: its codes are neither trained nor stored while the floats stand in for them.
        self._layer = (layer,)

    def forward(self, x: Tensor) -> Tensor:
        """Do what the float layer of the rounded numbers does."""
        return self._layer[0].rounded_forward(self.floats, x)

    def rounded(self) -> CompressedLayer:
        """Make the layer of the numbers as they are now: of the same kind, rank, bits and activations."""
        return self._layer[0].with_floats(self.floats).train(self.training)


class TrainableForm:
    """A model's tensors that healing may move, made ready for it.

    Args:
        model: changed in place; :meth:`close` puts every format back.
        original: the model that it was made from, whose weights tell what rounding took.
        what: "factors": the numbers of compressed layers, with the biases and norms of the whole model; "adapters": what the
            model's adapters have made trainable; "auto": adapters where there are any, else factors.

    Raises:
        UsageError: another ``what``, or nothing there to train.

    Example:
        >>> from lowrank.layers import QuantizedLowRankLayer
        >>> model = nn.Sequential(QuantizedLowRankLayer.from_linear(nn.Linear(6, 4), rank=3), nn.LayerNorm(4))
        >>> form = TrainableForm(model)
        >>> form.what, [tuple(parameter.shape) for parameter in form.parameters]
        ('factors', [(4, 3), (3, 6), (4,), (4,), (4,)])
        >>> form.close()
        >>> type(model[0]).__name__
        'QuantizedLowRankLayer'
    """

    def __init__(self, model: nn.Module, what: str = "auto", original: nn.Module | None = None) -> None:
        if what not in WHAT:
            raise UsageError(f"what: must be one of {', '.join(WHAT)}, got {what!r}")
        _refuse_merged(model)
        adapters = [p for name, p in model.named_parameters() if p.requires_grad and "lora_" in name]
        self.model = model
        self.what = what if what != "auto" else "adapters" if adapters else "factors"
        self._flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self._forms: dict[nn.Module, RoundedForm] = {}
        if self.what == "adapters":
            self.parameters = adapters
            remedy = "add one with lowrank.add_lora(model, config), or use what='factors'"
        else:
            self._open_layers(original)
            self.parameters = list(dict.fromkeys(_movable(model)))
            remedy = "compress the model first"
        if not self.parameters:
            self.close()
            raise UsageError(f"heal: the model has no {self.what} to train; {remedy}")
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in self.parameters:
            parameter.requires_grad_(True)

    def _open_layers(self, original: nn.Module | None) -> None:
        dense = {} if original is None else dict(original.named_modules())
        found: dict[CompressedLayer, list[str]] = {}
        for name, module in self.model.named_modules(remove_duplicate=False):
            # Codes that an embedding shares are not this layer's to move.
            if isinstance(module, CompressedLayer) and module.trains_rounded and not _is_tied(module, self.model):
                found.setdefault(module, []).append(name)
        _refuse_dora(self.model, found)
        for layer, names in found.items():
            self._forms[layer] = RoundedForm(same_module(layer), dense.get(names[0]))
            become(layer, self._forms[layer])

    def close(self) -> None:
        """Round what was opened, and give every parameter its ``requires_grad`` back."""
        for layer, form in self._forms.items():
            become(layer, form.rounded())
        self._forms = {}
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
        for module in self.model.modules():
            if self.what == "factors" and isinstance(module, CompressedLayer):
                module.forget_source()


def _movable(model: nn.Module) -> Iterator[nn.Parameter]:
    opened = {module.floats for module in model.modules() if isinstance(module, RoundedForm)}
    for module in model.modules():
        whole = isinstance(module, CompressedLayer) or module in opened or "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point() and (whole or name == "bias"):
                yield parameter


def _refuse_merged(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer) and module.merged_adapters:
            raise UsageError(
                f"heal: layer {name} has adapters merged ({', '.join(module.merged_adapters)}), which do not train: unmerge_lora "
                "first, or unload_lora to keep them in the weights"
            )


def _refuse_dora(model: nn.Module, opened: Collection[nn.Module]) -> None:
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer) and module.base_layer in opened and len(module.lora_magnitude_vector):
            raise UsageError(
                f"heal: layer {name} has a DoRA adapter, whose norms are of the weight, and integer codes, whose weight would "
                "move: use what='adapters'"
            )


def _is_tied(layer: nn.Module, model: nn.Module) -> bool:
    own = {id(tensor) for tensor in layer.buffers()}
    others = (module for module in model.modules() if module is not layer and isinstance(module, CompressedLayer))
    return any(id(tensor) in own for module in others for tensor in module.buffers(recurse=False))
