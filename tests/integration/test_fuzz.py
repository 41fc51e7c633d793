"""Whatever is given on the command line, in files and in the environment: a sentence is the answer, never a traceback.

The commands run in this process, some of them in one of their own. With TALLY_TEST_FULL=1 for ten minutes.
"""

from __future__ import annotations

import io
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import click
import pytest

from tally.cli.main import cli as tally_command
from tally.cli.main import main

FULL = bool(os.environ.get("TALLY_TEST_FULL"))
SECONDS = 600.0 if FULL else 12.0
FEWEST = 40
"""Commands that are tried however slow the machine is."""

_ENDLESS = {
    ("demo",),
    ("up",),
    ("serve",),
    ("coordinate",),
    ("jobs", "watch"),
    ("schedule", "run"),
    ("schedule", "backfill"),
}
_LONG = {("train", "style"), ("train", "anomaly"), ("simulate", "readings"), ("simulate", "sensors")}

_TEXTS = [
    "", " ", "-", "--", "x", "%00", "a%00b", "\udcff", "é\n\t\x1b[31m", "x" * 5000, "../..", "/proc/", "//proc", "~",
    "~nobody-at-all/x", ".",
    "0", "-1", "1e999", "nan", "inf", "99999999999999999999", "1..0", "0..0", "5%", "1e", "0x10", "٣",
    "a=b", "=", "a=", "a=[1", "a={x: [", "a=&x [*x]", "a=*x", "a=" + "[" * 3000, "a=!!python/object:os.system {}",
    "a=2026-02-30",
    "device=cuda", "encoding=utf-16", "encoding=rot13", "encoding=idna", "delim=", "delim=ab", "types={a: NOPE}",
    "skip=-1", "quote=x",
    "1; DROP TABLE jobs", "select", "1 = 1) OR (1", "Value > 'x", "{Device}", "{", "{}_{", "Device={Device",
    "a,b=x{a}{b}{c}",
    "s3://", "s3://nope%00/x", "az://a", "gs://", "file://", "file:///%00", "http://[::1", "https://u:p@h:bad/x",
    "foo://x", "://",
    "models:/", "models:/x@", "models:/x/9999999999999999999", "mod:Class", "os:path", ":", "x.py:Y",
    "30s", "5parsecs", "2026-13-45", "9999-12-31T23:59:59", "2d", "* * * * *", "61 25 * * *", "@hourly",
    "Mars/Olympus",
    "640x360", "0x0", "99999x99999", "auto", "cuda:99", "tpu", "ray", "mean,median", "env:NOPE", "rows > ",
    "anomalies > 0",
]  # fmt: skip


def _files(folder: Path) -> list[str]:
    """Hostile files, one for each reader."""
    contents: dict[str, bytes] = {
        "empty.csv": b"", "nul.csv": b"a,b\n\0,1\n", "quote.csv": b'a,b\n"1,2\n3,4\n',
        "wide.csv": b"a\n" + b"1," * 4000,
        "latin.csv": b"a\xff,b\n1,2\n", "utf16.csv": "a,b\n1,2\n".encode("utf-16"),
        "utf16nobom.csv": "a,b\n1,2\n".encode("utf-16-le"),
        "dup.csv": b"a,a,A,\n1,2,3,4\n", "good.csv": b"Value,Device\n1.5,a\n2.5,b\n",
        "bad.csv.gz": b"\x1f\x8b\x08\0\0",
        "deep.jsonl": b"[" * 5000, "half.jsonl": b'{"a": 1}\n{"a": ', "list.jsonl": b"[1]\n2\nnull\n",
        "big.jsonl": b'{"a": ' + b"9" * 400 + b"}\n",
        "cut.parquet": b"PAR1" + b"\0" * 40, "no.parquet": b"hello", "cut.arrow": b"ARROW1\0\0\xff\xff\xff\xff",
        "cut.jpg": b"\xff\xd8\xff\xe0" + b"\0" * 20,
        "bomb.png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\x7f\xff\xff\xff\x7f\xff\xff\xff\x08\x02\0\0\0",
        "cut.mp4": b"\0\0\0\x18ftypisom" + b"\0" * 30, "cut.mkv": b"\x1aE\xdf\xa3\x9fB\x86\x81\x01",
        "cut.onnx": b"\x08\x07\x12\x04tiny",
        "no.skops": b"PK\x03\x04nope", "no.pkl": b"\x80\x04K\x01.", "model.pt": b"PK\x03\x04",
        "syntax.py": b"def run(:\n",
        "raises.py": b"raise SystemExit(3)\n", "both.py": b"import nope_not_there\n",
        "nul.py": b"def run(mini_batch):\0\n",
        "bom.py": b"\xff\xfe\0d", "job.yaml": b"source: x\nmodel: y\nout: z\n",
        "deep.yaml": b"source: " + b"[" * 3000,
        "alias.yaml": b"source: &a [*a]\nmodel: x\nout: y\n", "tags.yaml": b"source: !!python/name:os.system ''\n",
        "nul.yaml": b"a: \0",
        "list.yaml": b"- a\n- b\n",
        "types.yaml": b"source: 3\nmodel: [1]\nout: {a: b}\nworkers: x\ncsv: 7\nsettings: [1]\n",
        "labels.txt": b"\xff\xfe\xfd", "labels.json": b"[" * 3000,
        "lfs.onnx": b"version https://git-lfs.github.com/spec/v1\n",
    }  # fmt: skip
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "none").mkdir()
    (folder / "package").mkdir()
    (folder / "package" / "tally.yaml").write_bytes(b"file: ../../../etc/passwd\nentry: x\n")
    (folder / "deep").mkdir()
    (folder / "deep" / "tally.yaml").write_bytes(b"options: " + b"{a: " * 3000)
    (folder / "ml").mkdir()
    (folder / "ml" / "MLmodel").write_bytes(b"flavors: " + b"[" * 3000)
    (folder / "loop").symlink_to(folder / "loop")
    return [str(each) for each in sorted(folder.iterdir())]


def _commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from _commands(inner, (*path, name))
    elif path not in _ENDLESS and path not in _LONG:
        yield path, command


def _value(parameter: click.Parameter, chance: random.Random, files: Sequence[str], out: str) -> str:
    if parameter.name in ("out", "destination", "folder"):
        return chance.choice([out, out, f"{out}.csv", f"{out}.mp4", *files, *_TEXTS])
    if isinstance(parameter.type, click.Choice) and chance.random() < 0.7:
        return str(chance.choice(list(parameter.type.choices)))
    if parameter.name in ("source", "model", "file", "artifacts", "labels", "template") and chance.random() < 0.8:
        return chance.choice(files)
    return chance.choice(chance.choice([_TEXTS, list(files)]))


def _arguments(command: click.Command, chance: random.Random, files: Sequence[str], out: str) -> list[str]:
    found: list[str] = []
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            times = chance.choice([1, 1, 2]) if parameter.nargs != 1 else 1
            found += [_value(parameter, chance, files, out) for _ in range(times)]
        elif isinstance(parameter, click.Option) and (parameter.required or chance.random() < 0.15):
            found.append(chance.choice(parameter.opts))
            if not parameter.is_flag:
                found.append(_value(parameter, chance, files, out))
    return found


def _environment(chance: random.Random, folder: Path) -> dict[str, str]:
    """Mostly none; sometimes one that is wrong."""
    wrong = [
        {"TALLY_DATABASE": url}
        for url in (
            "postgres://u:p@h/x", "postgresql://u@h:port/x", "postgresql://[::1", "sqlite:///%00", "sqlite://h/x",
            "x", "sqlite:////dev/full",
            "sqlite+nope:///x", f"sqlite:///{folder}/good.csv", f"sqlite:///{folder}/none",
        )
    ] + [{"TALLY_HOME": home} for home in ("~nobody-at-all/x", "/dev/null/x",
    "/proc/none", str(folder / "loop"), str(folder / "good.csv"))] + [
        {"TALLY_REGISTRY": place} for place in ("s3://", "foo://x", "/dev/null/x", "~nobody-at-all", "s3://u:p@b")
    ]  # fmt: skip
    return chance.choice(wrong) if chance.random() < 0.1 else {}


@pytest.fixture
def arena(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[str]]:
    folder = tmp_path / "given"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # what is written to ~ or above this folder stays within
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    return folder, _files(folder)


def _try(path: tuple[str, ...], arguments: Sequence[str], environment: dict[str, str]) -> str | None:
    """What the command said, if that is no answer to a user."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()), redirect_stderr(said):
        patch.setattr(sys, "argv", ["tally", *path, *arguments])
        patch.setattr(sys, "stdin", io.StringIO())
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            main()
        except SystemExit:
            pass
        except BaseException as error:
            return repr(error)
    text = said.getvalue()
    return text if "a fault in Tally" in text or "Traceback" in text else None


@pytest.mark.usefixtures("restored")
def test_no_traceback_reaches_a_user(arena: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, files = arena
    commands = list(_commands(tally_command))
    assert len(commands) > 20
    seed = random.SystemRandom().randrange(2**32) if FULL else 20261128
    chance = random.Random(seed)
    until, number = time.monotonic() + SECONDS, 0
    while number < FEWEST or time.monotonic() < until:
        path, command = chance.choice(commands)
        arguments = _arguments(command, chance, files, str(tmp_path / f"out-{number}"))
        environment = _environment(chance, folder)
        wrong = _try(path, arguments, environment)
        typed = " ".join(map(repr, [*path, *arguments]))
        assert wrong is None, f"seed {seed}, number {number}: {environment} tally {typed}: {wrong}"
        number += 1


@pytest.mark.parametrize(
    ("arguments", "environment", "told"),
    [
        (["run", "deep.yaml"], {}, "nested too deeply"),
        (["run", "alias.yaml"], {}, "alias.yaml"),
        (["jobs", "list"], {"TALLY_DATABASE": "sqlite:///%00"}, "zero byte"),
        (["jobs", "list"], {"TALLY_DATABASE": "postgresql://u@h:port/x"}, "cannot be understood"),
        (["jobs", "list"], {"TALLY_DATABASE": "postgres://u:secret@h/x"}, "postgresql://"),
        (["jobs", "list"], {"TALLY_HOME": "/proc/none"}, "TALLY_HOME"),
        (["score", "utf16nobom.csv", "-m", "both.py", "-o", "out", "--csv", "encoding=rot13"], {}, "both.py"),
    ],
)
def test_a_process_says_it_in_a_sentence(
    arena: tuple[Path, list[str]], arguments: list[str], environment: dict[str, str], told: str
) -> None:
    ran = subprocess.run(
        [sys.executable, "-P", "-m", "tally", *arguments],
        env=os.environ | environment, capture_output=True, text=True, errors="replace", timeout=300, check=False,
    )  # fmt: skip
    assert ran.returncode in (1, 2)
    assert told in ran.stderr
    assert "Traceback" not in ran.stderr
    assert "secret" not in ran.stderr
