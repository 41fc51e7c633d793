"""The losses of style transfer: the distance of textures from the style's, and of the scene from the content's.

Style is compared by Gram matrices of filter responses (which features occur together, at any place), after
Gatys, Ecker, Bethge 2016. The filters are those of a pretrained VGG, or random: one layer of them at several
scales is enough for textures (Ustyuzhaninov, Brendel, Gatys, Bethge 2016, https://arxiv.org/abs/1606.00021).
All losses are relative to the energy of the target, so that the same weights fit every picture.

Pictures are tensors ``float32[batch, 3, height, width]``, RGB in 0..255.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, TypeAlias

from tally.errors import ModelLoadError
from tally.scorers.torch.network import read_pickle

Tensor: TypeAlias = Any


class PerceptualLoss(ABC):
    """Compares pictures with the style picture that :meth:`set_style` was given."""

    name: str

    @abstractmethod
    def responses(self, pictures: Tensor) -> list[Tensor]:
        """Features ``float32[batch, features, height, width]``, one tensor for each scale."""

    @abstractmethod
    def content(self, restyled: Tensor, responses: list[Tensor], pictures: Tensor) -> Tensor:
        """The distance of the scene from that of ``pictures``: about 1 for another scene.

        responses: those of ``restyled``.
        """

    def set_style(self, style: Tensor) -> None:
        """Compute the targets from the style picture, a batch of one."""
        self._targets = [gram(features) for features in self.responses(style)]

    def losses(self, restyled: Tensor, pictures: Tensor) -> dict[str, Tensor]:
        """``style``, ``content`` and ``smoothness`` (total variation: mean difference of neighbours, 0..1)."""
        responses = self.responses(restyled)
        style = sum(
            ((gram(features) - target) ** 2).sum() / (target**2).sum()
            for features, target in zip(responses, self._targets, strict=True)
        )
        across, down = differences(restyled)
        return {
            "style": style / len(self._targets),
            "content": self.content(restyled, responses, pictures),
            "smoothness": (across.abs().mean() + down.abs().mean()) / 255,
        }


def gram(features: Tensor) -> Tensor:
    """The mean product ``float32[features, features]`` of each two features, over all places of all pictures.

    Over the whole batch, because single pictures may be dark or bright, but together have the style's palette.
    """
    flat = features.transpose(0, 1).flatten(1)
    return flat @ flat.T / flat.shape[1]


def differences(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Each pixel's difference from its neighbours to the left and above."""
    return pictures[..., 1:] - pictures[..., :-1], pictures[..., 1:, :] - pictures[..., :-1, :]


class RandomFilters(PerceptualLoss):
    """Losses by random filters; nothing is downloaded.

    Half of the filters are strokes (a wave across, longer along) of random direction, width, phase and colour; half
    are white noise of 3 × 3 pixels. They are calibrated with the style picture at each scale: every filter has unit
    variance there, and a threshold among its responses, so that it responds to a part of the picture only.
    """

    name = "random filters"
    filters, side, scales = 96, 9, 4

    def __init__(self, style: Tensor, seed: int) -> None:
        import torch
        from torch.nn import functional

        generator = torch.Generator().manual_seed(seed)
        self._banks = []
        scaled = style.cpu() / 127.5 - 1
        for _ in range(self.scales):
            bank = self._draw(generator)
            responses = functional.conv2d(scaled, bank)[0].flatten(1)
            spread = responses.std(1) + 1e-6
            shares = 0.2 + 0.75 * torch.rand(self.filters, generator=generator)
            ordered = responses.sort(1).values / spread[:, None]
            thresholds = ordered.gather(1, (shares * (ordered.shape[1] - 1)).long()[:, None])[:, 0]
            self._banks.append(((bank / spread[:, None, None, None]).to(style.device), -thresholds.to(style.device)))
            scaled = functional.avg_pool2d(scaled, 2)
        luminance = functional.avg_pool2d(_luminance(style), self.blur)
        self._mean, self._spread = luminance.mean(), luminance.std()
        self.set_style(style)

    blur = 6
    """In pixels: smaller detail belongs to the style."""

    def _draw(self, generator: Any) -> Tensor:
        """``float32[filters, 3, side, side]``."""
        import torch

        strokes, margin = self.filters // 2, (self.side - 3) // 2
        at = torch.arange(self.side) - self.side // 2.0
        down, across = torch.meshgrid(at, at, indexing="ij")
        direction, size, phase = torch.rand((3, strokes, 1, 1), generator=generator)
        direction, phase = math.pi * direction, 2 * math.pi * phase
        wavelength = 2.5 + 0.7 * self.side * size  # pixels
        width = (0.4 * wavelength).clamp(max=0.3 * self.side)
        length = (0.9 * wavelength).clamp(max=0.33 * self.side)
        aside = across * direction.cos() + down * direction.sin()
        along = down * direction.cos() - across * direction.sin()
        window = torch.exp(-((aside / width) ** 2 + (along / length) ** 2) / 2)
        wave = window * torch.cos(2 * math.pi * aside / wavelength + phase)
        wave -= window * wave.mean((1, 2), keepdim=True) / window.mean((1, 2), keepdim=True)
        colour = torch.randn((strokes, 3, 1, 1), generator=generator)
        colour[::2] = 1  # every other one responds to brightness only
        bank = torch.zeros((self.filters, 3, self.side, self.side))
        bank[:strokes] = wave[:, None] * colour
        noise = torch.randn((self.filters - strokes, 3, 3, 3), generator=generator)
        bank[strokes:, :, margin : margin + 3, margin : margin + 3] = noise
        return bank

    def responses(self, pictures: Tensor) -> list[Tensor]:
        from torch.nn import functional

        found, scaled = [], pictures / 127.5 - 1
        for weight, bias in self._banks:
            found.append(functional.relu(functional.conv2d(scaled, weight, bias)))
            scaled = functional.avg_pool2d(scaled, 2)
        return found

    def content(self, restyled: Tensor, responses: list[Tensor], pictures: Tensor) -> Tensor:
        """By blurred luminance and its edges, after giving the picture the style's brightness and contrast."""
        from torch.nn import functional

        given = functional.avg_pool2d(_luminance(pictures), self.blur)
        contrast = given.std((2, 3), keepdim=True) + 0.02
        wanted = (given - given.mean((2, 3), keepdim=True)) / contrast * self._spread + self._mean
        wanted = wanted.clamp(0, 1)
        shown = functional.avg_pool2d(_luminance(restyled), self.blur)
        edges = sum(
            ((one - other) ** 2).mean() for one, other in zip(differences(shown), differences(wanted), strict=True)
        )
        return (((shown - wanted) ** 2).mean() + 0.3 * edges) / self._spread**2


def _luminance(pictures: Tensor) -> Tensor:
    """``float32[batch, 1, height, width]`` in 0..1."""
    red, green, blue = pictures.split(1, dim=1)
    return (0.299 * red + 0.587 * green + 0.114 * blue) / 255


class Vgg(PerceptualLoss):
    """A VGG-16 or VGG-19 in torchvision's layout, up to the fourth block."""

    def __init__(self, style: Tensor, weights: Path) -> None:
        import torch

        state = _read_state(weights)
        # The two differ from the third block on, where VGG-19 has a convolution in the place of a pooling.
        self.name = "vgg19" if "features.16.weight" in state else "vgg16"
        third, fourth = (4, 3) if self.name == "vgg19" else (3, 3)
        self._blocks: list[list[tuple[Tensor, ...]]] = []
        problems, index, inputs = [], 0, 3
        for outputs, count in ((64, 2), (128, 2), (256, third), (512, fourth)):
            block = []
            for _ in range(count):
                pair = []
                for kind, shape in (("weight", (outputs, inputs, 3, 3)), ("bias", (outputs,))):
                    key = f"features.{index}.{kind}"
                    tensor = state.get(key)
                    if not isinstance(tensor, torch.Tensor):
                        problems.append(f"{key} is missing")
                    elif tuple(tensor.shape) != shape:
                        problems.append(f"{key} has the shape {list(tensor.shape)}, not {list(shape)}")
                    else:
                        pair.append(tensor.to(style.device, torch.float32))
                block.append(tuple(pair))
                index, inputs = index + 2, outputs
            self._blocks.append(block)
            index += 1  # the pooling
        if problems:
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            raise ModelLoadError(
                f"{weights}: not the weights of a vgg16 or vgg19: {'; '.join(problems[:3])}{more}",
                hint="Give the state dict of torchvision's vgg16 or vgg19, not of the _bn variants.",
            )
        self._mean = torch.tensor([0.485, 0.456, 0.406], device=style.device)[:, None, None]
        self._spread = torch.tensor([0.229, 0.224, 0.225], device=style.device)[:, None, None]
        self.set_style(style)

    def responses(self, pictures: Tensor) -> list[Tensor]:
        from torch.nn import functional

        found, x = [], (pictures / 255 - self._mean) / self._spread
        for number, block in enumerate(self._blocks):
            if number:
                x = functional.max_pool2d(x, 2)
            for weight, bias in block:
                x = functional.relu(functional.conv2d(x, weight, bias, padding=1))
            found.append(x)
        return found

    def content(self, restyled: Tensor, responses: list[Tensor], pictures: Tensor) -> Tensor:
        """By the features of the third block, at each place."""
        wanted = self.responses(pictures)[2]
        return ((responses[2] - wanted) ** 2).mean() / (wanted**2).mean()


def _read_state(path: Path) -> dict[str, Any]:
    """The state dict in a file. Raises ModelLoadError."""
    if not path.exists():
        raise ModelLoadError(f"there is no file {path}", hint="--vgg names a file of weights, a .pth.")
    state = read_pickle(path)
    if not isinstance(state, dict):
        raise ModelLoadError(
            f"{path} holds a {type(state).__name__}, not a state dict", hint="Save model.state_dict(), not the model."
        )
    return state
