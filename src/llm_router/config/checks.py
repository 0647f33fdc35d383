"""Bounds of values that their types cannot say: shares, counts, addresses of stores.

Not for: names that refer to each other (load.py).
"""

from __future__ import annotations

import importlib.util
import re
from typing import Final
from urllib.parse import urlsplit

from llm_router.accounts.database import read_url
from llm_router.accounts.limits import KINDS, Limits
from llm_router.cache.base import CacheSettings
from llm_router.config.settings import AccountsSettings, QueueSettings, RoutingSettings
from llm_router.config.shape import Fail
from llm_router.errors import ConfigError
from llm_router.models.prices import Price
from llm_router.routing.table import BreakerSpec, QueueSpec, RetrySpec

_CUSTOM: Final = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*|[A-Za-z0-9_][A-Za-z0-9_.-]*")
_REDIS: Final = ("redis", "rediss", "unix")


def check_routing(routing: RoutingSettings, fail: Fail) -> None:
    """Everything below `routing` but the names of models. Raises: what `fail` makes."""
    if routing.custom and not _CUSTOM.fullmatch(routing.custom):
        raise fail(
            "routing.custom",
            f"{routing.custom!r} will not do: package.module:function, or the name of an entry point of the group "
            "llm_router.policies",
        )
    if routing.strategy == "custom" and not routing.custom:
        raise fail("routing.strategy", "custom needs routing.custom, which says where the function is")
    if routing.max_waiting < 1:
        raise fail("routing.max_waiting", "must be 1 or more")
    _check_retry(routing.retry, fail)
    _check_breaker(routing.breaker, fail)
    check_queue(routing.queue, "routing.queue", fail)


def _check_retry(retry: RetrySpec, fail: Fail) -> None:
    path = "routing.retry"
    if not 1 <= retry.attempts <= 10:
        raise fail(f"{path}.attempts", f"{retry.attempts} will not do: 1 (no retries) to 10")
    if not 0 <= retry.budget_ratio <= 1:
        raise fail(f"{path}.budget_ratio", f"{retry.budget_ratio:g} will not do: 0 to 1")
    if retry.budget_min < 0:
        raise fail(f"{path}.budget_min", "must be 0 or more")


def _check_breaker(breaker: BreakerSpec, fail: Fail) -> None:
    path = "routing.breaker"
    for key, share in (("error_ratio", breaker.error_ratio), ("slow_ratio", breaker.slow_ratio)):
        if not 0 < share <= 1:
            raise fail(f"{path}.{key}", f"{share:g} will not do: more than 0, at most 1")
    for key, count in (("min_attempts", breaker.min_attempts), ("probes", breaker.probes)):
        if count < 1:
            raise fail(f"{path}.{key}", "must be 1 or more")
    for key, value in (("window", breaker.window_s), ("cooldown", breaker.cooldown_s)):
        if value <= 0:
            raise fail(f"{path}.{key}", "must be more than 0")
    if breaker.cooldown_max_s < breaker.cooldown_s:
        raise fail(f"{path}.cooldown_max", "must not be less than cooldown")


def check_queue(queue: QueueSpec | QueueSettings, path: str, fail: Fail) -> None:
    """Raises: what `fail` makes."""
    if queue.slots is not None and queue.slots < 0:
        raise fail(f"{path}.slots", "must be 1 or more, or 0 to take what the backends have")
    if queue.max_waiting is not None and queue.max_waiting < 0:
        raise fail(f"{path}.max_waiting", "must be 1 or more, or 0 if nobody may wait")
    if queue.wait_s is not None and queue.wait_s <= 0:
        raise fail(f"{path}.wait", "must be more than 0")


def check_limits(limits: Limits, path: str, fail: Fail) -> None:
    """Raises: what `fail` makes."""
    for kind in KINDS:
        if getattr(limits, kind) < 0:
            raise fail(f"{path}.{kind}", "must be more than 0, or 0 for no limit")
    if not 0 < limits.warn_ratio <= 1:
        raise fail(f"{path}.warn_ratio", f"{limits.warn_ratio:g} will not do: more than 0, at most 1")


def check_terms(quality: float | None, price: Price | None, context_tokens: int, path: str, fail: Fail) -> None:
    """What a model or a deployment is worth and costs. Raises: what `fail` makes."""
    if quality is not None and not 0 <= quality <= 1:
        raise fail(f"{path}.quality", f"{quality:g} will not do: 0 (worst) to 1 (best)")
    if context_tokens < 0:
        raise fail(f"{path}.context", "must be a number of tokens, or 0 if it is not known")
    if price is not None:
        for key in ("input", "output", "cached_input", "cache_write"):
            dollars = getattr(price, key)
            if dollars is not None and dollars < 0:
                raise fail(f"{path}.price.{key}", "must be 0 or more")


def check_cache(cache: CacheSettings, fail: Fail) -> None:
    """Raises: what `fail` makes."""
    for key, size in (("max_size", cache.max_bytes), ("max_entry", cache.max_entry_bytes)):
        if size < 1:
            raise fail(f"cache.{key}", "must be more than 0; to keep no answers, write enabled: false")
    if cache.max_entry_bytes > cache.max_bytes:
        raise fail("cache.max_entry", "must not be more than cache.max_size")
    if cache.ttl_s <= 0:
        raise fail("cache.ttl", "must be more than 0; to keep no answers, write enabled: false")
    _check_redis(cache.url, "cache.url", fail)


def check_accounts(accounts: AccountsSettings, fail: Fail) -> None:
    """Raises: what `fail` makes."""
    _check_redis(accounts.redis, "accounts.redis", fail)
    try:
        database = read_url(accounts.database)
    except ConfigError as error:
        raise fail(error.key, error.problem) from None
    if database.kind == "postgresql" and importlib.util.find_spec("psycopg") is None:
        raise fail("accounts.database", "needs a library: pip install 'llm-runner-router[postgres]'")


def _check_redis(url: str, path: str, fail: Fail) -> None:
    if not url:
        return
    try:
        parts = urlsplit(url)
        is_good = parts.scheme in _REDIS and bool(parts.path if parts.scheme == "unix" else parts.hostname)
        is_good = is_good and parts.port != 0
    except ValueError:
        is_good = False
    if not is_good:
        raise fail(path, "is no address of a Redis: write redis://host:6379/0, rediss://… for TLS, or unix:///path")
