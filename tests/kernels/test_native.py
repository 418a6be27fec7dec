"""The C library gives torch's bits on every shape, is refused where it would not, and its absence changes no output."""

from __future__ import annotations

import copy
import ctypes
import math
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from helpers import seeded
from torch import Tensor, nn

from lowrank import kernels
from lowrank.kernels import native
from lowrank.kernels.linear import IntegerWeight
from lowrank.layers import QuantizedLinear, QuantizedLowRankLayer

# With each set of instructions there is; see conftest.py.
needs_library = pytest.mark.usefixtures("native_level")


def codes(rows: int, columns: int, seed: int = 1) -> Tensor:
    made = torch.randint(-128, 128, (rows, columns), dtype=torch.int8, generator=seeded(seed))
    made[0], made[-1] = 127, -128
    return made


def weights(inputs: int, rank: int, outputs: int) -> list[IntegerWeight]:
    generator = seeded(2)
    dense = IntegerWeight((codes(outputs, inputs),), torch.rand(outputs, generator=generator) + 0.1)
    factors = (codes(rank, inputs), codes(outputs, rank))
    scale = torch.rand(rank, generator=generator) + 1e-3
    # The last two have a power of two taken out between the products.
    return [dense, *(IntegerWeight(factors, scale * size) for size in (1.0, 2.0**70, 2.0**-80))]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """NaN of any kind equals NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0.0, 1.0, 2.0), b.nan_to_num(0.0, 1.0, 2.0))


def both(weight: IntegerWeight, x: Tensor, bias: Tensor | None, pieces: int) -> tuple[Tensor, Tensor]:
    fast = weight.product(x, bias, pieces)
    with kernels.torch_route():
        return fast, weight.product(x, bias, pieces)


@needs_library
def test_the_library_passes_its_test_and_is_named(native_level: int) -> None:
    kernels.reset_routes()
    name = "native" if native_level == native.AVX512_VNNI else "native-avx2"
    assert kernels.route() == name
    QuantizedLinear.from_linear(nn.Linear(5, 3))(torch.ones(2, 5))
    assert kernels.routes_in_use()[name] == 1
    with kernels.torch_route():
        assert kernels.route() in ("int_mm", "avx2", "float")


@needs_library
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 8, 13, 24, 25, 61])
@pytest.mark.parametrize(
    ("inputs", "rank", "outputs"),
    [(1, 1, 1), (3, 2, 5), (16, 4, 16), (17, 5, 33), (64, 20, 48), (100, 17, 70), (515, 100, 130), (7000, 40, 50)],
)
@pytest.mark.parametrize("pieces", [0, 1, 2, 3])
def test_bit_equal_to_torch(tokens: int, inputs: int, rank: int, outputs: int, pieces: int) -> None:
    generator = seeded(tokens)
    x = torch.randn(tokens, inputs, generator=generator) * torch.logspace(-44, 37, tokens)[:, None]
    x[-1, 0] = 3.4e38
    bias = torch.randn(outputs, generator=generator)
    for weight in weights(inputs, rank, outputs):
        for added in (bias, None):
            assert same_bits(*both(weight, x, added, pieces))


@needs_library
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("pieces", [0, 2, 3])
def test_non_finite_tokens_are_nan_and_leave_others_alone(value: float, pieces: int) -> None:
    x = torch.randn(30, 70, generator=seeded(3))
    damaged = x.clone()
    for token, place in ((0, 0), (7, 63), (8, 64), (29, 69)):
        damaged[token, place] = value
    for weight in weights(70, 9, 21):
        fast, slow = both(weight, damaged, None, pieces)
        assert same_bits(fast, slow)
        assert fast.isnan().all(dim=1).nonzero().flatten().tolist() == [0, 7, 8, 29]
        clean = weight.product(x, None, pieces)
        assert torch.equal(fast[1:7], clean[1:7])


@needs_library
@pytest.mark.parametrize("left", [-128, 127])
@pytest.mark.parametrize("right", [-128, 127])
def test_sums_at_the_ends_of_int32_are_exact(left: int, right: int) -> None:
    """The longest row that fits, all codes at an end: nothing saturates or wraps."""
    inputs = native.LONGEST
    weight = IntegerWeight((torch.full((3, inputs), right, dtype=torch.int8),), torch.ones(3))
    x = torch.full((2, inputs), float(left))
    # One of another sign, so that the step is 1 and codes are what the tokens hold.
    x[:, 0] = 126.0 if left < 0 else -127.0
    fast, slow = both(weight, x, None, 0)
    assert torch.equal(fast, slow)
    expected = float(x[0].double().sum() * right)
    assert abs(float(fast[0, 0]) - expected) <= 2.0**-22 * abs(expected)


@needs_library
def test_longer_rows_and_large_scales_take_torch() -> None:
    for weight in (
        IntegerWeight((torch.ones(2, native.LONGEST + 1, dtype=torch.int8),), torch.ones(2)),
        IntegerWeight((codes(4, 6),), torch.full((4,), 2.0**100)),
    ):
        kernels.reset_routes()
        x = torch.ones(1, weight._codes[0].shape[1])
        assert bool(torch.isfinite(weight.product(x, None, 0)).all())
        assert not any(route.startswith("native") for route in kernels.routes_in_use())


@needs_library
def test_layouts_shapes_and_dtypes() -> None:
    weight = weights(24, 5, 20)[1]
    x = torch.randn(6, 24, generator=seeded(4))
    flat = weight.product(x, None, 0)
    wide = torch.randn(6, 100, generator=seeded(5))
    wide[:, 10:34] = x
    reversed_sign = torch.complex(x, -x).conj().imag
    for other in (
        x.T.contiguous().T,
        wide[:, 10:34],
        x.view(2, 3, 24),
        x.view(2, 3, 24).transpose(0, 1),
        reversed_sign,
    ):
        expected = flat
        if other.ndim == 3:
            expected = flat.view(2, 3, 20) if other.shape[0] == 2 else flat.view(2, 3, 20).transpose(0, 1)
        assert torch.equal(weight.product(other, None, 0), expected)
    for shape in ((0, 24), (2, 0, 24), (24,)):
        assert weight.product(torch.ones(shape), None, 0).shape == (*shape[:-1], 20)
    assert weight.product(x.double(), None, 7).dtype == torch.float64
    bias = torch.randn(40, generator=seeded(6))
    assert torch.equal(weight.product(x, bias[::2], 0), weight.product(x, bias[::2].contiguous(), 0))
    transposed = IntegerWeight((codes(24, 20).T,), torch.ones(20))
    assert torch.equal(*both(transposed, x, None, 0))


@needs_library
def test_threads_change_no_bit() -> None:
    before = torch.get_num_threads()
    x = torch.randn(50, 900, generator=seeded(7))
    try:
        for weight in weights(900, 130, 700):
            for pieces in (0, 3):
                for tokens in (1, 3, 5, 50):
                    results = []
                    for threads in (1, 2, 3, 7):
                        torch.set_num_threads(threads)
                        results.append(weight.product(x[:tokens], None, pieces))
                    assert all(torch.equal(results[0], other) for other in results)
    finally:
        torch.set_num_threads(before)


@needs_library
def test_calls_from_several_threads() -> None:
    weight = weights(300, 40, 200)[1]
    inputs = [torch.randn(9, 300, generator=seeded(i)) for i in range(40)]
    expected = [weight.product(x, None, 0) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: weight.product(x, None, 0), inputs))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("kind", [QuantizedLinear, QuantizedLowRankLayer])
@torch.no_grad()
def test_edits_are_seen_and_copies_carry_nothing(kind: type) -> None:
    def new(seed: int) -> QuantizedLinear | QuantizedLowRankLayer:
        linear = nn.Linear(30, 20)
        linear.weight.normal_(generator=seeded(seed))
        made = QuantizedLinear.from_linear(linear)
        if kind is QuantizedLowRankLayer:
            return QuantizedLowRankLayer.from_linear(linear, rank=7)
        return made

    layer, other = new(1), new(2)
    x = torch.randn(3, 30, generator=seeded(8))
    layer(x)
    assert "_derived" in layer.__dict__
    stored = layer.stored_bytes
    for made in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert "_derived" not in made.__dict__
        assert torch.equal(made(x), layer(x))
    for name, tensor in other.named_buffers():
        # In place, one after the other: each must be noticed.
        getattr(layer, name).copy_(tensor)
        with kernels.torch_route():
            expected = copy.deepcopy(layer)(x)
        assert torch.equal(layer(x), expected)
    assert layer.stored_bytes == stored
    assert not [name for name in layer.state_dict() if "derived" in name]


@needs_library
def test_a_library_that_is_wrong_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = native.NativeLinear.__call__

    def wrong(self: native.NativeLinear, x: Tensor, bias: Tensor | None, pieces: int) -> Tensor:
        result = honest(self, x, bias, pieces)
        return result.nextafter(torch.full_like(result, math.inf)) if pieces == 2 else result

    monkeypatch.setattr(native.NativeLinear, "__call__", wrong)
    kernels.reset_routes()
    try:
        assert kernels.route() in ("int_mm", "avx2", "float")
        weight = weights(40, 5, 20)[0]
        weight.product(torch.ones(2, 40), None, 0)
        assert not any(route.startswith("native") for route in kernels.routes_in_use())
    finally:
        kernels.reset_routes()


@needs_library
def test_no_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights(40, 5, 20)[0]
    weight.product(torch.ones(2, 40), None, 0)
    assert weight._native is not None
    monkeypatch.setattr(weight._native, "_call", lambda *_: 1)
    with pytest.raises(Exception, match="2 tokens"):
        weight.product(torch.ones(2, 40), None, 0)


@pytest.mark.parametrize(
    ("name", "level"),
    [(name, native.AVX512_VNNI) for name in ("", "ALL", "AVX512_CORE_VNNI", "avx512_core_amx")]
    + [(name, native.AVX2) for name in ("AVX2", "AVX2_VNNI", "AVX512_CORE")]
    + [(name, 0) for name in ("SSE41", "AVX", "nonsense")],
)
def test_the_limit_for_onednn_holds_here_too(name: str, level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", name)
    monkeypatch.setattr(native, "_loaded", [])
    one = torch.ones(1, 1, dtype=torch.int8)
    loaded = native._load()
    expected = 0 if loaded is None else min(level, loaded.lowrank_supported())
    found = native.library()
    assert (0 if found is None else found.level) == expected
    able = loaded is not None and loaded.lowrank_supported() >= native.AVX2
    assert (native.narrow_product(one, one) is not None) == (level > 0 and able)


@pytest.mark.parametrize(
    "setting",
    [{"LOWRANK_NATIVE": "0"}, {"ONEDNN_MAX_CPU_ISA": "SSE41"}, {"ONEDNN_MAX_CPU_ISA": "AVX2"}],
    ids=["off", "no instructions", "fewer instructions"],
)
def test_without_the_library_the_bits_are_the_same(setting: dict[str, str]) -> None:
    code = """
import torch
from lowrank import kernels
from lowrank.layers import QuantizedLinear, QuantizedLowRankLayer
generator = torch.Generator().manual_seed(0)
linear = torch.nn.Linear(96, 64)
with torch.no_grad():
    linear.weight.normal_(generator=generator), linear.bias.normal_(generator=generator)
x = torch.randn(40, 96, generator=generator)
for layer in (QuantizedLinear.from_linear(linear), QuantizedLowRankLayer.from_linear(linear, rank=32)):
    for layer.activations in ("int8", "float"):
        print(layer(x).detach().view(torch.int32).sum().item())
print(kernels.route())
"""
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    for name in ("LOWRANK_NATIVE", "ONEDNN_MAX_CPU_ISA"):
        environment.pop(name, None)
    printed = []
    for changed in ({}, setting):
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment | changed, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout.split())
    without = ("int_mm", "float")
    assert printed[1][-1] in (("native-avx2", *without) if "AVX2" in setting.values() else without)
    assert printed[0][:4] == printed[1][:4]


def test_a_file_that_is_no_library_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LOWRANK_NATIVE", raising=False)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    assert native._load() is None
    (tmp_path / f"_native{native.EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
    assert native._load() is None


@needs_library
def test_a_library_of_another_version_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native._load() is not None
    monkeypatch.setattr(native, "_INTERFACE", 0)
    assert native._load() is None
    monkeypatch.setattr(native, "_INTERFACE", 1)
    monkeypatch.setitem(native._SIGNATURES, "lowrank_unknown", ([], native.ctypes.c_int))
    assert native._load() is None


@needs_library
def test_python_costs_little() -> None:
    """Of the some 10 µs that a tiny layer takes, most is Python: its calls are counted, since seconds depend on the machine."""
    layer = QuantizedLinear.from_linear(nn.Linear(16, 16))
    x = torch.ones(1, 16)
    called: list[str] = []

    def note(frame: FrameType, event: str, argument: Any) -> None:
        called.append(frame.f_code.co_name if event == "call" else str(getattr(argument, "__name__", "")))

    with torch.no_grad():
        layer(x)  # the first call tests the library
        sys.setprofile(lambda frame, event, argument: note(frame, event, argument) if "call" in event else None)
        try:
            layer(x)
        finally:
            sys.setprofile(None)
    assert len(called) <= 45, called


def test_structures_are_those_of_the_c_file() -> None:
    assert ctypes.sizeof(native._Matrix) == 32
    assert ctypes.sizeof(native._Layer) == 8 + 2 * 32 + 8 + 8 + 8
    assert ctypes.sizeof(native._Conv) == 11 * 8 + 32 + 8 + 8
    loaded = native.library()
    assert loaded is None or loaded.calls.lowrank_interface() == native._INTERFACE
