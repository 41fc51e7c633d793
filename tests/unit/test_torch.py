"""Networks of PyTorch as models: each form of file gives what the network itself gives, and wrong files say why."""

from __future__ import annotations

import importlib
import io
import json
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tests.networks import network
from tests.services import torch_library

from tally.errors import ItemError, ModelLoadError, SpecError, UntrustedModelError
from tally.models.kinds import get
from tally.models.load import load
from tally.models.reference import ModelRef
from tally.models.resolve import resolve
from tally.scorers.base import Item
from tally.scorers.run import run
from tally.scorers.vision.preprocess import Preprocess, Preprocessor

PREPROCESS = {"size": [16, 16], "resize": "squash", "scale": 1 / 255, "channels": "rgb"}
DECLARED: dict[str, Any] = {"preprocess": PREPROCESS, "softmax": "always"}
TABLE_CODE = """
from torch import nn

class Rows(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
"""
STYLE_CODE = """
from torch import nn

class Styled(nn.Module):
    '''Halves the picture, normalises, and doubles it again: any size that is even.'''

    def __init__(self):
        super().__init__()
        self.down, self.in1 = nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.InstanceNorm2d(6, affine=True)
        self.up, self.last = nn.Upsample(scale_factor=2), nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, x):
        return self.last(self.up(self.in1(self.down(x)).relu())) * 60 + 127
"""
RESNET_CODE = """
import torch.nn.functional as F
from torch import nn

class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.bn2, self.more = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs), (outputs - inputs) // 2

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + (F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more, self.more)) if self.more else x)).relu()

class ResNet20(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        widths = [(16, 16, 1), (16, 32, 2), (32, 64, 2)]
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(Block(a, b, stride), Block(b, b, 1), Block(b, b, 1)) for a, b, stride in widths
        )
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        return self.linear(self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)).relu()))).mean((2, 3)))
"""


@pytest.fixture(scope="module")
def torch() -> Any:
    return torch_library()


def picture(seed: int, width: int = 24, height: int = 20) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def exported(torch: Any, module: Any, path: Path, shape: tuple[int, ...] = (2, 3, 16, 16)) -> Path:
    program = torch.export.export(module, (torch.zeros(shape),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path)
    return path


def scripted(torch: Any, module: Any, path: Path, **extra: str) -> Path:
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.save(torch.jit.trace(module, torch.zeros(1, 3, 16, 16)), str(path), _extra_files=extra)
    return path


def made(module: str, code: str, folder: Path) -> Any:
    (folder / "net.py").write_text(code)
    names: dict[str, Any] = {}
    exec(code, names)
    return names[module]().eval()


def scored(ref: ModelRef, items: Any) -> list[Any]:
    scorer = load(ref, "cpu")
    try:
        return run(scorer, items)
    finally:
        scorer.close()


FORMS = ["pt2", "torchscript", "safetensors", "pth", "checkpoint", "legacy", "whole"]


def saved(torch: Any, module: Any, folder: Path, form: str) -> tuple[Path, dict[str, Any]]:
    """A file with the network, and what has to be said of it."""
    weights = module.state_dict()
    with_class = {"settings": {**DECLARED, "module": "net.py:Vector"}}
    plain = {"settings": DECLARED, "trust": True}
    if form == "pt2":
        return exported(torch, module, folder / "net.pt2"), plain
    if form == "torchscript":
        return scripted(torch, module, folder / "net.pt"), plain
    if form == "safetensors":
        from safetensors.torch import save_file

        save_file(weights, folder / "net.safetensors")
        return folder / "net.safetensors", with_class
    if form == "whole":  # its class has to be where Python finds it
        torch.save(
            torch.nn.Sequential(*module.body, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()), folder / "n.pth"
        )
        return folder / "n.pth", plain
    path = folder / {"pth": "net.pth", "checkpoint": "net.th", "legacy": "net.pt"}[form]
    content = weights
    if form == "checkpoint":
        content = {"best_prec1": 91.7, "state_dict": {f"module.{name}": value for name, value in weights.items()}}
    torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    return path, with_class


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_file_gives_what_the_network_gives(torch: Any, tmp_path: Path, form: str) -> None:
    module = network(tmp_path, "Vector")
    path, given = saved(torch, module, tmp_path, form)
    ref = resolve(path, task="classify", labels=labels(tmp_path, 10), **given)
    assert ref.kind == "torch"
    assert ref.assumed == ()
    pictures = [picture(seed) for seed in range(5)]
    rows = scored(ref, pictures)
    prepared = [Preprocessor(Preprocess(**PREPROCESS))(Item("a", each)).tensor for each in pictures]
    with torch.no_grad():
        shares = module(torch.from_numpy(np.stack(prepared))).softmax(1).numpy()
    assert [row["index"] for row in rows] == shares.argmax(1).tolist()
    assert [row["label"] for row in rows] == [f"c{index}" for index in shares.argmax(1)]
    np.testing.assert_allclose([row["score"] for row in rows], shares.max(1), atol=1e-5)


def labels(folder: Path, count: int) -> Path:
    path = folder / "labels.txt"
    path.write_text("\n".join(f"c{number}" for number in range(count)))
    return path


def test_channels_last_and_autocast_change_no_answer(torch: Any, tmp_path: Path) -> None:
    path, given = saved(torch, network(tmp_path, "Vector"), tmp_path, "pth")
    plain = scored(resolve(path, task="embed", **given), [picture(1)])[0]["embedding"]
    for option, close in (({"channels_last": True}, 1e-5), ({"autocast": "bfloat16"}, 0.05)):
        settings = {**given["settings"], **option}
        other = scored(resolve(path, task="embed", settings=settings), [picture(1)])[0]["embedding"]
        np.testing.assert_allclose(other, plain, atol=close)
        assert (other == plain) == (close > 1) or "autocast" not in option


def test_the_old_statistics_of_a_fast_style_network_are_left_out(torch: Any, tmp_path: Path) -> None:
    module = made("Styled", STYLE_CODE, tmp_path)
    weights = module.state_dict() | {"in1.running_mean": torch.zeros(6), "in1.running_var": torch.ones(6)}
    torch.save(weights, tmp_path / "model.pth")
    ref = resolve(tmp_path / "model.pth", settings={"module": "net.py:Styled", "preprocess.scale": 1})
    assert ref.options["task"] == "restyle"
    assert ref.assumed[0] == (
        "2 statistics of instance normalisation are left out (in1.running_mean, ...): Styled has none"
    )
    wide = picture(3, 50, 22)
    [styled, again] = scored(ref, [wide, picture(4, 16, 16)])
    assert again.shape == (16, 16, 3)
    with torch.no_grad():
        direct = module(torch.from_numpy(wide.transpose(2, 0, 1)[None].astype(np.float32)))[0].numpy()
    np.testing.assert_array_equal(styled, np.clip(np.rint(direct), 0, 255).astype(np.uint8).transpose(1, 2, 0))

    torch.save(weights | {"last.running_mean": torch.zeros(3)}, tmp_path / "model.pth")
    with pytest.raises(ModelLoadError, match=r"it has 'last.running_mean', which Styled does not"):
        resolve(tmp_path / "model.pth", settings={"module": "net.py:Styled"})


@pytest.mark.parametrize("form", ["pth", "pt2"])
def test_rows_of_numbers(torch: Any, tmp_path: Path, form: str) -> None:
    module = made("Rows", TABLE_CODE, tmp_path)
    if form == "pth":
        torch.save(module.state_dict(), tmp_path / "rows.pth")
        ref = resolve(tmp_path / "rows.pth", settings={"module": "net.py:Rows", "labels": ["no", "yes"]})
    else:
        path = exported(torch, module, tmp_path / "rows.pt2", (2, 3))
        ref = resolve(path, settings={"labels": ["no", "yes"]}, trust=True)
    table = pa.table({name: np.random.default_rng(at).normal(size=7) for at, name in enumerate("abc")})
    table = table.set_column(1, "b", pa.array([0.5, None, 1.0, 2.0, float("inf"), 0.1, 0.2]))
    rows = scored(ref, table)
    assert [at for at, row in enumerate(rows) if isinstance(row, ItemError)] == [1, 4]
    values = np.stack([column.to_numpy() for column in table.columns], axis=1).astype(np.float32)
    with torch.no_grad():
        shares = module(torch.from_numpy(values)).softmax(1).numpy()
    for at in (0, 2, 3, 5, 6):
        assert rows[at]["label"] == ("no", "yes")[int(shares[at].argmax())]
        assert rows[at]["score"] == pytest.approx(float(shares[at].max()), abs=1e-5)


def test_outputs_by_name_and_sizes_that_vary(torch: Any, tmp_path: Path) -> None:
    code = STYLE_CODE.replace("class Styled", "class Parted").replace(
        "return self.last(self.up(self.in1(self.down(x)).relu())) * 60 + 127",
        "y = self.up(self.in1(self.down(x)).relu())\n        return {'aux': [y.mean((2, 3))], 'out': y}",
    )
    module = made("Parted", code, tmp_path)
    torch.save(module.state_dict(), tmp_path / "parted.pth")
    ref = resolve(tmp_path / "parted.pth", task="segment", settings={"module": "net.py:Parted", "preprocess.scale": 1})
    assert ref.options["outputs"] == ["out"]
    assert ref.options["classes"] == 6
    assert "the output aux.0 [any, 6] is not used (--set outputs=aux.0 takes it instead)" in ref.assumed
    rows = scored(ref, [picture(5, 30, 18)])[0]
    assert sum(row["pixels"] for row in rows) == 30 * 18


def test_boxes_in_pixels_of_the_original(torch: Any, tmp_path: Path) -> None:
    """One box at a quarter of the picture, as YOLOv8 gives them: centre, sides, and a score for each class."""
    code = """
import torch
from torch import nn

class Boxes(nn.Module):
    def __init__(self):
        super().__init__()
        found = torch.zeros(1, 6, 21)
        found[0, :4] = torch.tensor([8.0, 8.0, 16.0, 16.0])[:, None]
        found[0, 5, 3] = 0.75
        self.found, self.conv = nn.Parameter(found), nn.Conv2d(3, 1, 1)

    def forward(self, x):
        return self.found + 0 * self.conv(x).mean((1, 2, 3))[:, None, None]
"""
    module = made("Boxes", code, tmp_path)
    torch.save(module.state_dict(), tmp_path / "boxes.pth")
    given = {"module": "net.py:Boxes", "preprocess": {"size": 32, "resize": "squash"}, "decoder": "yolov8"}
    ref = resolve(tmp_path / "boxes.pth", task="detect", labels=labels(tmp_path, 2), settings=given)
    [row] = scored(ref, [picture(0, 64, 128)])[0]
    assert row == {
        "xmin": 0.0,
        "ymin": 0.0,
        "xmax": 32.0,
        "ymax": 64.0,
        "label": "c1",
        "score": pytest.approx(0.75),
    }


def test_what_ultralytics_writes_beside_a_program_is_read(torch: Any, tmp_path: Path) -> None:
    names = {str(number): f"kind {number}" for number in range(10)}
    beside = {"author": "Ultralytics", "task": "classify", "imgsz": [16, 16], "names": names}
    path = scripted(
        torch, network(tmp_path, "Classes"), tmp_path / "yolo.torchscript.pt", **{"config.txt": json.dumps(beside)}
    )
    ref = resolve(path, trust=True)
    assert ref.options["preprocess"]["size"] == [16, 16]
    assert ref.options["labels"] == list(names.values())


def test_a_network_that_is_still_in_training_is_refused(torch: Any, tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Dropout(0.5), torch.nn.Flatten()).train()
    with pytest.raises(ModelLoadError, match="depends on those beside it, or on chance") as caught:
        resolve(exported(torch, module, tmp_path / "net.pt2"), task="embed", trust=True)
    assert caught.value.hint == "It was exported while it was trained. Export it after network.eval()"


def test_files_that_are_no_network_say_what_they_are(
    torch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = network(tmp_path, "Vector")
    torch.save(module.state_dict(), tmp_path / "weights.pth")
    cases: list[tuple[str, bytes, str]] = [
        ("keras.pt", b"\x89HDF\r\n\x1a\n" + bytes(99), "is an HDF5 file, as Keras writes, and neither"),
        ("lite.pth", b"\x1c\0\0\0TFL3" + bytes(99), "is a TensorFlow Lite model, and neither"),
        ("page.pt", b"<!DOCTYPE html>", "is a web page or XML, and neither"),
        (
            "m.pth",
            b"weights" + bytes(200) + b"\x57\xfb\x80\x8b\x24\x75\x47\xdb",
            "is the index of a TensorFlow checkpoint",
        ),
        ("cut.pth", (tmp_path / "weights.pth").read_bytes()[:-300], "is a ZIP archive that is damaged or cut off"),
        ("other.pt2", zipped("a.txt"), r"is a ZIP archive \(a\.txt\), and neither"),
        ("broken.safetensors", b"\xff" * 40, "is damaged, or no file of PyTorch"),
    ]
    for name, content, message in cases:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelLoadError, match=message):
            resolve(tmp_path / name, trust=True)
    with pytest.raises(SpecError, match=r"holds weights alone: \d tensors, such as body.0.weight \[6, 3, 3, 3\], body"):
        resolve(tmp_path / "weights.pth")
    (tmp_path / "gone.py").write_text("from torch import nn\nclass Gone(nn.Linear): ...\n")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        torch.save(importlib.import_module("gone").Gone(3, 3), tmp_path / "whole.pt")
        del sys.modules["gone"]
    with pytest.raises(ModelLoadError, match=r"holds more than weights: it names gone\.Gone, and") as caught:
        resolve(tmp_path / "whole.pt")
    assert "--trust" in str(caught.value.hint)
    with pytest.raises(ModelLoadError, match="holds a whole network, whose class is in the module gone, which is not"):
        resolve(tmp_path / "whole.pt", trust=True)
    with pytest.raises(UntrustedModelError, match="is a program of PyTorch: opening it may run"):
        resolve(exported(torch, module, tmp_path / "net.pt2"))


def zipped(*names: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in names:
            archive.writestr(name, name)
    return content.getvalue()


def test_the_class_comes_along_with_weights_from_elsewhere(torch: Any, tmp_path: Path) -> None:
    path, _ = saved(torch, network(tmp_path, "Vector"), tmp_path, "pth")
    path.with_name("net.pth.yaml").write_text("module: net.py:Vector\npreprocess: {size: 16}\n")
    assert get("torch").companions(path) == ["net.py"]
    before = resolve(path, task="embed")
    (tmp_path / "net.py").write_text((tmp_path / "net.py").read_text() + "\n# another\n")
    assert resolve(path, task="embed").hash != before.hash


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"autocast": "int8"}, "autocast: "),
        ({"arguments": 3}, "arguments: "),
        ({"arguments": {"wide": 3}}, r"net\.py: Vector\(\) failed: TypeError"),
        ({"channel_last": True}, "channel_last: no such option; did you mean 'channels_last'"),
        ({"module": "net.py:Vektor"}, r"net\.py defines no 'Vektor'; did you mean 'Vector'"),
        ({"module": "../net.py:Vector"}, "lies outside the model's folder"),
        ({"outputs": "logits"}, "outputs: the model has no output 'logits'; it has output"),
        ({"preprocess": {"channels": "gray"}}, r"cannot take a picture \[1, 1, 224, 224\]: RuntimeError"),
    ],
)
def test_options_that_do_not_fit(torch: Any, tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    path, given = saved(torch, network(tmp_path, "Vector"), tmp_path, "pth")
    with pytest.raises((SpecError, ModelLoadError), match=message):
        resolve(path, task="embed", settings=given["settings"] | wrong)


def test_a_gpu_that_there_is_not(torch: Any, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    path, given = saved(torch, network(tmp_path, "Vector"), tmp_path, "pth")
    ref = resolve(path, task="embed", **given)
    with pytest.raises(ModelLoadError, match=r"PyTorch [\w.+]+ sees no GPUs"):
        load(ref, "cuda")
    with pytest.raises(ModelLoadError, match="PyTorch has no device 'tensorrt'"):
        load(ref, "tensorrt")


def test_the_weights_that_people_have(torch: Any, tmp_path: Path, data: Path) -> None:
    others = data / "models/other_formats"
    with pytest.raises(SpecError, match=r"holds weights alone: 120 tensors|holds weights alone: \d+ tensors, such as"):
        resolve(others / "fastestdet_280.pth")
    (tmp_path / "net.py").write_text(RESNET_CODE)
    shutil.copyfile(others / "cifar10_resnet20.th", tmp_path / "resnet20.th")
    cifar = {"preprocess.size": 32, "preprocess.resize": "squash"}
    ref = resolve(tmp_path / "resnet20.th", task="classify", settings={"module": "net.py:ResNet20", **cifar})
    onnx = resolve(data / "models/classify/cifar10_resnet20.onnx", task="classify", settings=cifar)
    photos = [path.read_bytes() for path in sorted((data / "images/imagenet").glob("*.JPEG"))[:6]]
    rows, right = scored(ref, photos), scored(onnx, photos)
    assert [row["label"] for row in rows] == [row["label"] for row in right]
    np.testing.assert_allclose([row["score"] for row in rows], [row["score"] for row in right], atol=1e-4)
