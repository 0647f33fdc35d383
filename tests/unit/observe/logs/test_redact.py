"""Secrets are taken out wherever they stand, everything else is left, and what is left is safe to print."""

from __future__ import annotations

import time
from urllib.parse import quote, unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_router.observe.logs.redact import (
    REDACTED,
    clean,
    clean_exception,
    clean_id,
    clean_query,
    clean_url,
    clean_value,
    is_secret_name,
    printable,
    redact,
)

BODY = "Zx9Qm4Lr7Tb2Wc8Yd5Nf1Hg6Kj3Pv0"
"""The part of a made-up secret that must not be seen anywhere."""

SECRETS = {
    "openai": f"sk-{BODY}",
    "openai project": f"sk-proj-{BODY}",
    "anthropic": f"sk-ant-api03-{BODY}",
    "ours": f"sk-llmr-{BODY}{BODY[:11]}",
    "stripe": f"sk_live_{BODY}",
    "google": f"AIza{BODY}_-abc",
    "google oauth": f"ya29.{BODY}",
    "aws": "AKIA" + BODY[:16].upper(),
    "github": f"ghp_{BODY}",
    "github fine-grained": f"github_pat_{BODY}",
    "gitlab": f"glpat-{BODY}",
    "slack": f"xoxb-123456789012-{BODY}",
    "slack app": f"xapp-1-{BODY}",
    "hugging face": f"hf_{BODY}",
    "groq": f"gsk_{BODY}",
    "xai": f"xai-{BODY}",
    "perplexity": f"pplx-{BODY}",
    "nvidia": f"nvapi-{BODY}",
    "replicate": f"r8_{BODY}",
    "npm": f"npm_{BODY}",
    "sendgrid": f"SG.{BODY[:16]}.{BODY}",
    "bearer": f"Bearer {BODY}",
    "bearer in a URL": f"Bearer%20{BODY}",
    "bearer, shouted": f"BEARER  {BODY}",
    "basic": f"Basic {BODY}==",
    "jwt": f"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.{BODY}",
    "user and password": f"postgresql://router:{BODY}@db:5432/accounts",
    "named": f"api_key={BODY}",
    "named, quoted": f'"password": "{BODY}"',
    "named in Python": f"{{'client_secret': '{BODY}'}}",
    "named in JSON in JSON": f'\\"api_key\\": \\"{BODY}\\"',
    "header": f"Authorization: {BODY}",
    "header with a scheme": f"authorization: Bearer {BODY}",
    "cookie": f"Cookie: {BODY}",
    "token": f"refresh_token: {BODY}",
    "private key": f"-----BEGIN PRIVATE KEY-----\n{BODY}\n{BODY}\n-----END PRIVATE KEY-----",
    "private key, cut": f"-----BEGIN RSA PRIVATE KEY-----\n{BODY}",
}


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS.keys())
@pytest.mark.parametrize(
    "around",
    [
        "{}",
        "the key {} is wrong",
        "(key={})",
        '"{}"',
        "\n{}\n",
        "url?x={}&y=1",
        "[{}]",
        "a:{},b",
        "a\\n{}",
        "\\u00e9{}",
        "\\x0a{}",
        "q=%20{}",
        "\x1b[31m{}\x1b[0m",
    ],
)
def test_secrets_are_taken_out_of_any_text(secret: str, around: str) -> None:
    """Whatever stands around them; and cleaning twice changes nothing more."""
    once = clean(around.format(secret))
    assert BODY[8:16].lower() not in once.lower()
    assert REDACTED in once
    assert clean(once) == once


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS.keys())
def test_secrets_are_found_in_any_encoding_of_a_url(secret: str) -> None:
    """Reserved characters percent-encoded, or all of them."""
    everything = "".join(f"%{byte:02x}" for byte in secret.encode())
    for encoded in (quote(secret), quote(secret, safe=""), everything):
        cleaned = clean(f"https://example.org/?q={encoded}")
        assert BODY[8:16].lower() not in unquote(cleaned).lower()
        assert REDACTED in cleaned


def test_harmless_encodings_stay_as_they_are() -> None:
    """What is decoded is looked at, and shown only where something was found."""
    text = "/a%20b?q=100%25&x=%zz&y=%E4%0A"
    assert clean(text) == text


@pytest.mark.parametrize(
    "card", ["4111111111111111", "4111 1111 1111 1111", "5500-0000-0000-0004", "340000000000009", "6011000000000004"]
)
def test_card_numbers_are_taken_out(card: str) -> None:
    """With or without separators, if their check digit is right."""
    assert redact(f"card {card}, please") == f"card {REDACTED}, please"


@pytest.mark.parametrize(
    "text",
    [
        "4111111111111112",  # the check digit is wrong
        "1700000000000000000",  # nanoseconds
        "version 4.1111111111111111",
        "0123456789abcdef-4111",
        "max_tokens=4096, total tokens: 118, token_count=5",
        "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/120.0.0.0 Safari/537.36",
        "model 'gpt-4o-mini' is not known; models are: task-runner-large-v2, smollm2",
        "http://localhost:3006/v1/chat/completions",
        "mail to someone@example.org: it works",
        "the basic idea, the bearer of news",
        "asiapacific.example.org",
        "4bf92f3577b34da6a3ce929d0e0e4736",
        "the password is wrong",
    ],
)
def test_harmless_texts_are_left_alone(text: str) -> None:
    """What merely looks a little like a secret tells an operator something."""
    assert clean(text) == text


@pytest.mark.parametrize(
    "name",
    [
        "Authorization",
        "api_key",
        "x-api-key",
        "X-Goog-Api-Key",
        "apiKey",
        "password",
        "db_password",
        "Set-Cookie",
        "access_token",
        "refreshToken",
        "client_secret",
        "aws_secret_access_key",
        "OPENAI_API_KEY",
        "private.key",
    ],
)
def test_names_of_secrets(name: str) -> None:
    """In any spelling."""
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name", ["max_tokens", "tokens", "token_count", "key_id", "key_name", "model", "monkey", "secretary", "keyword"]
)
def test_names_of_other_things(name: str) -> None:
    """Even if they hold such a word."""
    assert not is_secret_name(name)


def test_queries_lose_the_values_of_secret_parameters() -> None:
    """And keep everything else as it was."""
    assert clean_query(f"key=short&alt=sse&api%5Fkey=abc&x={SECRETS['openai']}&password=") == (
        f"key={REDACTED}&alt=sse&api%5Fkey={REDACTED}&x={REDACTED}&password="
    )
    assert clean_query("just text") == "just text"


def test_what_is_left_out_of_a_long_query_is_counted() -> None:
    """All of it, not only what was looked at for secrets."""
    assert clean_query("q=" + "a" * 3000, 64) == "q=" + "a" * 62 + "... (2938 more characters)"
    assert clean_query("q=" + "a" * 100, 64) == "q=" + "a" * 62 + "... (38 more characters)"
    assert clean_query("q" * 3000, 64) == "q" * 64 + "... (2936 more characters)"
    assert BODY not in clean_query(f"key={BODY * 30}&" + "b" * 600 + f"&key={BODY}", 64)


def test_urls_lose_user_and_password() -> None:
    """And secret parameters."""
    assert clean_url("https://me:abc@example.org/a?token=x&b=1#c") == (
        f"https://{REDACTED}@example.org/a?token={REDACTED}&b=1#c"
    )
    assert clean_url("https://example.org/a") == "https://example.org/a"


def test_nested_data_is_cleaned_by_name_and_by_pattern() -> None:
    """At any depth up to the bound, in keys too; what is no JSON becomes a text."""
    value = {"a": [{"password": "x", "note": SECRETS["github"]}], "n": 1, "t": True, "none": None, "b": b"\x00", 5: {6}}
    assert clean_value(value) == {
        "a": [{"password": REDACTED, "note": REDACTED}],
        "n": 1,
        "t": True,
        "none": None,
        "b": "\\x00",
        "5": [6],
    }
    assert REDACTED in clean_value({SECRETS["hugging face"]: 1})


def test_nested_data_is_bounded() -> None:
    """In items, in depth, and against itself."""
    endless: dict[str, object] = {}
    endless["self"] = endless
    assert "..." in str(clean_value(endless))
    assert len(clean_value(list(range(10_000)))) == 65
    assert len(clean_value(dict.fromkeys(map(str, range(10_000)), 0))) == 65


def test_exceptions_tell_no_secrets() -> None:
    """Neither in their message nor in their traceback, nor in that of their cause."""
    try:
        try:
            raise KeyError(SECRETS["anthropic"])
        except KeyError as cause:
            raise RuntimeError(f"\x1b[31mpassword={BODY}") from cause
    except RuntimeError as error:
        told = clean_exception(error)
    assert told["name"] == "RuntimeError"
    assert told["message"] == f"\\x1bpassword={REDACTED}"
    assert "KeyError" in told["stack"]
    assert "\n" in told["stack"]
    assert BODY not in str(told)


def test_exceptions_that_cannot_be_shown_are_named() -> None:
    """Their own methods may raise anything."""

    class Unshowable(Exception):
        def __str__(self) -> str:
            raise ValueError

    told = clean_exception(Unshowable())
    assert told["name"] == "Unshowable"
    assert "cannot be shown" in told["message"]


def test_long_stacks_keep_their_end() -> None:
    """That is where it says what happened."""
    told = clean_exception(RuntimeError("x" * 9000 + " the end"), limit=1000)
    assert told["stack"].startswith("... (")
    assert told["stack"].endswith("the end\n")
    assert len(told["stack"]) < 1200


def test_control_characters_are_shown_as_text() -> None:
    """No terminal obeys them, no reader takes them for the end of a line, and every encoder takes the rest."""
    text = "a\n\t\r\x00\x1b[2J\x7f\x9b\u2028\u2029\u202e\ufeff\ud800é€😀"
    assert printable(text) == r"a\x0a\x09\x0d\x00\x1b[2J\x7f\x9b\u2028\u2029\u202e\ufeff\ud800é€😀"
    assert printable("a\n\tb\r", keep_lines=True) == "a\n\tb\\x0d"


@given(st.text(st.characters(), max_size=300))
def test_cleaned_texts_are_printable_and_bounded(text: str) -> None:
    """Any text, and any limit."""
    cleaned = clean(text, 100)
    cleaned.encode()
    assert printable(cleaned) == cleaned
    assert len(cleaned) <= 6 * 100 + 40


@given(st.sampled_from(sorted(SECRETS)), st.integers(0, 60), st.text("abc =:", max_size=60))
def test_a_cut_leaves_no_half_of_a_secret(name: str, before: int, after: str) -> None:
    """Though the text ends in the middle of it."""
    assert BODY[:10] not in clean("x" * before + " " + SECRETS[name] + " " + after, 60)


@pytest.mark.parametrize(
    "piece",
    [
        "a:",
        "sk-",
        "bearer ",
        "://",
        "4 ",
        "4-",
        "token:",
        "a_",
        "eyJ",
        "-----BEGIN PRIVATE KEY-----",
        "key-",
        "xai-a",
        "A",
        "eyJaaaaaaa.",
        "basic ",
        "SG.aaaaaaaa.",
        "password=",
        "passwor",
        "api key:",
        "\\\\",
        '"secret',
        "x_token",
    ],
)
def test_no_text_takes_long(piece: str) -> None:
    """Whoever sends texts made for it does not hold up the writer: time grows in proportion."""
    text = "token:bearer private key:// @=" + piece * (8192 // len(piece))
    begun = time.thread_time()
    clean(text)
    assert time.thread_time() - begun < 0.25


@pytest.mark.parametrize(
    ("id", "shown"),
    [
        ("0f64a3c97a8b12de-17", "0f64a3c97a8b12de-17"),
        ("4111111111111111", "4111111111111111"),  # a number may have a card's check digit by chance
        ("trace.1790000000000000005", "trace.1790000000000000005"),
        (f"sk-{BODY}", REDACTED),
        (f"id.sk-{BODY}", f"id.{REDACTED}"),
        ("a\u2028b\x1b", "a\\u2028b\\x1b"),
        ("x" * 300, f"{'x' * 256}... (44 more characters)"),
    ],
)
def test_ids_of_requests_lose_keys_and_nothing_else(id: str, shown: str) -> None:
    assert clean_id(id) == shown
