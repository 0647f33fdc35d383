"""What a backend says is kept as far as it repeats nothing of the request."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_router.gateway.quotes import LEAST, MAX_TEXT, without_quotes

PROMPT = "My neighbour's parrot is called Ottokar, and he's 7 years old.\nWhat does he eat?"
NOTE = "... (it quotes the request)"


def body(text: str = PROMPT, **more: object) -> bytes:
    return json.dumps(
        {"model": "some/long-model-name", "messages": [{"role": "user", "content": text}], **more}
    ).encode()


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        (f"invalid content: {PROMPT}", "invalid content: "),
        (f"1 validation error [input_value={PROMPT[:20]}...{PROMPT[-20:]}]", "1 validation error [input_value="),
        (f"input {{'content': {PROMPT!r}}}", "input {'content': \""),
        (f"input {json.dumps(PROMPT)}, see https://example.org", 'input "'),
    ],
)
def test_quotes_end_what_is_kept(said: str, kept: str) -> None:
    """However the backend writes them: whole, cut in the middle, as Python or JSON would."""
    assert without_quotes(said, body()) == kept + NOTE


@pytest.mark.parametrize(
    "said",
    [
        "",
        "no",
        "Incorrect API key provided",
        "the model `some/long-model-name` does not exist",
        "Unsupported parameter: 'max_completion_tokens' is not supported with 'response_format'",
        "This model's maximum context length is 8192 tokens; your parrot took 9000",
    ],
)
def test_what_quotes_nothing_is_kept(said: str) -> None:
    """Names of models and of fields are none of the caller's texts."""
    asked = body(max_completion_tokens=5, response_format={"type": "json_object"}, tool_choice="none")
    assert without_quotes(said, asked) == said


def test_short_texts_count_as_a_whole() -> None:
    """A prompt of a few words is one all the same."""
    assert without_quotes("bad content 'PIN 4711!'", body("PIN 4711!")) == f"bad content '{NOTE}"
    assert without_quotes("bad role 'assistant'", json.dumps({"messages": [{"role": "assistant"}]}).encode()) == (
        "bad role 'assistant'"
    )


def test_all_texts_of_a_request_count() -> None:
    """Of tools, of their calls, of parts and prompts."""
    for asked in (
        {"prompt": [PROMPT]},
        {"input": PROMPT},
        {"tools": [{"function": {"description": PROMPT}}]},
        {"messages": [{"tool_calls": [{"function": {"arguments": PROMPT}}]}]},
        {"metadata": {"x": {"y": [[PROMPT]]}}},
    ):
        assert without_quotes(f"no: {PROMPT}", json.dumps(asked).encode()) == f"no: {NOTE}"


def test_other_encodings_of_the_body_do_not_hide_a_quote() -> None:
    """The texts are compared, not their bytes."""
    text = "Wie heißt der Papagei über dem Café?"
    assert without_quotes(f"no: {text}", body(text)) == f"no: {NOTE}"
    assert without_quotes(f"no: {text}", json.dumps({"prompt": text}, ensure_ascii=False).encode()) == f"no: {NOTE}"


def test_of_large_requests_nothing_is_kept() -> None:
    """And what takes long is not done."""
    assert PROMPT not in without_quotes(PROMPT, body(PROMPT + "x" * MAX_TEXT))
    begin = time.perf_counter()
    without_quotes("ab " * 600, body("ab " * (MAX_TEXT // 3 - 1)))
    without_quotes("ab " * 600, body("ab d " * (MAX_TEXT // 5 - 1)))
    assert time.perf_counter() - begin < 1.0


def test_images_are_no_texts() -> None:
    """However large: what is said of them is kept."""
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "QUJD" * MAX_TEXT}}
    asked = json.dumps({"messages": [{"role": "user", "content": [image]}]}).encode()
    assert without_quotes("this model takes no images", asked) == "this model takes no images"


@given(st.text(min_size=LEAST, max_size=60), st.text(max_size=40), st.text(max_size=40))
def test_no_quote_is_kept(text: str, before: str, after: str) -> None:
    """Of a text that is long enough, wherever it stands."""
    assert text not in without_quotes(before + text + after, json.dumps({"prompt": text}).encode())


def test_what_is_no_json_quotes_nothing() -> None:
    """Such a request reaches no backend; and what a backend says is bounded."""
    assert without_quotes("hello there", b"{") == "hello there"
    assert len(without_quotes("x" * 10_000, b"{}")) == 2000
