"""Results as words: one formatter for each kind of number, used by the page, the figures and the commands."""

from __future__ import annotations

import math
from collections.abc import Iterable

from analysis.results import Interval


def number(value: float, digits: int = 1, sign: str = "") -> str:
    """A number with a fixed count of decimals; "-" where there is none. sign "+" also marks positive numbers.
    Zero has no minus.
    """
    return f"{value:{sign}z.{digits}f}" if math.isfinite(value) else "-"


def span(value: Interval, digits: int = 1, sign: str = "") -> str:
    """An interval as 4.2 (2.9 to 5.4); only its middle where it has no bounds."""
    if not math.isfinite(value.low):
        return number(value.mid, digits, sign)
    low, mid, high = (number(x, digits, sign) for x in value)
    return f"{mid} ({low} to {high})"


def percent(share: float) -> str:
    """A share from 0 to 1 as a percentage without decimals."""
    return f"{share:.0%}"


def join(parts: Iterable[str]) -> str:
    """a, b and c."""
    items = list(parts)
    return ", ".join(items[:-1]) + " and " + items[-1] if len(items) > 1 else "".join(items)
