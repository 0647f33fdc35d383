"""The lock files fit pyproject.toml, agree with each other, and say nothing about where they were made."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "requirements"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def locked(name: str) -> dict[str, Version]:
    """The versions in a lock file, by canonical name."""
    text = (REQUIREMENTS / f"{name}.lock").read_text(encoding="utf-8")
    return {
        canonicalize_name(match[1]): Version(match[2])
        for match in re.finditer(r"^(\S+)==([^\s;]+)", text, re.MULTILINE)
    }


def wanted(name: str) -> list[Requirement]:
    """The requirements of an `.in` file."""
    lines = (REQUIREMENTS / f"{name}.in").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for raw in lines if (line := raw.partition("#")[0].strip())]


def assert_fits(requirements: list[Requirement], versions: dict[str, Version]) -> None:
    for requirement in requirements:
        version = versions.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is in no lock file: run `make lock`"
        assert requirement.specifier.contains(version), f"{requirement} is locked at {version}: run `make lock`"


def test_what_the_project_needs_is_locked() -> None:
    """In a version that its ranges allow."""
    assert_fits([Requirement(text) for text in PROJECT["project"]["dependencies"]], locked("runtime"))
    assert_fits([Requirement(text) for text in PROJECT["build-system"]["requires"]], locked("build"))
    assert_fits(wanted("build"), locked("build"))
    assert_fits(wanted("test"), locked("test"))
    for extra in PROJECT["project"]["optional-dependencies"].values():
        assert_fits([Requirement(text) for text in extra], locked("test"))


def test_tests_run_with_what_users_get() -> None:
    """The test lock holds the others, in the same versions."""
    test = locked("test")
    for name in ("runtime", "build"):
        assert {library: test.get(library) for library in locked(name)} == locked(name)


@pytest.mark.parametrize("name", ["runtime", "build", "test"])
def test_locks_hold_hashes_and_no_addresses(name: str) -> None:
    """They work with every registry, and tell nothing about the machine they were made on."""
    text = (REQUIREMENTS / f"{name}.lock").read_text(encoding="utf-8")
    assert not re.search(
        r"://|--index|--extra-index|--find-links|--trusted-host|file:|^\s*#.*[ =]/", text, re.MULTILINE
    )
    for block in re.split(r"^(?=\S+==)", text, flags=re.MULTILINE)[1:]:
        assert "--hash=sha256:" in block, block


def test_libraries_of_the_runners_run_on_the_machines_we_promise() -> None:
    """More than one wheel of everything that is compiled: other systems and processors."""
    text = (REQUIREMENTS / "runtime.lock").read_text(encoding="utf-8")
    for library in ("xllamacpp", "uvloop", "httptools", "msgspec"):
        block = re.search(rf"^{library}==.*?(?=^\S+==|\Z)", text, re.MULTILINE | re.DOTALL)
        assert block is not None
        assert block[0].count("--hash") >= 4, library
