"""Sends traces to a collector: OTLP over HTTP, as JSON, in a thread of its own.

The queue is bounded; what does not fit is dropped and counted, and nobody waits. A batch goes every second, or as soon as it is
full. When the collector is away or overloaded the batch is tried again, later each time, for a minute; then it is lost, and counted.
JSON because it needs no library; every OTLP/HTTP collector takes it. Not for: making traces (spans.py), showing them (store.py).

    submit -> queue (spans) -> batch -> POST  200        sent; what the collector rejected of it is counted
                                       ^      429 502 503 504, or no answer: once more, after Retry-After or a backoff
                                       |______|
                                              anything else: refused, counted

Source: https://opentelemetry.io/docs/specs/otlp/ (1.9), sections OTLP/HTTP and JSON Protobuf Encoding.
"""

from __future__ import annotations

import asyncio
import gzip
import http.client
import logging
import math
import random
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import msgspec

from llm_router.errors import ConfigError
from llm_router.observe.logs.redact import clean
from llm_router.observe.tracing import names
from llm_router.observe.tracing.settings import TracingSettings
from llm_router.observe.tracing.trace import Span, Trace, Value

_log = logging.getLogger("llm_router.observe.tracing")

DELAY_S: Final = 1.0
"""How long a span waits for others at most."""

GIVE_UP_S: Final = 60.0
"""After this a batch is lost: newer traces are worth more than the ones of the beginning of an outage."""

FIRST_BACKOFF_S: Final = 1.0
LONGEST_BACKOFF_S: Final = 30.0

_AGAIN: Final = frozenset((429, 502, 503, 504))
_MAX_REPLY_BYTES: Final = 65_536
_SAID_CHARS: Final = 300
_SECRET_CHARS: Final = 8  # shorter values of headers are flags and versions

_KINDS: Final = {"internal": 1, "server": 2, "client": 3}
_ERROR: Final = 2
# Of `flags`: whether it is known that the parent is in another process, and that it is.
_HAS_REMOTE: Final = 0x100
_IS_REMOTE: Final = 0x200


class ExportStatistics(NamedTuple):
    """`waiting`, `sent` and `dropped` (by reason: `queue-full`, `export-failed`, `export-refused`) are spans. `problem` says
    why the last attempt failed, empty if none did."""

    waiting: int
    sent: int
    dropped: Mapping[str, int]
    problem: str


class _Failed(Exception):
    """The collector did not take a batch. `retry_after_s` is None where it did not say."""

    def __init__(self, problem: str, *, is_retryable: bool, retry_after_s: float | None = None) -> None:
        super().__init__(problem)
        self.is_retryable = is_retryable
        self.retry_after_s = retry_after_s


class OtlpExporter:
    """Exports what it is handed by `submit`, from `start` to `aclose`. Safe across threads.

    Args:
        settings: with an endpoint.
        version: of the program.
        environment: like `production`; empty for none.
        hostname: of this machine; empty for none.
        clock: monotonic seconds.
        wall: Unix seconds.
        wait: waits that many seconds, or until the given event is set; True if it is.

    Raises: ConfigError for an endpoint that is no URL.
    """

    def __init__(
        self,
        settings: TracingSettings,
        *,
        version: str,
        environment: str = "",
        hostname: str = "",
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        wait: Callable[[threading.Event, float], bool] = threading.Event.wait,
    ) -> None:
        self._collector = _Collector(settings, version)
        self._resource = _resource(settings, version, environment, hostname)
        self._scope = {"name": "llm_router", "version": version}
        self._settings = settings
        self._rng = rng or random.Random()
        self._clock = clock
        self._wall = wall
        self._wait = wait
        self._lock = threading.RLock()  # `_drop` takes it alone and within others
        self._queue: deque[Trace] = deque()
        self._queued = 0
        self._under_way = 0
        self._sent = 0
        self._dropped = {"queue-full": 0, "export-failed": 0, "export-refused": 0}
        self._problem = ""
        self._is_abandoned = False
        self._some = threading.Event()  # something waits
        self._full = threading.Event()  # a whole batch does, or this is the end
        self._ending = threading.Event()  # no more waiting between attempts
        self._thread = threading.Thread(target=self._run, name="traces", daemon=True)

    def __repr__(self) -> str:
        return f"<OtlpExporter {self._collector} {self.statistics()}>"

    @property
    def thread(self) -> threading.Thread:
        """The thread that exports, for the accounting of CPU time."""
        return self._thread

    def start(self) -> None:
        """Begin to export. Nothing is connected before there is something to send."""
        self._thread.start()

    def submit(self, trace: Trace) -> None:
        """Take a trace, unless it is only kept for being recent. Never waits; a full queue drops it."""
        if trace.kept == "recent":
            return
        size = len(trace.spans)
        with self._lock:
            fits = self._queued + size <= self._settings.queue_spans and not self._ending.is_set()
            if fits:
                self._queue.append(trace)
                self._queued += size
                if self._queued >= self._settings.batch:
                    self._full.set()
        if fits:
            self._some.set()
        else:
            self._drop("queue-full", size)

    def statistics(self) -> ExportStatistics:
        with self._lock:
            waiting = self._queued + self._under_way
            return ExportStatistics(waiting, self._sent, dict(self._dropped), self._problem)

    async def aclose(self, timeout_s: float = 2.0) -> None:
        """Send what waits, once, and end; what cannot be sent within `timeout_s` is dropped and counted."""
        await asyncio.to_thread(self.close, timeout_s)

    def close(self, timeout_s: float = 2.0) -> None:
        """The same, for who has no event loop."""
        self._ending.set()
        self._full.set()
        self._some.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        with self._lock:
            self._is_abandoned = True
            left = self._queued + self._under_way
            if left:
                self._drop("export-failed", left)
            self._queued = self._under_way = 0
            self._queue.clear()
        self._collector.abort()

    # -- the thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            self._some.wait()
            self._wait(self._full, DELAY_S)
            batch = self._take()
            if batch:
                self._export(batch)
            elif self._ending.is_set():
                self._collector.close()
                return

    def _take(self) -> list[Trace]:
        """The traces of the next batch, one at least if there is one."""
        batch: list[Trace] = []
        size, most = 0, self._settings.batch
        with self._lock:
            while self._queue and (not batch or size + len(self._queue[0].spans) <= most):
                trace = self._queue.popleft()
                batch.append(trace)
                size += len(trace.spans)
            self._queued -= size
            self._under_way = size
            if self._queued < most and not self._ending.is_set():
                self._full.clear()
            if not self._queue and not self._ending.is_set():
                self._some.clear()
        return batch

    def _export(self, batch: Sequence[Trace]) -> None:
        size = sum(len(trace.spans) for trace in batch)
        try:
            body = gzip.compress(encode(batch, self._resource, self._scope), compresslevel=1)
            rejected, said = self._deliver(body)
        except _Failed as failure:
            self._fails(str(failure))
            self._settle(size, size, "export-failed" if failure.is_retryable else "export-refused")
        except Exception:
            # A fault of ours must not end the thread: what follows would be lost without a word.
            _log.exception("%d spans could not be exported", size)
            self._settle(size, size, "export-failed")
        else:
            rejected = min(rejected, size)
            if rejected or said:
                _log.warning("the collector %s rejected %d of %d spans: %s", self._collector, rejected, size, said)
            if self._problem:
                self._problem = ""
                _log.warning("traces reach the collector %s again", self._collector)
            self._settle(size, rejected, "export-refused")

    def _deliver(self, body: bytes) -> tuple[int, str]:
        """Send until it is taken: how many spans were rejected, and what was said. Raises: _Failed."""
        give_up_at = self._clock() + GIVE_UP_S
        backoff_s = FIRST_BACKOFF_S
        while True:
            try:
                return self._collector.post(body, self._wall)
            except _Failed as failure:
                if not failure.is_retryable or self._ending.is_set():
                    raise
                # Full jitter over the upper half: whoever was cut off at the same moment does not come back as one.
                wait_s = failure.retry_after_s
                if wait_s is None:
                    wait_s = backoff_s * self._rng.uniform(0.5, 1.0)
                if self._clock() + wait_s > give_up_at:
                    raise
                self._fails(str(failure))
                self._wait(self._ending, wait_s)
                backoff_s = min(2 * backoff_s, LONGEST_BACKOFF_S)

    def _settle(self, spans: int, lost: int, reason: str) -> None:
        """The batch is done with, and `lost` of its spans are. Nothing, where `close` has given it up already."""
        with self._lock:
            if self._is_abandoned:
                return
            self._sent += spans - lost
            if lost:
                self._drop(reason, lost)
            self._under_way = 0

    def _fails(self, problem: str) -> None:
        """Say it once, until it goes well again or another thing goes wrong."""
        if problem != self._problem:
            self._problem = problem
            _log.warning("traces do not reach the collector %s: %s", self._collector, problem)

    def _drop(self, reason: str, spans: int) -> None:
        with self._lock:
            self._dropped[reason] += spans


class _Collector:
    """One kept connection to the endpoint. Of one thread, but for `abort`."""

    def __init__(self, settings: TracingSettings, version: str) -> None:
        try:
            url = urlsplit(settings.endpoint)
            port = url.port
        except ValueError:
            raise ConfigError("tracing.endpoint", f"{clean(settings.endpoint, 200)!r} is no URL") from None
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ConfigError(
                "tracing.endpoint",
                f"{clean(settings.endpoint, 200)!r} is no URL of a collector; write one like "
                "http://localhost:4318/v1/traces",
            )
        self._is_tls = url.scheme == "https"
        self._host = url.hostname
        self._port = port or (443 if self._is_tls else 80)
        self._target = (url.path or "/") + (f"?{url.query}" if url.query else "")
        self._timeout_s = settings.timeout_s
        self._headers = {
            "user-agent": f"llm-runner-router/{version}",
            **settings.headers,
            "content-type": "application/json",
            "content-encoding": "gzip",
        }
        self._secrets = _secrets(settings)
        self._connection: http.client.HTTPConnection | None = None

    def __repr__(self) -> str:
        return f"{self._host}:{self._port}"

    def post(self, body: bytes, wall: Callable[[], float]) -> tuple[int, str]:
        """How many spans were rejected, and what the collector said. Raises: _Failed."""
        is_kept = self._connection is not None
        try:
            status, headers, reply = self._exchange(body)
        except (ConnectionError, http.client.RemoteDisconnected, http.client.CannotSendRequest) as error:
            self.close()
            if not is_kept:
                raise _Failed(_reason(error), is_retryable=True) from None
            return self.post(body, wall)  # it was closed while idle, as servers do; a new connection will tell
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise _Failed(_reason(error), is_retryable=True) from None
        for value in self._secrets:  # it may quote what it was sent
            reply = reply.replace(value, b"***")
        if status == 200:
            return _partial_success(reply)
        said = clean(reply.decode("utf-8", "replace"), _SAID_CHARS)
        problem = f"it answered {status}" + (f": {said}" if said else "")
        raise _Failed(
            problem, is_retryable=status in _AGAIN, retry_after_s=_retry_after(headers.get("retry-after", ""), wall())
        )

    def _exchange(self, body: bytes) -> tuple[int, http.client.HTTPMessage, bytes]:
        connection = self._connection
        if connection is None:
            connection = self._connection = self._open()
        connection.request("POST", self._target, body, self._headers)
        response = connection.getresponse()
        reply = response.read(_MAX_REPLY_BYTES)
        if not response.isclosed():  # more follows than anybody should say
            self.close()
        return response.status, response.headers, reply

    def _open(self) -> http.client.HTTPConnection:
        if self._is_tls:
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(self._host, self._port, timeout=self._timeout_s, context=context)
        return http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_s)

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def abort(self) -> None:
        """End an exchange that is under way in the other thread."""
        connection = self._connection
        raw = None if connection is None else connection.sock
        if raw is not None:
            try:
                raw.shutdown(socket.SHUT_RDWR)
            except OSError:
                return  # the other side was faster


def encode(traces: Sequence[Trace], resource: Mapping[str, Value], scope: Mapping[str, str]) -> bytes:
    """An ExportTraceServiceRequest in JSON: ids in hexadecimal, 64-bit numbers as texts, enums as numbers."""
    spans = [_span(trace, span) for trace in traces for span in trace.spans]
    of_scope = {"scope": scope, "spans": spans, "schemaUrl": names.SCHEMA_URL}
    of_resource = {
        "resource": {"attributes": _attributes(resource)},
        "scopeSpans": [of_scope],
        "schemaUrl": names.SCHEMA_URL,
    }
    return msgspec.json.encode({"resourceSpans": [of_resource]})


def _span(trace: Trace, span: Span) -> dict[str, Any]:
    flags = _HAS_REMOTE | (trace.kept == "sampled")
    if span.kind == "server" and span.parent_id:
        flags |= _IS_REMOTE
    made: dict[str, Any] = {
        "traceId": trace.trace_id,
        "spanId": span.span_id,
        "flags": flags,
        "name": span.name,
        "kind": _KINDS[span.kind],
        "startTimeUnixNano": str(span.start_ns),
        "endTimeUnixNano": str(span.end_ns),
        "attributes": _attributes(span.attributes),
    }
    if span.parent_id:
        made["parentSpanId"] = span.parent_id
    if trace.tracestate:
        made["traceState"] = trace.tracestate
    # A server that refuses what the caller did wrong has done its work: by the HTTP conventions its status is unset.
    if span.error and not (span.kind == "server" and 400 <= trace.status < 500):
        made["status"] = {"code": _ERROR, "message": span.error}
    return made


def _attributes(attributes: Mapping[str, Value]) -> list[dict[str, Any]]:
    return [{"key": key, "value": _value(value)} for key, value in attributes.items()]


def _value(value: Value) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value if math.isfinite(value) else str(value)}
    return {"stringValue": value}


def _resource(settings: TracingSettings, version: str, environment: str, hostname: str) -> dict[str, Value]:
    resource: dict[str, Value] = {
        names.SDK_NAME: "llm_router",
        names.SDK_LANGUAGE: "python",
        names.SDK_VERSION: version,
        names.SERVICE_VERSION: version,
    }
    if environment:
        resource[names.ENVIRONMENT] = environment
    if hostname:
        resource[names.HOST_NAME] = hostname
    return {**resource, **settings.resource, names.SERVICE_NAME: settings.service_name}


def _secrets(settings: TracingSettings) -> list[bytes]:
    """What a collector is told to let us in, the longest first: one may be a part of another."""
    url = urlsplit(settings.endpoint)
    values = [*settings.headers.values(), *url.query.split("&")]
    parts = [part for value in values for part in (value, value.rpartition(" ")[2], value.rpartition("=")[2])]
    found = {value for value in (*parts, url.password or "") if len(value) >= _SECRET_CHARS}
    return sorted((value.encode() for value in found), key=len, reverse=True)


def _partial_success(reply: bytes) -> tuple[int, str]:
    """Rejected spans and the message of an ExportTraceServiceResponse; a reply in other words took everything."""
    try:
        part = msgspec.json.decode(reply)["partialSuccess"]
        rejected = int(part.get("rejectedSpans", 0))
        said = clean(str(part.get("errorMessage", "")), _SAID_CHARS)
    except (msgspec.DecodeError, LookupError, TypeError, ValueError, AttributeError):
        return 0, ""
    return max(0, rejected), said


def _retry_after(text: str, now: float) -> float | None:
    """Seconds from a Retry-After, which is seconds or a date; None for nothing or nonsense."""
    if not text:
        return None
    if text.isascii() and text.isdigit() and len(text) <= 9:
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - now)
    except (ValueError, OverflowError):
        return None


def _reason(error: Exception) -> str:
    """Without what the other side wrote, which could be anything."""
    if isinstance(error, TimeoutError):
        return "it did not answer in time"
    if isinstance(error, http.client.HTTPException) and not isinstance(error, ConnectionError):
        return f"it does not speak HTTP ({type(error).__name__})"
    return f"no connection ({getattr(error, 'strerror', None) or type(error).__name__})"
