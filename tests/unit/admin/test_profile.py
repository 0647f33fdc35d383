"""`POST /debug/profile`: what is asked for, what comes back, what is refused, and that all of it is audited."""

from __future__ import annotations

from typing import Any

import pytest

from llm_router.admin import profile
from llm_router.admin.application import Entry
from llm_router.observe.profiling.profile import CannotProfile, Format, Kind, ProfileRunning
from support.admin import asked
from support.ask import Answer

NOW = 1_790_000_000.0  # 2026-09-21T14:13:20Z


class Scripted:
    """Takes no profile; remembers what was asked for."""

    def __init__(self, problem: Exception | None = None) -> None:
        self.problem = problem
        self.asked: tuple[object, ...] = ()
        self.audited: list[tuple[str, dict[str, Any]]] = []

    async def take(self, process: str, kind: Kind, seconds: float, format: Format) -> bytes:
        self.asked = (process, kind, seconds, format)
        if self.problem is not None:
            raise self.problem
        return b"a;b 1\n"

    def audit(self, event: str, /, **data: Any) -> None:
        self.audited.append((event, data))


def post(profiles: Scripted, query: str = "", *, entry: Entry = Entry.CLI, closed: bool = False) -> Answer:
    return asked(
        profile.routes(profiles, audit=profiles.audit, now=lambda: NOW),
        "POST",
        "/debug/profile",
        query,
        entry=entry,
        closed={} if closed else {Entry.MONITORING: frozenset()},
    )


def test_without_parameters_it_is_ten_seconds_of_the_first_worker() -> None:
    """For speedscope."""
    profiles = Scripted()
    reply = post(profiles)
    assert profiles.asked == ("worker-0", "cpu", 10.0, "speedscope")
    assert reply.status == 200
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["cache-control"] == "no-store"
    name = "worker-0-cpu-20260921T141320Z.speedscope.json"
    assert reply.headers["content-disposition"] == f'attachment; filename="{name}"'


def test_everything_can_be_said() -> None:
    """And the reply is of the type of its format."""
    profiles = Scripted()
    reply = post(profiles, "process=control&kind=memory&seconds=0.5&format=folded")
    assert profiles.asked == ("control", "memory", 0.5, "folded")
    assert (reply.headers["content-type"], reply.body) == ("text/plain; charset=utf-8", b"a;b 1\n")
    post(profiles, "kind=continuous&format=json")
    assert profiles.asked == ("worker-0", "continuous", 3600.0, "json")


@pytest.mark.parametrize(
    ("query", "code", "message"),
    [
        ("kind=wall", "invalid_profile", "kind='wall' is none that there is; there are cpu, memory, continuous"),
        ("format=svg", "invalid_profile", "there are speedscope, folded, json"),
        ("seconds=61", "invalid_profile", "seconds='61' is no number from 0.1 to 60"),
        ("seconds=0", "invalid_profile", "seconds='0' is no number"),
        ("seconds=nan", "invalid_profile", "seconds='nan' is no number"),
        ("seconds=inf&kind=continuous", "invalid_profile", "to 604800"),
        ("seconds=ten", "invalid_profile", "seconds='ten' is no number"),
        ("second=1", "unknown_parameter", "there is no parameter 'second'"),
        ("seconds=1&seconds=2", "repeated_parameter", "seconds is given twice"),
    ],
)
def test_what_cannot_be_understood_is_refused(query: str, code: str, message: str) -> None:
    """Before anything is ordered."""
    profiles = Scripted()
    reply = post(profiles, query)
    assert (reply.status, reply.json()["error"]["code"]) == (400, code)
    assert message in reply.json()["error"]["message"]
    assert profiles.asked == ()
    assert profiles.audited == []


def test_every_order_is_audited() -> None:
    """Who, what, and what came of it."""
    profiles = Scripted()
    post(profiles, "seconds=1")
    busy = Scripted(ProfileRunning("a profile of worker-1 is being taken", retry_after_s=7.5))
    reply = post(busy, "seconds=1")
    assert (reply.status, reply.json()["error"]["code"], reply.headers["retry-after"]) == (409, "profile_running", "8")
    gone = Scripted(CannotProfile("worker-0 went away"))
    assert post(gone).status == 503
    audited = [*profiles.audited, *busy.audited, *gone.audited]
    assert [event for event, _ in audited] == ["profile_taken"] * 3
    assert audited[0][1] == {
        "actor": "the command line",
        "success": True,
        "process": "worker-0",
        "kind": "cpu",
        "seconds": 1.0,
        "written_as": "speedscope",
        "outcome": "taken",
        "size_bytes": 6,
    }
    assert [(data["success"], data["outcome"]) for _, data in audited[1:]] == [
        (False, "profile_running"),
        (False, "cannot_profile"),
    ]


def test_it_is_for_administrators() -> None:
    """On a port where keys are needed, one with that scope."""
    profiles = Scripted()
    assert post(profiles, entry=Entry.MONITORING, closed=True).status == 401
    assert profiles.asked == ()
