"""The schema of the store, one Alembic revision after the other; the store applies them when it opens."""
