"""What the router needs of a backend: turn a request into upstream bytes, and understand its replies.

Not for: connections (upstream) or choosing between backends (routing).
"""

from __future__ import annotations

from typing import Protocol

from llm_router.chat import InferenceRequest, Usage
from llm_router.upstream.pool import Pool


class Backend(Protocol):
    """One configured backend with its connections. `name` is a label value."""

    @property
    def name(self) -> str: ...

    @property
    def pool(self) -> Pool: ...

    @property
    def in_use(self) -> int:
        """Requests of this process that it is working on, those waiting for a connection included."""

    def encode(self, request: InferenceRequest, upstream_model: str, request_id: str) -> tuple[bytes, bytes]:
        """Head (up to and including the empty line) and body of the upstream request.

        Raises: InvalidRequest when this backend is known not to serve such a request.
        """

    def usage_of(self, body: bytes) -> Usage | None:
        """Token usage in a whole successful reply; None when it gives none.

        Raises: BadReply when the body is not what the protocol promises.
        """

    def without_secrets(self, body: bytes) -> bytes:
        """An error reply as callers may see it: without the credentials that we sent, if it quotes them."""

    def problem_in(self, body: bytes) -> str:
        """The message in the body of an error reply; empty if there is none."""
