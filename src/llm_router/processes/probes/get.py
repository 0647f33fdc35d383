"""One HTTP GET that wants to know the status only. The reply's body is not read: lists of models have megabytes.

Over the same connections as requests, so that certificates count as they do there. Not for: anything that needs a body.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from urllib.parse import quote, urlsplit

from llm_router.errors import BackendTimeout
from llm_router.signals import NoRecorder
from llm_router.upstream.pool import Origin, Pool, PoolSettings

_PATH_CHARACTERS = "/%:@!$&'()*+,;=~"


async def status_of(
    url: str,
    *,
    name: str,
    headers: Mapping[str, str],
    timeout_s: float,
    tls_verify: bool = True,
    tls_ca_file: str = "",
) -> int:
    """The status of the answer to a GET; redirections are not followed.

    Args:
        name: for errors, which do not repeat the URL.
        timeout_s: for connecting and the head of the answer together.

    Raises: BackendError; ValueError for a URL that is none. Cancelling it closes the connection.
    """
    origin = Origin.parse(url)
    parts = urlsplit(url)
    target = quote(parts.path or "/", safe=_PATH_CHARACTERS) + (f"?{parts.query}" if parts.query else "")
    lines = {"Host": origin.authority, "Accept": "*/*", "Connection": "close", **headers}
    head = "".join(f"{key}: {value}\r\n" for key, value in lines.items())
    settings = PoolSettings(
        connect_s=0.0, first_byte_s=0.0, max_connections=1, tls_verify=tls_verify, tls_ca_file=tls_ca_file or None
    )
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeout_s):
            # In a thread where there is TLS: reading the system's authorities takes 20 ms.
            make = asyncio.to_thread if origin.scheme == "https" else _now
            pool = await make(Pool, name, origin, settings, NoRecorder(), loop=loop)
            async with pool:
                reply = await pool.send(f"GET {target} HTTP/1.1\r\n{head}\r\n".encode("latin-1"))
                reply.close()
                return reply.status
    except TimeoutError:
        raise BackendTimeout(name, "total", timeout_s) from None


async def _now(make: type[Pool], /, *arguments: object, **options: object) -> Pool:
    return make(*arguments, **options)  # type: ignore[arg-type]
