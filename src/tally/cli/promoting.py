"""What ``tally train`` and ``tally sweep`` have in common: the model's name, its alias, and the gate between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tally.cli.console import say
from tally.errors import SpecError

if TYPE_CHECKING:
    from tally.training.promotion import Promoted, Promotion, Verdict

F = TypeVar("F", bound=Callable[..., Any])


def promoting(*others: str, default: str | None = None) -> Callable[[F], F]:
    """Options for what becomes of the model. others: flags that mean the same as ``--register``. default: of it."""
    shown = f"  [default: {default}]" if default else ""

    def add(command: F) -> F:
        for option in reversed(
            (
                click.option(
                    "--register",
                    *others,
                    "register",
                    metavar="NAME",
                    help=f"Register the model under this name.{shown}",
                ),
                click.option("--alias", help="Have this alias point at it.  [default: champion, with --gate]"),
                click.option(
                    "--gate",
                    multiple=True,
                    metavar="CONDITION",
                    help="Only if 'METRIC >= NUMBER', or 'METRIC >= champion': no worse than that.",
                ),
            )
        ):
            command = option(command)
        return command

    return add


def promotion_of(
    name: str | None, out: Path | None, alias: str | None, gate: Iterable[str], *, metrics: Iterable[str]
) -> Promotion:
    """What becomes of a model that is always registered: by this name, or by that of its folder. Raises SpecError."""
    from tally.training.promotion import Promotion

    promotion = Promotion.of(name or (None if out is None else out.absolute().name), alias, gate, metrics=metrics)
    if promotion is None:
        raise SpecError(
            "--register: is needed: the model's name in the registry; or --out, a folder that has this name"
        )
    promotion.check()
    return promotion


def tell(promoted: Promoted) -> None:
    """Where the model is, and what the gate said."""
    version = promoted.version
    say(f"{'is already' if version.existed else 'registered as'} {version}")
    tell_verdict(promoted.verdict)
    say(f"  Use it: tally score SOURCE --model {version} --out OUT", err=True)


def tell_verdict(verdict: Verdict | None) -> None:
    """Whether the alias points at the new version, and why."""
    if verdict is not None:
        say(verdict.why)
