"""A profile as a record: which stacks took how much, whatever took it and however it will be shown.

Not for: taking one (cpu.py, memory.py) or writing it down (formats.py).
"""

from __future__ import annotations

from typing import Final, Literal, get_args

import msgspec

from llm_router.errors import RouterError

Kind = Literal["cpu", "memory", "continuous"]
"""cpu: where CPU time goes from now on. memory: what was allocated from now on and is still there at the end.
continuous: where CPU time went lately, from the samples that are always taken."""

Format = Literal["speedscope", "folded", "json"]

KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
FORMATS: Final[tuple[Format, ...]] = get_args(Format)

MAX_SECONDS: Final = 60.0
"""Of a profile that is ordered: whoever forgot about it pays for no longer."""

MAX_BYTES: Final = 6 * 1024 * 1024
"""Of a profile that is written down: it fits into one message between processes."""


class CannotProfile(RouterError):
    """No such profile can be taken of this process, now or at all; the message says why."""

    code = "cannot_profile"
    status = 503


class ProfileRunning(RouterError):
    """Another profile is being taken: there is one at a time."""

    code = "profile_running"
    status = 409

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Frame(msgspec.Struct, frozen=True):
    """One entry of a stack: a function, a line, or a word for a thread or task. `line` is 0 if there is none."""

    name: str
    file: str = ""
    line: int = 0


class Stack(msgspec.Struct, frozen=True):
    """What one stack took.

    Args:
        frames: positions in the profile's `frames`, the outermost first.
        value: in the profile's unit.
        count: samples, or blocks of memory.
    """

    frames: tuple[int, ...]
    value: float
    count: int


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """A profile of one process.

    Args:
        began_time: Unix seconds.
        seconds: how long it was looked at.
        stacks: the heaviest first. The first frame of each is the thread, for a CPU profile.
        notes: figures beside it, like the CPU seconds of the whole process.
    """

    kind: Kind
    process: str
    unit: Literal["seconds", "bytes"]
    began_time: float
    seconds: float
    frames: tuple[Frame, ...]
    stacks: tuple[Stack, ...]
    notes: dict[str, float] = {}
