"""A classifier of the size of MobileNetV2: inverted residuals of 3.5 million weights."""

from __future__ import annotations

from typing import Any

from torch import nn


def _conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    padding = kernel // 2
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(),
    ]


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = inputs * expand
        first = _conv(inputs, wide) if expand > 1 else []
        self.body = nn.Sequential(*first, *_conv(wide, wide, 3, stride, wide), *_conv(wide, outputs)[:2])
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Any) -> Any:
        return x + self.body(x) if self.adds else self.body(x)


class Mobile(nn.Module):
    """Pictures ``[n, 3, 224, 224]`` to ``[n, 1000]`` logits."""

    def __init__(self) -> None:
        super().__init__()
        layers, inputs = _conv(3, 32, 3, 2), 32
        for expand, outputs, count, stride in (
            (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
        ):  # fmt: skip
            for at in range(count):
                layers.append(_Block(inputs, outputs, stride if at == 0 else 1, expand))
                inputs = outputs
        self.features = nn.Sequential(*layers, *_conv(inputs, 1280))
        self.classifier = nn.Linear(1280, 1000)

    def forward(self, x: Any) -> Any:
        return self.classifier(self.features(x).mean((2, 3)))
