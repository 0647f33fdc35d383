"""The checks `external_NAME`: whether something outside that the router's users need can be reached.

    tcp://host:port     something accepts connections
    tls://host:port     and has a certificate that is valid for that name
    http(s)://…         and answers a GET with a status below 500

Not for: backends (endpoints.py). The targets are the operator's, so nothing is kept from asking addresses inside.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import urlsplit

from llm_router.errors import BackendError
from llm_router.observe.health.checks import Check, failed, passed
from llm_router.observe.health.settings import ExternalTarget
from llm_router.processes.probes.get import status_of

_SCHEMES: Final = ("tcp", "tls", "http", "https")
_DAY_S: Final = 86_400.0


class ExternalCheck:
    """The check of one target.

    Args:
        timeout_s: for all of it.
        tls_ca_file: PEM file of authorities instead of the system's.
        clock, wall: monotonic and Unix seconds.
    """

    def __init__(
        self,
        target: ExternalTarget,
        *,
        timeout_s: float,
        tls_ca_file: str = "",
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._target = target
        self._timeout_s = timeout_s
        self._tls_ca_file = tls_ca_file
        self._clock = clock
        self._wall = wall

    def __repr__(self) -> str:
        return f"<ExternalCheck {self._target.name}>"

    async def check(self) -> Check:
        """Reach it now. The message names the target, without user name, password and query."""
        begin = self._clock()
        shown = without_secrets(self._target.target)
        try:
            async with asyncio.timeout(self._timeout_s):
                said, details = await self._reach()
        except _Unreachable as error:
            return failed(f"{shown} {error}", details={"target": shown})
        except BackendError as error:
            return failed(f"{shown}: {error.problem}", details={"target": shown})
        except (OSError, ValueError, TimeoutError) as error:
            return failed(f"{shown}: {_problem(error, self._timeout_s)}", details={"target": shown})
        took_ms = round((self._clock() - begin) * 1000, 3)
        return passed(f"{shown} {said}", details={"target": shown, "latency_ms": took_ms, **details})

    async def _reach(self) -> tuple[str, dict[str, Any]]:
        parts = urlsplit(self._target.target)
        if parts.scheme not in _SCHEMES or not parts.hostname:
            raise ValueError("is no target; write tcp://host:port, tls://host:port or an http(s) URL")
        if parts.scheme in {"http", "https"}:
            return await self._get()
        if parts.port is None:
            raise ValueError(f"has no port; write {parts.scheme}://{parts.hostname}:PORT")
        if parts.scheme == "tcp":
            await self._connect(parts.hostname, parts.port, None)
            return "accepts connections", {}
        # In a thread: reading the system's authorities takes 20 ms.
        context = await asyncio.to_thread(ssl.create_default_context, cafile=self._tls_ca_file or None)
        certificate = await self._connect(parts.hostname, parts.port, context)
        left_s = ssl.cert_time_to_seconds(str(certificate["notAfter"])) - self._wall()
        return "has a valid certificate", {"certificate_days_left": round(left_s / _DAY_S, 1)}

    async def _get(self) -> tuple[str, dict[str, Any]]:
        status = await status_of(
            self._target.target,
            name=self._target.name,
            headers={},
            timeout_s=self._timeout_s,
            tls_ca_file=self._tls_ca_file,
        )
        if status >= 500:
            raise _Unreachable(f"answered {status}")
        return f"answered {status}", {"status": status}

    @staticmethod
    async def _connect(host: str, port: int, context: ssl.SSLContext | None) -> dict[str, Any]:
        """Connect and leave. Returns: the certificate that it showed; nothing without TLS."""
        _, writer = await asyncio.open_connection(host, port, ssl=context)
        try:
            return writer.get_extra_info("peercert") or {}
        finally:
            writer.close()
            with contextlib.suppress(OSError, ssl.SSLError):
                await writer.wait_closed()


class _Unreachable(Exception):
    """It is there and does not do what it should."""


def without_secrets(target: str) -> str:
    """A target as it may be shown: without user name, password and query."""
    try:
        parts = urlsplit(target)
        port = "" if parts.port is None else f":{parts.port}"
    except ValueError:
        return "the target"
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}{port}{parts.path}" if host else "the target"


def _problem(error: Exception, timeout_s: float) -> str:
    if isinstance(error, TimeoutError) and error.errno is None:  # ours, not the network's
        return f"no answer within {timeout_s:g} s"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"no TLS connection: {error.reason}"
    if isinstance(error, OSError):
        return error.strerror or "it cannot be reached"
    return str(error)
