"""What a dense layer holds, and the choice of a rank for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lowrank.errors import RankError, UsageError
from lowrank.numerics.conv_factors import ConvCurve
from lowrank.numerics.factors import RankCurve, check_rank
from lowrank.numerics.moments import InputStatistics, activation_error
from lowrank.numerics.rounding import require_finite

__all__ = ["LinearParts", "carry_over", "choose_rank", "error_in", "is_plain", "linear_parts", "require_embedding"]


class LinearParts(NamedTuple):
    """Weight (out, in) and bias of a linear layer; a view where the layer stores it transposed."""

    weight: Tensor
    bias: Tensor | None


# What decides what a module computes; a subclass that has its own of any of these may compute another thing.
_COMPUTING = (
    "forward",
    "__call__",
    "_call_impl",
    "_conv_forward",
    "forward_impl",
    "__getattr__",
    "__getattribute__",
    "weight",
    "bias",
    "flatten_parameters",
    "_fill_padding_idx_with_zero",
    "_save_to_state_dict",
    "_load_from_state_dict",
    "get_extra_state",
    "set_extra_state",
)


def is_plain(module: nn.Module, base: type[nn.Module]) -> bool:
    """Tell whether a module is of a class of torch's, or of a subclass of it that computes the same and holds nothing more.

    Example:
        >>> class Scaled(nn.Linear):
        ...     def reset_parameters(self):
        ...         super().reset_parameters()
        >>> class Doubled(nn.Linear):
        ...     def forward(self, x):
        ...         return 2 * super().forward(x)
        >>> is_plain(Scaled(2, 2), nn.Linear), is_plain(Doubled(2, 2), nn.Linear)
        (True, False)
    """
    kind = type(module)
    if kind is base:
        return True
    if not isinstance(module, base) or any(
        getattr(kind, name, None) is not getattr(base, name, None) for name in _COMPUTING
    ):
        return False
    # What it holds beside the tensors of its base would be lost; hooks of its state are its own way of being saved.
    hooks = (module._state_dict_hooks, module._state_dict_pre_hooks, module._load_state_dict_pre_hooks)
    extra = (
        set(module._parameters) - {"weight", "bias"} if base in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding) else ()
    )
    return (
        not extra and not module._buffers and not any(hooks) and (base is nn.MultiheadAttention or not module._modules)
    )


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether this is transformers' ``Conv1D`` (GPT-2): a linear layer that keeps its weight as (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def linear_parts(linear: nn.Module) -> LinearParts:
    """Weight and bias of an ``nn.Linear`` or of transformers' ``Conv1D``, whose weight is (in, out).

    Raises:
        UsageError: another module, or a weight that is not a floating matrix in memory.
        NumericsError: NaN or Inf in the weight.
    """
    weight, bias = getattr(linear, "weight", None), getattr(linear, "bias", None)
    transposed = is_conv1d(linear)
    if not (isinstance(linear, nn.Linear) or transposed) or not isinstance(weight, Tensor):
        raise UsageError(f"linear: must be an nn.Linear or a transformers Conv1D, got {type(linear).__name__}")
    if not weight.is_floating_point() or weight.device.type == "meta":
        raise UsageError(
            f"linear: its weight is {weight.dtype} on {weight.device}; a floating weight with values is needed"
        )
    require_finite(weight.detach(), "weight")
    return LinearParts(weight.T if transposed else weight, bias)


def require_embedding(embedding: nn.Module) -> nn.Embedding:
    """Refuse what is no plain embedding.

    Raises:
        UsageError: another module, or one whose forward rewrites its weight (``max_norm``).
    """
    if not isinstance(embedding, nn.Embedding):
        raise UsageError(f"embedding: must be an nn.Embedding, got {type(embedding).__name__}")
    if embedding.max_norm is not None:
        raise UsageError(
            f"embedding: max_norm={embedding.max_norm} rewrites the table in forward; set it to None first"
        )
    require_finite(embedding.weight.detach(), "weight")
    return embedding


def carry_over(source: nn.Module, layer: nn.Module) -> None:
    """Train or eval mode, and ``requires_grad`` of weight and bias."""
    layer.train(source.training)
    weight, bias = getattr(source, "weight", None), getattr(source, "bias", None)
    for name, parameter in layer.named_parameters(recurse=False):
        like = bias if name == "bias" and bias is not None else weight
        if isinstance(like, Tensor):
            parameter.requires_grad_(like.requires_grad)


def error_in(
    weight: Tensor,
    approximation: Tensor,
    statistics: InputStatistics | None,
    *,
    centred: bool = False,
    ridge: float = 0.0,
) -> float:
    """Compute ‖W − W'‖ / ‖W‖ in the Frobenius norm, or in the norm of the inputs where statistics are given.

    Example:
        >>> error_in(torch.eye(2), torch.zeros(2, 2), None)
        1.0
    """
    if statistics is not None and statistics.count:
        return activation_error(
            weight, approximation, statistics.metric(centred=centred, ridge=ridge).to(weight.device)
        )
    matrix = weight.detach().to(torch.float64)
    largest = float(matrix.abs().max()) if matrix.numel() else 0.0
    if largest == 0.0:
        return 0.0
    # Relative to the largest entry, so that squares neither overflow nor vanish.
    lost = torch.linalg.vector_norm((matrix - approximation.detach().to(torch.float64)) / largest)
    return float(lost / torch.linalg.vector_norm(matrix / largest))


def choose_rank(
    curve: RankCurve | ConvCurve,
    rank: int | None,
    max_error: float | None,
    measure: Callable[[int], float],
) -> int:
    """Give the rank asked for, or the smallest whose measured error is at most ``max_error``.

    Rounding adds to the curve's error, and the sum falls with the rank but for its last digits; so the smallest rank is
    searched by halving between the curve's answer and full rank.

    Args:
        curve: truncation errors by rank.
        rank: or ``None``.
        max_error: or ``None``; exactly one of the two is given.
        measure: the error of the finished layer of a rank.

    Raises:
        RankError: rank outside [1, max_rank], neither or both given, or no rank within ``max_error``.
    """
    if (rank is None) == (max_error is None):
        raise RankError(f"rank, max_error: give exactly one, got rank={rank!r} and max_error={max_error!r}")
    if rank is not None:
        return check_rank(rank, curve.max_rank)
    assert max_error is not None
    if isinstance(max_error, bool) or not isinstance(max_error, (int, float)) or not max_error >= 0.0:
        raise RankError(f"max_error: must be a number of at least 0, got {max_error!r}")
    low, high = curve.rank_for_error(max_error), curve.max_rank
    if measure(low) <= max_error:
        return low
    best = measure(high)
    if best > max_error:
        raise RankError(
            f"max_error: {max_error:g} is below what rounding leaves at full rank {high}, {best:.3g}; "
            "allow that much, use more bits or a float layer"
        )
    while high - low > 1:
        middle = (low + high) // 2
        if measure(middle) <= max_error:
            high = middle
        else:
            low = middle
    return high
