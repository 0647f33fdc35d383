"""What llama.cpp writes is bounded while it goes on writing."""

from __future__ import annotations

import os
from pathlib import Path

from llm_router.processes.runner_logs import bound_runner_logs


def test_a_file_that_is_too_large_is_emptied_under_its_writer(tmp_path: Path) -> None:
    """One former file is kept; other files, and smaller ones, are left alone."""
    large, small, other = tmp_path / "runner-a.log", tmp_path / "runner-b.log", tmp_path / "access.log"
    small.write_text("short\n")
    other.write_text("x" * 200)
    with os.fdopen(os.open(large, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "w", buffering=1) as writer:
        for generation in ("first", "second"):
            writer.write(f"{generation} {'x' * 200}\n")
            bound_runner_logs(str(tmp_path), max_bytes=100)
            assert large.read_bytes() == b""
            assert (tmp_path / "runner-a.log.1").read_text().startswith(generation)
        writer.write("more\n")
    assert large.read_text() == "more\n"
    assert (small.read_text(), other.stat().st_size) == ("short\n", 200)


def test_a_folder_that_is_not_there_is_no_problem(tmp_path: Path) -> None:
    bound_runner_logs(str(tmp_path / "nowhere"))
