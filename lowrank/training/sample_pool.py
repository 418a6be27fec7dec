"""Unlabelled samples drawn into batches of their own: by length where they are token ids, and varied where that is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lowrank.calibration.batches import Batch

__all__ = ["SamplePool"]

# Batches are sorted by length within so many of them: little padding, and still other neighbours every epoch.
_SORTED_TOGETHER = 8
# A heuristic of the healing study: of the batches' rows three in ten stay as they are; of the others two in five are
# joined from two samples, and up to three in ten of their tokens are exchanged, half of them for any token at all.
_KEPT, _JOINED, _EXCHANGED = 0.3, 0.4, (0.0, 0.1, 0.2, 0.3)
# Of an image's sides, the most that it is shifted by: four pixels of 32, as networks for such images are trained.
_SHIFT = 0.125


@dataclass
class SamplePool:
    """Samples as they will be drawn; make one with :meth:`of`.

    Attributes:
        rows: token samples: a dict of (positions,) tensors each, padding removed; empty where samples are not tokens.
        batches: other samples: one batch of all of them where their shapes agree, else the batches as they came.
        fill: what padding holds, by argument name.
        vocabulary: token ids are below this; 0 where nothing may be exchanged.
        mixes: other samples are of floats alone, and are to be varied.
        fixed: ids that begin and end every sample; they are never exchanged.
    """

    rows: list[dict[str, Tensor]]
    batches: list[Batch]
    fill: dict[str, int]
    vocabulary: int = 0
    fixed: tuple[bool, bool] = (False, False)
    mixes: bool = False

    @classmethod
    def of(cls, batches: Sequence[Batch], *, vocabulary: int = 0, vary: bool = True) -> SamplePool:
        """Take batches apart into samples.

        Args:
            batches: from :func:`lowrank.calibration.batches.prepare_batches`.
            vocabulary: number of token ids the model knows, to vary token samples; 0 where that is not known.
            vary: let every epoch have samples of its own.

        Example:
            >>> ids = torch.tensor([[1, 5, 2, 0], [1, 6, 7, 2]])
            >>> batch = Batch((), {"input_ids": ids, "attention_mask": (ids > 0).long()}, 2)
            >>> pool = SamplePool.of([batch])
            >>> [len(row["input_ids"]) for row in pool.rows], pool.fixed
            ([3, 4], (True, True))
        """
        if all(_is_tokens(batch) for batch in batches) and len({tuple(sorted(batch.kwargs)) for batch in batches}) == 1:
            rows = [row for batch in batches for row in _rows(batch)]
            fill = _fill(batches)
            ends = [{int(row["input_ids"][place]) for row in rows} for place in (0, -1)]
            return cls(rows, [], fill, vocabulary if vary else 0, (len(ends[0]) == 1, len(ends[1]) == 1))
        joined = [_joined(batches)] if _same_shapes(batches) else list(batches)
        return cls([], joined, {}, mixes=vary and len(joined) == 1 and _all_floats(joined[0]))

    @property
    def varies(self) -> bool:
        """Whether a sample is another one each time it is drawn."""
        return self.mixes or (bool(self.rows) and self.vocabulary > 0)

    def epoch(self, size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Yield all samples once, in batches of ``size`` and random order."""
        if self.rows:
            yield from self._token_epoch(size, generator)
        elif len(self.batches) == 1 and self.batches[0].size > 1:
            whole = self.batches[0]
            for indices in torch.randperm(whole.size, generator=generator).split(size):
                yield _mixed(whole.select(indices), generator) if self.mixes else whole.select(indices)
        else:
            for index in torch.randperm(len(self.batches), generator=generator).tolist():
                yield self.batches[index]

    def _token_epoch(self, size: int, generator: torch.Generator) -> Iterator[Batch]:
        groups: list[list[int]] = []
        for chunk in torch.randperm(len(self.rows), generator=generator).split(size * _SORTED_TOGETHER):
            order = sorted(chunk.tolist(), key=lambda index: len(self.rows[index]["input_ids"]))
            groups += [order[start : start + size] for start in range(0, len(order), size)]
        for position in torch.randperm(len(groups), generator=generator).tolist():
            rows = [self.rows[index] for index in groups[position]]
            if self.vocabulary:
                rows = [self._varied(row, generator) for row in rows]
            yield self._padded(rows)

    def _varied(self, row: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Another sample that the original model can be asked about: spans of two joined, tokens exchanged."""
        if _draw(generator) < _KEPT:
            return row
        # Arguments beside the ids (token types) keep their first value: they belong to positions, not to tokens.
        ids = row["input_ids"]
        if _draw(generator) < _JOINED:
            ids = self._join(ids, self.rows[_below(len(self.rows), generator)]["input_ids"], generator)
        ids = ids.clone()
        share = _EXCHANGED[_below(len(_EXCHANGED), generator)]
        chosen = torch.rand(len(ids), generator=generator) < share
        chosen[: self.fixed[0]] = False
        if self.fixed[1]:
            chosen[-1] = False
        for index in torch.nonzero(chosen).flatten().tolist():
            anything = _draw(generator) < 0.5
            other = self.rows[_below(len(self.rows), generator)]["input_ids"]
            from_others = int(other[_below(len(other), generator)])
            ids[index] = _below(self.vocabulary, generator) if anything else from_others
        return {key: ids if key == "input_ids" else _stretched(value, len(ids)) for key, value in row.items()}

    def _join(self, one: Tensor, other: Tensor, generator: torch.Generator) -> Tensor:
        """The beginning of one sample and the end of another, no longer than the longer of them."""
        head = one[: 1 + _below(len(one), generator)]
        tail = other[_below(len(other), generator) :]
        longest = max(len(one), len(other))
        return torch.cat([head[: max(longest - len(tail), 1)], tail])

    def _padded(self, rows: Sequence[dict[str, Tensor]]) -> Batch:
        width = max(len(row["input_ids"]) for row in rows)
        stacked: dict[str, Tensor] = {}
        for key, value in rows[0].items():
            table = value.new_full((len(rows), width), self.fill[key])
            for index, row in enumerate(rows):
                table[index, : len(row[key])] = row[key]
            stacked[key] = table
        return Batch((), stacked, len(rows))


def _is_tokens(batch: Batch) -> bool:
    ids, mask = batch.kwargs.get("input_ids"), batch.kwargs.get("attention_mask")
    if batch.args or not isinstance(ids, Tensor) or ids.ndim != 2 or not isinstance(mask, Tensor) or ids.shape[1] == 0:
        return False
    if not all(isinstance(value, Tensor) and value.shape == ids.shape for value in batch.kwargs.values()):
        return False
    # Padding on the right, and no sample without a token.
    return bool((mask[:, 1:] <= mask[:, :-1]).all()) and bool((mask[:, 0] == 1).all())


def _rows(batch: Batch) -> Iterator[dict[str, Tensor]]:
    lengths = batch.kwargs["attention_mask"].sum(dim=1).tolist()
    for index, length in enumerate(lengths):
        yield {key: value[index, : int(length)] for key, value in batch.kwargs.items()}


def _fill(batches: Sequence[Batch]) -> dict[str, int]:
    """What each argument holds where the mask is 0; 0 where nothing is padded."""
    fill = dict.fromkeys(batches[0].kwargs, 0)
    for batch in batches:
        padded = batch.kwargs["attention_mask"] == 0
        if bool(padded.any()):
            fill = {key: int(value[padded][0]) for key, value in batch.kwargs.items()}
            break
    return fill


def _same_shapes(batches: Sequence[Batch]) -> bool:
    """Whether every tensor counts samples in dimension 0 and agrees with its fellows in the others."""

    def shapes(batch: Batch) -> list[Any]:
        values = [*batch.args, *(batch.kwargs[key] for key in sorted(batch.kwargs))]
        return [
            (tuple(value.shape[1:]), value.dtype)
            if isinstance(value, Tensor) and value.ndim and value.shape[0] == batch.size > 1
            else None
            for value in values
        ]

    first = shapes(batches[0])
    return None not in first and all(shapes(batch) == first for batch in batches)


def _all_floats(batch: Batch) -> bool:
    values = [*batch.args, *batch.kwargs.values()]
    return batch.size > 1 and all(isinstance(value, Tensor) and value.is_floating_point() for value in values)


def _mixed(batch: Batch, generator: torch.Generator) -> Batch:
    """Half of the samples each a weighted mean of itself and another (mixup, Zhang et al. 2018); images mirrored and shifted first."""
    shares = torch.rand(batch.size, generator=generator)
    shares = torch.where(torch.rand(batch.size, generator=generator) < 0.5, shares, torch.ones_like(shares))
    others = torch.randperm(batch.size, generator=generator)
    seed = int(torch.randint(2**62, (), generator=generator))

    def vary(value: Tensor) -> Tensor:
        # Arguments that belong together are turned alike.
        moved = _moved(value, torch.Generator().manual_seed(seed)) if value.ndim == 4 else value
        share = shares.to(value.device, value.dtype).view(-1, *[1] * (value.ndim - 1))
        return share * moved + (1 - share) * moved[others.to(value.device)]

    return Batch(tuple(map(vary, batch.args)), {key: vary(value) for key, value in batch.kwargs.items()}, batch.size)


def _moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """(samples, channels, height, width): each mirrored or not, and shifted by its own few pixels with zeros coming in."""
    height, width = images.shape[2:]
    down, along = int(_SHIFT * height), int(_SHIFT * width)
    padded = F.pad(images, (along, along, down, down))
    flips = torch.rand(len(images), generator=generator) < 0.5
    rows = torch.randint(2 * down + 1, (len(images),), generator=generator)
    columns = torch.randint(2 * along + 1, (len(images),), generator=generator)
    moved = [
        image[:, row : row + height, column : column + width].flip(2 if flip else ())
        for image, flip, row, column in zip(padded, flips.tolist(), rows.tolist(), columns.tolist(), strict=True)
    ]
    return torch.stack(moved)


def _joined(batches: Sequence[Batch]) -> Batch:
    args = tuple(torch.cat(values) for values in zip(*(batch.args for batch in batches), strict=True))
    kwargs = {key: torch.cat([batch.kwargs[key] for batch in batches]) for key in batches[0].kwargs}
    return Batch(args, kwargs, sum(batch.size for batch in batches))


def _stretched(values: Tensor, length: int) -> Tensor:
    if length <= len(values):
        return values[:length]
    return torch.cat([values, values[:1].expand(length - len(values))])


def _draw(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator))


def _below(limit: int, generator: torch.Generator) -> int:
    return int(torch.randint(limit, (), generator=generator))
