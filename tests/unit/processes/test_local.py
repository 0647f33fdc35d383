"""Local models: loading, failing, unloading, following the configuration, over a supervisor played by the test."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import pytest

from llm_router.config.settings import ModelSettings
from llm_router.errors import BadModelFile, InvalidRequest, ModelNotFound, OutOfMemory, RunnerFailed, Unavailable
from llm_router.models.launch import RunnerSpec
from llm_router.models.registry import ModelsFolder
from llm_router.processes.local import LocalModels
from llm_router.processes.orders import OrderRefused, Orders, SupervisorState
from llm_router.processes.tables import RunnerAddress
from support.aio import run, until
from support.gguf import model as gguf
from support.overseer import Overseer

READY: dict[str, Any] = {
    "state": "ready",
    "info": {"port": 4711, "load_s": 1.5, "format": "gguf", "size_bytes": 98_000_000, "size_category": "small"},
}


class Stage:
    """Local models, their folder, and everything they reported."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "models"
        self.folder.mkdir(exist_ok=True)
        self.memory = folder / "unloaded.json"
        self.overseer = Overseer()
        self.changes = 0
        self.loaded: list[tuple[str, str, int, float]] = []
        self.unloaded: list[tuple[str, str]] = []
        self.errors: list[str] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._has_state = False

    def file(self, name: str, data: bytes | None = None) -> str:
        path = self.folder / f"{name}.gguf"
        path.write_bytes(gguf() if data is None else data)
        return str(path)

    def configured(self, name: str, **fields: Any) -> ModelSettings:
        path = self.file(name)
        runner = RunnerSpec(name=name, path=path, **fields.pop("runner", {}))
        return ModelSettings(name=name, file=path, runner=runner, **fields)

    @contextlib.asynccontextmanager
    async def playing(self) -> AsyncIterator[LocalModels]:
        loop = asyncio.get_running_loop()
        self.orders = Orders(self._take)
        self.models = LocalModels(
            self.orders,
            ModelsFolder(self.folder),
            self.memory,
            spawn=self._spawn,
            grace_s=7.0,
            on_change=self._changed,
            on_loaded=lambda *load: self.loaded.append(load),
            on_unloaded=lambda *model: self.unloaded.append(model),
            on_error=self.errors.append,
            resident_bytes=lambda pid: 1000.0 + pid,
        )
        loop.add_reader(self.overseer.ours, self.overseer.turn)
        await self.orders.connect(self.overseer.theirs)
        self.overseer.tell()
        assert await self.orders.first_state(5.0)
        try:
            yield self.models
            await asyncio.gather(*self._tasks)
        finally:
            loop.remove_reader(self.overseer.ours)
            self.orders.close()
            await asyncio.sleep(0)
            self.overseer.close()

    def _take(self, state: SupervisorState) -> None:
        self.models.take_state(state, is_first=not self._has_state)
        self._has_state = True

    def _changed(self) -> None:
        self.changes += 1

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def ops(self) -> list[tuple[str, str]]:
        return [(order["op"], order["name"]) for order in self.overseer.orders]


def test_a_file_of_the_folder_is_loaded_and_unloaded(tmp_path: Path) -> None:
    """By its name: it runs, it is measured, it is routed to; then it is gone."""

    async def scenario() -> None:
        stage = Stage(tmp_path)
        stage.file("tiny")
        stage.overseer.outcomes["tiny"] = [{**READY, "info": {**READY["info"], "only_embeds": True}}]
        async with stage.playing() as models:
            shown = await models.load("tiny", {"parallel": 4})
            assert (shown.state, shown.load_s, shown.options["parallel"]) == ("loaded", 1.5, 4)
            assert "key" not in shown.options
            assert shown.memory_bytes == 1000 + stage.overseer.children[0]["pid"]
            key = stage.overseer.children[0]["payload"]["key"]
            assert models.addresses() == {"tiny": RunnerAddress(4711, key, True, only_embeds=True)}
            assert [model.name for model in models.extra()] == ["tiny"]
            assert [(m.name, m.format, m.size_category) for m in models.loaded()] == [("tiny", "gguf", "small")]
            assert (stage.loaded, stage.errors) == ([("tiny", "gguf", 98_000_000, 1.5)], [])
            assert (await models.load("tiny", {})).state == "loaded"
            assert (await models.unload("tiny")).state == "available"
            assert (models.addresses(), models.extra()) == ({}, [])
            assert stage.ops() == [("start_runner", "tiny"), ("stop_runner", "tiny")]
            assert stage.overseer.orders[-1]["grace_s"] == 7.0

    run(scenario())


def test_bad_files_are_refused_before_a_process_is_started(tmp_path: Path) -> None:
    """The error says what is wrong with the file; the model is shown as failed."""

    async def scenario() -> None:
        stage = Stage(tmp_path)
        stage.file("bad", b"GGML nonsense" * 10)
        stage.file("cut", gguf()[:-50])
        async with stage.playing() as models:
            for name in ("bad", "cut"):
                with pytest.raises(BadModelFile):
                    await models.load(name, {})
            assert stage.ops() == []
            assert stage.errors == ["model_load", "model_load"]
            states = {model.name: (model.state, model.code) for model in await models.list()}
            assert states == {"bad": ("failed", "bad_model_file"), "cut": ("failed", "bad_model_file")}

    run(scenario())


@pytest.mark.parametrize("name", ["/etc/passwd", "../tiny", "https://example.org/a.gguf", "hf:a/b", "", ".hidden"])
def test_only_names_are_accepted(tmp_path: Path, name: str) -> None:
    """Paths and URLs are refused, whatever they point to."""

    async def scenario() -> None:
        stage = Stage(tmp_path)
        stage.file("tiny")
        async with stage.playing() as models:
            with pytest.raises(InvalidRequest):
                await models.load(name, {})
            with pytest.raises(ModelNotFound, match="tiny"):
                await models.load("tinny", {})
            with pytest.raises(ModelNotFound, match="not loaded"):
                await models.unload("tiny")

    run(scenario())


@pytest.mark.parametrize("options", [{"paralel": 2}, {"parallel": "two"}, {"key": "k"}, {"path": "/x"}, {"name": "x"}])
def test_unfit_options_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    """Unknown options, wrong types, and what is not the caller's to choose."""

    async def scenario() -> None:
        stage = Stage(tmp_path)
        stage.file("tiny")
        async with stage.playing() as models:
            with pytest.raises(InvalidRequest, match=next(iter(options))):
                await models.load("tiny", options)
            assert stage.ops() == []

    run(scenario())


@pytest.mark.parametrize(
    ("code", "kind"), [("out_of_memory", OutOfMemory), ("bad_model_file", BadModelFile), ("new", RunnerFailed)]
)
def test_a_runner_that_gives_up_says_why(tmp_path: Path, code: str, kind: type[Exception]) -> None:
    """The runner's own code and words reach the caller; the next load starts afresh."""

    async def scenario() -> None:
        stage = Stage(tmp_path)
        stage.file("tiny")
        stage.overseer.outcomes["tiny"] = [{"state": "failed", "error": "too big", "info": {"code": code}}]
        async with stage.playing() as models:
            with pytest.raises(kind, match="too big"):
                await models.load("tiny", {})
            assert (models.failure("tiny"), models.extra()) == ("too big", [])
            stage.overseer.outcomes["tiny"] = [READY]
            assert (await models.load("tiny", {})).state == "loaded"
            assert models.failure("tiny") == ""

    run(scenario())


def test_a_runner_that_keeps_crashing_while_it_loads_is_stopped(tmp_path: Path) -> None:
    """Three times is enough."""

    async def scenario() -> None:
        stage = Stage(tmp_path)
        stage.file("tiny")
        deaths = [{"state": "backoff", "restarts": count, "error": "was killed by SIGSEGV"} for count in (0, 1, 2)]
        stage.overseer.outcomes["tiny"] = [deaths[0], {"state": "starting", "restarts": 1}, deaths[1], deaths[2]]
        async with stage.playing() as models:
            with pytest.raises(RunnerFailed, match="SIGSEGV, 3 times"):
                await models.load("tiny", {})
            assert stage.ops()[-1] == ("stop_runner", "tiny")

    run(scenario())


def test_callers_share_one_load(tmp_path: Path) -> None:
    """Several at once start one runner and all get its outcome; other options are refused meanwhile."""

    async def scenario() -> None:
        stage = Stage(tmp_path)
        stage.file("tiny")
        async with stage.playing() as models:
            loads = [asyncio.ensure_future(models.load("tiny", {})) for _ in range(3)]
            await until(stage.ops)
            with pytest.raises(InvalidRequest) as caught:
                await models.load("tiny", {"parallel": 1})
            assert caught.value.status == 409
            assert models.is_loading
            stage.overseer.become("tiny", **READY)
            assert [model.state for model in await asyncio.gather(*loads)] == ["loaded"] * 3
            assert stage.ops() == [("start_runner", "tiny")]
            await until(lambda: not models.is_loading)

    run(scenario())


def test_configured_models_are_loaded_at_the_start(tmp_path: Path) -> None:
    """But for those that say not to; a bad one does not hold up the others."""

    async def scenario() -> None:
        stage = Stage(tmp_path)
        good, later = stage.configured("good"), stage.configured("later", load=False)
        bad = stage.configured("bad")
        stage.file("bad", b"x" * 100)
        stage.overseer.outcomes["good"] = [READY]
        async with stage.playing() as models:
            models.configure([good, later, bad], is_first_start=True)
            await until(lambda: not models.is_loading)
            states = {model.name: model.state for model in await models.list()}
            assert states == {"good": "loaded", "later": "available", "bad": "failed"}
            assert models.extra() == []

    run(scenario())


def test_a_new_control_finds_what_runs(tmp_path: Path) -> None:
    """Nothing is loaded twice, no load time is counted twice, and what was unloaded stays so."""

    async def scenario() -> None:
        stage = Stage(tmp_path)
        one, two = stage.configured("one"), stage.configured("two")
        stage.overseer.outcomes = {"one": [READY], "two": [READY]}
        async with stage.playing() as models:
            models.configure([one, two], is_first_start=True)
            await until(lambda: len(stage.loaded) == 2)
            await models.unload("two")
            await models.load("two", {})
            await models.unload("two")
        again = Stage(tmp_path)
        again.overseer.children = stage.overseer.children
        async with again.playing() as models:
            models.configure([one, two])
            assert list(models.addresses()) == ["one"]
            assert (again.ops(), again.loaded) == ([], [])
        fresh = Stage(tmp_path)
        fresh.overseer.outcomes = {"one": [READY], "two": [READY]}
        async with fresh.playing() as models:
            models.configure([one, two], is_first_start=True)
            await until(lambda: len(fresh.loaded) == 2)

    run(scenario())


def test_a_new_configuration_is_followed(tmp_path: Path) -> None:
    """Gone models leave, changed ones restart, new ones come, the rest stays; new keys are no change."""

    async def scenario() -> None:
        stage = Stage(tmp_path)
        names = ("stays", "goes", "grows")
        stage.overseer.outcomes = {name: [READY] for name in (*names, "comes")}
        async with stage.playing() as models:
            models.configure([stage.configured(name) for name in names])
            await until(lambda: not models.is_loading and len(stage.loaded) == 3)
            stage.overseer.orders.clear()
            models.configure(
                [
                    stage.configured("stays"),
                    stage.configured("grows", runner={"parallel": 8}),
                    stage.configured("comes"),
                ]
            )
            await until(lambda: len(stage.loaded) == 5 and not models.is_loading)
            assert sorted(stage.ops()) == [
                ("start_runner", "comes"),
                ("start_runner", "grows"),
                ("stop_runner", "goes"),
                ("stop_runner", "grows"),
            ]
            assert next(m for m in await models.list() if m.name == "grows").options["parallel"] == 8

    run(scenario())


def test_a_runner_that_dies_is_no_longer_routed_to(tmp_path: Path) -> None:
    """At once, and counted; when it is back, with its new port."""

    async def scenario() -> None:
        stage = Stage(tmp_path)
        stage.file("tiny")
        stage.overseer.outcomes["tiny"] = [READY]
        async with stage.playing() as models:
            await models.load("tiny", {})
            before = stage.changes
            stage.overseer.become("tiny", state="backoff", pid=0, error="was killed by SIGKILL")
            await until(lambda: stage.changes > before)
            assert not models.addresses()["tiny"].is_ready
            assert stage.errors == ["runner_lost"]
            stage.overseer.become("tiny", state="ready", pid=9, restarts=1, info={"port": 4712, "load_s": 0.5})
            await until(lambda: models.addresses()["tiny"].is_ready)
            assert models.addresses()["tiny"].port == 4712
            assert [load[-1] for load in stage.loaded] == [1.5, 0.5]

    run(scenario())


def test_orders_fail_clearly_without_a_supervisor(tmp_path: Path) -> None:
    """Refusals carry the supervisor's words; a closed channel is Unavailable, also for who waits."""

    async def scenario() -> None:
        stage = Stage(tmp_path)
        async with stage.playing():
            with pytest.raises(OrderRefused, match="there is no runner 'x'"):
                await stage.orders.stop_runner("x", 1.0)
            await stage.orders.announce("hello")
            assert stage.overseer.orders[-1]["text"] == "hello"
            await stage.orders.set_log("debug", "json")
            assert (stage.overseer.orders[-1]["level"], stage.overseer.orders[-1]["console"]) == ("debug", "json")
            waiting = asyncio.ensure_future(stage.orders.next_state())
            await asyncio.sleep(0)
            stage.orders.close()
            with pytest.raises(Unavailable):
                await waiting
            with pytest.raises(Unavailable):
                await stage.orders.start_runner("x", {})

    run(scenario())
