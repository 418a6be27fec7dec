"""What a kind of layer is: which modules belong to it, what they hold, and how data flows through them.

One file a kind (``linear.py``, ``embedding.py``, ``conv.py``, ``recurrent.py``, ``attention.py``), registered in
``lowrank/targets/__init__.py``. What a kind can become is the formats' to say (:mod:`lowrank.compression.formats`); a kind that
no format builds is analysed and left as it is.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lowrank.calibration.observers import AnyObserver, observer_of
from lowrank.errors import UsageError
from lowrank.layers.source import is_plain
from lowrank.numerics.conv_factors import ConvCurve, largest_rank
from lowrank.numerics.factors import RankCurve, factorize, factorize_embedding
from lowrank.numerics.moments import InputStatistics, TokenCounts
from lowrank.numerics.sampled_moments import Moment, moment_squares

__all__ = [
    "Factoring",
    "LayerKind",
    "kind_named",
    "kind_of",
    "layer_kinds",
    "register_kind",
    "resemblance",
    "target_names",
]


@dataclass(frozen=True)
class Factoring:
    """Say what a weight is to be factored by.

    Attributes:
        inputs, lookups: what flows into the layer, where it is known.
        scheme: one of :meth:`LayerKind.schemes`.
        blocks: of the weight, that never meet.
        ridge: relative, of the moments.
        shift_bias: the bias may take the correction of the mean.
        name: for messages.
    """

    name: str
    inputs: InputStatistics | None = None
    lookups: TokenCounts | None = None
    scheme: str | None = None
    blocks: int = 1
    ridge: float = 0.0
    shift_bias: bool = False


class LayerKind(ABC):
    """Describe one kind of layer; a subclass overrides what differs from a linear layer.

    Attributes:
        name: of the kind, as it stands in plans.
        target: what the argument ``targets`` of :func:`lowrank.compress_model` calls it.
        described: the classes in words, for messages.
        types: the classes whose modules belong to the kind; of their subclasses those that compute the same.
        multiplies: whether rows are multiplied with the weight; else they are looked up in it.
        composite: whether a module holds several matrices, which are taken or left together.
        differentiated: whether gradients at a module's outputs tell what an error of it costs.
        weight_only: whether activations are never rounded, whatever is asked.
        stacked: whether each matrix of a composite is a stack of blocks that see inputs of their own: a mixture's experts.
    """

    name: ClassVar[str]
    target: ClassVar[str]
    described: ClassVar[str]
    types: ClassVar[tuple[type[nn.Module], ...]] = ()
    multiplies: ClassVar[bool] = True
    composite: ClassVar[bool] = False
    differentiated: ClassVar[bool] = False
    weight_only: ClassVar[bool] = False
    stacked: ClassVar[bool] = False

    def matches(self, module: nn.Module) -> bool:
        """Tell whether a module is of this kind."""
        return any(is_plain(module, each) for each in self.types)

    def refusal(self, module: nn.Module) -> str | None:
        """Say why this module of the kind cannot be replaced, beyond what holds for every kind; ``None`` where it can."""
        return None

    def resembles(self, module: nn.Module) -> str | None:
        """Say why a module of no kind is none of this one, where one could think so; else ``None``."""
        parent = next((each for each in self.types if isinstance(module, each)), None)
        return None if parent is None else f"a subclass of nn.{parent.__name__} whose forward may differ"

    def tie_refusal(self, module: nn.Module) -> str | None:
        """Say why a weight that several modules share cannot be replaced where this one is among them."""
        return None

    def parameters(self, module: nn.Module) -> dict[str, Tensor | None]:
        """Give the parameters that would be replaced, by name; one that is missing is ``None``."""
        return {"weight": module._parameters.get("weight")}

    def dimensions(self, module: nn.Module) -> int:
        """Give how many dimensions each of :meth:`parameters` has to have."""
        return 2

    def identity(self, module: nn.Module) -> tuple[int, ...]:
        """Tell modules apart by the parameters they hold: two of one identity are tied.

        The parameters themselves count rather than their memory: two empty or meta tensors share an address without being tied.
        """
        return tuple(id(parameter) for parameter in self.parameters(module).values())

    @abstractmethod
    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """Give each matrix as a stack (blocks, out, in) of blocks that never meet, without a gradient.

        A linear layer has one block, a grouped convolution its groups. Views where memory allows.
        """

    def shape(self, module: nn.Module) -> tuple[int, ...]:
        """Give the weight's shape as plans state it; of the first of several matrices."""
        _, out, inner = next(iter(self.weights(module).values())).shape
        return out, inner

    def matrix(self, module: nn.Module) -> Tensor:
        """Give the weight as (out, in · kernel) or (num_embeddings, embedding_dim); of several one row with all of them."""
        stack = next(iter(self.weights(module).values()))
        return stack.reshape(-1, stack.shape[2])

    def observer(self, module: nn.Module) -> AnyObserver | None:
        """Give what says which rows of an input meet the weight; ``None`` where nothing is to be gathered."""
        return observer_of(module)

    def rows(self, module: nn.Module, output: Tensor) -> int:
        """Count the rows (tokens, positions, look-ups) that a call with this output has worked on."""
        return output.numel() // max(int(output.shape[-1]), 1)

    def timed_as(self, module: nn.Module) -> str | None:
        """Give what stands before the format's name in timing tables; ``None`` for modules that were never timed."""
        return None

    # Factors -----------------------------------------------------------------------------------------------------------------

    def schemes(self, shape: tuple[int, ...]) -> tuple[str | None, ...]:
        """Give the ways to cut a weight of this shape in two; ``None`` is the only one of a matrix."""
        return (None,)

    def rank_limit(self, shape: tuple[int, ...], scheme: str | None, blocks: int = 1) -> int:
        """Give the largest rank that means anything: the smaller side of what is factored, in each block."""
        return largest_rank(shape, scheme, blocks)

    def component_size(self, shape: tuple[int, ...], scheme: str | None, blocks: int = 1) -> int:
        """Count the numbers that one rank component takes in all blocks together."""
        return blocks * math.prod(shape[1:]) + shape[0]

    def factorize(self, weight: Tensor, known: Factoring) -> RankCurve | ConvCurve:
        """Decompose a weight once, for every rank.

        Args:
            weight: as :meth:`factored_weight` gives it, perhaps weighed by gradients.
            known: of the layer.
        """
        if known.inputs is not None:
            return factorize(weight, known.inputs, ridge=known.ridge, shift_bias=known.shift_bias, name=known.name)
        # Rows that were never looked up would be left out for free.
        if known.lookups is not None and not known.lookups.unseen:
            return factorize_embedding(weight, known.lookups, name=known.name)
        return factorize(weight, name=known.name)

    def factored_weight(self, module: nn.Module) -> Tensor:
        """Give the weight in the shape in which it is factored, without a gradient."""
        return self.matrix(module)

    def moments(self, inputs: InputStatistics, *, blocks: int, centred: bool, device: torch.device) -> Moment:
        """Give Σ of what flows in: (in, in), or (blocks, in, in) where there are several blocks; or the rows it is made of."""
        return inputs.metric(centred=centred).to(device)

    def squared_norm(self, matrix: Tensor, moments: Moment | None, row_weights: Tensor | None, blocks: int) -> float:
        """Compute ‖matrix‖² in the norm of the inputs, or of the look-ups.

        Args:
            matrix: (out, in · kernel), any floating dtype.
            moments: from :meth:`moments`; ``None`` is the identity.
            row_weights: (out,) how often each row is looked up, as a share.
            blocks: that never meet.
        """
        matrix = matrix.to(torch.float64)
        squares = matrix.square().sum(dim=1) if moments is None else moment_squares(matrix, moments)
        return float((squares if row_weights is None else squares * row_weights).sum())


_KINDS: dict[str, LayerKind] = {}


def register_kind(kind: LayerKind) -> LayerKind:
    """Add a kind; modules are asked of the kinds in the order of their registration.

    Raises:
        UsageError: the name is taken.
    """
    if kind.name in _KINDS:
        raise UsageError(f"layer kind {kind.name!r}: is registered already, by {type(_KINDS[kind.name]).__name__}")
    _KINDS[kind.name] = kind
    return kind


def layer_kinds() -> Iterator[LayerKind]:
    """Go through the registered kinds, in order."""
    yield from _KINDS.values()


def kind_named(name: str) -> LayerKind | None:
    """Find a kind by its name; ``None`` where none is registered.

    Example:
        >>> kind_named("conv").described, kind_named("sparse")
        ('nn.Conv1d, nn.Conv2d', None)
    """
    return _KINDS.get(name)


def kind_of(module: nn.Module) -> LayerKind | None:
    """Find the kind of a module; ``None`` where it is of none.

    Example:
        >>> kind_of(nn.GRU(2, 2)).name, kind_of(nn.Linear(2, 2)).name, kind_of(nn.ReLU())
        ('recurrent', 'linear', None)
    """
    return next((kind for kind in _KINDS.values() if kind.matches(module)), None)


def resemblance(module: nn.Module) -> str | None:
    """Say what a module of no kind looks like, and why it is not that; ``None`` where it looks like none."""
    found = (kind.resembles(module) for kind in _KINDS.values())
    return next((reason for reason in found if reason is not None), None)


def target_names() -> tuple[str, ...]:
    """List what ``targets`` may name, in the order of registration.

    Example:
        >>> target_names()
        ('linear', 'conv', 'embedding', 'experts')
    """
    return tuple(dict.fromkeys(kind.target for kind in _KINDS.values()))
