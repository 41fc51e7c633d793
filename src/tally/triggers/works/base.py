"""The contract of what a schedule does in each interval: a job, a training, a pipeline, a clean-up."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from tally.jobs.spec import JobSpec

if TYPE_CHECKING:
    from tally.jobs.facade import Jobs
    from tally.triggers.store import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """An interval that this process has taken. span: the interval in words.

    assign: notes what does it, as ``job_id``, ``training_id``, ``sweep_id`` or ``pipeline_id``, before that begins.
    note: says for people how it stands, in a sentence. patiently: calls a function, and waits while the database is
    away.
    """

    run: Run
    span: str
    jobs: Jobs
    assign: Callable[..., None]
    note: Callable[[str | None], None]
    patiently: Callable[[Callable[[], Any]], Any]


@dataclass(frozen=True, slots=True)
class Ended:
    """stopped: before its end, to go on later. failed: for good. outcome: what came of it, in a sentence."""

    state: Literal["finished", "failed", "cancelled", "stopped"]
    outcome: str | None = None


class Work(ABC):
    """What one interval's run does. The process that has the interval calls :meth:`see_through`; the others look.

    distinct: the field of the file that no two intervals may have the same. verbatim: fields in which no placeholder
    is looked for, and that are not shown. only_admins: why only an admin schedules it on a server, if so.
    """

    distinct: ClassVar[str | None] = None
    verbatim: ClassVar[tuple[str, ...]] = ()
    only_admins: ClassVar[str | None] = None

    @classmethod
    @abstractmethod
    def read(cls, fields: dict[str, Any], folder: Path) -> dict[str, Any]:
        """The fields of a file in this folder as they are kept: with absolute places, and placeholders as they are.

        Raises SpecError.
        """

    @classmethod
    def refusals(cls, fields: Mapping[str, Any]) -> list[str]:
        """What may not be kept."""
        return []

    @classmethod
    def timing(cls, fields: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
        """What the file itself says of ``cron``, ``timezone``, ``overlap``, ``catch_up`` and ``paused``.

        given: those of them that it need not say. Raises SpecError.
        """
        return {}

    @classmethod
    @abstractmethod
    def make(cls, fields: Mapping[str, Any]) -> Self:
        """That of an interval, whose placeholders are filled in. Raises SpecError with every problem."""

    @property
    def job(self) -> JobSpec | None:
        """The job that it is, if it is one."""
        return None

    def named(self) -> Iterable[tuple[str, str]]:
        """The places that it names, each with its field; those of a job are its own."""
        return ()

    @abstractmethod
    def check_there(self) -> None:
        """Raises SpecError, SourceNotFoundError, ModelNotFoundError where it plainly cannot be done."""

    def check_named(self) -> None:  # noqa: B027 - most name nothing of the kind
        """Raises SpecError where what it names has to be there before any interval, and is not."""

    @abstractmethod
    def see_through(self, taken: Taken) -> Ended:
        """Do it, or what is left of it: an earlier process may have begun, and been killed.

        Raises SourceNotFoundError where there is nothing to do it with, and whatever it fails with.
        """
