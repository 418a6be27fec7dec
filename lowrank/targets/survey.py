"""Every module of a model that holds weights: which are targets, and why the others are not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank.errors import UsageError
from lowrank.layers import CompressedLayer
from lowrank.targets import LayerKind, kind_of, resemblance, target_names
from lowrank.targets.model import matching

__all__ = ["MAX_ELEMENTS", "Member", "Skipped", "Survey", "Target", "survey"]

# A tensor's element count beyond which torch's integer kernels take 64-bit paths that this package has not tested.
MAX_ELEMENTS = 2**31
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PART_OF_ATTENTION = "nn.MultiheadAttention reads this weight without calling the layer"


@dataclass(frozen=True)
class Member:
    """One module object and every name it goes by."""

    module: nn.Module
    names: tuple[str, ...]

    @property
    def name(self) -> str:
        """The first name."""
        return self.names[0]


@dataclass(frozen=True)
class Target:
    """Modules that hold one weight: usually a single one, several where the weight is tied.

    Attributes:
        kind: of the first member.
        members: the first one owns the weight's bytes in the report.
    """

    kind: LayerKind
    members: tuple[Member, ...]

    @property
    def name(self) -> str:
        """First name of the first member."""
        return self.members[0].name

    @property
    def owner(self) -> nn.Module:
        """The first member's module."""
        return self.members[0].module

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight: (out, in), (out, in / groups, *kernel) or (num_embeddings, embedding_dim); of the first of several."""
        return self.kind.shape(self.owner)

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The members' kinds, each once."""
        return tuple(dict.fromkeys(kind for member in self.members if (kind := kind_of(member.module)) is not None))

    @property
    def looked_up(self) -> bool:
        """Whether the weight is looked up row by row somewhere."""
        return not all(kind.multiplies for kind in self.kinds)

    @property
    def multiplying(self) -> tuple[Member, ...]:
        """The members that multiply."""
        return tuple(
            member for member in self.members if (kind := kind_of(member.module)) is not None and kind.multiplies
        )


@dataclass(frozen=True)
class Skipped:
    """A module with weights that stays as it is, and why."""

    member: Member
    reason: str


@dataclass(frozen=True)
class Survey:
    """Every module that holds weights directly, in the model's order."""

    targets: tuple[Target, ...]
    skipped: tuple[Skipped, ...]
    members: tuple[Member, ...]


def survey(model: nn.Module, *, targets: Sequence[str] | None = None, ignore: Sequence[str] = ()) -> Survey:
    """Find every module that holds weights and say whether it can be compressed.

    Args:
        model: any module with children.
        targets: what to compress, out of :func:`lowrank.targets.target_names` ("linear" takes recurrent layers and attention too);
            all of them unless given.
        ignore: globs over full module names; one that covers a container covers what is inside.

    Raises:
        UsageError: an unknown target, a pattern that matches nothing.
    """
    wanted = _checked_targets(target_names() if targets is None else targets)
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    parents: dict[int, nn.Module] = {}
    every_name: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        every_name.append(name)
        names.setdefault(id(module), []).append(name)
        modules[id(module)] = module
        for child in module.children():
            parents.setdefault(id(child), module)
    ignored = set().union(*matching(ignore, [name for name in every_name if name], "ignore").values())
    members = [Member(module, tuple(names[key])) for key, module in modules.items() if _holds_tensors(module)]
    skipped: list[Skipped] = []
    groups: dict[tuple[int, ...], list[Member]] = {}
    refused: dict[tuple[int, ...], str] = {}
    holders = Counter(id(weight) for member in members for weight in member.module.parameters(recurse=False))
    for member in members:
        reason = _refusal(member, parents.get(id(member.module)), wanted, ignored)
        kind, key = kind_of(member.module), _identity(member.module)
        if kind is not None and kind.composite:
            weights = kind.identity(member.module)
            if reason is None and any(holders[weight] > 1 for weight in weights):
                reason = "shares a weight with another module"
            if reason is not None:
                refused.update({(weight,): member.name for weight in weights})
        if reason is not None:
            skipped.append(Skipped(member, reason))
            if key is not None:
                refused.setdefault(key, member.name)
        else:
            assert key is not None
            groups.setdefault(key, []).append(member)
    found: list[Target] = []
    for key, group in groups.items():
        kind = kind_of(group[0].module)
        assert kind is not None
        tied = next((reason for member in group if (reason := _tie_refusal(member)) is not None), None)
        if key in refused:
            skipped += [Skipped(member, f"tied with {refused[key]}, which is not compressed") for member in group]
        elif len(group) > 1 and tied is not None:
            skipped += [Skipped(member, tied) for member in group]
        else:
            found.append(Target(kind, tuple(group)))
    return Survey(tuple(found), tuple(skipped), tuple(members))


def _checked_targets(targets: Sequence[str]) -> tuple[str, ...]:
    if isinstance(targets, str) or not targets or any(name not in target_names() for name in targets):
        raise UsageError(f"targets: must be a list out of {', '.join(target_names())}, got {targets!r}")
    return tuple(targets)


def _holds_tensors(module: nn.Module) -> bool:
    """Whether a module itself, not a child, has parameters or buffers that a file would hold."""
    return next(module.parameters(recurse=False), None) is not None or any(
        name not in module._non_persistent_buffers_set and value is not None for name, value in module._buffers.items()
    )


def _identity(module: nn.Module) -> tuple[int, ...] | None:
    kind = kind_of(module)
    if kind is not None and kind.composite:
        return kind.identity(module)
    weight = getattr(module, "_parameters", {}).get("weight")
    return None if weight is None else (id(weight),)


def _tie_refusal(member: Member) -> str | None:
    kind = kind_of(member.module)
    return None if kind is None else kind.tie_refusal(member.module)


def _refusal(member: Member, parent: nn.Module | None, targets: Sequence[str], ignored: set[str]) -> str | None:
    """Why this module is left alone, or None where it is a target."""
    module = member.module
    if isinstance(module, CompressedLayer):
        return "already compressed"
    kind = kind_of(module)
    inside = [name for name, _ in module.named_children()] if kind is not None and kind.composite else []
    if any(name in ignored for name in (*member.names, *(f"{member.name}.{child}" for child in inside))):
        return "ignored"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        return "lazy, its weight is not yet initialised: run the model once first"
    if isinstance(parent, nn.MultiheadAttention):
        return f"{PART_OF_ATTENTION}: it is taken, or left, with the whole"
    if torch.nn.utils.parametrize.is_parametrized(module) or any(
        hasattr(module, name) for name in ("weight_g", "weight_orig", "weight_u")
    ):
        return "parametrized (weight_norm, spectral_norm, pruning …): remove the parametrization first"
    if kind is None:
        return resemblance(module) or "not a target"
    if kind.target not in targets:
        return f"{kind.target} layers are not among targets"
    return _unfit(module, kind)


def _unfit(module: nn.Module, kind: LayerKind) -> str | None:
    """Why this layer of a known kind cannot be factored or rounded."""
    # A weight that is no plain matrix has nothing that the kind could look at; of several the names come first.
    weights = (_unfit_weight(weight, kind.dimensions(module)) for weight in kind.parameters(module).values())
    reason = kind.refusal(module) if kind.composite else None
    reason = reason or next((each for each in weights if each is not None), None)
    if reason is not None:
        return reason
    hooks: list[Mapping[int, object]] = [
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    ]
    if any(hooks):
        return "has forward or backward hooks, which a replacement would lose"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    return None if kind.composite else kind.refusal(module)


def _unfit_weight(weight: Tensor | None, dimensions: int) -> str | None:
    if weight is None or type(weight) not in (nn.Parameter, Tensor) or type(weight.data) is not Tensor:
        return f"weight is a {type(getattr(weight, 'data', weight)).__name__}, not a plain tensor (already quantised?)"
    if weight.is_meta:
        return "weight is on the meta device: it holds no numbers"
    if not weight.is_floating_point() or weight.dtype not in FLOATS:
        return f"weight of dtype {weight.dtype} is not a float16, bfloat16, float32 or float64 tensor"
    if (dimensions and weight.ndim != dimensions) or weight.numel() == 0:
        return f"weight of shape {tuple(weight.shape)} has nothing to compress"
    if weight.numel() > MAX_ELEMENTS:
        return f"weight of {weight.numel():,} elements is over the limit of 2^31"
    return None
