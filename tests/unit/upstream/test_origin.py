"""Origins: what a backend's URL says about where to connect."""

from __future__ import annotations

import pytest

from llm_router.upstream.pool import Origin


@pytest.mark.parametrize(
    ("url", "origin", "authority"),
    [
        ("http://127.0.0.1:8000", Origin("http", "127.0.0.1", 8000), "127.0.0.1:8000"),
        ("http://host", Origin("http", "host", 80), "host"),
        ("HTTPS://API.example.com/v1/", Origin("https", "api.example.com", 443), "api.example.com"),
        ("https://api.example.com:8443/v1", Origin("https", "api.example.com", 8443), "api.example.com:8443"),
        ("http://[::1]:9000/", Origin("http", "::1", 9000), "[::1]:9000"),
        ("unix:/run/a.sock", Origin("unix", "localhost", 0, "/run/a.sock"), "localhost"),
        ("unix:///run/a.sock", Origin("unix", "localhost", 0, "/run/a.sock"), "localhost"),
    ],
)
def test_an_origin_is_scheme_host_and_port(url: str, origin: Origin, authority: str) -> None:
    """Default ports are filled in, and left out of the Host header."""
    assert origin == Origin.parse(url)
    assert authority == origin.authority
    assert origin == Origin.parse(str(origin))


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("ftp://host", "http://, https:// or unix:"),
        ("host:8000", "http://, https:// or unix:"),
        ("", "http://, https:// or unix:"),
        ("unix:", "path of a socket"),
        ("http://", "needs a host"),
        ("http://:80", "needs a host"),
        ("http://host:port", "invalid host or port"),
        ("http://host:70000", "invalid host or port"),
        ("http://a host", "needs a host"),
        ("https://user:secret@host", "must not hold a user name or password"),
    ],
)
def test_what_is_no_origin_is_refused(url: str, problem: str) -> None:
    """The message says what is wrong and never repeats a password."""
    with pytest.raises(ValueError, match=problem) as caught:
        Origin.parse(url)
    assert "secret" not in str(caught.value)
