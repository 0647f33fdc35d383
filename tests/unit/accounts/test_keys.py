"""Keys: their texts, what is kept of them, who finds them, and what follows from their being there."""

from __future__ import annotations

import base64
import hashlib
import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_router.accounts.keys import (
    KEY_PREFIX,
    SCOPES,
    KeyRing,
    KeyScope,
    KeySpec,
    closed_scopes,
    digest_of,
    new_id,
    new_key,
)
from llm_router.accounts.stored import StoredKey

NOW = 1_700_000_000.0


def key(text: str = "sk-llmr-a", **fields: object) -> KeySpec:
    return msgspec.structs.replace(KeySpec(id="key-1", name="app", digest=digest_of(text)), **fields)


def test_a_key_holds_256_random_bits() -> None:
    """After a prefix that says whose it is; in characters that no shell, URL or header minds."""
    texts = {new_key() for _ in range(1000)}
    assert len(texts) == 1000
    for text in texts:
        assert re.fullmatch(r"sk-llmr-[A-Za-z0-9_-]{43}", text)
        assert len(base64.urlsafe_b64decode(text.removeprefix(KEY_PREFIX) + "=")) == 32


def test_ids_are_no_keys() -> None:
    """They are public, and say nothing of the text."""
    ids = {new_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(re.fullmatch("key-[0-9a-f]{16}", id) for id in ids)


def test_only_the_hash_is_kept() -> None:
    """SHA-256 of the whole text, prefix included."""
    text = new_key()
    assert digest_of(text) == hashlib.sha256(text.encode()).digest()


@given(st.lists(st.text(min_size=1), unique=True, max_size=20), st.binary(max_size=80))
def test_a_ring_finds_its_keys_and_no_others(texts: list[str], other: bytes) -> None:
    """Whatever bytes are asked for."""
    keys = [key(text, id=str(number)) for number, text in enumerate(texts)]
    ring = KeyRing(keys)
    assert [ring.find(text.encode("utf-8"), NOW) for text in texts] == keys
    found = ring.find(other, NOW)
    assert (found is not None) == (other in [text.encode() for text in texts])


def test_an_expired_key_is_not_found() -> None:
    """From the very second on."""
    ring = KeyRing([key(expires_time=NOW)])
    assert ring.find(b"sk-llmr-a", NOW - 0.001) is not None
    assert ring.find(b"sk-llmr-a", NOW) is None


def test_nothing_shows_a_text_or_a_hash() -> None:
    """Neither repr nor str, of a key or of a ring."""
    text = new_key()
    spec = key(text)
    stored = StoredKey(id="key-1", name="app", digest=spec.digest, created_time=NOW)
    for shown in (repr(spec), str(spec), repr(stored), repr(KeyRing([spec])), f"{[spec, stored]}"):
        assert text not in shown
        assert repr(spec.digest) not in shown
        assert spec.digest.hex() not in shown
    assert repr(KeyRing([spec])) == "KeyRing(1 keys)"


@pytest.mark.parametrize(
    ("scopes", "rights"),
    [
        (("inference",), {"inference"}),
        (("metrics:read",), {"metrics:read"}),
        (("admin",), {"admin", "metrics:read"}),
        (("inference", "admin"), {"inference", "admin", "metrics:read"}),
        ((), set()),
    ],
)
def test_admin_includes_monitoring_but_not_models(scopes: tuple[KeyScope, ...], rights: set[str]) -> None:
    """Every other scope is only itself."""
    assert {scope for scope in SCOPES if key(scopes=scopes).has(scope)} == rights


def test_a_key_may_ask_the_models_it_is_for() -> None:
    """Without any, all."""
    assert key().may_ask("any")
    assert key(models=("a", "b")).may_ask("b")
    assert not key(models=("a", "b")).may_ask("ab")


def test_a_scope_is_closed_by_the_first_key_that_has_it() -> None:
    """And by nothing else, as long as only this machine can ask."""
    assert closed_scopes([], always=False) == frozenset()
    assert closed_scopes([key()], always=False) == {"inference"}
    assert closed_scopes([key(), key(scopes=("admin",))], always=False) == {"inference", "admin"}
    assert closed_scopes([], always=True) == frozenset(SCOPES)


def test_the_end_of_a_key_opens_nothing() -> None:
    """A revoked key still closes what it closed: it would be good for everything again otherwise."""
    ended = StoredKey(id="key-1", name="app", digest=b"", created_time=1.0, expires_time=2.0, revoked_time=2.0)
    assert closed_scopes([ended], always=False) == {"inference"}
