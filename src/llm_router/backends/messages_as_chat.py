"""Anthropic's messages served by a backend of OpenAI's protocol: the request as a chat, its reply as a message.

What would give another kind of answer and has no counterpart is refused; what only tunes (service tiers, caching
hints, metadata) is left out. Not for: the other direction (chat_as_messages.py).
"""

from __future__ import annotations

import uuid
from typing import Any, Final, Literal

import msgspec

from llm_router.backends.events import StreamTranslator, messages_event
from llm_router.backends.usage import ChatUsage, as_messages
from llm_router.chat import NOT_JSON, InferenceRequest, Usage
from llm_router.errors import BackendRejected, BadReply, InvalidRequest

NULL: Final = msgspec.Raw(b"null")
"""What a field that is not looked into holds when it is null or absent."""
_encode = msgspec.json.Encoder().encode

# -- the request ------------------------------------------------------------------------------------


class _Source(msgspec.Struct):
    type: str
    media_type: str = ""
    data: str = ""
    url: str = ""


class _Block(msgspec.Struct):
    """A content block; which fields count depends on its type."""

    type: str
    text: str = ""
    source: _Source | None = None
    title: str | None = None
    id: str = ""
    name: str = ""
    input: msgspec.Raw = msgspec.Raw(b"{}")
    tool_use_id: str = ""
    content: str | list[_Block] = ""
    is_error: bool = False


class _Message(msgspec.Struct):
    role: Literal["user", "assistant", "system"]
    content: str | list[_Block]


class _Tool(msgspec.Struct):
    name: str
    type: str | None = None
    description: str | None = None
    input_schema: msgspec.Raw = msgspec.Raw(b'{"type":"object"}')
    strict: bool | None = None


class _ToolChoice(msgspec.Struct):
    type: Literal["auto", "any", "tool", "none"]
    name: str = ""
    disable_parallel_tool_use: bool = False


class _Format(msgspec.Struct):
    type: Literal["json_schema"]
    schema: msgspec.Raw


class _OutputConfig(msgspec.Struct):
    effort: str | None = None
    format: _Format | None = None


class _Request(msgspec.Struct):
    messages: list[_Message]
    max_tokens: int | None = None
    system: str | list[_Block] = ""
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    tools: list[_Tool] | None = None
    tool_choice: _ToolChoice | None = None
    output_config: _OutputConfig | None = None
    container: msgspec.Raw = NULL
    mcp_servers: list[msgspec.Raw] | None = None


_decode_request = msgspec.json.Decoder(_Request).decode
_CHOICES: Final = {"auto": "auto", "any": "required", "none": "none"}
_NOT_FOR_OTHERS: Final = frozenset({"thinking", "redacted_thinking"})
_OPENAI_HOSTS: Final = ("api.openai.com", ".openai.azure.com", ".services.ai.azure.com")


def is_openai(host: str) -> bool:
    """Whether OpenAI's own models answer there: they know the limit of an answer by another name, and no `top_k`."""
    return host == _OPENAI_HOSTS[0] or host.endswith(_OPENAI_HOSTS[1:])


def chat_body(request: InferenceRequest, upstream_model: str, *, ask_usage: bool, is_openai: bool) -> bytes:
    """The chat request for a request of Anthropic's form.

    Args:
        ask_usage: ask for the token usage of a stream.
        is_openai: see `is_openai`.

    Raises: InvalidRequest that names the field, for what is malformed or has no counterpart.
    """
    try:
        asked = _decode_request(request.body)
    except NOT_JSON as error:
        raise malformed(error) from None
    if asked.container != NULL:
        raise unsupported("a container", "container")
    if asked.mcp_servers:
        raise unsupported("MCP servers", "mcp_servers")
    body: dict[str, Any] = {"model": upstream_model, "messages": _messages(asked)}
    if asked.max_tokens is not None:
        body["max_completion_tokens" if is_openai else "max_tokens"] = asked.max_tokens
    if asked.stop_sequences:
        body["stop"] = asked.stop_sequences
    if asked.temperature is not None:
        body["temperature"] = asked.temperature
    if asked.top_p is not None:
        body["top_p"] = asked.top_p
    if asked.top_k is not None and not is_openai:
        body["top_k"] = asked.top_k
    if asked.tools:
        body["tools"] = [_tool(tool, index) for index, tool in enumerate(asked.tools)]
        if asked.tool_choice is not None:
            body.update(_tool_choice(asked.tool_choice))
    config = asked.output_config
    if config is not None and config.effort is not None:
        body["reasoning_effort"] = config.effort
    if config is not None and config.format is not None:
        schema = {"name": "answer", "schema": config.format.schema}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    if request.stream:
        body["stream"] = True
        if ask_usage:
            body["stream_options"] = {"include_usage": True}
    return _encode(body)


def malformed(error: Exception) -> InvalidRequest:
    """The caller's view of a body that reads well as far as routing needs it, but cannot be translated."""
    message, _, path = str(error).partition(" - at `$")
    path = path.rstrip("`").lstrip(".")
    at = f" - at `{path}`" if path else ""
    return InvalidRequest(f"{message}{at}", code="invalid_type", param=path or None)


def unsupported(what: str, param: str) -> InvalidRequest:
    """The error for what the backend's protocol has no words for."""
    return InvalidRequest(
        f"{what} cannot be had from this model: its backend speaks another protocol", code="unsupported", param=param
    )


def _messages(asked: _Request) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    system = _text(asked.system, "system")
    if system:
        messages.append({"role": "system", "content": system})
    for index, message in enumerate(asked.messages):
        at = f"messages[{index}].content"
        if message.role == "system":
            messages.append({"role": "system", "content": _text(message.content, at)})
        elif isinstance(message.content, str):
            messages.append({"role": message.role, "content": message.content})
        elif message.role == "user":
            messages += _user(message.content, at)
        else:
            messages.append(_assistant(message.content, at))
    return messages


def _text(content: str | list[_Block], at: str) -> str:
    if isinstance(content, str):
        return content
    for index, block in enumerate(content):
        if block.type != "text":
            raise unsupported(f"a block of type {block.type!r} here", f"{at}[{index}].type")
    return "\n\n".join(block.text for block in content)


def _user(blocks: list[_Block], at: str) -> list[dict[str, Any]]:
    """The results of tools as messages of their own, in front as OpenAI wants them, and then what the user says."""
    messages: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    for index, block in enumerate(blocks):
        if block.type == "tool_result":
            text, more = _result(block, f"{at}[{index}].content")
            messages.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": text})
            parts += more
        else:
            parts.append(_part(block, f"{at}[{index}]"))
    if parts:
        only_text = len(parts) == 1 and parts[0]["type"] == "text"
        # A plain string where it can be: not every chat template takes a list of parts.
        messages.append({"role": "user", "content": parts[0]["text"] if only_text else parts})
    return messages


def _result(block: _Block, at: str) -> tuple[str, list[dict[str, Any]]]:
    """Text of a tool's result, and parts that a tool message cannot hold: they follow in the user's."""
    if isinstance(block.content, str):
        text, more = block.content, []
    else:
        parts = [_part(inner, f"{at}[{index}]") for index, inner in enumerate(block.content)]
        text = "\n\n".join(part["text"] for part in parts if part["type"] == "text")
        more = [part for part in parts if part["type"] != "text"]
    return text or ("error" if block.is_error else ""), more


def _part(block: _Block, at: str) -> dict[str, Any]:
    source = block.source
    match block.type, source:
        case "text", _:
            return {"type": "text", "text": block.text}
        case "image", _Source(type="base64"):
            return {"type": "image_url", "image_url": {"url": f"data:{source.media_type};base64,{source.data}"}}
        case "image", _Source(type="url"):
            return {"type": "image_url", "image_url": {"url": source.url}}
        case "document", _Source(type="text"):
            return {"type": "text", "text": source.data}
        case "document", _Source(type="base64"):
            data = f"data:{source.media_type};base64,{source.data}"
            return {"type": "file", "file": {"filename": block.title or "document.pdf", "file_data": data}}
    kind = f"{block.type!r}" if source is None else f"{block.type!r} with a source of type {source.type!r}"
    raise unsupported(f"a block of type {kind}", f"{at}.type")


def _assistant(blocks: list[_Block], at: str) -> dict[str, Any]:
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    for index, block in enumerate(blocks):
        if block.type == "text":
            texts.append(block.text)
        elif block.type == "tool_use":
            function = {"name": block.name, "arguments": bytes(block.input).decode()}
            calls.append({"id": block.id, "type": "function", "function": function})
        elif block.type not in _NOT_FOR_OTHERS:  # thoughts are signed for the model that had them
            raise unsupported(f"a block of type {block.type!r}", f"{at}[{index}].type")
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts) or None}
    if calls:
        message["tool_calls"] = calls
    elif message["content"] is None:
        message["content"] = ""
    return message


def _tool(tool: _Tool, index: int) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        raise unsupported(f"the tool {tool.type!r}", f"tools[{index}].type")
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _tool_choice(choice: _ToolChoice) -> dict[str, Any]:
    wanted: Any = _CHOICES.get(choice.type) or {"type": "function", "function": {"name": choice.name}}
    fields = {"tool_choice": wanted}
    if choice.disable_parallel_tool_use:
        fields["parallel_tool_calls"] = False
    return fields


# -- the reply --------------------------------------------------------------------------------------


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _Call(msgspec.Struct):
    index: int = 0
    id: str | None = None
    function: _Function = msgspec.field(default_factory=_Function)


class _Said(msgspec.Struct):
    """The message of a whole reply, or what an event of a stream adds to it."""

    content: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[_Call] | None = None

    @property
    def thought(self) -> str:
        """What a reasoning model thought, by either of the two names that servers give it."""
        return self.reasoning_content or self.reasoning or ""


class _Choice(msgspec.Struct):
    index: int = 0
    message: _Said | None = None
    delta: _Said | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None  # of vLLM: the stop sequence that was met


class _Reply(msgspec.Struct):
    """A whole reply, or an event of a stream."""

    id: str = ""
    model: str = ""
    choices: list[_Choice] | None = None
    usage: msgspec.Raw = NULL
    error: msgspec.Raw = NULL


class _Thinking(msgspec.Struct):
    type: str = ""


class _Wishes(msgspec.Struct):
    thinking: _Thinking | None = None


class _Problem(msgspec.Struct):
    message: str = ""
    type: str | None = None


class _ErrorReply(msgspec.Struct):
    error: _Problem | str | None = None


_decode_reply = msgspec.json.Decoder(_Reply).decode
_decode_usage = msgspec.json.Decoder(ChatUsage).decode
_decode_wishes = msgspec.json.Decoder(_Wishes).decode
_decode_problem = msgspec.json.Decoder(_Problem | str).decode
_decode_error = msgspec.json.Decoder(_ErrorReply).decode
_decode_input = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode

_STOP_REASONS: Final = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
    "content_filter": "refusal",
}
_ERROR_TYPES: Final = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def messages_error(status: int, message: str, **more: str) -> dict[str, Any]:
    """Anthropic's error object. `more` may be `code`, our own, and `request_id`."""
    kind = _ERROR_TYPES.get(status) or ("api_error" if status >= 500 else "invalid_request_error")
    error = {"type": kind, "message": message}
    if "code" in more:
        error["code"] = more["code"]
    value: dict[str, Any] = {"type": "error", "error": error}
    if "request_id" in more:
        value["request_id"] = more["request_id"]
    return value


def _usage(raw: msgspec.Raw) -> Usage | None:
    if raw == NULL:
        return None
    try:
        return _decode_usage(raw).usage()
    except NOT_JSON:
        return None  # an answer whose usage is no usage: worth more than none


def _stop_reason(choice_reason: str | None, *, has_tools: bool, refused: bool) -> str:
    if refused:
        return "refusal"
    if has_tools and choice_reason in (None, "stop"):
        return "tool_use"  # some servers say that they stopped
    return _STOP_REASONS.get(choice_reason or "stop", "end_turn")


class Reader(StreamTranslator):
    """Turns the reply of a backend of OpenAI's protocol into Anthropic's form. See `base.ReplyReader`.

    Thoughts are passed on to callers that asked for thinking, as blocks without a signature.
    """

    def __init__(self, backend: str, request: InferenceRequest) -> None:
        super().__init__(backend)
        self._model = request.model
        try:
            thinking = _decode_wishes(request.body).thinking
        except NOT_JSON:
            thinking = None
        self._wants_thoughts = thinking is not None and thinking.type not in ("", "disabled")
        self._id = ""
        self._is_open = False  # a block
        self._kind = ""  # of the open block, or of the last one
        self._blocks = 0
        self._call = -1
        self._calls: dict[int, _Pending] = {}
        self._finish: str | None = None
        self._stop_sequence: str | None = None
        self._refused = False
        self._usage: Usage | None = None

    # -- whole -----------------------------------------------------------------------------------------

    def plain(self, status: int, body: bytes) -> bytes:
        if status != 200:
            return self._error(status, body)
        try:
            reply = _decode_reply(body)
        except NOT_JSON as error:
            raise BadReply(self._backend, f"its reply is no chat completion: {error}") from None
        choice = reply.choices[0] if reply.choices else None
        if choice is None or choice.message is None:
            raise BadReply(self._backend, "its reply holds no message")
        said = choice.message
        content: list[dict[str, Any]] = []
        if said.thought and self._wants_thoughts:
            content.append({"type": "thinking", "thinking": said.thought, "signature": ""})
        text = said.content or said.refusal
        if text:
            content.append({"type": "text", "text": text})
        for index, call in enumerate(said.tool_calls or ()):
            content.append(
                {
                    "type": "tool_use",
                    "id": call.id or _call_id(reply.id, index),
                    "name": call.function.name or "",
                    "input": self._input(call.function.arguments or "{}", choice.finish_reason),
                }
            )
        refused = bool(said.refusal) and not said.content
        sequence = choice.stop_reason if isinstance(choice.stop_reason, str) else None
        stop_reason = _stop_reason(choice.finish_reason, has_tools=bool(said.tool_calls), refused=refused)
        if sequence is not None and stop_reason == "end_turn":
            stop_reason = "stop_sequence"
        return _encode(
            {
                **self._message(reply),
                "content": content,
                "stop_reason": stop_reason,
                "stop_sequence": sequence if stop_reason == "stop_sequence" else None,
                "usage": as_messages(_usage(reply.usage)),
            }
        )

    def _error(self, status: int, body: bytes) -> bytes:
        try:
            error = _decode_error(body).error
        except NOT_JSON:
            if not body.lstrip().startswith(b"{"):
                return body
            error = None
        message = error.message if isinstance(error, _Problem) else error
        return _encode(messages_error(status, message or f"the backend answered {status}"))

    def _input(self, arguments: str, finish_reason: str | None) -> msgspec.Raw:
        try:
            _decode_input(arguments)
            return msgspec.Raw(arguments.encode())
        except NOT_JSON:
            if finish_reason == "length":
                return msgspec.Raw(b"{}")  # cut where the limit was: the stop reason says so
            raise BadReply(self._backend, "the arguments of its tool call are no JSON object") from None

    def _message(self, reply: _Reply) -> dict[str, Any]:
        return {
            "id": reply.id or f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "model": reply.model or self._model,
        }

    # -- streams ---------------------------------------------------------------------------------------

    def _take(self, event: bytes, out: list[bytes]) -> None:
        if event == b"[DONE]":
            out.append(self._end())
            return
        try:
            chunk = _decode_reply(event)
        except NOT_JSON as error:
            raise BadReply(self._backend, f"an event of its stream is no chunk of a chat: {error}") from None
        if chunk.error != NULL:
            raise BackendRejected(self._backend, 502, _message_of(chunk.error))
        if not self._id and chunk.choices:  # Azure's first chunk tells of its filters, and has no id
            self._begin(chunk, out)
        self._usage = _usage(chunk.usage) or self._usage
        for choice in chunk.choices or ():
            if choice.index:
                continue
            if choice.delta is not None:
                self._add(choice.delta, out)
            if choice.finish_reason is not None:
                self._finish = choice.finish_reason
                self._is_finished = True
                if isinstance(choice.stop_reason, str):
                    self._stop_sequence = choice.stop_reason

    def _begin(self, chunk: _Reply, out: list[bytes]) -> None:
        message = self._message(chunk)
        self._id = message["id"]
        message |= {"content": [], "stop_reason": None, "stop_sequence": None, "usage": as_messages(None)}
        out.append(messages_event({"type": "message_start", "message": message}))

    def _add(self, delta: _Said, out: list[bytes]) -> None:
        if delta.thought and self._wants_thoughts:
            self._open("thinking", {"type": "thinking", "thinking": "", "signature": ""}, out)
            self._delta({"type": "thinking_delta", "thinking": delta.thought}, out)
        text = delta.content or delta.refusal
        if text:
            self._refused = self._refused or bool(delta.refusal)
            self._open("text", {"type": "text", "text": ""}, out)
            self._delta({"type": "text_delta", "text": text}, out)
        for call in delta.tool_calls or ():
            self._add_call(call, out)

    def _add_call(self, call: _Call, out: list[bytes]) -> None:
        """A piece of a tool call. Its block begins when its name is known; pieces of earlier calls come no more."""
        pending = self._calls.get(call.index)
        if pending is None:
            pending = self._calls[call.index] = _Pending()
        pending.id = pending.id or call.id or ""
        pending.name = pending.name or call.function.name or ""
        pending.arguments += call.function.arguments or ""
        if not pending.name:
            return
        if not pending.begun:
            pending.begun = True
            self._call = call.index
            started = {
                "type": "tool_use",
                "id": pending.id or _call_id(self._id, call.index),
                "name": pending.name,
                "input": {},
            }
            self._open(f"call {call.index}", started, out)
        elif call.index != self._call or self._kind != f"call {call.index}":
            raise BadReply(self._backend, "the pieces of its tool calls are mixed")
        if pending.arguments:
            self._delta({"type": "input_json_delta", "partial_json": pending.arguments}, out)
            pending.arguments = ""

    def _open(self, kind: str, block: dict[str, Any], out: list[bytes]) -> None:
        """Make sure that the open block is of this kind."""
        if self._is_open:
            if self._kind == kind:
                return
            self._close(out)
        out.append(messages_event({"type": "content_block_start", "index": self._blocks, "content_block": block}))
        self._is_open = True
        self._kind = kind

    def _close(self, out: list[bytes]) -> None:
        out.append(messages_event({"type": "content_block_stop", "index": self._blocks}))
        self._is_open = False
        self._blocks += 1

    def _delta(self, delta: dict[str, Any], out: list[bytes]) -> None:
        out.append(messages_event({"type": "content_block_delta", "index": self._blocks, "delta": delta}))

    def _end(self) -> bytes:
        if not self._id:
            raise BadReply(self._backend, "its stream ended before its first event")
        self._has_ended = True
        out: list[bytes] = []
        if self._is_open:
            self._close(out)
        refused = self._refused and self._finish in (None, "stop")
        stop_reason = _stop_reason(self._finish, has_tools=bool(self._calls), refused=refused)
        sequence = self._stop_sequence if stop_reason == "end_turn" else None
        delta = {"stop_reason": "stop_sequence" if sequence is not None else stop_reason, "stop_sequence": sequence}
        out.append(messages_event({"type": "message_delta", "delta": delta, "usage": as_messages(self._usage)}))
        out.append(messages_event({"type": "message_stop"}))
        return b"".join(out)


class _Pending(msgspec.Struct):
    """A tool call of a stream: what has come of it and was not passed on."""

    id: str = ""
    name: str = ""
    arguments: str = ""
    begun: bool = False


def _call_id(reply_id: str, index: int) -> str:
    """An id for a call that has none, as some servers leave it out: results are matched by it."""
    kept = "".join(character for character in reply_id if character.isascii() and character.isalnum())
    return f"call_{kept}_{index}"


def _message_of(error: msgspec.Raw) -> str:
    """What the error in a stream says."""
    try:
        problem = _decode_problem(error)
    except NOT_JSON:
        return "failed in the middle of an answer"
    said = problem.message if isinstance(problem, _Problem) else problem
    return said or "failed in the middle of an answer"
