"""What runs in a container: the command, and how an image for it is built."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tally
from tally.deploy.quantities import amount
from tally.deploy.shipping import IN_IMAGE, PLACE, Shipped
from tally.deploy.spec import DeploymentSpec
from tally.errors import SpecError, StorageError
from tally.media.images import MAX_PIXELS
from tally.models.package import write_package
from tally.storage import failure
from tally.text import expanded

CONTAINERFILE = "Containerfile"
PYTHON = "docker.io/library/python:3.12-slim"
"""The image that others begin with, deploy/Containerfile's as well."""
_CONDA = "docker.io/condaforge/miniforge3:latest"
_PREFIX = "/opt/environment"


def command(spec: DeploymentSpec, shipped: Shipped, *, port: int, grpc_port: int | None) -> list[str]:
    """The container's command. port, grpc_port: where it listens within."""
    words = ["tally", "serve", f"{spec.name}={shipped.served}", "--host", "0.0.0.0", "--port", str(port)]  # noqa: S104
    if grpc_port is not None:
        words += ["--grpc-port", str(grpc_port)]
    words += ["--drain", _seconds(spec.drain), "--threads", str(max(1, int(amount(spec.cpu))))]
    if spec.max_batch is not None:
        words += ["--max-batch", str(spec.max_batch)]
    if spec.max_delay is not None:
        words += ["--max-delay", _seconds(spec.max_delay)]
    if spec.pages != "first":
        words += ["--pages", spec.pages]
    if spec.background is not None:
        words += ["--background", "#{:02x}{:02x}{:02x}".format(*spec.background)]
    if spec.max_pixels != MAX_PIXELS:
        words += ["--max-pixels", str(spec.max_pixels)]
    if shipped.local is not None:
        return words + ["--trust"] * spec.trust  # its package there says the rest
    if spec.task is not None:
        words += ["--task", spec.task]
    for flag, place in (("--labels", shipped.labels), ("--artifacts", shipped.artifacts)):
        if place is not None:
            words += [flag, place]
    for each in spec.settings:
        words += ["--set", each]
    return words + ["--trust"] * spec.trust


def _seconds(value: float) -> str:
    return f"{value:.6f}".rstrip("0").rstrip(".") + "s"


@dataclass(frozen=True, slots=True)
class Build:
    """How an image is made. containerfile: its text; None where the user has one. files: what belongs beside it, by the
    names that it uses. steps: the commands to run there."""

    containerfile: str | None
    files: Sequence[tuple[str, Path]]
    shipped: Shipped
    steps: Sequence[str]

    def write(self, folder: Path) -> None:
        """Write all that the image is built from to a folder. Raises SpecError, StorageError."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self.containerfile is not None:
                (folder / CONTAINERFILE).write_text(self.containerfile, "utf-8")
            for name, path in self.files:
                shutil.copyfile(path, folder / name)
            if self.shipped.local is not None:
                shutil.rmtree(folder / "model", ignore_errors=True)
                write_package(self.shipped.local, folder / "model")
        except StorageError:
            raise
        except OSError as error:
            raise failure("write", str(folder), error) from None


def build(spec: DeploymentSpec, shipped: Shipped, folder: Path, deploy: Sequence[str]) -> Build:
    """How the image of an environment that is a file is built.

    folder: where that is going to be written. deploy: the words of the command that deploys the image afterwards, but
    for its model and environment. Raises SpecError where the environment's file is not there.
    """
    environment = spec.environment
    source = expanded(environment.value)
    if not source.is_file():
        raise SpecError(f"environment: there is no file {environment.value!r}", hint=f"--env {environment.form}:FILE")
    image = spec.container_image
    model = f"{IN_IMAGE}{PLACE}" if shipped.local is not None else spec.model
    then = shlex.join(["tally", "deploy", model, *deploy, "--env", f"image:{image}"])
    if environment.form == "containerfile":
        steps = [shlex.join(["docker", "build", "-f", str(source), "-t", image, str(source.parent)])]
        return Build(None, (), shipped, [*steps, shlex.join(["docker", "push", image]), then])
    steps = [shlex.join(["docker", "build", "-f", str(folder / CONTAINERFILE), "-t", image, str(folder)])]
    steps += [shlex.join(["docker", "push", image]), then]
    name = "requirements.txt" if environment.form == "pip" else "environment.yml"
    return Build(_containerfile(spec, name, shipped), [(name, source)], shipped, steps)


def _containerfile(spec: DeploymentSpec, name: str, shipped: Shipped) -> str:
    extras = "server" if spec.grpc_port is None else "server,grpc"
    wanted = [f"tally-scoring[{extras}]=={tally.__version__}"]
    if shipped.requirement is not None:
        wanted.append(shipped.requirement)
    if spec.environment.form == "pip":
        lines = [
            f"FROM {PYTHON}",
            f"COPY {name} /opt/tally/{name}",
            f"RUN pip install --no-cache-dir {shlex.join(wanted)} -r /opt/tally/{name}",
        ]
    else:
        lines = [
            f"FROM {_CONDA}",
            f"COPY {name} /opt/tally/{name}",
            f"RUN conda env create --yes -p {_PREFIX} -f /opt/tally/{name} && conda clean --all --yes",
            f"ENV PATH={_PREFIX}/bin:$PATH",
            f"RUN {_PREFIX}/bin/python -m pip install --no-cache-dir {shlex.join(wanted)}",
        ]
    if shipped.local is not None:
        lines.append(f"COPY model {PLACE}")
    # What scripts write to their working directory goes here. Any user may: Kubernetes chooses one without privileges.
    lines += ["RUN mkdir -m 1777 /work", "WORKDIR /work", 'CMD ["tally", "--help"]']
    return "\n".join(lines) + "\n"
