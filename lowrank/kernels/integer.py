"""``a @ bᵀ`` for int8 codes, always exact: the fastest route that passes a self-test on this machine.

On a CPU ``torch._int_mm`` is fast and exact only where oneDNN has VNNI instructions; with older ones it saturates pairs
of products at 16 bits without a word, or multiplies one pair of numbers at a time. So each device is tested once, on
first use, against an int64 reference and the clock. Where torch's product fails, one in C for AVX2 takes over, or a float
route, whose partial sums stay below 2²⁴ and are therefore exact too. All routes agree bit for bit, so the clock may
choose between them.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from lowrank.kernels import native
from lowrank.kernels.tested import note_untested_torch

__all__ = ["count", "int_matmul", "reset_routes", "route", "routes_in_use"]

# 128 · 128 · 131072 = 2³¹, one more than int32 holds.
_INT32_SAFE = 131_071
# 128 · 128 · 1024 = 2²⁴: every partial sum of the block is an integer that float32 holds exactly, in any order of
# summation.
_FLOAT_BLOCK = 1024
# Rows of ``b`` converted at a time by the float route: the whole weight is never held as floats.
_FLOAT_ROWS = 512
# Measured on 2 cores with AVX512-VNNI, 512×4096: one row 19 us, two rows 129 us, eight rows 132 us; 4096×512: 19, 58,
# 74 us.
_ROW_BY_ROW = 4
# Torch's product on an AMD EPYC (Zen 3, AVX2 alone): 28 times slower than the float route. With VNNI it is the fastest by far. So
# a wide margin, which no noise crosses, tells the two cases apart.
_TOO_SLOW = 3.0

_Product = Callable[[Tensor, Tensor], Tensor]
_routes: dict[torch.device, tuple[str, _Product]] = {}
_calls: dict[str, int] = {}


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Multiply ``a @ bᵀ`` exactly.

    Args:
        a: (M, K) int8.
        b: (N, K) int8, on the same device; row-major or the transpose of a row-major matrix.

    Returns:
        (M, N) int32; int64 where K is so large that int32 could overflow (above 131,071).

    Example:
        >>> a, b = torch.tensor([[2, -128]], dtype=torch.int8), torch.tensor([[3, -128]], dtype=torch.int8)
        >>> int_matmul(a, b).tolist()
        [[16390]]
    """
    found = _routes.get(a.device)
    if found is None:
        found = _choose(a.device)
    name, product = found
    count(name)
    columns = a.shape[1]
    if columns > _INT32_SAFE:
        total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int64, device=a.device)
        for start in range(0, columns, _INT32_SAFE):
            stop = min(start + _INT32_SAFE, columns)
            total += product(a[:, start:stop].contiguous(), b[:, start:stop].contiguous())
        return total
    if columns == 1:
        # ``torch._int_mm`` misreads the transpose of a single column, whose two strides are both 1.
        return a.to(torch.int32) * b.to(torch.int32).t()
    return product(a, b)


def route(device: torch.device | str = "cpu") -> str:
    """Name how :func:`int_matmul` multiplies on a device: ``"int_mm"`` (torch), ``"avx2"`` (C) or ``"float"``; runs the self-test
    if it has not run yet.

    Example:
        >>> route("cpu") in ("int_mm", "avx2", "float")
        True
    """
    device = torch.empty(0, device=device).device
    return (_routes.get(device) or _choose(device))[0]


def count(name: str) -> None:
    """Count one more product of a route."""
    _calls[name] = _calls.get(name, 0) + 1


def routes_in_use() -> dict[str, int]:
    """Tell how many products each route has done in this process."""
    return dict(_calls)


def reset_routes() -> None:
    """Forget the self-tests and the counts; the next product tests its device again."""
    _routes.clear()
    _calls.clear()


@torch.compiler.disable
def _choose(device: torch.device) -> tuple[str, _Product]:
    note_untested_torch()
    candidates: list[tuple[str, _Product]] = [("int_mm", _cuda_product), ("float", _float_product)]
    if device.type == "cpu":
        candidates = [("int_mm", _cpu_product), ("avx2", _narrow_product), ("float", _float_product)]
    exact = [(name, product) for name, product in candidates[:-1] if _is_exact(product, device)] + candidates[-1:]
    if device.type == "cpu" and len(exact) > 1:
        seconds = [_seconds(product) for _, product in exact]
        exact = [item for item, taken in zip(exact, seconds, strict=True) if taken <= _TOO_SLOW * min(seconds)]
    _routes[device] = exact[0]
    return exact[0]


def _seconds(product: _Product) -> float:
    a, b = torch.ones(64, 512, dtype=torch.int8), torch.ones(256, 512, dtype=torch.int8)
    return least_seconds(lambda: product(a, b))


def least_seconds(call: Callable[[], object]) -> float:
    """Time the fastest of five calls on one thread: a second one would wait where other work holds its core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    taken = []
    try:
        for _ in range(5):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return min(taken)


def _is_exact(product: _Product, device: torch.device) -> bool:
    """Test full-range random codes and the extremes that saturate, on shapes that take different inner loops."""
    generator = torch.Generator().manual_seed(0)
    for rows, columns, outputs in ((1, 64, 64), (2, 333, 17), (5, 512, 31), (17, 1024, 64), (33, 7, 5), (64, 96, 128)):
        a = torch.randint(-128, 128, (rows, columns), dtype=torch.int8, generator=generator)
        b = torch.randint(-128, 128, (outputs, columns), dtype=torch.int8, generator=generator)
        a[0], b[0] = 127, 127
        if rows > 1:
            a[1], b[1] = -128, -128
        expected = a.to(torch.int64) @ b.to(torch.int64).T
        for other in (b, b.T.contiguous().T):
            try:
                actual = product(a.to(device), other.to(device))
            except (RuntimeError, NotImplementedError):
                # A build or device without int8 products; the route that is chosen instead is reported by ``route``.
                return False
            if not torch.equal(actual.cpu().to(torch.int64), expected):
                return False
    return True


def _cpu_product(a: Tensor, b: Tensor) -> Tensor:
    rows = a.shape[0]
    if rows == 1:
        return torch._int_mm(a, b.t())
    if not 1 < rows <= _ROW_BY_ROW:
        if 0 in a.shape or b.shape[0] == 0:
            return torch.zeros(rows, b.shape[0], dtype=torch.int32, device=a.device)
        return torch._int_mm(a, b.t())
    other = b.t()
    return torch.cat([torch._int_mm(a[i : i + 1], other) for i in range(rows)])


def _narrow_product(a: Tensor, b: Tensor) -> Tensor:
    result = native.narrow_product(a, b)
    if result is None:
        raise NotImplementedError("the C library was not built, is turned off, or this CPU has no AVX2")
    return result


def _cuda_product(a: Tensor, b: Tensor) -> Tensor:
    """Call ``torch._int_mm`` with zeros appended to meet its rules: more than 16 rows, other sizes multiples of 8."""
    (rows, columns), outputs = a.shape, b.shape[0]
    if 0 in (rows, columns, outputs):
        return torch.zeros(rows, outputs, dtype=torch.int32, device=a.device)
    more_rows, more_columns, more_outputs = max(32 - rows, -rows % 8), -columns % 8, -outputs % 8
    if more_rows or more_columns:
        a = torch.nn.functional.pad(a, (0, more_columns, 0, more_rows))
    if more_columns or more_outputs:
        b = torch.nn.functional.pad(b, (0, more_columns, 0, more_outputs))
    return torch._int_mm(a.contiguous(), b.t())[:rows, :outputs]


def _float_product(a: Tensor, b: Tensor) -> Tensor:
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    for start in range(0, a.shape[1], _FLOAT_BLOCK):
        block = slice(start, start + _FLOAT_BLOCK)
        left = a[:, block].to(torch.float32)
        for row in range(0, b.shape[0], _FLOAT_ROWS):
            rows = slice(row, row + _FLOAT_ROWS)
            total[:, rows] += (left @ b[rows, block].to(torch.float32).t()).to(torch.int32)
    return total
