"""Talks to the control process of a running router over its Unix socket: no key needed, only the same user.

Standard library only: a command should answer at once.
"""

from __future__ import annotations

import http.client
import json
import socket
from typing import Any

from llm_router.errors import RouterError
from llm_router.processes.plan import unix_address

_ANSWER_S = 600.0
"""Loading a large model from a slow disk takes minutes; control bounds it itself."""


class NotRunning(RouterError):
    """There is no router with this data folder."""

    code = "not_running"


class Refused(RouterError):
    """Control answered with an error; its message is ours, `reason` is its code."""

    code = "refused"

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_ANSWER_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_ANSWER_S)
        self.sock.connect(unix_address(self._path))


def call(socket_path: str, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """The JSON that control answers.

    Args:
        socket_path: `control.sock` of the router's data folder.
    Raises: NotRunning, Refused.
    """
    content, status = _ask(socket_path, method, path, body)
    return _decoded(content, status)


def fetch(socket_path: str, method: str, path: str) -> bytes:
    """What control answers, as it is. Raises: NotRunning, Refused."""
    content, status = _ask(socket_path, method, path, None)
    if status >= 400:
        _decoded(content, status)
    return content


def _ask(socket_path: str, method: str, path: str, body: dict[str, Any] | None) -> tuple[bytes, int]:
    connection = _UnixConnection(socket_path)
    headers = {} if body is None else {"content-type": "application/json"}
    try:
        connection.request(method, path, None if body is None else json.dumps(body).encode(), headers)
        reply = connection.getresponse()
        return reply.read(), reply.status
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise NotRunning(f"no router is running with {socket_path}; start one with `llm-router serve`") from error
    except PermissionError as error:
        raise NotRunning(f"the router at {socket_path} belongs to another user") from error
    except (OSError, http.client.HTTPException) as error:
        raise NotRunning(
            f"the router at {socket_path} does not answer: {str(error) or type(error).__name__}"
        ) from error
    finally:
        connection.close()


def _decoded(content: bytes, status: int) -> Any:
    try:
        answer = json.loads(content)
    except ValueError as error:
        raise Refused(f"the router answered {status} with something that is not JSON") from error
    if status >= 400:
        raise _refused(answer, status)
    return answer


def _refused(answer: Any, status: int) -> Refused:
    error = answer.get("error") if isinstance(answer, dict) else None
    if isinstance(error, dict) and error.get("message"):
        return Refused(str(error["message"]), str(error.get("code") or ""))
    return Refused(f"the router answered {status}")
