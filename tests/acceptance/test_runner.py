"""Runner processes with the real default model: they answer, they keep strangers out, they never outlive their owner."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import os
import signal
import struct
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from llm_router.errors import BadModelFile, RunnerFailed
from llm_router.models.launch import RunnerSpec
from llm_router.processes.own_runners import OwnRunners, RunnerEvent, Running
from support.aio import run
from support.model import default_model
from support.wait import until

pytestmark = pytest.mark.model

NAME = "smollm2"
CHAT = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8, "temperature": 0}


def spec(**changes: Any) -> RunnerSpec:
    return RunnerSpec(**{"name": NAME, "path": str(default_model()), "context_size": 512, **changes})


class Client:
    """Speaks to one runner over a connection of its own."""

    def __init__(self, running: Running, key: str | None = None) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
        self._headers = {"content-type": "application/json", "authorization": f"Bearer {key or running.key}"}

    def send(self, method: str, path: str, body: object = None) -> http.client.HTTPResponse:
        self.connection.request(method, path, None if body is None else json.dumps(body), self._headers)
        return self.connection.getresponse()

    def ask(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """The status and the JSON of a reply; the connection is closed."""
        with closing(self.connection):
            reply = self.send(method, path, body)
            return reply.status, json.loads(reply.read())


async def call(action: Callable[[], Any]) -> Any:
    return await asyncio.to_thread(action)


async def state_of(runners: OwnRunners, wanted: str) -> None:
    async with asyncio.timeout(15):
        while runners.state(NAME) != wanted:  # the test asks about the state, not the event
            await asyncio.sleep(0.01)


@asynccontextmanager
async def one_runner(**changes: Any) -> AsyncIterator[Running]:
    async with OwnRunners() as runners:
        yield await runners.start(spec(**changes))


@pytest.fixture(scope="module")
def runner() -> Iterator[Running]:
    """One runner for the tests that only talk to it, kept by a loop of its own."""
    with asyncio.Runner() as loop:
        context = one_runner()
        yield loop.run(context.__aenter__())
        loop.run(context.__aexit__(None, None, None))


def test_ready_report_measures_the_load(runner: Running) -> None:
    """Load time and resident memory are of the order that the file has."""
    assert 0 < runner.load_s < 30
    assert 98_000_000 < runner.memory_bytes < 600_000_000
    assert (runner.context_size, runner.parallel, runner.embeddings) == (512, 2, True)


def test_chat_is_answered(runner: Running) -> None:
    """A reply in OpenAI's shape, under the name the runner was given, with usage."""
    status, reply = Client(runner).ask("POST", "/v1/chat/completions", {"model": "anything", **CHAT})
    assert status == 200
    assert reply["model"] == NAME
    assert reply["choices"][0]["message"]["content"]
    assert reply["usage"]["completion_tokens"] <= 8


def test_stream_is_answered(runner: Running) -> None:
    """Events one by one, usage in the last if asked for, [DONE] at the end."""
    body = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    client = Client(runner)
    with closing(client.connection):
        reply = client.send("POST", "/v1/chat/completions", body)
        assert reply.getheader("content-type") == "text/event-stream"
        events = [line.removeprefix("data: ") for line in reply.read().decode().splitlines() if line]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    assert text
    assert chunks[-1]["usage"]["completion_tokens"] == 8


def test_completion_and_schema_are_answered(runner: Running) -> None:
    """Plain completions, and replies held to a JSON schema."""
    status, reply = Client(runner).ask("POST", "/v1/completions", {"prompt": "One, two,", "max_tokens": 4})
    assert (status, bool(reply["choices"][0]["text"])) == (200, True)
    schema = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}
    body = {**CHAT, "max_tokens": 60, "response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
    status, reply = Client(runner).ask("POST", "/v1/chat/completions", body)
    assert status == 200
    assert list(json.loads(reply["choices"][0]["message"]["content"])) == ["city"]


def test_tools_are_accepted(runner: Running) -> None:
    """This model's template knows no tools: they are ignored, not refused."""
    tool = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
    status, _ = Client(runner).ask("POST", "/v1/chat/completions", {**CHAT, "tools": [tool]})
    assert status == 200


def test_embeddings_are_answered(runner: Running) -> None:
    """As numbers and as base64, also for a text longer than llama.cpp's usual batch would be."""
    status, reply = Client(runner).ask("POST", "/v1/embeddings", {"input": ["a", "word " * 400]})
    assert status == 200
    assert [len(item["embedding"]) for item in reply["data"]] == [576, 576]
    status, packed = Client(runner).ask("POST", "/v1/embeddings", {"input": "a", "encoding_format": "base64"})
    numbers = struct.unpack("<576f", base64.b64decode(packed["data"][0]["embedding"]))
    assert numbers == pytest.approx(reply["data"][0]["embedding"], abs=0.02)


def test_nothing_is_answered_without_the_key(runner: Running) -> None:
    """Other users of the machine can reach the port and get nothing but a health check."""
    stranger = Client(runner, key="guess")
    for method, path in (
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/embeddings"),
        ("GET", "/metrics"),
        ("GET", "/props"),
        ("GET", "/slots"),
    ):
        assert stranger.ask(method, path, CHAT if method == "POST" else None)[0] == 401, path
    assert stranger.ask("GET", "/health")[0] == 200


def test_too_long_a_prompt_is_refused(runner: Running) -> None:
    """The context is per request: a prompt beyond it is a 400 with the figures."""
    body = {**CHAT, "messages": [{"role": "user", "content": "word " * 600}]}
    status, reply = Client(runner).ask("POST", "/v1/chat/completions", body)
    assert status == 400
    assert reply["error"]["n_ctx"] == 512


def test_connections_are_kept_for_a_hundred_requests(runner: Running) -> None:
    """llama.cpp keeps a connection open, and closes it politely after its hundredth reply."""
    client = Client(runner)
    replies = []
    for _ in range(100):
        reply = client.send("GET", "/health")
        reply.read()
        replies.append(reply.getheader("connection"))
    assert replies[:99] == [None] * 99
    assert replies[99] == "close"


def test_a_stream_stops_when_its_client_leaves(runner: Running) -> None:
    """Closing the connection ends the generation: the slot is free at once."""
    client = Client(runner)
    reply = client.send(
        "POST", "/v1/completions", {"prompt": "Once", "stream": True, "ignore_eos": True, "n_predict": -1}
    )
    assert reply.readline().startswith(b"data: ")
    assert processing(runner) == 1
    reply.close()
    client.connection.close()
    until(lambda: processing(runner) == 0, timeout_s=2, what="the end of the generation")


def processing(runner: Running) -> int:
    client = Client(runner)
    with closing(client.connection):
        text = client.send("GET", "/metrics").read().decode()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("llamacpp:requests_processing "))


def test_without_embeddings_they_are_refused() -> None:
    """A runner that was told not to embed says so."""

    async def scenario() -> None:
        async with one_runner(embeddings=False) as running:
            status, reply = await call(lambda: Client(running).ask("POST", "/v1/embeddings", {"input": "a"}))
            assert status == 501
            assert "does not support embeddings" in reply["error"]["message"]

    run(scenario())


def test_a_killed_runner_is_started_again() -> None:
    """Kill -9: it is back on another port with the same key, and the owner heard of it all."""
    seen: list[RunnerEvent] = []

    async def scenario() -> None:
        async with OwnRunners(on_event=seen.append) as runners:
            first = await runners.start(spec())
            os.kill(first.pid, signal.SIGKILL)
            await state_of(runners, "backoff")
            assert runners.running == {}
            await state_of(runners, "ready")
            second = runners.running[NAME]
            assert (second.pid != first.pid, second.key) == (True, first.key)
            status, _ = await call(lambda: Client(second).ask("POST", "/v1/chat/completions", CHAT))
            assert status == 200
            with pytest.raises(RunnerFailed, match="has a runner already"):
                await runners.start(spec())
            await runners.stop(NAME)
            assert not psutil.pid_exists(second.pid)

    run(scenario(), timeout_s=40)
    assert [event.state for event in seen] == ["starting", "ready", "backoff", "starting", "ready", "stopping"]
    assert "was killed by signal 9" in seen[2].error
    assert seen[4].restarts == 1


def test_leaving_ends_what_is_still_loading() -> None:
    """Cancelling a start leaves no process behind, in whatever phase it was."""

    before = running_children()

    async def scenario() -> None:
        started = asyncio.Event()
        async with OwnRunners(on_event=lambda event: started.set()) as runners:
            loading = asyncio.create_task(runners.start(spec()))
            await started.wait()
            loading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await loading
            assert runners.state(NAME) is None
        assert running_children() == before

    run(scenario())


def test_an_answer_in_flight_is_finished_before_leaving() -> None:
    """Unloading a model does not cut off who is being answered."""

    async def scenario() -> None:
        async with OwnRunners() as runners:
            running = await runners.start(spec())
            client = Client(running)
            body = {"prompt": "Once", "max_tokens": 60, "ignore_eos": True}
            answer = asyncio.create_task(call(lambda: client.ask("POST", "/v1/completions", body)))
            await call(lambda: until(lambda: processing(running)))
            await runners.stop(NAME)
            status, reply = await answer
            assert (status, reply["usage"]["completion_tokens"]) == (200, 60)

    run(scenario())


def test_a_damaged_file_is_refused_by_its_header(tmp_path: Path) -> None:
    """Half a download of the real model starts no process."""
    half = tmp_path / "half.gguf"
    with default_model().open("rb") as whole:
        half.write_bytes(whole.read(5_000_000))
    before = running_children()

    async def scenario() -> None:
        async with OwnRunners() as runners:
            with pytest.raises(BadModelFile, match=r"is 5,000,000 bytes, its header promises 98,362,432"):
                await runners.start(spec(path=str(half)))
            assert running_children() == before

    run(scenario())


OWNER = """
    import asyncio, sys
    from llm_router.models.launch import RunnerSpec
    from llm_router.processes.own_runners import OwnRunners

    async def main():
        async with OwnRunners(on_event=lambda event: print(event.state, flush=True)) as runners:
            await runners.start(RunnerSpec(name="m", path=sys.argv[1], context_size=512))
            await asyncio.Event().wait()

    asyncio.run(main())
"""


@pytest.mark.parametrize("phase", ["starting", "ready"])
def test_a_runner_dies_with_its_owner(phase: str) -> None:
    """Kill -9 of the owner, while loading or serving: nothing is left 5 s later."""
    command = [sys.executable, "-c", textwrap.dedent(OWNER), str(default_model())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        while owner.stdout.readline().strip() != phase:
            assert owner.poll() is None
        children = until(psutil.Process(owner.pid).children, what="the runner's process")
        owner.kill()
    until(lambda: not any(map(is_runner, children)), timeout_s=5, what="the end of the runner")


def running_children() -> set[psutil.Process]:
    return {child for child in psutil.Process().children() if is_runner(child)}


def is_runner(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
