"""The five log files of a program of one's own, as its logger writes them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from llm_router import ConfigError, StructuredLogger
from llm_router.observe.logs.schema import FILES, FileName, problems
from support.aio import run

SECRET = "sk-ant-api03-abcdefghijklmnopqrstuvwxyz0123456789"


class Folder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self, file: FileName) -> list[dict[str, Any]]:
        path = self.path / f"{file}.log"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    """Whatever a test wrote there is as the schema says, and holds no secret."""
    made = Folder(tmp_path / "logs")
    yield made
    for file in FILES:
        for line in made.lines(file):
            assert problems(file, line) == [], line
            assert SECRET not in json.dumps(line)


def logger(folder: Folder, **options: Any) -> StructuredLogger:
    return StructuredLogger(**{"log_dir": folder.path, "console": "off", "env": {}, **options})


def test_messages_by_level(folder: Folder) -> None:
    """With what is said about them; errors are in error.log when the call returns, with the exception."""
    own = logger(folder, log_level="warn", service_name="shop", version="1.2", environment="test")
    own.debug("no")
    own.info("no")
    own.warn("Slow", {"request_id": "r-1", "seconds": 3, "api_key": SECRET, "note": f"with {SECRET}"})
    try:
        raise ValueError(f"bad {SECRET}")
    except ValueError as error:
        own.error("Failed", error, {"order": 7})
    (failed,) = folder.lines("error")
    assert (failed["error"]["name"], failed["data"]) == ("ValueError", {"order": "7"})
    assert "stack" in failed["error"]
    own.close()
    own.close()
    slow, same = folder.lines("application")
    assert same == failed
    assert (slow["log.level"], slow["message"], slow["request_id"]) == ("warning", "Slow", "r-1")
    assert (slow["service"], slow["version"], slow["env"]) == ("shop", "1.2", "test")
    assert slow["data"]["seconds"] == "3"
    assert slow["data"]["api_key"] == "[REDACTED]"


def test_the_level_changes_at_run_time(folder: Folder) -> None:
    """One that there is not is refused, from the environment too."""
    own = logger(folder, env={"LOG_LEVEL": "ERROR"})
    own.warning("one")
    own.set_level("debug")
    own.debug("two")
    with pytest.raises(ConfigError, match="'loud' is no level; there are debug, info"):
        own.set_level("loud")
    own.close()
    assert [line["message"] for line in folder.lines("application")] == ["two"]
    with pytest.raises(ConfigError, match="log_level: 'x' is no level"):
        logger(folder, env={"LOG_LEVEL": "x"})


def test_our_own_modules_write_there_too(folder: Folder) -> None:
    """What `llm_router` has to say, until the logger is closed."""
    own = logger(folder)
    logging.getLogger("llm_router.somewhere").warning("from within")
    own.close()
    logging.getLogger("llm_router.somewhere").warning("too late")
    assert [line["message"] for line in folder.lines("application")] == ["from within"]


def test_inferences_and_models_as_the_examples_log_them(folder: Folder) -> None:
    """Fields of their own types, an audit line, and metrics; prompts never."""
    own = logger(folder)
    context = {"id": "i1", "model": "m", "strategy": "quick", "prompt": f"my {SECRET}", "options": {"maxTokens": 3}}
    own.inference_start(context)
    own.inference_complete(context, {"model": "m", "tokens": 5, "latency": 12.5, "cached": False})
    own.inference_error(context, TimeoutError(f"late {SECRET}"))

    class Model:
        id, name, format, size = "m1", "m", "gguf", 100

    own.model_load(Model(), 1500)
    own.model_unload(Model())
    assert run(own.flush())
    own.close()
    lines = folder.lines("application")
    assert [line["message"] for line in lines] == [
        "Inference started",
        "Inference completed",
        "Inference failed",
        "Model loaded",
        "Model unloaded",
    ]
    assert lines[0]["inference"] == {"id": "i1", "model": "m", "strategy": "quick", "prompt_length": 52}
    assert lines[1]["inference"] == {
        "id": "i1", "strategy": "quick", "model": "m", "tokens": 5, "latency": 12.5, "cached": False, "success": True,
    }  # fmt: skip
    assert lines[3]["model"] == {"id": "m1", "name": "m", "format": "gguf", "size": 100, "load_duration": 1500.0}
    events = [line["event"] for line in folder.lines("audit")]
    assert events == ["inference_start", "inference_complete", "inference_error", "model_load", "model_unload"]
    metrics = {line["metric"]["name"]: line["metric"]["value"] for line in folder.lines("metrics")}
    assert metrics == {"inference_latency": 12.5, "tokens_generated": 5.0, "model_load_duration": 1500.0}


def test_odd_types_stay_texts(folder: Folder) -> None:
    """One type per field: what is of another goes under `data`."""
    own = logger(folder)
    own.info("odd", {"inference": {"id": 5, "tokens": "many", "latency": float("nan"), "mine": 1, "cached": 1}})
    own.info("odd", {"inference": "none", "model": {"size": 1.5}, "args": 1, "message": "m", "nothing": None})
    own.audit("done", {"event": "x", "success": True})
    own.metrics("level", 3, {"a": 1})  # type: ignore[dict-item]  # whatever comes
    own.close()
    first, second = folder.lines("application")
    assert first["inference"] == {"id": "5"}
    assert set(first["data"]) == {"tokens", "latency", "mine", "cached"}
    assert set(second["data"]) == {"inference", "size", "args", "message"}
    assert folder.lines("audit")[0]["event"] == "done"


def test_one_line_for_each_request(folder: Folder) -> None:
    """By the middleware, with the id that lines meanwhile have too; or said by hand."""
    own = logger(folder)

    async def show(request: Request) -> PlainTextResponse:
        own.info("meanwhile")
        return PlainTextResponse("hello")

    app = Starlette(routes=[Route("/x/{id}", show)], middleware=[Middleware(own.middleware)])
    scope: dict[str, Any] = {
        "type": "http",
        "method": "GET",
        "path": "/x/1",
        "query_string": b"api_key=" + SECRET.encode(),
        "root_path": "",
        "headers": [(b"authorization", b"Bearer " + SECRET.encode()), (b"user-agent", b"test")],
        "client": ("192.0.2.1", 9),
    }

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None: ...

    run(app(dict(scope), receive, send))
    own.access(
        Request(scope), PlainTextResponse("gone", 404), {"duration": 1500, "request_id": "by-hand", "route": "/x"}
    )
    own.access(scope, 204)
    with pytest.raises(ValueError, match="no request, but int"):
        own.access(5, 200)
    with pytest.raises(ValueError, match="no request, but dict"):
        own.access({"method": "GET", "path": "/", "headers": {"host": "x"}}, 200)
    with pytest.raises(ValueError, match="no response, but dict"):
        own.access(scope, {"statusCode": 200})
    own.close()
    first, second, third = folder.lines("access")
    assert (first["request"]["path"], first["route"], first["response"]["contentLength"]) == ("/x/1", "/x/{id}", 5)
    assert first["request"]["headers"]["authorization"] == "[REDACTED]"
    assert (second["response"]["statusCode"], second["duration"], second["request_id"]) == (404, 1500.0, "by-hand")
    assert third["response"]["statusCode"] == 204
    (said,) = folder.lines("application")
    assert (said["request_id"], said["trace.id"]) == (first["request_id"], first["trace.id"])


def test_a_folder_that_cannot_be_written_harms_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One line says so, and what is lost is counted."""
    (tmp_path / "file").write_text("")
    own = StructuredLogger(log_dir=tmp_path / "file" / "logs", console="off", env={})
    own.info("lost")
    own.error("lost too")
    own.audit("lost as well")
    assert own.statistics().problem
    own.close()
    assert sum(own.statistics().dropped.values()) >= 1
    assert caplog.text.count("cannot be written") == 1


def test_stderr_gets_the_messages_too(folder: Folder, capfd: pytest.CaptureFixture[str]) -> None:
    """As JSON where nobody watches, with the same care."""
    own = logger(folder, console="json")
    own.info("hello", {"password": SECRET, "name": "n"})
    own.error("broken", ValueError(SECRET))
    own.close()
    err = capfd.readouterr().err
    lines = [json.loads(line) for line in err.splitlines()]
    assert [line["message"] for line in lines] == ["hello", "broken"]
    assert SECRET not in err
