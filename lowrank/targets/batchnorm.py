"""BatchNorm taken into the convolution before it, so that a compressed model has neither its tensors nor its arithmetic."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Iterable
from itertools import chain

import torch
from torch import Tensor, fx, nn

from lowrank.calibration.untouched import in_evaluation
from lowrank.errors import CheckpointError, UsageError
from lowrank.targets.copying import become, sharing_copy

__all__ = ["FoldedBatchNorm", "fold_batchnorm", "fold_sharing", "fold_skeleton"]

_PARTNERS: dict[type[nn.Module], type[nn.Module]] = {nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d}
# What running somebody's forward on placeholders for tensors can raise.
_TRACE_ERRORS = (
    fx.proxy.TraceError,
    TypeError,
    ValueError,
    RuntimeError,
    AttributeError,
    LookupError,
    NameError,
    AssertionError,
    ImportError,
)


class FoldedBatchNorm(nn.Identity):
    """Stands where a BatchNorm was; what it did is in the weight and bias of the convolution before it."""


def fold_batchnorm(model: nn.Module) -> tuple[nn.Module, list[tuple[str, str]]]:
    """Make a copy of the model in which each BatchNorm is taken into the convolution before it.

    With running mean μ and variance σ², weight γ and bias β of the BatchNorm, row o of the kernel becomes ``W·γ/√(σ² + ε)`` and the bias
    ``(b − μ)·γ/√(σ² + ε) + β``, computed in float64: the same outputs in eval mode, up to rounding. Pairs are found by
    ``torch.fx``: a convolution that runs once and whose output goes to a BatchNorm that runs once, and nowhere else. Where the whole
    model cannot be traced, the parts of it that can be are looked at one by one, taken to be run by nothing but their own forward.

    Args:
        model: any module that ``torch.fx`` can trace, whole or in parts; it stays as it is.

    Returns:
        The copy, with :class:`FoldedBatchNorm` in the places of the BatchNorms, and the pairs (convolution, BatchNorm) by name. Other
        BatchNorms stay.

    Raises:
        UsageError: no part of the model that has such a pair can be traced, or the model cannot be copied.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()).eval()
        >>> folded, pairs = fold_batchnorm(model)
        >>> pairs, folded[1], folded[0].bias.shape
        ([('0', '1')], FoldedBatchNorm(), torch.Size([4]))
    """
    folded, pairs = fold_sharing(model)
    kept = {id(tensor) for tensor in chain(model.parameters(), model.buffers())}
    memo: dict[int, object] = {}
    for module in folded.modules():
        tables: list[dict[str, Tensor | None]] = [module._parameters, module._buffers]  # type: ignore[list-item]
        for table in tables:
            for name, tensor in table.items():
                if tensor is not None and id(tensor) in kept:
                    table[name] = copy.deepcopy(tensor, memo)
    return folded, pairs


def fold_sharing(model: nn.Module) -> tuple[nn.Module, list[tuple[str, str]]]:
    """As :func:`fold_batchnorm`; parameters that do not change are those of the model."""
    folded = sharing_copy(model)
    modules = dict(folded.named_modules(remove_duplicate=False))
    pairs = []
    for conv_name, norm_name in _pairs(folded, modules):
        conv, norm = modules[conv_name], modules[norm_name]
        weight, bias = _folded(conv, norm)
        if not bool(torch.isfinite(weight).all() & torch.isfinite(bias).all()):
            # Left for the check of weights to name, or beyond the range of a small dtype.
            continue
        own = conv.weight
        assert isinstance(own, Tensor)
        conv.weight = nn.Parameter(weight, requires_grad=own.requires_grad)
        conv.bias = nn.Parameter(bias, requires_grad=own.requires_grad)
        become(norm, FoldedBatchNorm().train(norm.training))
        pairs.append((conv_name, norm_name))
    return folded, pairs


def _pairs(model: nn.Module, modules: dict[str, nn.Module]) -> Iterable[tuple[str, str]]:
    """Names of convolutions and BatchNorms between which nothing else happens."""
    reasons: list[str] = []
    with in_evaluation(model):
        # In eval mode, because that is the mode whose arithmetic is folded.
        graphs = list(_graphs(model, "", reasons))
    found = []
    calls = [(prefix, node) for prefix, graph in graphs for node in graph.nodes if node.op == "call_module"]
    used = Counter(id(modules[prefix + str(node.target)]) for prefix, node in calls)
    read = {
        prefix + str(node.target).rpartition(".")[0]
        for prefix, graph in graphs
        for node in graph.nodes
        if node.op == "get_attr"
    }
    weights = Counter(id(module._parameters.get("weight")) for module in set(modules.values()))
    for prefix, node in calls:
        before = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        if not isinstance(before, fx.Node) or before.op != "call_module":
            continue
        names = prefix + str(before.target), prefix + str(node.target)
        conv, norm = modules[names[0]], modules[names[1]]
        if (
            _PARTNERS.get(type(conv)) is type(norm)
            and len(before.users) == 1
            and used[id(conv)] == used[id(norm)] == 1
            and weights[id(conv.weight)] == 1
            and norm.running_mean is not None
            and not set(names) & read
            and _untouched(conv)
            and _untouched(norm)
        ):
            found.append(names)
    if reasons and not found:
        raise UsageError(
            f"fold_batchnorm: torch.fx cannot trace this {type(model).__name__} ({reasons[0]}), so that it is not known what follows "
            "what; leave fold_batchnorm off, BatchNorm then stays as it is"
        )
    return found


def _graphs(module: nn.Module, prefix: str, reasons: list[str]) -> Iterable[tuple[str, fx.Graph]]:
    """The graph of the module; where it cannot be traced, of the largest modules inside that can be, each with its prefix."""
    try:
        yield prefix, fx.Tracer().trace(module)
    except _TRACE_ERRORS as error:
        first = (str(error).splitlines() or [""])[0][:200]
        reasons.append(f"{type(error).__name__}: {first}")
        # Leaves alone say nothing about what comes before or after them.
        for name, child in module.named_children():
            if any(True for _ in child.children()):
                yield from _graphs(child, f"{prefix}{name}.", reasons)


def _untouched(module: nn.Module) -> bool:
    """Whether nothing else hangs on the module's forward or weight."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    own: Tensor | None = module._parameters.get("weight")
    plain = own is None or (type(own.data) is Tensor and not own.is_meta and own.is_floating_point())
    # Exact types leave out parametrized modules, whose class torch replaces; a weight under weight_norm is no parameter.
    return not any(hooks) and "forward" not in vars(module) and plain and (own is not None or not _is_conv(module))


def _is_conv(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv1d, nn.Conv2d))


def _folded(conv: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution with the BatchNorm in it, in the weight's dtype."""
    assert isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)) and isinstance(norm.running_mean, Tensor)
    assert isinstance(conv, (nn.Conv1d, nn.Conv2d))

    def exact(name: str, default: float) -> Tensor:
        value = getattr(norm, name)
        return value.detach().to(torch.float64) if value is not None else torch.full_like(mean, default)

    mean = norm.running_mean.detach().to(torch.float64)
    gain = exact("weight", 1.0) / torch.sqrt(exact("running_var", 1.0) + norm.eps)
    weight = conv.weight.detach()
    bias = conv.bias.detach().to(torch.float64) if isinstance(conv.bias, Tensor) else torch.zeros_like(mean)
    new_weight = weight.to(torch.float64) * gain.reshape(-1, *([1] * (weight.ndim - 1)))
    new_bias = (bias - mean) * gain + exact("bias", 0.0)
    return new_weight.to(weight.dtype), new_bias.to(weight.dtype)


def fold_skeleton(model: nn.Module, folded: Iterable[str], tensors: Collection[str], where: str) -> None:
    """Give a freshly made model the structure of a folded one, in place; its values are unimportant.

    Args:
        folded: names of the BatchNorms that are gone.
        tensors: names that a file holds; a convolution without bias gets one where its bias is among them.

    Raises:
        CheckpointError: what has such a name is no BatchNorm.
    """
    wanted = list(folded)
    if not wanted:
        return
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in wanted:
        module = modules.get(name)
        if not isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.Identity)):
            found = "nothing" if module is None else type(module).__name__
            raise CheckpointError(
                f"{where}: {name!r} was a folded BatchNorm when it was saved; the model has {found} there"
            )
        become(module, FoldedBatchNorm())
    for name, module in modules.items():
        if type(module) in _PARTNERS and module.bias is None and f"{name}.bias" in tensors:
            weight = module.weight
            assert isinstance(weight, Tensor)
            module.bias = nn.Parameter(weight.new_empty(weight.shape[0]), requires_grad=weight.requires_grad)
