"""Reading lists, digests of what is like them, and links that lead back to where their reader was."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Make the table of reading lists, and add what digests are of and where links lead."""
    op.create_table(
        "reading",
        sa.Column("user_id", sa.Integer(), nullable=False),
        sa.Column("entry_id", sa.Integer(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("user_id", "entry_id", name="pk_reading"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_reading_user_id", ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["entry_id"], ["entries.id"], name="fk_reading_entry_id", ondelete="CASCADE"),
    )
    op.create_index("ix_reading_entry_id", "reading", ["entry_id"])
    op.add_column("subscriptions", sa.Column("kind", sa.String(), nullable=False, server_default="papers"))
    op.add_column("login_links", sa.Column("next", sa.String(), nullable=False, server_default="/"))
    op.add_column("login_links", sa.Column("vote", sa.String(), nullable=False, server_default=""))
