"""The states of jobs, and what users ask of them. Imports nothing: the command line needs the names before anything."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

State: TypeAlias = Literal["waiting", "created", "running", "paused", "interrupted", "failed", "finished", "cancelled"]
"""waiting: for a server to start it. A job whose coordinator was killed counts as interrupted."""

STATES: tuple[State, ...] = get_args(State)

ENDED: tuple[State, ...] = ("finished", "cancelled")
"""Final states; only ``jobs retry`` opens such a job again."""

Request: TypeAlias = Literal["run", "pause", "cancel"]
"""What a user asks of a job."""
