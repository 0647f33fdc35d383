"""The browser guard: programs pass, foreign pages do not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_router.accounts.access import AccessSettings, Guard
from llm_router.errors import InvalidRequest

JSON = b"application/json"


def refusal(guard: Guard, *args: object, **kwargs: object) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        guard.check(*args, **kwargs)  # type: ignore[arg-type]
    return caught.value


@pytest.fixture
def guard() -> Guard:
    return Guard(AccessSettings())


@pytest.mark.parametrize(
    "host",
    [
        b"localhost", b"localhost:3006", b"LOCALHOST:3006", b"localhost.", b"127.0.0.1", b"127.0.0.1:9090",
        b"127.8.4.2:1", b"[::1]", b"[::1]:3006",
    ],
)  # fmt: skip
def test_loopback_names_are_ours_whatever_the_port(guard: Guard, host: bytes) -> None:
    """Loopback names and addresses pass on every port, the first time and from the cache."""
    guard.check("GET", host)
    guard.check("GET", host)


@pytest.mark.parametrize(
    "host",
    [
        b"evil.example", b"evil.example:3006", b"localhost.evil.example", b"127.0.0.1.evil.example", b"", b":3006",
        b"10.0.0.7:3006", b"2130706433", b"0x7f.1", b"[::1", b"[::1]evil", b"localhost:evil", b"localhost:80:80",
        b"[2001:db8::1]", b"caf\xe9", b"evil.example\x00localhost",
    ],
)  # fmt: skip
def test_a_rebound_dns_name_is_misdirected(guard: Guard, host: bytes) -> None:
    """A page whose own name resolves to this machine still sends that name as Host: 421."""
    error = refusal(guard, "POST", host, content_type=JSON)
    assert (error.status, error.code) == (421, "misdirected_request")


def test_configured_names_and_bound_addresses_are_ours() -> None:
    """`allowed_hosts` and the addresses bound to are answered, others are not."""
    guard = Guard(AccessSettings(bound_hosts=("10.1.2.3", "fe80::1"), allowed_hosts=("LLM.example.org",)))
    for host in (b"10.1.2.3:3006", b"llm.example.org", b"llm.EXAMPLE.org:443", b"[fe80::1]:3006"):
        guard.check("GET", host)
    assert refusal(guard, "GET", b"10.1.2.4").status == 421


@pytest.mark.parametrize("wildcard", ["0.0.0.0", "::"])
def test_a_wildcard_admits_address_literals_but_no_names(wildcard: str) -> None:
    """Bound everywhere, every address literal may be ours; a DNS name still has to be configured."""
    guard = Guard(AccessSettings(bound_hosts=(wildcard,)))
    guard.check("GET", b"192.168.1.9:3006")
    guard.check("GET", b"[2001:db8::1]:3006")
    assert refusal(guard, "GET", b"evil.example").status == 421


def test_hosts_cannot_fill_the_cache() -> None:
    """The cache of hosts is bounded; a host that is not cached is still answered."""
    guard = Guard(AccessSettings())
    for number in range(3000):
        guard.check("GET", f"127.0.{number // 250}.{number % 250}".encode())
    assert "hosts_seen=1024" in repr(guard)


@given(st.binary(max_size=40))
def test_no_host_value_breaks_the_guard(host: bytes) -> None:
    """Whatever the bytes: it passes or it is 421."""
    try:
        Guard(AccessSettings()).check("GET", host)
    except InvalidRequest as error:
        assert error.status == 421


@pytest.mark.parametrize("origin", [b"http://localhost:3006", b"https://localhost:3006", b"HTTP://LOCALHOST:3006"])
def test_our_own_pages_pass(guard: Guard, origin: bytes) -> None:
    """The origin of the very server that is asked is not foreign."""
    guard.check("POST", b"localhost:3006", origin, b"same-origin", JSON)


@pytest.mark.parametrize(
    "origin",
    [
        b"https://evil.example", b"null", b"http://localhost:8080", b"http://127.0.0.1:3006", b"file://",
        b"http://localhost:3006.evil.example", b"localhost:3006", b"chrome-extension://localhost:3006",
    ],
)  # fmt: skip
def test_foreign_origins_are_refused(guard: Guard, origin: bytes) -> None:
    """Any other origin, another port of this machine included, is 403 for every method."""
    for method in ("GET", "POST", "OPTIONS"):
        error = refusal(guard, method, b"localhost:3006", origin, content_type=JSON)
        assert (error.status, error.code) == (403, "forbidden_origin")


def test_cross_site_requests_without_an_origin_are_refused(guard: Guard) -> None:
    """An image or a link of another site is 403; typed addresses and links of the same site pass."""
    assert refusal(guard, "GET", b"localhost", b"", b"cross-site").status == 403
    for site in (b"none", b"same-origin", b"same-site"):
        guard.check("GET", b"localhost", b"", site)


@pytest.mark.parametrize(
    "content_type",
    [b"text/plain", b"text/plain;charset=UTF-8", b"application/x-www-form-urlencoded", b"multipart/form-data; boundary=x",
     b"", b"application/jsonp", b"text/plain; application/json", b"+json"],
)  # fmt: skip
def test_form_posts_are_refused(guard: Guard, content_type: bytes) -> None:
    """What a form or a no-cors fetch can send is 415, also without any Origin header."""
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        error = refusal(guard, method, b"localhost", content_type=content_type)
        assert (error.status, error.code) == (415, "unsupported_media_type")


@pytest.mark.parametrize(
    "content_type", [JSON, b"application/json; charset=utf-8", b"Application/JSON", b"application/vnd.api+json"]
)
def test_json_posts_pass(guard: Guard, content_type: bytes) -> None:
    """JSON types pass with parameters and in any case."""
    guard.check("POST", b"localhost", content_type=content_type)


def test_a_post_without_body_needs_no_content_type(guard: Guard) -> None:
    """`curl -X POST .../admin/reload` works; a declared form type is refused even without a body."""
    guard.check("POST", b"localhost", has_body=False)
    assert refusal(guard, "POST", b"localhost", content_type=b"text/plain", has_body=False).status == 415


def test_no_cors_headers_unless_configured(guard: Guard) -> None:
    """By default no page is told that it may read a reply."""
    assert guard.cors(b"http://localhost:3006") == ()
    assert guard.preflight(b"https://app.example.org", b"content-type") == ()


def test_a_configured_page_may_call_and_read() -> None:
    """A configured origin passes although it is cross-site, and gets the CORS headers and its preflight."""
    guard = Guard(AccessSettings(allowed_origins=("https://app.example.org/",)))
    page = b"https://app.example.org"
    guard.check("POST", b"localhost", page, b"cross-site", JSON)
    guard.check("OPTIONS", b"localhost", page, b"cross-site", has_body=False)
    assert dict(guard.cors(page))[b"access-control-allow-origin"] == page
    assert dict(guard.preflight(page, b"x-thing"))[b"access-control-allow-headers"] == b"x-thing"
    assert refusal(guard, "POST", b"localhost", b"https://evil.example", b"cross-site", JSON).status == 403
    assert guard.cors(b"https://evil.example") == ((b"vary", b"origin"),)


def test_a_star_admits_every_page() -> None:
    """`*` is for who wants it: every origin, but the host is still checked."""
    guard = Guard(AccessSettings(allowed_origins=("*",)))
    guard.check("POST", b"localhost", b"https://any.example", b"cross-site", JSON)
    assert refusal(guard, "POST", b"any.example", b"https://any.example", b"", JSON).status == 421
