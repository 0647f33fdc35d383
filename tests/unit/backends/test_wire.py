"""Our credentials are taken out of what a backend quotes, in whatever form it writes them."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import pytest

from llm_router.backends.wire import Secrets
from llm_router.routing.table import BackendSpec

KEY = 'pass/"word"+of=ours'


def secrets(**fields: Any) -> Secrets:
    return Secrets(BackendSpec(name="b", url="http://b/v1", **fields))


@pytest.mark.parametrize(
    "said",
    [
        KEY,
        f"Bearer {KEY}",
        json.dumps(f"key {KEY}"),
        json.dumps(KEY).replace("/", "\\/"),
        f"?key={quote(KEY, safe='')}",
    ],
)
def test_a_key_is_found_in_every_form(said: str) -> None:
    """In a text, in JSON however that escapes, in a URL."""
    shown = secrets(api_key=KEY).without(said.encode())
    assert b"word" not in shown
    assert b"***" in shown


def test_headers_and_queries_are_credentials_too() -> None:
    """Whole, or what follows the scheme; but for versions and short flags."""
    found = secrets(
        headers={"authorization": "Basic YWxpY2U6c2VjcmV0", "x-flag": "on"},
        query="api-version=2024-10-21&code=abc%2Fdefghij&x=1",
    )
    said = b"Basic YWxpY2U6c2VjcmV0 YWxpY2U6c2VjcmV0 on api-version=2024-10-21 abc%2Fdefghij abc/defghij x=1"
    assert found.without(said) == b"*** *** on api-version=2024-10-21 *** *** x=1"


def test_a_longer_secret_goes_before_its_part() -> None:
    """Or half of it would stay."""
    assert secrets(api_key="12345678", headers={"x": "12345678-and-more"}).without(b"12345678-and-more") == b"***"
    assert secrets().without(b"nothing of ours") == b"nothing of ours"
