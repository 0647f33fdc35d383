"""Who gets the next slot of a model: bounds, turns of keys and classes, and places that are given up."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llm_router.chat import Priority
from llm_router.routing.queue import BATCH_TURN, ModelQueue, Place
from support.fuzz import examples


class Queue:
    """A queue whose slots are all taken; `called` and `late` are the names of who was called and who waited too long."""

    def __init__(self, slots: int = 1, max_waiting: int = 1000) -> None:
        self.queue = ModelQueue(slots, max_waiting)
        self.called: list[str] = []
        self.late: list[str] = []
        while self.queue.take():
            pass

    def join(self, name: str, key: str = "", priority: Priority = "interactive", due_at: float = 1e9) -> Place:
        return self.queue.join(
            key, priority, due_at, lambda has_come: (self.called if has_come else self.late).append(name)
        )

    def serve(self, times: int) -> list[str]:
        """The names of those that were called when so many slots became free, one after the other."""
        before = len(self.called)
        for _ in range(times):
            self.queue.release(1.0)
        return self.called[before:]


def test_free_slots_are_taken_without_waiting() -> None:
    queue = ModelQueue(2, 10)
    assert [queue.take() for _ in range(3)] == [True, True, False]
    queue.release(1.0)
    assert queue.take()
    assert (queue.busy, queue.waiting) == (2, 0)


def test_requests_of_one_key_keep_their_order() -> None:
    it = Queue()
    for name in "abc":
        it.join(name, "key")
    assert it.serve(3) == ["a", "b", "c"]


def test_keys_take_turns_however_many_requests_they_have() -> None:
    it = Queue()
    for i in range(100):
        it.join(f"greedy{i}", "greedy")
    for i in range(2):
        it.join(f"modest{i}", "modest")
    assert it.serve(5) == ["greedy0", "modest0", "greedy1", "modest1", "greedy2"]


def test_interactive_requests_go_first_and_batch_has_its_eighth_turn() -> None:
    it = Queue()
    for i in range(30):
        it.join(f"batch{i}", "b", "batch")
    for i in range(30):
        it.join(f"chat{i}", "c")
    served = it.serve(16)
    assert [name for name in served if name.startswith("batch")] == ["batch0", "batch1"]
    assert served[BATCH_TURN - 1] == "batch0"
    assert it.serve(20)[-4:] == ["chat28", "chat29", "batch4", "batch5"]


def test_a_place_that_is_given_up_is_free_at_once() -> None:
    it = Queue(max_waiting=2)
    first, _ = it.join("a"), it.join("b")
    assert it.queue.waiting == 2
    it.queue.leave(first)
    it.queue.leave(first)
    it.join("c")
    assert it.serve(2) == ["b", "c"]


def test_who_leaves_after_being_called_gives_the_slot_to_the_next() -> None:
    it = Queue()
    first, _ = it.join("a"), it.join("b")
    assert it.serve(1) == ["a"]
    it.queue.leave(first)
    assert it.called == ["a", "b"]
    assert (it.queue.busy, it.queue.waiting) == (1, 0)


def test_who_waited_too_long_is_told_and_has_no_place_any_more() -> None:
    it = Queue()
    it.join("a", due_at=5.0)
    it.join("b", due_at=7.0)
    it.join("c", "other", "batch", due_at=5.0)
    it.queue.sweep(4.9)
    assert it.late == []
    it.queue.sweep(5.0)
    assert (it.late, it.queue.waiting) == (["a", "c"], 1)
    assert it.serve(1) == ["b"]


def test_more_slots_call_those_who_wait() -> None:
    it = Queue()
    for name in "abc":
        it.join(name)
    it.queue.resize(3, 10)
    assert it.called == ["a", "b"]
    it.queue.resize(1, 10)
    assert it.serve(2) == []
    assert it.serve(1) == ["c"]


def test_when_to_come_back_follows_from_how_long_requests_take() -> None:
    it = Queue(slots=2)
    assert it.queue.retry_after_s(30.0) == 1.0
    it.queue.release(4.0)
    assert it.queue.take()
    for name in "abcdef":
        it.join(name)
    assert it.queue.retry_after_s(30.0) == 12.0  # six, two at a time, four seconds each
    assert it.queue.retry_after_s(5.0) == 5.0
    for _ in range(100):
        it.queue.release(0.5)
        it.queue.take()
    assert it.queue.retry_after_s(30.0) == 1.0


@given(
    waiting=st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["interactive", "batch"])), max_size=120),
    slots=st.integers(1, 4),
)
def test_turns_are_fair_and_nobody_starves(waiting: list[tuple[str, Priority]], slots: int) -> None:
    """In every stretch in which two keys of a class wait, their turns differ by one at most; while both classes wait,
    batch has one turn in every eight."""
    it = Queue(slots)
    left: Counter[tuple[str, str]] = Counter()
    for owner, kind in waiting:
        it.join(f"{kind} {owner}", owner, kind)
        left[kind, owner] += 1
    turns: Counter[tuple[str, str]] = Counter()
    since_batch = 0
    for served in it.serve(len(waiting)):
        priority, key = served.split()
        for other in "abcd":
            if left[priority, other] and left[priority, key]:
                assert turns[priority, key] <= turns[priority, other]
        both = any(left["batch", k] for k in "abcd") and any(left["interactive", k] for k in "abcd")
        if both:
            since_batch = 0 if priority == "batch" else since_batch + 1
            assert since_batch < BATCH_TURN
        turns[priority, key] += 1
        left[priority, key] -= 1
    assert not any(left.values())
    assert it.queue.waiting == 0


class Waiting(RuleBasedStateMachine):
    """Requests come, wait, are served, give up, expire and bounds change, in any order."""

    @initialize(slots=st.integers(1, 3), places=st.integers(0, 5))
    def begin(self, slots: int, places: int) -> None:
        self.queue = ModelQueue(slots, places)
        self.now = 0.0
        self.holders = 0
        self.over = 0  # who waits beyond a bound that was lowered meanwhile
        self.waiting: list[tuple[int, str, Priority, float, Place]] = []
        self.called: list[Place] = []
        self.number = 0

    def wake(self, number: int, has_come: bool) -> None:
        index = next(i for i, entry in enumerate(self.waiting) if entry[0] == number)
        _, key, priority, due_at, place = self.waiting.pop(index)
        if has_come:
            earlier = [entry for entry in self.waiting[:index] if entry[1:3] == (key, priority)]
            assert not earlier, "the requests of a key keep their order"
            self.called.append(place)
        else:
            assert due_at <= self.now

    @rule(key=st.sampled_from("abc"), priority=st.sampled_from(["interactive", "batch"]), wait_s=st.integers(1, 5))
    def come(self, key: str, priority: Priority, wait_s: int) -> None:
        if self.queue.take():
            assert not self.waiting, "nobody overtakes those who wait"
            self.holders += 1
        elif self.queue.waiting < self.queue.max_waiting:
            self.number += 1
            number = self.number
            place = self.queue.join(key, priority, self.now + wait_s, lambda came: self.wake(number, came))
            self.waiting.append((number, key, priority, self.now + wait_s, place))

    @precondition(lambda self: self.called)
    @rule(data=st.data())
    def called_one_runs(self, data: st.DataObject) -> None:
        self.called.pop(data.draw(st.integers(0, len(self.called) - 1)))
        self.holders += 1

    @precondition(lambda self: self.called)
    @rule(data=st.data())
    def called_one_is_cancelled(self, data: st.DataObject) -> None:
        self.queue.leave(self.called.pop(data.draw(st.integers(0, len(self.called) - 1))))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def waiting_one_leaves(self, data: st.DataObject) -> None:
        entry = self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1)))
        before = self.queue.waiting
        self.queue.leave(entry[4])
        assert self.queue.waiting == before - 1

    @precondition(lambda self: self.holders)
    @rule()
    def end(self) -> None:
        self.holders -= 1
        self.queue.release(1.0)

    @rule(seconds=st.integers(0, 3))
    def sweep(self, seconds: int) -> None:
        self.now += seconds
        self.queue.sweep(self.now)
        assert all(entry[3] > self.now for entry in self.waiting)

    @rule(slots=st.integers(1, 3), places=st.integers(0, 5))
    def resize(self, slots: int, places: int) -> None:
        self.queue.resize(slots, places)
        self.over = max(0, len(self.waiting) - places)

    @invariant()
    def the_books_are_true(self) -> None:
        if not hasattr(self, "queue"):
            return
        queue = self.queue
        assert queue.waiting == len(self.waiting)
        assert queue.busy == self.holders + len(self.called)
        self.over = min(self.over, max(0, queue.waiting - queue.max_waiting))
        assert queue.waiting <= queue.max_waiting + self.over
        assert not (queue.waiting and queue.has_slot), "nobody waits while a slot is free"


TestWaiting: Any = Waiting.TestCase
TestWaiting.settings = settings(max_examples=examples(100), stateful_step_count=40)
