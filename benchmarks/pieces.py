"""What single pieces of logs and traces cost, and how many lines a second can be written without losing one.

    python -m benchmarks.pieces [--seconds 5] [--lines 20000] [--json FILE]

Pieces are timed by themselves, in CPU microseconds of the thread that pays for them: the smallest of five rounds, as what
disturbs a measurement only ever adds to it. Those of the request path are paid by every request, the others by a thread, or only by
requests whose trace is kept. Lines are those of real requests, two for each, at a steady rate, with the
thread that makes the requests on the same core.
Not for: what all of it costs a request of the running gateway (surfaces.py).
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import random
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final

from benchmarks.metrics import fastest
from benchmarks.surfaces import LINES_PER_S, Written
from llm_router.gateway.trace_context import TraceContext
from llm_router.observe.logs.entry import Entries
from llm_router.observe.logs.logs import Logs
from llm_router.observe.logs.request_lines import RequestLines
from llm_router.observe.logs.schema import FileName
from llm_router.observe.logs.service import Service
from llm_router.observe.logs.settings import LogSettings
from llm_router.observe.meter import Meter
from llm_router.observe.tracing.keep import Keep
from llm_router.observe.tracing.settings import TracingSettings
from llm_router.observe.tracing.spans import trace_of
from llm_router.signals import Attempt, RequestRecord

_LINES_EACH: Final = 2  # access.log and application.log
_ROUNDS: Final = 5
_TIMES: Final = 20_000
_STEP_S: Final = 0.002
_WRITTEN_S: Final = 10.0

_HEADERS: Final = {
    b"host": b"127.0.0.1:3006",
    b"user-agent": b"OpenAI/Python 1.99.9",
    b"accept": b"application/json",
    b"content-type": b"application/json",
    b"content-length": b"2048",
    b"authorization": b"Bearer none",
}
_PARENT: Final = {**_HEADERS, b"traceparent": b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"}


def request(number: int, now: float) -> RequestRecord:
    """A plain request as the gateway leaves it: one attempt, tokens counted, no error."""
    record = RequestRecord("POST", "/v1/chat/completions", f"8f3a1c5e7b9d2046-{number}", now - 0.0123)
    record.path = record.route
    record.headers = _HEADERS
    record.client = "127.0.0.1:51234"
    record.is_inference = True
    record.model = "gpt-4o-mini"
    record.strategy, record.reason = "balanced", "only-one"
    record.outcome = "success"
    record.status = 200
    record.response_type, record.response_bytes = b"application/json", 660
    record.trace_id, record.span_id = f"{number + 1:032x}", f"{number + 1:016x}"
    record.begun_at, record.identified_at, record.allowed_at = now - 0.0122, now - 0.0121, now - 0.0120
    record.looked_up_at = record.routed_at = now - 0.0119
    record.first_token_at = now - 0.001
    record.input_tokens, record.output_tokens, record.usage_source = 480, 120, "provider"
    attempt = Attempt("openai", now - 0.0118, f"{number + 7:016x}", "gpt-4o-mini")
    attempt.ended_at, attempt.outcome, attempt.status = now - 0.0005, "success", 200
    record.attempts.append(attempt)
    return record


def pieces() -> dict[str, float]:
    """CPU microseconds by what was done."""
    found: dict[str, float] = {}

    def time_it(what: str, action: Callable[[], object], times: int = _TIMES) -> None:
        found[what] = min(fastest(action, times) for _ in range(_ROUNDS))

    now = time.monotonic()
    record = request(1, now)
    context = TraceContext(enabled=True, sample_ratio=0.01, rng=random.Random(1))
    time_it("trace begun, caller without one", lambda: context.begin(record, _HEADERS))
    time_it("trace begun, caller with one", lambda: context.begin(record, _PARENT))
    record = request(1, now)
    keep = Keep(TracingSettings(recent_per_s=0))
    keep.reason(record, now)
    time_it("trace not kept", lambda: keep.reason(record, now))
    time_it("trace made", lambda: trace_of(record, now, wall_offset_s=1.7e9, process="worker-0"), 2000)
    entries = Entries(Service.here("0", "bench"), "worker-0", max_line_bytes=32768, max_field_chars=8192)
    lines = RequestLines(entries, access=True, level=logging.INFO, content=False, severities={})
    queues: dict[FileName, deque[bytes]] = {"access": deque(maxlen=512), "application": deque(maxlen=512)}
    time_it("the two lines of an inference made", lambda: lines.add(record, now, 1.7e9, 1.0, queues))
    # `lambda` and an argument make the call as expensive as the recorder's own.
    sampled = Meter(lambda component, seconds: None).sampled("recording", lambda record: record)
    time_it("every 64th call timed", lambda: sampled(record))
    return found


def written(lines_per_s: int, seconds: float) -> Written:
    """Offer that many lines a second for so long, and wait until they are in their files.

    Raises: RuntimeError if they are not there in ten seconds.
    """
    folder = Path(tempfile.mkdtemp(prefix="bench-lines-"))
    logs = Logs(LogSettings(console="off"), str(folder), process="worker-0", service=Service.here("0", "bench"))

    def dropped() -> int:
        return sum(logs.statistics().dropped.values())

    logs.start()
    try:
        began, offered, longest = time.monotonic(), 0, 0
        while (elapsed := time.monotonic() - began) < seconds:
            due = int(elapsed * lines_per_s / _LINES_EACH)
            for number in range(offered, due):
                now = time.monotonic()
                logs.finished(request(number, now), now)
            offered = due
            longest = max(longest, logs.statistics().queued)
            time.sleep(_STEP_S)
        deadline = time.monotonic() + _WRITTEN_S
        while logs.statistics().written + dropped() < offered * _LINES_EACH:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{logs.statistics()} after {offered * _LINES_EACH} lines")
            time.sleep(_STEP_S)
        took = time.monotonic() - began
        count = logs.statistics().written
        size = sum(path.stat().st_size for path in folder.glob("*.log"))
        logs.close()
        lines = offered * _LINES_EACH
        return Written(lines, took, count, dropped(), longest, logs.cpu_s / max(count, 1) * 1e6, size / max(offered, 1))
    finally:
        logs.close()
        shutil.rmtree(folder, ignore_errors=True)


def compressing(requests: int = 20_000) -> dict[int, float]:
    """CPU microseconds that gzip takes for the access line of one request, by its level."""
    folder = Path(tempfile.mkdtemp(prefix="bench-lines-"))
    logs = Logs(LogSettings(console="off"), str(folder), process="worker-0", service=Service.here("0", "bench"))
    logs.start()
    try:
        for number in range(requests):
            now = time.monotonic()
            logs.finished(request(number, now), now)
            if number % 1000 == 999:  # no more than the queue holds
                time.sleep(0.05)
        logs.close(30)
        text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.log")))
        spent = {}
        for level in (1, 6, 9):
            began = time.thread_time()
            gzip.compress(text, level)
            spent[level] = (time.thread_time() - began) / requests * 1e6
        return spent
    finally:
        logs.close()
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pieces", description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="of lines (default: %(default)g)")
    parser.add_argument("--lines", type=int, default=LINES_PER_S, help="a second (default: %(default)d)")
    parser.add_argument("--only-lines", action="store_true", help="no pieces")
    parser.add_argument("--json", metavar="FILE", help="write the figures there and print nothing")
    options = parser.parse_args()
    outcome: dict[str, object] = {}
    if not options.only_lines:
        outcome["pieces_us"] = pieces()
        outcome["gzip_us"] = compressing()
    stream = written(options.lines, options.seconds)
    outcome["lines"] = stream._asdict()
    if options.json:
        Path(options.json).write_text(json.dumps(outcome, indent=1), encoding="utf-8")
        return
    for name in ("pieces_us", "gzip_us"):
        figures = outcome.get(name)
        if isinstance(figures, dict):
            for what, value in figures.items():
                shown = what if name == "pieces_us" else f"gzip of a request's lines, level {what}"
                print(f"{value:8.2f} µs  {shown}")
    print(
        f"{stream.writer_us:8.2f} µs  a line written, in the writer's thread\n\n{stream.lines} lines of {options.lines} a second: "
        f"{stream.written} written within {stream.seconds:.2f} s, {stream.dropped} dropped, at most {stream.longest} "
        f"requests waited, {stream.bytes_each:.0f} bytes a request"
    )


if __name__ == "__main__":
    main()
