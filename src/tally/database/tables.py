"""Every table: of jobs and their starts, alerts, the model registry, schedules and their runs, runs of trainings, keys,
the audit log and answers.

Times are seconds since the epoch by the database's own clock; those of a schedule's intervals are whole ones.
Columns marked "later" may be empty only because they were added to tables with rows in them, which SQLite cannot do
otherwise without copying the table.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

from tally.database.lease import lease_columns

metadata = MetaData()

# SQLite numbers rows by itself only where the column is INTEGER PRIMARY KEY.
_Id = BigInteger().with_variant(Integer, "sqlite")

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("fingerprint", String(64), nullable=False, index=True),
    Column("spec", JSON, nullable=False),
    Column("model", JSON, nullable=False),
    Column("state", String(16), nullable=False, index=True),
    Column("wanted", String(16), nullable=False),
    Column("error", Text),
    Column("remarks", JSON, nullable=False),
    Column("generation", Integer, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("started_at", Double),
    Column("finished_at", Double),
    # The job's coordinator.
    *lease_columns(),
    # How far planning has come.
    Column("plan_cursor", Text),
    Column("planned", Integer, nullable=False),
    Column("items", BigInteger, nullable=False),
    # What has been committed.
    Column("done", BigInteger, nullable=False),
    Column("dead", BigInteger, nullable=False),
    Column("rows", BigInteger, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("usage", JSON, nullable=False),
    Column("manifest", JSON),
    # Of the coordinator's last change: repeated because its answer was lost, it is not made twice.
    Column("nonce", String(32)),
    # What the job writes: kind (rows, images, video), format, columns, unit (items, frames, rows), place. Later.
    Column("output", JSON),
    # The place without trailing slashes. Later.
    Column("place", Text),
    # For finding jobs: the model's name; and lower-case id, model, sources and place. Later.
    Column("model_name", Text),
    Column("search", Text),
    # Of a part of a split job: whose part it is, and which: number, and shard or between. Later.
    Column("parent", String(32)),
    Column("part", JSON),
    Index("jobs_by_place", "place", "created_at", "id"),
    # Of parts only: SQLite would look for all other jobs in it, too, and then sort them. The migration says it of
    # PostgreSQL, too; here, SQLAlchemy would import all that it knows of PostgreSQL into every process.
    Index("jobs_by_parent", "parent", sqlite_where=text("parent IS NOT NULL")),
    Index("jobs_by_creation", "created_at", "id"),
)

chunks = Table(
    "chunks",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("job_id", String(32), ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("generation", Integer, nullable=False),
    Column("first", BigInteger, nullable=False),
    Column("count", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("losses", Integer, nullable=False),
    # What the source needs to read the items: JSON, compressed if it is long; emptied when the chunk is done.
    Column("payload", LargeBinary),
    Column("attempt", String(64)),
    Column("output", JSON),
    # Of the commit that handed it out, or by which it was done.
    Column("nonce", String(32)),
    # Later.
    Column("done_at", Double),
    Index("chunks_by_state", "job_id", "state", "first"),
    Index("chunks_by_time", "done_at"),
)

dead_items = Table(
    "dead_items",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("job_id", String(32), ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("key", Text, nullable=False),
    Column("stage", String(16), nullable=False),
    Column("error", Text, nullable=False),
    Column("first", BigInteger, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    # 1 while the item of a finished job is replayed: it is dead again if that comes to nothing. Later.
    Column("retried", Integer),
    Index("dead_items_by_job", "job_id", "first"),
)

# Keys of the items of an endless source that were planned: an item that is delivered again is not scored again.
received_keys = Table(
    "received_keys",
    metadata,
    Column("job_id", String(32), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    # A hash: keys may be long, and hold what a database does not take.
    Column("key", String(32), primary_key=True),
    # Of the item in the job: its chunk is the one that covers it, however often chunks were cut.
    Column("position", BigInteger, nullable=False),
    Column("at", Double, nullable=False),
    Index("received_keys_by_age", "job_id", "at"),
)

# What is committed and not pushed yet: what one attempt gave, or one item that was refused.
pushes = Table(
    "pushes",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("job_id", String(32), ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("parcel", String(32), nullable=False),  # its name, which no other has
    Column("item_keys", JSON, nullable=False),
    Column("info", JSON),  # by key, what is told of items beside their rows
    # The attempt's output, whose staged files hold the rows; or, of a refused item, its rows (Arrow's stream format).
    Column("output", JSON),
    Column("rows", LargeBinary),
    # Why the receiver does not take the item.
    Column("refused", Text),
    Index("pushes_by_job", "job_id", "id"),
)

# Jobs that a server is to start.
starts = Table(
    "starts",
    metadata,
    Column("job_id", String(32), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("action", String(16), nullable=False),  # submit, resume or retry
    Column("overwrite", Integer, nullable=False),
    Column("who", Text, nullable=False),  # asked for it
    Column("asked_at", Double, nullable=False),
    Column("attempts", Integer, nullable=False),
    # The server that starts it.
    *lease_columns(),
)

alerts = Table(
    "alerts",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("job_id", String(32), ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("generation", Integer, nullable=False),
    Column("position", Integer, nullable=False),  # of the rule in the job's spec
    Column("rule", Text, nullable=False),
    Column("value", Double),
    # quiet (the rule does not hold), pending (to be sent), delivered, failed (given up).
    Column("state", String(16), nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("error", Text),
    Column("created_at", Double, nullable=False),
    Column("next_at", Double),
    Column("delivered_at", Double),
    # The process that is sending it.
    *lease_columns(),
    UniqueConstraint("job_id", "generation", "position"),
)


# A removed version keeps its row: its number is never given to other content.
model_versions = Table(
    "model_versions",
    metadata,
    Column("name", String(128), primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("hash", String(71), nullable=False, index=True),
    Column("kind", String(16), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("facts", JSON, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("removed_at", Double),
)

model_aliases = Table(
    "model_aliases",
    metadata,
    Column("name", String(128), primary_key=True),
    Column("alias", String(128), primary_key=True),
    Column("version", Integer, nullable=False),
    ForeignKeyConstraint(["name", "version"], ["model_versions.name", "model_versions.version"]),
)

model_alias_history = Table(
    "model_alias_history",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("name", String(128), nullable=False),
    Column("alias", String(128), nullable=False),
    Column("version", Integer, nullable=False),
    # set, rollback or remove
    Column("action", String(16), nullable=False),
    Column("at", Double, nullable=False),
    # Who did it, where that is known.
    Column("who", String(200)),
    Index("model_alias_history_by_alias", "name", "alias", "id"),
)


schedules = Table(
    "schedules",
    metadata,
    Column("name", String(128), primary_key=True),
    # The fields of the file (of a job, a training, a clean-up), with absolute paths, and where it was.
    Column("template", JSON, nullable=False),
    Column("file", Text, nullable=False),
    Column("cron", String(255), nullable=False),
    Column("timezone", String(128), nullable=False),
    Column("overlap", String(16), nullable=False),
    Column("catch_up", String(16), nullable=False),
    Column("paused", Integer, nullable=False),
    Column("created_at", Double, nullable=False),
    # Ticks up to here have become runs, or were skipped.
    Column("planned_until", Double, nullable=False),
)

schedule_runs = Table(
    "schedule_runs",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("schedule", String(128), ForeignKey("schedules.name", ondelete="CASCADE"), nullable=False),
    Column("interval_start", BigInteger, nullable=False),
    Column("interval_end", BigInteger, nullable=False),
    # pending, running, finished, empty, failed or skipped
    Column("state", String(16), nullable=False),
    # cron, catch-up or backfill
    Column("reason", String(16), nullable=False),
    Column("again", Integer, nullable=False),  # overwrites the results of an earlier run
    # What does it: a job, or a training's run, or a sweep, or a pipeline's run; a clean-up has none.
    Column("job_id", String(32)),
    Column("training_id", String(32)),  # later
    Column("sweep_id", String(32)),  # later
    Column("outcome", Text),  # later: what came of a training, a pipeline or a clean-up, or how it stands
    Column("pipeline_id", String(32)),  # later
    Column("attempts", Integer, nullable=False),  # how often it was started
    Column("failures", Integer, nullable=False),  # how often it ended with an error
    Column("error", Text),
    Column("created_at", Double, nullable=False),
    Column("next_at", Double),  # not to be started before
    Column("started_at", Double),
    Column("finished_at", Double),
    # The process that sees it through.
    *lease_columns(),
    # Both ends: another cron expression may make a different interval with the same start.
    UniqueConstraint("schedule", "interval_start", "interval_end"),
    Index("schedule_runs_by_state", "schedule", "state", "interval_start"),
)


watches = Table(
    "watches",
    metadata,
    Column("name", String(128), primary_key=True),
    Column("url", Text, nullable=False),
    Column("pattern", Text, nullable=False),
    Column("exclude", Text),
    # The fields of the job file, with absolute paths, and where the file was.
    Column("template", JSON, nullable=False),
    Column("file", Text, nullable=False),
    Column("parallel", Integer, nullable=False),
    Column("paused", Integer, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("looked_at", Double),
    Column("error", Text),
)

# What a watch has seen: each content of each object.
watch_objects = Table(
    "watch_objects",
    metadata,
    Column("watch", String(128), ForeignKey("watches.name", ondelete="CASCADE"), primary_key=True),
    # A hash of the name and of the content's mark.
    Column("object", String(32), primary_key=True),
    Column("name", Text, nullable=False),
    Column("state", String(16), nullable=False),  # settling, taken, passed, written or refused
    Column("seen_at", Double, nullable=False),
    Column("job_id", String(32), index=True),
)

endpoints = Table(
    "endpoints",
    metadata,
    Column("name", String(63), primary_key=True),
    # What is to be served, and what was before: specs of tally.serving.deployments.
    Column("spec", JSON, nullable=False),
    Column("history", JSON, nullable=False),
    # Counts changes of the spec.
    Column("revision", Integer, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("changed_at", Double, nullable=False),
    Column("changed_by", Text, nullable=False),
    # The process that serves it.
    *lease_columns(),
    # What that process says: the revision that it serves, its URL, versions and replicas, and what went wrong.
    Column("observed", JSON, nullable=False),
    # How often in a row it could not be started, and when that is tried again.
    Column("failures", Integer, nullable=False),
    Column("start_at", Double, nullable=False),
)

# Only the hash of a key's secret is kept.
api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(12), primary_key=True),
    Column("name", String(64), nullable=False),
    Column("role", String(16), nullable=False),
    Column("hash", String(64), nullable=False),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double),
    Column("revoked_at", Double),
    Column("used_at", Double),
)

# Browsers that have shown a key; of their cookie, the hash.
sessions = Table(
    "sessions",
    metadata,
    Column("hash", String(64), primary_key=True),
    Column("key_id", String(12), ForeignKey("api_keys.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double, nullable=False),
)

audit = Table(
    "audit",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("at", Double, nullable=False),
    # The key's name, id and role, as they were then.
    Column("who", String(64), nullable=False),
    Column("key_id", String(12), nullable=False),
    Column("role", String(16), nullable=False),
    Column("action", Text, nullable=False),
    Column("target", Text, nullable=False),
    Column("status", Integer, nullable=False),
    Column("address", Text, nullable=False),
)

# What a server has answered, so that a request that is repeated is not carried out again.
answers = Table(
    "answers",
    metadata,
    # A hash of who asked and the idempotency key; and one of the request.
    Column("key", String(64), primary_key=True),
    Column("request", String(64), nullable=False),
    # None while it is being carried out.
    Column("status", Integer),
    # None where the answer holds a secret.
    Column("body", LargeBinary),
    Column("at", Double, nullable=False),
)

# One training each.
runs = Table(
    "runs",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("name", String(128), nullable=False),
    Column("kind", String(32), nullable=False),
    # The id of the sweep that it is a trial of.
    Column("sweep", String(32)),
    Column("state", String(16), nullable=False, index=True),
    Column("error", Text),
    Column("created_at", Double, nullable=False),
    # Of its last start: an interrupted run is resumed.
    Column("started_at", Double, nullable=False),
    Column("finished_at", Double),
    # The process that trains.
    *lease_columns(),
    # Where its files are, on the owner's host.
    Column("folder", Text, nullable=False),
    Column("parameters", JSON, nullable=False),
    Column("tags", JSON, nullable=False),
    # Name to last, step, least, most and count: what lists and comparisons show without reading every value.
    Column("metrics", JSON, nullable=False),
    # The versions that were registered, as models:/name/number.
    Column("models", JSON, nullable=False),
    Column("command", JSON, nullable=False),
    Column("code", JSON, nullable=False),
    Column("environment", JSON, nullable=False),
    Column("data", JSON, nullable=False),
    Column("cost", JSON, nullable=False),
    Index("runs_by_creation", "created_at", "id"),
    Index("runs_by_sweep", "sweep", "created_at"),
)

run_metrics = Table(
    "run_metrics",
    metadata,
    Column("run_id", String(32), ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True),
    Column("name", String(250), primary_key=True),
    Column("step", BigInteger, primary_key=True, autoincrement=False),
    # None for what is not a number.
    Column("value", Double),
    Column("at", Double, nullable=False),
)

# Many trainings over a space of parameters; each trial is a run.
sweeps = Table(
    "sweeps",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("name", String(128), nullable=False),
    Column("kind", String(32), nullable=False),
    Column("state", String(16), nullable=False),
    Column("error", Text),
    Column("created_at", Double, nullable=False),
    Column("started_at", Double, nullable=False),
    Column("finished_at", Double),
    # The process that hands trials to workers.
    *lease_columns(),
    Column("folder", Text, nullable=False),
    Column("spec", JSON, nullable=False),
    # The number of the best trial.
    Column("best", Integer),
    Column("model", Text),
    Index("sweeps_by_creation", "created_at", "id"),
)

trials = Table(
    "trials",
    metadata,
    Column("sweep_id", String(32), ForeignKey("sweeps.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("state", String(16), nullable=False),
    # How often it was begun.
    Column("attempts", Integer, nullable=False),
    # A trial that begins once more may do so in another run.
    Column("run_id", String(32), nullable=False),
    Column("parameters", JSON, nullable=False),
    # Of the sweep's metric, at this step: None until it has ended.
    Column("value", Double),
    Column("step", BigInteger),
    Column("error", Text),
)

# Runs of Argo workflow files on this machine.
pipeline_runs = Table(
    "pipeline_runs",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("name", String(128), nullable=False),
    Column("state", String(16), nullable=False),
    # What its driver should do, other than go on: cancel.
    Column("wanted", String(16)),
    Column("error", Text),
    Column("created_at", Double, nullable=False),
    Column("started_at", Double, nullable=False),
    Column("finished_at", Double),
    # The process that drives it.
    *lease_columns(),
    # Where logs and artifacts are, on the owner's host.
    Column("folder", Text, nullable=False),
    # The workflow as it was given, with all that it refers to, its parameters, and how it is run.
    Column("spec", JSON, nullable=False),
    Column("parameters", JSON, nullable=False),
    Index("pipeline_runs_by_creation", "created_at", "id"),
)

pipeline_nodes = Table(
    "pipeline_nodes",
    metadata,
    Column("run_id", String(32), ForeignKey("pipeline_runs.id", ondelete="CASCADE"), primary_key=True),
    # Of its name, which is the way to it from the top of the workflow.
    Column("id", String(32), primary_key=True),
    Column("name", Text, nullable=False),
    Column("display", Text, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("template", Text, nullable=False),
    # The id of the node that it is part of; empty for the first.
    Column("parent", String(32), nullable=False),
    # In the order in which they were begun.
    Column("number", Integer, nullable=False),
    Column("phase", String(16), nullable=False),
    Column("message", Text),
    Column("inputs", JSON, nullable=False),
    Column("outputs", JSON, nullable=False),
    Column("exit_code", Integer),
    Column("started_at", Double),
    Column("finished_at", Double),
    # What a person gave to a step that waits for one; None until then.
    Column("supplied", JSON),
)

# Mutexes and semaphores: which steps hold a place. One of a run that is interrupted keeps it.
pipeline_locks = Table(
    "pipeline_locks",
    metadata,
    Column("name", String(250), primary_key=True),
    Column("place", Integer, primary_key=True, autoincrement=False),
    Column("run_id", String(32), ForeignKey("pipeline_runs.id", ondelete="CASCADE"), nullable=False),
    Column("node_id", String(32), nullable=False),
)

# Outputs of steps that are not done again: those that a workflow memoizes under a name and a key of its own, and those
# of whole steps by the hash of command, inputs and code.
pipeline_cache = Table(
    "pipeline_cache",
    metadata,
    Column("cache", String(250), primary_key=True),
    Column("key", String(64), primary_key=True),
    Column("outputs", JSON, nullable=False),
    Column("run_id", String(32), nullable=False),
    Column("node_id", String(32), nullable=False),
    Column("made_at", Double, nullable=False),
)
