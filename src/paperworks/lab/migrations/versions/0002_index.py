"""The page's index: papers, their labels and embeddings, and how far each source has been read."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Make the four tables."""
    op.create_table(
        "entries",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("title", sa.String(), nullable=False),
        sa.Column("abstract", sa.String(), nullable=False),
        sa.Column("authors", sa.JSON(), nullable=False),
        sa.Column("categories", sa.JSON(), nullable=False),
        sa.Column("tags", sa.JSON(), nullable=False),
        sa.Column("published", sa.Double(), nullable=False),
        sa.Column("year", sa.Integer(), nullable=False),
        sa.Column("room", sa.String()),
        sa.Column("slug", sa.String()),
        sa.Column("status", sa.String()),
        sa.Column("url", sa.String(), nullable=False),
        sa.Column("source", sa.String(), nullable=False),
        sa.Column("upvotes", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("about", sa.String(), nullable=False),
        sa.Column("added", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_entries"),
        sa.UniqueConstraint("key"),
        sa.UniqueConstraint("slug"),
    )
    op.create_index("ix_entries_published", "entries", ["published", "id"])
    for column in ("year", "room", "status", "added"):
        op.create_index(f"ix_entries_{column}", "entries", [column])
    op.create_table(
        "entry_labels",
        sa.Column("label", sa.String(), nullable=False),
        sa.Column("entry_id", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("label", "entry_id", name="pk_entry_labels"),
        _of_an_entry("entry_labels"),
    )
    op.create_index("ix_entry_labels_entry_id", "entry_labels", ["entry_id"])
    op.create_table(
        "entry_vectors",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("entry_id", sa.Integer(), nullable=False),
        sa.Column("embedder", sa.String(), nullable=False),
        sa.Column("signs", sa.LargeBinary(), nullable=False),
        sa.Column("vector", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_entry_vectors"),
        sa.UniqueConstraint("entry_id"),
        _of_an_entry("entry_vectors"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "ingests",
        sa.Column("source", sa.String(), nullable=False),
        sa.Column("start", sa.Double(), nullable=False),
        sa.Column("reached", sa.Double(), nullable=False),
        sa.Column("revised", sa.Double()),
        sa.PrimaryKeyConstraint("source", name="pk_ingests"),
    )


def _of_an_entry(table: str) -> sa.ForeignKeyConstraint:
    name = f"fk_{table}_entry_id"
    return sa.ForeignKeyConstraint(["entry_id"], ["entries.id"], name=name, ondelete="CASCADE")
