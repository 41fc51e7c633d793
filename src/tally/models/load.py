"""From a reference to a model to a loaded scorer, on any machine: content that has changed since is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tally.errors import ModelLoadError, TallyError, error_line, is_interrupt, raised_at
from tally.models import kinds
from tally.models.mirror import fetched, is_here
from tally.models.reference import ModelRef

if TYPE_CHECKING:
    from tally.scorers.base import Scorer


def create(ref: ModelRef) -> Scorer:
    """The scorer, not loaded: tells its input, size, batch size, output and columns.

    What it reads of the model's files for that is fetched where it is not on this machine.
    """
    kind = kinds.get(ref.kind)
    if kind.reads_files and ref.mirror is not None and not is_here(ref):
        ref = fetched(ref)
    try:
        return kind.create(ref)
    except TallyError:
        raise
    except BaseException as error:
        if is_interrupt(error):
            raise
        raise _failed(ref, "making the scorer", error) from error


def verify(ref: ModelRef) -> None:
    """Raises ModelChangedError unless the content is still what it was when the model was resolved.

    Content that is not on this machine is fetched from its mirror; ModelNotFoundError where it has none.
    """
    fetched(ref)


def load(ref: ModelRef, device: str) -> Scorer:
    """The scorer, loaded on ``device``, after checking that the content is still what it was.

    Content that is not on this machine is fetched from its mirror, once for all processes.
    Raises ModelChangedError, ModelNotFoundError, ModelLoadError.
    """
    ref = fetched(ref)
    scorer = create(ref)
    try:
        scorer.load(ref.location / ref.artifacts, device)
    except TallyError:
        raise
    except BaseException as error:
        if is_interrupt(error):
            raise
        raise _failed(ref, "load()", error) from error
    return scorer


def _failed(ref: ModelRef, what: str, error: BaseException) -> ModelLoadError:
    return ModelLoadError(f"{ref}: {what} failed: {error_line(error)} ({raised_at(error)})")
