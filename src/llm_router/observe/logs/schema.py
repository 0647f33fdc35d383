"""Every field of every log file: its name, its one type, and what it means.

`docs/reference/logs.md` has a row for each, and tests compare both with what is really written. A field has the same
type wherever it occurs, so that all files may go to one index. Not for: making lines (entry.py, request_lines.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, NamedTuple

FileName = Literal["application", "access", "error", "audit", "metrics"]
FieldType = Literal["text", "integer", "number", "boolean", "time", "texts"]
"""`time` is ISO 8601 in UTC with milliseconds; `texts` is an object of texts, whatever its names."""


class Field(NamedTuple):
    """A field by its path: `request.headers.userAgent` lies in two objects. Names with a dot of their own are listed
    in `DOTTED`. `is_always` if no line of its file lacks it."""

    name: str
    type: FieldType
    meaning: str
    is_always: bool = False


DOTTED: Final = frozenset({"log.level", "log.logger", "trace.id", "span.id"})
"""Names that hold a dot themselves: fields of the line, not of an object in it, as in the Elastic Common Schema."""

BASE: Final = (
    Field("@timestamp", "time", "When it happened; of a request, when it ended.", is_always=True),
    Field("log.level", "text", "debug, info, warning, error or critical.", is_always=True),
    Field("message", "text", "What happened, for people.", is_always=True),
    Field("service", "text", "`llm-router`.", is_always=True),
    Field("version", "text", "Version of the router.", is_always=True),
    Field("env", "text", "ENVIRONMENT.", is_always=True),
    Field("hostname", "text", "Of the machine or container.", is_always=True),
    Field("pid", "integer", "Of the process that wrote the line.", is_always=True),
    Field("process", "text", "That process by its name, like worker-0.", is_always=True),
    Field("request_id", "text", "Of the request in question, as in the x-request-id header."),
    Field("trace.id", "text", "Of the request's trace, 32 hex digits."),
    Field("span.id", "text", "Of the request's own span, 16 hex digits."),
    Field("truncated", "boolean", "True if the line was too long and its texts were cut further."),
)

ERROR: Final = (
    Field("error.name", "text", "A kind of `llm_router_errors_total` for requests, else the class of the exception."),
    Field("error.message", "text", "The error in words."),
    Field("error.stack", "text", "The traceback of an exception."),
)

_INFERENCE: Final = (
    Field("inference.id", "text", "The request id."),
    Field("inference.model", "text", "The model that answered, after fallbacks."),
    Field("inference.strategy", "text", "How the deployment was chosen."),
    Field("inference.reason", "text", "Why it was chosen."),
    Field("inference.backend", "text", "The backend that was asked last."),
    Field("inference.key", "text", "Name of the caller's key."),
    Field("inference.prompt_length", "integer", "Bytes of the request's body, as announced."),
    Field("inference.input_tokens", "integer", "Tokens of the prompt."),
    Field("inference.tokens", "integer", "Tokens generated."),
    Field("inference.cached_tokens", "integer", "Prompt tokens that the provider had cached, where there were any."),
    Field("inference.reasoning_tokens", "integer", "Of the tokens generated, those spent on reasoning, if any."),
    Field("inference.latency", "number", "Milliseconds from the first byte of the request to the end of the reply."),
    Field("inference.first_token", "number", "Milliseconds to the first bytes of a stream."),
    Field("inference.queued", "number", "Milliseconds spent waiting for a slot of the model."),
    Field("inference.cost_usd", "number", "What it cost, where the price is known."),
    Field("inference.attempts", "integer", "Tries at backends."),
    Field("inference.cached", "boolean", "Whether the cache answered."),
    Field("inference.success", "boolean", "Whether it succeeded."),
    Field("inference.request_body", "text", "What was asked; only with `logs.content`."),
    Field("inference.response_body", "text", "What was answered; only with `logs.content`."),
)

APPLICATION: Final = (
    *BASE,
    Field("log.logger", "text", "The part of the router that wrote it, like llm_router.gateway."),
    *ERROR,
    *_INFERENCE,
    Field("sample_rate", "number", "Of such requests, the share whose lines are written: 0.1 stands for ten."),
    Field("model.id", "text", "Of a model that was loaded or unloaded."),
    Field("model.name", "text", "Its name."),
    Field("model.format", "text", "Its format: gguf or remote."),
    Field("model.size", "integer", "Its size in bytes."),
    Field("model.load_duration", "number", "Milliseconds that loading took."),
    Field("data", "texts", "Whatever else the writer of the line gave; each value is a text."),
)

ACCESS: Final = (
    *BASE,
    Field("request.method", "text", "HTTP method.", is_always=True),
    Field("request.url", "text", "Path and query.", is_always=True),
    Field("request.path", "text", "Path as it came.", is_always=True),
    Field("request.query", "text", "What follows the question mark; empty if nothing does.", is_always=True),
    Field("request.headers.userAgent", "text", "User-Agent."),
    Field("request.headers.referer", "text", "Referer."),
    Field("request.headers.contentType", "text", "Content-Type."),
    Field("request.headers.contentLength", "integer", "Content-Length."),
    Field("request.headers.authorization", "text", "`[REDACTED]` if there were credentials of any kind."),
    Field("request.ip", "text", "Address of the client, or of the proxy before us.", is_always=True),
    Field("request.timestamp", "time", "When its first byte came.", is_always=True),
    Field("response.statusCode", "integer", "HTTP status; 499 if the client left.", is_always=True),
    Field("response.contentLength", "integer", "Bytes of the body that were sent.", is_always=True),
    Field("response.contentType", "text", "Content-Type of the reply."),
    Field("duration", "number", "Milliseconds from the first byte of the request to the end.", is_always=True),
    Field("route", "text", "The route it was counted under.", is_always=True),
    Field("outcome", "text", "success, error or cancelled.", is_always=True),
    Field("routing.model", "text", "Of an inference: the model that answered."),
    Field("routing.strategy", "text", "How the deployment was chosen."),
    Field("routing.backend", "text", "The backend that was asked last."),
    Field("routing.attempts", "integer", "Tries at backends."),
    Field("routing.cached", "boolean", "Whether the cache answered."),
    Field("key.id", "text", "Id of the caller's key."),
    Field("key.name", "text", "Its name."),
    *ERROR[:2],
    Field("sample_rate", "number", "Of such requests, the share whose lines are written.", is_always=True),
)

AUDIT: Final = (
    *BASE,
    Field("event", "text", "What was done, like key_created or config_reloaded.", is_always=True),
    Field("timestamp", "time", "When.", is_always=True),
    Field("actor", "text", "Who did it: the name of a key, or how the caller came in."),
    Field("actor_id", "text", "Id of that key."),
    Field("client", "text", "From which address."),
    Field("success", "boolean", "Whether it worked."),
    Field("key_id", "text", "The key it was done to."),
    Field("key_name", "text", "That key's name."),
    Field("model_id", "text", "The model it was done to."),
    Field("model_name", "text", "That model's name."),
    Field("format", "text", "That model's format."),
    Field("load_duration", "number", "Milliseconds that loading took."),
    Field("data", "texts", "Whatever else belongs to the event; each value is a text."),
)

METRICS: Final = (
    *BASE,
    Field("metric.name", "text", "Name of the family.", is_always=True),
    Field("metric.value", "number", "Its value.", is_always=True),
    Field("metric.labels", "texts", "Its labels.", is_always=True),
    Field("metric.timestamp", "time", "When it was read.", is_always=True),
)

FILES: Final[dict[FileName, tuple[Field, ...]]] = {
    "application": APPLICATION,
    "access": ACCESS,
    "error": APPLICATION,
    "audit": AUDIT,
    "metrics": METRICS,
}
"""error.log holds the lines of application.log from level error up."""

_TIME_LENGTH: Final = len("2026-01-31T12:00:00.000Z")


def problems(file: FileName, entry: Mapping[str, Any]) -> list[str]:
    """What is wrong with a line, each with the field in question; nothing if it is as declared."""
    declared = {field.name: field for field in FILES[file]}
    found: set[str] = set()
    wrong: list[str] = []
    for name, value in _flat(entry, declared):
        field = declared.get(name)
        found.add(name)
        if field is None:
            wrong.append(f"{name} is not declared")
        elif not _fits(value, field.type):
            wrong.append(f"{name} is no {field.type}: {value!r}")
    return wrong + [f"{field.name} is missing" for field in FILES[file] if field.is_always and field.name not in found]


def _flat(entry: Mapping[str, Any], declared: Mapping[str, Field], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, value in entry.items():
        path = prefix + name
        if "." in name and path not in DOTTED:
            flat.append((f"{path} (a dot in a name)", value))
        elif isinstance(value, Mapping) and path not in declared:
            flat.extend(_flat(value, declared, f"{path}."))
        else:
            flat.append((path, value))
    return flat


def _fits(value: Any, type: FieldType) -> bool:
    match type:
        case "text":
            return isinstance(value, str)
        case "time":
            return isinstance(value, str) and len(value) == _TIME_LENGTH and value.endswith("Z")
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            return isinstance(value, int) and not isinstance(value, bool)
        case "number":
            return isinstance(value, int | float) and not isinstance(value, bool)
        case "texts":
            return isinstance(value, Mapping) and all(isinstance(text, str) for text in value.values())
