"""Alembic's entry: apply the migrations over the connection that the store hands in."""

from alembic import context

from paperworks.lab.store import Base

# Outside a migration Alembic's context has no configuration, and reading this module changes nothing.
if hasattr(context, "config"):
    context.configure(
        connection=context.config.attributes["connection"],
        target_metadata=Base.metadata,
        render_as_batch=True,
    )
    with context.begin_transaction():
        context.run_migrations()
