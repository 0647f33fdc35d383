"""The tables of keys and usage, as SQLAlchemy Core sees them.

The migrations (migrations/versions) make them; a test compares the two. Names begin with `llm_router_` because a
PostgreSQL database may be shared with other programs. Not for: reading and writing (store.py).
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import BigInteger, Boolean, Column, Double, Index, Integer, LargeBinary, MetaData, Table, Text, text

METADATA: Final = MetaData()

VERSION_TABLE: Final = "llm_router_schema"
"""Holds the revision of the tables: one row."""

KEYS: Final = Table(
    "llm_router_keys",
    METADATA,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("digest", LargeBinary, nullable=False, unique=True),
    Column("scopes", Text, nullable=False),  # JSON: ["inference"]
    Column("models", Text, nullable=False),  # JSON: []
    Column("limits", Text, nullable=False),  # JSON: {"requests_per_minute": 60}; what is not there has its default
    Column("created_time", Double, nullable=False),  # Unix seconds, as the others
    Column("expires_time", Double),
    Column("revoked_time", Double),
    Column("last_used_time", Double),
)

Index(
    "llm_router_keys_valid_name",
    KEYS.c.name,
    unique=True,
    sqlite_where=text("revoked_time IS NULL"),
    postgresql_where=text("revoked_time IS NULL"),
)

USAGE: Final = Table(
    "llm_router_usage",
    METADATA,
    Column("id", Text, primary_key=True),
    # Whole microseconds: days and minutes are then integer divisions, which are the same in every database.
    Column("time_us", BigInteger, nullable=False, index=True),
    Column("request_id", Text, nullable=False),
    Column("key_id", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("backend", Text, nullable=False),
    Column("strategy", Text, nullable=False),
    Column("input_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("reasoning_tokens", BigInteger, nullable=False),
    Column("usage_source", Text, nullable=False),
    Column("cost_usd", Double, nullable=False),
    Column("cost_status", Text, nullable=False),
    Column("cached", Boolean, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("status", Integer, nullable=False),
    Column("duration_s", Double, nullable=False),
)
