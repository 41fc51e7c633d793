"""The states of jobs, and what users ask of them. Imports nothing: the command line needs the names before anything."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

State: TypeAlias = Literal["waiting", "created", "running", "paused", "interrupted", "failed", "finished", "cancelled"]
"""waiting: for a server to start it. A job whose coordinator was killed counts as interrupted."""

STATES: tuple[State, ...] = get_args(State)

ENDED: tuple[State, ...] = ("finished", "cancelled")
"""Final states; only ``jobs retry`` opens such a job again."""

NOTHING_LEFT = {
    "finished": "Nothing is left to be done. Items that failed are replayed with: tally jobs retry JOB --dead",
    "cancelled": "It was stopped for good. The same 'tally score' as before scores the collection from the start.",
}
"""Why a job that has ended cannot go on."""

Request: TypeAlias = Literal["run", "pause", "cancel", "stop"]
"""What a user asks of a job. stop: what a split job asks of its parts: to save what they have, and end for now."""
