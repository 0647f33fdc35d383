"""The only place where a metric family is declared: name, type, labels, buckets, help.

Rules, dashboards, documentation and `/metrics` are checked against this module. A renamed family or
label is a breaking change and goes into CHANGELOG.md under *Changed*.
Not for: values. Standard library only: the supervisor imports it.
"""

from __future__ import annotations

from typing import Final

from llm_router.signals import Family, MetricType, View

PREFIX: Final = "llm_router_"

REQUEST_SECONDS: Final = (0.01, 0.05, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
INFERENCE_SECONDS: Final = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0)
TOKENS_PER_SECOND: Final = (1.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0)
LOAD_SECONDS: Final = (1.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
CONNECTION_SECONDS: Final = (1.0, 10.0, 30.0, 60.0, 300.0, 600.0, 1800.0, 3600.0)
GC_SECONDS: Final = (0.001, 0.01, 0.1, 1.0, 2.0, 5.0)
FIRST_TOKEN_SECONDS: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0,
)  # fmt: skip
INTER_TOKEN_SECONDS: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
OVERHEAD_SECONDS: Final = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05)
CHECK_SECONDS: Final = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)
LAG_SECONDS: Final = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0)
QUEUE_SECONDS: Final = (0.01, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0)
SCRAPE_SECONDS: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5)

INFERENCE_STATUSES: Final = ("success", "error", "cancelled")
SIZE_CATEGORIES: Final = ("small", "medium", "large", "xlarge", "remote")
USAGE_SOURCES: Final = ("provider", "estimated", "partial", "none")
COST_STATUSES: Final = ("exact", "estimated")
CACHE_TYPES: Final = ("response", "redis")
LOG_DROP_REASONS: Final = ("queue-full", "write-failed")
SPAN_DROP_REASONS: Final = ("queue-full", "too-many", "export-failed", "export-refused")
FACT_DROP_REASONS: Final = ("queue-full",)
INTERNAL_QUEUES: Final = ("log", "usage", "span", "fact")
MONITORING_COMPONENTS: Final = ("recording", "logs", "traces", "metrics", "health", "profiler", "alerting", "other")
ACTIVE_WINDOWS: Final = {"5m": 300.0, "1h": 3600.0, "24h": 86400.0}
USAGE_DROP_REASONS: Final = ("queue-full", "store-refused")
CONNECTION_TYPES: Final = ("client", "upstream")
CONNECTION_PROTOCOLS: Final = ("http", "sse", "websocket")


def _family(
    name: str,
    type: MetricType,
    labels: tuple[str, ...],
    help: str,
    buckets: tuple[float, ...] = (),
    unit: str = "",
    cap: int = 1000,
) -> Family:
    return Family(PREFIX + name, type, labels, help, buckets, unit, cap)


def _counter(name: str, labels: tuple[str, ...], help: str, unit: str = "", cap: int = 1000) -> Family:
    return _family(name, "counter", labels, help, (), unit, cap)


def _gauge(name: str, labels: tuple[str, ...], help: str, unit: str = "", cap: int = 1000) -> Family:
    return _family(name, "gauge", labels, help, (), unit, cap)


def _histogram(
    name: str, labels: tuple[str, ...], help: str, buckets: tuple[float, ...], unit: str = "seconds", cap: int = 1000
) -> Family:
    return _family(name, "histogram", labels, help, buckets, unit, cap)


# -- requests and connections ---------------------------------------------------------------------
HTTP_REQUESTS = _counter(
    "http_requests_total",
    ("method", "route", "status_code"),
    "HTTP requests by route template; unknown routes are __other__.",
)
HTTP_REQUEST_DURATION = _histogram(
    "http_request_duration_seconds",
    ("method", "route", "status_code"),
    "Seconds from the first byte of a request to the last byte of its reply.",
    REQUEST_SECONDS,
)
ACTIVE_CONNECTIONS = _gauge("active_connections", ("type", "protocol"), "Open connections.")
REQUESTS_IN_FLIGHT = _gauge("requests_in_flight", (), "HTTP requests that have begun and not ended.")
CONNECTION_DURATION = _histogram(
    "connection_duration_seconds", ("type", "protocol"), "Seconds a connection stayed open.", CONNECTION_SECONDS
)
ERRORS = _counter("errors_total", ("type", "component", "severity"), "Errors by kind, place and severity.")
OVERHEAD = _histogram(
    "overhead_seconds", (), "Seconds of a request that were not spent waiting for a backend.", OVERHEAD_SECONDS
)

# -- inference ----------------------------------------------------------------------------------------
INFERENCE = _counter(
    "inference_total", ("model", "strategy", "status", "cached"), "Inferences, exactly one each, however it ended."
)
INFERENCE_DURATION = _histogram(
    "inference_duration_seconds",
    ("model", "strategy"),
    "Seconds an inference took; cached replies are not observed.",
    INFERENCE_SECONDS,
)
TOKENS_GENERATED = _counter(
    "tokens_generated_total", ("model", "strategy"), "Output tokens, by the usage of each reply."
)
TOKENS_PROMPT = _counter("tokens_prompt_total", ("model", "strategy"), "Input tokens, by the usage of each reply.")
TOKENS_PER_SECOND_FAMILY = _histogram(
    "tokens_per_second", ("model",), "Output tokens per second of an inference.", TOKENS_PER_SECOND, unit=""
)
TIME_TO_FIRST_TOKEN = _histogram(
    "time_to_first_token_seconds",
    ("model",),
    "Seconds from the request to the first content of a stream.",
    FIRST_TOKEN_SECONDS,
)
INTER_TOKEN = _histogram(
    "inter_token_seconds", ("model",), "Seconds between consecutive content chunks of a stream.", INTER_TOKEN_SECONDS
)
TOKENS_CACHED = _counter(
    "tokens_cached_total", ("model", "strategy"), "Input tokens that the provider had cached, part of the prompt's."
)
TOKENS_REASONING = _counter(
    "tokens_reasoning_total", ("model", "strategy"), "Output tokens spent on reasoning, part of the generated ones."
)
COST = _counter("cost_usd_total", ("model", "status"), "US dollars, by whether price and usage are known for sure.")
USAGE_RECORDS = _counter("usage_records_total", ("source",), "Inferences by where their token usage came from.")

# -- routing --------------------------------------------------------------------------------------------
ROUTING_DECISIONS = _counter("routing_decisions_total", ("strategy", "model", "reason"), "Routing decisions and why.")
ATTEMPTS = _counter("attempts_total", ("backend", "outcome"), "Attempts at a backend, by success or fault domain.")
RETRIES = _counter("retries_total", ("model", "reason"), "Attempts after the first, at the same model.")
FALLBACKS = _counter("fallbacks_total", ("model", "reason"), "Requests that left a model for its fallback.")
CIRCUIT_STATE = _gauge("circuit_state", ("backend",), "State of a backend's circuit: 0 closed, 1 half-open, 2 open.")
QUEUE_SIZE = _gauge("queue_size", ("queue_type",), "Requests that wait for their turn; a queue for each model.")
QUEUE_WAIT = _histogram("queue_wait_seconds", ("model",), "Seconds a request waited for its turn.", QUEUE_SECONDS)
QUEUE_PROCESSING = _histogram(
    "queue_processing_seconds", ("queue_type",), "Seconds from a request's turn to its end.", QUEUE_SECONDS
)
UPSTREAM_IN_FLIGHT = _gauge(
    "upstream_requests_in_flight",
    ("backend",),
    "Requests that a backend has been given and has not answered, those waiting for a connection included.",
)
BACKEND_UP = _gauge("backend_up", ("backend",), "1 while the backend answers, 0 while it does not; absent if unknown.")

# -- cache ----------------------------------------------------------------------------------------------
CACHE_HITS = _counter("cache_hits_total", ("cache_type",), "Inferences that the cache answered.")
CACHE_MISSES = _counter("cache_misses_total", ("cache_type",), "Inferences that the cache was asked for in vain.")
CACHE_SIZE = _gauge("cache_size_bytes", ("cache_type",), "Bytes that cached answers take.", "bytes")

# -- keys, limits, money ----------------------------------------------------------------------------------
API_KEY_REQUESTS = _counter("api_key_requests_total", ("key",), "Inferences by the name of the caller's key.")
API_KEY_TOKENS = _counter("api_key_tokens_total", ("key",), "Input and output tokens by the name of the caller's key.")
RATE_LIMIT_HITS = _counter("rate_limit_hits_total", ("scope", "limit"), "Inferences that a limit refused.")
ACTIVE_USERS = _gauge("active_users", ("window",), "Distinct keys that were used within the window.")
BUDGET_REMAINING = _gauge("budget_remaining_usd", ("key",), "US dollars left of the tightest budget of a key.")
USAGE_DROPPED = _counter("usage_dropped_total", ("reason",), "Usage rows that were lost, by why.")

# -- local models -----------------------------------------------------------------------------------
MODELS_LOADED = _gauge("models_loaded", ("format", "size_category"), "Models ready to serve.")
MODEL_LOAD_DURATION = _histogram(
    "model_load_duration_seconds", ("model", "format"), "Seconds a model took to load.", LOAD_SECONDS
)
MODEL_MEMORY = _gauge("model_memory_bytes", ("model", "format"), "Resident memory of a model's runner.", "bytes")

# -- processes ----------------------------------------------------------------------------------------
PROCESS_CPU = _counter("process_cpu_seconds_total", ("process",), "User and system CPU seconds.", "seconds")
PROCESS_RESIDENT = _gauge("process_resident_memory_bytes", ("process",), "Resident memory.", "bytes")
PROCESS_HEAP = _gauge("process_heap_bytes", ("process",), "Private anonymous resident memory.", "bytes")
PROCESS_FDS = _gauge("process_open_fds", ("process",), "Open file descriptors.")
PROCESS_START = _gauge("process_start_time_seconds", ("process",), "Start of the process, Unix time.", "seconds")
GC_DURATION = _histogram(
    "gc_duration_seconds", ("process", "generation"), "Seconds of a garbage collection.", GC_SECONDS
)
EVENT_LOOP_LAG = _histogram(
    "event_loop_lag_seconds", ("process",), "How late the event loop runs its timer.", LAG_SECONDS
)
WORKER_UP = _gauge("worker_up", ("worker",), "1 while the worker's heartbeat is fresh.")
WORKER_RESTARTS = _counter("worker_restarts_total", ("worker", "reason"), "Replacements of a worker.")
RUNNER_RESTARTS = _counter("runner_restarts_total", ("model", "reason"), "Restarts of a model's runner.")

# -- the machine --------------------------------------------------------------------------------------
SYSTEM_CPU = _gauge("system_cpu_usage_ratio", (), "Share of the CPUs we may use that is busy, 0..1.")
SYSTEM_MEMORY = _gauge(
    "system_memory_usage_bytes", (), "Memory in use, of the control group where there is one.", "bytes"
)
SYSTEM_MEMORY_LIMIT = _gauge("system_memory_limit_bytes", (), "Memory we may use.", "bytes")
SYSTEM_DISK = _gauge("system_disk_usage_ratio", ("path",), "Share of the file system in use, 0..1.")
SYSTEM_DISK_IO = _counter(
    "system_disk_io_bytes_total", ("direction",), "Bytes read from and written to disks.", "bytes"
)
SYSTEM_NETWORK = _counter("system_network_bytes_total", ("direction",), "Bytes received and sent.", "bytes")

# -- health --------------------------------------------------------------------------------------------
HEALTH_CHECK_STATUS = _gauge(
    "health_check_status",
    ("check",),
    "How a check stands: 1 healthy, 0.5 degraded, 0 critical; absent if it never ran.",
)
HEALTH_CHECK_DURATION = _histogram("health_check_duration_seconds", ("check",), "Seconds a check took.", CHECK_SECONDS)
HEALTH_CHECK_TRANSITIONS = _counter(
    "health_check_transitions_total", ("check",), "Changes of a check between healthy and not."
)

# -- the monitoring itself ------------------------------------------------------------------------------
SCRAPE_DURATION = _histogram("scrape_duration_seconds", (), "Seconds it took to render /metrics.", SCRAPE_SECONDS)
INTERNAL_QUEUE_SIZE = _gauge(
    "internal_queue_size", ("queue",), "What waits inside the router to be written, stored or sent on."
)
LOG_DROPPED = _counter("log_dropped_total", ("reason",), "Log lines that were lost, by why.")
SPANS_DROPPED = _counter("spans_dropped_total", ("reason",), "Spans of kept traces that were lost, by why.")
FACTS_DROPPED = _counter("facts_dropped_total", ("reason",), "News from workers to control that were lost, by why.")
TRACES_KEPT = _counter("traces_kept_total", ("reason",), "Requests whose trace is kept, by why.")
TRACE_CONTEXT_INVALID = _counter(
    "trace_context_invalid_total", (), "Requests with a traceparent that is none; they began a trace of their own."
)
MONITORING_CPU = _counter(
    "monitoring_cpu_seconds_total", ("component",), "CPU seconds that monitoring and administration used.", "seconds"
)
SERIES = _gauge("series", ("family",), "Exported series of a family.")
SERIES_DROPPED = _counter("series_dropped_total", ("family",), "Label sets refused because a cap was reached.")
BUILD_INFO = _gauge("build_info", ("version",), "Always 1; the version is the label.")
CONFIG_RELOAD_OK = _gauge("config_last_reload_successful", (), "1 if the last reload of the configuration succeeded.")
CONFIG_RELOAD_TIME = _gauge(
    "config_last_reload_timestamp_seconds", (), "Unix time of the last successful load of the configuration.", "seconds"
)

FAMILIES: Final[tuple[Family, ...]] = tuple(value for value in tuple(globals().values()) if isinstance(value, Family))

GUIDE_VIEWS: Final[tuple[View, ...]] = (
    View("http_requests_total", HTTP_REQUESTS, (("method", "method"), ("status", "status_code")), "HTTP requests."),
    View(
        "http_request_duration_seconds",
        HTTP_REQUEST_DURATION,
        (("method", "method"), ("status", "status_code")),
        "Seconds of an HTTP request.",
    ),
    View("model_inference_total", INFERENCE, (("model", "model"),), "Inferences by model."),
    View("model_inference_duration_seconds", INFERENCE_DURATION, (("model", "model"),), "Seconds of an inference."),
    View("model_tokens_generated_total", TOKENS_GENERATED, (("model", "model"),), "Output tokens by model."),
    View("system_cpu_usage_percent", SYSTEM_CPU, (), "Share of the CPUs in use, 0..100.", 100.0),
    View("system_memory_usage_bytes", SYSTEM_MEMORY, (), "Memory in use."),
)
"""The monitoring guide's unprefixed names: a second view of the same values."""

ERROR_KINDS: Final[dict[str, tuple[str, str]]] = {
    "bad_request": ("gateway", "warning"),
    "forbidden": ("gateway", "warning"),
    "unauthorized": ("gateway", "warning"),
    "not_found": ("gateway", "warning"),
    "client_gone": ("gateway", "warning"),
    "internal": ("gateway", "critical"),
    "unavailable": ("gateway", "error"),
    "limit": ("router", "warning"),
    "shed": ("gateway", "warning"),
    "queue_full": ("router", "warning"),
    "queue_timeout": ("router", "warning"),
    "circuit_open": ("router", "error"),
    "deadline": ("router", "warning"),
    "cache_unavailable": ("cache", "warning"),
    "accounts_unavailable": ("control", "error"),
    "usage_dropped": ("worker", "error"),
    "inference_error": ("router", "error"),
    "bad_reply": ("backend", "error"),
    "overloaded": ("backend", "warning"),
    "rejected": ("backend", "warning"),
    "timeout": ("backend", "error"),
    "unreachable": ("backend", "error"),
    "worker_lost": ("worker", "error"),
    "model_load": ("runner", "error"),
    "runner_lost": ("runner", "error"),
    "facts_dropped": ("control", "warning"),
    "render": ("control", "error"),
}
"""The closed list of `errors_total`: type -> (component, severity)."""

ERROR_SEVERITIES: Final = {kind: severity for kind, (_, severity) in ERROR_KINDS.items()}
"""How bad each is; also the level of the log line of a failed inference."""
