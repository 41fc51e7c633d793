"""Callbacks for options whose values are written as people write them."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Any

import click

from tally.text import did_you_mean, seconds


class Choice(click.Choice[str]):
    """One of several words; a mistyped one is told with the word that is most like it."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        said = super().get_invalid_choice_message(value, ctx).removesuffix(".")
        return said + did_you_mean(str(value), self.choices)


def moment(ctx: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """Seconds since the epoch, from a date or time on this machine's clock, or from how long ago: ``2d``, ``30m``."""
    if value is None:
        return None
    try:
        return time.time() - seconds(value)
    except ValueError:
        pass
    try:
        return datetime.fromisoformat(value).astimezone().timestamp()
    except ValueError:
        raise click.BadParameter(
            f"{value!r} is not a time; write 2026-11-28, '2026-11-28 14:30', or 2d (two days ago)"
        ) from None


LONGEST = 10 * 366 * 86_400.0
"""Seconds: what is longer than ten years is a slip, and more than clocks can wait."""


def engine_name(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """The name of an engine that there is."""
    from tally.engines.factory import checked

    try:
        return checked(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r}: {error}") from None


def duration(ctx: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """Seconds, from ``30s``, ``5m``, ``1h``, ``1d`` or a bare number of seconds."""
    if value is None:
        return None
    try:
        found = seconds(value)
    except ValueError:
        found = 0.0
    if not found:
        raise click.BadParameter(f"{value!r} is not a duration such as 30s, 5m, 1h or 1d", ctx, parameter)
    if found > LONGEST:
        raise click.BadParameter(f"{value!r} is longer than ten years", ctx, parameter)
    return found


def share(ctx: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """A share of one, from ``0.001`` or ``0.1%``."""
    if value is None:
        return None
    text = value.strip()
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a share such as 0.001 or 0.1%", ctx, parameter) from None


def fail_on_dead(command: Any) -> Any:
    """The option of commands that see a job through."""
    return click.option(
        "--fail-on-dead",
        metavar="SHARE",
        callback=_share_of_one,
        help="Exit with 3 if more than this share of the items failed: 1%, or 0 for any.",
    )(command)


def _share_of_one(ctx: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    found = share(ctx, parameter, value)
    if found is not None and not 0 <= found <= 1:
        raise click.BadParameter(f"{value!r} is not between 0 and 100%", ctx, parameter)
    return found


def names(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    """Names with commas between them."""
    return tuple(part for each in (value or "").split(",") if (part := each.strip()))


def delay(ctx: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """Seconds, from ``5ms`` or what other durations are written like; 0 for none."""
    if value is None:
        return None
    try:
        return seconds(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a duration such as 5ms or 0.5s", ctx, parameter) from None


def replicas(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """The least and the most, from ``2`` or ``0..4``."""
    if value is None:
        return None
    from tally.serving.settings import replicas_from

    try:
        return replicas_from(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither a number nor a range such as 0..4", ctx, parameter) from None


def colour(ctx: click.Context, parameter: click.Parameter, value: str | None) -> Any:
    """Red, green and blue, from ``white``, ``#ffffff`` and the like."""
    from tally.jobs.spec import colour as found

    try:
        return found(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} {error}") from None


def millions(ctx: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """A number, which may be written as ``200M``."""
    from tally.jobs.spec import millions as found

    if value is None:
        return None
    try:
        return int(found(value))
    except ValueError:
        raise click.BadParameter(f"{value!r} is no number of pixels such as 200M") from None
