"""Numbers as people read them."""

from __future__ import annotations

from decimal import Decimal


def figure(value: float, digits: int = 4) -> str:
    """To so many significant digits, never in powers of ten: `0.0302`, `93.04`, `12,350`."""
    return f"{Decimal(f'{value:.{digits}g}'):,f}"
