"""Several processes under ``torchrun``; the only room that imports accelerate, and only when there are several."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank.errors import UsageError

__all__ = ["Processes", "processes"]


@dataclass(frozen=True)
class Processes:
    """The processes that train together.

    Attributes:
        rank: of this one.
        count: of all.

    Example:
        >>> Processes().total(torch.ones(2)).tolist()
        [1.0, 1.0]
    """

    rank: int = 0
    count: int = 1
    state: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and talks."""
        return self.rank == 0

    def total(self, tensor: Tensor) -> Tensor:
        """Sum the tensor over all processes, the same in each."""
        if self.count == 1:
            return tensor
        from accelerate.utils import reduce

        # The backend of CUDA cannot add up what lies on the CPU, as counts do.
        result: Tensor = reduce(tensor.to(self.state.device), reduction="sum")
        return result.to(tensor.device)

    def wait(self) -> None:
        """Until all have come here."""
        if self.state is not None:
            self.state.wait_for_everyone()


def processes(device: torch.device) -> Processes:
    """Describe this process among those that ``torchrun`` (or ``accelerate launch``) started; alone, nothing is imported.

    Args:
        device: of the model: gloo joins processes on the CPU, nccl on CUDA.

    Raises:
        UsageError: several processes without accelerate.

    Example:
        >>> processes(torch.device("cpu")).count
        1
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise UsageError("training in several processes needs accelerate; pip install 'lowrank[hf]'") from error
    state = PartialState(cpu=device.type == "cpu")
    return Processes(state.process_index, state.num_processes, state)
