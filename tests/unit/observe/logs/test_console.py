"""Lines on stderr: text for people, JSON for programs, nothing that waits, raises or tells a secret."""

from __future__ import annotations

import json
import logging
import os
import pty
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_router.observe.logs.console import AppendedFile, Console, Form, write_now
from llm_router.observe.logs.schema import problems
from llm_router.observe.logs.service import Service
from llm_router.signals import CURRENT, RequestRecord

SERVICE = Service("llm-router", "1.0", "test", "host", 7)
SECRET = "sk-llmr-" + "x" * 43


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Its reading and its writing end."""
    ends = os.pipe()
    os.set_blocking(ends[0], False)
    yield ends
    for fd in ends:
        os.close(fd)


def record(message: str = "it happened", *args: object, **fields: Any) -> logging.LogRecord:
    made = logging.makeLogRecord({"name": "llm_router.cache", "levelno": 30, "levelname": "WARNING", "msg": message})
    made.args = args
    made.created = 1_790_000_000.25
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def error(message: str) -> Any:
    try:
        raise ValueError(message)
    except ValueError as caught:
        return ValueError, caught, caught.__traceback__


def written(pipe: tuple[int, int], made: logging.LogRecord, form: Form, process: str = "worker-0") -> str:
    Console(process, SERVICE, form=form, fd=pipe[1], environ={}).handle(made)
    return os.read(pipe[0], 1 << 20).decode()


def test_text_is_one_line(pipe: tuple[int, int]) -> None:
    """When, which process, how bad, which part, what."""
    assert written(pipe, record("%d of %s", 3, "a\nb\x07"), "text") == (
        "2026-09-21T14:13:20.250Z worker-0: WARNING llm_router.cache: 3 of a\\x0ab\\x07\n"
    )
    own = record("started", name="llm_router.worker", levelno=20, folder="/a", tries=3)
    assert written(pipe, own, "text") == "2026-09-21T14:13:20.250Z worker-0: INFO started folder=/a tries=3\n"
    of_runner = record("started", name="llm_router.runner", levelno=20)
    assert written(pipe, of_runner, "text", "runner worker-0").endswith(" runner worker-0: INFO started\n")


def test_a_traceback_follows_the_text(pipe: tuple[int, int]) -> None:
    """In lines of its own."""
    lines = written(pipe, record(exc_info=error("bad")), "text").splitlines()
    assert lines[0].endswith("WARNING llm_router.cache: it happened")
    assert lines[1] == "Traceback (most recent call last):"
    assert lines[-1] == "ValueError: bad"


def test_json_is_a_line_of_application_log(pipe: tuple[int, int]) -> None:
    """With the fields that the schema has, whatever happened; `auto` is JSON where nobody sits at a terminal."""
    served = RequestRecord("GET", "/", "r\u20281", 0.0)
    served.trace_id, served.span_id = "ab" * 16, "cd" * 8
    token = CURRENT.set(served)
    try:
        text = written(pipe, record("ä\u2028", exc_info=error("bad"), folder="/a", tries=3), "auto")
    finally:
        CURRENT.reset(token)
    assert text.isascii()
    assert text.count("\n") == 1
    entry = json.loads(text)
    assert problems("application", entry) == []
    stack = entry["error"].pop("stack")
    assert "in error\n" in stack
    assert entry == {
        "@timestamp": "2026-09-21T14:13:20.250Z", "log.level": "warning", "message": "ä\\u2028", "service": "llm-router",
        "version": "1.0", "env": "test", "hostname": "host", "pid": 7, "process": "worker-0",
        "log.logger": "llm_router.cache", "trace.id": "ab" * 16, "span.id": "cd" * 8, "request_id": "r\\u20281",
        "error": {"name": "ValueError", "message": "bad"}, "data": {"folder": "/a", "tries": "3"},
    }  # fmt: skip


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_secret_is_told(pipe: tuple[int, int], form: Form) -> None:
    """In a message, an argument, an exception, a field."""
    made = record(f"{SECRET} %s", SECRET, exc_info=error(SECRET), password="hunter2", url=f"http://a:{SECRET}@b/")
    text = written(pipe, made, form)
    assert SECRET not in text
    assert "hunter2" not in text
    assert text.count("[REDACTED]") >= 5


def test_lines_are_bounded(pipe: tuple[int, int]) -> None:
    """Whatever is logged."""
    text = written(pipe, record("x" * 1_000_000), "json")
    assert len(text) < 10_000
    assert "more characters" in text


def test_a_message_that_does_not_fit_its_arguments_is_not_lost(pipe: tuple[int, int]) -> None:
    """It is shown as it is, with them."""
    assert "'%d of %d' with ('x',)" in written(pipe, record("%d of %d", "x"), "text")


def test_off_is_silence(pipe: tuple[int, int]) -> None:
    """Nothing is written."""
    with pytest.raises(BlockingIOError):
        written(pipe, record(), "off")


@pytest.mark.parametrize(
    ("environ", "is_coloured"),
    [({}, True), ({"TERM": "xterm", "NO_COLOR": ""}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
)
def test_a_terminal_gets_text_in_colours(environ: dict[str, str], is_coloured: bool) -> None:
    """Unless whoever sits there does not want them."""
    terminal, fd = pty.openpty()
    try:
        Console("worker-0", SERVICE, fd=fd, environ=environ).handle(record())
        text = os.read(terminal, 65536).decode()
    finally:
        os.close(fd)
        os.close(terminal)
    assert ("\x1b[33mWARNING\x1b[0m" in text) is is_coloured
    plain = re.sub("\x1b\\[[0-9;]*m", "", text)
    assert plain == "2026-09-21T14:13:20.250Z worker-0: WARNING llm_router.cache: it happened\r\n"


def test_nobody_is_waited_for(pipe: tuple[int, int]) -> None:
    """What a full pipe does not take is lost and counted; a line that was cut off is ended before the next one."""
    console = Console("worker-0", SERVICE, form="json", fd=pipe[1], environ={})
    long = record("y" * 5000)
    lines = 0
    while not console.dropped:
        console.handle(long)
        lines += 1
    assert lines > 5
    console.handle(long)
    assert console.dropped == 2
    received = os.read(pipe[0], 1 << 20).decode()
    console.handle(record("after"))
    received += os.read(pipe[0], 1 << 20).decode()
    whole = [line for line in received.split("\n")[:-1] if line.endswith("}")]
    assert len(whole) == lines - 1 + 1
    assert json.loads(whole[-1])["message"] == "after"
    assert console.dropped == 2


def test_there_may_be_no_stderr() -> None:
    """A closed one, or one whose reader left, is no reason to fail."""
    reading, writing = os.pipe()
    os.close(reading)
    console = Console("worker-0", SERVICE, fd=writing, environ={})
    console.handle(record())
    os.close(writing)
    console.handle(record())
    assert console.dropped == 2
    assert write_now(writing, "x") == "nothing"


# -- the supervisor's file --------------------------------------------------------------------------------


def test_lines_are_added_to_application_log(tmp_path: Path) -> None:
    """In a folder that may not be there yet, and in a new file after a rotation."""
    folder = tmp_path / "new" / "logs"
    file = AppendedFile(str(folder), "supervisor", SERVICE)
    file.handle(record("one"))
    (folder / "application.log").rename(folder / "application-20260131T120000Z.log")
    file.handle(record("two"))
    (line,) = (folder / "application.log").read_text().splitlines()
    entry = json.loads(line)
    assert problems("application", entry) == []
    assert (entry["message"], entry["process"]) == ("two", "supervisor")
    assert (folder / "application.log").stat().st_mode & 0o777 == 0o640
    assert folder.stat().st_mode & 0o777 == 0o750


def test_errors_are_in_error_log_too(tmp_path: Path) -> None:
    file = AppendedFile(str(tmp_path), "supervisor", SERVICE)
    for level, text in ((30, "careful"), (40, "it broke"), (50, "it ended")):
        file.handle(record(text, levelno=level))
    texts = {
        name: [json.loads(line)["message"] for line in (tmp_path / f"{name}.log").read_text().splitlines()]
        for name in ("application", "error")
    }
    assert texts == {"application": ["careful", "it broke", "it ended"], "error": ["it broke", "it ended"]}


def test_a_file_that_cannot_be_written_stops_nobody(tmp_path: Path) -> None:
    """A folder in its place, a file in place of the folder, a pipe that nobody reads."""
    (tmp_path / "a" / "application.log").mkdir(parents=True)
    (tmp_path / "b").touch()
    (tmp_path / "c").mkdir()
    os.mkfifo(tmp_path / "c" / "application.log")
    for name in "abc":
        AppendedFile(str(tmp_path / name), "supervisor", SERVICE).handle(record())
