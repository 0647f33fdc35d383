"""Opens backends with their connection pools, and closes them when they have left the routing table.

One sweep serves the deadlines of all pools, so that no request needs a timer. Not for: choosing backends.
"""

from __future__ import annotations

from llm_router.backends.anthropic_messages import AnthropicMessages
from llm_router.backends.base import Backend
from llm_router.backends.openai_compatible import OpenAICompatible
from llm_router.routing.table import BackendSpec
from llm_router.signals import Recorder
from llm_router.upstream.pool import Origin, Pool, PoolSettings

SWEEP_S = 0.1
"""How often the owner calls `sweep`: the resolution of every upstream timeout."""


class Connections:
    """The open backends of one process. Retired ones live on until their last request has ended."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._open: list[Backend] = []
        self._retired: list[Backend] = []

    def __repr__(self) -> str:
        return f"Connections(open={self._open}, retired={self._retired})"

    def open(self, spec: BackendSpec) -> Backend:
        """A backend for the spec; connections are made when requests need them."""
        settings = PoolSettings(
            connect_s=spec.connect_s,
            first_byte_s=spec.first_byte_s,
            gap_s=spec.gap_s,
            total_s=spec.total_s,
            max_connections=spec.max_connections,
            wait_s=spec.wait_s,
            tls_verify=spec.tls_verify,
            tls_ca_file=spec.tls_ca_file or None,
        )
        pool = Pool(spec.name, Origin.parse(spec.url), settings, self._recorder)
        backend: Backend
        backend = AnthropicMessages(spec, pool) if spec.protocol == "anthropic" else OpenAICompatible(spec, pool)
        self._open.append(backend)
        return backend

    def retire(self, backend: Backend) -> None:
        """The backend is not routed to any more; what is in flight on it may end."""
        self._open.remove(backend)
        self._retired.append(backend)

    def in_use(self) -> dict[str, int]:
        """Requests in flight by backend, those on retired connections included."""
        counts = {backend.name: 0 for backend in self._open}
        for backend in (*self._open, *self._retired):
            counts[backend.name] = counts.get(backend.name, 0) + backend.in_use
        return counts

    async def sweep(self, now: float) -> None:
        """Enforce every deadline at monotonic instant `now`; close retired backends that are idle."""
        for backend in self._open:
            backend.pool.sweep(now)
        for backend in self._retired[:]:
            backend.pool.sweep(now)
            if backend.in_use == 0:
                self._retired.remove(backend)
                await backend.pool.aclose()

    async def aclose(self) -> None:
        """Close every connection at once."""
        for backend in (*self._open, *self._retired):
            await backend.pool.aclose()
        self._open.clear()
        self._retired.clear()
