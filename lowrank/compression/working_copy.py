"""A working copy of the model, into which plans are installed while they are measured."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

from torch import Tensor, nn

from lowrank.compression.formats import DENSE, FORMATS, format_of
from lowrank.compression.layer_data import LayerData
from lowrank.compression.plan import Plan
from lowrank.errors import CheckpointError
from lowrank.layers import CompressedLayer, call_every_layer
from lowrank.layers.spec import LayerSpec
from lowrank.targets.copying import become, same_module, sharing_copy

__all__ = ["WorkingCopy", "check_plan", "weight_error_of"]


class WorkingCopy:
    """Swap layers into a copy of a model; the one that was passed in stays as it is.

    Args:
        model: the original. The copy shares its parameters until :meth:`release` gives it its own.
        layers: the targets, found in ``model``.
        reference: what errors are measured against and ``inplace`` changes; not ``model`` where its BatchNorm was folded.
    """

    def __init__(self, model: nn.Module, layers: Sequence[LayerData], reference: nn.Module | None = None) -> None:
        self.original = model
        self.reference = model if reference is None else reference
        self.layers: Mapping[str, LayerData] = {data.name: data for data in layers}
        self._built: dict[str, dict[LayerSpec, dict[str, nn.Module]]] = {name: {} for name in self.layers}
        # Not its buffers: a forward may write to those.
        self.model: nn.Module = sharing_copy(model)
        self._originals = {
            member.name: same_module(self.model.get_submodule(member.name))
            for data in layers
            for member in data.target.members
        }
        self._installed: dict[str, LayerSpec] = dict.fromkeys(self.layers, DENSE)

    def build(self, name: str, spec: LayerSpec) -> dict[str, nn.Module]:
        """Make the new module of each member of a target, by the member's first name; once for every spec."""
        built = self._built[name]
        if spec not in built:
            built[spec] = format_of(spec).build(self.layers[name], spec)
        return built[spec]

    def install(self, name: str, spec: LayerSpec) -> None:
        """Put one target's layers in place."""
        if self._installed[name] == spec:
            return
        dense = format_of(spec).dense
        built = self._originals if dense else self.build(name, spec)
        for member in self.layers[name].target.members:
            become(self.model.get_submodule(member.name), built[member.name])
        call_every_layer(self.model)
        self._installed[name] = spec

    def install_plan(self, plan: Plan) -> nn.Module:
        """Put a whole plan in place and give the model; targets that it does not name become dense.

        Raises:
            LowRankError: the plan names a layer that is not a target of this model, or with another shape.
            CheckpointError: a layer would take no fewer bytes than the dense one.
        """
        check_plan(plan, self.layers)
        chosen = {entry.name: entry.spec for entry in plan.entries}
        for name in self.layers:
            self.install(name, chosen.get(name, DENSE))
        return self.model

    def release(self) -> nn.Module:
        """Give the copy parameters of its own, so that the caller's model and this one no longer share memory."""
        for name, built in self._built.items():
            self._built[name] = {spec: modules for spec, modules in built.items() if spec == self._installed[name]}
        shared = {id(tensor) for tensor in _tensors(self.original)}
        copies: dict[int, Tensor] = {}
        for module in self.model.modules():
            tables: list[dict[str, Tensor | None]] = [module._parameters, module._buffers]  # type: ignore[list-item]
            for table in tables:
                for name, tensor in table.items():
                    if tensor is not None and id(tensor) in shared:
                        if id(tensor) not in copies:
                            copies[id(tensor)] = copy.deepcopy(tensor)
                        table[name] = copies[id(tensor)]
        return self.model

    def write_back(self, trained: nn.Module | None = None) -> nn.Module:
        """Put the installed layers into the caller's model itself (``inplace=True``).

        Args:
            trained: a model of the installed layers whose tensors, all of them, are to be taken over.
        """
        if self.reference is not self.original:
            for name, module in list(self.reference.named_modules()):
                folded = self.original.get_submodule(name)
                if type(folded) is not type(module) or getattr(folded, "bias", None) is not getattr(
                    module, "bias", None
                ):
                    become(module, folded)
        for name, spec in self._installed.items():
            if not format_of(spec).dense:
                for member in self.layers[name].target.members:
                    become(self.reference.get_submodule(member.name), self.build(name, spec)[member.name])
        if trained is not None:
            self.reference.load_state_dict(trained.state_dict())
        call_every_layer(self.reference)
        return self.reference


def check_plan(plan: Plan, layers: Mapping[str, LayerData]) -> None:
    """Refuse a plan that was made for another model, or that would make a layer larger.

    Raises:
        LowRankError: names the first entry that the model lacks or whose shape differs.
        CheckpointError: a format, scheme or way of taking activations that the layer does not have.
        RankError: a rank beyond what its blocks and kernel allow.
    """
    plan.check_model({name: data.target.shape for name, data in layers.items()})
    for entry in plan.entries:
        data, spec, format = layers[entry.name], entry.spec, format_of(entry.spec)
        if format.dense:
            continue
        if not format.fits(data):
            fitting = ", ".join(name for name, each in FORMATS.items() if each.fits(data) and not each.dense)
            raise CheckpointError(
                f"plan: layer {data.name} can be dense or {fitting}, got {spec.format!r}; correct the plan"
            )
        format.check(data, spec)
        dense_bytes = format_of(DENSE).stored_bytes(data, DENSE)
        if format.stored_bytes(data, spec) >= dense_bytes:
            raise CheckpointError(
                f"plan: layer {entry.name} as {spec.format} of rank {spec.rank} takes {format.stored_bytes(data, spec):,} bytes, "
                f'not fewer than the {dense_bytes:,} of the dense layer; lower the rank or write "{DENSE.format}"'
            )


def weight_error_of(working: WorkingCopy) -> float:
    """Compute √(Σ‖ΔW‖²/Σ‖W‖²) over the targets, of the layers that are installed."""
    lost = whole = 0.0
    for data in working.layers.values():
        module = working.model.get_submodule(data.name)
        whole += data.square_sum
        if isinstance(module, CompressedLayer):
            lost += data.errors_of(module)[0] ** 2 * data.square_sum
    return (lost / whole) ** 0.5 if whole > 0.0 else 0.0


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    return chain(model.parameters(), model.buffers())
