"""What a shell completes: jobs, models, words and columns, and files wherever nothing else is meant.

The scripts for the shells are our own. Click's end the completion of files wherever a value is a text, and bash takes
``models:/name@alias`` for several words.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any, TypeAlias

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ShellComplete,
    ZshComplete,
    add_completion_class,
    split_arg_string,
)

Completer: TypeAlias = Callable[[click.Context, click.Parameter, str], "list[CompletionItem[Any]]"]
"""From the value as far as it is written to what it may be; nothing: the name of a file."""

_MOST_JOBS = 50


def _quietly(find: Callable[[click.Context, str], Iterable[str]]) -> Completer:
    """Whatever cannot be asked is not completed: an error has no place in the line that somebody writes."""

    @wraps(find)
    def complete(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem[Any]]:
        try:
            return [CompletionItem(each) for each in find(ctx, incomplete) if each.startswith(incomplete)]
        except Exception:
            return []

    return complete


def words(*known: str) -> Completer:
    """One of these, or several with commas between them."""

    @_quietly
    def complete(ctx: click.Context, incomplete: str) -> Iterable[str]:
        before, comma, _ = incomplete.rpartition(",")
        return (f"{before}{comma}{each}" for each in known)

    return complete


tasks = words("classify", "detect", "restyle", "embed", "segment", "values")
devices = words("auto", "cpu", "cuda", "tensorrt")


@_quietly
def jobs(ctx: click.Context, incomplete: str) -> Iterable[str]:
    """The newest jobs; else places, which are files."""
    from tally.cli import installation

    with ctx:
        return [each.id for each in installation.jobs().list(limit=_MOST_JOBS).jobs]


@_quietly
def models(ctx: click.Context, incomplete: str) -> Iterable[str]:
    """``models:/`` and ``tally:`` with what is there; else files."""
    if incomplete.startswith("tally:"):
        from tally import demo

        return [f"tally:{each}" for each in demo.MODELS]
    return (f"models:/{each}" for each in _registered(ctx)) if incomplete.startswith("models:") else ()


@_quietly
def registered(ctx: click.Context, incomplete: str) -> Iterable[str]:
    """The names of models in the registry."""
    return [each for each in _registered(ctx) if "@" not in each]


def _registered(ctx: click.Context) -> list[str]:
    from tally.cli import installation

    with ctx:
        versions = installation.registry().list()
    names = {each.name for each in versions}
    return sorted(names | {f"{each.name}@{alias}" for each in versions for alias in each.aliases})


@_quietly
def columns(ctx: click.Context, incomplete: str) -> Iterable[str]:
    """The columns of the first table of the source, one or several with commas between them."""
    import duckdb

    from tally.sources.listing import Listing
    from tally.sources.tables.formats import format_of

    # Behind an option without a value, Click has not sorted the arguments yet.
    given = ctx.params.get("items") or [*ctx.params["source"], *ctx.args][0]
    listing = Listing.of([given], "table")
    path = listing.locations[0].within + next(listing.entries(0)).name
    reader = {"parquet": "read_parquet", "csv": "read_csv"}.get(format_of(path) or "", "read_json")
    names = [row[0] for row in duckdb.connect().execute(f"DESCRIBE FROM {reader}(?)", [path]).fetchall()]
    before, comma, _ = incomplete.rpartition(",")
    return (f"{before}{comma}{each}" for each in names)


# -- shells ---------------------------------------------------------------------------------------------------------

_BASH = """\
%(complete_func)s() {
    local line
    COMPREPLY=()
    while IFS= read -r line; do
        [[ -n $line ]] && COMPREPLY+=("$line")
    done < <(env COMP_LINE="${COMP_LINE:0:COMP_POINT}" COMP_WORDBREAKS="$COMP_WORDBREAKS" \
%(complete_var)s=bash_complete "$1")
}
complete -o nosort -o default -o bashdefault -F %(complete_func)s %(prog_name)s
"""

_ZSH = """\
#compdef %(prog_name)s
%(complete_func)s() {
    local -a found
    found=("${(@f)$(env COMP_WORDS="${(j: :)${(@q)words[1,CURRENT]}}" %(complete_var)s=zsh_complete ${words[1]})}")
    if [[ -n "$found" ]]; then
        compadd -U -V unsorted -a found
    else
        _files
    fi
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    %(complete_func)s "$@"
else
    compdef %(complete_func)s %(prog_name)s
fi
"""

_FISH = """\
function %(complete_func)s
    set -l found (env COMP_LINE=(commandline -cp) %(complete_var)s=fish_complete (commandline -opc)[1])
    if test -n "$found"
        printf '%%s\\n' $found
    else
        __fish_complete_path (commandline -ct)
    end
end
complete --no-files --command %(prog_name)s --arguments "(%(complete_func)s)"
"""


class _Plain(ShellComplete):
    """Gives the shell a value on each line, and no line where it should complete files."""

    def complete(self) -> str:
        args, incomplete = self.get_completion_args()
        found = [each.value for each in self.get_completions(args, incomplete) if each.type == "plain"]
        return "\n".join(self.shown(found, incomplete))

    def shown(self, values: Sequence[str], incomplete: str) -> Iterable[str]:
        return values


def _split(line: str) -> tuple[list[str], str]:
    """The words after the command, and the one that is being written."""
    args = split_arg_string(line)[1:]
    return (args, "") if not line or line[-1].isspace() or not args else (args[:-1], args[-1])


class _Bash(_Plain, BashComplete):
    source_template = _BASH

    def get_completion_args(self) -> tuple[list[str], str]:
        return _split(os.environ["COMP_LINE"])

    def shown(self, values: Sequence[str], incomplete: str) -> Iterable[str]:
        """Bash replaces only what is behind the last character that parts words for it."""
        written = incomplete.partition("=")[2] if incomplete.startswith("--") and "=" in incomplete else incomplete
        breaks = os.environ.get("COMP_WORDBREAKS", "")
        cut = max((written.rfind(each) for each in breaks), default=-1) + 1 if written else 0
        return (each[cut:] for each in values)


class _Zsh(_Plain, ZshComplete):
    source_template = _ZSH

    def get_completion_args(self) -> tuple[list[str], str]:
        *args, incomplete = split_arg_string(os.environ["COMP_WORDS"])[1:] or [""]
        return args, incomplete


class _Fish(_Plain, FishComplete):
    source_template = _FISH

    def get_completion_args(self) -> tuple[list[str], str]:
        return _split(os.environ["COMP_LINE"])


def install() -> None:
    """Have Click use these for the shells."""
    for each in (_Bash, _Zsh, _Fish):
        add_completion_class(each)
