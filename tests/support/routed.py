"""A router with its connections, without a gateway: what it answers, and what it tells of backends and circuits."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable

from llm_router.backends.base import Backend
from llm_router.backends.connections import Connections
from llm_router.chat import Endpoint, InferenceRequest
from llm_router.gateway.openai import read_request
from llm_router.routing.breaker import State
from llm_router.routing.router import Router
from llm_router.routing.table import BackendSpec, RoutingTable
from llm_router.signals import NoRecorder, RequestRecord


class Routed:
    """A router over real connections.

    Args:
        clock: the router's; timeouts of connections follow the loop's.
        opened: what to make of each backend that was opened.

    Attributes:
        seen: what was told about backends going down and up.
        circuits: what was told about circuits: (name, state), in order.
    """

    def __init__(
        self,
        routing: RoutingTable,
        *,
        clock: Callable[[], float] = time.monotonic,
        workers: int = 1,
        opened: Callable[[Backend], Backend] = lambda backend: backend,
    ) -> None:
        self.clock = clock
        self.connections = Connections(NoRecorder())
        self.seen: list[tuple[str, bool]] = []
        self.circuits: list[tuple[str, State]] = []
        self._plain: dict[int, Backend] = {}

        def open_backend(spec: BackendSpec) -> Backend:
            plain = self.connections.open(spec)
            backend = opened(plain)
            self._plain[id(backend)] = plain
            return backend

        self.router = Router(
            open_backend=open_backend,
            close_backend=lambda backend: self.connections.retire(self._plain.pop(id(backend))),
            on_backend=lambda name, is_up: self.seen.append((name, is_up)),
            on_circuit=lambda name, state, until: self.circuits.append((name, state)),
            clock=clock,
            rng=random.Random(7),
        )
        self.router.update(routing, workers)

    def record(self) -> RequestRecord:
        return RequestRecord("POST", "/", "r", self.clock())

    async def ask(self, model: str = "m", record: RequestRecord | None = None) -> RequestRecord:
        """The record of one request, whose reply is read and let go. Raises what the caller would get."""
        return await self.send(request(model), record)

    async def send(self, inference: InferenceRequest, record: RequestRecord | None = None) -> RequestRecord:
        record = record or self.record()
        exchange = await self.router.send(inference, record)
        exchange.finish(self.clock(), "")
        record.status = exchange.status
        return record


def request(model: str = "m", *, stream: bool = False) -> InferenceRequest:
    """A chat."""
    body = b'{"model":"%b","messages":[]%b}' % (model.encode(), b',"stream":true' if stream else b"")
    return read_request(Endpoint.CHAT, body)


@contextlib.asynccontextmanager
async def routed(
    routing: RoutingTable,
    *,
    clock: Callable[[], float] = time.monotonic,
    workers: int = 1,
    opened: Callable[[Backend], Backend] = lambda backend: backend,
) -> AsyncIterator[Routed]:
    """A `Routed` whose connections are closed at the end; no slot or place may be left taken then."""
    made = Routed(routing, clock=clock, workers=workers, opened=opened)
    try:
        yield made
        queues = made.router._queues.values()
        assert all(queue.busy == queue.waiting == 0 for queue in queues), list(queues)
    finally:
        await made.connections.aclose()
