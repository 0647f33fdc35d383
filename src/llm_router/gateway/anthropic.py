"""The caller's side of Anthropic's protocol: reading request bodies, error objects, the count of tokens.

Not for: translating (backends do, where a backend speaks the other protocol) or serving (inference.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

import msgspec

from llm_router.backends.events import messages_event
from llm_router.backends.messages_as_chat import messages_error
from llm_router.chat import Endpoint, InferenceRequest
from llm_router.errors import InvalidRequest, RouterError
from llm_router.gateway.openai import read_request

_OF_THE_REQUEST: Final = (b"anthropic-version", b"anthropic-beta")
_FIELD_VALUE: Final = re.compile(rb"[\x20-\x7e]{1,2000}").fullmatch
_encode = msgspec.json.Encoder().encode


def read_messages(body: bytes) -> InferenceRequest:
    """What routing needs of the body of `POST /v1/messages`, or of `/v1/messages/count_tokens`.

    Raises: InvalidRequest that names the field, as `openai.read_request`.
    """
    return read_request(Endpoint.MESSAGES, body)


def take_headers(headers: Mapping[bytes, bytes], request: InferenceRequest) -> None:
    """Keep with the request what its headers (lower-case names) say of the version and the parts of the protocol.

    Raises: InvalidRequest, naming the header.
    """
    for name in _OF_THE_REQUEST:
        value = headers.get(name)
        if value is not None:
            if _FIELD_VALUE(value) is None:
                shown = name.decode()
                raise InvalidRequest(f"{shown} takes printable ASCII, 2000 characters at most", param=shown)
            request.headers += ((name, value),)


def error_object(error: RouterError, request_id: str) -> bytes:
    """The error as Anthropic's clients expect it, with our code and the request's id. UTF-8 JSON."""
    return _encode(_error(error, request_id))


def error_event(error: RouterError, request_id: str) -> bytes:
    """The same as the event that ends a stream."""
    return messages_event(_error(error, request_id))


def _error(error: RouterError, request_id: str) -> dict[str, object]:
    return messages_error(error.status, error.message, code=error.code, request_id=request_id)


def token_count(input_tokens: int) -> bytes:
    """The body of the answer to `POST /v1/messages/count_tokens`."""
    return _encode({"input_tokens": input_tokens})
