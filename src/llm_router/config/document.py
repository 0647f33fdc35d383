"""A configuration file as data: YAML with the line of every key, secrets filled in from the environment.

`${VAR}`, `${VAR:-default}` and LiteLLM's `os.environ/VAR` are replaced inside text values; `$$` is a dollar sign.
What YAML allows and nobody means is refused: the same key twice, a document that contains itself.
Not for: what the keys mean (shape.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, Self

import msgspec
import yaml

from llm_router.errors import ConfigError
from llm_router.observe.logs.redact import is_secret_name

_REFERENCE: Final = re.compile(r"\$(?:\$|\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}|\{[^}]*\}?)")
_LITELLM_PREFIX: Final = "os.environ/"
_NAMED: Final = re.compile(r".*\b(alias|anchor|tag|tag handle) ['\"].*", re.DOTALL)
_SECRET_PARTS: Final = frozenset(("url", "database", "redis", "endpoint", "query", "api_base", "base_url", "target"))
_COLLECTIONS: Final = frozenset(("tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"))
_NODES_MAX: Final = 100_000
"""Values one file may expand to: aliases of aliases ("billion laughs") end here, long before memory does."""


class Filled(str):
    """Text in which a variable was replaced: `written` is what the file says, and the only thing to show."""

    __slots__ = ("written",)

    written: str

    def __new__(cls, text: str, written: str) -> Self:
        self = super().__new__(cls, text)
        self.written = written
        return self


class Document(msgspec.Struct, frozen=True):
    """The data of a file. `lines` maps the path of a key, like `models[0].name`, to its line, from 1."""

    name: str
    data: dict[str, Any]
    lines: dict[str, int]


def read(text: str, name: str, env: Mapping[str, str]) -> Document:
    """Parse a file's text. `name` is how messages call the file.

    Raises: ConfigError for what is no YAML (with line and column), no mapping, or lacks a variable.
    """
    try:
        loader = yaml.SafeLoader(text)
    except yaml.YAMLError as error:  # a byte that no YAML stream may hold
        raise ConfigError("", f"{name} is not valid YAML: {error}") from error
    walk = _Walk(loader, name, env)
    try:
        node = loader.get_single_node()
        data = {} if node is None else walk.value(node, "")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        # Inside {...} and [...] a brace ends the text, which is no mistake that one sees.
        written = text.splitlines()[mark.line : mark.line + 1] if mark else []
        hint = "; put ${...} into quotes here" if written and "${" in written[0] else ""
        # What begins with *, & or ! is quoted by the parser, and may be a password.
        problem = _NAMED.sub("a \\1 that is none: put texts that begin with * & or ! into quotes", error.problem or "")
        raise ConfigError("", f"{name}{place} is not valid YAML: {problem or error.context}{hint}") from error
    except yaml.YAMLError as error:
        raise ConfigError("", f"{name} is not valid YAML: {error}") from error
    finally:
        loader.dispose()
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError("", f"{name} holds a {type(data).__name__} at its top; it should hold keys like `models:`")
    return Document(name, data, walk.lines)


def _may_be_secret(path: str) -> bool:
    """Whether the value of that key may hold a password."""
    name = path.rpartition(".")[2]
    return is_secret_name(name) or ".headers." in f".{path}" or name in _SECRET_PARTS


class _Walk:
    """Turns YAML nodes into data, noting lines on the way."""

    def __init__(self, loader: yaml.SafeLoader, name: str, env: Mapping[str, str]) -> None:
        self._loader = loader
        self._name = name
        self._env = env
        self._open: set[int] = set()
        self._nodes = 0
        self.lines: dict[str, int] = {}

    def value(self, node: yaml.Node, path: str) -> Any:
        self._nodes += 1
        if self._nodes > _NODES_MAX:
            raise ConfigError(path, f"{self._name} expands to more than {_NODES_MAX} values")
        self.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.ScalarNode):
            value = self._loader.construct_object(node)
            return self._fill(value, path) if isinstance(value, str) else value
        if id(node) in self._open:
            raise ConfigError(path, f"line {node.start_mark.line + 1}: an alias contains itself")
        self._open.add(id(node))
        try:
            if node.tag not in _COLLECTIONS:
                raise ConfigError(path, f"line {node.start_mark.line + 1}: {node.tag} is not supported")
            if isinstance(node, yaml.SequenceNode):
                return [self.value(item, f"{path}[{index}]") for index, item in enumerate(node.value)]
            assert isinstance(node, yaml.MappingNode), node
            return dict(self._pairs(node, path))
        finally:
            self._open.discard(id(node))

    def _pairs(self, node: yaml.MappingNode, path: str) -> Iterator[tuple[str, Any]]:
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = str(getattr(key_node, "value", ""))
            line = key_node.start_mark.line + 1
            if key in seen:
                raise ConfigError(
                    join(path, key), f"stands twice in {self._name}: in line {seen[key]} and in line {line}"
                )
            seen[key] = line
        self._loader.flatten_mapping(node)
        for key_node, value_node in node.value:
            # Keys are taken as they are written: `on:` is a key called "on", not the boolean that YAML 1.1 sees.
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(path, f"line {key_node.start_mark.line + 1}: a key must be a word")
            key_path = join(path, key_node.value)
            self.lines[key_path] = key_node.start_mark.line + 1
            yield key_node.value, self.value(value_node, key_path)

    def _fill(self, text: str, path: str) -> str:
        if text.startswith(_LITELLM_PREFIX):
            return Filled(self._variable(text.removeprefix(_LITELLM_PREFIX), None, path), text)
        if "$" not in text:
            return text

        def replace(match: re.Match[str]) -> str:
            if match[0] == "$$":
                return "$"
            if match[1] is None:
                shown = "'${...'" if _may_be_secret(path) else repr(match[0])
                raise ConfigError(path, f"{shown} is no variable: write ${{NAME}} or ${{NAME:-default}}, or $$ for a $")
            return self._variable(match[1], match[2], path)

        return Filled(_REFERENCE.sub(replace, text), text)

    def _variable(self, name: str, default: str | None, path: str) -> str:
        value = self._env.get(name)
        # As in a shell, `:-` also takes the place of a variable that is set to nothing.
        if value is None or (not value and default is not None):
            value = default
        if value is None:
            line = self.lines.get(path, 0)
            raise ConfigError(
                path,
                f"the environment variable {name} is not set (line {line} of {self._name}); "
                f"set it, or write ${{{name}:-default}}",
            )
        return value


def join(path: str, key: str) -> str:
    """The path of `key` inside the mapping at `path`."""
    return f"{path}.{key}" if path else key
