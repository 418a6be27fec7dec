"""Linear layers of int8 codes: activations in, activations out, by the native library or by torch, bit for bit the same.

Both routes do the same float operations in the same order: integer sums are corrected as integers, become float32,
and are multiplied by the weight's scale, then by the token's step, then the bias is added.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowrank.kernels import integer, native
from lowrank.kernels.activations import quantize_tokens, to_float, wide_matmul

__all__ = ["IntegerWeight", "reset_routes", "route"]

# Sums reach 2^61 (three pieces of a token times 131,071 codes); larger scales could make them overflow float32.
LARGE_SCALE = 2.0**60
ROOM = 2.0**-63
# Between the products of two factors the scale is used relative to a power of two where it leaves this range, so that
# float32 neither overflows nor loses digits there. 2^±40 leaves room for sums of 131,071 codes on both sides.
_PLAIN_SCALE = 2.0**40
_tested: dict[native.Library, bool] = {}


class IntegerWeight:
    """The codes of a linear layer and what is derived from them; made anew when they change.

    Args:
        codes: (N, K) int8 for ``codes · scale`` row by row; or (r, K) and (N, r) for ``second · diag(scale) · first``.
        scale: (N,) or (r,) float32: of the first matrix's rows.

    Example:
        >>> weight = IntegerWeight((torch.tensor([[2, 0], [0, 4]], dtype=torch.int8),), torch.tensor([0.5, 1.0]))
        >>> weight.product(torch.tensor([[254.0, 127.0]]), None, 0).tolist()
        [[254.0, 508.0]]
    """

    def __init__(self, codes: tuple[Tensor, ...], scale: Tensor) -> None:
        self._codes = codes
        self._scale = scale
        self._sums = codes[0].sum(dim=1, dtype=torch.int32)
        self._gain = self._room = None
        largest = float(scale.max())
        if len(codes) == 1:
            self._room = None if largest <= LARGE_SCALE else ROOM
        elif not 1.0 / _PLAIN_SCALE <= largest <= _PLAIN_SCALE and 0.0 < largest < math.inf:
            self._gain = 2.0 ** math.frexp(largest)[1]
            self._scale = (scale.double() / self._gain).float()
        self._native: native.NativeLinear | None = None
        self._fits = (
            self._room is None
            and all(
                matrix.is_cpu and matrix.dtype is torch.int8 and matrix.shape[1] <= native.LONGEST for matrix in codes
            )
            and scale.is_cpu
            and scale.dtype is torch.float32
        )

    def product(self, x: Tensor, bias: Tensor | None, pieces: int) -> Tensor:
        """Map (..., K) to (..., N) of the same dtype.

        Args:
            x: float32; with ``pieces`` also float64.
            bias: (N,) of x's dtype, or ``None``.
            pieces: 0 rounds each token to int8; otherwise only the weight is rounded, and tokens are taken as
                fixed-point numbers of so many int8 digits (:func:`~lowrank.kernels.activations.pieces_for`).

        Raises:
            ResourceError: no memory for the codes of the tokens.
        """
        if (
            self._fits
            and x.is_cpu
            and x.dtype is torch.float32
            and pieces <= native.MOST_PIECES
            and (loaded := ready_library())
        ):
            call = self._native
            if call is None:
                call = self._native = native.NativeLinear(loaded, self._codes, self._scale, self._gain or 1.0)
            integer.count(loaded.route)
            return call(x, bias, pieces)
        product = self._wide_product if pieces else self._rounded_product
        if x.ndim == 2:
            return product(x, bias, pieces)
        rows = product(x.reshape(x.shape[:-1].numel(), x.shape[-1]), bias, pieces)
        return rows.view(*x.shape[:-1], rows.shape[1])

    def _rounded_product(self, x: Tensor, bias: Tensor | None, pieces: int) -> Tensor:
        codes, step, offset = quantize_tokens(x)
        assert offset is not None
        sums = integer.int_matmul(codes, self._codes[0])
        if codes.shape[1] > native.LONGEST:
            # The corrected sum may leave int32.
            sums = sums.to(torch.int64)
        sums.addcmul_(offset.to(sums.dtype), self._sums.to(sums.dtype), value=-1)
        scaled = self._scaled(to_float(sums))
        if len(self._codes) == 2:
            # The token's step can wait for the end: rounding the components to a share of their largest does not
            # see it.
            component_codes, component_step, _ = quantize_tokens(scaled, symmetric=True)
            scaled = to_float(integer.int_matmul(component_codes, self._codes[1]))
            step = step.mul_(component_step)
        return self._finished(scaled, step, bias)

    def _wide_product(self, x: Tensor, bias: Tensor | None, pieces: int) -> Tensor:
        sums, unit = wide_matmul(x, self._codes[0], pieces)
        scaled = self._scaled(sums)
        if len(self._codes) == 2:
            scaled, component_unit = wide_matmul(scaled, self._codes[1], pieces)
            scaled.mul_(component_unit)
        return self._finished(scaled, unit, bias)

    def _scaled(self, sums: Tensor) -> Tensor:
        if self._room is not None:
            sums.mul_(self._room)
        return sums.mul_(self._scale)

    def _finished(self, scaled: Tensor, step: Tensor, bias: Tensor | None) -> Tensor:
        """The token's step comes last: earlier it could overflow."""
        if self._gain is not None:
            step = step.mul_(self._gain)
        if self._room is not None:
            step = step.div_(self._room)
        result = scaled.mul_(step)
        return result if bias is None else result.add_(bias)


def ready_library() -> native.Library | None:
    """Give the native library where it is there, switched on, exact and worth it here; tested on the first call."""
    loaded = native.library()
    if loaded is None:
        return None
    found = _tested.get(loaded)
    if found is None:
        # The layers of the test call the library directly.
        _tested[loaded] = found = _is_exact(loaded) and _is_worth_it(loaded)
    return loaded if found else None


def route(device: torch.device | str = "cpu") -> str:
    """Name how layers multiply on a device: ``"native"`` or ``"native-avx2"`` (the C library does all, with AVX512-VNNI or with
    AVX2), ``"int_mm"`` (torch's integer product), ``"avx2"`` (the C library's product alone) or ``"float"``; runs the
    self-tests if they have not run yet.

    Example:
        >>> route("cpu") in ("native", "native-avx2", "int_mm", "avx2", "float")
        True
    """
    device = torch.empty(0, device=device).device
    loaded = ready_library() if device.type == "cpu" else None
    return integer.route(device) if loaded is None else loaded.route


def reset_routes() -> None:
    """Forget the self-tests and the counts; the next product tests its device again."""
    _tested.clear()
    integer.reset_routes()


@torch.compiler.disable
@torch.no_grad()
def _is_worth_it(loaded: native.Library) -> bool:
    """Say no where torch has dot products that the library has not: AVX-VNNI and no AVX512."""
    if loaded.level == native.AVX512_VNNI or integer.route("cpu") != "int_mm":
        return True
    codes, x = torch.ones(256, 512, dtype=torch.int8), torch.ones(64, 512)
    weight, call = IntegerWeight((codes,), torch.ones(256)), native.NativeLinear(loaded, (codes,), torch.ones(256))
    ours = integer.least_seconds(lambda: call(x, None, 0))
    return ours <= 1.5 * integer.least_seconds(lambda: weight._rounded_product(x, None, 0))


@torch.compiler.disable
@torch.no_grad()
def _is_exact(loaded: native.Library) -> bool:
    """Compare with int64 where tokens are their own codes, and bit for bit with torch: full range, extremes, all shapes
    of tiles.
    """
    generator = torch.Generator().manual_seed(0)

    def codes(rows: int, columns: int) -> Tensor:
        made = torch.randint(-128, 128, (rows, columns), dtype=torch.int8, generator=generator)
        made[0], made[-1] = 127, -128
        return made

    for tokens, inputs, rank, outputs in ((1, 64, 8, 64), (3, 333, 17, 41), (29, 70, 33, 160), (8, 515, 100, 24)):
        first, second, only = codes(rank, inputs), codes(outputs, rank), codes(outputs, inputs)
        x = codes(tokens, inputs).float().clamp_max_(126.0)
        x[:, 0], x[:, -1] = -128.0, 126.0
        expected = (x.long() @ only.long().T).float()
        exact = native.NativeLinear(loaded, (only,), torch.ones(outputs))
        if not torch.equal(exact(x, None, 0), expected) or not torch.equal(exact(x, None, 3), expected):
            return False
        x = torch.randn(tokens, inputs, generator=generator) * torch.logspace(-44, 37, tokens)[:, None]
        x[-1, 0] = 3.4e38
        bias = torch.randn(outputs, generator=generator)
        for matrices, scale in (
            ((only,), torch.rand(outputs, generator=generator) + 0.1),
            ((first, second), torch.rand(rank, generator=generator) + 1e-3),
        ):
            weight, call = IntegerWeight(matrices, scale), native.NativeLinear(loaded, matrices, scale)
            for pieces in (0, 2, 3):
                slow = weight._wide_product if pieces else weight._rounded_product
                for added in (bias, None):
                    if not torch.equal(call(x, added, pieces), slow(x, added, pieces)):
                        return False
    return True
