"""Integer products are exact on every route, and the route is chosen by a test and reported."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import seeded
from torch import Tensor

from lowrank import kernels
from lowrank.kernels import integer, native

HAS_AVX2 = native.narrow_product(torch.ones(1, 1, dtype=torch.int8), torch.ones(1, 1, dtype=torch.int8)) is not None


def codes(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randint(-128, 128, (rows, columns), dtype=torch.int8, generator=seeded(seed))


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1),
        (6, 1, 40),
        (1, 1, 9),
        (3, 2, 2),
        (1, 64, 5),
        (2, 100, 33),
        (4, 7, 9),
        (5, 512, 64),
        (33, 1500, 70),
        (3, 0, 2),
    ],
)
@pytest.mark.parametrize("product", [kernels.int_matmul, integer._float_product], ids=["front", "float"])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_every_route_equals_int64(shape: tuple[int, int, int], product: object, layout: str) -> None:
    rows, columns, outputs = shape
    a, b = codes(rows, columns, 1), codes(outputs, columns, 2)
    other = b if layout == "rows" else b.T.contiguous().T
    actual = product(a, other)  # type: ignore[operator]
    assert actual.dtype == torch.int32
    assert torch.equal(actual.long(), a.long() @ b.long().T)


@pytest.mark.parametrize("left", [-128, 127])
@pytest.mark.parametrize("right", [-128, 127])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_extremes_do_not_saturate(left: int, right: int, rows: int) -> None:
    a = torch.full((rows, 4096), left, dtype=torch.int8)
    b = torch.full((9, 4096), right, dtype=torch.int8)
    assert bool((kernels.int_matmul(a, b) == left * right * 4096).all())
    assert bool((integer._float_product(a, b) == left * right * 4096).all())


def test_sums_beyond_int32_come_as_int64() -> None:
    columns = 131_072 + 5
    a = torch.full((2, columns), -128, dtype=torch.int8)
    result = kernels.int_matmul(a, a)
    assert result.dtype == torch.int64
    assert bool((result == 128 * 128 * columns).all())


@pytest.mark.parametrize("shape", [(0, 8, 8), (2, 0, 3), (2, 8, 0)])
def test_empty_shapes(shape: tuple[int, int, int]) -> None:
    rows, columns, outputs = shape
    result = kernels.int_matmul(codes(rows, columns, 1), codes(outputs, columns, 2))
    assert result.shape == (rows, outputs)
    assert int(result.abs().sum()) == 0


def test_a_route_that_saturates_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = torch._int_mm

    def saturating(a: Tensor, b: Tensor) -> Tensor:
        return honest(a, b).clamp_(-32768, 32767)

    monkeypatch.setattr(torch, "_int_mm", saturating)
    for others, expected in (("there", "avx2" if HAS_AVX2 else "float"), ("gone", "float")):
        if others == "gone":
            monkeypatch.setattr(native, "narrow_product", lambda a, b: None)
        kernels.reset_routes()
        try:
            assert integer.route() == expected
            with kernels.torch_route():
                assert kernels.route() == expected
            a, b = codes(3, 700, 1), codes(5, 700, 2)
            assert torch.equal(kernels.int_matmul(a, b).long(), a.long() @ b.long().T)
            assert kernels.routes_in_use() == {expected: 1}
        finally:
            kernels.reset_routes()


def test_a_route_that_is_exact_but_far_slower_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = torch._int_mm

    def one_at_a_time(a: Tensor, b: Tensor) -> Tensor:
        time.sleep(0.1)
        return honest(a, b)

    monkeypatch.setattr(torch, "_int_mm", one_at_a_time)
    kernels.reset_routes()
    try:
        assert integer.route() == ("avx2" if HAS_AVX2 else "float")
    finally:
        kernels.reset_routes()


@pytest.mark.skipif(not HAS_AVX2, reason="the C library was not built, is turned off, or this CPU has no AVX2")
@pytest.mark.parametrize("threads", [1, 2])
def test_the_narrow_product_in_blocks_and_threads(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        # Rows beyond one block of the second-level cache, ends of every kind.
        for rows, columns, outputs in ((300, 1500, 7), (2, 16, 4), (1, 15, 5), (71, 4097, 33), (1000, 144, 16)):
            a, b = codes(rows, columns, 1), codes(outputs, columns, 2)
            found = native.narrow_product(a, b)
            assert found is not None
            assert torch.equal(found.long(), a.long() @ b.long().T)
    finally:
        torch.set_num_threads(before)


_WITHOUT_VNNI = """
import torch
from lowrank import kernels
from lowrank.layers import QuantizedLinear, QuantizedLowRankLayer
from lowrank.kernels import integer
print(kernels.route())
generator = torch.Generator().manual_seed(0)
for rows, columns, outputs in ((1, 512, 64), (16, 2048, 33)):
    a = torch.randint(-128, 128, (rows, columns), dtype=torch.int8, generator=generator)
    b = torch.randint(-128, 128, (outputs, columns), dtype=torch.int8, generator=generator)
    assert torch.equal(kernels.int_matmul(a, b).long(), a.long() @ b.long().T)
linear = torch.nn.Linear(96, 64)
x = torch.randn(10_000, 96, generator=generator)
x[0], x[1] = 127.0, -128.0
with torch.no_grad():
    for layer in (QuantizedLinear.from_linear(linear), QuantizedLowRankLayer.from_linear(linear, rank=32)):
        for activations in ("int8", "float"):
            layer.activations = activations
            ours = layer(x)
            kept = dict(integer._routes)
            for device in kept:
                integer._routes[device] = ("int64", lambda a, b: (a.long() @ b.long().T).int())
            with kernels.torch_route():
                assert torch.equal(ours, layer(x)), (layer, activations)
            integer._routes.update(kept)
assert "float" not in kernels.routes_in_use() or integer.route() == "float"
"""


def route_within(isa: str | None) -> str:
    """The route that another process takes with instructions up to ``isa``, whose products it found exact."""
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("ONEDNN_MAX_CPU_ISA", None)
    if isa is not None:
        environment["ONEDNN_MAX_CPU_ISA"] = isa
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_VNNI], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def cpu_flags() -> str:
    """What Linux says of the processor; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8") if path.exists() else ""


@pytest.mark.parametrize(("isa", "more"), [("AVX2", ()), (None, ("native",))])
def test_layers_equal_their_integer_reference_whatever_the_instruction_set(
    isa: str | None, more: tuple[str, ...]
) -> None:
    assert route_within(isa) in ("native-avx2", "int_mm", "float", *more)


@pytest.mark.skipif("avx512_vnni" not in cpu_flags(), reason="this processor has no AVX512-VNNI to be excluded")
def test_instructions_that_are_excluded_are_not_used() -> None:
    assert route_within("AVX2") == ("native-avx2" if HAS_AVX2 else "float")
