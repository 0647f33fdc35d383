"""The routing table: which models there are, who serves them, in which order to try. Immutable; swapped whole.

Built by the control process (or library mode) from configuration and the state of runners; read by workers.
Not for: deciding (policies.py) or acting (router.py).
"""

from __future__ import annotations

from typing import Literal

import msgspec


class BackendSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One server of models and how to talk to it.

    Args:
        name: the configured name; a label value.
        url: base URL up to and including the version prefix, like `http://127.0.0.1:8080/v1`.
        api_key: sent as a bearer token; empty sends none. Never shown.
        headers: further headers to send, name to value.
        connect_s, first_byte_s, gap_s, total_s: timeouts in seconds; 0 waits for ever.
        max_connections: connections to it from one worker; more requests wait up to `wait_s`.
        embeddings: whether it can embed; None when unknown (ask it).
        stream_usage: whether to ask it for token usage at the end of streams (`stream_options`);
            off for servers that refuse the field.
        local_model: the name of the local model whose runner this is; empty for remote backends.
        ready: False while it is known not to serve (a runner that loads or restarts).
    """

    name: str
    url: str
    api_key: str = ""
    headers: dict[str, str] = {}
    connect_s: float = 5.0
    first_byte_s: float = 300.0
    gap_s: float = 120.0
    total_s: float = 900.0
    max_connections: int = 256
    wait_s: float = 10.0
    tls_verify: bool = True
    tls_ca_file: str = ""
    embeddings: bool | None = None
    stream_usage: bool = True
    local_model: str = ""
    ready: bool = True

    def __repr__(self) -> str:
        return f"BackendSpec({self.name!r}, {self.url!r}, ready={self.ready})"


class Deployment(msgspec.Struct, frozen=True):
    """A model on a backend. `upstream_model` is the name that the backend knows it by."""

    backend: str
    upstream_model: str


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a caller can ask for. `fallbacks` are names of other models, tried in order."""

    name: str
    deployments: tuple[Deployment, ...] = ()
    fallbacks: tuple[str, ...] = ()
    strategy: str = ""
    created: int = 0
    owned_by: str = "llm-router"


class RetrySpec(msgspec.Struct, frozen=True, kw_only=True):
    """How attempts are repeated.

    Args:
        attempts: tries at one model, the first included.
        backoff_s: upper bound of the first random wait; doubles with each try up to `backoff_max_s`.
        budget_ratio: retries may be at most this share of requests over the last 10 s, so that a
            failing backend is not hit by a storm (Finagle's retry budget).
        budget_min: retries per 10 s that are always allowed.
    """

    attempts: int = 3
    backoff_s: float = 0.05
    backoff_max_s: float = 1.0
    budget_ratio: float = 0.2
    budget_min: int = 10


class RoutingTable(msgspec.Struct, frozen=True, kw_only=True):
    """All models and backends. Names are unique; every name that is referred to exists."""

    models: tuple[ModelSpec, ...] = ()
    backends: tuple[BackendSpec, ...] = ()
    default_model: str = ""
    strategy: Literal["round-robin", "least-loaded"] = "round-robin"
    retry: RetrySpec = RetrySpec()
