"""``tally predict`` and ``tally load``: ask an endpoint, once and very often."""

from __future__ import annotations

import json
import os
from pathlib import Path
from urllib.parse import urlsplit

import click

from tally.cli import values
from tally.cli.console import say
from tally.network import is_loopback
from tally.serving.settings import KEYS


@click.command(short_help="Have an endpoint score files.")
@click.argument("url")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
@click.option("--name", help="What the input is called, where the protocol has names.  [default: image]")
@click.option("--endpoint-key", envvar=KEYS, help=f"The endpoint's key; better kept in {KEYS}.")
@click.option("--timeout", default="60s", show_default=True, callback=values.duration, help="To wait for an answer.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Where to write the answer, as it came.")
def predict(
    url: str, files: tuple[Path, ...], name: str | None, endpoint_key: str | None, timeout: float, out: Path | None
) -> int:
    """Have the endpoint at URL score each FILE, and print what it answers.

    \b
    http://HOST:PORT                        POST /score, the file as it is
    http://HOST:PORT/v2/models/NAME         Open Inference Protocol
    http://HOST:PORT/v1/models/NAME         TensorFlow Serving
    A .csv or .json file holds rows.
    """
    import httpx2

    from tally.serving.requests import cannot_be_asked, request_of

    if out is not None and len(files) > 1:
        raise click.UsageError("--out takes one answer, and there are several files")
    failed = 0
    for file in files:
        request = request_of(url, file, name=name)
        headers = dict(request.headers) | ({"Authorization": f"Bearer {endpoint_key}"} if endpoint_key else {})
        try:
            answer = httpx2.post(
                request.url,
                content=request.body,
                headers=headers,
                timeout=timeout,
                trust_env=not is_loopback(urlsplit(request.url).hostname or ""),
            )
        except httpx2.HTTPError as error:
            raise cannot_be_asked(request.url, error) from None
        failed += answer.status_code >= 400
        if out is not None and answer.status_code < 400:
            out.write_bytes(answer.content)
            continue
        kind = answer.headers.get("content-type", "")
        text = _shown(answer.content, kind)
        status = "" if answer.status_code < 400 else f"status {answer.status_code}: "
        say((f"{file}: " if len(files) > 1 else "") + status + text, err=answer.status_code >= 400)
    return 1 if failed else 0


def _shown(content: bytes, kind: str) -> str:
    if kind.startswith(("application/json", "text/")):
        try:
            return json.dumps(json.loads(content), ensure_ascii=False)
        except ValueError:
            return content.decode("utf-8", "replace")
    return f"{len(content):,} bytes of {kind or 'no said type'}; --out writes them to a file"


@click.command(short_help="See how much load an endpoint takes.")
@click.argument("url")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-c", "--concurrency", type=click.IntRange(1, 10_000), default=16, show_default=True, help="Clients.")
@click.option("--seconds", default="10s", show_default=True, callback=values.duration, help="How long.")
@click.option("--rate", type=float, help="Requests a second; by default, as many as are answered.")
@click.option("--name", help="What the input is called, where the protocol has names.  [default: image]")
@click.option("--endpoint-key", envvar=KEYS, help=f"The endpoint's key; better kept in {KEYS}.")
@click.option("--timeout", default="60s", show_default=True, callback=values.duration, help="To wait for an answer.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def load(
    url: str,
    file: Path,
    concurrency: int,
    seconds: float,
    rate: float | None,
    name: str | None,
    endpoint_key: str | None,
    timeout: float,
    as_json: bool,
) -> int:
    """Send FILE to the endpoint at URL again and again, and say how it was answered.

    The URL is as for 'tally predict'. What this generator can reach at most is measured first, and said.
    """
    from tally.serving import load as loads
    from tally.serving.requests import request_of

    request = request_of(url, file, name=name)
    report = loads.load(request, key=endpoint_key, concurrency=concurrency, seconds=seconds, rate=rate, timeout=timeout)
    if as_json:
        figures = {f"p{round(share * 100)}": report.percentile(share) for share in (0.5, 0.95, 0.99)}
        statuses = {str(status): count for status, count in report.statuses.items()}
        say(
            json.dumps(
                {
                    "rate": report.rate,
                    **(figures if report.latencies else dict.fromkeys(figures)),
                    "seconds": report.seconds,
                    "concurrency": report.concurrency,
                    "statuses": statuses,
                    "errors": dict(report.errors),
                    "limit": report.limit,
                    "processors": os.cpu_count(),
                }
            )
        )
    else:
        for line in loads.told(report):
            say(line)
    return 0 if report.latencies else 1
