"""Train the toy classifier that comes with Tally, and write it as ``model/shapes.onnx``.

    pip install '.[train]'
    python train.py [--seed 1] [--out model]

Draws its own pictures (:mod:`tally.demo.pictures`), so nothing is downloaded. A few minutes on two cores; the same
seed on the same machine gives the same weights. The accuracy that is printed last is of the written file, on
pictures that training has not seen.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from PIL import Image, ImageOps
from torch import nn

from tally.demo.pictures import SHAPES, draw_picture, pictures

LABELS = sorted(SHAPES)
SIZE = 64
"""Pixels per side of what the network sees."""

CONVOLUTIONS = [(16, 2), (32, 1), (48, 2), (48, 1), (64, 2)]
"""Channels and stride of each 3 × 3 convolution."""

# Far from the seeds that people give to tally simulate pictures.
TRAINING_SEED, HELD_OUT_SEED = 1_000_000, 2_000_000


def example(picture: tuple[str, int], seed: int) -> tuple[np.ndarray, int]:
    """``uint8[3, SIZE, SIZE]`` RGB of one picture, and the index of its label."""
    shape, number = picture
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(draw_picture(shape, number, seed)))).convert("RGB")
    pixels = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    return pixels.transpose(2, 0, 1), LABELS.index(shape)


def collection(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``uint8[count, 3, SIZE, SIZE]`` and ``int64[count]``."""
    with ProcessPoolExecutor() as pool:
        pixels, labels = zip(*pool.map(partial(example, seed=seed), pictures(count), chunksize=100), strict=True)
    return torch.from_numpy(np.stack(pixels)), torch.tensor(labels)


def scale(pixels: torch.Tensor) -> torch.Tensor:
    """0 … 255 to -1 … 1, as ``tally.yaml`` declares it."""
    return (pixels.float() - 127.5) / 127.5


def network() -> nn.Sequential:
    """Convolutions, the maximum of each feature over the picture, and one linear layer."""
    layers: list[nn.Module] = []
    channels = 3
    for wider, stride in CONVOLUTIONS:
        layers += [
            nn.Conv2d(channels, wider, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(wider),
            nn.ReLU(),
        ]
        channels = wider
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(channels, len(LABELS)))


def varied(batch: torch.Tensor) -> torch.Tensor:
    """Turn, mirror and recolour a batch: no shape becomes another by it."""
    batch = torch.rot90(batch, int(torch.randint(4, ())), dims=(2, 3))
    if torch.rand(()) < 0.5:
        batch = batch.flip(3)
    return batch[:, torch.randperm(3)]


def train(model: nn.Sequential, pixels: torch.Tensor, labels: torch.Tensor, epochs: int, batch_size: int = 64) -> None:
    """Minimise cross-entropy, the learning rate rising and falling once."""
    steps = len(pixels) // batch_size
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.005, total_steps=epochs * steps)
    loss_of = nn.CrossEntropyLoss()
    for epoch in range(epochs):
        total = 0.0
        order = torch.randperm(len(pixels))
        for step in range(steps):
            chosen = order[step * batch_size : (step + 1) * batch_size]
            loss = loss_of(model(scale(varied(pixels[chosen]))), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1}/{epochs}: loss {total / steps:.4f}", flush=True)


def folded(model: nn.Sequential) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Weight and bias of each layer, the batch normalisation folded into the convolution before it."""
    for layer, following in zip(model, [*model[1:], None], strict=True):
        if isinstance(layer, nn.Conv2d) and isinstance(following, nn.BatchNorm2d):
            gain = following.weight / torch.sqrt(following.running_var + following.eps)
            weight = layer.weight * gain[:, None, None, None]
            bias = following.bias - following.running_mean * gain
        elif isinstance(layer, nn.Linear):
            weight, bias = layer.weight, layer.bias
        else:
            continue
        yield weight.detach().numpy(), bias.detach().numpy()


def to_onnx(model: nn.Sequential) -> onnx.ModelProto:
    """``float32[batch, 3, SIZE, SIZE]`` in -1 … 1, RGB → ``float32[batch, labels]``, probabilities."""
    nodes, weights, value = [], [], "image"
    *convolutions, linear = folded(model.eval())
    for i, ((weight, bias), (_, stride)) in enumerate(zip(convolutions, CONVOLUTIONS, strict=True)):
        weights += [
            numpy_helper.from_array(weight, f"conv{i}.weight"),
            numpy_helper.from_array(bias, f"conv{i}.bias"),
        ]
        nodes += [
            helper.make_node(
                "Conv",
                [value, f"conv{i}.weight", f"conv{i}.bias"],
                [f"conv{i}"],
                kernel_shape=[3, 3],
                strides=[stride, stride],
                pads=[1, 1, 1, 1],
            ),
            helper.make_node("Relu", [f"conv{i}"], [f"relu{i}"]),
        ]
        value = f"relu{i}"
    weights += [
        numpy_helper.from_array(linear[0], "linear.weight"),
        numpy_helper.from_array(linear[1], "linear.bias"),
    ]
    nodes += [
        helper.make_node("GlobalMaxPool", [value], ["strongest"]),
        helper.make_node("Flatten", ["strongest"], ["features"]),
        helper.make_node("Gemm", ["features", "linear.weight", "linear.bias"], ["logits"], transB=1),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "shapes",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", len(LABELS)])],
        weights,
    )
    exported = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="tally-shapes"
    )
    onnx.checker.check_model(exported, full_check=True)
    return exported


def accuracy(model: onnx.ModelProto, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of the pictures that the exported model names rightly."""
    session = ReferenceEvaluator(model)
    right = 0
    for part, truth in zip(scale(pixels).split(200), labels.split(200), strict=True):
        (probabilities,) = session.run(None, {"image": part.numpy()})
        right += int((probabilities.argmax(axis=1) == truth.numpy()).sum())
    return right / len(labels)


def main() -> None:
    """Draw, train, write, and measure what was written."""
    parser = argparse.ArgumentParser(description="Train the demo's toy classifier.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=12000, help="pictures to train on (default: 12000)")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2, help="another number rounds differently (default: 2)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "model")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(options.seed)
    model = network()
    train(model, *collection(options.count, TRAINING_SEED + options.seed), epochs=options.epochs)

    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "shapes.onnx"
    onnx.save(to_onnx(model), file)
    (options.out / "labels.txt").write_text("".join(f"{label}\n" for label in LABELS), encoding="utf-8")

    share = accuracy(onnx.load(file), *collection(2000, HELD_OUT_SEED + options.seed))
    print(f"{file}: {file.stat().st_size:,} bytes, {share:.2%} of 2,000 held-out pictures named rightly")


if __name__ == "__main__":
    main()
