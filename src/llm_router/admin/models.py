"""Local models over HTTP: what there is, load one, unload one.

Only names inside the models folder are accepted, never paths or URLs: whoever may call this may not make the router
read any other file. Not for: starting processes (processes) or fetching files (models/pull.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from llm_router.admin.application import Audit, doer, json_response, read_body


class LocalModel(msgspec.Struct, frozen=True, kw_only=True):
    """A local model as it is shown.

    Args:
        file: name in the models folder.
        state: available (a file that is not loaded), loading, loaded, failed, unloading.
        load_s: seconds the last load took; None if it never was loaded.
        memory_bytes: resident memory of its runner; None while there is none.
        code, error: why it failed; empty otherwise.
    """

    name: str
    file: str
    size_bytes: int
    format: str
    size_category: str
    state: Literal["available", "loading", "loaded", "failed", "unloading"]
    load_s: float | None = None
    memory_bytes: int | None = None
    restarts: int = 0
    code: str = ""
    error: str = ""
    options: Mapping[str, Any] = {}


class LocalModels(Protocol):
    """Whoever keeps the local models."""

    async def list(self) -> Sequence[LocalModel]:
        """Every model that is loaded, configured or lies in the models folder, by name."""

    async def load(self, name: str, options: Mapping[str, Any]) -> LocalModel:
        """Load `name` and return when it serves; at once if it does already.

        Raises: ModelNotFound, BadModelFile, BadOptions, OutOfMemory, RunnerFailed, InvalidRequest (options).
        """

    async def unload(self, name: str) -> LocalModel:
        """Let requests in flight end, then end the runner. Raises: ModelNotFound if it is not loaded, InvalidRequest."""


class _Load(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    options: dict[str, Any] = {}


class _Unload(msgspec.Struct, forbid_unknown_fields=True):
    name: str


def routes(models: LocalModels, *, audit: Audit) -> list[Route]:
    """The endpoints under `/admin/models`."""

    async def show(request: Request) -> Response:
        return json_response({"models": await models.list()})

    async def load(request: Request) -> Response:
        wanted = await read_body(request, _Load)
        with _audited(audit, "model_load_ordered", request, wanted.name):
            loaded = await models.load(wanted.name, wanted.options)
        return json_response({"model": loaded})

    async def unload(request: Request) -> Response:
        wanted = await read_body(request, _Unload)
        with _audited(audit, "model_unload_ordered", request, wanted.name):
            unloaded = await models.unload(wanted.name)
        return json_response({"model": unloaded})

    return [
        Route("/admin/models", show, methods=["GET"]),
        Route("/admin/models/load", load, methods=["POST"]),
        Route("/admin/models/unload", unload, methods=["POST"]),
    ]


@contextlib.contextmanager
def _audited(audit: Audit, event: str, request: Request, name: str) -> Iterator[None]:
    """Write down who wanted it, and whether it came about."""
    success = False
    try:
        yield
        success = True
    finally:
        audit(event, **doer(request), model_name=name, success=success)
