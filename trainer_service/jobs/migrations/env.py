"""What alembic runs: the steps that are missing, on the connection that the store gives, in its transaction."""

from __future__ import annotations

from alembic import context

from trainer_service.jobs.tables import metadata

context.configure(
    connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True
)
context.run_migrations()
