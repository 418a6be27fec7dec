"""A working copy of the model on which plans are put up and taken down while they are measured."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

from torch import Tensor, nn

from lowrank.compression.candidates import Candidate, Plan, PlanEntry
from lowrank.compression.workshop import Choice, Workshop
from lowrank.errors import CheckpointError, UsageError
from lowrank.layers import CompressedLayer, call_every_layer
from lowrank.numerics.factors import check_rank
from lowrank.targets.survey import replace_module

__all__ = ["Bench", "choice_of", "weight_error_of"]


def choice_of(entry: PlanEntry | Candidate) -> Choice:
    """The choice that a plan's entry, or a candidate for one, names."""
    return Choice(entry.format, entry.rank, entry.bits, entry.activations, entry.scheme)


class Bench:
    """The model with layers swapped in; the one that was passed in stays as it is.

    Args:
        model: the original. The copy shares its parameters until :meth:`release` gives it its own.
        workshops: the targets, found in ``model``.
        reference: what errors are measured against and ``inplace`` changes; not ``model`` where its BatchNorm was folded.
    """

    def __init__(self, model: nn.Module, workshops: Sequence[Workshop], reference: nn.Module | None = None) -> None:
        self.original = model
        self.reference = model if reference is None else reference
        self.workshops: Mapping[str, Workshop] = {shop.name: shop for shop in workshops}
        memo: dict[int, object] = {id(tensor): tensor for tensor in _tensors(model)}
        try:
            self.model: nn.Module = copy.deepcopy(model, memo)
        except (RuntimeError, TypeError, NotImplementedError) as error:
            raise UsageError(
                f"model: cannot be copied ({error}); pass inplace=False models that copy.deepcopy takes"
            ) from error
        self._originals = {
            member.name: self.model.get_submodule(member.name) for shop in workshops for member in shop.target.members
        }
        self._installed: dict[str, Choice] = {shop.name: Choice("dense") for shop in workshops}

    def install(self, name: str, choice: Choice) -> None:
        """Put one target's layers in place."""
        if self._installed[name] == choice:
            return
        shop = self.workshops[name]
        built = shop.build(choice)
        for member in shop.target.members:
            module = self._originals[member.name] if choice.format == "dense" else built[member.name]
            replace_module(self.model, member.names, module)
        call_every_layer(self.model)
        self._installed[name] = choice

    def install_plan(self, plan: Plan) -> nn.Module:
        """Put a whole plan in place; targets that it does not name become dense.

        Raises:
            LowRankError: the plan names a layer that is not a target of this model, or with another shape.
            CheckpointError: a layer would take no fewer bytes than the dense one.
        """
        check_plan(plan, self.workshops)
        chosen = {entry.name: choice_of(entry) for entry in plan.entries}
        for name in self.workshops:
            self.install(name, chosen.get(name, Choice("dense")))
        return self.model

    def release(self) -> nn.Module:
        """The copy with parameters of its own, so that the caller's model and this one no longer share memory."""
        for shop in self.workshops.values():
            shop.keep_only(self._installed[shop.name])
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
            aliases: dict[int, list[str]] = {}
            for name, module in self.reference.named_modules(remove_duplicate=False):
                aliases.setdefault(id(module), []).append(name)
            for name, module in self.reference.named_modules():
                folded = self.original.get_submodule(name)
                if type(folded) is not type(module) or getattr(folded, "bias", None) is not getattr(
                    module, "bias", None
                ):
                    replace_module(self.reference, aliases[id(module)], folded)
        for shop in self.workshops.values():
            choice = self._installed[shop.name]
            if choice.format != "dense":
                for member in shop.target.members:
                    replace_module(self.reference, member.names, shop.build(choice)[member.name])
        if trained is not None:
            self.reference.load_state_dict(trained.state_dict())
        call_every_layer(self.reference)
        return self.reference


def check_plan(plan: Plan, workshops: Mapping[str, Workshop]) -> None:
    """Refuse a plan that was made for another model, or that would make a layer larger."""
    plan.check_model({name: shop.target.shape for name, shop in workshops.items()})
    for entry in plan.entries:
        shop = workshops[entry.name]
        check_choice(shop, choice_of(entry))
        if choice_of(entry).format != "dense" and shop.bytes(choice_of(entry)) >= shop.bytes(Choice("dense")):
            raise CheckpointError(
                f"plan: layer {entry.name} as {entry.format} of rank {entry.rank} takes {shop.bytes(choice_of(entry)):,} bytes, "
                f'not fewer than the {shop.bytes(Choice("dense")):,} of the dense layer; lower the rank or write "dense"'
            )


def check_choice(shop: Workshop, choice: Choice) -> None:
    """Refuse a choice that the target cannot become.

    Raises:
        CheckpointError: a format or scheme that it does not have.
        RankError: a rank beyond what its groups and kernel allow.
    """
    if choice.format != "dense" and choice.format not in shop.formats:
        raise CheckpointError(
            f"plan: layer {shop.name} can be dense or {', '.join(shop.formats)}, got {choice.format!r}; correct the plan"
        )
    if choice.rounded and choice.activations not in (None, *shop.modes("auto")):
        raise CheckpointError(
            f"plan: layer {shop.name} is weight-only or looked up: activations cannot be {choice.activations!r}; "
            "correct the plan"
        )
    if not choice.factored:
        return
    if choice.scheme not in shop.schemes:
        possible = " or ".join(str(scheme) for scheme in shop.schemes)
        raise CheckpointError(
            f"plan: layer {shop.name} of shape {list(shop.target.shape)}: scheme must be {possible}, got {choice.scheme!r}"
        )
    check_rank(choice.rank, shop.max_rank(choice.scheme), f"plan: layer {shop.name}, rank")


def weight_error_of(bench: Bench) -> float:
    """√(Σ‖ΔW‖²/Σ‖W‖²) over the targets, of the layers that are installed."""
    lost = whole = 0.0
    for shop in bench.workshops.values():
        module = bench.model.get_submodule(shop.name)
        whole += shop.square_sum
        if isinstance(module, CompressedLayer):
            lost += shop.errors_of(module)[0] ** 2 * shop.square_sum
    return (lost / whole) ** 0.5 if whole > 0.0 else 0.0


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    return chain(model.parameters(), model.buffers())
