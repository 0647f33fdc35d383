r"""The language of `--where`: `status >= 500 and (model == "small" or path =~ "^/v1/")`.

    choice     = term ("or" term)*                      also ||
    term       = factor ("and" factor)*                 also &&
    factor     = ("not" | "!") factor | "(" choice ")" | comparison
    comparison = field [("==" | "=" | "!=" | "<" | "<=" | ">" | ">=" | "=~" | "!~") value]
    value      = "text" | 'text' | word | number | duration | true | false | null

On the left of a sign stands a field, on its right a value: a word without quotes is a text there. A field alone asks
whether it is there and neither false, 0 nor empty. A line that lacks the field of a comparison does not match, whatever
the sign; `== null` asks for just that. Levels compare by how bad they are; fields that hold milliseconds compare with
durations, like `duration > 2s`. Not for: anything that is not one line by itself. Nothing of it is ever run as code.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, Final, NamedTuple

from llm_router.observe.logs.levels import LEVELS
from llm_router.observe.logs.schema import FILES

Entry = Mapping[str, Any]
Test = Callable[[Entry], bool]

ALIASES: Final[Mapping[str, tuple[str, ...]]] = {
    "actor": ("actor",),
    "agent": ("request.headers.userAgent",),
    "attempts": ("routing.attempts", "inference.attempts"),
    "backend": ("routing.backend", "inference.backend"),
    "cached": ("routing.cached", "inference.cached"),
    "cost": ("inference.cost_usd",),
    "duration": ("duration", "inference.latency", "model.load_duration", "load_duration"),
    "error": ("error.name",),
    "first_token": ("inference.first_token",),
    "input_tokens": ("inference.input_tokens",),
    "ip": ("request.ip", "client"),
    "key": ("key.name", "inference.key", "key_name"),
    "latency": ("inference.latency", "duration"),
    "level": ("log.level",),
    "logger": ("log.logger",),
    "method": ("request.method",),
    "metric": ("metric.name",),
    "model": ("routing.model", "inference.model", "model.name", "model_name"),
    "path": ("request.path",),
    "query": ("request.query",),
    "queued": ("inference.queued",),
    "reason": ("inference.reason",),
    "request": ("request_id",),
    "size": ("response.contentLength",),
    "status": ("response.statusCode",),
    "strategy": ("routing.strategy", "inference.strategy"),
    "success": ("inference.success", "success"),
    "time": ("@timestamp",),
    "tokens": ("inference.tokens",),
    "trace": ("trace.id",),
    "url": ("request.url",),
    "value": ("metric.value",),
}
"""Short names of fields, with where each may stand: the first that is there counts."""

MAX_DEPTH: Final = 40
"""Parentheses and `not` within each other."""

_TOKEN: Final = re.compile(
    r"""\s*(?:
        (?P<text>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
      | (?P<sign>==|!=|<=|>=|=~|!~|<|>|=)
      | (?P<mark>\(|\)|&&|\|\||!)
      | (?P<word>[^\s()<>=!&|~"',]+)
    )""",
    re.VERBOSE,
)
_FIELD: Final = re.compile(r"[@A-Za-z_][\w.@-]*")
_NUMBER: Final = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?")
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")
_MILLISECONDS: Final = {"ms": 1.0, "s": 1000.0, "m": 60_000.0, "h": 3_600_000.0}
_MILLISECOND_FIELDS: Final = frozenset({"duration", "latency", "load_duration", "first_token", "queued"})
_RANKS: Final[Mapping[str, int]] = {level: rank for rank, level in enumerate(LEVELS)}


class _Missing:
    """What a line lacks."""

    def __bool__(self) -> bool:
        return False


_MISSING: Final = _Missing()


class BadWhere(ValueError):
    """The expression cannot be understood; `column` (from 1) is where."""

    def __init__(self, column: int, problem: str) -> None:
        super().__init__(f"column {column}: {problem}")
        self.column = column


class _Token(NamedTuple):
    kind: str  # text, sign, mark, word, end
    text: str
    column: int


class _Value(NamedTuple):
    """What a field is compared with: as text, and as a number, duration (milliseconds), truth or nothing if it may be one."""

    text: str
    number: float | None = None
    duration_ms: float | None = None
    truth: bool | None = None
    is_null: bool = False


class Where:
    """An expression, ready to be asked about lines.

    Raises: BadWhere from the constructor.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._seen: set[str] = set()
        self._unseen: set[str] = set()
        self._known = set(ALIASES) | {field.name for fields in FILES.values() for field in fields}
        self._tokens = list(_tokens(text))
        self._at = 0
        self._test = self._choice(0)
        if self._next.kind != "end":
            raise self._bad(f"{self._next.text!r} is one too many: join two comparisons with `and` or `or`")

    def matches(self, entry: Entry) -> bool:
        """Whether the line is one of those that are wanted."""
        return self._test(entry)

    def unseen(self) -> list[str]:
        """What to tell somebody who got nothing: fields that no line had so far, with a near one if there is any."""
        return [f"{field!r}{_suggestion(field, self._known)}" for field in sorted(self._unseen)]

    def __repr__(self) -> str:
        return f"Where({self._text!r})"

    # -- the grammar, one method a rule ---------------------------------------------------------------

    @property
    def _next(self) -> _Token:
        return self._tokens[self._at]

    def _take(self, *texts: str) -> bool:
        token = self._next
        if token.kind in {"word", "mark"} and token.text.lower() in texts:
            self._at += 1
            return True
        return False

    def _bad(self, problem: str) -> BadWhere:
        return BadWhere(self._next.column, problem)

    def _choice(self, depth: int) -> Test:
        tests = [self._term(depth)]
        while self._take("or", "||"):
            tests.append(self._term(depth))
        return tests[0] if len(tests) == 1 else lambda entry: any(test(entry) for test in tests)

    def _term(self, depth: int) -> Test:
        tests = [self._factor(depth)]
        while self._take("and", "&&"):
            tests.append(self._factor(depth))
        return tests[0] if len(tests) == 1 else lambda entry: all(test(entry) for test in tests)

    def _factor(self, depth: int) -> Test:
        if depth > MAX_DEPTH:
            raise self._bad(f"more than {MAX_DEPTH} parentheses within each other")
        if self._take("not", "!"):
            negated = self._factor(depth + 1)
            return lambda entry: not negated(entry)
        opened = self._next
        if self._take("("):
            inner = self._choice(depth + 1)
            if not self._take(")"):
                raise BadWhere(opened.column, "this parenthesis is not closed")
            return inner
        return self._comparison()

    def _comparison(self) -> Test:
        token = self._next
        if token.kind == "end":
            raise self._bad("something is missing here: a comparison like status>=500")
        if token.kind != "word" or not _FIELD.fullmatch(token.text) or token.text.lower() in {"and", "or", "not"}:
            raise self._bad(f"{token.text!r} is no field: a comparison begins with one, like status>=500")
        self._at += 1
        field = _Field(token.text)
        if self._next.kind != "sign":
            return lambda entry: bool(self._look(field, entry))
        sign = self._next.text
        self._at += 1
        value_token = self._next
        if value_token.kind not in {"word", "text"}:
            raise self._bad(f"a value is missing after {sign}, like a number or a text in quotes")
        self._at += 1
        value = _value(value_token)
        if sign in {"=~", "!~"}:
            return self._pattern(field, value, value_token.column, is_wanted=sign == "=~")
        if sign in {"<", "<=", ">", ">="} and not value.is_null:
            _check_order(field, value, value_token.column)
        if value.duration_ms is not None and not field.has_duration and sign not in {"==", "=", "!="}:
            raise BadWhere(value_token.column, f"{field.name!r} has no unit of time: write a plain number")
        return self._compare(field, sign, value)

    def _pattern(self, field: _Field, value: _Value, column: int, *, is_wanted: bool) -> Test:
        try:
            pattern = re.compile(value.text)
        except (re.error, OverflowError, RecursionError) as error:
            raise BadWhere(column, f"{value.text!r} is no regular expression: {error}") from None

        def test(entry: Entry) -> bool:
            found = self._look(field, entry)
            return found is not _MISSING and (pattern.search(_text(found)) is not None) is is_wanted

        return test

    def _compare(self, field: _Field, sign: str, value: _Value) -> Test:
        def test(entry: Entry) -> bool:
            found = self._look(field, entry)
            if value.is_null:
                return (found is _MISSING or found is None) is (sign in {"==", "="})
            if found is _MISSING or found is None:
                return False
            if isinstance(found, list):
                return any(_holds(field, item, sign, value) for item in found)
            return _holds(field, found, sign, value)

        return test

    def _look(self, field: _Field, entry: Entry) -> Any:
        found = field.of(entry)
        if field.name not in self._seen:
            if found is _MISSING:
                self._unseen.add(field.name)
                self._known.update(entry)
            else:
                self._seen.add(field.name)
                self._unseen.discard(field.name)
        return found


class _Field:
    """A field by its name: an alias, or a path whose parts may be written with dots or be nested."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._paths = ALIASES.get(name, ()) + ((name,) if name not in ALIASES.get(name, ()) else ())
        last = self._paths[0].rpartition(".")[2]
        self.is_level = "log.level" in self._paths
        self.has_duration = last in _MILLISECOND_FIELDS

    def of(self, entry: Entry) -> Any:
        """The value, `_MISSING` if there is none. Of an alias, whatever holds a value itself comes before what holds fields."""
        found: Any = _MISSING
        for path in self._paths:
            value = look_up(entry, path)
            if value is not _MISSING and not isinstance(value, Mapping):
                return value
            if found is _MISSING:
                found = value
        return found


def look_up(entry: Any, path: str) -> Any:
    """The value at `request.headers.userAgent`, whether the names are nested, have dots themselves, or both."""
    if not isinstance(entry, Mapping):
        return _MISSING
    if path in entry:
        return entry[path]
    at = path.find(".")
    while at > 0:
        if path[:at] in entry:
            value = look_up(entry[path[:at]], path[at + 1 :])
            if value is not _MISSING:
                return value
        at = path.find(".", at + 1)
    return _MISSING


def found(entry: Entry, path: str, default: Any = None) -> Any:
    """The value at a path like `response.statusCode`, or the default."""
    value = look_up(entry, path)
    return default if value is _MISSING else value


def _suggestion(name: str, known: set[str]) -> str:
    """`; did you mean 'status'?` if one is near and the name is none itself."""
    near = [] if name in known else get_close_matches(name, sorted(known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _tokens(text: str) -> list[_Token]:
    tokens: list[_Token] = []
    at = 0
    while at < len(text.rstrip()):
        match = _TOKEN.match(text, at)
        if match is None or match.lastgroup is None:
            column = at + len(text[at:]) - len(text[at:].lstrip()) + 1
            character = text[column - 1]
            problem = "this quote is not closed" if character in "\"'" else f"{character!r} does not belong here"
            raise BadWhere(column, problem)
        tokens.append(_Token(match.lastgroup, match[match.lastgroup], match.start(match.lastgroup) + 1))
        at = match.end()
    tokens.append(_Token("end", "", len(text) + 1))
    return tokens


def _value(token: _Token) -> _Value:
    if token.kind == "text":
        # Only the quote and the backslash itself are written with a backslash: a regular expression keeps its own.
        text = re.sub(rf"\\([{token.text[0]}\\])", r"\1", token.text[1:-1])
        return _Value(text, number=_number(text))
    word = token.text
    lower = word.lower()
    if lower in {"true", "false"}:
        return _Value(word, truth=lower == "true")
    if lower == "null":
        return _Value(word, is_null=True)
    duration = _DURATION.fullmatch(word)
    if duration:
        return _Value(word, duration_ms=float(duration[1]) * _MILLISECONDS[duration[2]])
    return _Value(word, number=_number(word))


def _number(text: str) -> float | None:
    return float(text) if _NUMBER.fullmatch(text) and math.isfinite(float(text)) else None


def _holds(field: _Field, found: Any, sign: str, value: _Value) -> bool:
    """Whether `found`, which is there, compares so with the value. Things of different kinds are just not equal."""
    left: Any = found
    right: Any = None
    if isinstance(found, bool):
        right = value.truth
    elif isinstance(found, int | float):
        right = value.number
        if field.has_duration and value.duration_ms is not None:
            right = value.duration_ms
    elif isinstance(found, str):
        right = value.text
        if field.is_level:
            left, right = _RANKS.get(found.lower(), -1), _RANKS.get(_level(value.text), -1)
            if -1 in {left, right}:
                left, right = found, value.text
    if right is None:
        return sign == "!="
    match sign:
        case "==" | "=":
            return bool(left == right)
        case "!=":
            return bool(left != right)
        case "<":
            return bool(left < right)
        case "<=":
            return bool(left <= right)
        case ">":
            return bool(left > right)
        case _:
            return bool(left >= right)


def _check_order(field: _Field, value: _Value, column: int) -> None:
    """Raises: BadWhere for a value than which no line can have more or less."""
    if field.is_level and _level(value.text) not in _RANKS:
        raise BadWhere(column, f"{value.text!r} is no level; there are {', '.join(LEVELS)}")
    if field.has_duration and value.duration_ms is None and value.number is None:
        raise BadWhere(column, f"{value.text!r} is no time: write milliseconds, or a unit: ms, s, m or h")


def _level(text: str) -> str:
    word = text.lower()
    return "warning" if word == "warn" else word


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return value if isinstance(value, str) else str(value)
