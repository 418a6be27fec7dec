"""What flows into each expert of a mixture: the tokens that were routed to it, and what they became within it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank.calibration.batches import Batch, evaluating, sample_count
from lowrank.calibration.inputs import no_fast_path
from lowrank.calibration.observers import TokenObserver
from lowrank.calibration.untouched import untouched
from lowrank.numerics.moments import InputStatistics
from lowrank.numerics.sampled_moments import rows_to_keep

__all__ = ["ExpertInputs", "collect_expert_inputs"]

# Products whose second operand is a weight.
_PRODUCTS = ("mm", "matmul", "linear", "mv")
_GROUPED = ("_grouped_mm", "grouped_mm_fallback")


@dataclass
class ExpertInputs:
    """Hold what flows into each expert's matrices.

    Attributes:
        statistics: by the parameter's name and the expert's number; absent where no token came by.
    """

    statistics: dict[tuple[str, int], InputStatistics] = field(default_factory=dict)

    def of(self, name: str, expert: int) -> InputStatistics | None:
        """Give what flows into one matrix."""
        return self.statistics.get((name, expert))

    def count(self, name: str, expert: int) -> int:
        """Count the tokens that one matrix was multiplied with.

        Example:
            >>> ExpertInputs().count("down_proj", 0)
            0
        """
        found = self.of(name, expert)
        return 0 if found is None else found.offered

    def is_thin(self, name: str, expert: int, rows: int) -> bool:
        """Tell whether too few tokens came by for their moment to say anything; see :meth:`InputStatistics.is_thin`."""
        found = self.of(name, expert)
        return found is None or found.is_thin(rows)


def collect_expert_inputs(
    model: nn.Module,
    batches: Sequence[Batch],
    modules: Mapping[str, Mapping[str, Tensor]],
    *,
    seed: int = 0,
) -> dict[str, ExpertInputs]:
    """Run the batches and gather, for each expert of the modules named, the moments of what its matrices are multiplied with.

    Each module's forward is called once more, on the tokens that are no padding, while every product with a part of one of its
    parameters is looked at, whichever way it is written: expert by expert (``F.linear``, ``@``), of weights picked out
    (``param[ids]``, ``bmm``), or of sorted tokens (``grouped_mm``).

    Args:
        model: runs the batches.
        batches: prepared ones.
        modules: by name, the parameters of each as (experts, out, in), views of the very numbers that it computes with.
        seed: of the tokens drawn where an expert is very wide.

    Example:
        >>> import torch
        >>> class Experts(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.up = nn.Parameter(torch.ones(3, 4, 2))
        ...     def forward(self, x):
        ...         return x @ self.up[1].T
        >>> model = nn.Sequential(Experts())
        >>> found = collect_expert_inputs(model, [Batch((torch.ones(5, 2),))], {"0": {"up": model[0].up.detach()}})
        >>> found["0"].count("up", 1), found["0"].count("up", 0)
        (5, 0)
    """
    found = {name: ExpertInputs() for name in modules}
    total = max(sample_count(batches), 1)
    observers: dict[tuple[str, str, int], TokenObserver] = {}
    state: dict[str, Batch] = {}

    def hook(name: str) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            batch = state["batch"]
            args, kwargs = _without_padding(args, kwargs, batch)
            with _Products(modules[name]) as seen:
                module.forward(*args, **kwargs)
            for parameter, expert, turned, rows in seen.rows:
                stack = modules[name][parameter]
                _, outputs, inputs = stack.shape
                # Of a matrix that is multiplied the other way round the moment would be of its outputs' side.
                if rows.shape[1] != inputs or turned != (stack.stride(2) != 1):
                    continue
                key = (name, parameter, expert)
                if key not in observers:
                    observers[key] = TokenObserver(rows_to_keep(inputs, outputs))
                    observers[key].begin(f"{name}.{parameter}.{expert}", seed, total)
                known = found[name].statistics
                if key[1:] not in known:
                    known[key[1:]] = observers[key].empty(rows)
                observers[key].add(known[key[1:]], rows, batch)

        return record

    with contextlib.ExitStack() as stack:
        stack.enter_context(untouched(model))
        stack.enter_context(evaluating(model))
        stack.enter_context(no_fast_path())
        for name in modules:
            handle = model.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True)
            stack.callback(handle.remove)
        for batch in batches:
            state["batch"] = batch
            batch.run(model)
    return found


def _without_padding(
    args: tuple[Any, ...], kwargs: dict[str, Any], batch: Batch
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call on flattened tokens, without those that the batch says are padding."""
    values = [*args, *kwargs.values()]
    first = next((value for value in values if isinstance(value, Tensor)), None)
    if first is None or first.ndim != 2:
        return args, kwargs
    tokens = first.shape[0]
    mask = next((mask.kept.reshape(-1) for mask in batch.masks if mask.kept.numel() == tokens), None)
    if mask is None or bool(mask.all()):
        return args, kwargs

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == tokens:
            return value[mask.to(value.device)]
        return value

    return tuple(cut(value) for value in args), {name: cut(value) for name, value in kwargs.items()}


class _Products(TorchDispatchMode):
    """Note what parts of some parameters are multiplied with.

    Attributes:
        rows: parameter, expert, whether its matrix was used as (in, out), and (tokens, in).
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.weights = weights
        self.rows: list[tuple[str, int, bool, Tensor]] = []
        # Weights picked out of a parameter, kept so that their memory is not another tensor's meanwhile.
        self._picked: list[tuple[str, Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if name == "index" and (source := self._source(args[0])) is not None and _of_one_index(args[1]):
            self._picked.append((source[0], args[1][0].reshape(-1), result))
        elif name in _PRODUCTS and len(args) >= 2:
            self._product(args[0], args[1], linear=name == "linear")
        elif name == "addmm":
            self._product(args[1], args[2])
        elif name in ("bmm", "baddbmm"):
            self._batched(*args[-2:])
        elif name in _GROUPED:
            self._grouped(args[0], args[1], args[2] if len(args) > 2 else kwargs.get("offs"))
        return result

    def _source(self, value: Any) -> tuple[str, int] | None:
        """The parameter that a tensor is a part of, and how many numbers from its start."""
        if not isinstance(value, Tensor):
            return None
        for name, weight in self.weights.items():
            start = int(value.storage_offset() - weight.storage_offset())
            same = value.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
            if same and 0 <= start < weight.numel():
                return name, start
        return None

    def _note(self, name: str, expert: int, matrix: Tensor, x: Tensor, *, linear: bool = False) -> None:
        """Note a product ``x @ matrix`` (of ``linear``: with its transpose)."""
        # Rows of the parameter lie one after the other; where these are the rows of the right operand, they are its inputs.
        turned = (matrix.stride(-1) == 1 and matrix.shape[-1] > 1) != linear
        self.rows.append((name, expert, turned, x.reshape(-1, x.shape[-1])))

    def _product(self, left: Tensor, right: Tensor, *, linear: bool = False) -> None:
        source = self._source(right)
        if source is None:
            source = self._source(left)
            if source is None or left.ndim != 2:
                return
            # The weight on the left, tokens as columns.
            left, right = (right.reshape(right.shape[0], -1)).T, left.T
        if right.ndim == 2:
            name, start = source
            self._note(name, start // self.weights[name][0].numel(), right, left, linear=linear)

    def _batched(self, left: Tensor, right: Tensor) -> None:
        for weight, tokens, matrix in ((right, left, right), (left, right.transpose(1, 2), left.transpose(1, 2))):
            source = self._source(weight)
            if source is not None:
                first = source[1] // self.weights[source[0]][0].numel()
                for at in range(weight.shape[0]):
                    self._note(source[0], first + at, matrix[at], tokens[at])
                return
            for name, ids, picked in self._picked:
                if weight.untyped_storage().data_ptr() == picked.untyped_storage().data_ptr():
                    for expert in ids.unique().tolist():
                        self._note(name, expert, matrix[0], tokens[ids == expert])
                    return

    def _grouped(self, x: Tensor, weight: Tensor, ends: Tensor | None) -> None:
        source = self._source(weight)
        if source is None or ends is None:
            return
        start = 0
        for expert, end in enumerate(ends.tolist()):
            if end > start:
                self._note(source[0], expert, weight[expert], x[start:end])
            start = max(start, end)

    def __enter__(self) -> _Products:
        super().__enter__()
        return self


def _of_one_index(indices: Sequence[Tensor | None]) -> bool:
    return len(indices) == 1 and indices[0] is not None and not indices[0].dtype.is_floating_point
