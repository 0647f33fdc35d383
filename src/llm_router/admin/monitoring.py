"""The read-only endpoints: index, metrics, health.

They answer from what is at hand; nothing here asks a backend or waits for anything but its own rendering.
Not for: what is measured (observe) or where it is gathered (processes).
"""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from llm_router.admin.application import json_response
from llm_router.observe.health import Report, timestamp
from llm_router.observe.metrics.exposition import CONTENT_TYPE_OPENMETRICS, CONTENT_TYPE_TEXT, negotiate

_GZIP_FROM_BYTES: Final = 1024
_GZIP_LEVEL: Final = 1  # 0.5 MB in 4 ms, 8 % of its size; level 6 takes four times as long for 6 %
_INDEX: Final = """\
LLM Runner Router {version}

Inference (app port)
  POST /v1/chat/completions     OpenAI chat, plain and streaming
  POST /v1/completions          OpenAI completions
  POST /v1/embeddings           OpenAI embeddings
  POST /v1/messages             Anthropic messages, plain and streaming
  POST /v1/messages/count_tokens  about how many tokens one has
  GET  /v1/models               what can be asked for
  POST /api/generate            prompt in, text out

Monitoring (monitoring port and app port)
  GET  {metrics} Prometheus text, OpenMetrics by Accept
  GET  /metrics/json            the same as JSON
  GET  {health} every check; 200 healthy or degraded, else 503
  GET  /health/live             whether the process turns
  GET  /health/ready            whether it serves

Administration (monitoring port and app port)
  GET  /admin/models            local models: state, memory, load time
  POST /admin/models/load       {{"name": ..., "options": {{...}}}}
  POST /admin/models/unload     {{"name": ...}}
  GET  /admin/keys              keys, without their texts
  POST /admin/keys              {{"name": ..., "scopes": [...]}}; shows the new key once
  PATCH /admin/keys/{{id}}        change its name, scopes, models, expires, limits
  DELETE /admin/keys/{{id}}       revoke it
  GET  /admin/usage             tokens and cost by key, model, backend, day
  POST /admin/reload            read the configuration again
"""


class Monitoring(Protocol):
    """What these endpoints show."""

    def metrics(self, *, openmetrics: bool) -> bytes:
        """The exposition of every family, made now."""

    def metrics_json(self) -> bytes:
        """The same values as JSON."""

    def health(self) -> Report:
        """The newest health report."""

    def readiness(self) -> tuple[bool, str]:
        """Whether new requests are welcome, and a word for people and probes."""


def routes(
    source: Monitoring, *, version: str, metrics_path: str, health_path: str, now: Callable[[], float]
) -> list[Route]:
    """The endpoints; metrics and health both at their usual and at their configured paths.

    Args:
        now: Unix time in seconds.
    """
    index = _INDEX.format(version=version, metrics=metrics_path.ljust(24), health=health_path.ljust(24))

    async def show_index(request: Request) -> Response:
        return PlainTextResponse(index)

    async def show_metrics(request: Request) -> Response:
        openmetrics = negotiate(request.headers.get("accept", ""))
        body = source.metrics(openmetrics=openmetrics)
        return await _compressed(request, body, CONTENT_TYPE_OPENMETRICS if openmetrics else CONTENT_TYPE_TEXT)

    async def show_json(request: Request) -> Response:
        return await _compressed(request, source.metrics_json(), "application/json")

    async def show_health(request: Request) -> Response:
        report = source.health()
        if "application/health+json" in request.headers.get("accept", ""):
            return json_response(report.ietf(), report.http_status, "application/health+json")
        return json_response(report.document(), report.http_status)

    async def show_live(request: Request) -> Response:
        return json_response({"status": "alive", "timestamp": timestamp(now())})

    async def show_ready(request: Request) -> Response:
        is_ready, reason = source.readiness()
        return json_response({"status": reason, "timestamp": timestamp(now())}, 200 if is_ready else 503)

    return [
        Route("/", show_index),
        *(Route(path, show_metrics) for path in _paths("/metrics", metrics_path)),
        Route("/metrics/json", show_json),
        *(Route(path, show_health) for path in _paths("/health", health_path)),
        Route("/health/live", show_live),
        Route("/health/ready", show_ready),
    ]


def _paths(usual: str, configured: str) -> Sequence[str]:
    return tuple(dict.fromkeys((usual, configured)))


async def _compressed(request: Request, body: bytes, content_type: str) -> Response:
    headers = {"content-type": content_type, "vary": "accept, accept-encoding", "cache-control": "no-store"}
    if len(body) >= _GZIP_FROM_BYTES and _takes_gzip(request.headers.get("accept-encoding", "")):
        headers["content-encoding"] = "gzip"
        # zlib lets go of the interpreter lock: the loop turns meanwhile.
        body = await asyncio.to_thread(gzip.compress, body, _GZIP_LEVEL, mtime=0)
    return Response(body, headers=headers)


def _takes_gzip(accept_encoding: str) -> bool:
    for part in accept_encoding.lower().split(","):
        coding, _, parameters = part.partition(";")
        if coding.strip() in ("gzip", "*"):
            return parameters.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return False
