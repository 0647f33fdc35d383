"""Free TCP ports for servers that tests start."""

from __future__ import annotations

import random
import socket
from typing import Final

PORTS: Final = range(12_000, 30_000)
"""Below those that the system gives to connections (32768 and up on Linux): one that was free a moment ago would else be
taken by some client of another test before its server starts."""

_rng = random.SystemRandom()


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nothing listens on at this moment, and that no connection will be given."""
    while True:
        port = _rng.choice(PORTS)
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
