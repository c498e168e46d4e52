"""Runs that were started from the page."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        "run_requests",
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("user_id", sa.Integer()),
        sa.Column("requested", sa.Double(), nullable=False),
        sa.Column("working", sa.Boolean(), nullable=False),
        sa.Column("cancelled", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", name="pk_run_requests"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_run_requests_run_id", ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_run_requests_user_id", ondelete="SET NULL"),
    )
    op.create_index("ix_run_requests_user_id", "run_requests", ["user_id"])
