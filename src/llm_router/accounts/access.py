"""Keeps web pages out: whether a request may have been made by a browser on behalf of somebody else's page.

A server on localhost can be reached by every page its user opens. Three things give such a request away:
the name it was sent to (DNS rebinding shows as a foreign `Host`), the page it came from (`Origin`,
`Sec-Fetch-Site`), and, for forms, a content type that no API client uses. Programs send none of the
latter two and are not affected. Not for: keys and scopes, which say who the caller is.
"""

from __future__ import annotations

import ipaddress
from typing import Final

import msgspec

from llm_router.errors import InvalidRequest

_SAFE_METHODS: Final = frozenset(("GET", "HEAD", "OPTIONS", "TRACE"))
_WILDCARDS: Final = frozenset(("0.0.0.0", "::", "*"))  # recognised, not bound
_CACHE_BOUND: Final = 1024
"""Host values remembered; beyond it each is judged anew (about 2 us). One client uses one or two."""

_EXPOSED: Final = (
    b"x-request-id, request-id, x-llm-router-model, x-llm-router-backend, x-llm-router-strategy, "
    b"x-llm-router-attempts, x-llm-router-overhead-ms, x-llm-router-cached, server-timing, retry-after, "
    b"x-ratelimit-limit-requests, x-ratelimit-remaining-requests, x-ratelimit-reset-requests, "
    b"x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens"
)
_PREFLIGHT_MAX_AGE_S: Final = b"600"

Headers = tuple[tuple[bytes, bytes], ...]


class AccessSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Which names we answer to and which pages may call us.

    Args:
        bound_hosts: the addresses that the listeners are bound to. A wildcard (`0.0.0.0`, `::`) stands for
            every address literal: a rebound DNS name is never a literal, so literals are safe to admit.
        allowed_hosts: further host names, without port, case-insensitive, like `llm.example.org`.
        allowed_origins: origins of pages that may call us, like `https://app.example.org`; `*` for all.
            Only these get CORS headers.
    """

    bound_hosts: tuple[str, ...] = ("127.0.0.1",)
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()


class Guard:
    """Judges requests by `AccessSettings`. Runs on every request: dict lookups for values seen before.

    Not safe across threads; each process has its own and makes a new one when the settings change.
    """

    def __init__(self, settings: AccessSettings) -> None:
        self.settings = settings
        self._literals = any(host in _WILDCARDS for host in settings.bound_hosts)
        names = {_host_name(host) for host in (*settings.bound_hosts, *settings.allowed_hosts)}
        self._names = frozenset(names | {"localhost"})
        self._origins = frozenset(origin.rstrip("/").lower() for origin in settings.allowed_origins)
        self._hosts_seen: set[bytes] = set()
        self._types_seen: set[bytes] = {b"application/json"}

    def __repr__(self) -> str:
        return f"Guard({self.settings!r}, hosts_seen={len(self._hosts_seen)})"

    def check(
        self,
        method: str,
        host: bytes,
        origin: bytes = b"",
        sec_fetch_site: bytes = b"",
        content_type: bytes = b"",
        *,
        has_body: bool = True,
    ) -> None:
        """Return if the request may be served. Header values as they came, `b""` when absent.

        A state-changing request without a body needs no content type: a browser that sends one names
        its page in `Origin`.

        Raises: InvalidRequest with status 421 (host), 403 (page) or 415 (content type).
        """
        if host not in self._hosts_seen:
            self._admit_host(host)
        if origin or sec_fetch_site:
            self._check_page(host, origin, sec_fetch_site)
        if method not in _SAFE_METHODS and content_type not in self._types_seen and (has_body or content_type):
            self._admit_type(content_type)

    def cors(self, origin: bytes) -> Headers:
        """The headers that let a configured page read the reply; none for every other caller."""
        if not origin or not self._origins:
            return ()
        if not self._is_allowed_origin(origin):
            return ((b"vary", b"origin"),)
        return (
            (b"access-control-allow-origin", origin),
            (b"access-control-expose-headers", _EXPOSED),
            (b"vary", b"origin"),
        )

    def preflight(self, origin: bytes, request_headers: bytes) -> Headers:
        """Headers of the 204 that answers a CORS preflight of a configured page; none if it is not configured.

        Args:
            request_headers: the value of `access-control-request-headers`, echoed: the browser asks for
                what the page's script sets, and a configured page may set what it likes.
        """
        if not origin or not self._is_allowed_origin(origin):
            return ()
        return (
            (b"access-control-allow-origin", origin),
            (b"access-control-allow-methods", b"GET, POST, PUT, PATCH, DELETE"),
            (b"access-control-allow-headers", request_headers or b"content-type, authorization"),
            (b"access-control-allow-private-network", b"true"),
            (b"access-control-max-age", _PREFLIGHT_MAX_AGE_S),
            (b"vary", b"origin, access-control-request-headers"),
        )

    def _admit_host(self, host: bytes) -> None:
        if not self._is_our_name(host):
            shown = host.decode("latin-1")[:200] or "none"
            raise InvalidRequest(
                f"this server does not answer to the host {shown!r}; if it should, add it to access.allowed_hosts",
                status=421,
                code="misdirected_request",
            )
        if len(self._hosts_seen) < _CACHE_BOUND:
            self._hosts_seen.add(host)

    def _is_our_name(self, host: bytes) -> bool:
        try:
            name = _host_name(host.decode("ascii"))
        except UnicodeDecodeError:
            return False
        if name in self._names:
            return bool(name)
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or self._literals

    def _check_page(self, host: bytes, origin: bytes, sec_fetch_site: bytes) -> None:
        if origin:
            if self._is_allowed_origin(origin) or _authority(origin) == host.lower():
                return
            shown = origin.decode("latin-1")[:200]
            raise InvalidRequest(
                f"pages of {shown!r} may not call this server; if they should, add it to access.allowed_origins",
                status=403,
                code="forbidden_origin",
            )
        # `same-site` passes: whatever can change something or be read by a page carries an Origin,
        # and links from a dashboard on another port of this machine should work.
        if sec_fetch_site == b"cross-site":
            raise InvalidRequest("requests from pages of other sites are refused", status=403, code="forbidden_origin")

    def _is_allowed_origin(self, origin: bytes) -> bool:
        if not self._origins:
            return False
        return "*" in self._origins or origin.decode("latin-1").lower() in self._origins

    def _admit_type(self, content_type: bytes) -> None:
        kind = content_type.partition(b";")[0].strip().lower()
        if kind != b"application/json" and not (kind.endswith(b"+json") and b"/" in kind):
            shown = content_type.decode("latin-1")[:200] or "no content type"
            raise InvalidRequest(
                f"send the body as application/json, not as {shown!r}", status=415, code="unsupported_media_type"
            )
        if len(self._types_seen) < _CACHE_BOUND:
            self._types_seen.add(content_type)


def _host_name(host: str) -> str:
    """The name in a `Host` value: port, brackets and a final dot removed, lower case. Empty if malformed."""
    host = host.strip().lower()
    if host.startswith("["):
        name, bracket, rest = host[1:].partition("]")
        return name if bracket and (not rest or _is_port(rest)) else ""
    if host.count(":") > 1:  # a bare IPv6 literal: only configuration writes it so
        return host
    name, colon, port = host.partition(":")
    if colon and not _is_port(colon + port):
        return ""
    return name.removesuffix(".")


def _is_port(text: str) -> bool:
    return text[:1] == ":" and (text[1:].isdecimal() or not text[1:])


def _authority(origin: bytes) -> bytes:
    """`host[:port]` of an origin; empty for `null` and other opaque ones."""
    scheme, separator, authority = origin.lower().partition(b"://")
    return authority if separator and scheme in (b"http", b"https") else b""
