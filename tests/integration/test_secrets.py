"""A job that carries many secrets tells nobody: no output, file, log, database, process or message."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from tests.services import postgres_database

COMMAND = str(Path(sys.executable).with_name("tally"))

SCORER = """
import os, pathlib, tally

ERRORS = [
    "GET /x\\nAuthorization: Bearer {bearer}",
    "{{'Authorization': 'Basic {basic}'}}",
    "connection failed: host=db password={conninfo}",
    "https://me:{url}@host/x refused",
    "Cookie: session={cookie}",
    '{{"password": "{json}"}}',
    "https://bucket.example/x?X-Amz-Signature={signature}: 403",
]


class Bright(tally.Scorer):
    columns = {{"mean": "float64"}}

    def score(self, batch):
        me = pathlib.Path("/proc/self")
        seen = (me / "environ").read_bytes() + b"\\0" + repr(dict(os.environ)).encode()
        pathlib.Path(os.environ["SEEN"], "environ").write_bytes(seen)
        lines = [each.read_bytes() for each in pathlib.Path("/proc").glob("[0-9]*/cmdline") if os.access(each, os.R_OK)]
        pathlib.Path(os.environ["SEEN"], "ps").write_bytes(b"\\n".join(line for line in lines if b"tally" in line))
        return [ValueError(ERRORS.pop()) if ERRORS else {{"mean": float(each.mean())}} for each in batch]
"""

SAID = ("bearer", "basic", "conninfo", "url", "cookie", "json", "signature")
IN_ENVIRONMENT = {
    "PGPASSWORD": "{pg}",
    "TALLY_WEBHOOK_SECRET": "{webhook}",
    "HOOK": "https://hooks.example/services/{hook}",
    "RAY_AUTH_TOKEN": "{ray}",
    "TALLY_SERVER_KEY": "{server}",
}
FOR_WORKERS = {"AWS_SECRET_ACCESS_KEY": "{aws}", "AWS_SESSION_TOKEN": "{session}"}
"""Which they need to read and write."""


@pytest.fixture
def database() -> Iterator[str]:
    with postgres_database() as url:
        yield url


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc")
def test_no_secret_shows(database: str, home: Path, tmp_path: Path) -> None:
    from PIL import Image

    names = (
        *SAID,
        "pg",
        "hook",
        "ray",
        "server",
        "aws",
        "session",
        "dsn",
        "model",
        "amz",
        "user",
        "key",
        "port",
        "reg",
    )
    secrets = {name: f"Zq7{name}{hashlib.sha256(name.encode()).hexdigest()[:20]}" for name in names}
    secrets["webhook"] = "whsec_" + "Zq7webhook00" + "c2VjcmV0" * 6
    assert len(secrets) == 21
    pictures, out, seen = tmp_path / "pictures", tmp_path / "out", tmp_path / "seen"
    pictures.mkdir()
    seen.mkdir()
    for number in range(10):
        Image.new("RGB", (16, 12), (number, 0, 0)).save(pictures / f"{number}.png")
    code = SCORER.format(**{name: secrets[name] for name in SAID}).encode()
    digest = hashlib.sha256(code).hexdigest()
    kept = home / "downloads" / digest / "scorer.py"
    kept.parent.mkdir(parents=True)
    home.chmod(0o700)
    kept.write_bytes(code)
    model = "https://me:{user}@models.example/scorer.py?sig={model}&X-Amz-Security-Token={amz}".format(**secrets)
    model += f"#sha256={digest}"
    environment = {name: text.format(**secrets) for name, text in (IN_ENVIRONMENT | FOR_WORKERS).items()}
    url = sa.make_url(database)
    environment |= {
        "TALLY_DATABASE": url.set(password=secrets["dsn"]).render_as_string(hide_password=False),
        "TALLY_HOME": str(home),
        "SEEN": str(seen),
    }
    printed: list[str] = []

    def run(*arguments: object, code: int = 0, **more: str) -> str:
        command = [COMMAND, "-v", *map(str, arguments)]
        variables = {**os.environ, **environment, **more}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == code, done.stderr
        printed.append(done.stdout + done.stderr)
        return done.stdout

    spec = tmp_path / "job.yaml"  # what is on a command line, everybody sees
    spec.write_text(
        f"source: pictures\nmodel: {model}\nout: out\nworkers: 1\nalerts: [rows > 1000]\nwebhook: env:HOOK\n"
    )
    run("run", spec)
    (job,) = (json.loads(line)["id"] for line in run("jobs", "list", "--json").splitlines())
    for command in (["show", job], ["show", job, "--json"], ["dead", job], ["dead", job, "--json"], ["alerts", job]):
        run("jobs", *command)
    assert '"dead": 7' in printed[3].replace('"dead":7', '"dead": 7')
    run("doctor")
    # Refused, and not shown either.
    run("score", f"s3://AKIA:ab/{secrets['key']}@bucket/x", "-m", kept, "-o", out, code=2)
    run("jobs", "list", code=1, TALLY_DATABASE=f"postgresql://me:a/{secrets['port']}@127.0.0.1:1/x")
    run("jobs", "list", code=2, TALLY_REGISTRY=f"s3://AKIA:{secrets['reg']}@bucket/x")
    hourly = tmp_path / "hourly.yaml"
    hourly.write_text(f"source: pictures\nmodel: {model}\nout: 'o/{{interval_start:%H}}'\n")
    run("schedule", "add", "hourly", hourly, "--cron", "0 * * * *", code=2)

    shown = {"printed": "\n".join(printed)}
    kept.unlink()
    for folder in (home, out, seen):
        files = [each for each in folder.rglob("*") if each.is_file()]
        shown |= {str(each): each.read_bytes().decode("latin-1") for each in files}
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        metadata = sa.MetaData()
        metadata.reflect(connection)
        for table in metadata.sorted_tables:
            shown[table.name] = repr(connection.execute(sa.select(table)).all())
    engine.dispose()
    assert str(seen / "environ") in shown
    assert job in shown["jobs"]
    found = {(name, place) for name, secret in secrets.items() for place, text in shown.items() if secret in text}
    allowed = {("aws", str(seen / "environ")), ("session", str(seen / "environ"))}
    assert found == allowed
    assert "***" in shown["dead_items"]
    open_to_others = [each for each in home.rglob("*") if stat.S_IMODE(each.stat().st_mode) & 0o077 and each.is_file()]
    assert [each.name for each in open_to_others if each.parent.name == "logs" or each.suffix == ".db"] == []


def test_what_is_kept_is_for_this_user_only(home: Path, tmp_path: Path) -> None:
    """Whatever the umask says."""
    command = ["sh", "-c", f"umask 000; {COMMAND} jobs list"]
    subprocess.run(command, env={**os.environ, "TALLY_HOME": str(home)}, check=True, timeout=60)
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert stat.S_IMODE((home / "tally.db").stat().st_mode) == 0o600
    home.chmod(0o755)
    said = subprocess.run(
        [COMMAND, "doctor"], env={**os.environ, "TALLY_HOME": str(home)}, capture_output=True, text=True, check=False
    )
    assert f"chmod go= {home}\n" in said.stdout
