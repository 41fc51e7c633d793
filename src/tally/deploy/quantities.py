"""Amounts as Kubernetes writes them: ``500m`` of a core, ``2Gi`` of memory."""

from __future__ import annotations

import re
from decimal import Decimal

_QUANTITY = re.compile(r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))(Ki|Mi|Gi|Ti|Pi|Ei|[numkMGTPE]|[eE][+-]?[0-9]{1,2})?")
_UNITS = {
    **{unit: Decimal(1024) ** power for power, unit in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi", "Ei"), 1)},
    **{unit: Decimal(1000) ** power for power, unit in enumerate(["n", "u", "m", "", *"kMGTPE"], -3)},
}
_EXACT = 64
"""Characters beyond which no amount is written that anybody means."""


def amount(text: str) -> Decimal:
    """The amount that a quantity stands for, in cores, bytes or pieces. Raises ValueError for what is none."""
    match = _QUANTITY.fullmatch(text) if len(text) <= _EXACT else None
    if match is None:
        raise ValueError(f"{text[:_EXACT]!r} is no quantity")
    number, unit = Decimal(match[1]), match[2] or ""
    if unit in _UNITS:
        return number * _UNITS[unit]
    return number * Decimal(10) ** int(unit[1:])


def shown_bytes(size: Decimal) -> str:
    """Bytes as people read them: ``1.5 GiB``."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
