"""What Alembic runs for each of its commands; it finds the connection in the attributes of its configuration.

Not for: importing.
"""

from __future__ import annotations

from alembic import context

from llm_router.accounts.tables import METADATA, VERSION_TABLE

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    version_table=VERSION_TABLE,
)
with context.begin_transaction():
    context.run_migrations()
