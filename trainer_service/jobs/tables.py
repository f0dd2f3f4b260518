"""The store's tables. A change needs a step in `migrations`."""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData()

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("id", sa.String(64), nullable=False, unique=True),
    sa.Column("request_id", sa.String(128), unique=True),  # null where the caller gave none
    sa.Column("spec", sa.JSON, nullable=False),
    sa.Column("state", sa.String(16), nullable=False, index=True),
    sa.Column("create_time", sa.Double, nullable=False),
    sa.Column("reason", sa.Text, nullable=False, default=""),
    sa.Column("start_time", sa.Double),
    sa.Column("end_time", sa.Double),
    sa.Column("attempt", sa.Integer, nullable=False, default=0),
    sa.Column("retries", sa.Integer, nullable=False, default=0),
    sa.Column("step", sa.BigInteger, nullable=False, default=0),
    sa.Column("max_steps", sa.BigInteger, nullable=False, default=0),
    sa.Column("epoch", sa.Double, nullable=False, default=0.0),
    sa.Column("last_sequence", sa.BigInteger, nullable=False, default=0),
    sa.Column("gpus", sa.JSON, nullable=False, default=list),
    sa.Column("process", sa.String(128), nullable=False, default=""),
    sa.Column("offsets", sa.JSON, nullable=False, default=dict),
    sqlite_autoincrement=True,  # or the number of the newest job, deleted, would be given again
)
labels = sa.Table(
    "labels",
    metadata,
    sa.Column("job", sa.Integer, sa.ForeignKey("jobs.number", ondelete="CASCADE"), primary_key=True),
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
    sa.Index("labels_by_value", "key", "value"),
)
events = sa.Table(
    "events",
    metadata,
    sa.Column("job", sa.Integer, sa.ForeignKey("jobs.number", ondelete="CASCADE"), primary_key=True),
    sa.Column("sequence", sa.BigInteger, primary_key=True),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("time", sa.Double, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("body", sa.JSON, nullable=False),
)
