"""A small network of PyTorch that sees colours, to fine-tune."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CODE = """
import torch
from torch import nn


class Small(nn.Module):
    def __init__(self, width=6, drop=0.0):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 10, 3, stride=2, padding=1), nn.ReLU(), nn.Dropout(drop),
        )

    def forward(self, pictures):
        return self.body(pictures)


class Vector(Small):
    def forward(self, pictures):
        return self.body(pictures).mean((2, 3))


class Classes(Vector):
    def forward(self, pictures):
        return super().forward(pictures).softmax(1)
"""


def network(folder: Path, name: str = "Small", **arguments: Any) -> Any:
    """The class in ``folder/net.py``, made with weights that are always the same, in inference mode."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "net.py").write_text(CODE)
    names: dict[str, Any] = {}
    exec(CODE, names)
    torch.manual_seed(4)
    return names[name](**arguments).eval()


def package(folder: Path, name: str = "Small") -> Path:
    """A model package with its weights as safetensors: pictures of 16 × 16 to a map of 10 features."""
    from safetensors.torch import save_file

    save_file(network(folder, name, width=8).state_dict(), folder / "weights.safetensors")
    (folder / "tally.yaml").write_text(
        "kind: torch\nfile: weights.safetensors\noptions:\n"
        f"  module: net.py:{name}\n  arguments: {{width: 8}}\n  preprocess: {{size: 16, scale: 1/255}}\n"
    )
    return folder
