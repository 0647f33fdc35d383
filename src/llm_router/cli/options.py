"""What several commands share: options, the settings they lead to, and asking a router that runs."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from llm_router.errors import RouterError

if TYPE_CHECKING:
    from llm_router.config import Settings

_QUIET_S = 300.0
"""Seconds without a byte after which the router is given up: a cold model on a slow machine takes minutes."""


class CannotAsk(RouterError):
    """The router could not be reached, or answered with an error; its message is shown."""

    code = "cannot_ask"


ConfigFile = Annotated[
    str | None,
    typer.Option("--config", "-c", metavar="FILE", help="Configuration file; by default llm-router.yaml if it exists."),
]
DataDir = Annotated[
    str | None, typer.Option("--data-dir", metavar="FOLDER", help="Models, sockets and state.  [env: DATA_DIR]")
]
Url = Annotated[
    str | None,
    typer.Option(
        "--url", metavar="URL", help="The router to talk to, like http://127.0.0.1:3006; by default the local one."
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", metavar="KEY", envvar="LLM_ROUTER_API_KEY", help="Key, if the router asks for one."),
]


def settings_of(config: str | None, *, files_needed: bool = True, **overrides: Any) -> Settings:
    """The settings that these flags lead to; flags that were not given are left out.

    Args:
        files_needed: whether model files must exist.
    Raises: ConfigError.
    """
    from llm_router.config import load

    given = {name: value for name, value in overrides.items() if value is not None}
    return load(config, os.environ, given, files_needed=files_needed)


def router_url(url: str | None, config: str | None) -> str:
    """The base URL of the router to talk to, without a slash at its end."""
    if url:
        return url.removesuffix("/").removesuffix("/v1")
    server = settings_of(config).server
    return f"{server.scheme}://{reachable(server.host)}:{server.port}"


def first_model(url: str, api_key: str | None) -> str:
    """The first model that the router at `url` lists.

    Raises: CannotAsk when it cannot be reached, refuses, or has no models.
    """
    with request(url, "GET", "/v1/models", None, api_key) as reply:
        models = json.loads(reply.read()).get("data", ())
    if not models:
        raise CannotAsk(f"the router at {url} has no models yet; `llm-router models load NAME` loads one")
    return str(models[0]["id"])


@contextlib.contextmanager
def request(
    url: str, method: str, path: str, body: dict[str, Any] | None, api_key: str | None
) -> Iterator[http.client.HTTPResponse]:
    """Ask the router at `url`; the reply is to be read inside the block. Standard library: a command starts fast.

    Raises: CannotAsk, also for what goes wrong inside the block.
    """
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise CannotAsk(f"{url!r} is no address of a router; it looks like http://127.0.0.1:3006")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    headers = {"content-type": "application/json"} if body is not None else {}
    if api_key:
        headers["authorization"] = f"Bearer {api_key}"
    try:
        connection = kind(parts.hostname, parts.port, timeout=_QUIET_S)
    except ValueError as error:
        raise CannotAsk(f"{url!r} is no address of a router: {error}") from error
    try:
        connection.request(method, parts.path + path, None if body is None else json.dumps(body).encode(), headers)
        reply = connection.getresponse()
        if reply.status >= 400:
            raise CannotAsk(problem(reply.read(), reply.status))
        yield reply
    except ConnectionRefusedError as error:
        raise CannotAsk(f"no router answers at {url}; start one with `llm-router serve`") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise CannotAsk(f"the connection to {url} failed: {str(error) or type(error).__name__}") from error
    finally:
        connection.close()


def problem(content: bytes, status: int) -> str:
    """The message of an OpenAI error object, or the status if it is none."""
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the router answered {status}"


def reachable(host: str) -> str:
    """An address to connect to for a listener at `host`, as it is written in a URL."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host
