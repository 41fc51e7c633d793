"""Scores pictures, texts and sounds with models of transformers, on PyTorch.

Pictures go through the model's own processor, by Pillow: with torchvision, where that happens to be installed, answers
would be others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tally.errors import ItemError, ModelLoadError, TallyError, error_line
from tally.models import kinds
from tally.optional import needed
from tally.scorers.base import Item, Result, Results, Scorer
from tally.scorers.tabular import tables
from tally.scorers.torch.network import library, quietly
from tally.scorers.torch.runtime import device_of
from tally.scorers.transformers.options import TransformersOptions
from tally.scorers.vision.outputs import classify_rows

if TYPE_CHECKING:
    import pyarrow as pa

Array = np.ndarray[Any, Any]

_CLASSES = {
    ("image", "classify"): "AutoModelForImageClassification",
    ("image", "values"): "AutoModelForImageClassification",
    ("image", "detect"): "AutoModelForObjectDetection",
    ("image", "segment"): "AutoModelForSemanticSegmentation",
    ("text", "classify"): "AutoModelForSequenceClassification",
    ("text", "values"): "AutoModelForSequenceClassification",
    ("audio", "classify"): "AutoModelForAudioClassification",
    ("audio", "values"): "AutoModelForAudioClassification",
}
"""Other models are opened by ``AutoModel``."""
_BOXES = ("xmin", "ymin", "xmax", "ymax")
_MOST = 1_000_000
"""Tokens: a tokenizer that says a larger number knows no limit."""


def create(options: Mapping[str, Any]) -> Scorer:
    """The scorer of options as :func:`tally.scorers.transformers.options.inspect` returns them."""
    found = TransformersOptions.complete(options)
    return {"image": PictureScorer, "text": TextScorer, "audio": SoundScorer}[found.media](found)


class _TransformersScorer(Scorer):
    """What scorers of all media share. ``processor`` names what prepares items, in transformers."""

    processor: str
    settings: Mapping[str, Any] = {}

    def __init__(self, options: TransformersOptions) -> None:
        self.options = options
        self.batch_size = options.batch_size
        self.output = "image" if options.task == "segment" and options.output == "image" else "rows"
        self.columns = None if self.output == "image" else _columns(options)
        if options.task == "classify":
            self.classes = options.names

    def load(self, artifacts: Path, device: str) -> None:
        """Open the model, and what prepares its items. Raises ModelLoadError, also where weights are missing."""
        self._torch = torch = library()
        transformers = _transformers()
        torch.set_num_threads(self.options.threads)
        self._device = device_of(device)
        automatic = "AutoModel" if self.options.zero_shot else _CLASSES.get(
            (self.options.media, str(self.options.task)), "AutoModel"
        )  # fmt: skip
        try:
            with _silent(transformers):
                model, info = getattr(transformers, automatic).from_pretrained(
                    artifacts, local_files_only=True, trust_remote_code=False, output_loading_info=True,
                    ignore_mismatched_sizes=True,
                )  # fmt: skip
                self._prepare = self._opened(transformers, artifacts)
        except TallyError:
            raise
        except Exception as error:
            raise ModelLoadError(
                f"{artifacts}: transformers {transformers.__version__} cannot open it: {error_line(error)[:500]}"
            ) from None
        missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
        wrong = [*missing, *(str(each[0]) for each in info["mismatched_keys"])]
        if wrong:
            raise ModelLoadError(
                f"{artifacts}: {len(wrong)} weights of {type(model).__name__} are missing or of another shape, and "
                f"would be made up: {', '.join(wrong[:3])}",
                hint="The folder was saved from another class, or before its last layer was trained.",
            )
        self._has_pooler = not any(name.startswith("pooler.") for name in info["missing_keys"])
        self._model = model.to(self._device).eval()

    def _opened(self, transformers: Any, folder: Path) -> Any:
        found = getattr(transformers, self.processor)
        return found.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **self.settings)

    def _run(self, inputs: Mapping[str, Any]) -> Any:
        """What the model gives for tensors or arrays by name."""
        torch, gpu = self._torch, self._device != "cpu"
        with torch.inference_mode(), torch.autocast(
            "cuda" if gpu else "cpu",
            dtype=getattr(torch, self.options.autocast or "bfloat16"),
            enabled=self.options.autocast is not None,
        ):  # fmt: skip
            given = {name: torch.as_tensor(value) for name, value in inputs.items()}
            if gpu:
                given = {name: each.pin_memory().to(self._device, non_blocking=True) for name, each in given.items()}
            own = self._model.dtype
            given = {name: each.to(own) if each.is_floating_point() else each for name, each in given.items()}
            return self._model(**given)

    def _answers(self, found: Any, mask: Any = None) -> Iterator[Result]:
        """One result for each item, of models whose answer is a row of numbers for each."""
        options = self.options
        values = _array(self._vectors(found, mask) if options.task == "embed" else self._scores(found))
        for each in values:
            if not np.isfinite(each).all():
                yield ItemError("the model's output holds NaN or infinity")
            elif options.task == "embed":
                vector = each / max(float(np.linalg.norm(each)), 1e-12) if options.normalize else each
                yield {"embedding": vector.astype(np.float32).tolist()}
            elif options.task == "values":
                yield {"value": float(each[0])} if each.size == 1 else {"values": each.astype(np.float32).tolist()}
            else:
                yield self._classified(each)

    def _classified(self, values: Array) -> Result:
        options = self.options
        if options.activation == "sigmoid":
            values = 1 / (1 + np.exp(-values.astype(np.float64)))
        if self.all_classes:
            if options.activation == "softmax":
                powers = np.exp(values - values.max())
                values = powers / powers.sum()
            return {"scores": values.tolist()}
        return classify_rows(values, self._name, top=options.top, softmax=options.activation == "softmax")

    def _scores(self, found: Any) -> Any:
        return found.logits_per_image if self.options.zero_shot else found.logits

    def _vectors(self, found: Any, mask: Any) -> Any:
        """mask: 1 where there is a token, ``[items, tokens]``."""
        if self.options.zero_shot:
            return found
        pooling = self.options.pooling
        if pooling == "pooler" or (pooling == "auto" and self._has_pooler):
            pooled = getattr(found, "pooler_output", None)
            if pooled is not None and self._has_pooler:
                return pooled.flatten(1)
            if pooling == "pooler":
                raise ItemError("the model pools nothing itself: say --set pooling=mean or cls")
        hidden = found.last_hidden_state
        if hidden.dim() == 4:
            return hidden.mean(dim=(2, 3))  # a map of features
        if pooling == "mean":
            weight = self._torch.ones(hidden.shape[:2]) if mask is None else self._torch.as_tensor(mask)
            weight = weight.to(hidden.device)[..., None].to(hidden.dtype)
            return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
        return hidden[:, 0]

    def _name(self, index: int) -> str:
        names = self.options.names or ()
        return names[index] if index < len(names) else str(index)

    def describe(self) -> str:
        where = f"CPU ({self.options.threads} thread{'s' if self.options.threads > 1 else ''})"
        where = where if self._device == "cpu" else "CUDA" + self._device.removeprefix("cuda")
        media = {"image": "pictures", "text": "texts", "audio": "sounds"}[self.options.media]
        what = f"{self.options.task} of {media}"
        return f"{self.options.architecture} on {where}, {what}, batch {self.batch_size}"

    def close(self) -> None:
        self.__dict__.pop("_model", None)


class PictureScorer(_TransformersScorer):
    """Scores pictures: ``label, index, score`` (and ``rank``), boxes, ``label, index, pixels, share``, or vectors."""

    input = "image"
    processor = "AutoImageProcessor"
    settings: Mapping[str, Any] = {"backend": "pil"}

    def load(self, artifacts: Path, device: str) -> None:
        super().load(artifacts, device)
        self._texts: Mapping[str, Any] = {}
        if self.options.zero_shot and self.options.task == "classify":
            transformers = _transformers()
            try:
                with _silent(transformers):
                    tokenizer = transformers.AutoTokenizer.from_pretrained(artifacts, local_files_only=True)
            except Exception as error:
                raise ModelLoadError(f"{artifacts}: its tokenizer cannot be opened: {error_line(error)}") from None
            texts = [self.options.template.replace("{}", name) for name in self.options.names or ()]
            padding = "max_length" if self.options.activation == "sigmoid" else True
            self._texts = tokenizer(texts, padding=padding, truncation=True, return_tensors="pt")

    def prepare(self, item: Item) -> tuple[str, tuple[int, int], Mapping[str, Array]]:
        """Key, height and width of the original, and the model's inputs."""
        from PIL import Image

        picture = Image.fromarray(item.value)
        size = (int(item.info.get("height", picture.height)), int(item.info.get("width", picture.width)))
        made = self._prepare(images=[picture], return_tensors="np")
        return item.key, size, {name: np.asarray(value)[0] for name, value in made.items()}

    def score(self, batch: Sequence[Any]) -> Sequence[Result]:
        """Pictures whose inputs have one shape run together."""
        alike: dict[Any, list[int]] = {}
        for at, (_, _, inputs) in enumerate(batch):
            alike.setdefault(tuple((name, value.shape) for name, value in inputs.items()), []).append(at)
        results: dict[int, Result] = {}
        for places in alike.values():
            given = {name: np.stack([batch[at][2][name] for at in places]) for name in batch[places[0]][2]}
            sizes = [batch[at][1] for at in places]
            for at, result in zip(places, self._scored(given, sizes), strict=True):
                results[at] = _of(batch[at][0], result)
        return [results[at] for at in range(len(batch))]

    def _scored(self, given: Mapping[str, Any], sizes: Sequence[tuple[int, int]]) -> list[Result]:
        options = self.options
        if options.zero_shot and options.task == "embed":
            with self._torch.inference_mode():
                tensors = {name: self._torch.as_tensor(each).to(self._device) for name, each in given.items()}
                found = self._model.get_image_features(**tensors)
                return list(self._answers(getattr(found, "pooler_output", found)))
        found = self._run({**given, **self._texts})
        if options.task == "detect":
            boxes = self._prepare.post_process_object_detection(
                found, threshold=options.score_threshold, target_sizes=list(sizes)
            )
            return [self._boxes(each) for each in boxes]
        if options.task == "segment":
            maps = self._prepare.post_process_semantic_segmentation(found, target_sizes=list(sizes))
            return [self._segmented(_array(each)) for each in maps]
        return list(self._answers(found))

    def _boxes(self, found: Mapping[str, Any]) -> Result:
        boxes, scores, labels = (_array(found[name]) for name in ("boxes", "scores", "labels"))
        if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
            return ItemError("the model's boxes hold NaN or infinity")
        order = np.argsort(-scores, kind="stable").tolist()
        return [
            {
                **dict(zip(_BOXES, map(float, boxes[at]), strict=True)),
                "label": self._name(int(labels[at])),
                "score": float(scores[at]),
            }
            for at in order
        ]

    def _segmented(self, classes: Array) -> Result:
        if self.output == "image":
            return classes.astype(np.uint8)
        found, counts = np.unique(classes, return_counts=True)
        return [
            {"label": self._name(int(at)), "index": int(at), "pixels": int(n), "share": float(n / classes.size)}
            for at, n in zip(found, counts, strict=True)
        ]


class TextScorer(_TransformersScorer):
    """Scores texts, a column of a table, or pairs of them, two columns."""

    input = "table"
    processor = "AutoTokenizer"

    def __init__(self, options: TransformersOptions) -> None:
        super().__init__(options)
        self.features = options.features

    def load(self, artifacts: Path, device: str) -> None:
        super().load(artifacts, device)
        limit = int(self._prepare.model_max_length)
        positions = getattr(self._model.config, "max_position_embeddings", None)
        self._limit = limit if limit < _MOST else positions

    def score(self, table: pa.Table) -> Results:
        """Texts of about one length run together."""

        table = tables.features_of(table, self.features)
        columns = [column.to_pylist() for column in table.columns]
        errors: dict[int, Exception] = {}
        for name, values in zip(table.column_names, columns, strict=True):
            for at, value in enumerate(values):
                if not isinstance(value, str):
                    shown = "null" if value is None else repr(value)
                    errors.setdefault(at, ItemError(f"{name} is {shown}, and no text"))
        good = [at for at in range(table.num_rows) if at not in errors]
        results: dict[int, Result] = {}
        if good:
            texts = [[values[at] for at in good] for values in columns]
            tokens = self._prepare(*texts, truncation=self.options.truncate, max_length=self._limit)
            lengths = [len(ids) for ids in tokens["input_ids"]]
            for place, length in enumerate(lengths):
                if self._limit is not None and length > self._limit:
                    errors[good[place]] = ItemError(
                        f"{table.column_names[0]} has {length} tokens, and the model takes {self._limit} "
                        "(--set truncate=true scores the beginning)"
                    )
            order = sorted((n for n in range(len(good)) if good[n] not in errors), key=lambda n: lengths[n])
            for start in range(0, len(order), self.batch_size):
                some = order[start : start + self.batch_size]
                padded = self._prepare.pad(
                    {name: [tokens[name][n] for n in some] for name in tokens}, return_tensors="pt"
                )
                found = self._answers(self._run(padded), padded.get("attention_mask"))
                results |= {good[n]: result for n, result in zip(some, found, strict=True)}
        return [errors.get(at) or results[at] for at in range(table.num_rows)]


class SoundScorer(_TransformersScorer):
    """Scores sound files: any form and rate that FFmpeg decodes."""

    input = "bytes"
    processor = "AutoFeatureExtractor"

    def prepare(self, item: Item) -> tuple[str, Array]:
        from tally.media.sound import decode

        return item.key, decode(item.value, int(self._prepare.sampling_rate))

    def score(self, batch: Sequence[tuple[str, Array]]) -> Sequence[Result]:
        """One by one: what pads a sound changes its scores."""
        return [self._heard(key, wave) for key, wave in batch]

    def _heard(self, key: str, wave: Array) -> Result:
        made = self._prepare(wave, sampling_rate=int(self._prepare.sampling_rate), return_tensors="pt")
        [result] = self._answers(self._run(made))
        return _of(key, result)


def _of(key: str, result: Result) -> Result:
    """An error with the item's key before it."""
    return ItemError(f"{key}: {result.message}") if isinstance(result, ItemError) else result


def _transformers() -> Any:
    with needed("models of transformers need", kinds.extra_of("transformers"), ModelLoadError):
        import transformers
    return transformers


@contextmanager
def _silent(transformers: Any) -> Iterator[None]:
    """Without remarks and progress on the terminal."""
    logging = transformers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with quietly():
            yield
    finally:
        logging.set_verbosity(before)


def _array(tensor: Any) -> Array:
    values: Array = (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()
    return values


def _columns(options: TransformersOptions) -> dict[str, str] | None:
    match options.task:
        case "detect":
            return {**dict.fromkeys(_BOXES, "float32"), "label": "string", "score": "float32"}
        case "segment":
            return {"label": "string", "index": "int64", "pixels": "int64", "share": "float32"}
        case "embed":
            return {"embedding": "list<float32>"}
        case "values":
            return {"value": "float32"} if options.count == 1 else {"values": "list<float32>"}
    rank = {"rank": "int64"} if options.top > 1 else {}
    return {"label": "string", "index": "int64", "score": "float32", **rank}
