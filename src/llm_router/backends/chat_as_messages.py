"""A chat of OpenAI's form served by a backend of Anthropic's protocol: the request as messages, its reply as a chat.

What would give another kind of answer and has no counterpart is refused; what only tunes (seed, penalties, service
tiers, metadata) is left out. Not for: the other direction (messages_as_chat.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final, Literal

import msgspec

from llm_router.backends.events import StreamTranslator, chat_event
from llm_router.backends.messages_as_chat import NULL, malformed, unsupported
from llm_router.backends.usage import MessagesUsage, as_chat
from llm_router.chat import NOT_JSON, InferenceRequest, Usage
from llm_router.errors import BackendRejected, BadReply, InvalidRequest

_encode = msgspec.json.Encoder().encode

# -- the request ------------------------------------------------------------------------------------


class _ImageUrl(msgspec.Struct):
    url: str


class _File(msgspec.Struct):
    filename: str | None = None
    file_data: str | None = None


class _Part(msgspec.Struct):
    """A part of a content; which fields count depends on its type."""

    type: str
    text: str = ""
    refusal: str = ""
    image_url: _ImageUrl | str | None = None
    file: _File | None = None
    cache_control: msgspec.Raw = NULL


class _FunctionCall(msgspec.Struct):
    name: str
    arguments: str = ""


class _ToolCall(msgspec.Struct):
    id: str
    function: _FunctionCall


class _Message(msgspec.Struct):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_Part] | None = None
    refusal: str | None = None
    tool_calls: list[_ToolCall] | None = None
    tool_call_id: str = ""


class _Function(msgspec.Struct):
    name: str
    description: str | None = None
    parameters: msgspec.Raw = msgspec.Raw(b'{"type":"object","properties":{}}')
    strict: bool | None = None


class _Tool(msgspec.Struct):
    type: str = "function"
    function: _Function | None = None
    cache_control: msgspec.Raw = NULL


class _NamedFunction(msgspec.Struct):
    name: str


class _NamedTool(msgspec.Struct):
    type: str
    function: _NamedFunction | None = None


class _Schema(msgspec.Struct):
    schema: msgspec.Raw = NULL


class _Format(msgspec.Struct):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _Schema | None = None


class _Request(msgspec.Struct):
    messages: list[_Message]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stop: str | list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    n: int | None = None
    logprobs: bool | None = None
    modalities: list[str] | None = None
    tools: list[_Tool] | None = None
    tool_choice: Literal["auto", "none", "required"] | _NamedTool | None = None
    parallel_tool_calls: bool | None = None
    functions: list[msgspec.Raw] | None = None
    response_format: _Format | None = None
    reasoning_effort: str | None = None
    thinking: msgspec.Raw = NULL  # Anthropic's own word, for clients that know what is behind the model
    user: str | None = None
    safety_identifier: str | None = None


_decode_request = msgspec.json.Decoder(_Request).decode
_MAX_TOKENS: Final = 4096
"""The limit of an answer must be given and OpenAI's callers need not: the most that every Claude model can write."""
_MAX_TEMPERATURE: Final = 1.0  # OpenAI's goes up to 2
_CHOICES: Final = {"auto": "auto", "required": "any", "none": "none"}
_ONLY_JSON: Final = "Answer with one valid JSON object and nothing else: no text around it, no code fence."
"""There is no JSON mode without a schema; OpenAI's wants the prompt to ask for JSON, too."""
_NOT_IN_AN_ID: Final = re.compile(r"[^a-zA-Z0-9_-]")
_DATA_URL: Final = re.compile(r"data:([\w.+-]+/[\w.+-]+);base64,", re.ASCII).match


def messages_body(request: InferenceRequest, upstream_model: str, *, has_sampling: bool = True) -> bytes:
    """The request of Anthropic's form for a chat request.

    Args:
        has_sampling: whether the version of the API knows `temperature`, `top_p` and `top_k`; else they are left out.

    Raises: InvalidRequest that names the field, for what is malformed or has no counterpart.
    """
    try:
        asked = _decode_request(request.body)
    except NOT_JSON as error:
        raise malformed(error) from None
    _refuse(asked)
    system, messages = _conversation(asked)
    if asked.response_format is not None and asked.response_format.type == "json_object":
        system.append({"type": "text", "text": _ONLY_JSON})
    body: dict[str, Any] = {
        "model": upstream_model,
        "max_tokens": asked.max_completion_tokens or asked.max_tokens or _MAX_TOKENS,
        "messages": messages,
    }
    if system:
        body["system"] = system
    if asked.stop:
        body["stop_sequences"] = [asked.stop] if isinstance(asked.stop, str) else asked.stop
    if has_sampling:
        body.update(_sampling(asked))
    if asked.tools:
        body["tools"] = [_tool(tool, index) for index, tool in enumerate(asked.tools)]
        choice = _tool_choice(asked)
        if choice is not None:
            body["tool_choice"] = choice
    config = _output_config(asked)
    if config:
        body["output_config"] = config
    if asked.thinking != NULL:
        body["thinking"] = asked.thinking
    user = asked.safety_identifier or asked.user
    if user:
        body["metadata"] = {"user_id": user}
    if request.stream:
        body["stream"] = True
    return _encode(body)


def _sampling(asked: _Request) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if asked.temperature is not None:
        fields["temperature"] = min(asked.temperature, _MAX_TEMPERATURE)
    if asked.top_p is not None:
        fields["top_p"] = asked.top_p
    if asked.top_k is not None:
        fields["top_k"] = asked.top_k
    return fields


def _refuse(asked: _Request) -> None:
    if asked.n is not None and asked.n > 1:
        raise unsupported("more than one choice", "n")
    if asked.logprobs:
        raise unsupported("the probabilities of tokens", "logprobs")
    if asked.modalities and asked.modalities != ["text"]:
        raise unsupported("an answer other than text", "modalities")
    if asked.functions:
        raise unsupported("`functions`, which `tools` have replaced,", "functions")


def _conversation(asked: _Request) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The system prompt, wherever it stood, and the turns. Neighbours of the same role become one turn."""
    system: list[dict[str, Any]] = []
    turns: list[dict[str, Any]] = []
    for index, message in enumerate(asked.messages):
        at = f"messages[{index}]"
        if message.role in ("system", "developer"):
            system += _blocks(message.content, f"{at}.content")
            continue
        role = "user"
        if message.role == "assistant":
            role, blocks = "assistant", _said(message, at)
        elif message.role == "tool":
            blocks = [_result(message, f"{at}.content")]
        else:
            blocks = _blocks(message.content, f"{at}.content")
        if not blocks:
            continue  # an empty text is refused there
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += blocks
        else:
            turns.append({"role": role, "content": blocks})
    return system, turns


def _blocks(content: str | list[_Part] | None, at: str) -> list[dict[str, Any]]:
    if not content:
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    blocks = []
    for index, part in enumerate(content):
        block = _block(part, f"{at}[{index}]")
        if block is not None:
            if part.cache_control != NULL:
                block["cache_control"] = part.cache_control
            blocks.append(block)
    return blocks


def _block(part: _Part, at: str) -> dict[str, Any] | None:
    """A content block; None for an empty text, which would be refused."""
    match part.type:
        case "text" | "refusal":
            text = part.text or part.refusal
            return {"type": "text", "text": text} if text else None
        case "image_url" if part.image_url is not None:
            url = part.image_url.url if isinstance(part.image_url, _ImageUrl) else part.image_url
            return {"type": "image", "source": _source(url, f"{at}.image_url.url")}
        case "file" if part.file is not None and part.file.file_data:
            block = {"type": "document", "source": _source(part.file.file_data, f"{at}.file.file_data")}
            if part.file.filename:
                block["title"] = part.file.filename
            return block
    raise unsupported(f"a part of type {part.type!r}", f"{at}.type")


def _source(url: str, at: str) -> dict[str, str]:
    data = _DATA_URL(url)
    if data is not None:
        return {"type": "base64", "media_type": data[1], "data": url[data.end() :]}
    if url.startswith(("https://", "http://")):
        return {"type": "url", "url": url}
    raise InvalidRequest("it takes an http(s) URL or a base64 data URL", code="invalid_type", param=at)


def _said(message: _Message, at: str) -> list[dict[str, Any]]:
    blocks = _blocks(message.content, f"{at}.content")
    if not blocks and message.refusal:
        blocks.append({"type": "text", "text": message.refusal})
    for index, call in enumerate(message.tool_calls or ()):
        arguments = call.function.arguments.strip() or "{}"
        try:
            _decode_object(arguments)
        except NOT_JSON:
            raise InvalidRequest(
                "the arguments of a tool call are a JSON object, as a string",
                code="invalid_type",
                param=f"{at}.tool_calls[{index}].function.arguments",
            ) from None
        tool_input = msgspec.Raw(arguments.encode())
        blocks.append({"type": "tool_use", "id": _tool_id(call.id), "name": call.function.name, "input": tool_input})
    return blocks


def _result(message: _Message, at: str) -> dict[str, Any]:
    block: dict[str, Any] = {"type": "tool_result", "tool_use_id": _tool_id(message.tool_call_id)}
    content = message.content if isinstance(message.content, str) else _blocks(message.content, at)
    if content:
        block["content"] = content
    return block


def _tool_id(call_id: str) -> str:
    """The id of a tool call in the letters that are allowed there; calls and results get the same."""
    return _NOT_IN_AN_ID.sub("_", call_id) or "_"


def _tool(tool: _Tool, index: int) -> dict[str, Any]:
    function = tool.function
    if tool.type != "function" or function is None:
        raise unsupported(f"a tool of type {tool.type!r}", f"tools[{index}].type")
    written: dict[str, Any] = {"name": function.name, "input_schema": function.parameters}
    if function.description is not None:
        written["description"] = function.description
    if function.strict is not None:
        written["strict"] = function.strict
    if tool.cache_control != NULL:
        written["cache_control"] = tool.cache_control
    return written


def _tool_choice(asked: _Request) -> dict[str, Any] | None:
    choice = asked.tool_choice
    if isinstance(choice, _NamedTool):
        if choice.function is None:
            raise unsupported(f"a choice of type {choice.type!r}", "tool_choice.type")
        wanted: dict[str, Any] = {"type": "tool", "name": choice.function.name}
    elif choice is None and asked.parallel_tool_calls is not False:
        return None
    else:
        wanted = {"type": _CHOICES[choice or "auto"]}
    if asked.parallel_tool_calls is False and wanted["type"] != "none":
        wanted["disable_parallel_tool_use"] = True
    return wanted


def _output_config(asked: _Request) -> dict[str, Any]:
    config: dict[str, Any] = {}
    if asked.reasoning_effort not in (None, "none"):
        config["effort"] = "low" if asked.reasoning_effort == "minimal" else asked.reasoning_effort
    wanted = asked.response_format
    if wanted is not None and wanted.type == "json_schema":
        if wanted.json_schema is None or wanted.json_schema.schema == NULL:
            raise InvalidRequest(
                "a `json_schema` format needs a schema", code="invalid_type", param="response_format.json_schema.schema"
            )
        config["format"] = {"type": "json_schema", "schema": wanted.json_schema.schema}
    return config


# -- the reply --------------------------------------------------------------------------------------


class _Content(msgspec.Struct):
    """A content block of the answer; which fields count depends on its type."""

    type: str
    text: str = ""
    thinking: str = ""
    id: str = ""
    name: str = ""
    input: msgspec.Raw = msgspec.Raw(b"{}")


class _Answer(msgspec.Struct):
    """A whole reply, or what the first event of a stream says of it."""

    id: str
    content: list[_Content]
    model: str = ""
    stop_reason: str | None = None
    usage: msgspec.Raw = NULL


class _Delta(msgspec.Struct):
    type: str = ""
    text: str = ""
    thinking: str = ""
    partial_json: str = ""
    stop_reason: str | None = None


class _Problem(msgspec.Struct):
    type: str = "api_error"
    message: str = ""


class _Event(msgspec.Struct):
    type: str
    message: _Answer | None = None
    index: int = 0
    content_block: _Content | None = None
    delta: _Delta | None = None
    usage: msgspec.Raw = NULL
    error: _Problem | None = None


class _ErrorReply(msgspec.Struct):
    error: _Problem


_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_answer = msgspec.json.Decoder(_Answer).decode
_decode_event = msgspec.json.Decoder(_Event).decode
_decode_error = msgspec.json.Decoder(_ErrorReply).decode
_decode_usage = msgspec.json.Decoder(MessagesUsage).decode

_FINISH_REASONS: Final = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}
_STATUSES: Final = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "timeout_error": 504,
    "overloaded_error": 529,
}


def _usage(raw: msgspec.Raw, earlier: MessagesUsage | None = None) -> MessagesUsage | None:
    if raw == NULL:
        return earlier
    try:
        usage = _decode_usage(raw)
    except NOT_JSON:
        return earlier  # an answer whose usage is no usage: worth more than none
    return usage if earlier is None else earlier.updated(usage)


class Reader(StreamTranslator):
    """Turns the reply of a backend of Anthropic's protocol into OpenAI's form. See `base.ReplyReader`.

    Thoughts become `reasoning_content`, as other servers of reasoning models call them.

    Args:
        wall: seconds since the epoch, for `created`.
    """

    def __init__(self, backend: str, wall: Callable[[], float]) -> None:
        super().__init__(backend)
        self._created = int(wall())
        self._common: dict[str, Any] = {}
        self._usage: MessagesUsage | None = None
        self._stop_reason: str | None = None
        self._calls = 0
        self._open: dict[int, _Call] = {}

    # -- whole -----------------------------------------------------------------------------------------

    def plain(self, status: int, body: bytes) -> bytes:
        if status != 200:
            return self._error(status, body)
        try:
            answer = _decode_answer(body)
        except NOT_JSON as error:
            raise BadReply(self._backend, f"its reply is no message: {error}") from None
        text = "".join(block.text for block in answer.content if block.type == "text")
        thoughts = "".join(block.thinking for block in answer.content if block.type == "thinking")
        calls = [
            {
                "id": block.id,
                "type": "function",
                "function": {"name": block.name, "arguments": bytes(block.input).decode()},
            }
            for block in answer.content
            if block.type == "tool_use"
        ]
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
        if thoughts:
            message["reasoning_content"] = thoughts
        if calls:
            message["tool_calls"] = calls
        finish_reason = _FINISH_REASONS.get(answer.stop_reason or "end_turn", "stop")
        reply: dict[str, Any] = {
            "id": answer.id,
            "object": "chat.completion",
            "created": self._created,
            "model": answer.model,
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}],
        }
        usage = _usage(answer.usage)
        said = None if usage is None else usage.usage()
        if said is not None:
            reply["usage"] = as_chat(said)
        return _encode(reply)

    def _error(self, status: int, body: bytes) -> bytes:
        try:
            error = _decode_error(body).error
        except NOT_JSON:
            if not body.lstrip().startswith(b"{"):
                return body
            error = _Problem()
        message = error.message or f"the backend answered {status}"
        return _encode({"error": {"message": message, "type": error.type, "param": None, "code": None}})

    # -- streams ---------------------------------------------------------------------------------------

    def _take(self, said: bytes, out: list[bytes]) -> None:
        try:
            event = _decode_event(said)
        except NOT_JSON as error:
            raise BadReply(self._backend, f"an event of its stream is none of a message: {error}") from None
        if event.type == "error":
            problem = event.error or _Problem()
            status = _STATUSES.get(problem.type, 500)
            raise BackendRejected(self._backend, status, problem.message or "failed in the middle of an answer")
        if event.type == "message_start" and event.message is not None:
            self._begin(event.message, out)
            return
        if not self._common and event.type != "ping":
            raise BadReply(self._backend, f"its stream began with {event.type[:40]!r}")
        match event.type:
            case "content_block_start" if event.content_block is not None:
                self._open_block(event.index, event.content_block, out)
            case "content_block_delta" if event.delta is not None:
                self._add(event.index, event.delta, out)
            case "content_block_stop":
                self._close_block(event.index, out)
            case "message_delta":
                if event.delta is not None and event.delta.stop_reason is not None:
                    self._stop_reason = event.delta.stop_reason
                    self._is_finished = True
                self._usage = _usage(event.usage, self._usage)
            case "message_stop":
                out.append(self._end())
            # pings, and kinds of events to come, mean nothing to the caller

    def _begin(self, answer: _Answer, out: list[bytes]) -> None:
        self._common = {
            "id": answer.id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": answer.model,
        }
        self._usage = _usage(answer.usage)
        out.append(self._chunk({"role": "assistant", "content": ""}))

    def _open_block(self, index: int, block: _Content, out: list[bytes]) -> None:
        if block.type == "tool_use":
            self._open[index] = _Call(self._calls, bytes(block.input).decode())
            function = {"name": block.name, "arguments": ""}
            call = {"index": self._calls, "id": block.id, "type": "function", "function": function}
            self._calls += 1
            out.append(self._chunk({"tool_calls": [call]}))
        elif block.type == "text" and block.text:
            out.append(self._chunk({"content": block.text}))
        elif block.type == "thinking" and block.thinking:
            out.append(self._chunk({"reasoning_content": block.thinking}))

    def _add(self, index: int, delta: _Delta, out: list[bytes]) -> None:
        if delta.type == "text_delta":
            out.append(self._chunk({"content": delta.text}))
        elif delta.type == "thinking_delta":
            out.append(self._chunk({"reasoning_content": delta.thinking}))
        elif delta.type == "input_json_delta" and delta.partial_json and index in self._open:
            call = self._open[index]
            call.given = ""
            out.append(self._arguments(call, delta.partial_json))

    def _close_block(self, index: int, out: list[bytes]) -> None:
        """A call whose input did not come in pieces has it from its start: empty for a tool without parameters."""
        call = self._open.pop(index, None)
        if call is not None and call.given:
            out.append(self._arguments(call, call.given))

    def _arguments(self, call: _Call, piece: str) -> bytes:
        return self._chunk({"tool_calls": [{"index": call.index, "function": {"arguments": piece}}]})

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return chat_event({**self._common, "choices": [choice]})

    def _end(self) -> bytes:
        self._has_ended = True
        out = [self._chunk({}, _FINISH_REASONS.get(self._stop_reason or "end_turn", "stop"))]
        usage: Usage | None = None if self._usage is None else self._usage.usage()
        if usage is not None:
            out.append(chat_event({**self._common, "choices": [], "usage": as_chat(usage)}))
        out.append(b"data: [DONE]\n\n")
        return b"".join(out)


class _Call(msgspec.Struct):
    """A tool call of a stream that is being written. `given` is its input as its start told it, until a piece comes."""

    index: int
    given: str
