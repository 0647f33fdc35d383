"""Takes out of what a backend says what it repeats of the request.

Some servers answer a request that they refuse with all of it, prompt included. The caller may have that back; what is
written down about the request may not hold it. Not for: what callers are answered, or credentials (backends/wire.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import msgspec

from llm_router.chat import NOT_JSON

MAX_SAID: Final = 2000
"""Characters that are looked at; what follows is left out."""

MAX_TEXT: Final = 256 * 1024
"""Characters of a request; with more nothing can be told within milliseconds, so nothing of what was said is kept."""

_BLOB: Final = 4096
"""As many characters of ASCII without a blank are an image or a sound: nobody quotes it, and it may be megabytes."""

LEAST: Final = 16
"""Characters in a row that are a quote. Shorter ones stand in any two texts."""

_WHOLE: Final = 8  # a text of the request that is as short as this must be there as a whole
_GRAM: Final = LEAST // 2  # any run of 16 holds a piece of 8 that begins at a multiple of 8
_NAMES: Final = frozenset({"model", "role", "type", "name", "object", "strategy", "tool_choice", "id", "detail"})
"""Fields whose values are words of the protocol, or names, which errors are about."""


def without_quotes(said: str, body: bytes) -> str:
    """`said` up to the first quote of a text of the JSON request `body`; with a note if there was one."""
    said = said[:MAX_SAID]
    if len(said) < _WHOLE:
        return said
    try:
        texts = list(_texts(msgspec.json.decode(body)))
    except NOT_JSON:
        return said
    if sum(map(len, texts)) > MAX_TEXT:
        return "(what it said is left out: the request is too long to tell whether that is quoted)"
    grams = {said[index : index + _GRAM] for index in range(len(said) - _GRAM + 1)}
    begin = min((_quoted_at(said, text, grams) for text in texts), default=len(said))
    return said if begin == len(said) else f"{said[:begin]}... (it quotes the request)"


def _texts(value: Any) -> Iterator[str]:
    """Every text that somebody may have written; the nesting is what the parser takes."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            if len(value) >= _WHOLE and not _is_blob(value):
                yield value
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            waiting += [item for name, item in value.items() if name not in _NAMES or not isinstance(item, str)]


def _is_blob(text: str) -> bool:
    begin = text[:_BLOB]
    return len(begin) == _BLOB and begin.isascii() and " " not in begin and "\n" not in begin


def _quoted_at(said: str, text: str, grams: set[str]) -> int:
    """Where the first run of `LEAST` characters of `text` begins, or all of a shorter one; the end if none does."""
    if len(text) < LEAST:
        at = said.find(text)
        return at if at >= 0 else len(said)
    first = len(said)
    for index in range(0, len(text) - _GRAM + 1, _GRAM):
        gram = text[index : index + _GRAM]
        if gram not in grams:
            continue
        at = said.find(gram, 0, first)
        while at >= 0:
            before, after = _common(said, at, text, index)
            if before + after >= LEAST:
                first = min(first, at - before)
                break
            at = said.find(gram, at + 1, first)
    return first


def _common(said: str, at: int, text: str, index: int) -> tuple[int, int]:
    """How many characters are the same before `said[at]` and `text[index]`, and from there on."""
    before = after = 0
    while before < min(at, index) and said[at - before - 1] == text[index - before - 1]:
        before += 1
    most = min(len(said) - at, len(text) - index)
    while after < most and said[at + after] == text[index + after]:
        after += 1
    return before, after
