"""The C library that was built with the package, where there is one and this machine has its instructions.

Whole layers (:func:`library`) take AVX512 with VNNI where it is there, else AVX2, as the plain integer product does
(:func:`narrow_product`). ``LOWRANK_NATIVE=0`` in the environment turns all off, a lower ``ONEDNN_MAX_CPU_ISA`` what it excludes.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank.errors import ResourceError
from lowrank.kernels.tested import note_untested_torch
from lowrank.numerics.convolutions import ConvGeometry

__all__ = ["Library", "NativeConv", "NativeLinear", "NativePacked", "library", "narrow_product", "torch_route"]

# 255 · 128 · 65535 < 2³¹: sums stay in int32 after the zero point is taken off.
LONGEST = 65_535
MOST_PIECES = 3
# As in csrc/support.c: a library that an older version of the package left behind is passed over.
_INTERFACE = 5
AVX2, AVX512_VNNI = 1, 2
_int64, _address, _int = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
_SIGNATURES = {
    "lowrank_interface": ([], _int),
    "lowrank_supported": ([], _int),
    "lowrank_packed_bytes": ([_int64, _int64], _int64),
    "lowrank_pack": ([_address, _int64, _int64, _int64, _int64, _address, _address], None),
    "lowrank_conv": ([_address, _address, _address, _address, *[_int64] * 5, _int], _int),
    "lowrank_narrow": ([_address, _address, _address, *[_int64] * 3, _int], None),
    "lowrank_packed_supported": ([], _int),
    "lowrank_packed_product": ([_address, _address, _int64, _address, _address, _int64, _int], _int),
    "lowrank_packed_decode": ([_address, _int64, _int64, _address, _int], None),
    "lowrank_linear": ([_address, _address, _int64, _address, _address, _int64, _int, _int], _int),
}


class Library(NamedTuple):
    """The library, and what of it this machine and its settings allow.

    Attributes:
        calls: its functions.
        level: of the instructions that layers are to use: 2 is AVX512 with VNNI, 1 AVX2, which the plain product needs.
    """

    calls: ctypes.CDLL
    level: int

    @property
    def route(self) -> str:
        """As :func:`lowrank.kernels.route` names it."""
        return "native" if self.level == AVX512_VNNI else "native-avx2"


# Found out once.
_loaded: list[Library | None] = []
_switched_off = 0


def library() -> Library | None:
    """Give the library for layers, or ``None``: not built, no AVX2, or turned off. Not yet tested: see
    :func:`lowrank.kernels.route`.
    """
    return None if _switched_off else _allowed()


def narrow_product(a: Tensor, b: Tensor) -> Tensor | None:
    """Multiply ``a @ bᵀ`` of int8 codes on the CPU by AVX2, exactly; ``None`` where the library or the instructions are not there.

    Args:
        a: (M, K) int8; K at most 131,071.
        b: (N, K) int8.

    Returns:
        (M, N) int32.
    """
    loaded = _allowed()
    if loaded is None:
        return None
    a, b = a.contiguous(), b.contiguous()
    result = torch.empty(a.shape[0], b.shape[0], dtype=torch.int32)
    sizes = a.shape[0], b.shape[0], a.shape[1]
    loaded.calls.lowrank_narrow(a.data_ptr(), b.data_ptr(), result.data_ptr(), *sizes, torch.get_num_threads())
    return result


def _allowed() -> Library | None:
    if not _loaded:
        note_untested_torch()
        found = _load()
        level = 0 if found is None or not _isa_allows("AVX2", "AVX512", "AVX10") else found.lowrank_supported()
        if level == AVX512_VNNI and not _isa_allows("AVX512_CORE_", "AVX10"):
            level = AVX2
        _loaded.append(None if found is None or not level else Library(found, level))
    return _loaded[0]


@contextmanager
def torch_route() -> Iterator[None]:
    """Make the layers of the whole process do, within it, what lies between products in torch: to compare with.

    Example:
        >>> from lowrank.kernels import route
        >>> with torch_route():
        ...     route() in ("int_mm", "avx2", "float")
        True
    """
    global _switched_off
    _switched_off += 1
    try:
        yield
    finally:
        _switched_off -= 1


def _load() -> ctypes.CDLL | None:
    if os.environ.get("LOWRANK_NATIVE", "1") == "0":
        return None
    folder = Path(__file__).parent
    found = [path for suffix in EXTENSION_SUFFIXES if (path := folder / f"_native{suffix}").exists()]
    if not found:
        return None
    try:
        # After torch, so that it runs on the OpenMP threads of torch's own libgomp.
        loaded = ctypes.CDLL(str(found[0]))
    except OSError:
        # Built against another libgomp than torch carries; ``route`` names what is used instead.
        return None
    for name, (arguments, result) in _SIGNATURES.items():
        function = getattr(loaded, name, None)
        if function is None:
            return None
        function.argtypes, function.restype = arguments, result
    return loaded if loaded.lowrank_interface() == _INTERFACE else None


def _isa_allows(*families: str) -> bool:
    """Tell whether oneDNN's limit leaves instructions of these families."""
    name = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    return name in ("", "ALL", "DEFAULT") or name.startswith(families)


class _Matrix(ctypes.Structure):
    _fields_ = (("outputs", _int64), ("columns", _int64), ("panels", _address), ("sums", _address))


class _Layer(ctypes.Structure):
    _fields_ = (
        ("inputs", _int64),
        ("first", _Matrix),
        ("second", _Matrix),
        ("scale", _address),
        ("gain", ctypes.c_double),
        ("level", _int64),
    )


class _Conv(ctypes.Structure):
    _fields_ = (
        *((name, _int64) for name in ("channels", "kernel_rows", "kernel_columns")),
        *((name, _int64) for name in ("row_step", "column_step", "row_dilation", "column_dilation")),
        *((name, _int64) for name in ("top", "bottom", "left", "right")),
        ("weight", _Matrix),
        ("scale", _address),
        ("level", _int64),
    )


class NativeLinear:
    """Packed codes of one matrix or two, and the call that multiplies by them.

    Args:
        loaded: what :func:`library` gave.
        codes: one matrix (N, K) int8, or two: (r, K) and (N, r).
        scale: (N,) or (r,) float32, of the first matrix's rows.
        gain: a factor of the result of two matrices.
    """

    def __init__(self, loaded: Library, codes: tuple[Tensor, ...], scale: Tensor, gain: float = 1.0) -> None:
        packed = [pack(loaded.calls, matrix) for matrix in codes]
        # Kept alive: the structure holds their addresses.
        self._kept = [tensor for _, tensors in packed for tensor in tensors]
        self._scale = scale.contiguous()
        self._layer = _Layer(
            codes[0].shape[1],
            packed[0][0],
            packed[1][0] if len(packed) == 2 else _Matrix(),
            self._scale.data_ptr(),
            gain,
            loaded.level,
        )
        self._address = ctypes.addressof(self._layer)
        self._outputs = codes[-1].shape[0]
        self._call = loaded.calls.lowrank_linear

    def __call__(self, x: Tensor, bias: Tensor | None, pieces: int) -> Tensor:
        """Map (..., K) float32 on the CPU to (..., N) float32.

        Args:
            pieces: 0 rounds each token to int8; 1 to 3 takes it as a fixed-point number of so many digits.

        Raises:
            ResourceError: no memory.
        """
        if x.ndim != 2:
            x = x.contiguous()
            result = x.new_empty(*x.shape[:-1], self._outputs)
            tokens, apart = result.numel() // self._outputs, x.shape[-1]
        else:
            if x.stride(1) != 1:
                x = x.contiguous()
            tokens, apart = x.shape[0], x.stride(0)
            result = x.new_empty(tokens, self._outputs)
        if bias is not None and not bias.is_contiguous():
            bias = bias.contiguous()
        failed = self._call(
            self._address,
            x.data_ptr(),
            apart,
            result.data_ptr(),
            None if bias is None else bias.data_ptr(),
            tokens,
            pieces,
            torch.get_num_threads(),
        )
        if failed:
            raise ResourceError(f"no memory for the codes of {tokens} tokens; give fewer at a time")
        return result


class NativeConv:
    """Packed codes of a convolution with zeros around the image and one group, and the call that multiplies by them.

    Args:
        loaded: what :func:`library` gave.
        codes: (out, in, *kernel) int8, one or two spatial dimensions.
        scale: (out,) float32.
        geometry: of the convolution; ``groups`` 1, ``padding_mode`` ``"zeros"``.
    """

    def __init__(self, loaded: Library, codes: Tensor, scale: Tensor, geometry: ConvGeometry) -> None:
        self._outputs, channels = codes.shape[:2]
        # A line is an image of one row.
        rows, columns = (1, *codes.shape[2:])[-2:]
        last = codes.view(self._outputs, channels, rows, columns).permute(0, 2, 3, 1)
        matrix = torch.nn.functional.pad(last, (0, -channels % 4)).reshape(self._outputs, -1)
        packed, self._kept = pack(loaded.calls, matrix)
        self._scale = scale.contiguous()
        steps, dilations = (1, *geometry.stride)[-2:], (1, *geometry.dilation)[-2:]
        pads = ((0, 0), *geometry.pads)[-2:]
        self._layer = _Conv(
            channels,
            rows,
            columns,
            *steps,
            *dilations,
            *pads[0],
            *pads[1],
            packed,
            self._scale.data_ptr(),
            loaded.level,
        )
        self._address = ctypes.addressof(self._layer)
        self._call = loaded.calls.lowrank_conv

    def __call__(self, x: Tensor, bias: Tensor | None, size: tuple[int, ...]) -> Tensor:
        """Map (B, in, *size before) float32 on the CPU to (B, out, *size) float32.

        Raises:
            ResourceError: no memory.
        """
        x = x.contiguous()
        if bias is not None and not bias.is_contiguous():
            bias = bias.contiguous()
        result = x.new_empty(x.shape[0], self._outputs, *size)
        failed = self._call(
            self._address,
            x.data_ptr(),
            result.data_ptr(),
            None if bias is None else bias.data_ptr(),
            x.shape[0],
            *(1, *x.shape[2:])[-2:],
            *(1, *size)[-2:],
            torch.get_num_threads(),
        )
        if failed:
            raise ResourceError(f"no memory for the codes of {x.shape[0]} samples; give fewer at a time")
        return result


class _Packed(ctypes.Structure):
    _fields_ = (
        ("codes", _address),
        *((name, _int64) for name in ("rows", "columns", "row_bytes")),
        ("scale", _address),
        ("half", _int64),
        ("zero", _address),
        *((name, _int64) for name in ("bits", "group", "groups")),
    )


class NativePacked:
    """A matrix of packed codes where it lies, and the calls that multiply by it and decode its rows.

    Args:
        loaded: what :func:`library` gave, on a machine with FMA and F16C (:attr:`supported`).
        codes: (rows, bytes of a row) uint8, contiguous.
        scale: (rows, groups) float16 or float32, contiguous.
        zero: (rows, groups) uint8, a byte each, or ``None``.
        columns, bits, group: see :class:`lowrank.kernels.packed.PackedWeight`; the group is the width where there are none.
    """

    def __init__(
        self,
        loaded: Library,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        *,
        columns: int,
        bits: int,
        group: int,
    ) -> None:
        self._kept = codes, scale, zero
        self.rows, self.columns = codes.shape[0], columns
        self._layer = _Packed(
            codes.data_ptr(),
            codes.shape[0],
            columns,
            codes.shape[1],
            scale.data_ptr(),
            scale.dtype is torch.float16,
            None if zero is None else zero.data_ptr(),
            bits,
            group,
            scale.shape[1],
        )
        self._address = ctypes.addressof(self._layer)
        self._calls = loaded.calls

    @staticmethod
    def supported(loaded: Library) -> bool:
        """Tell whether this machine has the instructions: FMA and F16C beside AVX2."""
        return bool(loaded.calls.lowrank_packed_supported())

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply (tokens, columns) float32 with unit stride in a row; gives (tokens, rows) float32.

        Raises:
            ResourceError: no memory.
        """
        result = x.new_empty(x.shape[0], self.rows)
        failed = self._calls.lowrank_packed_product(
            self._address,
            x.data_ptr(),
            x.stride(0),
            result.data_ptr(),
            None if bias is None else bias.data_ptr(),
            x.shape[0],
            torch.get_num_threads(),
        )
        if failed:
            raise ResourceError(f"no memory for {x.shape[0]} tokens of {self.columns} numbers; give fewer at a time")
        return result

    def decode(self, start: int, stop: int, made: Tensor) -> None:
        """Write rows from ``start`` to ``stop`` as float32 to the beginning of ``made``, contiguous."""
        self._calls.lowrank_packed_decode(self._address, start, stop, made.data_ptr(), torch.get_num_threads())


def pack(loaded: ctypes.CDLL, codes: Tensor) -> tuple[_Matrix, tuple[Tensor, Tensor]]:
    """Pack (N, K) int8 codes; gives the packed form and the tensors that hold it."""
    outputs, columns = codes.shape
    filled = -(-columns // 4) * 4
    panels = torch.empty(loaded.lowrank_packed_bytes(outputs, filled), dtype=torch.int8)
    sums = torch.empty(-(-outputs // 16) * 16, dtype=torch.int32)
    loaded.lowrank_pack(codes.data_ptr(), *codes.stride(), outputs, columns, panels.data_ptr(), sums.data_ptr())
    return _Matrix(outputs, filled, panels.data_ptr(), sums.data_ptr()), (panels, sums)
