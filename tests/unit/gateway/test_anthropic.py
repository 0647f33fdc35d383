"""Reading the bodies of Anthropic's callers, and what they get when it fails."""

from __future__ import annotations

import json

import pytest
from anthropic.types.shared import ErrorResponse
from pydantic import TypeAdapter

from llm_router.chat import Endpoint
from llm_router.errors import InvalidRequest, LimitExceeded, ModelNotFound, Overloaded, RouterError, Unauthorized
from llm_router.gateway.anthropic import error_event, error_object, read_messages, take_headers, token_count

BODY = b'{"model":"m","max_tokens":9,"messages":[{"role":"user","content":"hi"}],"stream":true}'


def test_a_body_is_forwarded_byte_for_byte() -> None:
    request = read_messages(BODY)
    assert (request.endpoint, request.model, request.stream) == (Endpoint.MESSAGES, "m", True)
    assert request.body is BODY
    start, end = request.model_span
    assert BODY[start:end] == b'"m"'


def test_the_headers_that_choose_the_protocol_stay_with_the_request() -> None:
    headers = {b"anthropic-version": b"2023-06-01", b"anthropic-beta": b"a-1,b-2", b"x-api-key": b"secret"}
    request = read_messages(BODY)
    take_headers(headers, request)
    assert request.headers == ((b"anthropic-version", b"2023-06-01"), (b"anthropic-beta", b"a-1,b-2"))


@pytest.mark.parametrize("value", [b"a\r\nx: y", b"", b"\xe4", b"x" * 2001])
def test_such_a_header_is_plain_text(value: bytes) -> None:
    with pytest.raises(InvalidRequest, match="anthropic-beta"):
        take_headers({b"anthropic-beta": value}, read_messages(BODY))


@pytest.mark.parametrize("body", [b"{}", b"[]", b'{"model":"m"}', b'{"model":"m","messages":"hi"}', b'{"messages":[]}'])
def test_bad_bodies_are_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        read_messages(body)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InvalidRequest("no"), "invalid_request_error"),
        (Unauthorized("no"), "authentication_error"),
        (ModelNotFound("no"), "not_found_error"),
        (LimitExceeded("no", scope="key", limit="requests_per_minute", retry_after_s=1), "rate_limit_error"),
        (Overloaded("no"), "overloaded_error"),
        (RouterError("no"), "api_error"),
    ],
)
def test_errors_are_those_that_clients_know(error: RouterError, kind: str) -> None:
    body = error_object(error, "req-1")
    TypeAdapter(ErrorResponse).validate_json(body)
    expected = {"type": "error", "error": {"type": kind, "message": "no", "code": error.code}, "request_id": "req-1"}
    assert json.loads(body) == expected
    assert error_event(error, "req-1") == b"event: error\ndata: %b\n\n" % body


def test_a_count_of_tokens() -> None:
    assert token_count(12) == b'{"input_tokens":12}'
