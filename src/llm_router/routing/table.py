"""The routing table: which models there are, who serves them, in which order to try. Immutable; swapped whole.

Built by the control process (or library mode) from configuration and the state of runners; read by workers.
Not for: deciding (policies.py) or acting (router.py).
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from llm_router.accounts.limits import Limits
from llm_router.models.prices import Price

Strategy = Literal[
    "balanced",
    "quality-first",
    "cost-optimized",
    "speed-priority",
    "round-robin",
    "random",
    "least-loaded",
    "capability-match",
    "custom",
]
"""How a deployment is chosen among those of a model. Label values."""

STRATEGIES: Final[tuple[str, ...]] = Strategy.__args__  # type: ignore[attr-defined]

Capability = Literal["tools", "vision", "json", "reasoning", "embeddings"]

CAPABILITIES: Final[tuple[Capability, ...]] = Capability.__args__  # type: ignore[attr-defined]
"""What a model may be able to do beyond answering text with text."""


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
        only_embeds: it is a runner whose model answers no prompts.
        ready: False while it is known not to serve (a runner that loads or restarts).
        protocol: the API that it speaks.
        auth: how `api_key` is sent: as bearer token, or in the header `api-key` (Azure) or `x-api-key` (Anthropic).
        query: appended to every request's target, like `api-version=2024-10-21`; without the question mark.
        provider: whose price list counts, a provider's id of genai-prices; `local` for a server of one's own, whose
            tokens cost nothing; empty: found by the address.
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
    only_embeds: bool = False
    ready: bool = True
    protocol: Literal["openai", "anthropic"] = "openai"
    auth: Literal["bearer", "api-key", "x-api-key"] = "bearer"
    query: str = ""
    provider: str = ""

    def __repr__(self) -> str:
        return f"BackendSpec({self.name!r}, {self.url!r}, ready={self.ready})"


class Deployment(msgspec.Struct, frozen=True):
    """A model on a backend.

    Args:
        upstream_model: the name that the backend knows it by.
        quality: how good its answers are, 0..1, by the operator's judgement; None when nobody said.
        price: what it costs; None when unknown.
        context_tokens: input and output that fit into it together; 0 when unknown.
        capabilities: of `CAPABILITIES`; None when unknown, which counts as able.
    """

    backend: str
    upstream_model: str
    quality: float | None = None
    price: Price | None = None
    context_tokens: int = 0
    capabilities: tuple[Capability, ...] | None = None


class QueueSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How requests wait for a model, in the whole router: workers divide the bounds among them.

    Args:
        slots: requests that the model's backends work on at once; 0 takes the sum of their `max_connections`
            (of a local model: its parallel slots).
        max_waiting: requests that wait; the next one is refused (429).
        wait_s: how long one may wait (408).
    """

    slots: int = 0
    max_waiting: int = 100
    wait_s: float = 30.0


class BreakerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """When a backend is left alone for a while.

    Args:
        enabled: False never leaves one alone.
        window_s: how far back attempts count.
        min_attempts: fewer attempts than this within the window say nothing.
        error_ratio: share of failed attempts from which on the circuit opens, 0..1.
        slow_s: an attempt that took longer for its first byte counts as slow; 0 counts none.
        slow_ratio: share of slow attempts from which on the circuit opens, 0..1.
        cooldown_s: how long it stays open; doubles with each opening in a row up to `cooldown_max_s`. A longer
            Retry-After of the backend is kept to, up to `cooldown_max_s`.
        probes: attempts that a half-open circuit lets through at once; as many successes close it.
    """

    enabled: bool = True
    window_s: float = 30.0
    min_attempts: int = 10
    error_ratio: float = 0.5
    slow_s: float = 0.0
    slow_ratio: float = 0.8
    cooldown_s: float = 5.0
    cooldown_max_s: float = 120.0
    probes: int = 2


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a caller can ask for. `fallbacks` are names of other models, tried in order."""

    name: str
    deployments: tuple[Deployment, ...] = ()
    fallbacks: tuple[str, ...] = ()
    strategy: str = ""
    created: int = 0
    owned_by: str = "llm-router"
    queue: QueueSpec = QueueSpec()
    limits: Limits = Limits()


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
    """All models and backends. Names are unique; every name that is referred to exists.

    Args:
        custom: where the `custom` strategy's function is: `package.module:function`, or the name of an entry point
            of the group `llm_router.policies`; empty if there is none.
        deadline_s: what a request may take in all, attempts and waiting included; 0 for no such bound.
        max_waiting: requests that wait in all queues of the router together; the next one is shed (503).
        shed_lag_s: a worker whose loop is later than this sheds new requests; 0 never does.
        limits: of all callers together.
    """

    models: tuple[ModelSpec, ...] = ()
    backends: tuple[BackendSpec, ...] = ()
    default_model: str = ""
    strategy: Strategy = "balanced"
    custom: str = ""
    retry: RetrySpec = RetrySpec()
    breaker: BreakerSpec = BreakerSpec()
    deadline_s: float = 0.0
    max_waiting: int = 1000
    shed_lag_s: float = 1.0
    limits: Limits = Limits()
