"""Links that tell what they do and bring no password, and guesses at passwords."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Make the links anew and the table of guesses, and take back passwords that may be a stranger's.

    A password of a confirmed account was chosen by who registered, before the owner of the address had opened a link.
    Owners choose a new one by mail.
    """
    op.drop_table("login_links")
    op.create_table(
        "login_links",
        sa.Column("token_hash", sa.String(), nullable=False),
        sa.Column("email", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("replaced", sa.Boolean(), nullable=False),
        sa.Column("expires", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("token_hash", name="pk_login_links"),
    )
    op.create_index("ix_login_links_email", "login_links", ["email"])
    op.create_index("ix_login_links_expires", "login_links", ["expires"])
    op.create_table(
        "guesses",
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("remaining", sa.Double(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_guesses"),
    )
    op.create_index("ix_guesses_at", "guesses", ["at"])
    suspect = "confirmed IS NOT NULL AND password IS NOT NULL"
    op.execute(f"DELETE FROM sessions WHERE user_id IN (SELECT id FROM users WHERE {suspect})")
    op.execute(f"UPDATE users SET password = NULL WHERE {suspect}")
