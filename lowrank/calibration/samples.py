"""Which samples are the same: only distinct ones prove anything, and none may both choose and verify."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank.calibration.batches import MIN_VERIFICATION_SAMPLES, Batch, Batches, sample_count
from lowrank.calibration.masks import MASK_NAMES
from lowrank.calibration.outputs import tensors_in
from lowrank.errors import CalibrationError
from lowrank.io.digests import ALGORITHM

__all__ = ["ENOUGH", "PROVES_NOTHING", "data_digest", "distinct", "leaves", "sample_digests", "without_shared"]

ENOUGH = 4 * MIN_VERIFICATION_SAMPLES
# In a warning it says that a bound on the error is none, whatever the test of the samples gives.
PROVES_NOTHING = "proves nothing for others"
_PLAIN = (str, bytes, int, float, bool, complex, type(None))


def leaves(value: Any) -> list[Tensor]:
    """List the tensors in lists, tuples and dicts, but not those in objects, which a model takes as they are.

    Example:
        >>> len(leaves([torch.ones(2), {"x": (torch.ones(1), "text")}]))
        2
    """
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in leaves(item)]
    return []


def coarsest_dtype(batches: Sequence[Batch]) -> torch.dtype:
    """Find the floating dtype of the fewest digits, in which copies that were rounded on their way are the same again.

    Example:
        >>> coarsest_dtype([Batch((torch.zeros(1),)), Batch((torch.zeros(1).half(),))])
        torch.float16
    """
    found = {tensor.dtype for batch in batches for tensor in batch.tensors if tensor.is_floating_point()}
    return max(found | {torch.float32}, key=lambda dtype: torch.finfo(dtype).eps)


def sample_digests(batch: Batch, floating: torch.dtype = torch.float32) -> list[bytes]:
    """Compute a digest of each sample: of what the model reads of it, less the padding, masks and labels.

    Names, and the integer or floating dtype, are no part of it.

    Args:
        floating: floating numbers are compared in this dtype.

    Example:
        >>> a, b, c = sample_digests(Batch((torch.tensor([[1.0], [2.0], [1.0]]),), size=3))
        >>> a == c, a == b
        (True, False)
    """
    hashes = [hashlib.blake2b(digest_size=16) for _ in range(batch.size)]
    named = (
        zip(batch.names, batch.args, strict=False) if batch.names else ((str(n), a) for n, a in enumerate(batch.args))
    )
    arguments = {**dict(named), **batch.kwargs}
    arguments |= {str(index): value for index, value in enumerate(batch.args) if index >= len(batch.names) > 0}
    for key in sorted(arguments):
        if key not in MASK_NAMES and key != "labels":
            _digest(arguments[key], batch, hashes, floating)
    return [each.digest() for each in hashes]


def _digest(value: Any, batch: Batch, hashes: Sequence[Any], floating: torch.dtype) -> None:
    if isinstance(value, Tensor):
        kept = batch.kept(value.shape) if value.ndim >= 2 else None
        if batch.size > 1 and value.ndim and value.shape[0] == batch.size:
            for index, each in enumerate(hashes):
                row = value[index] if kept is None or kept.shape[0] != batch.size else value[index][kept[index]]
                each.update(_bytes(row, floating))
            return
        if kept is not None and tuple(kept.shape) == tuple(value.shape[:2]):
            value = value[kept]
        elif value.ndim > 1 and value.shape[0] == 1:
            # One sample is the same in a batch of its own.
            value = value[0]
        for each in hashes:
            each.update(_bytes(value, floating))
    elif isinstance(value, (list, tuple, dict)):
        items = list(value.values()) if isinstance(value, dict) else list(value)
        if batch.size > 1 and len(items) == batch.size and not any(leaves(item) for item in items):
            for item, each in zip(items, hashes, strict=True):
                each.update(_object_bytes(item, floating))
            return
        for item in items:
            _digest(item, batch, hashes, floating)
    elif value is not None:
        for each in hashes:
            each.update(_object_bytes(value, floating))


def _bytes(tensor: Tensor, floating: torch.dtype) -> bytes:
    plain = tensor.detach().cpu()
    if plain.layout is not torch.strided:
        plain = plain.to_dense()
    if plain.is_complex():
        plain = torch.view_as_real(plain.resolve_conj())
    # Adding zero makes one of the two zeros.
    plain = plain.to(floating).float() + 0.0 if plain.is_floating_point() else plain.to(torch.int64)
    return str(tuple(plain.shape)).encode() + plain.contiguous().numpy().tobytes()


def _object_bytes(value: Any, floating: torch.dtype) -> bytes:
    """What tells an object from others: its tensors and its plain attributes; its identity where it shows neither."""
    if isinstance(value, _PLAIN):
        return repr(value).encode()
    tensors = list(tensors_in(value))
    plain = {name: item for name, item in getattr(value, "__dict__", {}).items() if isinstance(item, _PLAIN)}
    if not tensors and not plain:
        return str(id(value)).encode()
    return repr(sorted(plain.items())).encode() + b"".join(_bytes(tensor, floating) for tensor in tensors)


def data_digest(batches: Sequence[Batch]) -> str | None:
    """Digest what a model reads of these samples, in their order; ``None`` where some are objects that show nothing of themselves.

    Example:
        >>> one, two = Batch((torch.ones(2, 3),), size=2), Batch((torch.ones(1, 3),))
        >>> data_digest([one]) == data_digest([two, two]), data_digest([Batch((object(),))])
        (True, None)
    """
    if any(_opaque(value) for batch in batches for value in (*batch.args, *batch.kwargs.values())):
        return None
    floating, found = coarsest_dtype(batches), hashlib.new(ALGORITHM)
    for batch in batches:
        for digest in sample_digests(batch, floating):
            found.update(digest)
    return found.hexdigest()


def _opaque(value: Any) -> bool:
    """Whether only an object's identity tells it from others."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return any(map(_opaque, value))
    if isinstance(value, (Tensor, *_PLAIN)):
        return False
    shown = any(isinstance(item, _PLAIN) for item in getattr(value, "__dict__", {}).values())
    return not shown and next(iter(tensors_in(value)), None) is None


def _only(batch: Batch, fresh: Sequence[int]) -> list[Batch]:
    """The batch of these samples; none where there are none, and the batch itself where all are kept."""
    if len(fresh) == batch.size:
        return [batch]
    return [batch.select(torch.tensor(fresh))] if fresh else []


def distinct(batches: list[Batch], name: str, enough: int = ENOUGH) -> tuple[list[Batch], list[str]]:
    """Give the batches without repeated samples, as long as ``enough`` others remain; and what to say of it.

    Example:
        >>> same = Batch((torch.ones(64, 2),), size=64)
        >>> kept, said = distinct([same], "calibration")
        >>> kept == [same], "the same sample" in said[0]
        (True, True)
    """
    seen: set[bytes] = set()
    kept: list[Batch] = []
    floating = coarsest_dtype(batches)
    for batch in batches:
        fresh = []
        for index, digest in enumerate(sample_digests(batch, floating)):
            if digest not in seen:
                seen.add(digest)
                fresh.append(index)
        kept += _only(batch, fresh)
    total, warnings = sample_count(batches), []
    if all(
        not bool(tensor.any()) for batch in batches for tensor in batch.tensors if tensor.is_floating_point()
    ) and any(tensor.is_floating_point() for batch in batches for tensor in batch.tensors):
        warnings.append(f"{name}: every input is zero throughout; nothing is learnt of other inputs")
    if len(seen) == total:
        return batches, warnings
    if len(seen) >= enough:
        return kept, [*warnings, f"{name}: of {total:,} samples {len(seen):,} are distinct; each counts once"]
    few = "all samples are the same sample" if len(seen) == 1 else f"only {len(seen)} are distinct"
    return batches, [
        *warnings,
        f"{name}: of {total:,} samples {few}: the error holds for those and {PROVES_NOTHING}; "
        f"at least {enough} distinct samples are needed",
    ]


def without_shared(checks: Batches, batches: Sequence[Batch]) -> Batches:
    """Take out of validation batches the samples that are among the calibration samples too.

    Raises:
        CalibrationError: fewer than 4 remain, in all or of a group.

    Example:
        >>> own, other = (Batches([Batch((torch.arange(k, k + 8.0)[:, None],), size=8)]) for k in (0, 4))
        >>> sample_count(without_shared(other, own))
        4
    """
    floating = coarsest_dtype([*batches, *checks])
    known = {digest for batch in batches for digest in sample_digests(batch, floating)}
    kept: list[Batch] = []
    # By group, of which there may be one without a name: samples, and those of them that are left.
    totals: dict[str, list[int]] = {}
    for batch in checks:
        fresh = [index for index, digest in enumerate(sample_digests(batch, floating)) if digest not in known]
        counts = totals.setdefault(batch.group, [0, 0])
        counts[0], counts[1] = counts[0] + batch.size, counts[1] + len(fresh)
        kept += _only(batch, fresh)
    notes = []
    for group, (total, left) in totals.items():
        if left == total:
            continue
        where = f"validation, group {group!r}" if group else "validation"
        shared = f"{where}: {total - left:,} of {total:,} samples are calibration samples too"
        if left < MIN_VERIFICATION_SAMPLES:
            instead = (
                "leave validation out (a quarter of the calibration samples is then set aside) or pass other samples"
            )
            raise CalibrationError(
                f"{shared}, so that what chooses would also verify; {'give that group other samples' if group else instead}"
            )
        notes.append(f"{shared} and are left out of the verification")
    return Batches(kept, checks.notes, [*checks.warnings, *notes]) if notes else checks
