"""Decompositions that either are right or say so: float64, finiteness first, power-of-two scaling, counted fallbacks.

LAPACK may return NaN without an error for Inf or for values near the float limit, and its divide-and-conquer drivers
may fail to converge. So each function here checks its input, scales it so that its largest entry lies in [½, 1), tries
a chain of drivers and checks what comes back. Every fallback is counted (:func:`fallback_counts`), so that a report can
print it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lowrank.errors import LowRankError, NumericsError

__all__ = [
    "check_finite",
    "fallback_counts",
    "power_of_two_scale",
    "reset_fallback_counts",
    "safe_eigh",
    "safe_svd",
    "scale_by_power_of_two",
    "singular_values",
]

# Rows that are turned into float64 at a time.
GRAM_ROWS = 4096

_fallbacks: Counter[str] = Counter()


def fallback_counts() -> dict[str, int]:
    """Count how often each fallback was used since the last reset, keyed ``"svd:gesvd"``, ``"svd:gram"``, ``"eigh:ev"``.

    Example:
        >>> reset_fallback_counts()
        >>> _ = safe_svd(torch.eye(2))
        >>> fallback_counts()
        {}
    """
    return dict(sorted(_fallbacks.items()))


def reset_fallback_counts() -> None:
    """Forget all counted fallbacks.

    Example:
        >>> reset_fallback_counts()
    """
    _fallbacks.clear()


def check_finite(tensor: Tensor, name: str = "matrix") -> None:
    """Refuse a tensor that holds NaN or Inf, or no numbers at all.

    Args:
        tensor: any shape, any real dtype.
        name: for the message.

    Raises:
        NumericsError: names the tensor and the index and value of its first non-finite entry.
        LowRankError: the tensor is on the meta device, or complex.

    Example:
        >>> check_finite(torch.ones(2, 2))
    """
    if tensor.is_meta:
        raise LowRankError(f"{name}: is on the meta device and holds no values; load the weights first")
    if tensor.is_complex():
        raise LowRankError(f"{name}: must be real, got {tensor.dtype}; split it into real and imaginary parts first")
    if not tensor.is_floating_point() or not tensor.numel():
        return
    # One pass without a mask as large as a vocabulary's embedding; both ends are NaN where any entry is.
    if bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all()):
        return
    finite = torch.isfinite(tensor)
    # argmin of 0/1 finds the first 0 without listing every non-finite entry of a large weight.
    flat = int(torch.argmin(finite.reshape(-1).to(torch.uint8)))
    index = []
    for size in reversed(tensor.shape):
        index.append(flat % size)
        flat //= size
    position = tuple(reversed(index))
    raise NumericsError(
        f"{name}: entries must be finite, got {float(tensor[position])} at index {list(position)}; "
        'repair the weight or leave this layer as it is (ignore=…, on_nonfinite="copy")'
    )


def power_of_two_scale(matrix: Tensor) -> int:
    """Find the exponent e with ``max|matrix| · 2^-e`` in [½, 1); 0 for a zero or empty matrix.

    Example:
        >>> power_of_two_scale(torch.tensor([[6.0, 1.0]]))
        3
    """
    largest = float(matrix.abs().max()) if matrix.numel() else 0.0
    return math.frexp(largest)[1]


def scale_by_power_of_two(values: Tensor, exponent: int) -> Tensor:
    """Return ``values · 2^exponent``, exact in float64 unless the result itself over- or underflows.

    Example:
        >>> float(scale_by_power_of_two(torch.tensor([5e-324], dtype=torch.float64), 1074))
        1.0
    """
    # Two steps: 2^±1100 is itself outside float64, and a denormal needs that much.
    half = exponent // 2
    return values * math.ldexp(1.0, half) * math.ldexp(1.0, exponent - half)


def safe_svd(matrix: Tensor, *, strict: bool = False, name: str = "matrix") -> tuple[Tensor, Tensor, Tensor]:
    """Decompose a matrix by its thin singular value decomposition ``matrix = U @ diag(S) @ Vh`` in float64.

    Drivers: torch's default (gesdd on a CPU), LAPACK gesvd (scipy), eigenvectors of the gram on the smaller side, then
    QR. The last is good to about 1e-8 · S[0] in the small singular values.

    Args:
        matrix: (m, n), any real dtype and device; 0 × n gives an empty S.
        strict: a fallback raises instead.
        name: for messages.

    Returns:
        U (m, k), S (k,) descending and not negative, Vh (k, n) with k = min(m, n); float64 on the matrix's device.

    Raises:
        NumericsError: NaN or Inf in the matrix, no driver converged, a fallback under ``strict``, or singular values
            beyond float64.

    Example:
        >>> u, s, vh = safe_svd(torch.tensor([[0.0, 2.0], [1.0, 0.0]]))
        >>> s.tolist(), (u * s @ vh).round().tolist()
        ([2.0, 1.0], [[0.0, 2.0], [1.0, 0.0]])
    """
    scaled, exponent = _prepare(matrix, name)
    rows, columns = scaled.shape
    if scaled.numel() == 0:
        return scaled.new_zeros(rows, 0), scaled.new_zeros(0), scaled.new_zeros(0, columns)
    u, s, vh = _first_that_works(
        "svd",
        (("default", _default_svd), ("gesvd", _gesvd), ("gram", _gram_svd)),
        scaled,
        strict=strict,
        name=name,
    )
    return u, _unscale(s.clamp_min(0.0), exponent, name), vh


def singular_values(matrix: Tensor, *, strict: bool = False, name: str = "matrix") -> Tensor:
    """Compute the singular values alone: (min(m, n),) float64, descending.

    Of float32, bfloat16 and float16 they are roots of the eigenvalues of the gram on the smaller side, formed in float64: several
    times faster than an SVD, and good to ``2^-50 · max(m, n) · σ₁² / σ``, a 1e-4 of the smallest σ that such a dtype can tell
    from 0 (:attr:`lowrank.Spectrum.numerical_rank`). Values below ``2^-25 · √max(m, n) · σ₁`` are rounding of the gram and given
    as 0. float64 takes the chain of :func:`safe_svd`, as do these dtypes where the eigenvalues do not converge.

    Raises:
        NumericsError: as :func:`safe_svd`.

    Example:
        >>> singular_values(torch.diag(torch.tensor([1.0, -3.0]))).tolist()
        [3.0, 1.0]
    """
    drivers: list[tuple[str, Callable[[Tensor], tuple[Tensor, ...]]]] = []
    if matrix.dtype in (torch.float32, torch.float16, torch.bfloat16) and matrix.ndim == 2 and matrix.numel():
        check_finite(matrix, name)
        try:
            values = _gram_values(matrix.detach())
        except RuntimeError:
            # LinAlgError: it did not converge. The chain below counts as the fallback that it is.
            values = matrix.new_full((1,), math.nan, dtype=torch.float64)
        if bool(torch.isfinite(values).all()):
            return values
        drivers.append(("eigvalsh", _not_converged))
    scaled, exponent = _prepare(matrix, name)
    if scaled.numel() == 0:
        return scaled.new_zeros(0)
    (s,) = _first_that_works(
        "svd",
        (
            *drivers,
            ("default", lambda a: (torch.linalg.svdvals(a),)),
            ("gesvd", lambda a: (_gesvd(a)[1],)),
            ("gram", lambda a: (_gram_svd(a)[1],)),
        ),
        scaled,
        strict=strict,
        name=name,
    )
    return _unscale(s.clamp_min(0.0), exponent, name)


def _gram_values(matrix: Tensor) -> Tensor:
    """Take roots of the eigenvalues of the gram on the smaller side, descending. No float32 is too large or small for float64 squares."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    gram = matrix.new_zeros(tall.shape[1], tall.shape[1], dtype=torch.float64)
    for rows in tall.split(GRAM_ROWS):
        block = rows.to(torch.float64)
        gram.addmm_(block.T, block)
    squares = torch.flip(torch.linalg.eigvalsh(gram), [0])
    floor = 4.0 * torch.finfo(torch.float64).eps * tall.shape[0] * squares[0]
    # NaN compares false and stays, for the caller to see.
    return torch.where(squares <= floor, 0.0, squares).sqrt()


def _not_converged(matrix: Tensor) -> tuple[Tensor, ...]:
    raise NumericsError("eigenvalues of the gram did not converge")


def safe_eigh(
    symmetric: Tensor, *, psd: bool = True, strict: bool = False, name: str = "matrix"
) -> tuple[Tensor, Tensor]:
    """Decompose a symmetric matrix into eigenvalues, largest first, and eigenvectors, in float64.

    Drivers: torch's default (syevd on a CPU), LAPACK syev (scipy). The symmetric part ``(A + Aᵀ)/2`` is what is
    decomposed, so rounding in a product such as ``W Σ Wᵀ`` does no harm.

    Args:
        symmetric: (n, n), any real dtype and device.
        psd: the matrix has no negative eigenvalues except by rounding; those are set to 0.
        strict: a fallback raises instead.
        name: for messages.

    Returns:
        eigenvalues (n,) DESCENDING, eigenvectors (n, n) as columns in that order; float64 on the matrix's device.

    Raises:
        NumericsError: as :func:`safe_svd`.
        LowRankError: the matrix is not square.

    Example:
        >>> values, vectors = safe_eigh(torch.diag(torch.tensor([1.0, 4.0])))
        >>> values.tolist(), vectors.abs().tolist()
        ([4.0, 1.0], [[0.0, 1.0], [1.0, 0.0]])
    """
    scaled, exponent = _prepare(symmetric, name)
    if scaled.shape[0] != scaled.shape[1]:
        raise LowRankError(f"{name}: must be square for an eigendecomposition, got shape {tuple(scaled.shape)}")
    if scaled.numel() == 0:
        return scaled.new_zeros(0), scaled.new_zeros(0, 0)
    values, vectors = _first_that_works(
        "eigh",
        (("default", _default_eigh), ("ev", _ev)),
        (scaled + scaled.T) / 2,
        strict=strict,
        name=name,
    )
    values, vectors = torch.flip(values, [0]), torch.flip(vectors, [1])
    if psd:
        values = values.clamp_min(0.0)
    return _unscale(values, exponent, name), vectors


def _prepare(matrix: Tensor, name: str) -> tuple[Tensor, int]:
    if matrix.ndim != 2:
        raise LowRankError(
            f"{name}: must have 2 dimensions, got shape {tuple(matrix.shape)}; flatten a kernel to (out, rest)"
        )
    check_finite(matrix, name)
    upcast = matrix.detach().to(torch.float64)
    exponent = power_of_two_scale(upcast)
    return scale_by_power_of_two(upcast, -exponent), exponent


def _unscale(values: Tensor, exponent: int, name: str) -> Tensor:
    unscaled = scale_by_power_of_two(values, exponent)
    if not bool(torch.isfinite(unscaled).all()):
        raise NumericsError(
            f"{name}: its largest singular value or eigenvalue exceeds float64 (over 1.8e308); "
            "divide the matrix by a power of two"
        )
    return unscaled


def _first_that_works(
    operation: str,
    drivers: Sequence[tuple[str, Callable[[Tensor], tuple[Tensor, ...]]]],
    matrix: Tensor,
    *,
    strict: bool,
    name: str,
) -> tuple[Tensor, ...]:
    """Return the first driver's finite result; later drivers are fallbacks, counted, or refused under ``strict``."""
    tried: list[str] = []
    for driver, decompose in drivers:
        if tried and strict:
            break
        try:
            result = decompose(matrix)
        except (NumericsError, RuntimeError, ArithmeticError, ValueError, ImportError) as error:
            # torch's LinAlgError is a RuntimeError, numpy's a ValueError; ImportError is a machine without scipy.
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            tried.append(f"{driver}: {reason}")
            continue
        if all(bool(torch.isfinite(part).all()) for part in result):
            if tried:
                _fallbacks[f"{operation}:{driver}"] += 1
            return result
        tried.append(f"{driver}: non-finite result")
    remedy = "run without strict to allow a fallback" if strict else "leave this layer out with ignore=…"
    raise NumericsError(f"{name}: {operation} did not converge ({'; '.join(tried)}); {remedy}")


def _default_svd(matrix: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.linalg.svd(matrix, full_matrices=False))


def _gesvd(matrix: Tensor) -> tuple[Tensor, ...]:
    import scipy.linalg

    parts = scipy.linalg.svd(matrix.cpu().numpy(), full_matrices=False, lapack_driver="gesvd", check_finite=False)
    return tuple(torch.from_numpy(part.copy()).to(matrix.device) for part in parts)


def _gram_svd(matrix: Tensor) -> tuple[Tensor, ...]:
    if matrix.shape[0] < matrix.shape[1]:
        u, s, vh = _gram_svd(matrix.T)
        return vh.T, s, u.T
    _, vectors = safe_eigh(matrix.T @ matrix)
    # QR of A V = U diag(S) up to signs; unlike A V / S it gives orthonormal columns also where S is 0.
    basis, upper = torch.linalg.qr(matrix @ vectors)
    diagonal = torch.diagonal(upper)
    order = torch.argsort(diagonal.abs(), descending=True, stable=True)
    signs = torch.where(diagonal < 0, -1.0, 1.0).to(matrix.dtype)
    return (basis * signs)[:, order], diagonal.abs()[order], vectors[:, order].T


def _default_eigh(matrix: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.linalg.eigh(matrix))


def _ev(matrix: Tensor) -> tuple[Tensor, ...]:
    import scipy.linalg

    parts = scipy.linalg.eigh(matrix.cpu().numpy(), driver="ev", check_finite=False)
    return tuple(torch.from_numpy(part.copy()).to(matrix.device) for part in parts)
