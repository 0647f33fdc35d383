"""The queue of one model: who gets the next slot when all of them are taken, and who waited too long.

Two classes wait, interactive and batch. Within a class the keys take turns, and the requests of a key keep their
order: a key that sends a thousand requests delays the others by one each. Pure: whoever waits is told by a call.
Not for: awaiting (router.py) or limits of keys (accounts).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from enum import Enum

from llm_router.chat import Priority

BATCH_TURN = 8
"""While both classes wait, every eighth turn is batch's. Seven eighths keep an interactive wait within 8/7 of what it
would be without batch, which nobody notices; an eighth moves batch on steadily, so that it cannot starve."""

_SMOOTHING = 0.1  # weight of the newest service time: the estimate follows a change within some twenty requests


class _Is(Enum):
    WAITING = 0
    CALLED = 1
    GONE = 2


class Place:
    """A request's place in the queue."""

    __slots__ = ("due_at", "is_", "key", "priority", "wake")

    def __init__(self, key: str, priority: Priority, due_at: float, wake: Callable[[bool], None]) -> None:
        self.key = key
        self.priority = priority
        self.due_at = due_at
        self.wake = wake
        self.is_ = _Is.WAITING

    def __repr__(self) -> str:
        return f"<Place {self.is_.name} {self.priority} key={self.key!r} due_at={self.due_at:.1f}>"


class _Line:
    """The places of one class: by key, in the order in which the keys have their turns."""

    __slots__ = ("_keys",)

    def __init__(self) -> None:
        self._keys: OrderedDict[str, OrderedDict[Place, None]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._keys)

    def add(self, place: Place) -> None:
        places = self._keys.get(place.key)
        if places is None:
            places = self._keys[place.key] = OrderedDict()
        places[place] = None

    def remove(self, place: Place) -> None:
        places = self._keys[place.key]
        del places[place]
        if not places:
            del self._keys[place.key]

    def next(self) -> Place:
        """Takes out the place whose turn it is. There must be one."""
        key, places = next(iter(self._keys.items()))
        place, _ = places.popitem(last=False)
        if places:
            self._keys.move_to_end(key)
        else:
            del self._keys[key]
        return place

    def due(self, now: float) -> list[Place]:
        return [place for places in self._keys.values() for place in places if place.due_at <= now]


class ModelQueue:
    """Slots and the places of those who wait for one. A place is called or expires exactly once, or leaves.

    Args:
        slots: requests that may be served at once, >= 1.
        max_waiting: places; 0 if nobody may wait.

    Attributes:
        busy: slots that are taken.
        waiting: places that are taken.
    """

    __slots__ = (
        "_batch",
        "_interactive",
        "_interactive_turns",
        "_service_s",
        "busy",
        "max_waiting",
        "slots",
        "waiting",
    )

    def __init__(self, slots: int, max_waiting: int) -> None:
        self.slots = slots
        self.max_waiting = max_waiting
        self.busy = 0
        self.waiting = 0
        self._interactive = _Line()
        self._batch = _Line()
        self._interactive_turns = 0  # since batch had one, while batch waited
        self._service_s = 0.0  # a mean of how long slots are held, 0 before the first

    def __repr__(self) -> str:
        return f"<ModelQueue busy={self.busy}/{self.slots} waiting={self.waiting}/{self.max_waiting}>"

    def take(self) -> bool:
        """Take a free slot, if there is one. Nobody waits then: a slot that becomes free goes to who waits."""
        if self.busy < self.slots:
            self.busy += 1
            return True
        return False

    def release(self, held_s: float) -> None:
        """Give back a slot that was held for `held_s` seconds; it is the next one's at once."""
        if self._service_s:
            self._service_s += _SMOOTHING * (held_s - self._service_s)
        else:
            self._service_s = held_s
        self._free()

    @property
    def has_slot(self) -> bool:
        """Whether `take` would succeed."""
        return self.busy < self.slots

    def join(self, key: str, priority: Priority, due_at: float, wake: Callable[[bool], None]) -> Place:
        """Take a place. There must be no slot free, and fewer than `max_waiting` waiting.

        Args:
            due_at: the instant at which `sweep` ends the wait.
            wake: called once, with True when a slot is the caller's, with False when the wait was too long.
        """
        assert self.busy >= self.slots, "nobody waits while a slot is free"
        assert self.waiting < self.max_waiting, "a full queue takes nobody"
        place = Place(key, priority, due_at, wake)
        self._line(place).add(place)
        self.waiting += 1
        return place

    def leave(self, place: Place) -> None:
        """Give up: the place is free at once, and the slot if it had been called. Idempotent."""
        was = place.is_
        place.is_ = _Is.GONE
        if was is _Is.WAITING:
            self._line(place).remove(place)
            self.waiting -= 1
        elif was is _Is.CALLED:
            self._free()

    def sweep(self, now: float) -> None:
        """Tell those that they waited too long whose time is over; costs a walk over all who wait."""
        for line in (self._interactive, self._batch):
            for place in line.due(now):
                self.leave(place)
                place.wake(False)

    def resize(self, slots: int, max_waiting: int) -> None:
        """Use other bounds from now on. Who waits or is served already stays."""
        self.slots = slots
        self.max_waiting = max_waiting
        while self.waiting and self.busy < slots:
            self._call_next()

    def retry_after_s(self, wait_s: float) -> float:
        """When somebody who finds the queue full may come back: the time in which those who wait now are served.

        After `wait_s` at the latest they have left, one way or the other. At least a second.
        """
        return max(1.0, min(self.waiting * self._service_s / self.slots, wait_s))

    def _line(self, place: Place) -> _Line:
        return self._batch if place.priority == "batch" else self._interactive

    def _free(self) -> None:
        self.busy -= 1
        if self.waiting and self.busy < self.slots:
            self._call_next()

    def _call_next(self) -> None:
        if not self._batch:
            line = self._interactive
        elif not self._interactive or self._interactive_turns >= BATCH_TURN - 1:
            line = self._batch
            self._interactive_turns = 0
        else:
            line = self._interactive
            self._interactive_turns += 1
        place = line.next()
        place.is_ = _Is.CALLED
        self.waiting -= 1
        self.busy += 1
        place.wake(True)
