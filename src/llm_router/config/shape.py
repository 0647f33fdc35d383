"""Fills frozen structs from configuration data, and says precisely what is wrong with the data.

A key is the name of a field without its unit; the value carries the unit: `idle_timeout_s` is read from
`idle_timeout: 75s`, `max_body_bytes` from `max_body: 10MiB`. Fields named in `Section.internal` cannot be
configured; fields named in `Section.groups` stand in a mapping of their own. A rate (`recent_per_s`) is a number, its
key keeps the unit.
Not for: what belongs together across sections (load.py).
"""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, Literal, NamedTuple, TypeVar, Union

import msgspec

from llm_router.config.document import Filled, join
from llm_router.config.units import seconds, show_bytes, show_seconds, size_bytes
from llm_router.errors import ConfigError

S = TypeVar("S", bound=msgspec.Struct)

_NOTHING: Final[Mapping[str, Any]] = types.MappingProxyType({})

Fail = Callable[[str, str], ConfigError]
"""Makes the error for a path and a problem; it knows where the value came from."""


class Section(NamedTuple):
    """How a struct stands in the file.

    Args:
        internal: fields that are no keys.
        groups: a key to the fields that stand below it.
        renamed: a field to its key, where the word in the file is another one.
        secret: fields whose value is never shown.
        elsewhere: keys that are no fields, to their types: whoever builds the struct takes them out before.
    """

    struct: type[msgspec.Struct]
    internal: frozenset[str] = frozenset()
    groups: Mapping[str, tuple[str, ...]] = _NOTHING
    renamed: Mapping[str, str] = _NOTHING
    secret: frozenset[str] = frozenset()
    elsewhere: Mapping[str, Any] = _NOTHING

    def key(self, field: str) -> str:
        """The key of a field: its name without the unit, which the value carries."""
        if renamed := self.renamed.get(field):
            return renamed
        return field.removesuffix("_s") if _is_duration(field) else field.removesuffix("_bytes")


class Key(NamedTuple):
    """One configuration key, for the reference documentation. `default` is as one would write it; None if needed."""

    path: str
    type: str
    default: str | None


class Shaper:
    """Fills structs. `sections` says how the structs that need more than the rule above are written."""

    def __init__(self, sections: Iterable[Section], fail: Fail) -> None:
        self._sections = {section.struct: section for section in sections}
        self._fail = fail

    def build(self, struct: type[S], raw: Any, path: str, given: Mapping[str, Any] = _NOTHING) -> S:
        """A `struct` from the mapping `raw`. `given` are values of internal fields, by name.

        Raises: ConfigError with the path of the key at fault.
        """
        section = self._sections.get(struct, Section(struct))
        values = dict(given)
        if raw is None:  # `server:` with nothing below it
            raw = {}
        if not isinstance(raw, Mapping):
            raise self._fail(path, f"should hold keys, not {_show(raw)}")
        grouped = {name: group for group, names in section.groups.items() for name in names}
        places: dict[str, dict[str, msgspec.structs.FieldInfo]] = {"": {}}
        for field in msgspec.structs.fields(struct):
            if field.name not in section.internal:
                places.setdefault(grouped.get(field.name, ""), {})[section.key(field.name)] = field
        allowed = [*places[""], *section.groups, *section.elsewhere]
        for key, value in raw.items():
            if key in section.groups:
                self._fields(places[key], value, join(path, key), section, values)
            else:
                self._one(places[""], key, value, path, section, values, allowed)
        for field in msgspec.structs.fields(struct):
            if field.required and field.name not in values:
                raise self._fail(join(path, section.key(field.name)), "is missing")
        return struct(**values)

    def choice(self, literal: Any, value: Any, path: str) -> str:
        """`value` if it is one of the `Literal`'s; for keys that stand in no struct.

        Raises: ConfigError with the path, and what there is to choose from.
        """
        return str(self._choice(typing.get_args(literal), value, path, _show(value)))

    def _fields(
        self,
        fields: dict[str, msgspec.structs.FieldInfo],
        raw: Any,
        path: str,
        section: Section,
        values: dict[str, Any],
    ) -> None:
        if raw is None:
            return
        if not isinstance(raw, Mapping):
            raise self._fail(path, f"should hold keys, not {_show(raw)}")
        for key, value in raw.items():
            self._one(fields, key, value, path, section, values, list(fields))

    def _one(
        self,
        fields: dict[str, msgspec.structs.FieldInfo],
        key: str,
        value: Any,
        path: str,
        section: Section,
        values: dict[str, Any],
        allowed: list[str],
    ) -> None:
        at = join(path, key)
        field = fields.get(key)
        if field is None:
            raise self._fail(at, f"no such key{suggest(key, allowed)}")
        hint = typing.get_type_hints(section.struct)[field.name]
        shown = "a secret" if field.name in section.secret else _show(value)
        values[field.name] = self._value(hint, field.name, value, at, shown)

    def _value(self, hint: Any, name: str, value: Any, path: str, shown: str) -> Any:
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin in (Union, types.UnionType):
            if value is None and type(None) in arguments:
                return None
            return self._value(self._meant(arguments, value, path, shown), name, value, path, shown)
        if origin is Literal:
            return self._choice(arguments, value, path, shown)
        if origin is tuple:
            return self._sequence(arguments[0], name, value, path, shown)
        if origin is dict:
            return self._table(arguments[1], name, value, path, shown)
        if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
            return self.build(hint, value, path)
        try:
            return self._scalar(hint, name, value)
        except ValueError as error:
            raise self._fail(path, f"{shown} will not do: {error}") from None

    def _meant(self, hints: tuple[Any, ...], value: Any, path: str, shown: str) -> Any:
        """Which type of a union a value is of: a list can be told from a word."""
        hints = tuple(hint for hint in hints if hint is not type(None))
        if len(hints) == 1:
            return hints[0]
        (words,) = (hint for hint in hints if typing.get_origin(hint) is Literal)
        (other,) = (hint for hint in hints if hint is not words)
        choices = typing.get_args(words)
        if isinstance(value, str) and value not in choices:
            raise self._fail(path, f"{shown} will not do: {' or '.join(choices)}, or a list{suggest(value, choices)}")
        return words if isinstance(value, str) else other

    def _choice(self, choices: tuple[str, ...], value: Any, path: str, shown: str) -> Any:
        if value in choices:
            return str(value)
        listed = ", ".join(choices)
        raise self._fail(path, f"{shown} will not do: choose one of {listed}{suggest(str(value), choices)}")

    def _sequence(self, hint: Any, name: str, value: Any, path: str, shown: str) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise self._fail(path, f"should be a list, not {shown}")
        return tuple(
            self._value(hint, name, item, f"{path}[{index}]", shown if shown == "a secret" else _show(item))
            for index, item in enumerate(value)
        )

    def _table(self, hint: Any, name: str, value: Any, path: str, shown: str) -> dict[str, Any]:
        if value is None:  # `checks:` with nothing below it
            return {}
        if not isinstance(value, Mapping):
            raise self._fail(path, f"should hold {_table_name(name, hint)}, not {shown}")
        filled = {}
        for key, item in value.items():
            at = join(path, str(key))
            if hint is str and not isinstance(item, str):
                raise self._fail(at, "should be text; put it into quotes")
            filled[str(key)] = self._value(hint, name, item, at, shown if shown == "a secret" else _show(item))
        return filled

    def _scalar(self, hint: Any, name: str, value: Any) -> Any:
        if _is_duration(name):
            if not isinstance(value, str) and not (value == 0 and not isinstance(value, bool)):
                raise ValueError("a duration has a unit, like 30s, 1m30s or 250ms")
            return seconds(str(value))
        if name.endswith("_bytes"):
            if not isinstance(value, str) and not (value == 0 and not isinstance(value, bool)):
                raise ValueError("a size has a unit, like 64KiB, 10MiB or 2GB")
            return size_bytes(str(value))
        if hint is bool:
            return _boolean(value)
        if hint is int:
            return _integer(value)
        if hint is float:
            return _number(value)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError("it should be text")
        return str(value)


def keys(struct: type[msgspec.Struct], sections: Iterable[Section], path: str = "") -> Iterator[Key]:
    """Every key that `struct` can be configured with, depth first, in the order of the fields."""
    known = {section.struct: section for section in sections}
    section = known.get(struct, Section(struct))
    grouped = {name: group for group, names in section.groups.items() for name in names}
    hints = typing.get_type_hints(struct)
    for field in msgspec.structs.fields(struct):
        if field.name in section.internal:
            continue
        group = grouped.get(field.name)
        at = join(join(path, group) if group else path, section.key(field.name))
        hint = hints[field.name]
        inner = _inner(hint)
        if isinstance(inner, type) and issubclass(inner, msgspec.Struct):
            yield from keys(inner, known.values(), at + _place(hint))
        else:
            yield Key(at, _type_name(field.name, hint), _default(field))
    for key, hint in section.elsewhere.items():
        yield Key(join(path, key), _type_name(key, hint), "")


def suggest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` when a known word is close, else nothing."""
    close = difflib.get_close_matches(str(word).lower(), list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def _show(value: Any) -> str:
    if isinstance(value, Filled):
        return repr(value.written)
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _boolean(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if isinstance(value, str) and value.strip().lower() in words:
        return words[value.strip().lower()]
    raise ValueError("write true or false (or yes and no, on and off, 1 and 0)")


def _integer(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        try:
            return int(value.strip())
        except ValueError:
            pass
    raise ValueError("it should be a whole number")


def _number(value: Any) -> float:
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    raise ValueError("it should be a number")


def _inner(hint: Any) -> Any:
    """The type inside `X | None` and `tuple[X, ...]`, the struct inside `dict[str, X]`, or the type itself."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        hints = [argument for argument in arguments if argument is not type(None)]
        return _inner(hints[0]) if len(hints) == 1 else hint
    if origin is dict and isinstance(arguments[1], type) and issubclass(arguments[1], msgspec.Struct):
        return arguments[1]
    return arguments[0] if origin is tuple else hint


def _is_duration(name: str) -> bool:
    return name.endswith("_s") and not name.endswith("_per_s")


def _place(hint: Any) -> str:
    """What stands in a path for the one of several that is meant."""
    if _is_list(hint):
        return "[]"
    return ".<name>" if typing.get_origin(hint) is dict else ""


def _is_list(hint: Any) -> bool:
    return any(typing.get_origin(part) is tuple for part in (hint, *_parts(hint)))


def _parts(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else ()


def _type_name(name: str, hint: Any) -> str:
    parts = [part for part in _parts(hint) if part is not type(None)]
    if parts:
        return " or ".join(_type_name(name, part) for part in parts)
    if _is_duration(name):
        return "duration"
    if name.endswith("_bytes"):
        return "size"
    inner = _inner(hint)
    listed = "list of " if _is_list(hint) else ""
    if typing.get_origin(inner) is Literal:
        *choices, last = (f"`{choice}`" for choice in typing.get_args(inner))
        return listed + (f"{', '.join(choices)} or {last}" if choices else last)
    if typing.get_origin(inner) is dict:
        return _table_name(name, typing.get_args(inner)[1])
    word = {bool: "true or false", int: "whole number", float: "number", str: "text"}[inner]
    return f"{listed}{word}s" if listed else word


def _table_name(name: str, hint: Any) -> str:
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return "names, each with keys below it"
    return f"names and {_type_name(name, hint)}s"


def _default(field: msgspec.structs.FieldInfo) -> str | None:
    if field.required:
        return None
    value = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
    if value is None or value in ("", (), {}):
        return ""
    if _is_duration(field.name):
        return show_seconds(value)
    if field.name.endswith("_bytes"):
        return show_bytes(value)
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
