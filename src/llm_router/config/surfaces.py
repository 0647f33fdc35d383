"""Bounds of what watches the router: metrics, health, logs, traces and profiles.

Not for: what the OpenTelemetry variables mean (observe.tracing), or bounds of what serves (checks.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from typing import Any, Final
from urllib.parse import urlsplit

from llm_router.config.document import join
from llm_router.config.settings import MetricsSettings
from llm_router.config.shape import Fail, suggest
from llm_router.observe.health.settings import ExternalTarget, HealthSettings, Validation
from llm_router.observe.health.state import ALIASES, STATE_CHECKS
from llm_router.observe.logs.levels import LEVELS, is_logger, level_named, loggers
from llm_router.observe.logs.settings import LogSettings
from llm_router.observe.profiling.settings import ProfilerSettings
from llm_router.observe.tracing.settings import TracingSettings

ROUTES: Final = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/models",
    "/v1/models/{id}",
    "/api/generate",
    "/health/live",
    "/health/ready",
)
"""Label values of the routes that a worker answers by itself: what may be sampled."""

_ENDPOINT: Final = re.compile(r"(?:/[A-Za-z0-9._~-]+)+").fullmatch
_TAKEN: Final = ("/v1", "/api", "/admin", "/debug", "/-")
_TAKEN_EXACTLY: Final = frozenset(("/health/live", "/health/ready", "/health/startup"))

_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_HEADER: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_NO_HEADER_VALUE: Final = re.compile(r"[^\t -~\x80-\xff]")

CHECKS: Final = (
    *STATE_CHECKS, *ALIASES,
    "inference_capability", "cache_functionality", "database", "backends", "logs", "traces",
)  # fmt: skip
"""Health checks that are there whatever is configured; others are named after what they look at."""

_KIB: Final = 1024
_SAMPLE_MAX: Final = 1_000_000
_CONTINUOUS_HZ_MAX: Final = 50.0  # beyond it the sampler would be what the profile shows
_RATE_HZ_MAX: Final = 1000.0


def is_endpoint(path: str) -> bool:
    """Whether it is a path at which metrics or health may be."""
    return _ENDPOINT(path) is not None


def check_endpoints(metrics: MetricsSettings, health: HealthSettings, fail: Fail) -> None:
    """Raises: what `fail` makes."""
    for key, endpoint in (("metrics.endpoint", metrics.endpoint), ("health.endpoint", health.endpoint)):
        if not is_endpoint(endpoint):
            raise fail(key, f"{endpoint!r} is no path: it begins with / and does not end with it, like /metrics")
        if f"{endpoint}/".startswith(tuple(f"{taken}/" for taken in _TAKEN)) or endpoint in _TAKEN_EXACTLY:
            raise fail(key, f"{endpoint!r} would hide a part of the API")
    if metrics.endpoint == health.endpoint:
        raise fail("health.endpoint", f"{health.endpoint!r} is the path of the metrics too")


def check_metrics(metrics: MetricsSettings, fail: Fail) -> None:
    """Raises: what `fail` makes."""
    for route, one_in in metrics.sample.items():
        path = join("metrics.sample", route)
        if route not in ROUTES:
            raise fail(
                path, f"no such route{suggest(route, ROUTES)}; those that can be sampled are {', '.join(ROUTES)}"
            )
        if not 1 <= one_in <= _SAMPLE_MAX:
            raise fail(path, f"{one_in} will not do: of that many requests one is observed, 1 (each) to {_SAMPLE_MAX}")


def with_levels(raw: Any) -> Any:
    """The data of `logs` in our words: levels whatever their case, a bare `off`. What is none stays for `check_logs`."""
    if not isinstance(raw, Mapping):
        return raw
    raw = dict(raw)
    if raw.get("console") is False:  # YAML 1.1 reads a bare `off` as false
        raw["console"] = "off"
    if "level" in raw:
        raw["level"] = _level(raw["level"])
    if isinstance(raw.get("levels"), Mapping):
        raw["levels"] = {name: _level(level) for name, level in raw["levels"].items()}
    return raw


def _level(written: Any) -> Any:
    return written if not isinstance(written, str) else level_named(written) or written


def check_logs(logs: LogSettings, fail: Fail) -> None:
    """Raises: what `fail` makes."""
    for name, level in logs.levels.items():
        path = join("logs.levels", name)
        if not is_logger(name):
            raise fail(
                path,
                f"there is no logger {name!r}{suggest(name, loggers())}: write llm_router.gateway, llm_router.control or "
                "the like",
            )
        if level not in LEVELS:
            raise fail(
                path, f"{level!r} will not do: choose one of {', '.join(LEVELS)}{suggest(level.lower(), LEVELS)}"
            )
    _share(logs.sample_ratio, "logs.sample_ratio", fail)
    if 0 < logs.metrics_interval_s < 1:
        raise fail("logs.metrics_interval", "must be 1s or more, or 0 for never")
    for key, value in (("max_age", logs.max_age_s), ("keep", logs.keep_s), ("keep_size", logs.keep_bytes)):
        if value <= 0:
            raise fail(f"logs.{key}", "must be more than 0")
    if not 100 <= logs.queue_lines <= 1_000_000:
        raise fail("logs.queue_lines", f"{logs.queue_lines} will not do: 100 to 1000000")
    if not _KIB <= logs.max_line_bytes <= 1024 * _KIB:
        raise fail("logs.max_line", "must be 1KiB to 1MiB")
    if not 64 <= logs.max_field_bytes <= logs.max_line_bytes:
        raise fail("logs.max_field", "must be 64B or more, and not more than logs.max_line")
    if logs.max_file_bytes < logs.max_line_bytes:
        raise fail("logs.max_file", "must not be less than logs.max_line")


def check_tracing(tracing: TracingSettings, fail: Fail) -> None:
    """Raises: what `fail` makes."""
    _share(tracing.sample_ratio, "tracing.sample_ratio", fail)
    if not 0 <= tracing.recent_per_s <= 1000:
        raise fail("tracing.recent_per_s", f"{tracing.recent_per_s:g} will not do: 0 (none) to 1000")
    if not 1 <= tracing.max_traces <= 100_000:
        raise fail("tracing.max_traces", f"{tracing.max_traces} will not do: 1 to 100000")
    if not 1 <= tracing.batch <= 10_000:
        raise fail("tracing.batch", f"{tracing.batch} will not do: 1 to 10000")
    if not tracing.batch <= tracing.queue_spans <= 1_000_000:
        raise fail("tracing.queue_spans", f"{tracing.queue_spans} will not do: at least tracing.batch, at most 1000000")
    if tracing.timeout_s <= 0:
        raise fail("tracing.timeout", "must be more than 0")
    if not tracing.service_name:
        raise fail("tracing.service_name", "is empty; leave it out for llm-router")
    if tracing.endpoint:
        _url(tracing.endpoint, "tracing.endpoint", ("http", "https"), "http://localhost:4318/v1/traces", fail)
    for name, value in tracing.headers.items():
        if not _HEADER.fullmatch(name) or _NO_HEADER_VALUE.search(value):
            raise fail(join("tracing.headers", name), "is no valid header")


def check_profiler(profiler: ProfilerSettings, fail: Fail) -> None:
    """Raises: what `fail` makes."""
    if not 1 <= profiler.rate_hz <= _RATE_HZ_MAX:
        raise fail("profiler.rate_hz", f"{profiler.rate_hz:g} will not do: 1 to {_RATE_HZ_MAX:g}")
    if not 0 <= profiler.continuous_hz <= _CONTINUOUS_HZ_MAX:
        raise fail(
            "profiler.continuous_hz", f"{profiler.continuous_hz:g} will not do: 0 (none) to {_CONTINUOUS_HZ_MAX:g}"
        )
    if not 60 <= profiler.continuous_s <= 86_400:
        raise fail("profiler.continuous", "must be 1m to 1d")


def check_health(health: HealthSettings, models: Collection[str], fail: Fail) -> None:
    """Everything below `health` but its endpoint. Raises: what `fail` makes."""
    for key, percent in (
        ("cpu_percent", health.cpu_percent),
        ("memory_percent", health.memory_percent),
        ("disk_percent", health.disk_percent),
    ):
        if not 0 < percent <= 100:
            raise fail(f"health.{key}", f"{percent:g} will not do: more than 0, at most 100")
    for key, value in (
        ("interval", health.interval_s),
        ("timeout", health.timeout_s),
        ("process_memory", health.process_memory_bytes),
    ):
        if value <= 0:
            raise fail(f"health.{key}", "must be more than 0")
    for key, count in (("fall", health.fall), ("rise", health.rise), ("concurrency", health.concurrency)):
        if not 1 <= count <= 100:
            raise fail(f"health.{key}", f"{count} will not do: 1 to 100")
    if health.paid_probe_daily_usd < 0:
        raise fail("health.paid_probe_daily_usd", "must be US dollars a day, or 0 for no such probe")
    if health.disk_path and not os.path.exists(health.disk_path):
        raise fail("health.disk_path", f"there is no {health.disk_path!r}")
    _check_external(health.external, fail)
    _check_validations(health.validate, models, fail)
    named = [
        *(f"external_{target.name}" for target in health.external),
        *(f"model_{validation.name}" for validation in health.validate),
    ]
    for name, check in health.checks.items():
        path = join("health.checks", name)
        if name not in CHECKS and name not in named:
            known = [*CHECKS, *named]
            raise fail(path, f"there is no check {name!r}{suggest(name, known)}; there are {', '.join(known)}")
        if ALIASES.get(name) in health.checks:
            raise fail(path, f"is another name of {ALIASES[name]}, which is there too")
        for key, seconds in (("interval", check.interval_s), ("timeout", check.timeout_s)):
            if seconds is not None and seconds <= 0:
                raise fail(f"{path}.{key}", "must be more than 0")
            if seconds is not None and ALIASES.get(name, name) in STATE_CHECKS:
                raise fail(f"{path}.{key}", f"{name} is known at any moment and has none; leave it out")


def _check_external(targets: tuple[ExternalTarget, ...], fail: Fail) -> None:
    names: set[str] = set()
    for index, target in enumerate(targets):
        path = f"health.external[{index}]"
        _name(target.name, names, path, fail)
        scheme = target.target.partition("://")[0]
        example = "tcp://host:port, tls://host:port or https://host/path"
        _url(target.target, f"{path}.target", ("tcp", "tls", "http", "https"), example, fail, needs_port=("tcp", "tls"))
        parts = urlsplit(target.target)
        if scheme in {"tcp", "tls"} and (parts.path or parts.query):
            raise fail(f"{path}.target", "should end with its port")


def _check_validations(validations: tuple[Validation, ...], models: Collection[str], fail: Fail) -> None:
    names: set[str] = set()
    for index, validation in enumerate(validations):
        path = f"health.validate[{index}]"
        _name(validation.name, names, path, fail)
        if validation.model not in models:
            raise fail(
                f"{path}.model", f"no model {validation.model!r} is configured{suggest(validation.model, models)}"
            )
        if not validation.prompt.strip():
            raise fail(f"{path}.prompt", "is empty")
        if validation.max_tokens < 1:
            raise fail(f"{path}.max_tokens", "must be 1 or more")
        if validation.interval_s is not None and validation.interval_s <= 0:
            raise fail(f"{path}.interval", "must be more than 0")
        try:
            re.compile(validation.expect)
        except re.error as error:
            at = "" if error.pos is None else f" at character {error.pos + 1}"
            raise fail(f"{path}.expect", f"{validation.expect!r} is no regular expression: {error.msg}{at}") from None


def _name(name: str, names: set[str], path: str, fail: Fail) -> None:
    if not _NAME.fullmatch(name):
        raise fail(f"{path}.name", f"{name!r} will not do: up to 64 letters, digits, dots, dashes and underscores")
    if name in names:
        raise fail(f"{path}.name", f"there is another {name!r}; names are unique")
    names.add(name)


def _share(ratio: float, path: str, fail: Fail) -> None:
    if not 0 <= ratio <= 1:
        raise fail(path, f"{ratio:g} will not do: 0 (none) to 1 (all)")


def _url(
    url: str, path: str, schemes: tuple[str, ...], example: str, fail: Fail, *, needs_port: tuple[str, ...] = ()
) -> None:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise fail(path, f"is no URL: {error}") from None
    if parts.scheme not in schemes or not parts.hostname or re.search(r"[^!-~]", url):
        raise fail(path, f"is no address of such a service: write {example}")
    if parts.username is not None or parts.password is not None:
        raise fail(path, "holds a password, which would be shown")
    if parts.fragment:
        raise fail(path, "should end before the #")
    if port == 0 or (port is None and parts.scheme in needs_port):
        raise fail(path, f"needs a port: write {example}")
