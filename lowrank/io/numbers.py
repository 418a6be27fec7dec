"""Numbers as people read them."""

from __future__ import annotations

import math

__all__ = ["MISSING", "number_of", "percent"]

MISSING = "-"


def percent(fraction: float | None, digits: int = 2) -> str:
    """Write a fraction in per cent, with at least ``digits`` significant digits.

    Example:
        >>> percent(0.0934), percent(0.251, 3), percent(0.1), percent(0.0), percent(None), percent(1.5)
        ('9.3 %', '25.1 %', '10 %', '0 %', '-', '150 %')
    """
    if fraction is None or math.isnan(fraction):
        return MISSING
    if math.isinf(fraction):
        return "inf %"
    value = 100.0 * fraction
    if value == 0.0:
        return "0 %"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(decimals, 12)}f} %"


def number_of(text: str) -> float:
    """Read a number that people write, also as a percentage: what :func:`percent` undoes.

    Raises:
        ValueError: it is no number.

    Example:
        >>> number_of("5%"), number_of(" 0.05 ")
        (0.05, 0.05)
    """
    text = text.strip()
    return float(text[:-1]) / 100.0 if text.endswith("%") else float(text)
