"""Keys."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "llm_router_keys",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("digest", sa.LargeBinary, nullable=False, unique=True),
        sa.Column("scopes", sa.Text, nullable=False),
        sa.Column("models", sa.Text, nullable=False),
        sa.Column("limits", sa.Text, nullable=False),
        sa.Column("created_time", sa.Double, nullable=False),
        sa.Column("expires_time", sa.Double),
        sa.Column("revoked_time", sa.Double),
        sa.Column("last_used_time", sa.Double),
    )
    op.create_index(
        "llm_router_keys_valid_name",
        "llm_router_keys",
        ["name"],
        unique=True,
        sqlite_where=sa.text("revoked_time IS NULL"),
        postgresql_where=sa.text("revoked_time IS NULL"),
    )
