"""Runs migrations on the connection that the caller hands over."""

from alembic import context

from tally.jobs import tables
from tally.models import tables as model_tables
from tally.triggers import tables as trigger_tables

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=[tables.metadata, model_tables.metadata, trigger_tables.metadata],
    render_as_batch=True,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
