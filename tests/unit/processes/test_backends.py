"""Which backends are up: what workers saw, and free probes of the quiet and the dead."""

from __future__ import annotations

import asyncio

from llm_router.processes.backends import BackendWatch, answers
from llm_router.processes.snapshot import BackendSeen
from llm_router.routing.table import BackendSpec
from llm_router.testing import FakeClock, ScriptedBackend, reply
from support.aio import run
from support.net import free_port


class Watched:
    """A watch over backends whose probes are answered by `alive`; `probed` and `changes` in order."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.alive: set[str] = set()
        self.probed: list[str] = []
        self.changes: list[str] = []
        self.watch = BackendWatch(self.changes.append, every_s=5.0, clock=self.clock, probe=self._probe)

    async def _probe(self, spec: BackendSpec) -> bool:
        self.probed.append(spec.name)
        return spec.name in self.alive

    def due(self) -> list[str]:
        self.probed.clear()
        run(self.watch.probe_due())
        return sorted(self.probed)


def spec(name: str, url: str = "http://127.0.0.1:1/v1", **fields: object) -> BackendSpec:
    return BackendSpec(name=name, url=url, **fields)  # type: ignore[arg-type]


def test_a_new_backend_is_unknown_until_it_is_probed() -> None:
    """Nothing is claimed before something was seen."""
    stage = Watched()
    stage.alive = {"a"}
    stage.watch.follow([spec("a"), spec("b")])
    assert (stage.watch.is_up("a"), stage.watch.is_up("nobody")) == (None, None)
    assert stage.due() == ["a", "b"]
    assert (stage.watch.is_up("a"), stage.watch.is_up("b")) == (True, False)
    assert stage.changes == ["a", "b"]


def test_who_is_in_use_is_not_probed() -> None:
    """A worker's word is as good; after five quiet seconds a probe is due again."""
    stage = Watched()
    stage.watch.follow([spec("a")])
    stage.watch.saw(BackendSeen("a", up=True))
    stage.clock.advance(4.9)
    assert stage.due() == []
    stage.clock.advance(0.2)
    assert stage.due() == ["a"]


def test_what_workers_see_counts_at_once() -> None:
    """Down with its reason, up again by a later word or a probe."""
    stage = Watched()
    stage.watch.follow([spec("a")])
    stage.watch.saw(BackendSeen("a", up=True))
    stage.watch.saw(BackendSeen("a", up=False, problem="connection refused"))
    assert (stage.watch.is_up("a"), stage.watch.problem("a")) == (False, "connection refused")
    stage.alive = {"a"}
    stage.clock.advance(5.0)
    stage.due()
    assert (stage.watch.is_up("a"), stage.watch.problem("a")) == (True, "")
    stage.watch.saw(BackendSeen("unknown", up=True))
    assert stage.watch.is_up("unknown") is None
    assert stage.changes == ["a", "a", "a"]


def test_a_runner_is_up_while_it_is_ready() -> None:
    """Its process says so; no probe is needed to know, and a new port starts afresh."""
    stage = Watched()
    stage.watch.follow([spec("r", local_model="m")])
    assert stage.watch.is_up("r") is True
    stage.watch.follow([spec("r", local_model="m", ready=False)])
    assert stage.watch.is_up("r") is False
    stage.clock.advance(60.0)
    assert stage.due() == []
    stage.watch.follow([spec("r", "http://127.0.0.1:2/v1", local_model="m")])
    assert stage.watch.is_up("r") is True


def test_a_backend_that_left_is_forgotten() -> None:
    """Also when a probe of it is answered late."""
    stage = Watched()
    stage.watch.follow([spec("a")])
    stage.watch.saw(BackendSeen("a", up=True))
    stage.watch.follow([])
    assert stage.watch.is_up("a") is None


def test_probes_cost_nothing() -> None:
    """A remote backend sees a connection and no request; a runner is asked for its health."""

    async def scenario() -> None:
        with ScriptedBackend() as backend:
            remote = spec("far", backend.base_url)
            assert await answers(remote)
            await backend.until(lambda seen: seen.connections)
            assert backend.requests == []
            backend.script(reply(b'{"status":"ok"}'))
            backend.script(reply(b'{"error":"loading"}', 503))
            runner = spec("near", backend.base_url, local_model="m")
            assert [await answers(runner), await answers(runner)] == [True, False]
            assert [request.target for request in backend.requests] == ["/health", "/health"]
        gone = spec("gone", f"http://127.0.0.1:{free_port()}/v1")
        assert not await answers(gone)
        assert not await answers(spec("nowhere", "http://no-such-host.invalid/v1"))

    run(scenario())


def test_the_task_probes_again_and_again() -> None:
    """Until it is cancelled."""

    async def scenario() -> None:
        seen = asyncio.Event()
        counts: list[int] = []

        async def probe(backend: BackendSpec) -> bool:
            counts.append(1)
            if len(counts) == 3:
                seen.set()
            return True

        watch = BackendWatch(lambda name: None, every_s=0.01, probe=probe)
        watch.follow([spec("a")])
        task = asyncio.ensure_future(watch.run())
        await seen.wait()
        task.cancel()
        await asyncio.wait({task})

    run(scenario())
