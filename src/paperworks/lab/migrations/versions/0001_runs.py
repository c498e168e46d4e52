"""Runs, their measurements, files and messages."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the four tables."""
    op.create_table(
        "runs",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("paper", sa.String(), nullable=False),
        sa.Column("parameters", sa.JSON(), nullable=False),
        sa.Column("seed", sa.Integer(), nullable=False),
        sa.Column("scale", sa.String(), nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("started", sa.Double(), nullable=False),
        sa.Column("finished", sa.Double()),
        sa.Column("environment", sa.JSON(), nullable=False),
        sa.Column("error", sa.String()),
        sa.Column("traceback", sa.String()),
        sa.Column("progress", sa.JSON(), nullable=False),
        sa.Column("host", sa.String(), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("process_started", sa.Double(), nullable=False),
        sa.Column("heartbeat", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_runs"),
    )
    op.create_index("ix_runs_paper", "runs", ["paper", "started"])
    op.create_index("ix_runs_status", "runs", ["status"])
    op.create_table(
        "measurements",
        *_of_a_run("measurements"),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.Column("unit", sa.String(), nullable=False),
        sa.Column("better", sa.String(), nullable=False),
        sa.Column("series", sa.String()),
        sa.Column("low", sa.Double()),
        sa.Column("high", sa.Double()),
        sa.Column("repeats", sa.JSON(), nullable=False),
        sa.Column("against", sa.String()),
    )
    op.create_table(
        "artefacts",
        *_of_a_run("artefacts"),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("path", sa.String(), nullable=False),
    )
    op.create_table(
        "logs",
        *_of_a_run("logs"),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("message", sa.String(), nullable=False),
    )
    for table in ("measurements", "artefacts", "logs"):
        op.create_index(f"ix_{table}_run_id", table, ["run_id"])


def _of_a_run(table: str) -> tuple[sa.schema.SchemaItem, ...]:
    return (
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("run_id", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=f"pk_{table}"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=f"fk_{table}_run_id", ondelete="CASCADE"),
    )
