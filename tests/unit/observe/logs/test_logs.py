"""What happens is in the right files with the right fields; nothing that goes wrong with files reaches a request."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from llm_router.observe.logs.files import RETRY_S
from llm_router.observe.logs.logs import INFERENCE_LOGGER, Logs
from llm_router.observe.logs.redact import REDACTED
from llm_router.observe.logs.schema import FILES, FileName, problems
from llm_router.observe.logs.settings import LogSettings
from llm_router.signals import CURRENT
from llm_router.testing import FakeClock
from support.log_records import SERVICE, asked, entries, failed, inferred
from support.wait import until

_SETTINGS = {field.name for field in msgspec.structs.fields(LogSettings)} - {"console"}
SEVERITIES = {"limit": "warning", "internal": "critical", "unreachable": "error"}


@contextmanager
def logs(folder: Path, *, clock: Any = None, starts: bool = True, **values: Any) -> Iterator[Logs]:
    """Logs of a process; what they hold is written when the block ends, and checked against the schema."""
    settings = LogSettings(**{name: values.pop(name) for name in list(values) if name in _SETTINGS})
    values.setdefault("severities", SEVERITIES)
    found = Logs(settings, str(folder), process="worker-0", service=SERVICE, clock=clock or FakeClock(), **values)
    if starts:
        found.start()
    try:
        yield found
    finally:
        found.close()
    for file in FILES:
        if folder.is_dir() and (folder / f"{file}.log").is_file():
            assert [problems(file, entry) for entry in entries(folder, file) if problems(file, entry)] == []


def messages(folder: Path, file: FileName) -> list[str]:
    return [entry["message"] for entry in entries(folder, file)]


# -- requests -----------------------------------------------------------------------------------------


def test_each_request_has_one_access_line(tmp_path: Path) -> None:
    """And an inference one of its own in application.log."""
    with logs(tmp_path) as found:
        found.finished(asked(), 1000.1)
        found.finished(inferred(), 1000.2)
    assert messages(tmp_path, "access") == ["HTTP Request"] * 2
    assert messages(tmp_path, "application") == ["Inference completed"]
    assert messages(tmp_path, "error") == messages(tmp_path, "audit") == []


def test_failed_inferences_are_in_the_error_file_at_once(tmp_path: Path) -> None:
    """Before anything else of them is written, and with the severity of their kind; the caller's own are warnings."""
    with logs(tmp_path, starts=False) as found:
        found.finished(failed("0123456789abcdef-1"), 1000.1)
        found.finished(failed("0123456789abcdef-2", error_type="internal"), 1000.1)
        found.finished(failed("0123456789abcdef-3", error_type="limit", status=429), 1000.1)
        assert [entry["log.level"] for entry in entries(tmp_path, "error")] == ["error", "critical"]
        assert messages(tmp_path, "access") == []
    assert [entry["log.level"] for entry in entries(tmp_path, "application")] == ["error", "critical", "warning"]
    assert [entry["inference"]["id"] for entry in entries(tmp_path, "application")] == [
        f"0123456789abcdef-{number}" for number in (1, 2, 3)
    ]
    assert len(messages(tmp_path, "access")) == 3


def test_successes_are_sampled_and_say_so(tmp_path: Path) -> None:
    """Both lines or none; errors and slow ones are always written, and stand for themselves."""
    with logs(tmp_path, sample_ratio=0.1, slow_s=2.0, rng=random.Random(7)) as found:
        for _ in range(1000):
            found.finished(inferred(), 1000.1)
        found.finished(asked("slow"), 1002.0)
        found.finished(asked("missing", status=404, error_type="not_found", error="no such path"), 1000.1)
        found.finished(failed(), 1000.1)
    access = entries(tmp_path, "access")
    sampled = [entry for entry in access if entry["sample_rate"] == 0.1]
    assert 60 < len(sampled) < 140
    assert messages(tmp_path, "application").count("Inference completed") == len(sampled)
    assert [entry["request_id"] for entry in access if entry["sample_rate"] == 1][:2] == ["slow", "missing"]
    assert len(access) - len(sampled) == 3


def test_access_lines_can_be_off(tmp_path: Path) -> None:
    """Inferences are still told."""
    with logs(tmp_path, access=False) as found:
        found.finished(asked(), 1000.1)
        found.finished(inferred(), 1000.1)
    assert messages(tmp_path, "access") == []
    assert messages(tmp_path, "application") == ["Inference completed"]


def test_the_level_of_inferences_is_that_of_their_module(tmp_path: Path) -> None:
    """And follows `apply` while requests are served."""
    with logs(tmp_path, levels={INFERENCE_LOGGER: "warning"}) as found:
        found.finished(inferred(), 1000.1)
        found._writer.close(5)
        assert messages(tmp_path, "application") == []
        found.apply(LogSettings(level="debug", content=True))
        found.finished(inferred(response_body=b"hi"), 1000.1)
        found._writer._drain()
        found.apply(LogSettings(level="critical"))
        found.finished(failed(), 1000.1)
    assert messages(tmp_path, "application") == ["Inference started", "Inference completed"]
    assert entries(tmp_path, "application")[1]["inference"]["response_body"] == "hi"
    assert messages(tmp_path, "error") == []


def test_the_queue_is_bounded_and_drops_are_counted(tmp_path: Path) -> None:
    """Each lost line once, with its reason."""
    with logs(tmp_path, starts=False, queue_lines=2) as found:
        for _ in range(3):
            found.finished(inferred(), 1000.1)
        found.metric("up", 1, {})
        assert found.statistics().queued == 2
        assert found.statistics().dropped == {"queue-full": 5, "write-failed": 0}
    assert found.statistics()[0] == 0
    found.finished(asked(), 1000.1)
    assert found.statistics().dropped["queue-full"] == 6


def test_large_lines_that_wait_are_bounded(tmp_path: Path) -> None:
    """By their bytes: as many as there may be lines would be too much memory."""
    body = b"x" * 6000
    with logs(tmp_path, starts=False, content=True, max_large_bytes=10_000) as found:
        for _ in range(4):
            found.finished(inferred(request_body=body), 1000.1)
        assert found.statistics().dropped["queue-full"] == 4  # two requests, two lines each
        found._writer._drain()
        found.finished(inferred(request_body=body), 1000.1)
        assert found.statistics().queued == 2
    assert len(messages(tmp_path, "access")) == 3


def test_a_record_that_cannot_be_told_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is said; the next one is written."""
    with logs(tmp_path) as found:
        found.finished(asked(path=cast("str", 5)), 1000.1)
        found.finished(failed(path=cast("str", 5)), 1000.1)
        found.finished(asked(), 1000.1)
    assert len(messages(tmp_path, "access")) == 1
    assert caplog.text.count("a log line could not be made: TypeError") == 3  # two in the thread, one at once


def test_lines_are_written_while_it_runs(tmp_path: Path) -> None:
    """Without being asked: the thread wakes, writes and sleeps again."""
    with logs(tmp_path) as found:
        for number in range(1, 4):
            found.finished(asked(), 1000.1)
            until(lambda number=number: len(messages(tmp_path, "access")) == number)  # type: ignore[misc]
            until(lambda: found._writer.is_idle)
        assert found.cpu_s > 0
        assert found.statistics() == (0, {"queue-full": 0, "write-failed": 0}, 3, "")


def test_twenty_thousand_at_once_are_all_written(tmp_path: Path) -> None:
    """From several threads: nothing is lost or torn."""
    with logs(tmp_path, queue_lines=50_000) as found:

        def work() -> None:
            for number in range(5000):
                found.finished(asked(f"0123456789abcdef-{number}"), 1000.1)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert Counter(entry["request_id"] for entry in entries(tmp_path, "access")).most_common()[-1][1] == 4
    assert found.statistics().written == 20_000


# -- everything else ----------------------------------------------------------------------------------


def test_audit_events_are_written_at_once(tmp_path: Path) -> None:
    """Known fields with their types, all others as texts, secrets by neither name nor shape."""
    with logs(tmp_path, starts=False) as found:
        found.audit(
            "key_created", actor="admin", key_id="k1", success=True, scopes=["chat", "admin"], password="hunter22",
            note="sk-0123456789abcdef", limit=5, actor_id=None, event="mine", timestamp="never", load_duration="long",
        )  # fmt: skip
        (entry,) = entries(tmp_path, "audit")
    assert entry["message"] == "Audit: key_created"
    assert entry["event"] == "key_created"
    assert entry["timestamp"] == entry["@timestamp"]
    assert (entry["actor"], entry["key_id"], entry["success"]) == ("admin", "k1", True)
    assert "actor_id" not in entry
    assert entry["data"] == {
        "scopes": '["chat","admin"]',
        "password": REDACTED,
        "note": REDACTED,
        "limit": "5",
        "event": "mine",
        "timestamp": "never",
        "load_duration": "long",
    }


def test_models_are_told_in_two_files(tmp_path: Path) -> None:
    """Their loading and unloading."""
    with logs(tmp_path) as found:
        found.model_loaded("m1", name="smollm2", format="gguf", size_bytes=98_000_000, load_s=1.5)
        found.model_unloaded("m1", name="smollm2", format="gguf")
    first, second = entries(tmp_path, "application")
    model = {"id": "m1", "name": "smollm2", "format": "gguf"}
    assert first["model"] == {**model, "size": 98_000_000, "load_duration": 1500.0}
    assert second["model"] == model
    assert [(e["event"], e["model_id"], e.get("load_duration")) for e in entries(tmp_path, "audit")] == [
        ("model_load", "m1", 1500.0),
        ("model_unload", "m1", None),
    ]


def test_metrics_are_written(tmp_path: Path) -> None:
    """With name, value and labels; what is no number is left out."""
    with logs(tmp_path) as found:
        found.metric("llm_router_models_loaded", 2.0, {"format": "gguf"})
        found.metric("llm_router_latency", float("nan"), {})
    (entry,) = entries(tmp_path, "metrics")
    assert entry["metric"]["name"] == "llm_router_models_loaded"
    assert (entry["metric"]["value"], entry["metric"]["labels"]) == (2.0, {"format": "gguf"})


def test_what_modules_say_is_in_the_files(tmp_path: Path) -> None:
    """With the request that is served, the exception, and whatever else they gave; errors also in error.log, at once."""
    logger = logging.getLogger("llm_router.part")
    with logs(tmp_path) as found:
        found.install()
        token = CURRENT.set(inferred("sk-0123456789abcdef"))
        try:
            logger.debug("not wanted")
            logger.info("with %s", "sk-0123456789abcdef", extra={"api_key": "abc", "count": 5})
            try:
                raise ValueError("password=hunter22")
            except ValueError:
                logger.exception("it\nfailed")
            assert messages(tmp_path, "error") == ["it\\x0afailed"]
        finally:
            CURRENT.reset(token)
        unfit = {"name": "llm_router.part", "levelno": logging.WARNING, "msg": "bad %d", "args": ("number",)}
        found.handler.handle(logging.makeLogRecord(unfit))
        found.uninstall()
        logger.warning("too late")
    info, error = entries(tmp_path, "application")[:2]
    assert (info["message"], info["log.level"], info["log.logger"]) == (f"with {REDACTED}", "info", "llm_router.part")
    assert info["data"] == {"api_key": REDACTED, "count": "5"}
    assert (info["request_id"], info["trace.id"]) == (REDACTED, inferred().trace_id)
    assert error["error"]["name"] == "ValueError"
    assert error["error"]["message"] == f"password={REDACTED}"
    assert "hunter22" not in error["error"]["stack"]
    assert entries(tmp_path, "error") == [error]
    assert len(entries(tmp_path, "application")) == 3
    assert "bad" in entries(tmp_path, "application")[2]["message"]


def test_levels_of_loggers_can_be_changed_and_are_given_back(tmp_path: Path) -> None:
    """One by one, while it runs."""
    part, other = logging.getLogger("llm_router.levels.part"), logging.getLogger("llm_router.levels.other")
    before = logging.getLogger("llm_router").level
    with logs(tmp_path, level="warning", levels={"llm_router.levels.part": "debug"}) as found:
        found.install()
        assert (part.getEffectiveLevel(), other.getEffectiveLevel()) == (logging.DEBUG, logging.WARNING)
        found.apply(LogSettings(levels={"llm_router.levels": "error"}))
        assert (part.getEffectiveLevel(), other.getEffectiveLevel()) == (logging.ERROR, logging.ERROR)
    assert logging.getLogger("llm_router").level == before
    assert part.level == logging.NOTSET


def test_library_lines_heed_the_levels(tmp_path: Path) -> None:
    """Of the logger that they name."""
    with logs(tmp_path, level="warning") as found:
        found.install()
        found.log("info", "not wanted")
        found.log("error", "failed", KeyError("x"), user="me")
    (entry,) = entries(tmp_path, "application")
    assert entry["error"]["name"] == "KeyError"
    assert entry["data"] == {"user": "me"}


# -- trouble ------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_stops_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said once on stderr, though nobody made a handler for that; what is lost is counted, and what may not be lost is there when the folder is."""
    monkeypatch.setattr(logging.getLogger("llm_router.logs"), "propagate", False)  # pytest's own handlers are no stderr
    folder, clock = tmp_path / "taken", FakeClock()
    folder.write_text("a file")
    with logs(folder, clock=clock) as found:
        for _ in range(3):
            found.finished(asked(), 1000.1)
        found.audit("key_created")
        until(lambda: found.statistics().dropped["write-failed"] == 2)
        assert "access.log: Not a directory" in found.statistics().problem
        assert found.statistics().queued == 2
        folder.unlink()
        clock.advance(RETRY_S)
        until(lambda: not found.statistics().problem)
        assert (messages(folder, "access"), messages(folder, "audit")) == (["HTTP Request"], ["Audit: key_created"])
    stderr = capfd.readouterr().err
    assert stderr.count("cannot be written: Not a directory") == 1
    assert f"log files in {folder} cannot be written" in stderr
    assert "are written again; 2 lines were lost" in stderr
    assert stderr.count("\n") == 2


def test_one_file_that_fails_takes_no_other_with_it(tmp_path: Path) -> None:
    """A full disk for one is none for the others."""
    (tmp_path / "access.log").symlink_to("/dev/full")
    with logs(tmp_path) as found:
        found.finished(inferred(), 1000.1)
        until(lambda: found.statistics().problem)
        assert found.statistics().problem == "access.log: No space left on device"
        (tmp_path / "access.log").unlink()
    assert messages(tmp_path, "application") == ["Inference completed"]


def test_trouble_goes_where_stderr_is_made(tmp_path: Path) -> None:
    """If a handler shows what our loggers say, that is where it is said, in its form."""
    shown: list[str] = []

    class Shows(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            shown.append(record.getMessage())

    (tmp_path / "access.log").symlink_to("/dev/full")
    with logs(tmp_path, console=Shows()) as found:
        found.install()
        found.finished(asked(), 1000.1)
        until(lambda: shown)
        (tmp_path / "access.log").unlink()
    assert "No space left on device" in shown[0]
    assert not any("cannot be written" in message for message in messages(tmp_path, "application"))


def test_a_disk_that_hangs_holds_nobody_up(tmp_path: Path) -> None:
    """Neither requests nor, longer than allowed, the end."""
    hangs = threading.Event()
    found = Logs(LogSettings(queue_lines=5), str(tmp_path), process="worker-0", service=SERVICE)
    found._files["access"].write = lambda lines: hangs.wait(30)  # type: ignore[method-assign,assignment]
    found.start()
    for _ in range(10):
        found.finished(asked(), 1000.1)
    begun = time.monotonic()
    found.close(0.1)
    assert time.monotonic() - begun < 5
    assert found.statistics().dropped["queue-full"] >= 5
    hangs.set()


KILLED = """
import sys
from llm_router.observe.logs.logs import Logs
from llm_router.observe.logs.service import Service
from llm_router.observe.logs.settings import LogSettings
from support.log_records import failed
logs = Logs(LogSettings(), sys.argv[1], process="worker-0", service=Service())
logs.start()
number = 0
while True:
    number += 1
    logs.audit("counted", key_id=str(number))
    logs.finished(failed(f"0123456789abcdef-{number}"), 1000.1)
    print(number, flush=True)
"""


def test_a_kill_loses_no_audit_or_error_line(tmp_path: Path) -> None:
    """Every one that was there when the call returned is in its file, and whole."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 200:
            break
    process.send_signal(signal.SIGKILL)
    told = max([200, *(int(line) for line in process.stdout.read().split("\n")[:-1])])
    process.stdout.close()
    process.wait(10)
    assert [entry["key_id"] for entry in entries(tmp_path, "audit")][:told] == [str(n + 1) for n in range(told)]
    errors = entries(tmp_path, "error")
    assert [entry["request_id"] for entry in errors][:told] == [f"0123456789abcdef-{n + 1}" for n in range(told)]


def test_rotation_loses_no_line(tmp_path: Path) -> None:
    """While lines are written, and with another process's writer on the same files."""
    with (
        logs(tmp_path, rotates=True, max_file_bytes=20_000, compress=False, wall=time.time) as keeper,
        logs(tmp_path) as worker,
    ):
        for number in range(500):
            worker.finished(asked(f"0123456789abcdef-{number}"), 1000.1)
            keeper.finished(asked(f"0123456789abcdef-{number + 500}"), 1000.1)
            if number % 50 == 0:
                until(lambda: not worker.statistics().queued and not keeper.statistics().queued)
                keeper.sweep()
    files = list(tmp_path.glob("access*.log"))
    assert len(files) > 3
    ids = [json.loads(line)["request_id"] for path in files for line in path.read_bytes().splitlines() if line]
    assert sorted(ids) == sorted(f"0123456789abcdef-{number}" for number in range(1000))


def test_it_shows_its_state(tmp_path: Path) -> None:
    """What waits, what was lost and what is wrong."""
    with logs(tmp_path, starts=False) as found:
        found.finished(asked(), 1000.1)
        assert "worker-0" in repr(found)
        assert "queued=1" in repr(found)
