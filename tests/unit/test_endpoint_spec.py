"""What an endpoint is to serve after a change: versions, shares and labels."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("msgspec")
from tally.config import settings
from tally.database.connect import connect
from tally.errors import SpecError
from tally.media.images import Decoding
from tally.models.reference import ModelRef
from tally.serving.deployed import labels_of
from tally.serving.deployments import DeploymentStore, EndpointSpec, Version
from tally.serving.settings import Limits

CHAMPION = "models:/d@champion"


def version(model: str, content: str, number: int | None = None) -> Version:
    return Version(model, ModelRef("onnx", "d", Path("/m"), "m.onnx", f"sha256:{content}", version=number), {"top": 1})


def spec(split: dict[str, float], shadows: dict[str, float] | None = None, **versions: Version) -> EndpointSpec:
    return EndpointSpec(
        {each.removeprefix("v"): found for each, found in versions.items()}, split, shadows=shadows or {}
    )


@pytest.mark.parametrize(
    ("before", "found", "split", "shadows", "models"),
    [
        # The alias has moved on: the new version has the share of the old one, and the canary its own.
        (
            spec({"3": 90, "9": 10}, v3=version(CHAMPION, "a", 3), v9=version("models:/d/9", "z", 9)),
            version(CHAMPION, "b", 4),
            {"4": 90, "9": 10},
            {},
            {"4": CHAMPION, "9": "models:/d/9"},
        ),
        # It has moved to the canary: that has the shares of both, and is what the alias means.
        (
            spec({"3": 90, "4": 10}, v3=version(CHAMPION, "a", 3), v4=version("models:/d/4", "b", 4)),
            version(CHAMPION, "b", 4),
            {"4": 100},
            {},
            {"4": CHAMPION},
        ),
        # It has moved to what had copies only: that answers now.
        (
            spec({"3": 1}, {"4": 0.1, "5": 0.2}, v3=version(CHAMPION, "a", 3), v4=version("models:/d/4", "b", 4),
                 v5=version("models:/d/5", "c", 5)),
            version(CHAMPION, "b", 4),
            {"4": 1},
            {"5": 0.2},
            {"4": CHAMPION, "5": "models:/d/5"},
        ),
        # Nothing has changed.
        (
            spec({"3": 9, "4": 1}, {"3": 0.5}, v3=version(CHAMPION, "a", 3), v4=version("models:/d/4", "b", 4)),
            version(CHAMPION, "a", 3),
            {"3": 9, "4": 1},
            {"3": 0.5},
            {"3": CHAMPION, "4": "models:/d/4"},
        ),
        # Files have no number of their own: the next that is free; copies go along.
        (
            spec({"1": 9, "2": 1}, {"1": 0.5}, v1=version("m.onnx", "a"), v2=version("n.onnx", "b")),
            version("m.onnx", "c"),
            {"3": 9, "2": 1},
            {"3": 0.5},
            {"3": "m.onnx", "2": "n.onnx"},
        ),
    ],
    ids=["moved", "to the canary", "to the shadow", "unchanged", "a file"],
)  # fmt: skip
def test_a_model_that_is_looked_up_again_takes_its_own_place(
    before: EndpointSpec, found: Version, split: Any, shadows: Any, models: Any
) -> None:
    store = DeploymentStore(connect(settings().database))
    store.create("plastic", before)
    asked: list[Any] = []

    def look_up(model: str, options: Any) -> ModelRef:
        asked.append((model, options))
        return found.ref

    changed = store.reload("plastic", look_up=look_up)
    assert asked == [(found.model, {"top": 1})]  # the one with the most requests, and no other
    assert (changed.spec.split, changed.spec.shadows) == (split, shadows)
    assert {number: each.model for number, each in changed.spec.versions.items()} == models
    assert changed.revision == (1 if changed.spec == before else 2)
    assert len(changed.history) == changed.revision - 1


def test_labels_are_the_aliases_of_what_is_served() -> None:
    before = spec({"3": 1, "4": 0}, v3=version(CHAMPION, "a", 3), v4=version("models:/d@next", "b", 4))
    assert labels_of(before) == {"champion": "3"}
    shared = before.with_model(version(CHAMPION, "b", 4), share=0.1)
    assert labels_of(shared) == {"champion": "4"}  # what it means now, and not what it meant
    back = shared.with_model(version(CHAMPION, "a", 3), share=0.5)
    assert labels_of(back) == {"champion": "3"}


def test_two_models_do_not_share_a_number() -> None:
    before = spec({"3": 1, "4": 1}, v3=version(CHAMPION, "a", 3), v4=version("models:/d/4", "b", 4))
    other = version("models:/other/4", "x", 4)
    for change in (lambda: before.with_model(other, share=0.1), lambda: before.with_instead("3", other)):
        with pytest.raises(SpecError, match="version 4 of this endpoint is models:/d/4 already"):
            change()
    assert [*before.with_model(other).versions] == ["4"]


def test_what_is_said_of_pictures_is_kept() -> None:
    limits = Limits(pages="all", background=(255, 255, 255), max_pixels=1000)
    before = replace(spec({"1": 100}, v1=version("/m", "a")), limits=limits)
    after = EndpointSpec.from_dict(json.loads(json.dumps(before.to_dict())))
    assert after.limits == limits
    assert after.limits.decoding == Decoding(1000, (255, 255, 255), "all")
    with pytest.raises(SpecError, match="max_pixels: 1 or more, not 0"):
        replace(before, limits=replace(limits, max_pixels=0))
