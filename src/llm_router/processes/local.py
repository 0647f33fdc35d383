"""Local models: which ones should run, which ones do, loading and unloading them at run time.

The supervisor's state is the truth about runners, so a control that was killed knows after its start what is loaded.
Only what it cannot tell, that somebody unloaded a configured model, is kept in a small file.
Not for: starting processes (supervisor) or what a runner needs (models/launch.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import msgspec

from llm_router.admin.models import LocalModel
from llm_router.chat import NOT_JSON
from llm_router.config.settings import ModelSettings
from llm_router.errors import (
    BadModelFile,
    BadOptions,
    InvalidRequest,
    ModelError,
    ModelNotFound,
    OutOfMemory,
    RouterError,
    RunnerFailed,
)
from llm_router.models.launch import RunnerSpec, check, new_key
from llm_router.models.registry import FORMAT, ModelFile, ModelsFolder, size_category
from llm_router.processes.measure import LoadedModel
from llm_router.processes.orders import ChildState, OrderRefused, Orders, SupervisorState
from llm_router.processes.tables import RunnerAddress

_log = logging.getLogger(__name__)

_ATTEMPTS: Final = 3
"""Crashes while a model loads, after which it has failed; what is wrong with the file is told at the first."""

_FIXED: Final = frozenset({"name", "path", "key"})
_ERRORS: Final[Mapping[str, type[ModelError]]] = {
    error.code: error for error in (BadModelFile, BadOptions, OutOfMemory, RunnerFailed)
}
_STATES: Final[Mapping[str, Literal["loading", "loaded", "failed", "unloading"]]] = {
    "starting": "loading",
    "backoff": "loading",
    "ready": "loaded",
    "stopping": "unloading",
    "failed": "failed",
}

T = TypeVar("T")
Spawn = Callable[[Coroutine[Any, Any, T]], "asyncio.Task[T]"]


class LocalModels:
    """Keeps the local models. Lives in control's loop.

    Args:
        folder: the models folder.
        memory_path: a file in which the names of unloaded models are kept over restarts of control.
        spawn: makes a task that control waits for when it ends.
        grace_s: seconds that requests in flight get when a model is unloaded.
        on_change: called when models became ready or ceased to be: the routing table is another one.
        on_loaded: called with model, format, bytes of its file (0 if unknown) and seconds when a model was loaded.
        on_unloaded: called with model and format when one was unloaded, by whomever.
        on_error: called with a type of `families.ERROR_KINDS` when a model cannot be loaded or its runner died.
        resident_bytes: memory of a process by pid; None if unknown.
    """

    def __init__(
        self,
        orders: Orders,
        folder: ModelsFolder,
        memory_path: Path,
        *,
        spawn: Spawn[None],
        grace_s: float,
        on_change: Callable[[], None],
        on_loaded: Callable[[str, str, int, float], None],
        on_unloaded: Callable[[str, str], None],
        on_error: Callable[[str], None],
        resident_bytes: Callable[[int], float | None],
    ) -> None:
        self._orders = orders
        self._folder = folder
        self._folder_lock = asyncio.Lock()
        self._unloaded = _Names(memory_path)
        self._spawn = spawn
        self._grace_s = grace_s
        self._on_change = on_change
        self._on_loaded = on_loaded
        self._on_unloaded = on_unloaded
        self._on_error = on_error
        self._resident_bytes = resident_bytes
        self._configured: dict[str, ModelSettings] = {}
        self._remote_names: frozenset[str] = frozenset()
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._leaving: set[str] = set()
        self._errors: dict[str, RouterError] = {}
        self._ready_pids: dict[str, int] = {}

    # -- what control asks ----------------------------------------------------------------------------------

    def configure(self, models: Iterable[ModelSettings], *, is_first_start: bool = False) -> None:
        """Make the runners follow these settings: load what is new, end what is gone, restart what is different.

        Args:
            is_first_start: the whole router starts, so what was unloaded before is forgotten.
        """
        if is_first_start:
            self._unloaded.clear()
        models = tuple(models)
        before, self._configured = self._configured, {model.name: model for model in models if model.file}
        self._remote_names = frozenset(model.name for model in models if not model.file)
        for name, model in before.items():
            now = self._configured.get(name)
            if self._orders.state.runner(name) is None:
                continue
            if now is None:
                self._spawn(self._quietly(self._unload(name)))
            elif not _is_same(model, now):
                self._spawn(self._quietly(self._reload(now)))
        for name, model in self._configured.items():
            if model.load and self._orders.state.runner(name) is None and name not in self._unloaded.names():
                self._begin(model)

    def take_state(self, state: SupervisorState, *, is_first: bool) -> None:
        """The supervisor told its state. `is_first`: what runs was not loaded under our eyes."""
        ready: dict[str, int] = {}
        for child in state.of_role("runner"):
            if child.state != "ready":
                continue
            ready[child.name] = child.pid
            if self._ready_pids.get(child.name) != child.pid and not is_first:
                self._errors.pop(child.name, None)
                size_bytes, load_s = int(child.info.get("size_bytes", 0)), float(child.info.get("load_s", 0.0))
                self._on_loaded(child.name, _format(child), size_bytes, load_s)
        for name, pid in self._ready_pids.items():
            now = state.runner(name)
            if ready.get(name) == pid:
                continue
            if now is None or now.state == "stopping":
                self._on_unloaded(name, FORMAT)
            else:
                self._on_error("runner_lost")
        changed, self._ready_pids = ready != self._ready_pids, ready
        if changed:
            self._on_change()

    def addresses(self) -> dict[str, RunnerAddress]:
        """Where the runners of all models listen, by model name."""
        return {
            child.name: RunnerAddress(
                port=int(child.info.get("port", 0)),
                key=str(child.payload.get("key", "")),
                is_ready=child.state == "ready" and child.name not in self._leaving,
                only_embeds=bool(child.info.get("only_embeds", False)),
            )
            for child in self._orders.state.of_role("runner")
        }

    def extra(self) -> list[ModelSettings]:
        """Models that run although no configuration names them."""
        found = []
        for child in self._orders.state.of_role("runner"):
            if child.name not in self._configured and child.state != "failed" and child.name not in self._leaving:
                with contextlib.suppress(RunnerFailed):
                    spec = RunnerSpec.from_payload(child.payload)
                    found.append(ModelSettings(name=child.name, file=spec.path, runner=spec))
        return found

    def loaded(self) -> list[LoadedModel]:
        """Models that serve, for metrics."""
        return [
            LoadedModel(child.name, _format(child), str(child.info.get("size_category", size_category(0))), child.pid)
            for child in self._orders.state.of_role("runner")
            if child.state == "ready"
        ]

    @property
    def is_loading(self) -> bool:
        """Whether a load that was ordered has not ended yet."""
        return bool(self._loading)

    def failure(self, name: str) -> str:
        """Why the last load of a model failed; empty if it did not."""
        error = self._errors.get(name)
        return str(error) if error is not None else ""

    # -- what the admin API asks -----------------------------------------------------------------------------

    async def list(self) -> Sequence[LocalModel]:
        """Every model that is loaded, configured or lies in the models folder, by name."""
        async with self._folder_lock:
            files = {file.name: file for file in await asyncio.to_thread(self._folder.list)}
        configured = {_real(model.file) for model in self._configured.values()}
        names = {child.name for child in self._orders.state.of_role("runner")} | set(self._configured)
        names |= {name for name, file in files.items() if _real(file.path) not in configured}
        return [self._show(name, files.get(name)) for name in sorted(names)]

    async def load(self, name: str, options: Mapping[str, Any]) -> LocalModel:
        """Load `name`, a configured model or a file of the models folder, and return when it serves.

        Raises: ModelNotFound, BadModelFile, BadOptions, OutOfMemory, RunnerFailed, InvalidRequest, Unavailable.
        """
        model = await self._find(name)
        child = self._orders.state.runner(model.name)
        if model.name not in self._loading and (child is None or child.state == "failed"):
            self._begin(_with_options(model, options))
        elif options:
            raise InvalidRequest(
                f"model {model.name!r} is loaded or loading already; unload it before loading it with other options",
                status=409,
                code="already_loaded",
            )
        if (loading := self._loading.get(model.name)) is not None:
            await asyncio.wait({loading})  # the load goes on if whoever waits for it leaves
        if (error := self._errors.get(model.name)) is not None:
            raise error
        self._unloaded.discard(model.name)
        return self._show(model.name, None)

    async def unload(self, name: str) -> LocalModel:
        """Let requests in flight end, then end the runner.

        Raises: ModelNotFound if it is not loaded, InvalidRequest while it is loading, Unavailable.
        """
        model = await self._find(name)
        child = self._orders.state.runner(model.name)
        if child is None:
            raise ModelNotFound(f"model {model.name!r} is not loaded")
        if model.name in self._loading and child.state != "ready":
            raise InvalidRequest(f"model {model.name!r} is loading", status=409, code="still_loading")
        self._unloaded.add(model.name)
        await self._unload(model.name)
        return self._show(model.name, None)

    # -- loading and unloading ------------------------------------------------------------------------------------

    def _begin(self, model: ModelSettings) -> None:
        if model.name not in self._loading:
            self._errors.pop(model.name, None)
            task = self._spawn(self._load(model))
            self._loading[model.name] = task
            task.add_done_callback(lambda _: self._loading_ended(model.name))

    def _loading_ended(self, name: str) -> None:
        self._loading.pop(name, None)
        self._on_change()

    async def _load(self, model: ModelSettings) -> None:
        """Load, or remember why not. Raises nothing."""
        assert model.runner is not None
        try:
            await asyncio.to_thread(check, model.runner)
            await self._orders.start_runner(model.name, model.runner.payload())
            await self._settle(model.name)
        except (RouterError, OrderRefused) as error:
            problem = error if isinstance(error, RouterError) else RunnerFailed(str(error))
            self._errors[model.name] = problem
            self._on_error("model_load")
            _log.error("model %s cannot be loaded: %s", model.name, problem)

    async def _settle(self, name: str) -> None:
        """Return when the runner is ready. Raises: ModelError when it will not be."""
        while True:
            child = self._orders.state.runner(name)
            if child is None or child.state == "stopping":
                raise RunnerFailed(f"model {name!r} was unloaded while it was loading")
            if child.state == "ready":
                return
            if child.state == "failed":
                kind = _ERRORS.get(str(child.info.get("code", "")), RunnerFailed)
                raise kind(child.error)
            if child.state == "backoff" and child.restarts + 1 >= _ATTEMPTS:
                await self._orders.stop_runner(name, 0.0)
                raise RunnerFailed(
                    f"the runner of model {name!r} {child.error}, {_ATTEMPTS} times while it was loading"
                )
            await self._orders.next_state()

    async def _unload(self, name: str) -> None:
        self._leaving.add(name)
        self._on_change()
        try:
            await self._orders.stop_runner(name, self._grace_s)
        except OrderRefused as error:
            _log.info("model %s: %s", name, error)
        finally:
            self._leaving.discard(name)
            self._errors.pop(name, None)
            self._on_change()

    async def _reload(self, model: ModelSettings) -> None:
        await self._unload(model.name)
        self._begin(model)

    async def _quietly(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except RouterError as error:
            _log.warning("while following the new configuration: %s", error)

    async def _find(self, name: str) -> ModelSettings:
        """What a name over HTTP means: a configured model, one that runs, or a file of the folder."""
        found = self._configured.get(name) or next((model for model in self.extra() if model.name == name), None)
        if found is not None:
            return found
        if name in self._remote_names:
            raise InvalidRequest(f"model {name!r} is served by backends; there is nothing to load", param="name")
        async with self._folder_lock:
            path = await asyncio.to_thread(self._folder.resolve, name)
        for model in self._configured.values():
            if _real(model.file) == str(path):
                return model
        stem = path.name.removesuffix(".gguf")
        if stem in self._remote_names:
            raise InvalidRequest(f"there is a remote model {stem!r} already; rename the file", param="name")
        return ModelSettings(name=stem, file=str(path), runner=RunnerSpec(name=stem, path=str(path)))

    def _show(self, name: str, file: ModelFile | None) -> LocalModel:
        child = self._orders.state.runner(name)
        model = self._configured.get(name)
        path = str(child.payload["path"]) if child else model.file if model else file.path if file else ""
        error = self._errors.get(name)
        if name in self._leaving:
            state: Literal["available", "loading", "loaded", "failed", "unloading"] = "unloading"
        elif child is not None:
            state = _STATES[child.state]
        else:
            state = "failed" if error is not None else "loading" if name in self._loading else "available"
        is_loaded = child is not None and state == "loaded"
        size_bytes = file.size_bytes if file is not None else _size_of(path)
        memory = self._resident_bytes(child.pid) if child is not None and is_loaded else None
        options = child.payload if child is not None else model.runner.payload() if model and model.runner else {}
        return LocalModel(
            name=name,
            file=os.path.basename(path),
            size_bytes=size_bytes,
            format=FORMAT,
            size_category=size_category(size_bytes),
            state=state,
            load_s=float(child.info["load_s"]) if child is not None and "load_s" in child.info else None,
            memory_bytes=None if memory is None else int(memory),
            restarts=child.restarts if child is not None else 0,
            code=error.code if error is not None else "bad_model_file" if file is not None and file.problem else "",
            error=str(error) if error is not None else file.problem if file is not None else "",
            options={key: value for key, value in options.items() if key not in _FIXED},
        )


class _Names:
    """A small set of names in a file. A file that cannot be written only loses the memory over restarts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._names: set[str] | None = None

    def names(self) -> set[str]:
        if self._names is None:
            try:
                self._names = set(msgspec.json.decode(self._path.read_bytes(), type=list[str]))
            except (OSError, *NOT_JSON):
                self._names = set()
        return self._names

    def add(self, name: str) -> None:
        self._write(self.names() | {name})

    def discard(self, name: str) -> None:
        if name in self.names():
            self._write(self.names() - {name})

    def clear(self) -> None:
        self._names = set()
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _write(self, names: set[str]) -> None:
        self._names = names
        new = self._path.with_suffix(".new")
        try:
            new.write_bytes(msgspec.json.encode(sorted(names)))
            new.replace(self._path)
        except OSError as error:
            _log.warning("%s: %s; a restart of control would load unloaded models again", self._path, error.strerror)


def _is_same(one: ModelSettings, other: ModelSettings) -> bool:
    """Whether both are run alike: keys are random and do not count."""
    if one.file != other.file or one.runner is None or other.runner is None:
        return one.file == other.file
    return msgspec.structs.replace(one.runner, key="") == msgspec.structs.replace(other.runner, key="")


def _with_options(model: ModelSettings, options: Mapping[str, Any]) -> ModelSettings:
    """The model with other runner options. Raises: InvalidRequest for unknown ones and wrong types."""
    assert model.runner is not None
    allowed = [field for field in RunnerSpec.__struct_fields__ if field not in _FIXED]
    for option in options:
        if option not in allowed:
            raise InvalidRequest(
                f"there is no option {option!r}; there are {', '.join(allowed)}", param=f"options.{option}"
            )
    try:
        runner = msgspec.convert({**model.runner.payload(), **options, "key": new_key()}, RunnerSpec)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).replace("`", "").partition(" - at $.")
        raise InvalidRequest(
            f"options.{path}: {problem.lower()}", param=f"options.{path}", code="invalid_type"
        ) from None
    return msgspec.structs.replace(model, runner=runner)


def _format(child: ChildState) -> str:
    return str(child.info.get("format", FORMAT))


def _real(path: str) -> str:
    return os.path.realpath(path)


def _size_of(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0
