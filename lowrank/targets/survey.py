"""Which modules are targets and why the others are not; ties; swapping one module for another."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from lowrank.errors import UsageError
from lowrank.layers import RECURRENT, CompressedLayer
from lowrank.layers.source import is_conv1d
from lowrank.targets.packed import packed_kind, unfit_packed, weight_matrices

__all__ = [
    "Member",
    "Skipped",
    "Survey",
    "Target",
    "is_conv1d",
    "matching",
    "module_matrix",
    "refuse_adapters",
    "replace_module",
    "survey",
    "unwrapped",
]

TARGET_KINDS = ("linear", "conv", "embedding")
# A tensor's element count beyond which torch's integer kernels take 64-bit paths that this package has not tested.
MAX_ELEMENTS = 2**31
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
        kind: "linear", "conv" or "embedding" (of the first member); "recurrent" or "attention" for modules of several weights.
        members: the first one owns the weight's bytes in the report.
    """

    kind: str
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
        if packed_kind(self.owner) is not None:
            return tuple(next(iter(weight_matrices(self.owner).values())).shape)
        if self.kind == "conv":
            assert isinstance(self.owner.weight, Tensor)
            return tuple(self.owner.weight.shape)
        return tuple(module_matrix(self.owner).shape)

    @property
    def has_embedding(self) -> bool:
        """Whether the weight is looked up row by row somewhere."""
        return any(isinstance(member.module, nn.Embedding) for member in self.members)

    @property
    def linears(self) -> tuple[Member, ...]:
        """The members that multiply."""
        return tuple(member for member in self.members if not isinstance(member.module, nn.Embedding))


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


def module_matrix(module: nn.Module) -> Tensor:
    """The weight as (out, in), (out, in / groups · kernel) or (num_embeddings, embedding_dim); a view where memory allows one.

    Example:
        >>> module_matrix(nn.Linear(3, 2)).shape, module_matrix(nn.Conv2d(3, 2, 5)).shape
        (torch.Size([2, 3]), torch.Size([2, 75]))
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().T if is_conv1d(module) else weight.detach().flatten(1)


def refuse_adapters(model: nn.Module, who: str) -> None:
    """Refuse a model with LoRA adapters.

    Args:
        who: the end of "which has adapters, which …", for the message.

    Raises:
        UsageError: names the first adapted layer.
    """
    for name, module in model.named_modules():
        # By what they hold: adapters live on a higher floor.
        if hasattr(module, "lora_A") or hasattr(module, "modules_to_save"):
            raise UsageError(
                f"model: layer {name} has adapters, which {who}; save_adapter writes them, or "
                "unload_lora(merge_lora(model)) puts them into the weights"
            )


def unwrapped(model: object) -> nn.Module:
    """The model, refused where it is wrapped in something that replaces its forward.

    Raises:
        UsageError: not a module, a bare layer, or wrapped by torch.compile, DataParallel, DDP or FSDP.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"model: must be a torch.nn.Module, got {type(model).__name__}")
    kind = type(model).__name__
    if hasattr(model, "_orig_mod"):
        raise UsageError("model: is wrapped by torch.compile; pass model._orig_mod and compile the result")
    if kind in {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"}:
        raise UsageError(f"model: is wrapped by {kind}; pass model.module and wrap the result")
    if not any(True for _ in model.children()):
        raise UsageError(f"model: is a single layer ({kind}); pass nn.Sequential(layer), so that it can be replaced")
    return model


def matching(patterns: Sequence[str], names: Iterable[str], argument: str) -> dict[str, set[str]]:
    """For each glob the names it covers: a name covers everything below it.

    Raises:
        UsageError: a pattern matches nothing; lists near misses.

    Example:
        >>> sorted(matching(["encoder.*"], ["encoder.a", "encoder.b", "head"], "ignore")["encoder.*"])
        ['encoder.a', 'encoder.b']
    """
    if isinstance(patterns, str):
        raise UsageError(f"{argument}: must be a list of patterns, got the string {patterns!r}; write [{patterns!r}]")
    known = list(names)
    found: dict[str, set[str]] = {}
    for pattern in patterns:
        hits = {name for name in known if fnmatchcase(name, pattern)}
        if not hits:
            near = difflib.get_close_matches(pattern.strip("*."), known, n=3, cutoff=0.4)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise UsageError(f"{argument}: pattern {pattern!r} matches no module of the model{hint}")
        found[pattern] = {name for name in known if any(name == hit or name.startswith(f"{hit}.") for hit in hits)}
    return found


def survey(model: nn.Module, *, targets: Sequence[str] = TARGET_KINDS, ignore: Sequence[str] = ()) -> Survey:
    """Find every module that holds weights and say whether it can be compressed.

    Args:
        model: any module with children.
        targets: kinds to compress: "linear" (recurrent layers and attention included), "conv", "embedding".
        ignore: globs over full module names; one that covers a container covers what is inside.

    Raises:
        UsageError: an unknown kind, a pattern that matches nothing.
    """
    unknown = [kind for kind in targets if kind not in TARGET_KINDS]
    if isinstance(targets, str) or unknown or not targets:
        raise UsageError(f"targets: must be a list out of {', '.join(TARGET_KINDS)}, got {targets!r}")
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
    members = [
        Member(module, tuple(names[key]))
        for key, module in modules.items()
        if next(module.parameters(recurse=False), None) is not None
        or any(
            name not in module._non_persistent_buffers_set and value is not None
            for name, value in module._buffers.items()
        )
    ]
    skipped: list[Skipped] = []
    groups: dict[tuple[int, ...], list[Member]] = {}
    refused: dict[tuple[int, ...], str] = {}
    holders = Counter(id(weight) for member in members for weight in member.module.parameters(recurse=False))
    for member in members:
        reason = _refusal(member, parents.get(id(member.module)), targets, ignored)
        key = _weight_key(member.module)
        if packed_kind(member.module) is not None:
            matrices = weight_matrices(member.module).values()
            if reason is None and any(holders[id(weight)] > 1 for weight in matrices):
                reason = "shares a weight with another module"
            if reason is not None:
                refused.update({(id(weight),): member.name for weight in matrices})
        if reason is not None:
            skipped.append(Skipped(member, reason))
            if key is not None:
                refused.setdefault(key, member.name)
        else:
            assert key is not None
            groups.setdefault(key, []).append(member)
    found: list[Target] = []
    for key, group in groups.items():
        if key in refused:
            skipped += [Skipped(member, f"tied with {refused[key]}, which is not compressed") for member in group]
        elif len(group) > 1 and any(is_conv1d(member.module) for member in group):
            skipped += [Skipped(member, "a tied Conv1D, whose weight is transposed") for member in group]
        elif len(group) > 1 and _kind(group[0].module) == "conv":
            skipped += [Skipped(member, "a convolution whose weight is tied to another module's") for member in group]
        else:
            found.append(Target(_kind(group[0].module) or "linear", tuple(group)))
    return Survey(tuple(found), tuple(skipped), tuple(members))


def _weight_key(module: nn.Module) -> tuple[int, ...] | None:
    if packed_kind(module) is not None:
        return tuple(id(weight) for weight in weight_matrices(module).values())
    weight = getattr(module, "_parameters", {}).get("weight")
    if weight is None:
        return None
    # The parameter itself rather than its memory: two empty or meta tensors share an address without being tied.
    return (id(weight),)


def _refusal(member: Member, parent: nn.Module | None, targets: Sequence[str], ignored: set[str]) -> str | None:
    """Why this module is left alone, or None where it is a target."""
    module = member.module
    if isinstance(module, CompressedLayer):
        return "already compressed"
    inside = [name for name, _ in module.named_children()] if packed_kind(module) is not None else []
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
    kind = _kind(module)
    if kind is None:
        return _unknown(module)
    wanted = "linear" if packed_kind(module) is not None else kind
    if wanted not in targets:
        return f"{wanted} layers are not among targets"
    return _unfit(module)


def _kind(module: nn.Module) -> str | None:
    """Which kind of target a module of exactly this type is."""
    if type(module) in (nn.Conv1d, nn.Conv2d):
        return "conv"
    if type(module) is nn.Embedding:
        return "embedding"
    return "linear" if type(module) is nn.Linear or is_conv1d(module) else packed_kind(module)


def _unknown(module: nn.Module) -> str:
    """Why a module that is no kind of target is none."""
    for parent in (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.MultiheadAttention, *RECURRENT):
        if isinstance(module, parent):
            return f"a subclass of nn.{parent.__name__} whose forward may differ"
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return (
            "a transposed convolution: its outputs overlap, so that no patch of its input determines one; left as it is"
        )
    if isinstance(module, nn.modules.conv._ConvNd):
        return "a three-dimensional convolution: only nn.Conv1d and nn.Conv2d are handled"
    return "not a target"


def _unfit(module: nn.Module) -> str | None:
    """Why this layer of a known kind cannot be factored or rounded."""
    if packed_kind(module) is None:
        dimensions = 2 + (len(module.kernel_size) if isinstance(module, (nn.Conv1d, nn.Conv2d)) else 0)
        reason = _unfit_weight(module._parameters.get("weight"), dimensions)
    else:
        reasons = (_unfit_weight(weight, 2) for weight in weight_matrices(module).values())
        reason = unfit_packed(module) or next((each for each in reasons if each is not None), None)
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
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "nn.Embedding with max_norm changes its weight while it runs"
    return None


def _unfit_weight(weight: Tensor | None, dimensions: int) -> str | None:
    if weight is None or type(weight) not in (nn.Parameter, Tensor) or type(weight.data) is not Tensor:
        return f"weight is a {type(getattr(weight, 'data', weight)).__name__}, not a plain tensor (already quantised?)"
    if weight.is_meta:
        return "weight is on the meta device: it holds no numbers"
    if not weight.is_floating_point() or weight.dtype not in (
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    ):
        return f"weight of dtype {weight.dtype} is not a float16, bfloat16, float32 or float64 tensor"
    if weight.ndim != dimensions or weight.numel() == 0:
        return f"weight of shape {tuple(weight.shape)} has nothing to compress"
    if weight.numel() > MAX_ELEMENTS:
        return f"weight of {weight.numel():,} elements is over the limit of 2^31"
    return None


def replace_module(model: nn.Module, names: Iterable[str], module: nn.Module) -> None:
    """Put ``module`` in every place named.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> replace_module(model, ["0"], nn.Identity())
        >>> model
        Sequential(
          (0): Identity()
        )
    """
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
