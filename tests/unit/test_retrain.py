"""Retraining, part by part: which picture is for what, how the head is trained, what distortions do."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.retraining import COLOURS, backbone, photos

import tally
from tally.engines.base import Engine
from tally.errors import ModelError, SpecError, WorkerCrashedError
from tally.models.load import load
from tally.scorers.base import Item
from tally.scorers.vision.preprocess import Preprocess
from tally.training.retrain import bottlenecks, finetuning
from tally.training.retrain.bottlenecks import Backbone, features
from tally.training.retrain.dataset import PARTS, Dataset, Picture, normalised, part_of, read
from tally.training.retrain.distortions import Distorted, Distortions
from tally.training.retrain.examples import Examples, Parameters
from tally.training.retrain.head import Head, State, evaluate, train
from tally.training.retrain.result import write
from tally.training.retrain.sampling import BLOCK, Sampler
from tally.training.retrain.summaries import test_pictures as pictures_of_test
from tally.training.runs.tracking import logged_pictures


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def many(root: Path, *labels: str, count: int = 40) -> Path:
    return touch(root, *(f"{label}/{number}.jpg" for label in labels for number in range(count)))


# -- the pictures ------------------------------------------------------------------------------------


def test_labels_are_normalised_as_the_original_does(tmp_path: Path) -> None:
    assert [normalised(each) for each in ("Cat-1", "  My  DOG!", "Å_ö9")] == ["cat 1", "my dog", "9"]
    found = read(many(tmp_path, "Red-Fox", "Dog"))
    assert found.labels == ("dog", "red fox")
    assert [each.key for each in found.pictures[:2]] == ["Dog/0.jpg", "Dog/1.jpg"]
    assert read(tmp_path, keep_names=True).labels == ("Dog", "Red-Fox")


def test_every_clash_of_labels_is_told_together(tmp_path: Path) -> None:
    many(tmp_path, "Cat-1", "cat 1", "猫", "dog", count=2)
    with pytest.raises(SpecError) as raised:
        read(tmp_path)
    assert raised.value.problems == [
        "--image_dir: the folders 'Cat-1', 'cat 1' have one label, 'cat 1'",
        "--image_dir: nothing of a-z and 0-9 is in the name of '猫' to make a label of",
    ]
    assert "--keep-names" in str(raised.value)


def test_a_split_does_not_change_when_the_folder_moves_or_grows(tmp_path: Path) -> None:
    here, there = many(tmp_path / "here", "cat", "dog"), tmp_path / "elsewhere" / "there"
    before = {each.key: each.part for each in read(here).pictures}
    assert set(before.values()) == set(PARTS)
    shutil.copytree(here, there)
    touch(there, "cat/new.jpg", "bird/0.jpg", "bird/1.jpg", "bird/2.jpg")
    after = {each.key: each.part for each in read(there).pictures}
    assert {key: after[key] for key in before} == before


def test_parts_are_as_large_as_asked_and_groups_stay_together() -> None:
    drawn = Counter(part_of("cat", f"{number}.jpg", 20, 10) for number in range(5000))
    assert drawn["testing"] == pytest.approx(1000, rel=0.1)
    assert drawn["validation"] == pytest.approx(500, rel=0.15)
    for number in range(50):
        together = {part_of("cat", f"{number}_nohash_{shot}.jpg", 30, 30) for shot in range(20)}
        assert len(together) == 1
    # sha1sum of "cat/0.jpg" ends in 0x25d5673: of 27 bits, 29.6 percent.
    assert [part_of("cat", "0.jpg", 0, n) for n in (29, 30)] == ["training", "validation"]


def test_folders_of_parts_are_parts(tmp_path: Path) -> None:
    many(tmp_path / "train", "cat", "dog")
    many(tmp_path / "test", "cat", "dog", count=5)
    found = read(tmp_path)
    assert {each.key.split("/")[0] for each in found.of("testing")} == {"test"}
    assert len(found.of("testing")) == 10
    assert 0 < len(found.of("validation")) < 20
    assert found.remarks == (f"test, train in {tmp_path} are taken for the parts of the data",)
    many(tmp_path / "val", "dog", "cat", count=3)
    assert len(read(tmp_path).of("validation")) == 6
    many(tmp_path / "train2", "cat")  # then they are no parts, and hold no pictures
    with pytest.raises(SpecError, match=r"no folder in .* holds pictures directly"):
        read(tmp_path)


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    many(tmp_path, "cat", "dog", count=40)
    touch(tmp_path, "stray.jpg", "cat/notes.txt", "cat/old/1.png", "empty/.keep", "few/1.jpg", "few/2.jpg", "few/3.jpg")
    remarks = "\n".join(read(tmp_path).remarks)
    assert "1 picture is left out, without a label" in remarks
    assert "folders in" in remarks
    assert "are no labels: empty" in remarks
    assert "left out: cat/old" in remarks
    assert "1 file is left out" in remarks
    assert "fewer than 20 pictures, which is little to learn from: 'few' 3" in remarks


@pytest.mark.parametrize(
    ("labels", "count", "percentages", "told"),
    [
        ((), 0, (10, 10), "no folder in .* holds pictures directly"),
        (("cat",), 9, (10, 10), "has pictures of 'cat' alone"),
        (("cat", "dog"), 1, (10, 10), "none of the 2 pictures is for validation"),
        (("cat", "dog"), 2, (98, 1), "no picture of .* is left to train with"),
        (("cat", "dog"), 9, (60, 40), "leave nothing to train with"),
        (("cat", "dog"), 9, (-1, 100), "--validation_percentage: 0 to 99, not 100"),
    ],
)
def test_what_cannot_be_trained_with_is_refused(
    tmp_path: Path, labels: Sequence[str], count: int, percentages: tuple[int, int], told: str
) -> None:
    many(tmp_path, *labels, count=count)
    with pytest.raises(SpecError, match=told):
        read(tmp_path, testing_percentage=percentages[0], validation_percentage=percentages[1])


# -- the head ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def examples() -> Examples:
    """300 points around three centres in eight dimensions; class 2 has a tenth as many."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [150, 135, 15])
    features = (rng.normal(0, 1, (3, 8))[labels] * 2 + rng.normal(0, 1, (300, 8))).astype(np.float32)
    at = rng.permutation(300)
    return Examples(features, labels, {"training": at[:200], "validation": at[200:250], "testing": at[250:]}, 3)


def test_every_wrong_parameter_is_reported_together() -> None:
    with pytest.raises(SpecError) as raised:
        Parameters(how_many_training_steps=0, learning_rate=0, train_batch_size=0, validation_batch_size=-2, seed=-1)
    flags = [each.split(":")[0] for each in raised.value.problems]
    assert flags == [
        "--how_many_training_steps", "--train_batch_size", "--validation_batch_size", "--learning_rate", "--seed"
    ]  # fmt: skip
    with pytest.raises(SpecError, match=r"--random_crop.*\n.*--random_brightness"):
        Distortions(random_crop=-1, random_brightness=101)


@pytest.mark.parametrize("name", ["猫" * 83, "x" * 250, "\udcff"], ids=["of any script", "long", "of no script"])
def test_a_picture_that_is_mistaken_is_logged_whatever_its_name(tmp_path: Path, name: str) -> None:
    folder = photos(tmp_path / "photos", {"red": 1, "blue": 1})
    pictures = [
        Picture(
            (folder / label / "000.png").rename(folder / label / f"{name}.png"), f"{label}/{name}.png", at, "testing"
        )
        for at, label in enumerate(("blue", "red"))
    ]
    features = np.array([[0, 1], [0, 1]], np.float32)
    both = np.arange(2)
    examples = Examples(features, both, {"training": both[:0], "validation": both[:0], "testing": both}, 2)
    tested = evaluate(examples, Head(np.eye(2, dtype=np.float32), np.zeros(2, np.float32)), Parameters())
    assert tested is not None
    found = pictures_of_test(Dataset(folder, ("blue", "red"), tuple(pictures)), tested, examples.labels)
    with tally.training.run() as run:
        for each, pixels in found.items():
            run.log_image(each, pixels)
    assert [each[:19] for each in found] == ["confusion_matrix", "misclassified/blue/"]
    assert sorted(logged_pictures(run.folder)) == sorted(found)


def saved(state: State, path: Path) -> Path:
    path.write_bytes(state.to_bytes())
    return path


def test_a_head_learns_and_goes_on_from_anywhere_to_the_same_digit(examples: Examples, tmp_path: Path) -> None:
    parameters = Parameters(how_many_training_steps=230, learning_rate=0.05, early_stopping=1000)
    told: list[int] = []
    whole = train(examples, parameters, lambda step, metrics: told.append(step))
    assert told == [*range(0, 230, 10), 229]
    tested = evaluate(examples, whole.head, parameters)
    assert tested is not None
    assert tested.batch.accuracy > 0.9
    assert tested.confusion.sum() == len(tested.rows) == 50
    assert int(tested.confusion.trace()) == 50 - len(tested.wrong(examples.labels))
    begin = None
    for until in (0, 70, 150):
        part = train(examples, parameters, lambda step, metrics, until=until: step >= until, begin=begin)
        assert part.stopped
        assert part.state.done == until + 1
        begin = State.from_file(saved(part.state, tmp_path / "checkpoint.npz"))
    last = train(examples, parameters, begin=begin)
    assert (last.step, last.state.lowest) == (whole.step, whole.state.lowest)
    assert np.array_equal(last.head.weights, whole.head.weights)
    assert np.array_equal(last.head.biases, whole.head.biases)
    other = train(examples, Parameters(how_many_training_steps=230, learning_rate=0.05, seed=2))
    assert not np.array_equal(other.head.weights, whole.head.weights)
    for kept in (100, 0):
        (tmp_path / "cut.npz").write_bytes(part.state.to_bytes()[:kept])
        with pytest.raises(ModelError, match=r"the checkpoint .*/cut.npz is damaged") as caught:
            State.from_file(tmp_path / "cut.npz")
        assert "pickle" not in str(caught.value)
        assert "Remove the file" in str(caught.value.hint)


def test_classes_are_drawn_first_unless_pictures_are(examples: Examples) -> None:
    drawn = {}
    for balanced in (True, False):
        sampler = Sampler(examples, "training", 100, Parameters(balanced=balanced))
        rows = np.concatenate([sampler.rows(step) for step in range(2 * BLOCK)])
        assert set(rows) <= set(examples.parts["training"].tolist())
        drawn[balanced] = np.bincount(examples.labels[rows], minlength=3) / len(rows)
    assert drawn[True] == pytest.approx([1 / 3] * 3, abs=0.03)
    shares = np.bincount(examples.labels[examples.parts["training"]]) / 200
    assert drawn[False] == pytest.approx(shares, abs=0.03)


def test_early_stopping_keeps_the_weights_with_the_lowest_loss(examples: Examples, tmp_path: Path) -> None:
    # Some labels are wrong, and so large a step overshoots again and again.
    torn = np.where(np.arange(300) % 6 == 0, (examples.labels + 1) % 3, examples.labels)
    examples = Examples(examples.features, torn, examples.parts, 3)
    parameters = Parameters(
        how_many_training_steps=3000, learning_rate=3.0, early_stopping=5, train_batch_size=5, validation_batch_size=-1
    )
    losses: dict[int, float] = {}
    found = train(
        examples, parameters, lambda step, metrics: bool(losses.update({step: metrics["validation_cross_entropy"]}))
    )
    assert found.early
    assert not found.stopped
    assert found.state.done < 3000
    assert found.step == min(losses, key=lambda step: losses[step])
    assert max(losses) == found.step + 50
    again = train(examples, parameters, begin=State.from_file(saved(found.state, tmp_path / "it.npz")))
    assert (again.early, again.step, again.state.done) == (True, found.step, found.state.done)
    best = train(examples, Parameters(**{**_fields(parameters), "how_many_training_steps": found.step + 1}))
    assert np.array_equal(best.head.weights, found.head.weights)


def _fields(parameters: Parameters) -> dict[str, Any]:
    return {name: getattr(parameters, name) for name in parameters.__slots__}


def test_whole_batches_and_losses_without_end(examples: Examples) -> None:
    found = train(examples, Parameters(how_many_training_steps=50, train_batch_size=-1, learning_rate=0.1))
    assert found.evaluation is not None
    assert len(found.evaluation.train.logits) == 200
    broken = Examples(examples.features * np.float32(1e30), examples.labels, examples.parts, 3)
    with pytest.raises(ModelError, match=r"the loss is nan at step 0\s+Try a smaller --learning_rate"):
        train(broken, Parameters(how_many_training_steps=50))


# -- distortions -------------------------------------------------------------------------------------


class Backwards(Engine):
    """Runs what was submitted when a result is asked for, the last first; every ``fails``-th task loses its worker."""

    def __init__(self, fails: int = 0) -> None:
        self.waiting: list[tuple[Callable[..., Any], tuple[Any, ...], Future[Any]]] = []
        self.fails, self.count, self.most = fails, 0, 0

    def start(self, setup: Callable[..., Any], args: tuple[Any, ...], **options: Any) -> None:
        self.state = setup(*args)

    def submit(self, function: Callable[..., Any], *arguments: Any, reports: Any = None) -> Future[Any]:
        engine = self

        class Lazy(Future[Any]):
            def result(self, timeout: float | None = None) -> Any:
                engine.work()
                return super().result(0)

        future = Lazy()
        self.waiting.append((function, arguments, future))
        self.most = max(self.most, len(self.waiting))
        return future

    def work(self) -> None:
        while self.waiting:
            function, arguments, future = self.waiting.pop()
            self.count += 1
            if self.fails and self.count % self.fails == 0:
                future.set_exception(WorkerCrashedError("it died"))
            else:
                future.set_result(function(self.state, *arguments))

    def stop_task(self, future: Future[Any], *, seconds: float) -> None: ...
    def default_slots(self) -> int:
        return 2

    def default_memory(self, slots: int) -> int | None:
        return None

    @property
    def slots(self) -> int:
        return 2

    def resize(self, slots: int) -> None: ...
    def stop(self, *, kill: bool = False) -> None: ...


def test_distortions_do_what_their_names_say(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", {"red": 1, "blue": 1})
    content = (folder / "red" / "000.png").read_bytes()
    spec = Preprocess(size=(16, 12), resize="squash")
    plain = Distortions().apply(content, spec, np.random.default_rng(1))
    assert plain.shape == (12, 16, 3)

    def all_of(distortions: Distortions) -> list[np.ndarray[Any, Any]]:
        return [distortions.apply(content, spec, np.random.default_rng(seed)) for seed in range(30)]

    flips = all_of(Distortions(flip_left_right=True))
    mirrored = [np.array_equal(each, plain[:, ::-1]) for each in flips]
    assert all(same or np.array_equal(each, plain) for same, each in zip(mirrored, flips, strict=True))
    assert 5 < sum(mirrored) < 25
    means = [each.mean() / plain.mean() for each in all_of(Distortions(random_brightness=30))]
    assert 0.69 < min(means) < 0.8
    assert 1.1 < max(means) < 1.31
    assert all(each.shape == plain.shape for each in all_of(Distortions(random_crop=50, random_scale=80)))
    assert not np.array_equal(*all_of(Distortions(random_crop=50))[:2])


def test_distorted_pictures_depend_on_the_seed_alone(tmp_path: Path) -> None:
    dataset = read(photos(tmp_path / "photos", dict.fromkeys(COLOURS, 12)), validation_percentage=0)
    ref = Backbone.of(str(backbone(tmp_path / "backbone.onnx"))).ref
    examples = Examples.of(dataset, np.zeros((len(dataset.pictures), 12), np.float32))
    parameters = Parameters(how_many_training_steps=9, train_batch_size=23)
    distortions = Distortions(flip_left_right=True, random_crop=10, random_brightness=20)

    def trained(engine: Backwards, workers: int, parameters: Parameters = parameters) -> Any:
        batches = Distorted(dataset, examples, parameters, distortions, ref, engine, workers=workers)
        return train(examples, parameters, batches=batches).head.weights

    engine = Backwards()
    once = trained(engine, 1)
    assert engine.count == 9 * 3, "no step beyond the last is computed, and each once"
    many, lossy = Backwards(), Backwards(fails=4)
    assert np.array_equal(once, trained(many, 7))
    assert many.most > engine.most, "more workers are given more ahead"
    assert np.array_equal(once, trained(lossy, 2))
    assert not np.array_equal(once, trained(Backwards(), 1, Parameters(**{**_fields(parameters), "seed": 2})))
    with pytest.raises(ModelError, match="it died, 3 times"):
        trained(Backwards(fails=1), 1)


def test_pictures_that_cannot_be_read_leave_the_data_set(tmp_path: Path) -> None:
    pictures = [
        Picture(tmp_path / f"{label}{number}.jpg", f"{label}{number}.jpg", label, part)
        for label in (0, 1)
        for number, part in enumerate(PARTS)
    ]
    dataset = Dataset(tmp_path, ("cat", "dog"), tuple(pictures))
    left = dataset.without({pictures[2].path: "truncated"})
    assert len(left.pictures) == 5
    assert left.remarks == ("1 picture cannot be read and is left out: 02.jpg: truncated",)
    with pytest.raises(SpecError, match="no picture of 'dog' is left to train with"):
        dataset.without({pictures[3].path: "truncated"})


def test_what_is_no_file_is_left_out_and_not_read_for_ever(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos")
    os.mkfifo(folder / "red" / "pipe.png")
    (folder / "red" / "zero.png").symlink_to("/dev/zero")
    (folder / "red" / "gone.png").symlink_to("nowhere")
    model = Backbone.of(str(backbone(tmp_path / "backbone.onnx")))
    for left, found in (
        finetuning.look(read(folder), model),
        bottlenecks.compute(read(folder), model, root=tmp_path / "cache", workers=1),
    ):
        assert len(found.hashes) == len(left.pictures) == 72
        assert "red/pipe.png: it is a pipe or a device, and no file" in left.remarks[-1]
        assert "red/zero.png: it is a pipe or a device, and no file" in left.remarks[-1]
        assert "red/gone.png: No such file or directory" in left.remarks[-1]


def test_classifiers_are_no_backbones_until_they_are_cut(tmp_path: Path) -> None:
    import onnx
    from onnx import helper, numpy_helper

    plain = backbone(tmp_path / "backbone.onnx")
    model = onnx.load(str(plain))
    model.graph.initializer.append(numpy_helper.from_array(np.ones((12, 5), np.float32), "last"))
    model.graph.node.append(helper.make_node("MatMul", ["features", "last"], ["logits"]))
    model.graph.node.append(helper.make_node("Softmax", ["logits"], ["out"], axis=1))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, ["batch", 5]))
    path = tmp_path / "classes.onnx"
    onnx.save(model, str(path))
    with pytest.raises(ModelError, match=r"gives 5 probabilities of classes[\s\S]*--cut 'means'"):
        Backbone.of(str(path))
    with pytest.raises(ModelError, match=r"makes no value 'featurs'; did you mean 'features'\?"):
        Backbone.of(str(path), at="featurs", root=tmp_path)
    picture = Item("", np.random.default_rng(0).integers(0, 255, (30, 20, 3), np.uint8))

    def seen(given: Backbone) -> Any:
        scorer = load(given.ref, "cpu")
        return features(scorer, scorer.prepare(picture))

    for at in ("features", "means"):  # a map of 2 x 2 is averaged
        found = Backbone.of(str(path), at=at, root=tmp_path)
        assert found.name == str(path)
        expected = seen(Backbone.of(str(plain)))
        assert seen(found) == pytest.approx(expected if at == "features" else expected.reshape(3, 4).mean(axis=1))
    head = Head(np.ones((3, 2), np.float32), np.zeros(2, np.float32))
    assert write(tmp_path / "package", found.ref, head, ["a", "b"]).options["classes"] == 2
    (tmp_path / "code.py").write_text("import tally\nclass Code(tally.Scorer): ...\n")
    with pytest.raises((ModelError, SpecError), match=r"task|ONNX"):
        Backbone.of(f"{tmp_path}/code.py:Code")


def test_an_entry_of_the_cache_is_of_one_picture_and_one_backbone(tmp_path: Path) -> None:
    cache, other = bottlenecks.Cache(tmp_path, "a" * 32), bottlenecks.Cache(tmp_path, "b" * 32)
    cache.write("12" * 32, np.arange(3, dtype=np.float32))
    cache.write("ab" * 32, "damaged PNG image")
    found = cache.read("12" * 32)
    assert isinstance(found, np.ndarray)
    assert found.tolist() == [0, 1, 2]
    assert cache.read("ab" * 32) == "damaged PNG image"

    def place(of: bottlenecks.Cache, picture: str) -> Path:
        path = of.folder / picture[:2] / f"{picture}.bottleneck"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    entry = place(cache, "12" * 32).read_bytes()
    for copied, picture in ((cache, "34" * 32), (other, "12" * 32), (cache, "ab" * 32)):
        place(copied, picture).write_bytes(entry)
        with pytest.raises(ValueError, match=picture):
            copied.read(picture)
    data = entry[-12:]
    before = b"tally-bottleneck-1\n" + hashlib.sha256(data).digest() + data  # of an earlier version: of which picture?
    place(cache, "12" * 32).write_bytes(before)
    assert cache.read("12" * 32) is None


def test_keys_of_the_cache_follow_what_decides_about_bottlenecks(tmp_path: Path) -> None:
    path = backbone(tmp_path / "backbone.onnx")
    settings: Sequence[Mapping[str, Any]] = [
        {},
        {"batch_size": 3},
        {"preprocess.resize": "crop"},
        {"preprocess.scale": 2.0},
    ]
    keys = [Backbone.of(str(path), each).key for each in settings]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3
