"""The running program with the real default model: what callers, operators and scrapes see, and what a kill costs."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import openai
import pytest

from llm_router.testing import ScriptedBackend
from support.model import default_model
from support.serving import SOURCES, Scrape, Serving, is_alive
from support.wait import until

pytestmark = pytest.mark.model

FILE = "smollm2-135m-instruct"
MODEL = "HuggingFaceTB/SmolLM2"  # named as on the hub: the slash must not confuse paths, files or labels
GUARDED = "guarded"
CONTEXT = 2048

CONFIG = f"""
backends:
  - name: elsewhere
    url: URL
models:
  - name: {MODEL}
    file: {FILE}
    runner: {{context_size: {CONTEXT}, parallel: 2}}
  - name: {GUARDED}
    file: {FILE}
    load: false
    runner: {{context_size: 256, parallel: 1, embeddings: false}}
    fallbacks: [stand-in]
  - name: stand-in
    deployments:
      - {{backend: elsewhere, model: scripted}}
"""

QUESTION: Any = [{"role": "user", "content": "Say hello."}]
ENDLESS: Any = {"max_tokens": -1, "extra_body": {"ignore_eos": True}}  # until the context is full: half a minute


class Router:
    """A running router with the model in it, and the ways to talk to it."""

    def __init__(self, serving: Serving) -> None:
        self.serving = serving
        self.client = openai.OpenAI(base_url=serving.base_url, api_key="unused", max_retries=0, timeout=50)

    def chat(self, model: str = MODEL, max_tokens: int = 4, **options: Any) -> Any:
        """A plain chat of a few tokens."""
        given: Any = {"temperature": 0, "max_tokens": max_tokens, **options}
        return self.client.chat.completions.create(model=model, messages=QUESTION, **given)

    def backend_of(self, model: str) -> str:
        """The backend that answered a chat; the error's code if none did."""
        try:
            reply = self.client.chat.completions.with_raw_response.create(model=model, messages=QUESTION, max_tokens=1)
        except openai.APIStatusError as error:
            return str(error.code)
        return reply.headers["x-llm-router-backend"]

    def http(self, path: str, body: object = None) -> tuple[int, Any]:
        """Status and JSON of a request on the app port; a POST if there is a body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.serving.port, timeout=50)
        with contextlib.closing(connection):
            data = None if body is None else json.dumps(body)
            connection.request("GET" if body is None else "POST", path, data, {"content-type": "application/json"})
            reply = connection.getresponse()
            return reply.status, json.loads(reply.read())

    def load(self, name: str) -> tuple[int, Any]:
        return self.http("/admin/models/load", {"name": name})

    def loaded(self, name: str) -> None:
        """Make sure that it is loaded and that workers know."""
        status, answer = self.load(name)
        assert (status, answer.get("model", {}).get("state")) == (200, "loaded"), answer
        until(lambda: self.backend_of(name) == f"runner-{name}", what=f"answers of {name}")

    def command(self, *words: str) -> str:
        """What `llm-router …`, typed by the operator, prints; it must succeed."""
        folder = self.serving.folder
        env = {"PATH": os.defpath, "HOME": str(folder), "PYTHONPATH": str(SOURCES), "DATA_DIR": str(folder / "data")}
        command = [sys.executable, "-m", "llm_router", *words]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=50, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def states(self) -> dict[str, str]:
        """The state of every local model."""
        return {model["name"]: model["state"] for model in self.http("/admin/models")[1]["models"]}

    def runner(self, name: str) -> int:
        """The pid of the newest runner of a model."""
        return int(re.findall(rf"runner {re.escape(name)} started \(pid (\d+)\)", self.serving.log)[-1])

    def settled(self) -> Scrape:
        """A scrape with nothing in flight."""
        until(lambda: self.serving.scrape().total("llm_router_requests_in_flight") == 0, what="the end of all requests")
        return self.serving.scrape()


class Asking:
    """Threads that chat without pause while the context is open; counts what came back by status."""

    def __init__(self, router: Router, model: str, threads: int = 2) -> None:
        self.seen: Counter[str] = Counter()
        self._router = router
        self._model = model
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        until(lambda: self.seen, what="first answers")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            self.seen[self._router.backend_of(self._model)] += 1


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[ScriptedBackend]:
    with ScriptedBackend() as backend:
        yield backend


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, elsewhere: ScriptedBackend) -> Iterator[Router]:
    """One router for all tests."""
    folder = tmp_path_factory.mktemp("router")
    models = folder / "data" / "models"
    models.mkdir(parents=True)
    shutil.copy(default_model(), models / f"{FILE}.gguf")
    with Serving(folder, CONFIG.replace("URL", elsewhere.base_url), timeout_s=50) as serving:
        router = Router(serving)
        yield router
        router.client.close()


@pytest.fixture
def router(running: Router) -> Router:
    """The router, with MODEL loaded whatever the test before did."""
    running.loaded(MODEL)
    return running


# -- callers -------------------------------------------------------------------------------------------------


def test_chat(router: Router) -> None:
    """OpenAI's own client gets an answer, usage, and headers that say where it came from."""
    raw = router.client.chat.completions.with_raw_response.create(model=MODEL, messages=QUESTION, max_tokens=6)
    reply = raw.parse()
    assert reply.choices[0].message.content
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 6
    assert raw.headers["x-llm-router-model"] == MODEL
    assert raw.headers["x-llm-router-backend"] == f"runner-{MODEL}"
    assert raw.headers["x-llm-router-attempts"] == "1"


@pytest.mark.parametrize("with_usage", [True, False])
def test_streaming(router: Router, with_usage: bool) -> None:
    """The text of the plain answer in pieces; usage only for who asked for it."""
    options: Any = {"stream_options": {"include_usage": True}} if with_usage else {}
    chunks = list(router.chat(stream=True, max_tokens=6, **options))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == router.chat(max_tokens=6).choices[0].message.content
    assert len(chunks) >= 6
    usages = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage is not None]
    assert usages == ([6] if with_usage else [])
    assert all(chunk.choices for chunk in chunks) is not with_usage


def test_completions_and_embeddings(router: Router) -> None:
    """Plain and streamed completions; embeddings as numbers and as the client asks for them itself, in base64."""
    reply = router.client.completions.create(model=MODEL, prompt="One, two,", max_tokens=4)
    assert reply.choices[0].text
    pieces = list(router.client.completions.create(model=MODEL, prompt="One, two,", max_tokens=4, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices)
    packed = router.client.embeddings.create(model=MODEL, input=["hello", "good bye"])
    plain = router.client.embeddings.create(model=MODEL, input=["hello", "good bye"], encoding_format="float")
    assert [len(item.embedding) for item in packed.data] == [576, 576]
    assert packed.data[1].embedding == pytest.approx(plain.data[1].embedding, abs=0.02)


def test_a_model_that_was_told_not_to_embed_says_so(router: Router) -> None:
    """400 with what to change, not the runner's own words, and no fallback whose vectors mean something else."""
    router.loaded(GUARDED)
    with pytest.raises(openai.BadRequestError, match="embeddings: true") as caught:
        router.client.embeddings.create(model=GUARDED, input="hello")
    assert caught.value.code == "unsupported"


def test_a_reply_follows_a_json_schema(router: Router) -> None:
    schema = {"type": "object", "properties": {"age": {"type": "integer", "maximum": 99}}, "required": ["age"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    reply = router.chat(response_format=wanted, max_tokens=40)
    assert list(json.loads(reply.choices[0].message.content)) == ["age"]


def test_tools_pass_through(router: Router) -> None:
    """This model's template knows none, so it just answers."""
    tool = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
    assert router.chat(tools=[tool], tool_choice="auto").choices[0].message
    assert list(router.chat(tools=[tool], stream=True))


def test_generate(router: Router) -> None:
    """The envelope, with options in either spelling; the first model is the default."""
    for options in ({"maxTokens": 5}, {"max_tokens": 5}):
        status, answer = router.http("/api/generate", {"prompt": "Say hello.", "options": options})
        assert (status, answer["success"]) == (200, True)
        data = answer["data"]
        assert (data["model"], data["tokens"], data["cached"]) == (MODEL, 5, False)
        assert data["text"]
    status, answer = router.http("/api/generate", {"prompt": "Hi", "options": {"model": "nobody"}})
    assert (status, answer["success"]) == (404, False)


def test_models_are_listed_and_unknown_ones_are_not_found(router: Router) -> None:
    """Names with a slash are found as they are and escaped."""
    assert [model.id for model in router.client.models.list()] == [MODEL, GUARDED, "stand-in"]
    for path in (MODEL, MODEL.replace("/", "%2F")):
        assert router.http(f"/v1/models/{path}") == (
            200,
            {"id": MODEL, "object": "model", "created": 0, "owned_by": "llm-router"},
        )
    with pytest.raises(openai.NotFoundError, match=f"did you mean '{MODEL}'"):
        router.chat("HuggingFaceTB/SmolLM")


def test_a_prompt_beyond_the_context_is_refused(router: Router) -> None:
    with pytest.raises(openai.BadRequestError, match="context"):
        router.client.completions.create(model=MODEL, prompt="word " * (CONTEXT + 100), max_tokens=1)


def test_streams_that_are_left_free_their_slots(router: Router) -> None:
    """Both slots would be taken for half a minute; the next request is answered long before."""
    before = router.settled().total("llm_router_inference_total", model=MODEL, status="cancelled")
    for _ in range(2):
        stream = router.chat(stream=True, **ENDLESS)
        assert next(iter(stream))
        stream.close()
    streams = [router.chat(stream=True, **ENDLESS) for _ in range(2)]
    for stream in streams:
        assert next(iter(stream))
    for stream in streams:
        stream.close()
    began_at = time.monotonic()
    assert router.chat().usage.completion_tokens == 4
    assert time.monotonic() - began_at < 10
    after = router.settled().total("llm_router_inference_total", model=MODEL, status="cancelled")
    assert after - before == 4


def test_a_client_that_does_not_wait_loses_only_its_own_answer(router: Router) -> None:
    with pytest.raises(openai.APITimeoutError):
        router.chat(max_tokens=60, timeout=0.05)
    assert router.chat().usage.completion_tokens == 4


# -- operators -----------------------------------------------------------------------------------------------


def test_models_come_and_go_while_requests_run(router: Router) -> None:
    """Over HTTP and from the command line; requests to another model notice nothing."""
    with Asking(router, MODEL) as asking:
        router.loaded(GUARDED)
        assert "unloaded" in router.command("models", "unload", GUARDED)
        assert router.states() == {MODEL: "loaded", GUARDED: "available"}
        assert router.backend_of(GUARDED) == "elsewhere"  # its fallback
        assert "loaded in" in router.command("models", "load", GUARDED, "--option", "context_size=512")
        assert router.http("/admin/models/unload", {"name": GUARDED})[1]["model"]["state"] == "available"
        status, answer = router.http("/admin/models/unload", {"name": GUARDED})
        assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert set(asking.seen) == {f"runner-{MODEL}"}


def test_unloading_waits_for_answers_in_flight(router: Router) -> None:
    """A stream that has begun ends whole; then the model is gone, and comes back when it is asked for."""
    stream = router.chat(stream=True, max_tokens=60, extra_body={"ignore_eos": True})
    assert next(iter(stream))
    unloading = threading.Thread(target=router.command, args=("models", "unload", MODEL))
    unloading.start()
    assert [choice.finish_reason for chunk in stream for choice in chunk.choices][-1] == "length"
    unloading.join()
    with pytest.raises(openai.InternalServerError, match="not ready") as caught:
        router.chat()
    assert (caught.value.status_code, caught.value.code) == (503, "unavailable")
    listed = router.command("models", "list")
    assert re.search(rf"{MODEL} +available +{FILE}\.gguf", listed), listed
    assert re.search(rf"{MODEL}: loaded in \d+\.\d s, \d+ MB", router.command("models", "load", MODEL))
    until(lambda: router.backend_of(MODEL) == f"runner-{MODEL}")


def test_series_of_a_model_leave_with_it(router: Router) -> None:
    def levels() -> tuple[float, float, float]:
        scrape = router.settled()
        return (
            scrape.total("llm_router_models_loaded", size_category="small"),
            scrape.total("llm_router_model_load_duration_seconds_count", model=GUARDED),
            scrape.total("llm_router_model_memory_bytes", model=GUARDED),
        )

    router.loaded(GUARDED)
    loaded, loads, memory = levels()
    assert loaded == 2
    assert memory > 90e6
    router.http("/admin/models/unload", {"name": GUARDED})
    scrape = router.settled()
    assert not [1 for name, labels, _ in scrape.samples if "memory_bytes" in name and GUARDED in str(labels)]
    assert levels() == (1, loads, 0)
    router.loaded(GUARDED)
    assert levels()[:2] == (2, loads + 1)


def test_tokens_are_those_that_clients_were_told(router: Router) -> None:
    """Plain, streamed with and without usage, completions, /api/generate: all are counted as the model says."""

    def tokens() -> tuple[float, float]:
        scrape = router.settled()
        return scrape.total("llm_router_tokens_generated_total"), scrape.total("llm_router_tokens_prompt_total")

    before = tokens()
    replies = [router.chat(max_tokens=count).usage for count in (3, 4)]
    replies += [
        chunk.usage for chunk in router.chat(stream=True, stream_options={"include_usage": True}) if chunk.usage
    ]
    replies.append(router.client.completions.create(model=MODEL, prompt="One, two,", max_tokens=4).usage)
    told = Counter({"out": 0, "in": 0})
    for usage in replies:
        told += Counter({"out": usage.completion_tokens, "in": usage.prompt_tokens})
    generated = router.http("/api/generate", {"prompt": "Say hello.", "options": {"maxTokens": 4}})[1]["data"]["usage"]
    told += Counter({"out": generated["completion_tokens"], "in": generated["prompt_tokens"]})
    list(router.chat(stream=True))  # is not told, and is like the one that was
    told += Counter({"out": replies[2].completion_tokens, "in": replies[2].prompt_tokens})
    after = tokens()
    assert (after[0] - before[0], after[1] - before[1]) == (told["out"], told["in"])


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("half", lambda whole: whole[:3_000_000], "truncated or still downloading"),
        ("text", lambda whole: b"once upon a time there was no model", "not a GGUF model"),
        ("torn", lambda whole: whole[:64] + b"\xff" * 4096 + whole[4160:], "torn.gguf"),
        ("empty", lambda whole: b"", "is empty"),
    ],
    ids=["half", "text", "torn", "empty"],
)
def test_a_file_that_is_no_model_is_refused_before_a_process_starts(
    router: Router, name: str, content: Any, problem: str
) -> None:
    path = router.serving.folder / "data" / "models" / f"{name}.gguf"
    path.write_bytes(content(default_model().read_bytes()))
    try:
        status, answer = router.load(name)
        assert (status, answer["error"]["code"]) == (400, "bad_model_file")
        assert problem in answer["error"]["message"]
        assert f"runner {name} started" not in router.serving.log
        assert router.states()[name] == "failed"
        assert re.search(rf"^{name}: .*{problem}", router.command("models", "list"), re.MULTILINE)
    finally:
        path.unlink()


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../secret", "..", "https://example.org/m.gguf", "hf:a/b/c.gguf", "file:///etc/passwd", "", "a\0b"],
)
def test_only_names_are_accepted_over_http(router: Router, name: str) -> None:
    status, answer = router.load(name)
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, "invalid_request", "model")
    assert "no path or URL" in answer["error"]["message"]


def test_a_link_out_of_the_models_folder_is_refused(router: Router, tmp_path: Path) -> None:
    secret = tmp_path / "secret.gguf"
    secret.write_bytes(b"GGUF secret")
    link = router.serving.folder / "data" / "models" / "link.gguf"
    link.symlink_to(secret)
    try:
        status, answer = router.load("link")
        assert (status, answer["error"]["code"]) == (400, "invalid_request")
        assert "leads out of the models folder" in answer["error"]["message"]
        assert str(secret) not in answer["error"]["message"]
    finally:
        link.unlink()


def test_options_are_checked(router: Router) -> None:
    """The message says what was expected where, in the words of the request."""
    router.http("/admin/models/unload", {"name": GUARDED})
    for options, problem in (
        ({"parallel": "three"}, "options.parallel: expected int, got str"),
        ({"slots": 3}, "there is no option 'slots'"),
        ({"parallel": 0}, "parallel is 0, not 1 to 256"),
    ):
        status, answer = router.http("/admin/models/load", {"name": GUARDED, "options": options})
        assert status == 400
        assert problem in answer["error"]["message"]


# -- kills ---------------------------------------------------------------------------------------------------


def test_a_killed_runner_costs_its_requests_a_clear_error_and_comes_back(router: Router) -> None:
    before = router.settled()
    pid = router.runner(MODEL)
    stream = router.chat(stream=True, **ENDLESS)
    assert next(iter(stream))
    with Asking(router, MODEL, threads=1) as asking:
        os.kill(pid, signal.SIGKILL)
        until(lambda: not is_alive(pid))
        with pytest.raises(openai.APIError, match=f"runner-{MODEL}"):
            list(stream)
        served = asking.seen[f"runner-{MODEL}"]
        until(lambda: asking.seen[f"runner-{MODEL}"] > served + 2, 30, "answers of the new runner")
    assert set(asking.seen) <= {f"runner-{MODEL}", "backend_unavailable", "unavailable"}
    scrape = router.settled()

    def more(name: str, **labels: str) -> float:
        return scrape.total(name, **labels) - before.total(name, **labels)

    assert router.runner(MODEL) != pid
    assert more("llm_router_runner_restarts_total", model=MODEL, reason="killed") == 1
    assert more("llm_router_errors_total", type="runner_lost") == 1
    assert more("llm_router_model_load_duration_seconds_count", model=MODEL) == 1
    assert scrape.total("llm_router_model_memory_bytes", model=MODEL) > 90e6


def test_a_fallback_answers_while_a_killed_runner_restarts(router: Router) -> None:
    """Nobody who asks sees an error."""
    router.loaded(GUARDED)
    pid = router.runner(GUARDED)
    with Asking(router, GUARDED) as asking:
        os.kill(pid, signal.SIGKILL)
        until(lambda: asking.seen["elsewhere"], what="answers of the fallback")
        served = asking.seen[f"runner-{GUARDED}"]
        until(lambda: asking.seen[f"runner-{GUARDED}"] > served, 30, "answers of the new runner")
    assert set(asking.seen) == {f"runner-{GUARDED}", "elsewhere"}
    assert router.settled().total("llm_router_fallbacks_total", model=GUARDED) > 0


def test_a_model_stays_loaded_when_control_is_killed(router: Router) -> None:
    """Requests go on meanwhile; afterwards control knows what is loaded, and what was unloaded stays so."""
    router.http("/admin/models/unload", {"name": GUARDED})
    runner = router.runner(MODEL)
    loads = router.settled().total("llm_router_model_load_duration_seconds_count", model=MODEL)
    with Asking(router, MODEL) as asking:
        control = router.serving.signal("control", signal.SIGKILL)
        until(lambda: not is_alive(control))
        served = asking.seen[f"runner-{MODEL}"]
        until(lambda: asking.seen[f"runner-{MODEL}"] > served + 2)
        until(lambda: router.serving.status("/metrics", monitoring=True) == 200, what="monitoring")
        assert router.states() == {MODEL: "loaded", GUARDED: "available"}
    assert set(asking.seen) == {f"runner-{MODEL}"}
    assert router.runner(MODEL) == runner
    scrape = router.settled()
    assert scrape.total("llm_router_model_load_duration_seconds_count", model=MODEL) == loads
    assert scrape.total("llm_router_models_loaded", size_category="small") == 1
