"""``tally score``, ``tally run`` and ``tally coordinate``: start a job, and see it through."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from tally.cli import completion, installation, options
from tally.cli.console import literal_pairs, pairs, say
from tally.cli.values import fail_on_dead
from tally.errors import JobExistsError

if TYPE_CHECKING:
    from tally.jobs.facade import Jobs
    from tally.jobs.spec import JobSpec


def _resume_options(command: Any) -> Any:
    for option in (
        click.option("--resume", is_flag=True, help="Continue if the same job was begun before, without asking."),
        click.option("--overwrite", is_flag=True, help="Do a finished job again; its earlier results are removed."),
        click.option("-q", "--quiet", is_flag=True, help="No progress on the terminal; warnings stay."),
        fail_on_dead,
    ):
        command = option(command)
    return command


def _list_codecs(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value == "list" and not ctx.resilient_parsing:
        from tally.cli.console import table
        from tally.media.video.encode import FORMATS
        from tally.media.video.encoders import encoders

        found = {kind: encoders(kind) for kind in FORMATS}
        names = {codec: name for each in found.values() for codec, name in each.items()}
        kinds = {codec: " ".join(kind for kind in found if codec in found[kind]) for codec in names}
        table(("CODEC", "FILES", "WHAT"), [(codec, kinds[codec], name) for codec, name in sorted(names.items())])
        ctx.exit()
    return value


@click.command()
@click.argument("source", nargs=-1)
@click.option(
    "--items", metavar="LIST", help="A list of the items: .csv, .parquet, .jsonl, or lines of text; - reads it."
)
@click.option(
    "--item-column",
    metavar="NAME",
    shell_complete=completion.columns,
    help="The column of a list's paths and URLs, or of the pictures in Parquet.",
)
@click.option(
    "--key",
    metavar="COLUMN",
    shell_complete=completion.columns,
    help="Lists and databases: the column of the items' keys; of databases, several, too.",
)
@click.option("--base", metavar="FOLDER", help="Lists only: where relative paths begin.  [default: the list's folder]")
@click.option(
    "-m",
    "--model",
    shell_complete=completion.models,
    help="An .onnx or .skops file, a package folder, a script, module:Class, models:/NAME@ALIAS, or a URL.",
)
@click.option(
    "--model-per",
    metavar="COLUMNS=TEMPLATE",
    help="Tables only: a model for each key, e.g. Device,Tag='models/{Device}_{Tag}.skops'.",
)
@click.option(
    "-o",
    "--out",
    required=True,
    help="A folder, a bucket URL, or one file: .csv, .parquet or .jsonl for rows; .mp4, .mov, .mkv or .webm for video.",
)
@click.option("--limit", type=int, help="Score the first N items only, for a first try.")
@click.option("--sample", metavar="N|SHARE", help="Score so many items, or a share such as 1%, chosen by their keys.")
@click.option("--shard", metavar="I/N", help="Score the I-th of N shares of the items, e.g. 1/4; shares are by key.")
@click.option("--split", type=int, metavar="N", help="Share the items out among N coordinators: still one job.")
@click.option(
    "-t",
    "--task",
    shell_complete=completion.tasks,
    help="classify, detect, restyle, embed, segment or values; detected by default.",
)
@click.option("--labels", help="Names of the classes: a text file with one per line, or JSON.")
@click.option("--artifacts", help="Folder with what a script loads (AZUREML_MODEL_DIR).")
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="KEY=VALUE",
    help="An option of the model, e.g. preprocess.channels=bgr or top=5.",
)
@click.option(
    "--format",
    shell_complete=completion.words("parquet", "csv", "jsonl", "jpg", "png", "webp", "mp4", "mov", "mkv", "webm"),
    help="parquet, csv or jsonl for rows; jpg, png or webp for pictures; mp4, mov, mkv or webm for videos.",
)
@click.option(
    "--media",
    shell_complete=completion.words("image", "video", "table", "archive"),
    help="What SOURCE holds: image, video, table or archive; told by the names of files by default.",
)
@click.option("--escape-formulas", is_flag=True, help="CSV only: an apostrophe before text that is like a formula.")
@click.option("--empty-rows", is_flag=True, help="Give items in which nothing is found a row, too, without values.")
@click.option("--overlay", is_flag=True, help="Draw boxes and labels onto the pictures, and write those.")
@click.option("--thumbnails", type=int, metavar="PIXELS", help="Keep a small JPEG of each picture beside the results.")
@click.option("--pages", help="Of files with several pictures (GIF, TIFF) score the first or all.  [default: first]")
@click.option("--background", metavar="COLOUR", help="Lay transparent pictures on white, black or #rrggbb.")
@click.option("--max-pixels", metavar="N", help="Refuse larger pictures, e.g. 200M.  [default: 128M]")
@click.option("--every", type=int, help="Videos only: score every N-th frame.")
@click.option(
    "--size", metavar="WxH", help="Videos only: scale frames to this size in pixels first, e.g. 640x360 or 640x-1."
)
@click.option(
    "--fit",
    shell_complete=completion.words("contain", "cover", "stretch"),
    help="Frames of another shape than --size: contain (black bars), cover (cut) or stretch.  [default: stretch]",
)
@click.option(
    "--fps", metavar="N", help="Numbered pictures (a folder, or frame_%04d.png) are a video: 25, or 30000/1001."
)
@click.option("--deinterlace", is_flag=True, help="Videos only: interlaced frames show one moment, not lines of two.")
@click.option(
    "--frames",
    shell_complete=completion.words("jpg", "png", "webp"),
    help="Videos only: write frames as jpg, png or webp files, and not a video.",
)
@click.option(
    "--codec",
    is_eager=True,
    callback=_list_codecs,
    help="Video encoder; 'list' shows those that work here.  [default: libx264]",
)
@click.option("--crf", type=float, help="Quality of the video: lower is better and larger.")
@click.option("--keep-audio/--no-audio", "audio", default=None, help="Whether video keeps its sound.  [default: keep]")
@click.option(
    "--by", shell_complete=completion.columns, help="Tables only: columns that make a key; windows are made for each."
)
@click.option(
    "--keep",
    shell_complete=completion.columns,
    help="Tables, lists, archives: columns to carry into the results, separated by commas; '*' for all.",
)
@click.option("--where", help="Tables and lists: take only the rows for which this SQL condition holds.")
@click.option("--time", shell_complete=completion.columns, help="Tables only: the column of timestamps.")
@options.in_tables
@click.option("--window", help="Tables only: gather readings over this time before scoring, e.g. 5m or 1h.")
@click.option(
    "--aggregate",
    shell_complete=completion.words("mean", "min", "max", "last", "count", "std", "median", "p95"),
    help="Windows only: mean, min, max, last, count, std, median, p95 (any quantile), or several.  [default: mean]",
)
@click.option(
    "--csv", "csv_options", multiple=True, metavar="KEY=VALUE", help="How to read CSV, e.g. delim=';' or header=false."
)
@click.option("--query", metavar="SQL", help="Databases only: what to score, in SQL; without, a table: URL#TABLE.")
@click.option(
    "--queue",
    "queue_options",
    multiple=True,
    metavar="KEY=VALUE",
    help="How messages are read, e.g. body=json key=path.",
)
@click.option("--until-empty", is_flag=True, default=None, help="Queues only: end when the queue is empty.")
@click.option("-b", "--batch-size", type=int, help="Items scored together.")
@click.option("-w", "--workers", help="Worker processes: 8, or 4..64 as the work needs; one per core by default.")
@click.option(
    "--device", shell_complete=completion.devices, help="auto, cpu, cuda[:N] or tensorrt[:N].  [default: auto]"
)
@click.option(
    "--engine",
    shell_complete=completion.words("local", "ray"),
    help="local (this machine), ray (a cluster), or an installed package's.  [default: local]",
)
@click.option(
    "--address",
    help="Ray only: the cluster's dashboard, http://HEAD:8265; by default, the cluster that Ray itself would find.",
)
@click.option("--cpus", type=float, help="Ray only: CPUs that each worker reserves.  [default: 1]")
@click.option("--gpus", type=float, help="Ray only: GPUs that each worker reserves; 0.25 shares one among four.")
@click.option(
    "--resource", "resources", multiple=True, metavar="NAME=N", help="Ray only: a resource that its nodes declare."
)
@click.option("--timeout", type=float, help="Seconds that one batch may take.  [default: 120]")
@click.option("--worker-items", type=int, help="Replace a worker after so many items: for models that leak.")
@click.option("--memory", help="Memory that one worker may hold, e.g. 2GiB.")
@click.option("--max-dead", help="Share of failed items at which the job stops.  [default: 50%]")
@click.option("--min-dead", type=int, help="Items that must be done before --max-dead counts.  [default: 1000]")
@click.option(
    "--alert",
    "alerts",
    multiple=True,
    metavar="RULE",
    help="Notify the webhook if this is true when the job ends: 'anomalies > 0'.",
)
@click.option("--webhook", help="Where alerts are sent: https://..., or env:NAME.")
@click.option(
    "--push",
    help="Where rows go, too, as they are committed: https://..., env:NAME, or a table, postgresql://HOST/DB#TABLE; "
    "or a mapping: {url: ..., items: 100}.",
)
@click.option("--strict", is_flag=True, help="Stop at the first item that fails.")
@click.option("--log", is_flag=True, help="Keep the job's log beside its output, too.")
@click.option("--price-per-hour", type=float, help="What this machine costs; the job's cost is then shown.")
@click.option(
    "--trust", is_flag=True, help="Open models that carry code (pickles). Only if you know where they come from."
)
@_resume_options
def score(
    assignments: tuple[str, ...],
    csv_options: tuple[str, ...],
    queue_options: tuple[str, ...],
    resources: tuple[str, ...],
    resume: bool,
    overwrite: bool,
    quiet: bool,
    fail_on_dead: float | None,
    **fields: Any,
) -> int:
    """Score every item of SOURCE with a model.

    SOURCE is a folder, a file, a glob in quotes ('photos/**/*.jpg'), a bucket URL (s3://, az://, gs://) or a database
    (postgresql://HOST/DATABASE); there may be several. In videos, every frame is an item; in tables, every row.
    --items names a list of paths and URLs instead.

    \b
    tally score photos/ --model squeezenet.onnx --task classify --labels labels.txt --out predictions/
    tally score 'photos/**/*.jpg' --model ./my-model/ --out out.csv
    tally score photos/ --model score.py --artifacts weights/ --out out/
    tally score clip.mp4 --model style.onnx --out styled.mp4
    tally score clip.mp4 --model yolox.onnx --task detect --overlay --out seen.mp4
    tally score --items urls.csv --item-column image --model squeezenet.onnx --out out.csv
    tally score readings.parquet --model model.skops --out predictions.parquet
    tally score 'readings/*.csv' --model-per Device,Tag='models/{Device}_{Tag}.skops' --out predictions.csv
    """
    from tally.jobs.spec import CSV_VALUES, QUEUE_VALUES, make

    if not fields["source"] and fields["items"] is None:
        raise click.UsageError("Missing argument 'SOURCE...' (or --items LIST).")
    if fields["items"] == "-":
        from tally.jobs.given import kept_list

        fields["base"] = fields["base"] or "."
        fields["items"] = str(kept_list(sys.stdin.buffer, lines=not (csv_options or _of_columns(fields))))
    fields["alerts"] = fields["alerts"] or None
    for flag in ("trust", "overlay", "deinterlace", "strict", "log", "escape_formulas", "empty_rows"):
        fields[flag] = fields[flag] or None
    fields |= {"settings": pairs("--set", assignments), "csv": literal_pairs("--csv", csv_options, CSV_VALUES)}
    fields["queue"] = literal_pairs("--queue", queue_options, QUEUE_VALUES)
    if fields["push"] is not None:
        fields |= pairs("--push", [f"push={fields['push']}"])
    spec = make(resources=pairs("--resource", resources), **fields)
    return _start(spec, resume=resume, overwrite=overwrite, quiet=quiet, fail_on_dead=fail_on_dead)


def _of_columns(fields: dict[str, Any]) -> bool:
    """Whether an option asks for a list with columns."""
    return any(fields[name] for name in ("item_column", "key", "keep", "where"))


@click.command()
@click.argument("file")
@click.option("--until-empty", is_flag=True, help="Queues only: end when the queue is empty.")
@_resume_options
def run(file: str, until_empty: bool, resume: bool, overwrite: bool, quiet: bool, fail_on_dead: float | None) -> int:
    """Run the job that the YAML FILE describes: the fields are those of 'tally score', with 'source'.

    Relative paths in it are relative to the file.
    """
    from tally.jobs.spec import read

    spec = read(file)
    if until_empty:
        spec = spec.model_copy(update={"until_empty": True})
    return _start(spec, resume=resume, overwrite=overwrite, quiet=quiet, fail_on_dead=fail_on_dead)


@click.command(hidden=True)
@click.argument("job", shell_complete=completion.jobs)
@click.option("--dead", is_flag=True, help="Replay the dead items.")
@click.option("-q", "--quiet", is_flag=True, help="No progress on the terminal.")
def coordinate(job: str, dead: bool, quiet: bool) -> int:
    """Drive JOB, which exists already, in this process."""
    from tally.cli.foreground import see_through
    from tally.jobs.cluster import check_versions
    from tally.jobs.facade import open_jobs

    check_versions()
    jobs = open_jobs(wait=lambda line: say(line, err=True))  # nobody is there to try again
    return see_through(jobs, job, quiet=quiet, retry_dead=dead, here=True)


def _start(spec: JobSpec, *, resume: bool, overwrite: bool, quiet: bool, fail_on_dead: float | None) -> int:
    with installation.prestarted(spec) as engine:  # before anything else that takes long to import
        from tally.cli.foreground import see_through

        jobs = installation.jobs()
        job = _submit(jobs, spec, resume=resume, overwrite=overwrite)
        return see_through(jobs, job, quiet=quiet, engine=engine, fail_on_dead=fail_on_dead)


def _submit(jobs: Jobs, spec: JobSpec, *, resume: bool, overwrite: bool) -> str:
    """The id of the job for this spec. If it was begun before, asks on a terminal whether to resume it."""
    from tally.terminal import interactive

    try:
        return jobs.submit(spec, resume=resume, overwrite=overwrite).id
    except JobExistsError as error:
        earlier = jobs.get(error.job_id)
        if earlier.alive or earlier.state == "finished" or not interactive():
            raise
        say(error.message, err=True)
        if not click.confirm(f"Resume job {earlier.id}?", default=True, err=True):
            raise
        return jobs.submit(spec, resume=True).id
