"""The logs reference is true: every field of every file with its type, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llm_router.observe.logs.schema import BASE, DOTTED, FILES, Field

REFERENCE = (Path(__file__).parents[2] / "docs" / "reference" / "logs.md").read_text(encoding="utf-8")

SECTIONS = {
    "Every line": BASE,
    "application.log and error.log": FILES["application"],
    "access.log": FILES["access"],
    "audit.log": FILES["audit"],
    "metrics.log": FILES["metrics"],
}


def rows(section: str) -> list[Field]:
    """The fields that a section's table describes."""
    text = re.split(r"^## ", REFERENCE, flags=re.MULTILINE)
    (found,) = [part for part in text if part.startswith(f"{section}\n")]
    fields = []
    for line in found.splitlines():
        match = re.fullmatch(r"\| `([^`]+)` \| (\w+) \| (yes)? ?\| (.+) \|", line)
        if match is not None:
            fields.append(Field(match[1], match[2], match[4], is_always=match[3] is not None))  # type: ignore[arg-type]
    return fields


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_has_its_row(section: str) -> None:
    """In the section of its file, in the same order; and no row describes a field that does not exist."""
    expected = [field for field in SECTIONS[section] if section == "Every line" or field not in BASE]
    assert rows(section) == expected


def test_every_file_is_described() -> None:
    """In the table of files."""
    assert set(re.findall(r"^\| `(\w+)\.log` \|", REFERENCE, flags=re.MULTILINE)) == set(FILES)


def test_a_field_has_one_type_in_all_files() -> None:
    """And is no object in one and a value in another: all files fit one index."""
    types: dict[str, str] = {}
    for field in {field for fields in FILES.values() for field in fields}:
        assert types.setdefault(field.name, field.type) == field.type
    objects = {
        field.rsplit(".", depth)[0]
        for field in types
        if field not in DOTTED
        for depth in range(1, field.count(".") + 1)
    }
    assert objects & set(types) == set()


def test_a_field_is_declared_once() -> None:
    """In each file."""
    for fields in FILES.values():
        names = [field.name for field in fields]
        assert len(names) == len(set(names))
