"""What the router needs of a backend: turn a request into upstream bytes, and understand its replies.

A request and what answers it are in the caller's dialect, which `request.endpoint` tells: `Endpoint.MESSAGES` is
Anthropic's, the others are OpenAI's. A backend that speaks the other one translates both ways.
Not for: connections (upstream) or choosing between backends (routing).
"""

from __future__ import annotations

from typing import Protocol

from llm_router.chat import Endpoint, InferenceRequest, Usage
from llm_router.upstream.pool import Pool


class ReplyReader(Protocol):
    """Translates one reply into the caller's dialect: either `plain`, once, or `feed` until `rest`.

    State of one attempt; another attempt needs another reader.
    """

    def plain(self, status: int, body: bytes) -> bytes:
        """A whole reply, a success or an error. An error that is no JSON object comes back as it is.

        Raises: BadReply when a success is not what the backend's protocol promises.
        """

    def feed(self, data: bytes) -> bytes:
        """Whole events for these bytes of a stream; empty while an event is unfinished or means nothing to the caller.

        Raises: BackendError when the backend says in the stream that it failed, or sends what is no event of its
            protocol. What came before that was returned by an earlier call.
        """

    def rest(self) -> bytes:
        """What ends the stream for the caller; empty if it has ended already. Called once, after the last `feed`.

        Raises: BackendError when the stream ended in the middle of an answer, or as `feed`.
        """


class Backend(Protocol):
    """One configured backend with its connections. `name` is a label value."""

    @property
    def name(self) -> str: ...

    @property
    def pool(self) -> Pool: ...

    @property
    def in_use(self) -> int:
        """Requests of this process that it is working on, those waiting for a connection included."""

    def encode(
        self, request: InferenceRequest, upstream_model: str, request_id: str, trace: str = ""
    ) -> tuple[bytes, bytes]:
        """Head (up to and including the empty line) and body of the upstream request.

        Args:
            trace: header lines of the trace, each with a line end before it; empty outside a trace.

        Raises: InvalidRequest when this backend is known not to serve such a request.
        """

    def reader(self, request: InferenceRequest) -> ReplyReader | None:
        """What translates the reply to `request`; None where bytes pass as they come, which is the usual case."""

    def usage_of(self, endpoint: Endpoint, body: bytes) -> Usage | None:
        """Token usage in a whole successful reply to a request of `endpoint`, translated already; None without any.

        Raises: BadReply when the body is not what the protocol promises.
        """

    def without_secrets(self, body: bytes) -> bytes:
        """An error reply as callers may see it: without the credentials that we sent, if it quotes them."""

    def problem_in(self, body: bytes) -> str:
        """The message in the body of an error reply, of either dialect; empty if there is none."""
