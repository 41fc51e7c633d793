"""``tally serve``: models online."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from tally.cli import completion, values
from tally.cli import options as shared
from tally.cli.console import pairs, say
from tally.serving.settings import KEYS


@click.command(short_help="Serve models online: HTTP and gRPC.")
@click.argument(
    "models", shell_complete=completion.models, nargs=-1, required=True, metavar="[NAME=]MODEL|FILE.yaml..."
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for all.")
@click.option("--port", type=int, default=8080, show_default=True, help="Port to listen on; 0 for any that is free.")
@click.option("--grpc-port", type=int, help="Port for gRPC; 0 for any that is free.  [default: no gRPC]")
@click.option(
    "-r",
    "--replicas",
    default="1",
    show_default=True,
    callback=values.replicas,
    help="Processes for each model; 0..4: as needed.",
)
@click.option("--max-batch", type=int, help="Items scored together.  [default: as the model says]")
@click.option(
    "--max-delay",
    default="5ms",
    show_default=True,
    callback=values.delay,
    help="How long a batch may wait for more items.",
)
@click.option("--max-queue", type=int, default=1024, show_default=True, help="Requests that may wait for a replica.")
@click.option("--max-body", type=int, default=64, show_default=True, help="MiB that a request may have.")
@click.option(
    "--timeout", default="60s", show_default=True, callback=values.duration, help="From a request to its answer."
)
@click.option(
    "--idle", default="5m", show_default=True, callback=values.duration, help="After this, surplus replicas end."
)
@click.option(
    "--drain", default="30s", show_default=True, callback=values.duration, help="For what is in work at the end."
)
@click.option("--threads", type=int, default=1, show_default=True, help="Threads of numeric libraries in a replica.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda[:N] or tensorrt[:N].")
@click.option("-t", "--task", shell_complete=completion.tasks, help="As with 'tally score'.")
@click.option("--labels", help="As with 'tally score'.")
@click.option("--artifacts", help="As with 'tally score'.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="An option of the model, e.g. top=5.")
@click.option("--trust", is_flag=True, help="Open models whose opening runs code that they carry.")
@click.option("--payloads", metavar="PLACE", help="A folder or bucket for a sample of requests with their answers.")
@click.option(
    "--payload-share", default="100%", show_default=True, callback=values.share, help="How large that sample is."
)
@shared.of_pictures
@click.option(
    "--keys", "key_file", type=click.Path(path_type=Path), help=f"A file with a key a line; or put one into {KEYS}."
)
@click.option("--certificate", type=click.Path(path_type=Path), help="PEM file of the certificate, for TLS.")
@click.option("--private-key", type=click.Path(path_type=Path), help="PEM file of its private key.")
def serve(
    models: tuple[str, ...],
    host: str,
    port: int,
    grpc_port: int | None,
    replicas: tuple[int, int],
    max_batch: int | None,
    max_delay: float,
    max_queue: int,
    max_body: int,
    timeout: float,
    idle: float,
    drain: float,
    threads: int,
    device: str,
    task: str | None,
    labels: str | None,
    artifacts: str | None,
    assignments: tuple[str, ...],
    trust: bool,
    payloads: str | None,
    payload_share: float,
    key_file: Path | None,
    certificate: Path | None,
    private_key: Path | None,
    **pictures: Any,
) -> None:
    """Serve MODELs online, until a signal ends it.

    \b
    A MODEL is what 'tally score --model' takes; NAME=MODEL says what clients call it.
    A FILE.yaml holds a list, models, each with a model, and options of its own.
    POST /score takes a picture, rows, or what a script's run() takes. /v2 is the Open Inference
    Protocol, /v1/models TensorFlow Serving's. /ui shows what can be asked, /metrics how it goes.
    With SIGHUP it looks up its models again, and serves what they are now.
    """
    from tally import logs
    from tally.optional import needed
    from tally.serving import declared
    from tally.serving.settings import Limits, ModelSettings, ServeSettings
    from tally.storage import normalised

    with needed("serving needs", "server"):
        from tally.serving.server import serve as run
    options: dict[str, Any] = {"task": task, "labels": labels, "artifacts": artifacts, "trust": trust}
    options["settings"] = pairs("--set", assignments)
    limits = Limits(
        replicas=replicas,
        max_batch=max_batch,
        max_delay=max_delay,
        max_queue=max_queue,
        timeout=timeout,
        idle=idle,
        threads=threads,
        device=device,
        payloads=None if payloads is None else normalised(payloads),
        payload_share=payload_share,
        **{name: value for name, value in pictures.items() if value is not None},
    )
    wanted: list[ModelSettings] = []
    for text in models:
        if declared.is_file(text):
            wanted += declared.read(text, options, limits)
        else:
            name, model = _parts(text)
            wanted.append(ModelSettings(name or declared.known_as(model, options), model, options, limits))
    settings = ServeSettings(
        tuple(wanted),
        host=host,
        port=port,
        grpc_port=grpc_port,
        keys=_keys(key_file),
        max_body=max_body << 20,
        certificate=certificate,
        private_key=private_key,
        drain=drain,
    )
    logs.log_to_stderr()
    run(settings, say=say)


def _parts(text: str) -> tuple[str, str]:
    """The name and the model of ``NAME=MODEL``; no name of a MODEL alone."""
    found = re.fullmatch(r"([A-Za-z0-9][\w.-]*)=(.+)", text)
    return (found[1], found[2]) if found else ("", text)


def _keys(file: Path | None) -> tuple[str, ...]:
    from tally.errors import SpecError
    from tally.serving.keys import keys_now

    texts: list[str] = [*keys_now()]
    if file is not None:
        try:
            texts += file.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise SpecError(
                f"--keys: {file} cannot be read: {error}", hint="--keys names a text file, one key on each line."
            ) from None
    return tuple(key for text in texts if (key := text.strip()))
