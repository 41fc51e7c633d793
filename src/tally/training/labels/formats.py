"""The formats that detectors are trained from: YOLOv3's lists, CSV, TensorFlow's records, YOLOv5's folders, COCO's.

Each takes the pictures for training and for testing, and writes a new folder. Classes are numbered in the order of
their names: from 0 for YOLO, from 1 in label maps and for COCO.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tally import plain_yaml
from tally.errors import OutputExistsError, RunError, SpecError
from tally.optional import needed
from tally.scorers.scripts.files import link_or_copy
from tally.storage import failure
from tally.training.labels.table import Labelled

Sets = Mapping[str, Sequence[Labelled]]
"""``train`` and, if there are any, ``test``: the pictures of each."""


def convert(sets: Sets, form: str, out: Path) -> list[str]:
    """Write the sets in a format (a name of FORMATS) into a new folder. Returns the classes, by number.

    Raises SpecError, OutputExistsError, StorageError.
    """
    classes = sorted({box.label for pictures in sets.values() for each in pictures for box in each.boxes})
    if not classes:
        raise SpecError("no picture has a box: there is nothing to learn")
    if out.exists():
        raise OutputExistsError(f"{out} is there already", hint="Choose another folder, or remove it first.")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        FORMATS[form](sets, classes, partial, out)
        partial.rename(out)
    except OSError as error:
        raise failure("write", str(out), error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return classes


def _yolov3(sets: Sets, classes: Sequence[str], folder: Path, out: Path) -> None:
    """``train.txt``, ``test.txt``: a line for each picture, ``path x1,y1,x2,y2,class ...``; ``labels.txt``."""
    if torn := [label for label in classes if label.splitlines() != [label]]:
        raise SpecError(
            f"the format yolov3 has a line for each class, and {torn[0]!r} is none",
            hint="Rename it, or choose another format.",
        )
    for name, pictures in sets.items():
        lines = []
        for each in pictures:
            path = str(each.picture.absolute())
            if any(sign.isspace() for sign in path):
                raise SpecError(
                    f"the format yolov3 parts a line at spaces, but {path!r} holds one",
                    hint="Rename it, or choose another format.",
                )
            boxes = [
                f"{round(b.xmin)},{round(b.ymin)},{round(b.xmax)},{round(b.ymax)},{classes.index(b.label)}"
                for b in each.boxes
            ]
            lines.append(" ".join([path, *boxes]))
        (folder / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines), "utf-8")
    (folder / "labels.txt").write_text("".join(f"{label}\n" for label in classes), "utf-8")


def _csv(sets: Sets, classes: Sequence[str], folder: Path, out: Path) -> None:
    """``train.csv``, ``test.csv``: a row for each box; ``labelmap.pbtxt``."""
    for name, pictures in sets.items():
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["class", "filename", "height", "width", "xmax", "xmin", "ymax", "ymin"])
            for each, filename in zip(pictures, _filenames(pictures), strict=True):
                for b in each.boxes:
                    sizes = (each.height, each.width, *map(round, (b.xmax, b.xmin, b.ymax, b.ymin)))
                    rows.writerow([b.label, filename, *sizes])
    _label_map(classes, folder)


def _filenames(pictures: Sequence[Labelled]) -> list[str]:
    """What each picture is called: its file's name; where two pictures have one, the paths from their common folder."""
    places = [each.picture.absolute() for each in pictures]
    if len({place.name for place in places}) == len(set(places)):
        return [place.name for place in places]
    return _paths(places)


def _paths(places: Sequence[Path]) -> list[str]:
    """From their common folder."""
    common = Path(os.path.commonpath([each.parent for each in places]))
    return [each.relative_to(common).as_posix() for each in places]


def _label_map(classes: Sequence[str], folder: Path) -> None:
    # Not with \\u escapes: those of JSON are halves of what lies beyond the first plane, which protobuf refuses.
    names = [json.dumps(label, ensure_ascii=False) for label in classes]
    items = (f"item {{\n  id: {number}\n  name: {name}\n}}\n" for number, name in enumerate(names, 1))
    (folder / "labelmap.pbtxt").write_text("".join(items), "utf-8")


_ENCODED = {".jpg": b"jpeg", ".jpeg": b"jpeg", ".png": b"png", ".gif": b"gif", ".bmp": b"bmp"}
"""What TensorFlow decodes."""


def _tfrecord(sets: Sets, classes: Sequence[str], folder: Path, out: Path) -> None:
    """``train.record``, ``test.record``: TensorFlow's examples, as its object detection reads them; and
    ``labelmap.pbtxt``. Raises SpecError for pictures that TensorFlow does not decode, RunError without TensorBoard."""
    with needed("writing records needs", "retrain", RunError):
        from tensorboard.summary.writer.record_writer import RecordWriter
    for name, pictures in sets.items():
        with (folder / f"{name}.record").open("wb") as file:
            writer = RecordWriter(file)
            for each, filename in zip(pictures, _filenames(pictures), strict=True):
                form = _ENCODED.get(each.picture.suffix.lower())
                if form is None:
                    raise SpecError(f"TensorFlow reads JPEG, PNG, GIF and BMP, and not {each.picture}")
                writer.write(_example(each, filename, form, classes))
            writer.flush()
    _label_map(classes, folder)


def _example(each: Labelled, filename: str, form: bytes, classes: Sequence[str]) -> bytes:
    name = os.fsencode(filename)
    made = example()()

    def put(key: str, kind: str, *values: Any) -> None:
        getattr(made.features.feature[key], kind).value.extend(values)

    put("image/height", "int64_list", each.height)
    put("image/width", "int64_list", each.width)
    put("image/filename", "bytes_list", name)
    put("image/source_id", "bytes_list", name)
    put("image/encoded", "bytes_list", each.picture.read_bytes())
    put("image/format", "bytes_list", form)
    put("image/object/bbox/xmin", "float_list", *(b.xmin / each.width for b in each.boxes))
    put("image/object/bbox/xmax", "float_list", *(b.xmax / each.width for b in each.boxes))
    put("image/object/bbox/ymin", "float_list", *(b.ymin / each.height for b in each.boxes))
    put("image/object/bbox/ymax", "float_list", *(b.ymax / each.height for b in each.boxes))
    put("image/object/class/text", "bytes_list", *(b.label.encode() for b in each.boxes))
    put("image/object/class/label", "int64_list", *(classes.index(b.label) + 1 for b in each.boxes))
    return bytes(made.SerializeToString())


@cache
def example() -> Any:
    """The message ``tensorflow.Example``, as TensorFlow's ``core/example/feature.proto`` has it.

    In a pool of its own, so that a process with TensorFlow in it has no message twice.
    """
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="tally/example.proto", package="tensorflow", syntax="proto3")

    def message(name: str, *fields: tuple[str, int, int, str], repeated: bool = False, parent: Any = file) -> Any:
        kinds = parent.message_type if parent is file else parent.nested_type
        made = kinds.add(name=name)
        for key, number, kind, of in fields:
            label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            made.field.add(name=key, number=number, type=kind, label=label, type_name=of or None)
        return made

    message("BytesList", ("value", 1, field.TYPE_BYTES, ""), repeated=True)
    message("FloatList", ("value", 1, field.TYPE_FLOAT, ""), repeated=True)
    message("Int64List", ("value", 1, field.TYPE_INT64, ""), repeated=True)
    one_of = message(
        "Feature",
        ("bytes_list", 1, field.TYPE_MESSAGE, ".tensorflow.BytesList"),
        ("float_list", 2, field.TYPE_MESSAGE, ".tensorflow.FloatList"),
        ("int64_list", 3, field.TYPE_MESSAGE, ".tensorflow.Int64List"),
    )
    one_of.oneof_decl.add(name="kind")
    for each in one_of.field:
        each.oneof_index = 0
    features = message(
        "Features", ("feature", 1, field.TYPE_MESSAGE, ".tensorflow.Features.FeatureEntry"), repeated=True
    )
    entry = message(
        "FeatureEntry",
        ("key", 1, field.TYPE_STRING, ""),
        ("value", 2, field.TYPE_MESSAGE, ".tensorflow.Feature"),
        parent=features,
    )
    entry.options.map_entry = True
    message("Example", ("features", 1, field.TYPE_MESSAGE, ".tensorflow.Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))


def _yolov5(sets: Sets, classes: Sequence[str], folder: Path, out: Path) -> None:
    """``images/train``, ``labels/train``, the same with ``val``, and ``dataset.yaml``; pictures are linked if the file
    system can, else copied. A line for each box: ``class cx cy w h``, fractions of the picture."""
    named = {"train": "train", "test": "val"}
    for name, pictures in sets.items():
        images, labels = folder / "images" / named[name], folder / "labels" / named[name]
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for number, each in enumerate(pictures):
            stem = each.picture.stem
            while (labels / f"{stem}.txt").exists():  # another picture may be called so, too
                stem = f"{stem}-{number}"
            link_or_copy(each.picture, images / f"{stem}{each.picture.suffix}")
            lines = []
            for b in each.boxes:
                values = (
                    (b.xmin + b.xmax) / 2 / each.width, (b.ymin + b.ymax) / 2 / each.height,
                    (b.xmax - b.xmin) / each.width, (b.ymax - b.ymin) / each.height,
                )  # fmt: skip
                lines.append(f"{classes.index(b.label)} " + " ".join(f"{value:.6f}" for value in values) + "\n")
            (labels / f"{stem}.txt").write_text("".join(lines), "utf-8")
    described = {
        "train": str(out.absolute() / "images" / "train"),
        "val": str(out.absolute() / "images" / ("val" if "test" in sets else "train")),
        "nc": len(classes),
        "names": list(classes),
    }
    (folder / "dataset.yaml").write_text(plain_yaml.dump(described), "utf-8")


def _coco(sets: Sets, classes: Sequence[str], folder: Path, out: Path) -> None:
    """``train.json``, ``test.json``: images, annotations with ``bbox`` (left, top, width, height), categories.
    Names of files are relative to the pictures' common folder."""
    for name, pictures in sets.items():
        paths = _paths([each.picture.absolute() for each in pictures])
        boxes = [(number, box) for number, each in enumerate(pictures, 1) for box in each.boxes]
        made = {
            "images": [
                {
                    "id": number,
                    "file_name": path,
                    "width": each.width,
                    "height": each.height,
                }
                for number, (each, path) in enumerate(zip(pictures, paths, strict=True), 1)
            ],
            "annotations": [
                {
                    "id": number,
                    "image_id": image,
                    "category_id": classes.index(b.label) + 1,
                    "bbox": [round(side, 2) for side in (b.xmin, b.ymin, b.xmax - b.xmin, b.ymax - b.ymin)],
                    "area": round((b.xmax - b.xmin) * (b.ymax - b.ymin), 2),
                    "iscrowd": 0,
                }
                for number, (image, b) in enumerate(boxes, 1)
            ],
            "categories": [{"id": number, "name": label} for number, label in enumerate(classes, 1)],
        }
        (folder / f"{name}.json").write_text(json.dumps(made), "utf-8")


FORMATS: dict[str, Callable[[Sets, Sequence[str], Path, Path], None]] = {
    "yolov3": _yolov3,
    "csv": _csv,
    "tfrecord": _tfrecord,
    "yolov5": _yolov5,
    "coco": _coco,
}
"""The formats by name."""
