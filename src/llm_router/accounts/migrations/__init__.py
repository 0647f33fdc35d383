"""How the tables came to be, step by step: Alembic revisions, and bringing a database up to the newest.

A released revision is never changed; a change of the tables is a new file in `versions/` and a new entry here.
Not for: locking (store.py), or the tables as they are now (tables.py).
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from sqlalchemy import Connection

REVISIONS: Final = ("0001", "0002")
"""Every revision, oldest first: known without loading Alembic (0.1 s), which only an older database needs."""

HEAD: Final = REVISIONS[-1]

_one_at_a_time = threading.Lock()  # Alembic's `op` and `context` belong to the whole process


def upgrade(connection: Connection, revision: str = HEAD) -> None:
    """Bring the database to `revision`, inside the transaction that `connection` is in."""
    logging.getLogger("alembic").setLevel(logging.WARNING)  # it tells of its plugins, at length
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    with _one_at_a_time:
        command.upgrade(config, revision)
