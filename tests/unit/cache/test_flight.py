"""Of requests with one key one goes to a backend; whatever becomes of it, nobody waits for nothing and nobody is lost."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_router.cache.base import Cached
from llm_router.cache.flight import MOST_LEADERS, Flight, Flights
from support.aio import run, until
from support.fuzz import examples

ANSWER = Cached(b"application/json", b"{}", False, "b")
KEY = b"k"


class Scene:
    """Requests for one key: a leader, and others that wait in tasks."""

    def __init__(self, flights: Flights, waiting: int) -> None:
        self.flights = flights
        self.leader = flights.join(KEY)
        assert self.leader.leads
        self.others = [flights.join(KEY) for _ in range(waiting)]
        self.tasks = [asyncio.create_task(flight.wait()) for flight in self.others]

    async def settle(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    def done(self) -> list[Cached | str | None]:
        return [
            "waits" if not task.done() else "cancelled" if task.cancelled() else task.result() for task in self.tasks
        ]

    def leading(self) -> list[int]:
        return [position for position, flight in enumerate(self.others) if flight.leads]


def test_all_get_the_leaders_answer() -> None:
    """One asks; afterwards nothing is remembered, so that the next one asks again."""

    async def play() -> None:
        flights = Flights()
        scene = Scene(flights, 3)
        assert repr(flights) == "<Flights 1 keys, 3 waiting>"
        scene.leader.land(ANSWER)
        await scene.settle()
        assert scene.done() == [ANSWER] * 3
        for flight in (scene.leader, *scene.others):
            flight.leave()
        assert len(flights) == flights.waiting == 0
        assert flights.join(KEY).leads

    run(play())


def test_other_keys_do_not_wait() -> None:
    """Each has its own leader."""

    async def play() -> None:
        flights = Flights()
        assert flights.join(b"a").leads
        assert flights.join(b"b").leads
        assert len(flights) == 2

    run(play())


def test_a_leader_without_an_answer_hands_over_to_exactly_one() -> None:
    """The one that waits longest; the others go on waiting, now for it."""

    async def play() -> None:
        scene = Scene(Flights(), 3)
        scene.leader.leave()
        await scene.settle()
        assert scene.done() == [None, "waits", "waits"]
        assert scene.leading() == [0]
        scene.leader.leave()  # says it twice: nothing happens
        scene.others[0].land(ANSWER)
        await scene.settle()
        assert scene.done() == [None, ANSWER, ANSWER]

    run(play())


def test_an_answer_that_cannot_be_shared_lets_everybody_go() -> None:
    """Nobody waits for the next one that is too large in turn."""

    async def play() -> None:
        flights = Flights()
        scene = Scene(flights, 3)
        scene.leader.scatter()
        await scene.settle()
        assert scene.done() == [None] * 3
        assert not scene.leading()
        for flight in scene.others:
            flight.leave()
        assert len(flights) == 0

    run(play())


def test_leaders_that_fail_in_a_row_hold_nobody_up_for_ever() -> None:
    """After a few of them everybody goes on by itself."""

    async def play() -> None:
        flights = Flights()
        scene = Scene(flights, 10)
        leader: Flight = scene.leader
        for turn in range(MOST_LEADERS - 1):
            leader.leave()
            leader = scene.others[turn]
            assert scene.leading() == [turn]
        leader.leave()
        await scene.settle()
        assert scene.done() == [None] * 10
        assert not scene.leading()
        assert len(flights) == 0

    run(play())


def test_who_leaves_while_it_waits_is_passed_over() -> None:
    """Its client is gone: it must not be made the leader."""

    async def play() -> None:
        scene = Scene(Flights(), 3)
        await scene.settle()
        scene.tasks[0].cancel()
        await scene.settle()
        assert scene.flights.waiting == 2
        scene.leader.leave()
        await scene.settle()
        assert scene.done() == ["cancelled", None, "waits"]
        scene.others[1].scatter()
        await scene.settle()

    run(play())


@pytest.mark.parametrize("first", ("cancelled", "woken"))
def test_cancelled_in_the_moment_in_which_it_is_made_leader(first: str) -> None:
    """In either order the next one leads: the lead is not lost with the task."""

    async def play() -> None:
        scene = Scene(Flights(), 2)
        await scene.settle()
        if first == "cancelled":
            scene.tasks[0].cancel()
            scene.leader.leave()
        else:
            scene.leader.leave()
            scene.tasks[0].cancel()
        await scene.settle()
        assert scene.done() == ["cancelled", None]
        assert scene.leading() == [1]
        scene.others[1].leave()
        assert len(scene.flights) == 0

    run(play())


def test_the_last_one_to_be_cancelled_closes_the_flight() -> None:
    """Nothing stays for a key that nobody asks for."""

    async def play() -> None:
        scene = Scene(Flights(), 1)
        await scene.settle()
        scene.leader.leave()
        scene.tasks[0].cancel()
        await scene.settle()
        assert scene.done() == ["cancelled"]
        assert len(scene.flights) == 0

    run(play())


def test_who_never_waited_may_leave() -> None:
    """Something failed between joining and waiting."""

    async def play() -> None:
        flights = Flights()
        leader, other = flights.join(KEY), flights.join(KEY)
        other.leave()
        assert flights.waiting == 0
        leader.leave()
        assert len(flights) == 0
        leader.land(ANSWER)
        leader.scatter()

    run(play())


outcomes = st.lists(st.sampled_from(["answers", "too large", "fails", "leaves"]), min_size=1, max_size=30)


@given(outcomes=outcomes, pauses=st.lists(st.integers(0, 3), min_size=30, max_size=30))
@settings(max_examples=examples(200))
def test_everybody_ends_and_never_do_two_lead(outcomes: list[str], pauses: list[int]) -> None:
    """Whatever each of them would have met with, and whenever each comes."""

    async def play() -> None:
        flights = Flights()
        leading = 0
        ended = []

        async def ask(outcome: str, pause: int) -> None:
            nonlocal leading
            for _ in range(pause):
                await asyncio.sleep(0)
            flight = flights.join(KEY)
            try:
                answer = None if flight.leads else await flight.wait()
                if answer is None:
                    leads = flight.leads
                    leading += leads
                    assert leading <= 1
                    try:
                        for _ in range(2):
                            await asyncio.sleep(0)
                    finally:
                        leading -= leads
                    if outcome == "answers":
                        flight.land(ANSWER)
                    elif outcome == "too large":
                        flight.scatter()
            finally:
                flight.leave()
                ended.append(outcome)

        tasks = [asyncio.create_task(ask(*arguments)) for arguments in zip(outcomes, pauses, strict=False)]
        await asyncio.sleep(0)
        for task, outcome in zip(tasks, outcomes, strict=True):
            if outcome == "leaves":
                await asyncio.sleep(0)
                task.cancel()
        await until(lambda: all(task.done() for task in tasks), what="the end of everybody")
        for task in tasks:
            assert task.cancelled() or task.exception() is None
        assert len(flights) == flights.waiting == leading == 0

    run(play())
