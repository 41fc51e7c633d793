"""What a user may say of a script, checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tally.errors import SpecError
from tally.models.package import problems_of
from tally.models.reference import BATCH_LIMIT


class ScriptOptions(BaseModel):
    """Options of a script; see :class:`tally.scorers.scripts.script.ScriptScorer`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    form: Literal["auto", "mini_batch", "raw", "bytes", "json", "dataframe"] = "auto"
    features: list[str] | None = None
    batch_size: int | None = Field(default=None, ge=1, le=BATCH_LIMIT)
    arguments: list[str] = []
    columns: dict[str, str] | None = None

    @classmethod
    def checked(cls, path: Path, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of the script at ``path``. Raises SpecError with every problem."""
        try:
            return cls.model_validate(dict(options)).model_dump(exclude_none=True)
        except ValidationError as error:
            problems = problems_of(error, list(cls.model_fields))
            raise SpecError([f"{path.name}: {each}" for each in problems]) from None
