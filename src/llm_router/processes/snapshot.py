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


Fact = BackendSeen | CircuitSeen | UsageBatch | LeaseAsk
"""What workers tell control."""


class UsageTaken(msgspec.Struct, frozen=True, tag_field="kind", tag="usage-taken"):
    """The batch of that number is stored."""

    number: int


class LeaseGrants(msgspec.Struct, frozen=True, tag_field="kind", tag="lease-grants"):
    """The answers to a worker's asks."""

    grants: tuple[Grant, ...]


Word = UsageTaken | LeaseGrants
"""What control tells one worker, beside the snapshots that it tells all. Never skipped."""
