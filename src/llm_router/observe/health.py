"""How the router is, judged from what is known: checks with their values and thresholds, and one word in sum.

Pure logic: `Inputs` are handed in, nothing is measured or asked here, and no check can block. The report has the
keys of both health documents people know from the monitoring guide (`status, value, threshold` and `healthy, message,
details, duration, timestamp`); `ietf` renders the draft format for `application/health+json`.
Not for: liveness, which depends on nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Final, Literal

import msgspec

Status = Literal["healthy", "degraded", "critical", "initializing"]

CPU_PERCENT: Final = 80.0
MEMORY_PERCENT: Final = 85.0
MEMORY_CRITICAL_PERCENT: Final = 95.0
DISK_PERCENT: Final = 90.0
"""Thresholds of the monitoring guide; above the critical one the kernel is about to kill something of ours."""

_IETF_WORDS: Final[Mapping[str, str]] = {"healthy": "pass", "degraded": "warn", "critical": "fail"}


class ModelState(msgspec.Struct, frozen=True, kw_only=True):
    """One model that callers can ask for. `state` is loaded, loading, failed, unloaded or down (no backend up)."""

    name: str
    state: Literal["loaded", "loading", "failed", "unloaded", "down"]
    error: str = ""


class Inputs(msgspec.Struct, frozen=True, kw_only=True):
    """What is known at one instant. Ratios are 0..1; `None` where the machine does not tell.

    Args:
        is_initialized: whether the router was ready once since it started.
        workers_up, workers_wanted: with a fresh heartbeat, and configured.
        runners: name of each local model's runner to its process state (ready, starting, backoff, failed...).
        rss_bytes: resident memory of supervisor, control and workers; `runner_bytes` of the runners.
        heap_bytes: private anonymous memory of the same processes as `rss_bytes`.
        environment: the operator's word for what the router is used for.
    """

    is_initialized: bool
    models: tuple[ModelState, ...] = ()
    workers_up: int = 0
    workers_wanted: int = 0
    runners: Mapping[str, str] = {}
    cpu_ratio: float | None = None
    memory_used_bytes: float | None = None
    memory_limit_bytes: float | None = None
    disk_ratio: float | None = None
    disk_path: str = ""
    rss_bytes: float = 0.0
    heap_bytes: float = 0.0
    runner_bytes: float = 0.0
    engine: str = ""
    environment: str = ""


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of one check. `extra` keys stand beside the common ones in the report."""

    status: Status
    value: float
    threshold: float
    message: str
    details: Mapping[str, Any] = {}
    unit: str = ""
    extra: Mapping[str, Any] = {}

    @property
    def is_healthy(self) -> bool:
        return self.status == "healthy"


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The state of the router at `timestamp` (ISO 8601, UTC)."""

    status: Status
    timestamp: str
    uptime_s: float
    version: str
    duration_ms: float
    checks: Mapping[str, Check]
    inputs: Inputs

    @property
    def http_status(self) -> int:
        """200 while the router serves (healthy or degraded), else 503."""
        return 200 if self.status in ("healthy", "degraded") else 503

    def document(self) -> dict[str, Any]:
        """The JSON document of `/health`."""
        inputs = self.inputs
        healthy = sum(check.is_healthy for check in self.checks.values())
        loaded = sum(model.state == "loaded" for model in inputs.models)
        failed = sum(model.state == "failed" for model in inputs.models)
        return {
            "status": self.status,
            "timestamp": self.timestamp,
            "uptime": round(self.uptime_s, 3),
            "version": self.version,
            "checks": {name: self._check_document(check) for name, check in self.checks.items()},
            "summary": {"total": len(self.checks), "healthy": healthy, "unhealthy": len(self.checks) - healthy},
            "memory": {
                "used": int(inputs.heap_bytes),
                "total": int(inputs.memory_limit_bytes or 0),
                "external": int(inputs.runner_bytes),
                "rss": int(inputs.rss_bytes),
            },
            "models": {"loaded": loaded, "failed": failed, "registry_size": len(inputs.models)},
            "engine": inputs.engine,
            "environment": inputs.environment,
        }

    def _check_document(self, check: Check) -> dict[str, Any]:
        return {
            "status": check.status,
            "value": check.value,
            "threshold": check.threshold,
            "healthy": check.is_healthy,
            "message": check.message,
            "details": dict(check.details),
            "duration": self.duration_ms,
            "timestamp": self.timestamp,
            **check.extra,
        }

    def ietf(self) -> dict[str, Any]:
        """The document of draft-inadarei-api-health-check, media type `application/health+json`."""
        return {
            "status": _IETF_WORDS.get(self.status, "fail"),
            "version": self.version.split(".")[0],
            "releaseId": self.version,
            "description": "LLM Runner Router",
            "notes": [f"{name}: {check.message}" for name, check in self.checks.items() if not check.is_healthy],
            "checks": {
                name: [
                    {
                        "componentType": "system" if check.unit == "percent" else "component",
                        "observedValue": check.value,
                        "observedUnit": check.unit,
                        "status": _IETF_WORDS.get(check.status, "fail"),
                        "time": self.timestamp,
                        "output": "" if check.is_healthy else check.message,
                    }
                ]
                for name, check in self.checks.items()
            },
        }


def assess(inputs: Inputs) -> tuple[Status, dict[str, Check]]:
    """The checks by name, and the word for all: initializing before the first readiness, else the worst of them."""
    checks = {
        "router_initialized": _initialized(inputs),
        "models_available": _models_available(inputs),
        "models": _models(inputs),
        "workers": _workers(inputs),
        "runners": _runners(inputs),
        "cpu_usage": _percent("CPU usage", inputs.cpu_ratio, CPU_PERCENT),
        "memory_usage": _percent("Memory usage", _memory_ratio(inputs), MEMORY_PERCENT, MEMORY_CRITICAL_PERCENT),
        "disk_usage": _percent("Disk usage", inputs.disk_ratio, DISK_PERCENT, details={"path": inputs.disk_path}),
    }
    if not inputs.is_initialized:
        return "initializing", checks
    found = {check.status for check in checks.values()}
    if "critical" in found:
        return "critical", checks
    return ("degraded" if "degraded" in found else "healthy"), checks


class Health:
    """Reports, computed at most once in `max_age_s` however often they are asked for.

    Args:
        read: gathers the inputs; must not block for long.
        monotonic, now: the clocks, in seconds; `now` is Unix time.
        started_at: the monotonic instant from which uptime counts.
    """

    def __init__(
        self,
        read: Callable[[], Inputs],
        *,
        version: str,
        started_at: float,
        monotonic: Callable[[], float],
        now: Callable[[], float],
        max_age_s: float = 1.0,
    ) -> None:
        self._read = read
        self._version = version
        self._started_at = started_at
        self._monotonic = monotonic
        self._now = now
        self._max_age_s = max_age_s
        self._report: Report | None = None
        self._made_at = 0.0

    def report(self) -> Report:
        """The newest report; made now if the last one is older than `max_age_s`."""
        begin = self._monotonic()
        if self._report is None or begin - self._made_at >= self._max_age_s:
            inputs = self._read()
            status, checks = assess(inputs)
            self._report = Report(
                status=status,
                timestamp=timestamp(self._now()),
                uptime_s=begin - self._started_at,
                version=self._version,
                duration_ms=round((self._monotonic() - begin) * 1000, 3),
                checks=checks,
                inputs=inputs,
            )
            self._made_at = begin
        return self._report

    def forget(self) -> None:
        """Have the next report made anew: something changed that must show at once."""
        self._report = None


def timestamp(unix_s: float) -> str:
    """ISO 8601 in UTC with milliseconds, like `2025-01-31T08:00:00.000Z`."""
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


# -- the checks -----------------------------------------------------------------------------------------


def _initialized(inputs: Inputs) -> Check:
    loaded = sum(model.state == "loaded" for model in inputs.models)
    return Check(
        status="healthy" if inputs.is_initialized else "initializing",
        value=float(inputs.is_initialized),
        threshold=1.0,
        message="Router is initialized" if inputs.is_initialized else "Router is starting: models are being loaded",
        details={"modelsLoaded": loaded, "engine": inputs.engine},
    )


def _models_available(inputs: Inputs) -> Check:
    names = [model.name for model in inputs.models if model.state == "loaded"]
    return Check(
        status="healthy" if names else "critical",
        value=float(len(names)),
        threshold=1.0,
        message=f"{len(names)} of {len(inputs.models)} models can serve"
        if inputs.models
        else "No model is configured: add one to llm-router.yaml, or load one with `llm-router models load`",
        details={"total": len(inputs.models), "loaded": len(names), "models": names},
        unit="models",
    )


def _models(inputs: Inputs) -> Check:
    loaded = sum(model.state == "loaded" for model in inputs.models)
    broken = [model for model in inputs.models if model.state in ("failed", "down")]
    failed = sum(model.state == "failed" for model in broken)
    return Check(
        status="degraded" if broken else "healthy",
        value=float(len(broken)),
        threshold=0.0,
        message="; ".join(f"{model.name}: {model.error or model.state}" for model in broken) or "No model failed",
        details={model.name: model.state for model in inputs.models},
        unit="models",
        extra={"loaded": loaded, "failed": failed},
    )


def _workers(inputs: Inputs) -> Check:
    up, wanted = inputs.workers_up, inputs.workers_wanted
    return Check(
        status="healthy" if up >= wanted else "degraded" if up else "critical",
        value=float(up),
        threshold=float(wanted),
        message=f"{up} of {wanted} workers answer",
        details={"up": up, "wanted": wanted},
        unit="processes",
    )


def _runners(inputs: Inputs) -> Check:
    away = {name: state for name, state in inputs.runners.items() if state != "ready"}
    ready = len(inputs.runners) - len(away)
    return Check(
        status="degraded" if away else "healthy",
        value=float(ready),
        threshold=float(len(inputs.runners)),
        message=f"{ready} of {len(inputs.runners)} runners are ready",
        details=dict(inputs.runners),
        unit="processes",
    )


def _memory_ratio(inputs: Inputs) -> float | None:
    if inputs.memory_used_bytes is None or not inputs.memory_limit_bytes:
        return None
    return inputs.memory_used_bytes / inputs.memory_limit_bytes


def _percent(
    what: str,
    ratio: float | None,
    threshold: float,
    critical: float = 1000.0,
    details: Mapping[str, Any] | None = None,
) -> Check:
    if ratio is None:
        return Check(
            status="healthy",
            value=0.0,
            threshold=threshold,
            message=f"{what} is not known on this machine",
            details=details or {},
            unit="percent",
        )
    percent = round(ratio * 100, 1)
    return Check(
        status="critical" if percent >= critical else "degraded" if percent >= threshold else "healthy",
        value=percent,
        threshold=threshold,
        message=f"{what}: {percent:.1f}%",
        details=details or {},
        unit="percent",
    )
