"""The file as data: places, variables, and what YAML allows but nobody means."""

from __future__ import annotations

import pytest

from llm_router.config.document import Filled, read
from llm_router.errors import ConfigError


def problem(text: str, env: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        read(text, "r.yaml", env or {})
    return str(caught.value)


def test_variables_are_filled_in() -> None:
    """`${VAR}`, defaults, LiteLLM's form and `$$`; in every depth."""
    text = """
a: ${NAME}
b: "x-${NAME}-${OTHER:-rest}"
c: [os.environ/NAME, "$$5"]
d: {e: "${EMPTY:-set}"}
"""
    data = read(text, "r.yaml", {"NAME": "value", "EMPTY": ""}).data
    assert data == {"a": "value", "b": "x-value-rest", "c": ["value", "$5"], "d": {"e": "set"}}


def test_filled_text_remembers_what_was_written() -> None:
    """So that a message need not show a secret."""
    value = read("a: ${NAME}", "r.yaml", {"NAME": "secret"}).data["a"]
    assert isinstance(value, Filled)
    assert value.written == "${NAME}"


def test_a_variable_that_is_not_set_is_named_with_its_key_and_line() -> None:
    """The way out is in the message."""
    message = problem("\nbackends:\n  - api_key: ${MISSING}\n")
    assert message.startswith("backends[0].api_key: the environment variable MISSING is not set (line 3 of r.yaml)")
    assert "MISSING" in problem("a: os.environ/MISSING")


def test_a_malformed_reference_is_refused() -> None:
    """Not taken for text: it would become a wrong key or address."""
    assert "is no variable" in problem("a: ${1}")
    assert "is no variable" in problem("a: ${NAME")


def test_lines_are_known_by_path() -> None:
    """Every key and list entry."""
    lines = read("a:\n  - b: 1\n  - b: 2\nc: 3\n", "r.yaml", {}).lines
    assert (lines["a"], lines["a[1]"], lines["a[1].b"], lines["c"]) == (1, 3, 3, 4)


def test_syntax_errors_tell_line_and_column() -> None:
    """The parser knows them."""
    assert problem("a: 1\nb: [1, 2\nc: 3\n").startswith("r.yaml, line 3, column 2 is not valid YAML")
    assert problem("a: {b: ${C}}\n").endswith("put ${...} into quotes here")
    assert "line 1, column 1" in problem("\tb: 1\n")
    assert "not valid YAML" in problem("a: \x00")
    assert "not valid YAML" in problem("a: 1\n---\nb: 1\n")


def test_a_key_that_stands_twice_is_refused() -> None:
    """YAML would silently take the last."""
    assert problem("a:\n  b: 1\n  b: 2\n") == "a.b: stands twice in r.yaml: in line 2 and in line 3"


def test_merge_keys_may_repeat_what_they_are_there_to_replace() -> None:
    """`<<` fills in what is not said."""
    text = "base: &base {x: 1, y: 2}\nuse:\n  <<: *base\n  y: 3\n"
    assert read(text, "r.yaml", {}).data["use"] == {"x": 1, "y": 3}


def test_keys_are_what_is_written() -> None:
    """YAML 1.1 would read them as True and 1."""
    assert read("on: 1\n1: 2\n", "r.yaml", {}).data == {"on": 1, "1": 2}


def test_a_document_that_contains_itself_or_explodes_is_refused() -> None:
    """Neither recursion nor memory."""
    assert "contains itself" in problem("a: &a [*a]")
    layers = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
    )
    assert "expands to more than" in problem(layers)


def test_only_a_mapping_is_a_configuration() -> None:
    """An empty file is an empty configuration."""
    assert read("", "r.yaml", {}).data == {}
    assert read("# nothing\n", "r.yaml", {}).data == {}
    assert "holds a list at its top" in problem("- a\n")


def test_no_objects_are_made() -> None:
    """Tags that would run code are errors."""
    assert "is not supported" in problem("a: !!python/object/apply:os.system [true]")
    assert "not valid YAML" in problem("a: !!python/name:os.system x")


@pytest.mark.parametrize(
    "text", ["a: *plain-words", "a: !plain-words x", "a: !x!plain-words x", "api_key: x${plain-words"]
)
def test_a_mistake_in_a_secret_does_not_show_it(text: str) -> None:
    """Passwords may begin with what means something in YAML, and hold what begins a variable."""
    said = problem(text)
    assert "plain-words" not in said
    assert "quotes" in said or "$$" in said
