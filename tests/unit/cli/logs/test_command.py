"""`llm-router logs` as it is typed."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_router.observe.timestamp import timestamp
from support.wait import until

SOURCES = Path(__file__).parents[4] / "src"
START_S = 1_790_000_000.0


def access(second: float, *, status: int = 200, model: str = "small", trace: str = "") -> bytes:
    entry: dict[str, Any] = {
        "@timestamp": timestamp(START_S + second), "log.level": "error" if status >= 500 else "info",
        "message": "HTTP Request", "process": "worker-0", "request_id": f"request-{second:g}",
        "request": {"method": "POST", "url": "/v1/chat/completions", "path": "/v1/chat/completions", "ip": "::1"},
        "response": {"statusCode": status}, "duration": 10.0 * second, "routing": {"model": model},
    }  # fmt: skip
    if trace:
        entry["trace.id"] = trace
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Logs of a router: requests of seconds 1 to 6, of which 3 and 4 failed, an event and a metric."""
    logs = tmp_path / "data" / "logs"
    logs.mkdir(parents=True)
    (logs / "access-20260131T120000Z.log.gz").write_bytes(gzip.compress(access(1) + access(2, trace="ab" * 16)))
    (logs / "access.log").write_bytes(
        access(3, status=502) + access(4, status=500, model="large") + access(5) + access(6, trace="ab" * 16)
    )
    event = {"@timestamp": timestamp(START_S + 4.5), "log.level": "info", "process": "control", "event": "key_created"}
    (logs / "audit.log").write_text(json.dumps(event) + "\n")
    metric = {
        "@timestamp": timestamp(START_S + 4.6),
        "process": "control",
        "metric": {"name": "m", "value": 1.0, "labels": {}},
    }
    (logs / "metrics.log").write_text(json.dumps(metric) + "\n")
    return tmp_path


def command(folder: Path, *words: str) -> tuple[list[str], dict[str, str]]:
    env = {
        "PATH": os.defpath, "HOME": str(folder), "DATA_DIR": str(folder / "data"), "PYTHONPATH": str(SOURCES),
        "COLUMNS": "200",
    }  # fmt: skip
    return [sys.executable, "-m", "llm_router", "logs", *words], env


def logs(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    line, env = command(folder, *words)
    return subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True, timeout=30, check=False)


def seconds(printed: str) -> list[str]:
    """The requests that were shown, by their second."""
    return [line.rpartition("[request-")[2].rstrip("]") for line in printed.splitlines() if "[request-" in line]


def test_all_files_but_metrics_are_read_together(folder: Path) -> None:
    """In order of time, rotated ones too."""
    result = logs(folder)
    assert (result.returncode, result.stderr) == (0, "")
    assert seconds(result.stdout) == ["1", "2", "3", "4", "5", "6"]
    assert result.stdout.splitlines()[4] == f"{timestamp(START_S + 4.5)} control  key_created"
    assert "\x1b" not in result.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--where", "status>=500"], ["3", "4"]),
        (["--where", 'status >= 500 and model == "large"'], ["4"]),
        (["-w", "duration > 45ms"], ["5", "6"]),
        (["--lines", "2", "--file", "access"], ["5", "6"]),
        (["-n", "1", "--where", "model == small and status >= 500"], ["3"]),
        (["--request", "request-5"], ["5"]),
        (["--trace", "AB" * 16], ["2", "6"]),
        (["--trace", "abab", "--where", "duration > 30"], ["6"]),
        (["--since", timestamp(START_S + 5)], ["5", "6"]),
        (["--since", "2026-09-22"], []),
        (["--since", "1m"], []),
        (["--lines", "0", "--file", "access", "--file", "audit"], ["1", "2", "3", "4", "5", "6"]),
    ],
)
def test_lines_are_chosen(folder: Path, words: list[str], expected: list[str]) -> None:
    """By what they say, by request, by trace, by time, by number."""
    result = logs(folder, *words)
    assert result.returncode == 0, result.stderr
    assert seconds(result.stdout) == expected


def test_json_is_what_stands_in_the_files(folder: Path) -> None:
    """For other programs."""
    result = logs(folder, "--json", "--file", "access", "--lines", "2")
    assert result.stdout.encode() == access(5) + access(6, trace="ab" * 16)


def test_json_does_not_steer_a_terminal(folder: Path) -> None:
    """And stays what it is."""
    text = "\x9b\u2028\U000e0001"
    (folder / "data/logs/application.log").write_text(json.dumps({"message": text}, ensure_ascii=False) + "\n")
    result = logs(folder, "--json", "--file", "application")
    assert result.stdout.strip().isprintable()
    assert json.loads(result.stdout) == {"message": text}


def test_metrics_are_asked_for(folder: Path) -> None:
    """By name, or with all."""
    assert logs(folder, "--file", "metrics").stdout == f"{timestamp(START_S + 4.6)} control  m 1\n"
    assert len(logs(folder, "--file", "all").stdout.splitlines()) == 8


def test_a_field_that_nothing_has_is_told(folder: Path) -> None:
    """Only to those who got nothing."""
    result = logs(folder, "--where", "stauts >= 500")
    assert (result.returncode, result.stdout) == (0, "")
    assert result.stderr == "llm-router: no line that was read has a field 'stauts'; did you mean 'status'?\n"
    assert logs(folder, "--where", "stauts >= 500 or status >= 500").stderr == ""


def test_files_that_cannot_be_read_are_told(folder: Path) -> None:
    """And the others are shown."""
    (folder / "data/logs/access.log").unlink()
    (folder / "data/logs/access.log").mkdir()
    result = logs(folder)
    assert (result.returncode, seconds(result.stdout)) == (0, ["1", "2"])
    assert result.stderr == f"llm-router: {folder}/data/logs/access.log: Is a directory\n"


def test_where_they_are_can_be_said(folder: Path) -> None:
    """Then no configuration is read, which may be another machine's."""
    (folder / "llm-router.yaml").write_text("models: [")
    assert logs(folder).returncode == 2
    result = logs(folder, "--log-dir", str(folder / "data/logs"))
    assert (result.returncode, len(seconds(result.stdout))) == (0, 6)


class Following:
    """`llm-router logs --follow`, and what it printed so far."""

    def __init__(self, folder: Path, *words: str) -> None:
        line, env = command(folder, "--follow", *words)
        self.path = folder / "printed"
        with self.path.open("wb") as printed:
            self.process = subprocess.Popen(line, cwd=folder, env=env, stdout=printed, stderr=subprocess.PIPE)

    def sees(self, *expected: str) -> None:
        until(lambda: seconds(self.path.read_text()) == list(expected), what=f"lines {expected}")


@pytest.fixture
def follow(folder: Path) -> Iterator[Any]:
    running: list[Following] = []

    def start(*words: str) -> Following:
        running.append(Following(folder, *words))
        return running[-1]

    yield start
    for following in running:
        following.process.kill()
        following.process.communicate()


def test_following_goes_on_through_rotation(folder: Path, follow: Any) -> None:
    """Until Ctrl-C, which is no failure."""
    path = folder / "data/logs/access.log"
    following = follow("--where", "status == 200", "--lines", "1")
    following.sees("6")
    with path.open("ab") as file:
        file.write(access(7) + access(8, status=500) + access(9)[:20])
    following.sees("6", "7")
    with path.open("ab") as file:
        file.write(access(9)[20:])
    path.rename(folder / "data/logs/access-20260201T120000Z.log")
    path.write_bytes(access(10))
    following.sees("6", "7", "9", "10")
    following.process.send_signal(signal.SIGINT)
    _, complaints = following.process.communicate(timeout=10)
    assert (following.process.returncode, complaints) == (0, b"")


def test_files_may_come_later(tmp_path: Path) -> None:
    """Whoever follows a router that is not there yet waits for it."""
    (tmp_path / "data").mkdir()
    following = Following(tmp_path)
    try:
        # Nothing tells from outside that it follows: what it prints of a file that comes later does, whenever it comes.
        logs_dir = tmp_path / "data" / "logs"
        logs_dir.mkdir()
        (logs_dir / "access.log").write_bytes(access(1))
        following.sees("1")
        assert following.process.poll() is None
    finally:
        following.process.kill()
        following.process.communicate()


def test_whoever_reads_may_leave(folder: Path) -> None:
    """`llm-router logs --follow | head -1` ends without a complaint."""
    line, env = command(folder, "--follow")
    with subprocess.Popen(line, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        path = folder / "data/logs/access.log"
        deadline = time.monotonic() + 20
        while process.poll() is None and time.monotonic() < deadline:
            with path.open("ab") as file:
                file.write(access(11))
            try:
                process.wait(0.2)
            except subprocess.TimeoutExpired:
                continue
        assert process.stderr.read() == b""
        assert process.returncode == 1
