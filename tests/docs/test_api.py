"""The API reference is true: endpoints, headers, error codes with their status, and the examples' shapes."""

from __future__ import annotations

import ast
import importlib
import json
import pkgutil
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from starlette.routing import Route

import llm_router
from llm_router.accounts.access import AccessSettings
from llm_router.accounts.stored import StoredKey
from llm_router.accounts.usage import UsageTotal
from llm_router.admin import debug, keys, log_level, models, monitoring, profile, reload, usage
from llm_router.admin.models import LocalModel
from llm_router.errors import RouterError
from llm_router.gateway import anthropic, core, openai
from llm_router.gateway.core import Core
from llm_router.gateway.forward import Forwarded
from llm_router.gateway.front import INTERNAL_ERROR
from llm_router.gateway.generate import Generated, failure, success
from llm_router.observe.health.checks import passed
from llm_router.observe.health.report import Health, Report
from llm_router.observe.health.scheduler import HealthChecks
from llm_router.observe.health.settings import HealthSettings
from llm_router.observe.health.state import Inputs, ModelState
from llm_router.observe.logs.levels import ChangedLevels
from llm_router.observe.logs.settings import LogSettings
from llm_router.observe.metrics.slots import Collected
from llm_router.observe.profiling.formats import render
from llm_router.observe.profiling.profile import Frame, Profile, Stack
from llm_router.observe.tracing.store import TraceStore
from llm_router.routing.router import Router
from llm_router.routing.table import ModelSpec
from llm_router.signals import NoRecorder
from llm_router.testing import FakeClock
from support.aio import run
from support.traces import span, trace

SOURCES = Path(llm_router.__file__).parent
REFERENCE = (Path(__file__).parents[2] / "docs" / "reference" / "api.md").read_text(encoding="utf-8")


def table(first: str) -> list[list[str]]:
    """The cells of every row of the table whose first column has this heading."""
    _, found, rest = REFERENCE.partition(f"\n| {first} |")
    assert found, first
    rows = rest.partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def coded(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def examples() -> list[Any]:
    """Every JSON block, decoded."""
    return [json.loads(block) for block in re.findall(r"```json\n(.*?)```", REFERENCE, re.DOTALL)]


def example(key: str) -> Any:
    """The one example that has this key at its top."""
    (found,) = (value for value in examples() if key in value)
    return found


def shape(value: Any) -> Any:
    """The keys of a document, at every depth."""
    return {key: shape(inner) for key, inner in value.items()} if isinstance(value, dict) else None


# -- endpoints ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gateway() -> Core:
    async def forward(*_: object) -> Forwarded:
        return Forwarded(200, 0, b"")

    router = Router(
        open_backend=lambda spec: cast("Any", spec),
        close_backend=lambda backend: None,
        on_backend=lambda name, is_up: None,
        clock=time.monotonic,
        rng=random.Random(1),
    )
    return Core(router, NoRecorder(), access=AccessSettings(), forward=forward, clock=time.monotonic)


def control_routes() -> list[Route]:
    """Everything that control may serve."""
    return [
        *monitoring.routes(
            cast("Any", None), version="", metrics_path="/metrics", health_path="/health", now=time.time
        ),
        *models.routes(cast("Any", None), audit=cast("Any", None)),
        *keys.routes(cast("Any", None), audit=cast("Any", None), now=time.time),
        *usage.routes(cast("Any", None), now=time.time),
        *profile.routes(cast("Any", None), audit=cast("Any", None), now=time.time),
        *debug.routes(cast("Any", None), traces=lambda: None, version="", now=time.time),
        *log_level.routes(cast("Any", None), LogSettings, on_change=lambda: None, audit=cast("Any", None)),
        *reload.routes(list, audit=cast("Any", None)),
    ]


def control_endpoints() -> set[str]:
    return {f"{method} {route.path}" for route in control_routes() for method in (route.methods or set()) - {"HEAD"}}


def test_every_endpoint_is_listed(gateway: Core) -> None:
    """And nothing is listed that neither a worker nor control serves."""
    own = {f"{method} {path}" for path, (method, _) in gateway._routes.items()} | {"GET /v1/models/{id}"}
    assert {coded(cells[0])[0] for cells in table("endpoint")} == own | control_endpoints()


def test_every_endpoint_has_the_route_that_metrics_show(gateway: Core) -> None:
    """As the core labels it."""
    for endpoint, _, route, _ in table("endpoint"):
        path = coded(endpoint)[0].partition(" ")[2]
        assert gateway._find(path)[0] == coded(route)[0]


def test_the_port_column_says_who_serves_it() -> None:
    """What control serves is there on both ports."""
    for endpoint, port, _, _ in table("endpoint"):
        assert port == ("both" if coded(endpoint)[0] in control_endpoints() else "API")


def test_the_worker_forwards_only_what_control_serves() -> None:
    """A path of its own in the forwarded list would promise an endpoint that is not there."""
    assert {f"GET {path}" for path in core._FORWARDED_PATHS} <= control_endpoints()


def test_the_index_lists_the_same() -> None:
    """`GET /`, but for itself."""
    index = monitoring.index(control_routes(), version="", moved={})
    found = {
        f"{method} {path}" for method, path in re.findall(r"^  (GET|POST|PUT|PATCH|DELETE) +(\S+)", index, re.MULTILINE)
    }
    assert found == {coded(cells[0])[0] for cells in table("endpoint")} - {"GET /", "GET /v1/models/{id}"}


# -- headers --------------------------------------------------------------------------------------------


def test_every_header_of_ours_is_listed() -> None:
    """Those that a page of another origin may read, which are those that we set, and two of HTTP's; and what we read."""
    from llm_router.accounts.access import _EXPOSED

    exposed = {name.strip() for name in _EXPOSED.decode().split(",")}
    assert {coded(cells[0])[0] for cells in table("reply header")} == exposed | {"allow", "www-authenticate"}
    files = [*(SOURCES / "gateway").glob("*.py"), *(SOURCES / "cache").glob("*.py")]
    source = "".join(path.read_text(encoding="utf-8") for path in files)
    ours = set(re.findall(r'b"(x-llm-router-[a-z-]+)"', source)) - {"x-llm-router-client"}
    read = {name for cells in table("request header") for name in coded(cells[0]) if name.startswith("x-llm-router-")}
    assert ours == read | {name for name in exposed if name.startswith("x-llm-router-")}


# -- errors ---------------------------------------------------------------------------------------------


def literals(node: ast.expr) -> Iterator[str]:
    """The strings that an expression may come to, seen from outside."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value:
        yield node.value
    elif isinstance(node, ast.IfExp):
        yield from literals(node.body)
        yield from literals(node.orelse)


def codes_in_calls() -> Iterator[tuple[str, int | None]]:
    """Each `code="..."` of a call anywhere in the sources, with the status of that call where it is plain."""
    for path in SOURCES.rglob("*.py"):
        if path.name == "testing.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                given = {keyword.arg: keyword.value for keyword in node.keywords}
                if "code" in given:
                    status = given.get("status", ast.Constant(400))
                    name = node.func.id if isinstance(node.func, ast.Name) else ""
                    plain = name == "InvalidRequest" and isinstance(status, ast.Constant)
                    for code in literals(given["code"]):
                        yield code, cast("int", cast("ast.Constant", status).value) if plain else None


def classes(root: type[RouterError] = RouterError) -> Iterator[type[RouterError]]:
    yield root
    for child in root.__subclasses__():
        yield from classes(child)


SCRIPTS = (".__main__", ".migrations.env")
"""Modules that do their work when they are run, and cannot be imported for their names."""


def test_every_error_code_is_listed_with_its_status() -> None:
    """Those of the classes, those of the call sites, and no other."""
    for module in pkgutil.walk_packages(llm_router.__path__, "llm_router."):  # so that every class is there
        if not module.name.endswith(SCRIPTS):
            importlib.import_module(module.name)
    of_cli = {coded(cells[0])[0] for cells in table("code of the command line")}
    expected: dict[str, set[int]] = {}
    for kind in classes():
        if kind.__module__.startswith("llm_router"):
            expected.setdefault(kind.code, set()).add(kind.status)
    for code, status in codes_in_calls():
        expected.setdefault(code, set()).update(() if status is None else (status,))
    expected.setdefault(json.loads(INTERNAL_ERROR)["error"]["code"], set()).add(500)
    found = {coded(code)[0]: {int(part) for part in status.split(",")} for code, status, _ in table("code")}
    assert of_cli <= set(expected)
    assert found == {code: statuses for code, statuses in expected.items() if code not in of_cli}


def test_every_error_says_when() -> None:
    """In a sentence, once."""
    rows = table("code") + table("code of the command line")
    assert all(cells[-1].endswith(".") for cells in rows)
    assert len({cells[0] for cells in rows}) == len(rows)


def test_error_types_follow_the_status() -> None:
    """As openai's client maps them to its classes."""
    found = {
        int(status): coded(kind)[0]
        for kind, statuses in table("error type")
        if statuses[0].isdigit()
        for status in statuses.split(",")
    }
    assert found == openai._TYPES


def test_a_fault_of_the_front_is_an_error_like_any_other() -> None:
    """Its body is made beforehand, as whatever makes bodies may be what failed."""
    usual = json.loads(openai.error_object(RouterError("x"), "1"))["error"]
    fault = json.loads(INTERNAL_ERROR)["error"]
    assert {**usual, "message": ""} == {**fault, "message": "", "request_id": "1"}


# -- examples -------------------------------------------------------------------------------------------


def test_the_health_example_has_the_shape_of_a_report() -> None:
    """Every key at every depth, and the checks by name; one that runs by itself beside those of the state."""
    name = "smollm2-135m-instruct"
    inputs = Inputs(
        is_initialized=True,
        models=(ModelState(name=name, state="loaded"),),
        workers_up=1,
        workers_wanted=1,
        runners={name: "ready"},
        cpu_ratio=0.125,
        memory_used_bytes=2e9,
        memory_limit_bytes=8e9,
        heap_bytes=48e6,
        rss_bytes=84e6,
        runner_bytes=210e6,
        disk_ratio=0.5,
        disk_path="/var/lib/llm-router",
        engine="llama.cpp",
        environment="production",
    )
    clock, wall = FakeClock(10.0), FakeClock(1757120400.0)

    async def checked() -> Report:
        checks = HealthChecks(HealthSettings(), clock=clock, wall=wall, rng=random.Random(1))
        checks.add_check("database", lambda: passed("The database answers"))
        await checks.start()
        await checks.run_all_checks()
        health = Health(lambda: inputs, checks, version="0.1.0", started_at=0.0, monotonic=clock, now=wall)
        report = health.report()
        await checks.aclose()
        return report

    report = run(checked())
    shown, real = example("checks"), report.document()
    assert shape(shown) == shape(real)
    for check, document in real["checks"].items():
        assert {**shown["checks"][check], "duration": 0.0} == {**document, "duration": 0.0}
    assert shown["timestamp"] == real["timestamp"]
    draft = REFERENCE.partition("draft-inadarei-api-health-check:")[2].partition(".\n")[0]
    assert set(coded(draft)) - {"pass", "warn", "fail"} == set(report.ietf())


def test_the_other_examples_have_the_shape_of_what_is_sent() -> None:
    """Errors, the envelope of /api/generate, models."""
    shapes = [shape(value) for value in examples()]
    error = RouterError("x")
    for body in (openai.error_object(error, "1"), anthropic.error_object(error, "1"), failure("x", "1")):
        assert shape(json.loads(body)) in shapes
    result = Generated("t", 1, "m", 1.0, False, "s", {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0})
    assert shape(example("metadata")) == shape(json.loads(success(result, "1", 1.0)))
    assert shape(example("owned_by")) == shape(openai.model_object(ModelSpec(name="m")))
    key = StoredKey(id="key-1", name="app", digest=b"", created_time=0.0)
    assert shape(example("secret")["key"]) == shape(msgspec.to_builtins(keys.shown(key, 0.0)))
    sums = {name for name, value in msgspec.structs.asdict(UsageTotal()).items() if value is not None}
    assert set(example("totals")["total"]) == sums
    (row,) = example("totals")["totals"]
    assert set(row) == sums | {"key_id", "key", "model"}
    assert set(example("size_bytes")) == set(LocalModel.__struct_fields__)
    assert msgspec.convert(example("size_bytes"), LocalModel).state == "loaded"


def test_the_debug_examples_have_the_shape_of_what_is_sent() -> None:
    """Requests, their spans, and models; and `/debug` names its keys."""
    kept = trace(steps=(span("chat"),))
    store = TraceStore(1, wall=lambda: 0.0)
    store.add(kept)
    (request,), (group,) = example("groups")["requests"], example("groups")["groups"]
    assert list(request) == list(debug._listed(kept))
    assert list(request["steps"][0]) == list(debug._listed(kept)["steps"][0])
    assert list(group) == list(debug._group(store.groups()[0]))
    assert list(example("groups")["kept"]) == list(store.statistics()._fields)
    assert list(example("span_id")) == list(debug._whole(kept)["spans"][0])
    (model,) = debug._models([debug.ModelFacts(name="m", state="loaded")], Collected([]))
    (figures,) = (value for value in examples() if {"since", "models"} <= set(value))
    assert shape(figures["models"][0]) == shape(model)
    described = REFERENCE.partition("`GET /debug` answers")[2].partition("\n\n")[0]
    assert set(debug.RouterStatus.__struct_fields__) - {"environment"} <= set(coded(described))


def test_the_log_level_example_is_what_is_answered() -> None:
    """To the request that is shown above it."""
    levels = ChangedLevels(lambda: 1757120400.0)
    levels.change("llm_router.gateway", "debug", 600.0)
    assert example("configured") == log_level._document(levels, LogSettings())


def test_the_profile_example_has_the_shape_of_a_profile() -> None:
    """As it is written down as JSON, with the notes of one of CPU time."""
    taken = Profile(
        kind="cpu",
        process="worker-0",
        unit="seconds",
        began_time=0.0,
        seconds=1.0,
        frames=(Frame("a", "a.py", 1),),
        stacks=(Stack((0,), 1.0, 1),),
        notes={"process_cpu_seconds": 0.0, "faults": 0},
    )
    real = json.loads(render(taken, "json"))
    shown = example("stacks")
    assert shape(shown) == shape(real)
    assert set(shown["frames"][1]) == set(real["frames"][0])
    assert set(shown["stacks"][0]) == set(real["stacks"][0])
