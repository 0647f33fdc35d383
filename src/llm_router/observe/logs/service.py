"""Who writes a log line: the fields that every line of a process has in common.

Not for: what happened (entry.py, request_lines.py). Standard library only: the supervisor's lines name it too.
"""

from __future__ import annotations

import os
import socket
from typing import NamedTuple, Self


class Service(NamedTuple):
    """`name` and `version` of the program, `environment` as ENVIRONMENT says, and where it runs."""

    name: str = "llm-router"
    version: str = ""
    environment: str = "production"
    hostname: str = ""
    pid: int = 0

    @classmethod
    def here(cls, version: str, environment: str, name: str = "llm-router") -> Self:
        """This process on this machine."""
        return cls(name, version, environment, socket.gethostname(), os.getpid())
