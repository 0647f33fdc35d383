"""What can be configured about health checks. Not for: running them (scheduler.py)."""

from __future__ import annotations

import msgspec


class CheckSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What one check has differently; None: as all. A check that is not `enabled` does not run at all."""

    enabled: bool = True
    critical: bool | None = None
    interval_s: float | None = None
    timeout_s: float | None = None


class ExternalTarget(msgspec.Struct, frozen=True, kw_only=True):
    """Something outside that the router's users need: reached or not.

    Args:
        name: its check is `external_NAME`.
        target: `tcp://host:port`, `tls://host:port` (the certificate is verified) or an http(s) URL that answers below 500.
        critical: whether the router is useless without it.
    """

    name: str
    target: str
    critical: bool = False


class Validation(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt with what its answer must look like; the check is `model_NAME`.

    Args:
        model: that is asked, never counted as traffic.
        expect: a regular expression (RE2 syntax is a safe subset) that the answer must match somewhere; empty: any text.
        max_tokens: of the answer.
        interval_s: how often; None as all others.
    """

    name: str
    model: str
    prompt: str
    expect: str = ""
    max_tokens: int = 16
    interval_s: float | None = None


class HealthSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Which checks run, how often, and from when on they are unhappy. Percentages are of what may be used, 0..100.

    Args:
        enabled: off, no check runs and there is no such route; `/health/live` and `/health/ready` stay.
        endpoint: the path beside `/health`.
        interval_s, timeout_s: of a check that does not say otherwise.
        fall, rise: failures, and successes, in a row until a check changes; what is known for sure, like whether a worker
            is up, needs one.
        concurrency: checks that run at a time.
        cpu_percent, memory_percent, disk_percent: thresholds.
        disk_path: whose file system is looked at; empty: DATA_DIR.
        process_memory_bytes: what supervisor, control and workers together may use.
        paid_probe_daily_usd: what probes of models that cost money may cost in a day; 0: they are judged by their traffic.
        external: further services to look at.
        validate: prompts with expectations.
        checks: by name, what a check has differently.
    """

    enabled: bool = True
    endpoint: str = "/health"
    interval_s: float = 30.0
    timeout_s: float = 5.0
    fall: int = 3
    rise: int = 2
    concurrency: int = 4
    cpu_percent: float = 80.0
    memory_percent: float = 85.0
    disk_percent: float = 90.0
    disk_path: str = ""
    process_memory_bytes: int = 4 * 1024**3
    paid_probe_daily_usd: float = 0.0
    external: tuple[ExternalTarget, ...] = ()
    validate: tuple[Validation, ...] = ()
    checks: dict[str, CheckSettings] = {}
