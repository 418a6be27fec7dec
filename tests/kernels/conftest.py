"""Tests of the native layers run with each set of instructions that this processor has."""

from __future__ import annotations

import pytest

from lowrank.kernels import native


@pytest.fixture(params=[native.AVX2, native.AVX512_VNNI], ids=["avx2", "avx512"])
def native_level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Layers take the library with these instructions, whatever they would take by themselves."""
    loaded = native._allowed()
    if loaded is None:
        pytest.skip("the C library was not built, is turned off, or this CPU has no AVX2")
    if request.param > loaded.level:
        pytest.skip("this CPU has no AVX512-VNNI")
    monkeypatch.setattr(native, "_loaded", [loaded._replace(level=request.param)])
    return int(request.param)
