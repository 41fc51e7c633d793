"""Classifiers of well-known collections, told by the names of their layers, and what they were trained with."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tally.scorers.vision.options import IMAGENET, MINUS_ONE_TO_ONE, Known

_CAFFE = {"channels": "bgr", "mean": [104.0, 117.0, 123.0]}
_KERAS_CAFFE = {"channels": "bgr", "mean": [103.939, 116.779, 123.68]}

_CLASSES = (1000, 1001)
"""Of ImageNet, with and without one for the background. A head for other classes may have been trained otherwise."""


@dataclass(frozen=True, slots=True)
class _Family:
    """layers: expressions, of which each is found in the name of a layer. rescales: it changes the values itself."""

    name: str
    layers: tuple[str, ...]
    values: Mapping[str, Any]
    rescales: bool = False


# The names that layers of Keras have in a graph of TensorFlow: "model/layer/operator".
_FAMILIES = (
    # https://github.com/forresti/SqueezeNet and the BVLC models: train_val.prototxt
    _Family("SqueezeNet of Caffe", (r"^fire2/squeeze1x1", r"^fire9/expand3x3"), _CAFFE),
    _Family("GoogLeNet of Caffe", (r"^inception_3a/3x3_reduce", r"^inception_5b/pool_proj"), _CAFFE),
    # https://github.com/onnx/models/tree/main/validated/vision/classification: imagenet_preprocess.py
    _Family(
        "a network of MXNet's Gluon, as in the ONNX model zoo",
        (r"^(resnetv[12]\d|mobilenetv2\d|squeezenet\d|vgg\d|densenet\d|alexnet\d)\w*_conv\d+_fwd$",),
        IMAGENET,
    ),
    _Family("EfficientNet-Lite", (r"(^|/)efficientnet-lite\d/model/",), {"scale": 1 / 128, "mean": 127 / 128}),
    # https://docs.pytorch.org/vision/stable/models.html: all weights of classifiers
    _Family("a network of torchvision", (r"'torchvision\.models\.[a-z]",), IMAGENET),
    _Family("a ResNet of torchvision or timm", (r"(^|/)layer4\.\d+[./]conv\d", r"^fc\.weight"), IMAGENET),
    _Family("a DenseNet of torchvision or timm", (r"(^|/)features[./].*denseblock4[./].*denselayer\d",), IMAGENET),
    # https://github.com/keras-team/keras/tree/master/keras/src/applications: preprocess_input
    _Family("a network of Keras that rescales pictures itself", (r"(^|/)rescaling(_\d+)?/",), {}, rescales=True),
    _Family("MobileNet of Keras", (r"(^|/)conv_pw_13(_bn|_relu)?/",), MINUS_ONE_TO_ONE),
    _Family("MobileNetV2 of Keras", (r"(^|/)block_16_project(_BN)?/",), MINUS_ONE_TO_ONE),
    _Family("Xception of Keras", (r"(^|/)block14_sepconv2(_bn|_act)?/",), MINUS_ONE_TO_ONE),
    _Family("Inception V3 of Keras", (r"(^|/)mixed9_1/", r"(^|/)mixed10/"), MINUS_ONE_TO_ONE),
    _Family("Inception-ResNet V2 of Keras", (r"(^|/)block8_10(_\w+)?/", r"(^|/)conv_7b"), MINUS_ONE_TO_ONE),
    _Family("ResNet V2 of Keras", (r"(^|/)conv5_block1_preact_(bn|relu)/",), MINUS_ONE_TO_ONE),
    _Family("DenseNet of Keras", (r"(^|/)conv5_block\d+_concat/",), IMAGENET),
    _Family("ResNet of Keras", (r"(^|/)conv5_block3_(add|out)/",), _KERAS_CAFFE),
    _Family("VGG of Keras", (r"(^|/)block5_conv3/",), _KERAS_CAFFE),
)


def known_by(layers: Sequence[str], classes: int | None, *, straight: bool) -> Known | None:
    """What a model of three channels is, by the names of its layers.

    classes: None where it has none. straight: its pictures meet a convolution first. A network that changes their
    values itself is none of those that are fed with changed ones.
    """
    if classes not in (*_CLASSES, None):
        return None
    for family in _FAMILIES:
        found = [next((each for each in layers if re.search(layer, each)), None) for layer in family.layers]
        if None not in found and family.rescales != straight:
            shown = (found[0] or "").strip("[]").split(", ")  # PyTorch's exporter lists classes
            said = next((each for each in shown if re.search(family.layers[0], each)), shown[0]).strip("'/")
            return Known(f"{family.name} (told by {said})", family.values)
    return None
