"""Callbacks for options whose values are written as people write them."""

from __future__ import annotations

import re

import click

_DURATION = re.compile(r"(?i)\s*(\d+(?:\.\d+)?)\s*(ms|s|sec|m|min|h|d)?\s*")
_SECONDS = {"ms": 0.001, "s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400}


def duration(ctx: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """Seconds, from ``30s``, ``5m``, ``1h``, ``1d`` or a bare number of seconds."""
    if value is None:
        return None
    match = _DURATION.fullmatch(value)
    if match is None or not float(match[1]):
        raise click.BadParameter(f"{value!r} is no duration such as 30s, 5m, 1h or 1d", ctx, parameter)
    return float(match[1]) * _SECONDS[(match[2] or "s").lower()]


def share(ctx: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """A share of one, from ``0.001`` or ``0.1%``."""
    if value is None:
        return None
    text = value.strip()
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise click.BadParameter(f"{value!r} is no share such as 0.001 or 0.1%", ctx, parameter) from None


def names(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    """Names with commas between them."""
    return tuple(part for each in (value or "").split(",") if (part := each.strip()))
