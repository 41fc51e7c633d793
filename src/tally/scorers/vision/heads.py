"""What a vision model's outputs are: a table of heads, and the verdict on a model that does not say it.

Names, shapes and metadata leave the heads that fit (:func:`candidates`). Where these are several, the values of one
picture are asked (:func:`verdict`). Exactly one has to remain: what fits nothing, or two things, is refused.

What is known and cannot be used stands in the table too, so that its outputs are not taken for others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from tally.errors import SpecError
from tally.scorers.vision.detection.base import ANY_CLASSES, Decoder, Dims, Given, Output, outside, show
from tally.scorers.vision.detection.decoders import DECODERS
from tally.scorers.vision.preprocess import MADE_UP_SIZE, Array, Size

Task = Literal["classify", "detect", "restyle", "embed", "segment", "values"]
FRACTIONS = (1, 2, 4, 8)
"""A mask is as large as the model's input, or so many times smaller."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a model, and what the user says.

    size: of its input, in pixels. channels_last: of its input, and so of masks, where their shape does not tell.
    labels: how many names of classes there are. background: the first of them is the background's.
    task, decoder: as the user says. logits, independent: the user says that values are not probabilities yet;
        that they are to be kept as they are.
    keypoints, anchors, alone: see :class:`~tally.scorers.vision.detection.base.Given`.
    """

    outputs: tuple[Output, ...]
    size: Size | None
    channels_last: bool = False
    metadata: Mapping[str, str] | None = None
    labels: int | None = None
    background: bool = False
    task: Task | None = None
    decoder: str | None = None
    logits: bool = False
    independent: bool = False
    keypoints: tuple[int, int] | None = None
    anchors: tuple[tuple[float, ...], ...] | None = None
    alone: bool = False

    def given(self, classes: int | None) -> Given:
        """What decoders are told; the size of made-up pictures where the model takes any."""
        return Given(self.size or MADE_UP_SIZE, classes, self.keypoints, self.anchors, self.alone)


@dataclass(frozen=True, slots=True)
class Fit:
    """A head that fits. outputs: those that it takes, in its order. classes: None where the shapes do not tell.
    keypoints: of each box."""

    head: Head
    outputs: tuple[Output, ...]
    classes: int | None = None
    keypoints: tuple[int, int] | None = None

    def __str__(self) -> str:
        classes = ""
        if self.classes and self.head.task != "values":
            classes = f" ({self.classes} {'class' if self.classes == 1 else 'classes'})"
        return f"{self.head.name}{classes}" + (f" of {self.outputs[0].name}" if len(self.outputs) == 1 else "")


@dataclass(frozen=True, slots=True)
class Head:
    """One kind of output.

    task, decoder: None where nothing decodes it. find: where it may be in a model, and with how many classes.
    against: the outputs of one picture, and the model → what in the values speaks against it, or None.
    words: what the names of such outputs contain; a head whose words are found goes before others for these outputs.
    like: other tasks that it would be taken for, by whoever says one.
    named: names tell it beyond doubt, and it goes before all others.
    asked: it is a guess for nobody: the user has to say the task.
    """

    name: str
    task: Task | None
    find: Callable[[Facts], Iterator[Fit]]
    against: Callable[[Sequence[Array], Facts], str | None]
    decoder: str | None = None
    words: str | None = None
    like: tuple[Task, ...] = ()
    named: bool = False
    asked: bool = False

    @property
    def said(self) -> str:
        """How the user says that it is this."""
        if self.decoder is not None:
            return f"--task detect --set decoder={self.decoder}"
        return f"--task {self.task}"


# ----------------------------------------------------------------------------------------- what shapes say


def _vector(dims: Dims) -> tuple[bool, int | None]:
    """Whether an output is a row of numbers for each picture, and how many."""
    axes = [n for n in dims[1:] if n != 1]
    return len(dims) >= 1 and len(axes) <= 1, (axes or [1])[0]


def _classify(facts: Facts) -> Iterator[Fit]:
    for output in facts.outputs:
        fits, count = _vector(output.dims)
        if fits and output.kind != "other" and (count != 1 or facts.labels == 2):
            yield Fit(_HEADS["classify"], (output,), 2 if count == 1 else count)


def _values(facts: Facts) -> Iterator[Fit]:
    for output in facts.outputs:
        fits, count = _vector(output.dims)
        if fits and output.kind != "other" and count == 1 and facts.labels != 2:
            yield Fit(_HEADS["values"], (output,), 1)


def _embed(facts: Facts) -> Iterator[Fit]:
    for output in facts.outputs:
        fits, count = _vector(output.dims)
        if fits and output.kind == "float" and count != 1 and not facts.labels:
            yield Fit(_HEADS["embed"], (output,))


def _plane(dims: Dims, facts: Facts) -> tuple[Dims, int | None]:
    """Height and width of an output that is a map, and its channels; no height and width if it is none."""
    if len(dims) == 3:
        return dims[1:], 1
    if len(dims) != 4:
        return (), None
    first, last = _scaled(dims[1:3], facts.size), _scaled(dims[2:4], facts.size)
    channels_last = facts.channels_last if first == last else first
    return (dims[1:3], dims[3]) if channels_last else (dims[2:4], dims[1])


def _scaled(plane: Dims, size: Size | None) -> bool:
    """Whether a map is as large as the input, or a fraction of it. What varies may be; it is measured while scoring."""
    high, wide = plane
    if size is None or (high == wide == 1):
        return high is None and wide is None
    return any(
        high in (None, size[1] // n, -(-size[1] // n)) and wide in (None, size[0] // n, -(-size[0] // n))
        for n in FRACTIONS
    )


def _is_mask(plane: Dims, facts: Facts) -> bool:
    """Whether it is as large as the input or a fraction of it; any fraction where the user says that it is a mask."""
    if facts.task != "segment" or facts.size is None or None in plane or not all(plane):
        return _scaled(plane, facts.size)
    high, wide = plane
    assert high is not None
    assert wide is not None
    return high <= facts.size[1] and abs(high * facts.size[0] / (wide * facts.size[1]) - 1) < 0.1


def _segment(facts: Facts) -> Iterator[Fit]:
    for output in facts.outputs:
        plane, channels = _plane(output.dims, facts)
        if not plane or not _is_mask(plane, facts) or output.kind == "other":
            continue
        if facts.task is None and re.search(_FEATURES, output.name, re.IGNORECASE):
            continue
        if output.kind == "integer":
            if channels == 1:
                yield Fit(_HEADS["segment"], (output,))
        elif channels != 1 and len(output.dims) == 4:
            yield Fit(_HEADS["segment"], (output,), channels)


def _foreground(facts: Facts) -> Iterator[Fit]:
    for output in facts.outputs:
        plane, channels = _plane(output.dims, facts)
        if plane and channels == 1 and output.kind == "float" and _is_mask(plane, facts):
            yield Fit(_HEADS["foreground"], (output,), 2)


def _map(facts: Facts) -> Iterator[Fit]:
    for output in facts.outputs:
        if _plane(output.dims, facts)[0] and re.search(_MAP_WORDS, output.name, re.IGNORECASE):
            yield Fit(_HEADS["a map of depth, distance or the like"], (output,))


def _restyle(facts: Facts) -> Iterator[Fit]:
    for output in facts.outputs:
        dims = output.dims
        if len(dims) != 4 or output.kind == "other" or (facts.labels and facts.task is None):
            continue
        usual = (3,) if facts.task is None else (1, 3, None)
        for plane, channels in ((dims[2:4], dims[1]), (dims[1:3], dims[3])):
            if channels in usual and _is_picture(plane, facts.size):
                yield Fit(_HEADS["restyle"], (output,))
                break


def _is_picture(plane: Dims, size: Size | None) -> bool:
    """Whether it is as large as the input, a little larger (rounded up to the model's stride), or magnified."""
    if size is None or None in plane:
        return True
    high, wide = plane
    assert high is not None
    assert wide is not None
    extra = (wide - size[0], high - size[1])
    magnified = wide % size[0] == 0 and high % size[1] == 0
    return magnified or (min(extra) >= 0 and max(extra) < 32)


def _boxes(name: str, decoder: Decoder) -> Callable[[Facts], Iterator[Fit]]:
    def find(facts: Facts) -> Iterator[Fit]:
        if facts.size is None and not decoder.any_size:
            return
        for match in decoder.find(facts.outputs, facts.given(facts.labels)):
            classes = None if match.classes == ANY_CLASSES else match.classes
            yield Fit(_HEADS[name], match.outputs, classes, match.keypoints)

    return find


# ----------------------------------------------------------------------------------------- what values say


def _nothing(outputs: Sequence[Array], facts: Facts) -> None:
    return None


def _against_classify(outputs: Sequence[Array], facts: Facts) -> str | None:
    values = outputs[0].reshape(-1)
    if values.size > 16 and values.dtype.kind == "f" and values.min() < 0 and abs(float((values**2).sum()) - 1) < 1e-3:
        return "the values are a vector of length 1: an embedding"
    sevens, given = DECODERS["yolov7-end-to-end"], facts.given(None)
    if values.size == 7 and not sevens.against([values], given) and len(sevens.decode([values], given, 0.25).scores):
        return "the values are a picture's number, a box, its class and its score"
    return None


def _against_segment(outputs: Sequence[Array], facts: Facts) -> str | None:
    output = outputs[0]
    plane, _ = _plane((None, *output.shape), facts)
    if not _is_mask(plane, facts):
        return f"a map of {show(plane)} for a picture of {facts.size}"
    if output.dtype.kind in "iu":
        return None if output.min(initial=0) >= 0 else f"there is a class {output.min()}"
    low, high = float(output.min()), float(output.max())
    if 3 in (output.shape[0], output.shape[-1]) and high - low > 100:
        return f"values lie between {low:.4g} and {high:.4g}: a picture"
    if low >= -0.25 and high <= 1.25 and high > low and not facts.independent:
        sums = (output.sum(axis=axis) for axis in (0, -1))
        if all(np.abs(each - 1).max() > 0.05 for each in sums):
            return f"values lie between {low:.4g} and {high:.4g} and do not add up to 1 over the classes"
    return None


def _against_foreground(outputs: Sequence[Array], facts: Facts) -> str | None:
    if sum(n != 1 for n in outputs[0].shape) > 2 or outputs[0].dtype.kind in "iu":
        return _against_segment(outputs, facts)  # two classes, each with its own scores
    plane, _ = _plane((None, *outputs[0].shape), facts)
    if not _is_mask(plane, facts):
        return f"a map of {show(plane)} for a picture of {facts.size}"
    return None if facts.logits else outside(outputs[0], "values")


def _against_picture(outputs: Sequence[Array], facts: Facts) -> str | None:
    low, high = float(outputs[0].min()), float(outputs[0].max())
    if low >= 0 and any(np.abs(outputs[0].sum(axis=axis) - 1).max() < 0.01 for axis in (0, 2)):
        return "the three values of each pixel add up to 1: classes"
    if (low >= -1.1 and high <= 1.1) or high - low > 32:
        return None
    return f"values lie between {low:.4g} and {high:.4g}: a picture's are in 0..1, -1..1 or 0..255"


def _decoding(name: str, decoder: Decoder) -> Head:
    like = _TASKS if decoder.named or decoder.gives == "segment" else ("classify",) if decoder.single else ()
    return Head(
        name,
        "detect",
        _boxes(name, decoder),
        _nothing,
        decoder=name,
        words=decoder.words,
        like=like,
        named=decoder.named,
    )


_TASKS: tuple[Task, ...] = ("classify", "segment", "restyle")
_MAP_WORDS = r"depth|disp|distance|normal|flow|heat|density"
BY_YOURSELF = """Or read them yourself, with a scorer of your own (docs: write-a-scorer), --model mine.py:
    class Mine(tally.Scorer):
        def load(self, artifacts, device): self.session = onnxruntime.InferenceSession("model.onnx")
        def score(self, batch): return [{"label": ..., "score": ...} for picture in batch]"""
_FEATURES = r"feature|hidden|embed|backbone"
_AUXILIARY = r"(?i)aux|hidden|attention"

_HEADS: dict[str, Head] = {
    head.name: head
    for head in (
        Head("classify", "classify", _classify, _against_classify),
        Head("values", "values", _values, _nothing),
        Head("embed", "embed", _embed, _nothing, words=r"feature|embed|pool", asked=True),
        *(_decoding(name, each) for name, each in DECODERS.items()),
        Head("segment", "segment", _segment, _against_segment, words=r"logit|seg|mask|class|prob|^out$"),
        Head("foreground", "segment", _foreground, _against_foreground),
        Head("restyle", "restyle", _restyle, _against_picture, words=r"image|styl|picture|super|denois|restor"),
        Head("a map of depth, distance or the like", None, _map, _nothing, words=_MAP_WORDS),
    )
}  # fmt: skip
"""The heads, by their names."""


# -------------------------------------------------------------------------------------------- the verdict


def candidates(facts: Facts) -> list[Fit]:
    """The heads that fit names, shapes and metadata, whatever the number of labels."""
    if facts.task in ("embed", "values") and [each.kind != "other" for each in facts.outputs] == [
        True
    ]:  # whatever it is
        alone = facts.task == "values" and _vector(facts.outputs[0].dims) == (True, 1)
        return [Fit(_HEADS[facts.task], facts.outputs, 1 if alone else None)]
    found = [fit for head in _HEADS.values() for fit in head.find(facts)]
    if facts.task not in ("embed", "values"):
        found = [fit for fit in found if fit.head.named] or found
    if facts.task is not None:
        found = [fit for fit in found if fit.head.task == facts.task or facts.task in fit.head.like]
        if facts.task == "embed":
            found = [fit for fit in found if _named_so(fit)] or found
    else:
        found = [fit for fit in found if not fit.head.asked or _named_so(fit)]
    if facts.decoder is not None:
        found = [fit for fit in found if fit.head.decoder == facts.decoder]
    else:
        found = _as_metadata_say(found, facts)
    if any(len(fit.outputs) == len(facts.outputs) > 1 for fit in found):  # what explains all of them goes first
        found = [fit for fit in found if len(fit.outputs) == len(facts.outputs)]
    named = [fit.outputs for fit in found if _named_so(fit)]
    found = [fit for fit in found if fit.outputs not in named or _named_so(fit)]
    return _first_of_alike(found)


_GIVES = ("detect", "classify", "segment", "pose", "obb")
"""The tasks that metadata may say, as Ultralytics calls them."""


def _as_metadata_say(found: list[Fit], facts: Facts) -> list[Fit]:
    """Those that do what the file says of itself; all where it says nothing of the kind. Boxes of what it says
    to give more than boxes would be half of the truth."""
    said = (facts.metadata or {}).get("task")
    if said not in _GIVES:
        return found
    fitting = [
        fit for fit in found if said == (DECODERS[fit.head.decoder].gives if fit.head.decoder else fit.head.task)
    ]
    return fitting or [fit for fit in found if fit.head.task != "detect" or said in ("detect", "classify")]


def _of_labels(found: Sequence[Fit], facts: Facts) -> list[Fit]:
    """Those that have as many classes as there are labels, or all if none has; and what cannot be decoded."""
    fitting = [fit for fit in found if not _is_meant(fit, facts) or _has_labels(fit, facts)]
    return fitting if any(_is_meant(fit, facts) for fit in fitting) else [*found]


def _is_meant(fit: Fit, facts: Facts) -> bool:
    """Whether it can be decoded, and is what the user says."""
    return fit.head.task is not None and facts.task in (None, fit.head.task)


def _has_labels(fit: Fit, facts: Facts) -> bool:
    if not facts.labels:
        return True
    labels = facts.labels
    background = fit.head.decoder is not None and DECODERS[fit.head.decoder].background and facts.background
    return fit.classes in (None, labels) or (background and fit.classes == labels - 1)


def _named_so(fit: Fit) -> bool:
    words = fit.head.words
    return words is not None and all(re.search(words, each.name, re.IGNORECASE) for each in fit.outputs)


def _first_of_alike(found: list[Fit]) -> list[Fit]:
    """Without those of auxiliary outputs, and the first of several maps of one size: networks that refine a map give
    each stage of it."""
    main = [fit for fit in found if not all(re.search(_AUXILIARY, each.name) for each in fit.outputs)]
    kept: list[Fit] = []
    for fit in main or found:
        alike = fit.head.task in ("segment", "restyle") and any(
            other.head is fit.head and other.outputs[0].dims == fit.outputs[0].dims for other in kept
        )
        if not alike:
            kept.append(fit)
    return kept


def verdict(facts: Facts, probe: Callable[[], Mapping[str, Array] | None]) -> tuple[Fit, bool]:
    """The one head that fits, and whether values were asked.

    probe: gives each output's values for one picture, batch axis included; None if the model does not run.
    Raises SpecError where nothing fits, or several heads do.
    """
    found, values = candidates(facts), None
    kept = _of_labels(found, facts)
    if len(kept) != 1 or _rivals(kept[0], found) or any(not output.dims for output in facts.outputs):
        values = probe()
        if values is not None:
            facts = replace(facts, outputs=tuple(_measured(each, values) for each in facts.outputs))
            found = candidates(facts)
    refuted: list[str] = []
    if values is not None and len(found) > 1:
        for asked in (objection, _unlikely):
            against = [asked(fit, [values[output.name] for output in fit.outputs], facts) for fit in found]
            remaining = [fit for fit, why in zip(found, against, strict=True) if not why]
            if len(found) > 1 and (remaining or asked is objection):
                refuted += [f"not {fit.head.name}: {why}" for fit, why in zip(found, against, strict=True) if why]
                found = remaining
    kept = _of_labels(found, facts)
    if len(kept) == 1 and _is_meant(kept[0], facts):
        if (rivals := _rivals(kept[0], found)) and not _gives_boxes(kept[0], values, facts):
            raise _of_labels_alone(kept[0], rivals, facts)
        return kept[0], values is not None
    unknown = [fit for fit in kept if not _is_meant(fit, facts)]
    if unknown and (len(unknown) == len(kept) or (values is not None and not any(fit.head.decoder for fit in kept))):
        raise _undecodable(unknown, facts)
    raise _several(kept, facts) if kept else _nothing_fits(facts, refuted)


def _rivals(fit: Fit, found: Sequence[Fit]) -> list[Fit]:
    """Other readings of the same boxes."""
    boxes = fit.head.decoder is not None
    return [each for each in found if boxes and each != fit and each.head.task in ("detect", None)]


def _gives_boxes(fit: Fit, values: Mapping[str, Array] | None, facts: Facts) -> bool:
    if values is None or fit.head.decoder is None or facts.size is None:
        return False
    decoder = DECODERS[fit.head.decoder]
    outputs = _of_one(fit, [values[output.name] for output in fit.outputs], facts)
    return len(decoder.decode(outputs, facts.given(fit.classes), decoder.threshold).scores) > 0


def _looked(facts: Facts) -> str:
    return " and ".join(map(str, facts.outputs))


def _how(fit: Fit, facts: Facts, *, exactly: bool = True) -> str:
    """How the user says that it is this; or only its task, where values are still to be asked."""
    said = fit.head.said if exactly else f"--task {fit.head.task}"
    if len(fit.outputs) < len(facts.outputs):
        said += f" --set outputs={fit.outputs[0].name}"
    return said if not exactly or _has_labels(fit, facts) else f"{said} (with {fit.classes} labels)"


def _of_labels_alone(fit: Fit, rivals: Sequence[Fit], facts: Facts) -> SpecError:
    others = ", ".join(map(str, rivals))
    return SpecError(
        f"task: with {facts.labels} labels, the outputs {_looked(facts)} fit {fit}, which finds no box in a made-up "
        f"picture; with other labels they fit {others}",
        hint=f"Say which: {', or '.join(_how(each, facts) for each in (fit, *rivals) if each.head.task is not None)}",
    )


def _undecodable(found: Sequence[Fit], facts: Facts) -> SpecError:
    first = found[0].head
    if first.task is None:
        cannot, say = ", which Tally cannot use", ""
    else:
        cannot, say = f": boxes, not what {facts.task} gives", f"Say {first.said}, or "
    return SpecError(
        f"task: the outputs {_looked(facts)} look like those of {first.name}{cannot}",
        hint=f"{say or 'Say '}{_as_they_are(facts)}.\n  {BY_YOURSELF}",
    )


def _as_they_are(facts: Facts) -> str:
    """How the user says that an output is to be kept, whatever it is."""
    name = next((each.name for each in facts.outputs if each.kind != "other"), facts.outputs[0].name)
    output = f" --set outputs={name}" if len(facts.outputs) > 1 else ""
    return f"--task values{output} for the numbers as they are"


def _nothing_fits(facts: Facts, refuted: Sequence[str]) -> SpecError:
    problems = []
    if facts.size is None and facts.task in (None, "detect"):
        problems.append("preprocess.size: the model takes several sizes; say which, for instance 640x640")
    wanted = facts.decoder or facts.task
    if wanted is None:
        labels = f", with {facts.labels} labels" if facts.labels else ""
        why = f" ({'; '.join(refuted)})" if refuted else ""
        problems.append(f"task: nothing that Tally knows fits the outputs {_looked(facts)}{labels}{why}")
    else:
        refused = "".join(f"; {each}" for each in refuted)
        problems.append(f"task: outputs of {_looked(facts)} are not those of {wanted}{refused}")
    said = []
    if wanted is not None:
        others = candidates(replace(facts, task=None, decoder=None))
        doubtful = {task for fit in others for task in fit.head.like}
        said = [_how(fit, facts, exactly=False) for fit in others if fit.head.task not in (None, "values", *doubtful)]
    hint = f"Say {', or '.join([*dict.fromkeys(said), _as_they_are(facts)])}.\n  {BY_YOURSELF}"
    if wanted in (None, "detect"):
        besides = "" if wanted else ", ".join(["", *(head.name for head in _HEADS.values() if head.decoder is None)])
        hint = f"Looked for boxes of {', '.join(DECODERS)}{besides}.\n  {hint}"
    if wanted == "classify" and facts.labels != 2 and any(_vector(each.dims) == (True, 1) for each in facts.outputs):
        hint = f"For one number that tells two classes apart, give 2 labels. {hint}"
    return SpecError(problems, hint=hint)


def _several(found: Sequence[Fit], facts: Facts) -> SpecError:
    unknown = [str(fit) for fit in found if fit.head.task is None]
    said = dict.fromkeys(_how(fit, facts) for fit in found if fit.head.task is not None)
    matching = any(fit.head.task is not None and _has_labels(fit, facts) for fit in found)
    labels = "" if matching else f"; none has {facts.labels} classes, as there are labels"
    return SpecError(
        f"task: the outputs {_looked(facts)} fit several heads: {', '.join(map(str, found))}{labels}",
        hint=f"Say which: {', or '.join(said)}"
        + (
            "; or give the labels"
            if not facts.labels and len({fit.classes for fit in found if fit.head.task}) > 1
            else ""
        )
        + (f". If it is {' or '.join(unknown)}, none of these is right" if unknown else "")
        + f".\n  {BY_YOURSELF}",
    )


def _measured(output: Output, values: Mapping[str, Array]) -> Output:
    """The output with the axes that the values have where its own are not known. The first stays: it is the batch."""
    found = values.get(output.name)
    if found is None or (output.dims and None not in output.dims[1:]):
        return output
    first = output.dims[:1] or (found.shape[:1] and (None,))
    return replace(output, dims=(*first, *found.shape[1:]))


def objection(fit: Fit, values: Sequence[Array], facts: Facts) -> str | None:
    """What the values of one picture, batch axis included, say against the head; None: nothing does."""
    if not _is_single(fit):
        for each in values:
            if fit.head.task is not None and (each.ndim == 0 or len(each) != 1):
                return f"an output of shape {list(each.shape)} for one picture"
    if any(not each.size for each in values):
        return None  # no boxes at all
    outputs = _of_one(fit, values, facts)
    if fit.head.decoder is not None:
        return DECODERS[fit.head.decoder].against(outputs, facts.given(fit.classes))
    return fit.head.against(outputs, facts)


def _unlikely(fit: Fit, values: Sequence[Array], facts: Facts) -> str | None:
    """What the values of one picture have that the head hardly gives."""
    asked = DECODERS[fit.head.decoder].unlikely if fit.head.decoder is not None else None
    return asked(_of_one(fit, values, facts), facts.given(fit.classes)) if asked is not None else None


def _is_single(fit: Fit) -> bool:
    return fit.head.decoder is not None and DECODERS[fit.head.decoder].single


def _of_one(fit: Fit, values: Sequence[Array], facts: Facts) -> list[Array]:
    """Outputs of one picture without the axis for pictures."""
    return [each if _is_single(fit) or fit.head.task is None else each[0] for each in values]


def evident(fit: Fit, values: Sequence[Array], facts: Facts) -> bool:
    """Whether the values of one picture, batch axis included, could have spoken against the head."""
    if fit.head.decoder is None or (asked := DECODERS[fit.head.decoder].evident) is None:
        return True
    return asked(_of_one(fit, values, facts), facts.given(fit.classes))


def fit_of(task: Task, decoder: str, facts: Facts, classes: int | None) -> Fit:
    """The fit that a verdict was, told by the options that it led to. One class of two in a mask: the foreground."""
    name = decoder if task == "detect" else "foreground" if task == "segment" and classes == 2 else task
    return Fit(_HEADS[name], facts.outputs, classes)
