"""Steps of fine-tuning per second: two workers beside one, and beside a script of one's own under torchrun.

python benchmarks/finetune.py [--steps 16] [--batch 32] [--size 96] [--rounds 3] [--only torchrun-2]
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from _machine import Runs, cores, environment, introduce, scratch, show

CAVEATS = """
The network is the body of a MobileNet (v1, half as wide) with random weights; the pictures are noise, 160 JPEG files.
How well it learns does not matter here. A step decodes its pictures, works out the gradient, and goes one step of plain
gradient descent.

"tally" is what `tally train retrain --fine-tune` does from the end of its first step to that of its last: checkpoints,
metrics and event files count, and the evaluation after the last step. What comes before and after does not.

"torchrun" is the script in this file, as one writes it: a DataLoader with a process beside each worker,
DistributedDataParallel, a worker's whole share of a step through the network at once. It evaluates and keeps nothing.

Each worker has as many threads for PyTorch as there are cores for it: on a machine of two cores one worker has both of
them already, and two have one each. What two workers gain over one is then what threads lose to each other.

Contenders take turns. Whatever else the machine does disturbs them.
"""
NETWORK = """
from torch import nn


def layer(inputs, outputs, stride):
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False), nn.BatchNorm2d(inputs), nn.ReLU(),
        nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
    )


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        sizes = [(16, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2)]
        sizes += [(256, 256, 1)] * 5 + [(256, 512, 2), (512, 512, 1)]
        first = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Sequential(first, *(layer(*each) for each in sizes))

    def forward(self, pictures):
        return self.body(pictures).mean((2, 3))
"""
SCRIPT = """
import os, random, sys, time
import numpy as np, torch
from pathlib import Path
from PIL import Image
from torch import distributed, nn
from torch.utils.data import DataLoader, Dataset

photos, size, batch, steps = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
sys.path.insert(0, sys.argv[5])
from net import Body

distributed.init_process_group("gloo")
rank, world = distributed.get_rank(), distributed.get_world_size()
files = [(path, at) for at, folder in enumerate(sorted(photos.iterdir())) for path in sorted(folder.iterdir())]


class Drawn(Dataset):
    def __init__(self):
        rng = random.Random(1)
        rows = [rng.randrange(len(files)) for _ in range(steps * batch)]
        share = batch // world
        self.rows = [row for step in range(steps) for row in rows[step * batch + rank * share :][:share]]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, at):
        path, label = files[self.rows[at]]
        picture = np.asarray(Image.open(path).convert("RGB").resize((size, size)), np.float32) / 255
        return torch.from_numpy(picture.transpose(2, 0, 1).copy()), label


network = nn.parallel.DistributedDataParallel(nn.Sequential(Body(), nn.Linear(512, 2)))
network.eval()
optimizer = torch.optim.SGD(network.parameters(), lr=0.001)
began = None
for pictures, labels in DataLoader(Drawn(), batch // world, num_workers=1):
    loss = nn.functional.cross_entropy(network(pictures), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if began is None:
        began = time.monotonic()
if rank == 0:
    print("seconds", time.monotonic() - began)
distributed.destroy_process_group()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"steps": 16, "batch": 32, "size": 96, "rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", help="contenders beside tally-1, with commas between them")
    given = parser.parse_args()
    introduce(
        f"finetune: {given.steps} steps of {given.batch} pictures, {given.size} x {given.size}, on the CPU", CAVEATS
    )
    with scratch() as folder:
        prepare(folder)
        contenders: dict[str, Callable[[], float]] = {
            "tally-1": lambda: of_tally(folder, given, 1),
            "tally-2": lambda: of_tally(folder, given, 2),
            "torchrun-1": lambda: of_torchrun(folder, given, 1),
            "torchrun-2": lambda: of_torchrun(folder, given, 2),
        }
        if given.only:
            contenders = {name: contenders[name] for name in ("tally-1", *given.only.split(","))}
        rates: Runs = {name: [] for name in contenders}
        for _ in range(given.rounds):
            for name, run in contenders.items():
                rates[name].append((given.steps - 1) / run())
    for first in ("tally-2", "tally-1"):
        if first in rates:
            show("steps", rates, first=first, unit="per second, more is better")


def prepare(folder: Path) -> None:
    """Pictures in two folders, and the network as a package."""
    import numpy as np
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    rng = np.random.default_rng(1)
    for label in ("a", "b"):
        (folder / "photos" / label).mkdir(parents=True)
        for number in range(80):
            coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).resize((320, 240))
            coarse.save(folder / "photos" / label / f"{number:03d}.jpg", quality=90)
    (folder / "net").mkdir()
    (folder / "net" / "net.py").write_text(NETWORK)
    sys.path.insert(0, str(folder / "net"))
    from net import Body  # type: ignore[import-not-found]

    torch.manual_seed(1)
    save_file(Body().state_dict(), folder / "net" / "net.safetensors")


def of_tally(folder: Path, given: argparse.Namespace, workers: int) -> float:
    """Seconds from the end of the first step to that of the last."""
    (folder / "net" / "tally.yaml").write_text(
        "kind: torch\nfile: net.safetensors\noptions:\n  module: net.py:Body\n"
        f"  preprocess: {{size: {given.size}, resize: squash, scale: 1/255}}\n"
    )
    program = (
        "import json, sys, time\n"
        "from tally.training.retrain import retraining\n"
        "if __name__ == '__main__':\n"
        "    image_dir, backbone, cache, steps, batch, workers = sys.argv[1:]\n"
        "    parameters = retraining.Parameters(how_many_training_steps=int(steps), train_batch_size=int(batch),\n"
        "        learning_rate=0.001, validation_batch_size=1, eval_step_interval=1_000_000)\n"
        "    at = {}\n"
        "    watcher = retraining.Watcher(evaluated=lambda each: at.setdefault(each.step, time.monotonic()))\n"
        "    given = retraining.Retraining(image_dir=image_dir, backbone=backbone, bottleneck_dir=cache,\n"
        "        fine_tune=True, final_test=False, parameters=parameters)\n"
        "    retraining.retrain(given, workers=int(workers), device='cpu', watcher=watcher)\n"
        "    print('seconds', max(at.values()) - min(at.values()))\n"
    )
    (folder / "with_tally.py").write_text(program)
    values = [folder / "photos", folder / "net", folder / "cache", given.steps, given.batch, workers]
    return seconds([sys.executable, str(folder / "with_tally.py"), *map(str, values)], environment(folder / "home"))


def of_torchrun(folder: Path, given: argparse.Namespace, workers: int) -> float:
    """Seconds from the end of the first step to that of the last."""
    script = folder / "with_torchrun.py"
    script.write_text(SCRIPT)
    values = [folder / "photos", given.size, given.batch, given.steps, folder / "net"]
    threads = os.environ | {"OMP_NUM_THREADS": str(max(1, cores() // workers))}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={workers}",
        str(script),
    ]
    return seconds([*command, *map(str, values)], threads)


def seconds(command: list[str], variables: dict[str, str]) -> float:
    ran = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=1800)
    found = re.search(r"^seconds (\S+)$", ran.stdout, re.MULTILINE)
    if found is None:
        raise SystemExit(f"{' '.join(command)}\n{ran.stdout}\n{ran.stderr}")
    return float(found[1])


if __name__ == "__main__":
    main()
