"""What can be configured about traces. Not for: making them (spans.py) or sending them (otlp.py)."""

from __future__ import annotations

import msgspec


class TracingSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Which requests are traced, and where their traces go.

    Args:
        enabled: off, no trace is begun, kept or told to backends; a caller's trace is passed on as it came.
        sample_ratio: of requests whose caller did not decide, the share that is kept whatever happens.
        slow_s: a request that took this long is kept.
        recent_per_s: of each route and model, how many more requests a second each worker keeps for /debug/requests;
            these are not exported.
        content: whether spans hold prompts and completions.
        max_traces: traces that control keeps in memory for /debug/requests.
        endpoint: OTLP/HTTP collector, as OTEL_EXPORTER_OTLP_TRACES_ENDPOINT (the whole URL); empty: nothing is exported.
        headers: sent with each export, like the collector's credentials.
        timeout_s: of one export.
        batch: spans in one export at most.
        queue_spans: spans that may wait for export; more are dropped and counted.
        service_name: `service.name` of the resource.
        resource: further resource attributes.
    """

    enabled: bool = True
    sample_ratio: float = 0.01
    slow_s: float = 5.0
    recent_per_s: float = 1.0
    content: bool = False
    max_traces: int = 2000
    endpoint: str = ""
    headers: dict[str, str] = {}
    timeout_s: float = 10.0
    batch: int = 512
    queue_spans: int = 8192
    service_name: str = "llm-router"
    resource: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"TracingSettings({self.sample_ratio:g} of requests, {'exported' if self.endpoint else 'not exported'})"
