"""Folders that transformers saved: the same answers as of transformers itself; models are tiny, with random weights."""

from __future__ import annotations

import io
import json
import shutil
import wave
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from tests.services import require, torch_library

from tally.errors import ItemError, ModelLoadError, SpecError
from tally.models.load import load
from tally.models.resolve import resolve
from tally.scorers.run import run

TEXT = "[PAD] [UNK] [CLS] [SEP] [MASK] good bad pump fan is the a photo of cat dog this . was not"
WORDS = TEXT.split()
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
NAMES = {0: "cat", 1: "dog", 2: "owl"}
NAMED = {"id2label": NAMES, "label2id": {name: at for at, name in NAMES.items()}}
SIDES = {"height": 32, "width": 32}


@pytest.fixture(scope="module")
def torch() -> Any:
    return torch_library()


@pytest.fixture(scope="module")
def library(torch: Any) -> Any:
    require("transformers (make .venv/test-torch.stamp)", find_spec("transformers") is not None)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(3)
    return transformers


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray[Any, Any]]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (40 + 7 * at, 50, 3), dtype=np.uint8) for at in range(3)]


def tokenizer(library: Any, folder: Path) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    made = library.BertTokenizer(str(folder / "vocab.txt"), model_max_length=12)
    made.save_pretrained(folder)
    return made


def saved(folder: Path, model: Any, *others: Any) -> Any:
    model = model.eval()
    for each in (model, *others):
        each.save_pretrained(folder)
    return model


def scored(folder: Path, items: Any, **options: Any) -> list[Any]:
    ref = resolve(folder, settings=options)
    assert ref.kind == "transformers"
    scorer = load(ref, "cpu")
    try:
        return run(scorer, items)
    finally:
        scorer.close()


def direct(torch: Any, model: Any, processor: Any, picture: Any) -> Any:
    """What the model gives for one picture, as transformers has it."""
    with torch.no_grad():
        return model(**processor(images=[Image.fromarray(picture)], return_tensors="pt"))


def test_classes_of_pictures(torch: Any, library: Any, pictures: list[Any], tmp_path: Path) -> None:
    config = library.ViTConfig(image_size=32, patch_size=8, **SMALL, **NAMED)
    processor = library.ViTImageProcessorPil(size=SIDES)
    model = saved(tmp_path, library.ViTForImageClassification(config), processor)
    rows = scored(tmp_path, pictures, top=2)
    for picture, both in zip(pictures, rows, strict=True):
        shares = direct(torch, model, processor, picture).logits.softmax(-1)[0].numpy()
        assert [row["label"] for row in both] == [NAMES[at] for at in np.argsort(-shares)[:2]]
        np.testing.assert_allclose([row["score"] for row in both], np.sort(shares)[::-1][:2], atol=1e-5)
    single = scored(tmp_path, pictures[:1], labels=["a", "b", "c"])[0]
    assert single["label"] == "abc"[single["index"]]


def test_boxes(torch: Any, library: Any, pictures: list[Any], tmp_path: Path) -> None:
    config = library.YolosConfig(
        image_size=[48, 48], patch_size=8, num_detection_tokens=5, num_labels=3, **SMALL, **NAMED
    )
    processor = library.YolosImageProcessorPil(size={"height": 48, "width": 48}, do_pad=False)
    model = saved(tmp_path, library.YolosForObjectDetection(config), processor)
    found = scored(tmp_path, pictures, score_threshold=0.05)
    for picture, rows in zip(pictures, found, strict=True):
        answer = direct(torch, model, processor, picture)
        [right] = processor.post_process_object_detection(answer, threshold=0.05, target_sizes=[picture.shape[:2]])
        assert len(rows) == len(right["scores"]) > 0
        order = np.argsort(-right["scores"].numpy(), kind="stable")
        corners = [[row[side] for side in ("xmin", "ymin", "xmax", "ymax")] for row in rows]
        np.testing.assert_allclose(corners, right["boxes"].numpy()[order], atol=1e-3)
        assert [row["label"] for row in rows] == [NAMES[int(right["labels"][at])] for at in order]


def test_masks(torch: Any, library: Any, pictures: list[Any], tmp_path: Path) -> None:
    config = library.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], hidden_sizes=[8, 16], num_attention_heads=[1, 2], sr_ratios=[2, 1],
        patch_sizes=[3, 3], strides=[2, 2], mlp_ratios=[1, 1], decoder_hidden_size=8, **NAMED,
    )  # fmt: skip
    processor = library.SegformerImageProcessorPil(size=SIDES)
    model = saved(tmp_path, library.SegformerForSemanticSegmentation(config), processor)
    maps = scored(tmp_path, pictures, output="image")
    rows = scored(tmp_path, pictures)
    for picture, classes, counted in zip(pictures, maps, rows, strict=True):
        answer = direct(torch, model, processor, picture)
        [right] = processor.post_process_semantic_segmentation(answer, target_sizes=[picture.shape[:2]])
        np.testing.assert_array_equal(classes, right.numpy())
        assert {row["index"]: row["pixels"] for row in counted} == {
            int(at): int((right == at).sum()) for at in right.unique()
        }


def test_vectors_and_candidates(torch: Any, library: Any, pictures: list[Any], tmp_path: Path) -> None:
    text = library.CLIPTextConfig(vocab_size=len(WORDS), max_position_embeddings=12, eos_token_id=3, **SMALL).to_dict()
    vision = library.CLIPVisionConfig(image_size=32, patch_size=8, **SMALL).to_dict()
    config = library.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    processor = library.CLIPImageProcessorPil(size=SIDES, crop_size=SIDES)
    words = tokenizer(library, tmp_path)
    model = saved(tmp_path, library.CLIPModel(config), processor)
    with torch.no_grad():
        model.logit_scale.fill_(3.0)
    model.save_pretrained(tmp_path)
    found = scored(tmp_path, pictures, labels=["cat", "dog", "fan"], template="a photo of the {} .", top=3)
    texts = words([f"a photo of the {name} ." for name in ("cat", "dog", "fan")], padding=True, return_tensors="pt")
    for picture, rows in zip(pictures, found, strict=True):
        made = processor(images=[Image.fromarray(picture)], return_tensors="pt")
        with torch.no_grad():
            shares = model(**made, **texts).logits_per_image.softmax(-1)[0].numpy()
        np.testing.assert_allclose([row["score"] for row in sorted(rows, key=lambda r: r["index"])], shares, atol=1e-5)
    ref = resolve(tmp_path)
    assert ref.assumed == ("embed: to compare pictures with texts, give these as --labels",)
    [vector] = scored(tmp_path, pictures[:1], task="embed")
    with torch.no_grad():
        right = model.get_image_features(**processor(images=[Image.fromarray(pictures[0])], return_tensors="pt"))
    np.testing.assert_allclose(vector["embedding"], getattr(right, "pooler_output", right)[0].numpy(), atol=1e-5)


def test_texts(torch: Any, library: Any, tmp_path: Path) -> None:
    words = tokenizer(library, tmp_path)
    config = library.BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, **SMALL, **NAMED)
    model = saved(tmp_path, library.BertForSequenceClassification(config))
    texts = ["the pump is good .", "bad", None, "good " * 20, "the fan was not good"]
    table = pa.table({"id": range(5), "text": texts})
    with pytest.raises(SpecError, match="features: say which column holds the text: --set features=COLUMN"):
        resolve(tmp_path)
    rows = scored(tmp_path, table, features="text")
    assert str(rows[2]) == "text is null, and no text"
    assert "text has 22 tokens, and the model takes 12 (--set truncate=true" in str(rows[3])
    for at in (0, 1, 4):
        with torch.no_grad():
            shares = model(**words(texts[at], return_tensors="pt")).logits.softmax(-1)[0].numpy()
        assert rows[at]["label"] == NAMES[int(shares.argmax())]
        assert rows[at]["score"] == pytest.approx(float(shares.max()), abs=1e-5)
    assert scored(tmp_path, table, features="text", truncate=True)[3]["label"] in NAMES.values()
    pairs = scored(tmp_path, pa.table({"a": ["good"], "b": ["the fan"]}), features=["a", "b"])
    with torch.no_grad():
        shares = model(**words("good", "the fan", return_tensors="pt")).logits.softmax(-1)[0].numpy()
    assert pairs[0]["score"] == pytest.approx(float(shares.max()), abs=1e-5)


def test_vectors_of_texts(torch: Any, library: Any, tmp_path: Path) -> None:
    words = tokenizer(library, tmp_path)
    config = library.BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, **SMALL)
    model = saved(tmp_path, library.BertModel(config))
    texts = ["the pump is good .", "bad"]
    table = pa.table({"text": texts})
    for pooling, normal in (("mean", False), ("cls", True)):
        (tmp_path / "1_Pooling").mkdir(exist_ok=True)
        mode = "pooling_mode_mean_tokens" if pooling == "mean" else "pooling_mode_cls_token"
        (tmp_path / "1_Pooling/config.json").write_text(json.dumps({mode: True}))
        modules = [{"type": "sentence_transformers.models.Normalize"}] if normal else []
        (tmp_path / "modules.json").write_text(json.dumps(modules))
        found = scored(tmp_path, table, features="text")
        for text, row in zip(texts, found, strict=True):
            with torch.no_grad():
                hidden = model(**words(text, return_tensors="pt")).last_hidden_state[0]
            right = hidden.mean(0) if pooling == "mean" else hidden[0]
            right = right / right.norm() if normal else right
            np.testing.assert_allclose(row["embedding"], right.numpy(), atol=1e-5)


def test_sounds(torch: Any, library: Any, tmp_path: Path) -> None:
    config = library.Wav2Vec2Config(
        conv_dim=[8], conv_stride=[20], conv_kernel=[30], num_feat_extract_layers=1, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, **SMALL, **NAMED,
    )  # fmt: skip
    extractor = library.Wav2Vec2FeatureExtractor(sampling_rate=16000)
    model = saved(tmp_path, library.Wav2Vec2ForSequenceClassification(config), extractor)
    samples = (np.sin(np.arange(8000) / 9) * 20000).astype(np.int16)
    stereo = np.repeat(samples, 2)
    rows = scored(tmp_path, [sound(samples, 1, 16000), b"no sound at all" * 9, sound(stereo, 2, 16000)])
    with torch.no_grad():
        made = extractor(samples.astype(np.float32) / 32768, sampling_rate=16000, return_tensors="pt")
        shares = model(**made).logits.softmax(-1)[0].numpy()
    for at in (0, 2):
        assert rows[at]["label"] == NAMES[int(shares.argmax())]
        assert rows[at]["score"] == pytest.approx(float(shares.max()), abs=1e-4)
    assert "damaged, or no sound" in str(rows[1])


def sound(samples: Any, channels: int, rate: int) -> bytes:
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return content.getvalue()


@pytest.fixture(scope="module")
def vit(library: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    config = library.ViTConfig(image_size=32, patch_size=8, **SMALL, **NAMED)
    saved(folder, library.ViTForImageClassification(config), library.ViTImageProcessorPil(size=SIDES))
    return folder


def changed(folder: Path, **values: Any) -> None:
    described = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(described))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda it: (it / "model.safetensors").unlink(), "there are no weights: none of"),
        (lambda it: (it / "preprocessor_config.json").unlink(), "there are no settings for images: none of prepro"),
        (
            lambda it: changed(it, architectures=["WhisperForConditionalGeneration"]),
            "models of Whisper.* cannot be",
        ),
        (lambda it: changed(it, auto_map={"AutoModel": "x.Y"}), "code is in its own folder .*, and Tally runs none"),
        (
            lambda it: changed(it, hidden_size=32),
            "weights of ViTForImageClassification are missing or of another shape",
        ),
        (lambda it: (it / "model.safetensors").write_bytes(b"\x08" * 50), "transformers 5.* cannot open it"),
        (lambda it: changed(it, model_type="none such"), "transformers 5.* cannot open it"),
    ],
)
def test_folders_that_are_refused(vit: Path, tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    folder = tmp_path / "vit"
    shutil.copytree(vit, folder)
    damage(folder)
    with pytest.raises(ModelLoadError, match=message):
        load(resolve(folder), "cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "detect"}, "task: ViTForImageClassification in vit.* does classify, not detect"),
        ({"labels": ["a"]}, "labels: 1 names, but the model has 3 classes"),
        ({"tops": 2}, "tops: no such option; did you mean top|did you mean 'top'"),
        ({"features": "text"}, "features: ViTForImageClassification takes no tables"),
        ({"top": 4}, "top: 4, but the model has only 3 classes"),
    ],
)
def test_options_that_do_not_fit(vit: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        resolve(vit, settings=options)


def test_a_config_of_something_else_makes_no_folder_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"colour": "red"}')
    with pytest.raises(ModelLoadError, match=r"is a folder without a tally\.yaml"):
        resolve(tmp_path)


def test_a_picture_that_cannot_be_decoded_costs_no_other(vit: Path, pictures: list[Any]) -> None:
    content = io.BytesIO()
    Image.fromarray(pictures[0]).save(content, "PNG")
    rows = scored(vit, [content.getvalue(), b"no picture", content.getvalue()])
    assert isinstance(rows[1], ItemError)
    assert rows[0] == rows[2]
