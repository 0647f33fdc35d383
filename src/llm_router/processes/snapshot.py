"""What control and workers tell each other: records, without the wire.

Control tells every worker the newest `Snapshot` and single workers a `Word`; workers tell control `Fact`s. Workers
keep the last snapshot while control is away. Not for: sending any of it (news.py).
"""

from __future__ import annotations

import ssl

import msgspec

from llm_router.accounts.access import AccessSettings
from llm_router.accounts.keys import KeySpec
from llm_router.accounts.ledger import Ask, Grant
from llm_router.accounts.limits import Limits, Subject
from llm_router.accounts.usage import UsageRow
from llm_router.cache.base import CacheSettings
from llm_router.gateway.front import FrontSettings
from llm_router.observe.logs.settings import LogSettings
from llm_router.observe.profiling.settings import ProfilerSettings
from llm_router.observe.tracing.settings import TracingSettings
from llm_router.observe.tracing.trace import Trace
from llm_router.routing.table import RoutingTable


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a worker needs to serve, whole; swapped at once.

    Args:
        version: grows with each publication of one control process.
        keys: every key that is valid, of any scope.
        accounts_ready: False while control has not read its store yet: a worker that knows keys already goes on with
            them, another one serves no inference.
        key_needed: whether inference needs a key.
        open_circuits: backend to the monotonic second until which some worker's circuit of it is open.
        workers: how many share the router's queues, slots and memory cache.
        admitted_models, admitted_backends: names that may become label values; every other is `__other__`.
        monitoring_paths: configured paths that are forwarded to control beside the usual ones.
        logs: with the levels of now, which may have been changed since the configuration was read.
        metrics_enabled: whether requests are counted.
        metrics_sample: route template to n: of its requests, histograms observe one in n.
        tls_cert_file, tls_key_file: PEM files with which the app port speaks TLS; empty for plain HTTP.
    """

    version: int
    table: RoutingTable = RoutingTable()
    keys: tuple[KeySpec, ...] = ()
    accounts_ready: bool = True
    key_needed: bool = False
    open_circuits: dict[str, float] = {}
    cache: CacheSettings = CacheSettings()
    workers: int = 1
    access: AccessSettings = AccessSettings()
    front: FrontSettings = FrontSettings()
    admitted_models: tuple[str, ...] = ()
    admitted_backends: tuple[str, ...] = ()
    monitoring_paths: tuple[str, ...] = ()
    logs: LogSettings = LogSettings()
    tracing: TracingSettings = TracingSettings()
    profiler: ProfilerSettings = ProfilerSettings()
    metrics_enabled: bool = True
    metrics_sample: dict[str, int] = {}
    environment: str = ""
    tls_cert_file: str = ""
    tls_key_file: str = ""

    def limits(self) -> dict[Subject, Limits]:
        """Every limit there is, by whose it is."""
        subjects: dict[Subject, Limits] = {Subject("key", key.id): key.limits for key in self.keys if key.limits}
        subjects.update({Subject("model", model.name): model.limits for model in self.table.models if model.limits})
        if self.table.limits:
            subjects[Subject("global", "")] = self.table.limits
        return subjects

    def tls_context(self) -> ssl.SSLContext | None:
        """What the app port's TLS needs, read from the files now; None for plain HTTP. Raises: OSError, ssl.SSLError."""
        if not self.tls_cert_file:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self.tls_cert_file, self.tls_key_file or None, password="")
        return context


class BackendSeen(msgspec.Struct, frozen=True, tag_field="kind", tag="backend"):
    """A worker saw a backend answer, or fail to.

    Args:
        name: the backend's configured name.
        up: True if it answered anything; False if it could not be reached or broke off.
        problem: what went wrong, for people; empty if `up`.
    """

    name: str
    up: bool
    problem: str = ""


class CircuitSeen(msgspec.Struct, frozen=True, tag_field="kind", tag="circuit"):
    """A worker's circuit of a backend changed.

    Args:
        state: 0 closed, 1 half-open, 2 open, as `routing.breaker.State` and `circuit_state`.
        until: monotonic seconds (the clock is the machine's, one for all processes) at which an open one may be
            probed; 0 otherwise.
    """

    name: str
    state: int
    until: float = 0.0


class UsageBatch(msgspec.Struct, frozen=True, tag_field="kind", tag="usage"):
    """Usage rows. A worker keeps and sends them again until a `UsageTaken` with the number says they are stored.

    Args:
        is_late: these inferences ended before the worker lost its connection to a control: whether that one stored
            them is not known.
    """

    number: int
    rows: tuple[UsageRow, ...]
    is_late: bool = False


class LeaseAsk(msgspec.Struct, frozen=True, tag_field="kind", tag="lease"):
    """What a worker needs of limits, and gives back of them."""

    asks: tuple[Ask, ...]


class TraceBatch(msgspec.Struct, frozen=True, tag_field="kind", tag="traces"):
    """Traces that are kept. Lost with a control that dies."""

    traces: tuple[Trace, ...]


class CacheProbed(msgspec.Struct, frozen=True, tag_field="kind", tag="cache-probed"):
    """The answer to a `CacheProbe`: `problem` is empty if the worker's cache gave back what was put into it."""

    number: int
    problem: str
    seconds: float


class ProfileTaken(msgspec.Struct, frozen=True, tag_field="kind", tag="profile-taken"):
    """The answer to a `ProfileOrder`: the profile as it is shown, or why there is none."""

    number: int
    body: bytes = b""
    problem: str = ""


Fact = BackendSeen | CircuitSeen | UsageBatch | LeaseAsk | TraceBatch | CacheProbed | ProfileTaken
"""What workers tell control."""


class UsageTaken(msgspec.Struct, frozen=True, tag_field="kind", tag="usage-taken"):
    """The batch of that number is stored."""

    number: int


class LeaseGrants(msgspec.Struct, frozen=True, tag_field="kind", tag="lease-grants"):
    """The answers to a worker's asks."""

    grants: tuple[Grant, ...]


class CacheProbe(msgspec.Struct, frozen=True, tag_field="kind", tag="cache-probe"):
    """Put something into the cache, get it and delete it."""

    number: int


class ProfileOrder(msgspec.Struct, frozen=True, tag_field="kind", tag="profile"):
    """Take a profile of this process. `kind` is cpu, memory or continuous, see `observe.profiling`."""

    number: int
    profile: str
    seconds: float
    format: str
    rate_hz: float = 100.0


Word = UsageTaken | LeaseGrants | CacheProbe | ProfileOrder
"""What control tells one worker, beside the snapshots that it tells all. Never skipped."""
