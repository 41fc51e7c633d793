"""The one facade of jobs: what is asked of it, and that looking opens nothing."""

from __future__ import annotations

import datetime
import inspect
import re
import subprocess
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Ran
from tests.faults.storms import tally
from tests.waiting import wait_for

import tally as package
from tally.api import Job, score
from tally.api import _in_python as in_python
from tally.api import jobs as list_jobs
from tally.errors import JobExistsError, JobNotFoundError, JobStateError, SpecError, TallyError
from tally.jobs.events import Assumed, ChunkDone, Event, Events, Finished, Note, Progress, Started, Warned
from tally.jobs.facade import Jobs
from tally.jobs.spec import JobSpec, make
from tally.jobs.stop import Stop
from tally.sources.files import FileSource

SCORER = """
from tally import Scorer

with open("imported", "a") as file:
    file.write("imported\\n")

class Lengths(Scorer):
    input = "bytes"

    def score(self, batch):
        return [{"length": len(content)} for content in batch]
"""


@pytest.fixture
def items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "items"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.txt").write_bytes(b"x" * number)
    (tmp_path / "lengths.py").write_text(SCORER)
    return folder


ASSUMING = """
from tally import Scorer

class Lengths(Scorer):
    input = "bytes"

    def score(self, batch):
        self.assumed = ["each byte is a letter"]
        return [{"length": len(content)} for content in batch]
"""


def spec_of(items: Path, out: str = "out", **more: object) -> JobSpec:
    return make(source=[str(items)], model="lengths.py", out=out, workers=1, **more)


def test_what_is_taken_for_granted_is_told_and_kept(
    items: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("lengths.py").write_text(ASSUMING)
    ran = cli("score", items, "--model", "lengths.py", "--out", "out", "-w", 2, "-b", 1, "--quiet")
    assert (ran.code, ran.err) == (0, "warning: each byte is a letter\n")
    job = Job("out")
    assert job.record.assumed == job.manifest["assumed"] == ["each byte is a letter"]
    assert "assumed      each byte is a letter" in cli("jobs", "show", "out").out

    told: list[Event] = []
    jobs = Jobs()
    again = jobs.submit(spec_of(items, "again"))
    jobs.store.respec(again.id, again.spec, model={**again.model, "assumed": ["known before"]})
    monkeypatch.setattr(FileSource, "remark", lambda source: "it is odd")
    ended = jobs.run(again.id, events=Events(told.append))
    assert {event for event in told if isinstance(event, Assumed | Warned)} == {
        Assumed("known before"), Warned("it is odd"), Assumed("each byte is a letter"),
    }  # fmt: skip
    assert ended.manifest is not None
    assert ended.manifest["assumed"] == ["known before", "each byte is a letter"]
    assert ended.manifest["warnings"] == ended.remarks == ["it is odd"]


def test_a_job_from_submit_to_delete(items: Path) -> None:
    jobs, told = Jobs(), list[Event]()
    record = jobs.submit(spec_of(items))
    assert (record.state, record.place, record.unit) == ("created", str(items.parent / "out"), "items")
    assert record.output["kind"] == "rows"
    assert jobs.run(record.id, events=Events(told.append)).state == "finished"
    assert [type(event) for event in told if isinstance(event, Started | ChunkDone | Finished)] == [
        Started, ChunkDone, Finished,
    ]  # fmt: skip
    assert any(isinstance(event, Note) and "Lengths" in event.text for event in told)
    assert isinstance(told[-2], Progress)
    found = jobs.at("out/")
    assert found is not None
    assert found.id == jobs.get("out").id == jobs.get(record.id[:4]).id == record.id
    assert sorted(row["length"] for row in jobs.results(record.id).to_pylist()) == [0, 1, 2, 3, 4]
    jobs.delete(record.id)
    with pytest.raises(JobNotFoundError):
        jobs.get(record.id)
    assert jobs.at("out") is None


def test_alerts_are_told_once_however_often_the_same_events_are_used(
    items: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    concluded: list[str] = []
    monkeypatch.setattr("tally.jobs.run.conclude", lambda engine, job, **more: concluded.append(job))
    jobs, events = Jobs(), Events()
    ids = [jobs.run(jobs.submit(spec_of(items, out)).id, events=events).id for out in ("out", "other")]
    assert concluded == ids


def test_looking_opens_no_model_runs_no_code_and_reads_no_source(items: Path) -> None:
    job = score(items, "lengths.py", "out", workers=1, quiet=True)
    for path in [*items.iterdir(), Path("lengths.py")]:
        path.unlink()
    items.rmdir()
    before = Path("imported").read_text()
    for command in (
        ("jobs", "list"),
        ("jobs", "show", job.id),
        ("jobs", "dead", job.id),
        ("jobs", "alerts", job.id),
        ("query", "out", "select sum(length) as total from results"),
        ("jobs", "delete", "out"),
    ):
        done = subprocess.run(tally(*command), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        if command[0] == "query":
            assert "10" in done.stdout
    assert Path("imported").read_text() == before
    assert list(Path("out").glob("*.parquet")), "results stay"


def test_an_unfinished_job_is_cancelled_and_deleted_without_its_model(items: Path) -> None:
    jobs = Jobs()
    for place, remove in (("one", jobs.cancel), ("two", jobs.delete)):
        record = jobs.submit(spec_of(items, place))
        lease = jobs.store.acquire(record.id, seconds=60)
        assert lease is not None
        jobs.store.release(lease, "interrupted")
        assert Path(place).exists()
        Path("lengths.py").rename("moved.py")
        remove(record.id)
        Path("moved.py").rename("lengths.py")
        assert not Path(place, "_tally").exists()


def test_a_stop_may_come_before_the_job_is_under_way(items: Path) -> None:
    jobs, stop = Jobs(), Stop()
    record = jobs.submit(spec_of(items))
    stop()
    assert jobs.run(record.id, stop=stop).state == "interrupted"
    assert jobs.see_through(record.id).state == "finished"
    assert jobs.see_through(record.id).state == "finished", "it has ended already"
    with pytest.raises(JobStateError):
        jobs.run(record.id)


def test_while_a_job_waits_its_place_has_the_results_of_the_one_before(items: Path) -> None:
    jobs, spec = Jobs(), make(source=[str(items)], model="lengths.py:Lengths", out="out", workers=1)
    before = jobs.run(jobs.submit(spec).id)
    waiting = jobs.enqueue(spec, overwrite=True)
    assert (jobs.get("out").id, jobs.get("out").state) == (waiting.id, "waiting")
    assert jobs.results("out").num_rows == 5
    assert jobs.query("out", "select sum(length) as n from results").to_pylist() == [{"n": 10}]
    jobs.delete(before.id)
    with pytest.raises(JobStateError, match="is waiting"):
        jobs.results("out")
    nothing_yet = jobs.enqueue(spec.model_copy(update={"out": str(items / "nothing")}))
    assert jobs.get("items/nothing").id == nothing_yet.id


def test_what_is_asked_of_jobs_that_nobody_drives(items: Path) -> None:
    jobs = Jobs()
    record = jobs.submit(spec_of(items))
    jobs.run(record.id)
    with pytest.raises(JobStateError, match="is not running: it is finished"):
        jobs.pause(record.id)
    with pytest.raises(JobStateError, match="is finished: there is nothing to cancel"):
        jobs.cancel(record.id)
    assert not jobs.unpause(record.id).alive


def test_jobs_are_listed_by_what_they_are(items: Path) -> None:
    first = score(items, "lengths.py", "first", workers=1, quiet=True)
    second = score(items, "lengths.py", "second", workers=1, quiet=True)
    assert [job.id for job in package.jobs()] == [second.id, first.id]
    assert [job.id for job in package.jobs(limit=1)] == [second.id]
    assert [job.id for job in package.jobs(place="first/")] == [first.id]
    assert [job.id for job in package.jobs(text="FIRST")] == [first.id]
    assert [job.id for job in package.jobs(state="finished", model="lengths")] == [second.id, first.id]
    assert package.jobs(state="failed") == []
    yesterday = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    assert len(package.jobs(since=yesterday)) == 2
    assert package.jobs(until=yesterday) == []
    assert all(isinstance(job, Job) for job in package.jobs())


def test_pages_on_the_command_line(items: Path) -> None:
    ids = [score(items, "lengths.py", f"out{n}", workers=1, quiet=True).id for n in range(3)]
    seen: list[str] = []
    more: list[str] = []
    for _ in range(3):
        done = subprocess.run(tally("jobs", "list", "-n", 1, *more), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        seen.append(done.stdout.splitlines()[1].split()[0])
        more = done.stderr.split()[-2:]
    assert seen == ids[::-1]
    assert "there are more" not in done.stderr
    wrong = subprocess.run(tally("jobs", "list", "--after", "x"), capture_output=True, text=True, timeout=60)
    assert wrong.returncode != 0
    assert "--after takes the value printed at the end of the page before" in wrong.stderr


def test_score_takes_every_field_of_a_job_by_its_name_and_default() -> None:
    parameters = inspect.signature(score).parameters
    assert all(each.kind is not each.VAR_KEYWORD for each in parameters.values())
    own = {"source", "model", "out", "resume", "overwrite", "quiet"}
    assert parameters.keys() - own == JobSpec.model_fields.keys() - own
    empty = {"settings": {}, "csv": {}, "queue": {}, "resources": {}}
    for name in parameters.keys() - own:
        default = parameters[name].default
        assert (empty[name] if default is None and name in empty else default) == JobSpec.model_fields[name].default
    assert typing.get_type_hints(score)["batch_size"] == (int | None)


def test_what_became_of_a_cancel_is_told(items: Path, cli: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = Jobs()
    ended = jobs.run(jobs.submit(spec_of(items)).id)
    first = replace(ended, state="running", alive=True, manifest=None)
    retry = replace(first, manifest=ended.manifest)
    for before, after, said in (
        (first, ended, "has finished before it could be cancelled: the results are in"),
        (first, replace(ended, state="cancelled"), "is cancelled"),
        (retry, ended, "the retry of job .* is cancelled"),
        (
            retry,
            replace(ended, manifest={**(ended.manifest or {}), "generation": 1}),
            "the retry of job .* has finished",
        ),
    ):
        looks = iter([before, before, after])
        with monkeypatch.context() as patch:
            patch.setattr(Jobs, "get", lambda self, job, looks=looks: next(looks))
            patch.setattr(Jobs, "cancel", lambda self, job, before=before: before)
            assert re.search(said, cli("jobs", "cancel", ended.id).out)


def test_errors_speak_of_parameters_in_python(items: Path) -> None:
    given: dict[str, Any] = {"model": "lengths.py:Lengths", "out": "out", "workers": 1, "quiet": True}
    job = score("items", **given)
    with pytest.raises(JobExistsError) as again:
        score("items", **given)
    assert again.value.job_id == job.id
    assert again.value.hint == "Do it again with overwrite=True, or write to another place with out=...."
    assert "--" not in str(again.value)
    assert score("items", **given, overwrite=True).results().num_rows == 5
    with pytest.raises(TallyError) as untrusted:
        score("items", **given | {"artifacts": "items", "labels": "nowhere.txt"})
    assert str(untrusted.value).endswith("labels=... names a text file, one label per line.")


def test_a_function_is_a_scorer(items: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def length(batch: Sequence[bytes]) -> list[dict[str, int]]:
        return [{"bytes": len(each)} for each in batch]

    job = score("items", length, "out", settings={"input": "bytes", "batch_size": 2}, workers=1, quiet=True)
    assert (job.record.model["name"], job.record.dead) == ("length", 0)
    assert [row["bytes"] for row in job.results().to_pylist()] == [
        path.stat().st_size for path in sorted(Path("items").iterdir())
    ]
    assert "warning" not in capsys.readouterr().err
    again = score("items", length, "out", settings={"input": "bytes", "batch_size": 2}, quiet=True, resume=True)
    assert again.id == job.id, "the same function is the same model"
    before = again.record
    assert (again.resume().record, again.state) == (before, "finished"), "nothing is left to be done"
    with pytest.raises(SpecError, match=r"length: Function has no option .inptu.; did you mean .input."):
        score("items", length, "out2", settings={"inptu": "bytes"})


PROGRAM_OF_OURS = """
import sys

import ours
import tally
from tally.jobs.facade import Jobs
from tally.jobs.spec import make


def ruled(batch):
    return [{"value": ours.measure(each)} for each in batch]


how = sys.argv[1]
try:
    if how == "begin":
        Jobs().submit(make(source="items", model="x", out="begun", workers=1), model=ours.Measured)
    elif how == "go on":
        print(tally.Job("begun").resume(quiet=True).state)
    else:
        model, settings = (ruled, {"input": "bytes"}) if how == "function" else (ours.Measured, {})
        job = tally.score("items", model, how, settings=settings, quiet=True, workers=1, resume=True)
        print(sorted(set(job.results().to_pydict()["value"])))
except tally.TallyError as error:
    print(type(error).__name__, error)
"""


def test_a_scorer_of_a_module_that_was_changed_is_another_model(items: Path) -> None:
    """It is pickled by its name, as is what its module imports."""
    Path("measures.py").write_text("def measure(content):\n    return 1\n")
    Path("ours.py").write_text(
        "import tally\nfrom measures import measure\n\n\nclass Measured(tally.Scorer):\n    input = 'bytes'\n\n"
        "    def score(self, batch):\n        return [{'value': measure(each)} for each in batch]\n"
    )
    Path("program.py").write_text(PROGRAM_OF_OURS)

    def run(how: str) -> str:
        done = subprocess.run([sys.executable, "program.py", how], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert (run("class"), run("function")) == ("[1]", "[1]")
    run("begin")
    Path("other.py").write_text("a module that neither imports")
    assert (run("class"), run("function")) == ("[1]", "[1]"), "nothing has changed"
    Path("measures.py").write_text("def measure(content):\n    return 2\n")
    for how in ("class", "function"):
        assert "[1]" not in run(how), how
    assert "it changed since the job began" in run("go on")
    Path("measures.py").write_text("def measure(content):\n    return 1\n")
    assert run("go on") == "finished"


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("Go on with: tally jobs resume x   (or --resume; --overwrite starts again)",
         'Go on with: tally.Job("x").resume()   (or resume=True; overwrite=True starts again)'),
        ("See them with 'tally jobs dead x'; after mending the cause, 'tally jobs retry x --dead'.",
         """See them with 'tally.Job("x").dead()'; after mending the cause, 'tally.Job("x").retry()'."""),
        ("'tally jobs list' shows the jobs. See 'tally score --help'",
         "'tally.jobs()' shows the jobs. See 'help(tally.score)'"),
        ("take it with --overwrite, or free it with: tally doctor --mend /out",
         "take it with overwrite=True, or free it with: tally doctor --mend /out"),
        ("Use --task values, or --set softmax=always (--set features=...)",
         'Use task="values", or settings={"softmax": "always"} (settings={"features": ...})'),
        ("Say with --task what it does, or --no-audio", "Say with task=... what it does, or audio=False"),
        ("stopped, as --strict asks; raise --max-dead", "stopped, as strict=True asks; raise max_dead=..."),
        ("a -- b --nonsense", "a -- b --nonsense"),
    ],
)  # fmt: skip
def test_options_of_the_command_line_as_parameters(said: str, meant: str) -> None:
    assert in_python(said) == meant


def test_a_job_that_is_cancelled_from_elsewhere_is_no_success(items: Path) -> None:
    pause = "__import__('time').sleep(3600 if hasattr(self, 'begun') else 0); self.begun = True"  # after the first one
    Path("slow.py").write_text(SCORER.replace("self, batch):", f"self, batch):\n        {pause}"))
    program = (
        "import tally\n"
        "try:\n"
        "    tally.score('items', 'slow.py', 'slow', workers=1, batch_size=1, quiet=True)\n"
        "except tally.TallyError as error:\n"
        "    print(type(error).__name__, error.message)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    wait_for(lambda: any(job.record.done for job in package.jobs()), process)
    [job] = package.jobs()
    job.cancel()
    said, _ = process.communicate(timeout=60)
    assert said == f"JobError job {job.id} was cancelled\n"
    job.delete()
    assert repr(job) == f"Job({job.id!r}, deleted)"


def test_what_a_list_is_asked_is_checked(items: Path) -> None:
    ids = [score(items, "lengths.py", f"out{n}", workers=1, quiet=True) for n in range(3)]
    assert [job.id for job in package.jobs(after=ids[2])] == [ids[1].id, ids[0].id]
    for wrong in ({"state": "bogus"}, {"limit": 0}, {"since": "2026-11-28"}):
        with pytest.raises(SpecError):
            package.jobs(**wrong)  # type: ignore[arg-type]
    assert inspect.signature(package.jobs) == inspect.signature(list_jobs)


def test_a_job_whose_output_cannot_be_opened_stays_as_it_is(items: Path) -> None:
    jobs = Jobs()
    record = jobs.submit(spec_of(items))
    lease = jobs.store.acquire(record.id, seconds=60)
    assert lease is not None
    jobs.store.release(lease, "failed", error="it failed")
    jobs.store.respec(record.id, record.spec, output={**record.output, "place": "gone:///out"})
    for act in (jobs.cancel, jobs.delete):
        with pytest.raises(SpecError, match="no installed package brings gone:// outputs"):
            act(record.id)
        found = jobs.get(record.id)
        assert (found.state, found.error, found.wanted) == ("failed", "it failed", "run")
