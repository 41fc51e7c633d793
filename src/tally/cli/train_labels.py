"""``tally train labels``: tables of labelled boxes, in the formats that detectors are trained from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tally.cli.console import say
from tally.cli.values import Choice, share
from tally.text import visible

if TYPE_CHECKING:
    from tally.training.labels.table import Labelled


@click.command(short_help="Labelled boxes, as detectors read them.")
@click.option(
    "--train-set", "train_sets", nargs=2, multiple=True, required=True, metavar="LABELS IMAGES",
    help="A table of labels, and the folder of its images.",
)  # fmt: skip
@click.option("--test-set", "test_sets", nargs=2, multiple=True, metavar="LABELS IMAGES", help="The same for testing.")
@click.option(
    "--format",
    "form",
    required=True,
    type=Choice(("yolov3", "csv", "tfrecord", "yolov5", "coco")),
    help="What to write.",
)
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="A new folder.")
@click.option(
    "--units", type=Choice(("fractions", "pixels")), default="fractions", show_default=True,
    help="What coordinates are.",
)  # fmt: skip
@click.option(
    "--confidence", callback=share, default="0", show_default=True, help="Leave out boxes that are less sure."
)
@click.option("--skip-missing", is_flag=True, help="Go on without pictures that are not there.")
def labels(
    train_sets: tuple[tuple[str, str], ...],
    test_sets: tuple[tuple[str, str], ...],
    form: str,
    out: Path,
    units: Any,
    confidence: float,
    skip_missing: bool,
) -> None:
    """Convert tables of labelled boxes into what a detector is trained from.

    A table has the columns image_url and label, a list of {label, topX, topY, bottomX, bottomY}, as Azure ML's data
    labelling exports it, and may have label_confidence. The results of a detector, a file or a folder, are one, too.

    \b
    tally train labels --train-set boxes/ street/ --format coco --confidence 0.5 --out labelled/
    tally train labels --train-set labels.csv images/ --test-set test.csv images/ --format yolov5 --out dataset/
    """
    from tally.errors import SourceNotFoundError
    from tally.training.labels.formats import convert
    from tally.training.labels.table import read

    sets = {}
    for name, pairs in (("train", train_sets), ("test", test_sets)):
        found: list[Labelled] = []
        for table, images in pairs:
            for place, there in ((table, Path(table).exists()), (images, Path(images).is_dir())):
                if not there:
                    raise SourceNotFoundError(f"--{name}-set: there is no {place!r}")
            one = read(Path(table), Path(images), units=units, confidence=confidence, skip_missing=skip_missing)
            left_out = {
                "boxes without area": one.empty, "boxes that are less sure": one.unsure,
                "pictures that are not there": len(one.missing),
            }  # fmt: skip
            for what, count in left_out.items():
                if count:
                    say(f"{table}: {count:,} {what} were left out", err=True)
            found += one.pictures
        if pairs:
            sets[name] = found
    classes = convert(sets, form, out)
    if form == "yolov5" and "test" not in sets:
        say("no --test-set: dataset.yaml has the pictures for training as val, too", err=True)
    counts = ", ".join(
        f"{len(pictures):,} pictures with {sum(len(each.boxes) for each in pictures):,} boxes to {name}"
        for name, pictures in sets.items()
    )
    say(f"wrote {out}: {counts}; classes: {visible(', '.join(classes))}")
