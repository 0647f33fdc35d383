"""The checks that need no asking: whether the router has workers, models and runners, and how full the machine is.

Pure logic: `Inputs` are handed in, nothing is measured or asked here, and no check can block.
Not for: checks that do something (scheduler.py), or what all checks say together (report.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, Literal

import msgspec

from llm_router.observe.health.checks import Check, Status
from llm_router.observe.health.settings import CheckSettings, HealthSettings

MEMORY_CRITICAL_PERCENT: Final = 95.0
"""Above it the kernel is about to kill something of ours."""

STATE_CHECKS: Final = (
    "router_initialized",
    "models_available",
    "models",
    "workers",
    "runners",
    "cpu_usage",
    "memory_usage",
    "process_memory",
    "disk_usage",
)

MEASURED_CHECKS: Final = frozenset(("cpu_usage", "memory_usage", "process_memory", "disk_usage"))
"""Levels that waver: they need several readings in a row to turn. The others are known for sure."""

ALIASES: Final[Mapping[str, str]] = {"disk_space": "disk_usage"}
"""Second names that checks have in the monitoring guide."""


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
        memory_used_bytes, memory_limit_bytes: of the control group, or of the machine where there is none.
        disk_ratio: how full the file system of `disk_path` is.
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


def assess(inputs: Inputs, settings: HealthSettings) -> dict[str, Check]:
    """The checks by name, without those that are switched off."""
    used = _ratio(inputs.memory_used_bytes, inputs.memory_limit_bytes)
    found = {
        "router_initialized": _initialized(inputs),
        "models_available": _models_available(inputs),
        "models": _models(inputs),
        "workers": _workers(inputs),
        "runners": _runners(inputs),
        "cpu_usage": _percent("CPU usage", inputs.cpu_ratio, settings.cpu_percent),
        "memory_usage": _percent(
            "Memory usage",
            used,
            settings.memory_percent,
            critical=max(MEMORY_CRITICAL_PERCENT, settings.memory_percent),
            details={} if used is None else {"used": inputs.memory_used_bytes, "limit": inputs.memory_limit_bytes},
        ),
        "process_memory": _percent(
            "Memory of supervisor, control and workers",
            _ratio(inputs.heap_bytes or inputs.rss_bytes or None, settings.process_memory_bytes),
            settings.memory_percent,
            details={
                "heapUsed": inputs.heap_bytes,
                "rss": inputs.rss_bytes,
                "external": inputs.runner_bytes,
                "limit": settings.process_memory_bytes,
            },
        ),
        "disk_usage": _percent(
            "Disk usage", inputs.disk_ratio, settings.disk_percent, details={"path": inputs.disk_path}
        ),
    }
    own = {
        **settings.checks,
        **{name: settings.checks[alias] for alias, name in ALIASES.items() if alias in settings.checks},
    }
    return {
        name: _as_configured(check, own.get(name))
        for name, check in found.items()
        if name not in own or own[name].enabled
    }


def _as_configured(check: Check, own: CheckSettings | None) -> Check:
    """A check that was made critical is so whenever it is not content; one that was made uncritical never is."""
    if own is None or own.critical is None:
        return check
    changes: dict[tuple[Status, bool], Status] = {("degraded", True): "critical", ("critical", False): "degraded"}
    return msgspec.structs.replace(check, status=changes.get((check.status, own.critical), check.status))


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


def _ratio(used: float | None, limit: float | None) -> float | None:
    return None if used is None or not limit else used / limit


def _percent(
    what: str,
    ratio: float | None,
    threshold: float,
    *,
    critical: float = math.inf,
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
