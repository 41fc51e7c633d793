"""Every error that Tally raises on purpose.

::

    TallyError
    ├── SpecError (ValueError)              flags, YAML or tally.yaml are wrong; all problems together
    ├── StorageError (OSError)              a folder, file or bucket could not be listed, read or written
    │   ├── SourceNotFoundError (FileNotFoundError)
    │   ├── SourceChangedError              what is there is not what the job was planned from
    │   ├── OutputExistsError (FileExistsError)
    │   ├── StorageAwayError (ConnectionError)    an object store does not answer, or a disk is gone: no item's fault
    │   └── DatabaseAwayError (ConnectionError)   the database does not answer at present
    ├── ModelError
    │   ├── ModelNotFoundError (LookupError)
    │   ├── ModelLoadError                  unreadable, damaged, or asks for what is not there
    │   ├── ModelChangedError               content does not match its hash
    │   ├── ModelRefutedError               its values do not bear out what it was taken for
    │   └── UntrustedModelError (PermissionError)
    ├── JobError
    │   ├── JobNotFoundError (LookupError)
    │   ├── JobExistsError                  the same job was started before; resume it or ask for a new one
    │   ├── JobStateError                   the job's state does not allow that
    │   └── OwnershipLostError              another coordinator has taken the job over
    ├── RunError                            a training's run cannot do what was asked
    │   ├── RunNotFoundError (LookupError)
    │   └── RunStateError                   the run's state does not allow that
    ├── PipelineError                       a pipeline's run cannot do what was asked
    │   ├── PipelineNotFoundError (LookupError)
    │   └── PipelineStateError              the run's state does not allow that
    ├── EndpointError                       an endpoint's state does not allow that
    │   ├── EndpointNotFoundError (LookupError)
    │   └── DeployError                     a cluster or a cloud does not take it, or it does not come up there
    ├── ClusterLostError (ConnectionError)  the Ray cluster does not answer, or its head was lost
    ├── ServerAwayError (ConnectionError)   the server of a client does not answer
    ├── RefusedError                    the server refuses a request
    ├── ItemError                           one item failed; it is dead, its neighbours are not
    └── WorkerError                         a worker was lost
        ├── WorkerCrashedError              it died: a signal, ``os._exit``, kill -9
        ├── WorkerTimeoutError (TimeoutError)
        ├── WorkerMemoryError (MemoryError)
        ├── WorkerSpentError                it has used up its file descriptors or threads
        └── WorkerStoppedError              its task was to stop and did not; no item is to blame

A message says what happened and the offending value, without secrets; ``hint`` says the next step.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence

from tally.masking import mask

MOST_TEXT = 100_000
"""Characters of an exception's text that are looked at."""


class TallyError(Exception):
    """What happened, with the offending value; ``hint`` is the next step for the user."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        message = mask(str(message))  # whatever code of a model gives
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process boundaries: keep keyword-only attributes, and what OSError holds in slots.
        state = dict(self.__dict__)
        if isinstance(self, OSError):
            state["errno"] = self.errno
        return (_rebuild, (type(self), self.args, state))


def _rebuild(cls: type[TallyError], args: tuple[object, ...], state: dict[str, object]) -> TallyError:
    # Not MemoryError's: that refuses to make a subclass whose first base is another.
    error: TallyError = (OSError if issubclass(cls, OSError) else Exception).__new__(cls, *args)
    Exception.__init__(error, *args)
    for name, value in state.items():
        setattr(error, name, value)
    return error


class SpecError(TallyError, ValueError):
    """A job, package or option is described wrongly; ``problems`` lists everything found."""

    def __init__(self, problems: str | Sequence[str], *, hint: str | None = None) -> None:
        self.problems = [mask(each) for each in ([problems] if isinstance(problems, str) else problems)]
        text = self.problems[0] if len(self.problems) == 1 else "\n".join(f"- {p}" for p in self.problems)
        super().__init__(text, hint=hint)


class TriggerNotFoundError(SpecError, LookupError):
    """No schedule or watch by that name."""


class KeyNotFoundError(TallyError, LookupError):
    """No key of a server by that id."""


class StorageError(TallyError, OSError):
    """A folder, file or bucket could not be listed, read or written."""


class SourceNotFoundError(StorageError, FileNotFoundError):
    """There is nothing at the place given, or nothing there that can be scored."""


class SourceChangedError(StorageError):
    """A file or object of the source is not what the job was planned from; or it changed while it was read."""


class OutputExistsError(StorageError, FileExistsError):
    """The output place already holds something that this job did not write."""


class StorageAwayError(StorageError, ConnectionError):
    """The object store did not answer, or was too busy, for as long as it was tried; or the disk or network folder that
    holds the source is gone. That is no item's fault."""


class DatabaseAwayError(StorageError, ConnectionError):
    """The database does not answer, or not now: it is being restarted, say. ``reason``: in its own words.

    What was being changed may have been changed or not; it is safe to ask again.
    """

    def __init__(self, message: str, *, reason: str = "", hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.reason = reason or message


class ModelError(TallyError):
    """A model cannot be used."""


class ModelNotFoundError(ModelError, LookupError):
    """No model by that name, version, alias or path."""


class ModelLoadError(ModelError):
    """The model is unreadable or damaged, or needs something that is not there."""


class ModelChangedError(ModelError):
    """The model's content no longer matches the hash under which it is known."""


class ModelRefutedError(ModelError):
    """The model's values do not bear out what it was taken for. Raised while scoring, it ends the job."""


class UntrustedModelError(ModelError, PermissionError):
    """Opening the model would run code that it carries, and nobody said that it is trusted."""


class JobError(TallyError):
    """A job cannot do what was asked."""


class JobNotFoundError(JobError, LookupError):
    """No job by that id."""


class JobExistsError(JobError):
    """The same source, model and output were given to an earlier job (``job_id``)."""

    def __init__(self, message: str, *, job_id: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.job_id = job_id


class JobStateError(JobError):
    """The job's state does not allow that."""


class OwnershipLostError(JobError):
    """Another coordinator has taken the job over; nothing more may be committed by this one."""


class RunError(TallyError):
    """A training's run cannot do what was asked."""


class RunNotFoundError(RunError, LookupError):
    """No run by that id."""


class RunStateError(RunError):
    """The run's state does not allow that."""


class PipelineError(TallyError):
    """A pipeline's run cannot do what was asked."""


class PipelineNotFoundError(PipelineError, LookupError):
    """No run of a pipeline by that id."""


class PipelineStateError(PipelineError):
    """The run's state does not allow that."""


class EndpointError(TallyError):
    """What was asked of an endpoint cannot be done."""


class EndpointNotFoundError(EndpointError, LookupError):
    """There is no such endpoint."""


class DeployError(EndpointError):
    """A target does not answer, does not take an endpoint, or the endpoint does not come up there."""


class ClusterLostError(TallyError, ConnectionError):
    """The Ray cluster does not answer, or its head was lost while it was used."""


class ServerAwayError(TallyError, ConnectionError):
    """The server that a client asks does not answer, or something else does in its place."""


class RefusedError(TallyError):
    """The server refuses the request: the key is wrong, its role does not allow that, there is too much of it.

    status: of the answer. retry_after: seconds after which to ask again, if that may help.
    """

    def __init__(self, status: int, message: str, *, hint: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message, hint=hint)
        self.status, self.retry_after = status, retry_after

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), (self.message,), dict(self.__dict__)))


class ItemError(TallyError):
    """One item failed. ``stage`` is one of read, decode, prepare, score, write."""

    def __init__(self, message: str, *, stage: str = "score", hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.stage = stage

    def bare(self) -> ItemError:
        """Itself without the traceback, whose frames would keep the item's data alive as long as the error."""
        self.__cause__ = self.__context__ = None
        return self.with_traceback(None)


class WorkerError(TallyError):
    """A worker was lost while it ran a task.

    ``suspects`` is the half-open range of item positions inside the chunk that the worker was
    busy with when it was lost, or None if that is not known. ``trace`` is the stack that it left.
    ``fresh``: whether it had been given no items before; where it had, what it has too much of may be theirs.
    """

    def __init__(
        self,
        message: str,
        *,
        suspects: tuple[int, int] | None = None,
        fresh: bool = True,
        trace: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.suspects = suspects
        self.fresh = fresh
        self.trace = trace


class WorkerCrashedError(WorkerError):
    """The worker died: a signal, a native crash, ``os._exit``, kill -9."""


class WorkerTimeoutError(WorkerError, TimeoutError):
    """One batch outlasted its time limit."""


class WorkerMemoryError(WorkerError, MemoryError):
    """The worker outgrew its memory limit."""


class WorkerSpentError(WorkerError):
    """The worker has used up its file descriptors or threads, and can do no more."""


class WorkerStoppedError(WorkerError):
    """The task was asked to stop, did not in time, and its worker was killed: no item is to blame."""


def error_line(error: BaseException) -> str:
    """An exception in one line: ``ValueError: what it says``."""
    try:
        text = mask(" ".join(str(error)[:MOST_TEXT].split()))
    except BaseException as unsaid:  # of somebody's own class
        text = f"(saying what went wrong raised {type(unsaid).__name__})"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def raised_at(error: BaseException, file: str | None = None) -> str | None:
    """``score.py, line 7``: where an exception was raised, or the last line of ``file`` on the way there, if any."""
    found = None
    trace = error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if file is None or name == file:
            found = f"{name.rsplit('/', 1)[-1]}, line {trace.tb_lineno}"
        trace = trace.tb_next
    return found


def is_interrupt(error: BaseException) -> bool:
    """Whether somebody pressed Ctrl-C. What code of a model raises, of whatever class, ends no more than its item.

    Workers block the signal, and it never reaches threads: there, code of a model raised it.
    """
    return (
        isinstance(error, KeyboardInterrupt)
        and threading.current_thread() is threading.main_thread()
        and signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    )
