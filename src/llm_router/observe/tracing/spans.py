"""A trace out of a request's record: the request's own span, and one for each step that happened.

    POST /v1/chat/completions                server
    |- receive, auth, limits, cache          internal, one after the other
    |- queue                                 one for each model whose queue it waited in
    |- route                                 until a backend was chosen
    |- chat MODEL                            client, one for each attempt; the parent of what the backend traces itself
       |- first token, stream                internal, of the attempt that streamed

The request path notes instants only; this is called afterwards, for requests whose trace is kept. Everything that a caller,
a backend or an operator wrote is redacted and bounded here, so that whoever shows or exports a trace need not.
Not for: deciding what is kept (keep.py), names (names.py), prompts and completions (content.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

from llm_router.observe.logs.redact import clean, clean_id, clean_query, redact_keys
from llm_router.observe.tracing import names
from llm_router.observe.tracing.content import input_messages, output_messages
from llm_router.observe.tracing.trace import Span, SpanKind, Trace, Value
from llm_router.signals import OTHER, Attempt, RequestRecord

TEXT_CHARS: Final = 1024
"""Of each text in a span but content: an address, a user agent, an error."""

_RECEIVE_S: Final = 0.001
"""A request that arrived within this came in one piece: no step worth a span."""

_STEP: Final = 0x9E3779B97F4A7C15  # odd, so the ids of a trace's spans are all different
_MASK: Final = (1 << 64) - 1


class Server(NamedTuple):
    """What is known of a backend beside its name. `provider` is the configuration's id; `port` 0 where unknown."""

    provider: str = ""
    address: str = ""
    port: int = 0


UNKNOWN: Final = Server()
NO_SERVERS: Final[Mapping[str, Server]] = {}


def trace_of(
    record: RequestRecord,
    ended_at: float,
    *,
    wall_offset_s: float,
    process: str,
    content: bool = False,
    servers: Mapping[str, Server] = NO_SERVERS,
    scheme: str = "http",
) -> Trace:
    """The trace of a finished request that has a place in one (`record.span_id`).

    The same record gives the same trace, span ids included.

    Args:
        ended_at: monotonic seconds.
        wall_offset_s: Unix seconds minus monotonic ones, now.
        process: that served it, like `worker-0`.
        content: whether prompt and completion go into the attempt's span, if the record has them.
        servers: by name of the backend.
        scheme: of the listener, http or https.
    """
    return _Making(record, ended_at, wall_offset_s).trace(process, content=content, servers=servers, scheme=scheme)


class _Making:
    """One trace in the making. Instants are monotonic seconds; none is outside the request's own span."""

    def __init__(self, record: RequestRecord, ended_at: float, wall_offset_s: float) -> None:
        self.record = record
        self.ended_at = max(ended_at, record.started_at)
        self._offset_ns = round(wall_offset_s * 1e9)
        self._root = int(record.span_id, 16)
        self._made = 0
        self.spans: list[Span] = []

    def trace(self, process: str, *, content: bool, servers: Mapping[str, Server], scheme: str) -> Trace:
        record = self.record
        self._before()
        self._waits()
        self._choice()
        for number, attempt in enumerate(record.attempts, start=1):
            self._attempt(number, attempt, servers.get(attempt.backend, UNKNOWN), content=content)
        # Steps of equal beginning keep the order in which they were made, which is that in which they happen.
        self.spans.sort(key=_start)
        method = record.method if record.method in names.METHODS else names.OTHER_METHOD
        root = Span(
            name=_name(method, record.route),
            span_id=record.span_id,
            parent_id=record.parent_id,
            kind="server",
            start_ns=self._ns(record.started_at),
            end_ns=self._ns(self.ended_at),
            error=_words(record),
            attributes=_of_request(record, method, process, scheme),
        )
        return Trace(
            trace_id=record.trace_id,
            request_id=clean_id(record.request_id),
            kept=record.kept,
            parent_id=record.parent_id,
            tracestate=redact_keys(record.tracestate),
            process=process,
            method=method,
            route=record.route,
            model=record.model,
            backend=record.attempts[-1].backend if record.attempts else "",
            key=record.key,
            status=record.status,
            outcome=record.outcome,
            error_type=record.error_type,
            start_ns=root.start_ns,
            end_ns=root.end_ns,
            spans=(root, *self.spans),
        )

    # -- steps -----------------------------------------------------------------------------------------

    def _before(self) -> None:
        """What happens before a backend is looked for."""
        record = self.record
        begun_at, identified_at, allowed_at = record.begun_at, record.identified_at, record.allowed_at
        if begun_at - record.started_at >= _RECEIVE_S:
            self._add(names.RECEIVE, record.started_at, begun_at)
        if identified_at:
            self._add(names.AUTH, begun_at or record.started_at, identified_at)
        elif record.error_type == "unauthorized" and not allowed_at:
            self._add(names.AUTH, begun_at or record.started_at, self.ended_at, error=_words(record))
        before = identified_at or begun_at or record.started_at
        if record.limit_hit is not None:
            scope, limit = record.limit_hit
            hit: dict[str, Value] = {names.LIMIT_SCOPE: scope, names.LIMIT: limit}
            self._add(names.LIMITS, before, allowed_at or self.ended_at, error=_words(record), attributes=hit)
        elif allowed_at:
            self._add(names.LIMITS, before, allowed_at)
        if record.looked_up_at:
            found: dict[str, Value] = {names.CACHE: record.cache_type, names.CACHED: record.cached}
            self._add(names.CACHE_LOOKUP, allowed_at or before, record.looked_up_at, attributes=found)

    def _waits(self) -> None:
        """A span for each queue that it waited in; of those that it gave up, only how long is known."""
        record = self.record
        begin = record.looked_up_at or record.allowed_at or record.identified_at or record.begun_at or record.started_at
        for model, seconds in record.waits:
            for attempt in record.attempts:  # it waited before them, between them or after them
                if attempt.started_at < begin + seconds:
                    begin = max(begin, attempt.ended_at)
            self._add(names.QUEUE, begin, begin + seconds, error="no slot came free", attributes={names.MODEL: model})
            begin += seconds
        queued_at, slot_at = record.queued_at, record.slot_at
        if slot_at > queued_at:
            self._add(names.QUEUE, queued_at, slot_at, attributes={names.MODEL: record.model})
        elif queued_at and not slot_at:
            self._add(
                names.QUEUE, queued_at, self.ended_at, error=_words(record), attributes={names.MODEL: record.model}
            )

    def _choice(self) -> None:
        record = self.record
        until = record.routed_at
        if not until:
            return
        instants = (
            record.slot_at, record.queued_at, record.looked_up_at, record.allowed_at, record.identified_at,
            record.begun_at, record.started_at,
        )  # fmt: skip
        begin = max((instant for instant in instants if instant <= until), default=until)
        self._add(names.ROUTE, begin, until, attributes={names.STRATEGY: record.strategy, names.REASON: record.reason})

    def _attempt(self, number: int, attempt: Attempt, server: Server, *, content: bool) -> None:
        record = self.record
        is_last = number == len(record.attempts)
        outcome = attempt.outcome or record.outcome
        model = attempt.upstream_model or record.model
        operation = names.OPERATIONS.get(record.route, names.CHAT)
        attributes: dict[str, Value] = {
            names.OPERATION: operation,
            names.PROVIDER: names.provider_name(server.provider),
            names.REQUEST_MODEL: model,
            names.BACKEND: attempt.backend,
            names.ATTEMPT: number,
            names.OUTCOME: outcome,
        }
        if server.address:
            attributes[names.SERVER_ADDRESS] = server.address
            if server.port:
                attributes[names.SERVER_PORT] = server.port
        if attempt.status:
            attributes[names.HTTP_STATUS] = attempt.status
        error = ""
        if outcome not in ("success", "cancelled"):
            type = _attempt_error(record, attempt, is_last=is_last)
            attributes[names.ERROR_TYPE] = type
            error = (_words(record) if is_last else "") or type
        if is_last:
            attributes |= _usage(record)
            if content and record.request_body is not None:
                attributes |= _content(record)
        first_token_at = record.first_token_at if is_last else 0.0
        if first_token_at:
            attributes[names.REQUEST_STREAM] = True
            attributes[names.TIME_TO_FIRST_CHUNK] = round(max(0.0, first_token_at - attempt.started_at), 6)
        ended_at = attempt.ended_at or self.ended_at
        span_id = attempt.span_id or self._next_id()
        self._add(
            f"{operation} {model}",
            attempt.started_at,
            ended_at,
            kind="client",
            error=error,
            attributes=attributes,
            span_id=span_id,
        )
        if first_token_at:
            self._add(names.FIRST_TOKEN, attempt.started_at, first_token_at, parent_id=span_id)
            # The last event went to the caller when the request ended, at the latest.
            self._add(names.STREAM, first_token_at, max(first_token_at, ended_at), parent_id=span_id)

    # -- spans -----------------------------------------------------------------------------------------

    def _add(
        self,
        name: str,
        begin: float,
        end: float,
        *,
        kind: SpanKind = "internal",
        error: str = "",
        attributes: dict[str, Value] | None = None,
        span_id: str = "",
        parent_id: str = "",
    ) -> None:
        begin = min(max(begin, self.record.started_at), self.ended_at)
        end = min(max(begin, end), self.ended_at)
        self.spans.append(
            Span(
                name=name,
                span_id=span_id or self._next_id(),
                parent_id=parent_id or self.record.span_id,
                kind=kind,
                start_ns=self._ns(begin),
                end_ns=self._ns(end),
                error=error,
                attributes=attributes or {},
            )
        )

    def _ns(self, instant: float) -> int:
        """Unix nanoseconds. Two sums, because Unix seconds in one float are exact to a quarter of a microsecond only."""
        return self._offset_ns + round(instant * 1e9)

    def _next_id(self) -> str:
        """An id that follows from the request's: random as that is, and different from all others of the trace."""
        self._made += 1
        return f"{(self._root + self._made * _STEP) & _MASK or 1:016x}"


def _start(span: Span) -> int:
    return span.start_ns


def _name(method: str, route: str) -> str:
    verb = "HTTP" if method == names.OTHER_METHOD else method
    return verb if route == OTHER else f"{verb} {route}"


def _words(record: RequestRecord) -> str:
    """What went wrong, in words if there are any; empty if nothing did."""
    if not record.error_type:
        return ""
    return clean(record.error, TEXT_CHARS) or record.error_type


def _of_request(record: RequestRecord, method: str, process: str, scheme: str) -> dict[str, Value]:
    return dict(_request_attributes(record, method, process, scheme))


def _request_attributes(record: RequestRecord, method: str, process: str, scheme: str) -> Iterator[tuple[str, Value]]:
    yield names.HTTP_METHOD, method
    if method == names.OTHER_METHOD:
        yield names.HTTP_METHOD_ORIGINAL, clean(record.method, 64)
    if record.route != OTHER:
        yield names.HTTP_ROUTE, record.route
    yield names.URL_SCHEME, scheme
    yield names.URL_PATH, clean(record.path, TEXT_CHARS)
    if record.query:
        yield names.URL_QUERY, clean_query(record.query, TEXT_CHARS)
    if record.status:
        yield names.HTTP_STATUS, record.status
    address, port = _address(record.client)
    if address:
        yield names.CLIENT_ADDRESS, address
        if port:
            yield names.CLIENT_PORT, port
    headers = record.headers
    host, port = _address(headers.get(b"host", b"").decode("latin-1"))
    if host:
        yield names.SERVER_ADDRESS, clean(host, 255)
        if port:
            yield names.SERVER_PORT, port
    agent = headers.get(b"user-agent")
    if agent:
        yield names.USER_AGENT, clean(agent.decode("latin-1"), TEXT_CHARS)
    yield names.REQUEST_ID, clean_id(record.request_id)
    yield names.PROCESS, process
    yield names.KEPT, record.kept
    if record.key:
        yield names.KEY, record.key
    if record.error_type:
        yield names.ERROR_TYPE, record.error_type
        yield names.ERROR, _words(record)
    if record.is_inference:
        yield from _inference_attributes(record)


def _inference_attributes(record: RequestRecord) -> Iterator[tuple[str, Value]]:
    """Of the request as ours; tokens are the attempt's, or they would be counted twice."""
    yield names.MODEL, record.model
    yield names.STRATEGY, record.strategy
    yield names.OUTCOME, record.outcome
    yield names.CACHED, record.cached
    yield names.ATTEMPTS, len(record.attempts)
    if record.reason:
        yield names.REASON, record.reason
    if record.attempts:
        yield names.BACKEND, record.attempts[-1].backend
    if record.retry_reasons:
        yield names.RETRIES, _pairs(record.retry_reasons)
    if record.fallback_reasons:
        yield names.FALLBACKS, _pairs(record.fallback_reasons)
    if record.cost_status:
        yield names.COST_USD, record.cost_usd


def _pairs(reasons: tuple[tuple[str, str], ...]) -> str:
    return ", ".join(f"{model}: {reason}" for model, reason in reasons[:16])


def _usage(record: RequestRecord) -> dict[str, Value]:
    if record.usage_source == "none" or record.cached:
        return {}
    usage: dict[str, Value] = {
        names.INPUT_TOKENS: record.input_tokens,
        names.OUTPUT_TOKENS: record.output_tokens,
        names.USAGE_SOURCE: record.usage_source,
    }
    if record.cached_tokens:
        usage[names.CACHE_READ_TOKENS] = record.cached_tokens
    if record.reasoning_tokens:
        usage[names.REASONING_TOKENS] = record.reasoning_tokens
    return usage


def _content(record: RequestRecord) -> dict[str, Value]:
    content: dict[str, Value] = {}
    asked = input_messages(record.request_body or b"")
    if asked:
        content[names.INPUT_MESSAGES] = asked
    said = output_messages(record.response_body or b"")
    if said:
        content[names.OUTPUT_MESSAGES] = said
    return content


def _attempt_error(record: RequestRecord, attempt: Attempt, *, is_last: bool) -> str:
    if attempt.status >= 400:
        return str(attempt.status)
    return (record.error_type if is_last else "") or attempt.outcome


def _address(text: str) -> tuple[str, int]:
    """Host and port of `host:port`, `[v6]:port`, or the `v6:port` of a socket's peer; port 0 if there is none."""
    host, colon, port = text.rpartition(":")
    has_port = colon and port.isascii() and port.isdigit() and len(port) <= 5
    if has_port and host.startswith("[") == host.endswith("]"):
        return host.strip("[]"), int(port)
    return text.strip("[]"), 0
