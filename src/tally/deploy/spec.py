"""What is deployed, whatever the target: one immutable object, validated as a whole."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, TypeVar, get_args

from tally.deploy.quantities import amount
from tally.errors import SpecError
from tally.masking import has_secret
from tally.media.images import MAX_PIXELS
from tally.models.reference import BATCH_LIMIT
from tally.serving.settings import KEYS
from tally.text import did_you_mean

Profile = Literal["dev-test", "production"]
Form = Literal["image", "pip", "conda", "containerfile"]

LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
"""A DNS label (RFC 1123)."""
SUBDOMAIN = re.compile(rf"(?=.{{1,253}}$){LABEL.pattern}(\.{LABEL.pattern})*")
"""A DNS name."""
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
"""Of Services the stricter kind of DNS label (RFC 1035) is asked."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
IMAGE = re.compile(
    r"[a-z0-9]+([.-][a-z0-9]+)*(:\d+)?(/[a-z0-9]+(([._]|__|-+)[a-z0-9]+)*)*(:\w[\w.-]{0,127})?(@sha256:[0-9a-f]{64})?",
    re.ASCII,
)
SENSITIVE = re.compile(r"(?i)secret|passw|token|credential|connection_string|_key$|^key$")

LEAST_MEMORY = 128 << 20
"""Bytes below which not even Python and one model fit."""
MOST_DRAIN = 3600.0

S = TypeVar("S", bound="DeploymentSpec")


@dataclass(frozen=True, slots=True)
class Environment:
    """What the container has: an image as it is, or a file that one is built from.

    value: the image's name, or the path of a pip requirements file, a conda file, a Containerfile.
    """

    form: Form
    value: str

    @classmethod
    def parse(cls, text: str) -> Environment:
        """From ``pip:FILE``, ``conda:FILE``, ``image:NAME`` or ``containerfile:FILE``. Raises ValueError."""
        form, _, value = text.partition(":")
        for known in get_args(Form):
            if form == known and value:
                return cls(known, value)
        raise ValueError(f"{text!r} is none of image:NAME, pip:FILE, conda:FILE and containerfile:FILE")

    @property
    def is_built(self) -> bool:
        """Whether the image has yet to be built."""
        return self.form != "image"

    def __str__(self) -> str:
        return f"{self.form}:{self.value}"


UNSAID = Environment("image", "")
"""Refused: nobody but the user knows what a model needs."""


@dataclass(frozen=True, kw_only=True)
class DeploymentSpec:
    """One endpoint. A target has a subclass with what is its own.

    name: of the endpoint: a DNS label, and part of its paths. model: as ``tally score --model`` takes it, or
    ``image:/path`` for one that the image holds. image: what an image is called that is built from ``environment``.
    replicas: (least, most); None: as the profile says. cpu, memory: Kubernetes quantities, of one replica. gpu: whole
    ones. max_batch, max_delay, drain, pages, background, max_pixels, task, labels, artifacts, settings, trust: as of
    ``tally serve``; settings are ``KEY=VALUE``, and labels and artifacts may be ``image:/path``, too.
    grpc_port: where clients reach it over gRPC; None: not at all.
    variables: of the environment, in the clear. secrets: names, whose meaning the target says.

    Raises SpecError with all that is wrong.
    """

    name: str
    model: str
    environment: Environment = UNSAID
    image: str | None = None
    profile: Profile = "dev-test"
    replicas: tuple[int, int] | None = None
    cpu: str = "1"
    memory: str = "2Gi"
    gpu: int = 0
    max_batch: int | None = None
    max_delay: float | None = None
    drain: float = 30.0
    grpc_port: int | None = None
    pages: Literal["first", "all"] = "first"
    background: tuple[int, int, int] | None = None
    max_pixels: int = MAX_PIXELS
    task: str | None = None
    labels: str | None = None
    artifacts: str | None = None
    settings: tuple[str, ...] = ()
    trust: bool = False
    variables: Mapping[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if wrong := list(self.problems()):
            raise SpecError(wrong)

    def problems(self) -> Iterator[str]:
        """One line for each thing that is wrong."""
        if not _NAME.fullmatch(self.name):
            yield (
                f"name: {self.name[:100]!r} is no DNS label: small letters, digits and '-', at most 63, beginning with "
                "a letter and not ending with '-'"
            )
        if self.profile not in get_args(Profile):
            yield f"profile: {self.profile!r} is neither dev-test nor production"
        yield from self._image_problems()
        yield from self._size_problems()
        if self.max_batch is not None and not 1 <= self.max_batch <= BATCH_LIMIT:
            yield f"max_batch: 1 to {BATCH_LIMIT}, not {self.max_batch}"
        if self.max_delay is not None and not 0 <= self.max_delay <= 60:
            yield f"max_delay: 0 to 60 seconds, not {self.max_delay}"
        if not 0 < self.drain <= MOST_DRAIN:
            yield f"drain: more than 0 and at most {MOST_DRAIN:g} seconds, not {self.drain:g}"
        if self.pages not in ("first", "all"):
            yield f"pages: first or all, not {self.pages!r}"
        if self.max_pixels < 1:
            yield f"max_pixels: 1 or more, not {self.max_pixels}"
        if self.grpc_port is not None and not self.least_port <= self.grpc_port <= 65535:
            yield f"grpc_port: {self.least_port} to 65535, not {self.grpc_port}"
        if self.grpc_port and self.grpc_port == self.http_port:
            yield f"grpc_port: {self.grpc_port} is the port of HTTP already"
        yield from (f"settings: {each!r} is not of the form KEY=VALUE" for each in self.settings if "=" not in each[1:])
        yield from self._variable_problems()

    def _image_problems(self) -> Iterator[str]:
        if self.environment == UNSAID:
            yield "environment: say what the container has: image:NAME, pip:FILE, conda:FILE, containerfile:FILE"
        elif self.environment.is_built:
            if self.image is None:
                yield f"image: what is built from {self.environment} needs a name: registry.example.com/NAME:TAG"
            elif not IMAGE.fullmatch(self.image):
                yield f"image: {self.image!r} is no name of an image, such as registry.example.com/plastic:1"
        else:
            if self.image is not None:
                yield f"image: the environment {self.environment} names the image already"
            if not IMAGE.fullmatch(self.environment.value):
                yield f"environment: {self.environment.value!r} is no name of an image"

    def _size_problems(self) -> Iterator[str]:
        try:
            cores = amount(self.cpu)
        except ValueError:
            yield f"cpu: {self.cpu!r} is no number of cores, such as 2, 0.5 or 500m"
        else:
            if not 0 < cores <= 1024 or cores * 1000 % 1:
                yield f"cpu: {self.cpu!r} is not from 1m (a thousandth of a core) to 1024 cores"
        try:
            size = amount(self.memory)
        except ValueError:
            yield f"memory: {self.memory!r} is no quantity, such as 512Mi, 2Gi or 4G"
        else:
            if size < LEAST_MEMORY or size % 1:
                yield f"memory: {self.memory!r} is {size:f} bytes, and less than 128Mi is of no use; write 2Gi, say"
        if not 0 <= self.gpu <= 64:
            yield f"gpu: 0 to 64 whole ones, not {self.gpu}"
        least, most = self.replicas or (1, 1)
        if not 1 <= least <= most <= 1000:
            yield f"replicas: from 1 or more to at most 1000, not {least}..{most}"

    def _variable_problems(self) -> Iterator[str]:
        for name, value in self.variables.items():
            if not _VARIABLE.fullmatch(name):
                yield f"variables: {name!r} cannot be the name of a variable"
            elif name == KEYS or SENSITIVE.search(name) or has_secret(f"{name}={value}") or has_secret(value):
                yield f"variables: {name} is a secret, and would stand in the clear: give it with --secret"

    least_port: ClassVar[int] = 1
    """0, where a port that is free may be taken."""

    @property
    def http_port(self) -> int:
        """Where clients reach it over HTTP."""
        return 80

    @property
    def container_image(self) -> str:
        """The image that containers run."""
        return self.image or self.environment.value


def made(kind: type[S], target: str, values: Mapping[str, Any]) -> S:
    """A target's spec from what the user gave, by the fields' names.

    Raises SpecError with all that is wrong, also where a value is not for this target.
    """
    known = {each.name for each in fields(kind)}
    given = {name: value for name, value in values.items() if name in known}
    others = [name for name in values if name not in known]
    wrong = [f"{name}: it is not for the target {target}{did_you_mean(name, known)}" for name in others]
    try:
        spec = kind(**given)
    except SpecError as error:
        raise SpecError([*wrong, *error.problems], hint=error.hint) from None
    if wrong:
        raise SpecError(wrong)
    return spec
