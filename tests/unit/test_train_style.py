"""Training a style: what is refused before it begins, what it leaves, and that both forms of the network agree."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest
import yaml
from PIL import Image
from tests.extent import FULL
from tests.services import torch_library

from tally import demo
from tally.demo import clip
from tally.errors import ModelLoadError, OutputExistsError, SourceNotFoundError, SpecError
from tally.models.load import load
from tally.models.registry import registry_name
from tally.models.resolve import resolve
from tally.scorers.base import Item
from tally.training.style import training as style
from tally.training.style.network import SMALLEST_STYLE
from tally.training.style.synthetic_images import draw
from tally.training.style.training import Step, Training

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "style"


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "waves.png"
    Image.fromarray(draw(np.random.default_rng(5), 200)).save(path)
    return path


@pytest.fixture
def torch() -> Any:
    return torch_library()


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trained(picture: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return Training(style=picture, out=out, **({"steps": 3, "size": SMALLEST_STYLE} | changes)).run()


# -- what is refused before training begins ------------------------------------------------------------


def test_every_wrong_number_is_reported_together(picture: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError) as raised:
        Training(style=picture, out=tmp_path / "out", steps=0, size=20, strength=-1.0, seed=-2)
    assert [problem.split(":")[0] for problem in raised.value.problems] == ["--steps", "--size", "--strength", "--seed"]


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_a_strength_is_a_number(picture: Path, tmp_path: Path, strength: float) -> None:
    with pytest.raises(SpecError, match="--strength"):
        Training(style=picture, out=tmp_path / "out", strength=strength)


@pytest.mark.parametrize("flag", ["style", "vgg", "content"])
def test_what_is_not_there_is_named(picture: Path, tmp_path: Path, flag: str) -> None:
    given = {"style": picture, "out": tmp_path / "out"} | {flag: tmp_path / "nowhere"}
    with pytest.raises(SourceNotFoundError, match=f"--{flag}: .*nowhere"):
        Training(**given)


def test_nothing_is_overwritten(picture: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputExistsError, match="there already"):
        Training(style=picture, out=tmp_path)


@pytest.mark.parametrize(
    ("text", "name"), [("my-style", "my-style"), ("Starry Night (2)", "starry-night-2"), ("a.b_c", "a.b_c")]
)
def test_a_folder_name_becomes_a_name_of_the_registry(text: str, name: str) -> None:
    assert registry_name(text) == name


def test_a_name_without_a_letter_is_refused() -> None:
    with pytest.raises(SpecError, match="cannot be a model's name"):
        registry_name("???")


def test_without_pytorch_the_command_says_what_to_install(
    cli: Callable[..., Any], picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    ran = cli("train", "style", "--style", picture, "--out", tmp_path / "out")
    assert ran.code == 1
    assert "torch" in ran.err
    assert "pip install 'tally-scoring[train]'" in ran.err
    assert not (tmp_path / "out").exists()


# -- drawn pictures ------------------------------------------------------------------------------------


def test_drawn_pictures_differ_and_depend_on_the_seed_alone() -> None:
    one, again, other = (draw(np.random.default_rng(seed), 96) for seed in (1, 1, 2))
    assert one.shape == (96, 96, 3)
    assert one.dtype == np.uint8
    assert np.array_equal(one, again)
    assert np.abs(one.astype(int) - other).mean() > 10


# -- training ------------------------------------------------------------------------------------------


def test_a_trained_style_is_a_package_that_restyles_any_size(torch: Any, picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "models" / "my-style"
    facts = trained(picture, out)
    assert sorted(path.name for path in out.iterdir()) == ["style.onnx", "tally.yaml"]
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []
    assert facts["trained"]["losses"] == "random filters"
    assert facts["metrics"].keys() == {"loss/style", "loss/content", "loss/smoothness"}
    json.dumps(facts)
    ref = resolve(out)
    assert ref.options["task"] == "restyle"
    assert ref.assumed == ()
    scorer = load(ref, "cpu")
    for height, width in ((31, 50), (64, 64), (2, 3)):
        pixels = draw(np.random.default_rng(9), 64)[:height, :width]
        (result,) = scorer.score([scorer.prepare(Item(key="a", value=pixels, info={}))])
        assert isinstance(result, np.ndarray)
        assert result.shape == (height, width, 3)


@pytest.mark.skipif(not FULL, reason="trains twice: TALLY_TEST_FULL=1")
def test_the_same_seed_trains_the_same_model(torch: Any, picture: Path, tmp_path: Path) -> None:
    for name, seed in (("one", 4), ("two", 4), ("three", 5)):
        trained(picture, tmp_path / name, seed=seed)
    one, two, three = ((tmp_path / name / "style.onnx").read_bytes() for name in ("one", "two", "three"))
    assert one == two
    assert one != three


def test_training_lowers_the_loss_and_tells_tensorboard(torch: Any, picture: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    steps: list[Step] = []
    training = Training(style=picture, out=tmp_path / "out", steps=12, size=SMALLEST_STYLE)
    training.run(steps.append)
    assert [step.done for step in steps] == list(range(1, 13))
    written = EventAccumulator(str(next(training.events.iterdir()))).Reload()
    assert set(written.Tags()["scalars"]) >= {"loss/style", "loss/content", "loss/total", "learning rate"}
    assert set(written.Tags()["images"]) == {"style", "before and after"}
    totals = [event.value for event in written.Scalars("loss/total")]
    assert len(totals) == 12
    assert np.mean(totals[-3:]) < np.mean(totals[:3])


def test_photos_are_practised_on_and_broken_ones_left_out(torch: Any, picture: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos" / "summer"
    photos.mkdir(parents=True)
    Image.fromarray(draw(np.random.default_rng(1), 300)).save(photos / "one.jpg")
    (photos / "two.jpg").write_bytes(b"no picture")
    facts = trained(picture, tmp_path / "out", content=tmp_path / "photos")
    assert facts["trained"]["content"] == "photos"
    (photos / "one.jpg").write_bytes(b"neither")
    with pytest.raises(SpecError, match="no picture can be read"):
        trained(picture, tmp_path / "other", content=tmp_path / "photos")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceNotFoundError, match="no pictures"):
        trained(picture, tmp_path / "other", content=tmp_path / "empty")


def test_a_style_that_is_no_picture_is_refused(torch: Any, tmp_path: Path) -> None:
    (tmp_path / "style.jpg").write_bytes(b"text")
    with pytest.raises(SpecError, match="--style: "):
        trained(tmp_path / "style.jpg", tmp_path / "out")


def test_an_interrupted_training_leaves_no_package(
    torch: Any, cli: Callable[..., Any], picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(style, "_compare", interrupted)  # as late as can be
    ran = cli("train", "style", "--style", picture, "--out", tmp_path / "out", "--steps", 2, "--size", SMALLEST_STYLE)
    assert ran.code == 130
    assert "stopped after 2 of 2 steps: no model was written" in ran.err
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out-events"]


def test_the_command_registers_what_it_trained(
    torch: Any, cli: Callable[..., Any], picture: Path, tmp_path: Path
) -> None:
    out = tmp_path / "My Style"
    ran = cli("train", "style", "--style", picture, "--out", out, "--steps", 2, "--size", SMALLEST_STYLE)
    assert (ran.code, "registered as models:/my-style/1" in ran.out) == (0, True)
    assert "tally score SOURCE --model models:/my-style/1 --out OUT" in ran.err
    assert "2/2 steps" in ran.err
    shown = json.loads(cli("models", "show", "my-style", "--json").out)
    (version,) = shown["versions"]
    assert version["metadata"]["trained"]["steps"] == 2
    assert version["metadata"]["metrics"]["loss/style"] > 0
    run = json.loads(cli("runs", "show", version["metadata"]["run"], "--json").out)
    assert (run["kind"], run["state"], run["metrics"]["loss/style"]["count"]) == ("style", "finished", 2)


# -- the network ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 36, 64), (2, 33, 47), (1, 9, 10), (1, 20, 601)])
def test_onnx_equals_pytorch(torch: Any, shape: tuple[int, int, int]) -> None:
    from tally.training.style.network import initial, restyle, to_onnx

    count, height, width = shape
    generator = torch.Generator().manual_seed(1)
    parameters = initial(torch.rand((1, 3, 290, 300), generator=generator) * 255, 3)
    model = to_onnx({name: value.numpy() for name, value in parameters.items()})
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    pictures = torch.rand((count, 3, height, width), generator=generator) * 255
    (found,) = session.run(None, {"image": pictures.numpy()})
    assert found.shape == (count, 3, height, width)
    assert np.abs(found - restyle(parameters, pictures).numpy()).max() < 0.05


# -- a pretrained VGG as the judge ---------------------------------------------------------------------


def vgg(torch: Any, third: int, fourth: int) -> dict[str, Any]:
    """A state dict in torchvision's layout, up to the fourth block, of random weights."""
    generator, state, index, inputs = torch.Generator().manual_seed(2), {}, 0, 3
    for outputs, count in ((64, 2), (128, 2), (256, third), (512, fourth)):
        for _ in range(count):
            spread = (2 / (9 * inputs)) ** 0.5
            state[f"features.{index}.weight"] = torch.randn((outputs, inputs, 3, 3), generator=generator) * spread
            state[f"features.{index}.bias"] = torch.zeros(outputs)
            index, inputs = index + 2, outputs
        index += 1
    return state


@pytest.mark.parametrize(("name", "blocks"), [("vgg16", (3, 3)), ("vgg19", (4, 4))])
def test_a_vgg_is_told_by_its_layers(
    torch: Any, picture: Path, tmp_path: Path, name: str, blocks: tuple[int, int]
) -> None:
    torch.save(vgg(torch, *blocks), tmp_path / "weights.pth")
    facts = trained(picture, tmp_path / "out", vgg=tmp_path / "weights.pth", steps=1)
    assert facts["trained"]["losses"] == name


def test_a_file_of_other_weights_is_refused_with_what_is_wrong(torch: Any, picture: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    state = vgg(torch, 3, 3)
    del state["features.0.bias"]
    state["features.5.weight"] = torch.zeros((128, 3, 3, 3))
    torch.save(state, weights)
    with pytest.raises(ModelLoadError) as raised:
        trained(picture, tmp_path / "out", vgg=weights)
    assert "features.0.bias is missing" in raised.value.message
    assert "features.5.weight has the shape [128, 3, 3, 3], not [128, 64, 3, 3]" in raised.value.message
    torch.save([1, 2], weights)
    with pytest.raises(ModelLoadError, match="holds a list"):
        trained(picture, tmp_path / "out", vgg=weights)
    weights.write_bytes(b"no weights at all")
    with pytest.raises(ModelLoadError, match="or is damaged"):
        trained(picture, tmp_path / "out", vgg=weights)
    torch.save({"features.0.weight": Path("code")}, weights)  # an object: reading it would run its class
    with pytest.raises(ModelLoadError, match=r"names pathlib[\w.]*Path, and what that is would run") as raised:
        trained(picture, tmp_path / "out", vgg=weights)
    assert "weights_only" not in str(raised.value)


# -- the example ---------------------------------------------------------------------------------------


@pytest.mark.skipif(not FULL, reason="draws large pictures several times: TALLY_TEST_FULL=1")
def test_the_style_picture_depends_on_its_seed_alone() -> None:
    make = example("make_style_picture")
    one, again, other = (np.asarray(make.draw_picture(64, seed)) for seed in (3, 3, 4))
    assert one.shape == (64, 64, 3)
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_the_clip_is_as_long_and_large_as_asked_for_and_has_sound(tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="PyAV is not installed")
    for name in ("one", "two"):
        clip.draw_clip(tmp_path / f"{name}.mp4", 1, (64, 36), Fraction(24), 7)
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "two.mp4").read_bytes()
    with av.open(str(tmp_path / "one.mp4")) as container:
        frames = list(container.decode(video=0))
    assert len(frames) == 24
    assert (frames[0].width, frames[0].height) == (64, 36)
    assert [frame.pts * frame.time_base for frame in frames] == [Fraction(n, 24) for n in range(24)]
    with av.open(str(tmp_path / "one.mp4")) as container:
        sound = np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1)
    assert sound.shape[0] == 2
    assert abs(sound.shape[1] / clip.SAMPLE_RATE - 1) < 0.05
    assert np.abs(sound).max() > 0.05


def test_the_tune_is_the_same_however_it_is_cut() -> None:
    whole = clip.tune(0, 60_000, 7)
    parts = [clip.tune(start, 20_000, 7) for start in (0, 20_000, 40_000)]
    assert np.array_equal(whole, np.concatenate(parts, axis=1))


def test_the_shipped_style_changes_pictures_and_keeps_the_scene() -> None:
    described = yaml.safe_load((demo.model("strokes") / "tally.yaml").read_text("utf-8"))
    assert (demo.model("strokes") / described["file"]).stat().st_size <= 500_000
    ref = resolve("tally:strokes")
    assert (ref.options["task"], ref.assumed) == ("restyle", ())
    scorer = load(ref, "cpu")
    frame = np.asarray(clip.Scene((160, 90), 7).draw(2.0))
    (restyled,) = scorer.score([scorer.prepare(Item(key="frame", value=frame, info={}))])
    assert restyled.shape == frame.shape
    assert np.abs(restyled.astype(int) - frame).mean() > 20
    # seen from afar, light stays light and dark stays dark
    afar = [Image.fromarray(each).convert("L").resize((16, 9), Image.Resampling.BOX) for each in (frame, restyled)]
    assert np.corrcoef(*(np.asarray(each).ravel() for each in afar))[0, 1] > 0.6
