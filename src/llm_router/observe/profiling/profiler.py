"""Profiles of the process that this runs in: one at a time, bounded in time and size, and the last hour's if wanted.

Not for: which process is meant, or who may ask (processes/profiles.py, admin/profile.py).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable

from llm_router.observe.profiling import formats, memory
from llm_router.observe.profiling.cpu import Frames, Indexes, Ring, Sampler, Stacks, rate_bounds
from llm_router.observe.profiling.profile import (
    FORMATS,
    KINDS,
    MAX_SECONDS,
    CannotProfile,
    Format,
    Frame,
    Kind,
    Profile,
    ProfileRunning,
    Stack,
)
from llm_router.observe.profiling.settings import ProfilerSettings


class Profiler:
    """Takes profiles of this process. Belongs into the main thread, and into the event loop that runs there.

    Args:
        process: its name, as the profiles have it.
        clock, wall: monotonic and Unix seconds.
    """

    def __init__(
        self,
        settings: ProfilerSettings,
        *,
        process: str,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._process = process
        self._clock = clock
        self._wall = wall
        self._settings = ProfilerSettings(enabled=False)
        self._sampler: Sampler | None = None
        self._ring: Ring | None = None
        self._busy_until = 0.0
        self._is_busy = False
        self.apply(settings)

    def __repr__(self) -> str:
        return f"Profiler({self._process!r}, enabled={self._settings.enabled}, busy={self._is_busy}, {self._sampler})"

    @property
    def settings(self) -> ProfilerSettings:
        """What is in force."""
        return self._settings

    @property
    def cpu_s(self) -> float:
        """CPU seconds that taking samples has used in all."""
        return 0.0 if self._sampler is None else self._sampler.cpu_s

    def apply(self, settings: ProfilerSettings) -> None:
        """Follow other settings: the continuous samples begin anew if theirs changed. A profile in progress goes on.

        Raises: CannotProfile if samples are to be taken continuously and cannot be (another profiler, not the main
            thread); profiles of memory can be taken then all the same.
        """
        old, self._settings = self._settings, settings
        if _continuous(settings) == _continuous(old):
            return
        if self._ring is not None and self._sampler is not None:
            self._sampler.detach(self._ring)
        self._ring = None
        if rate_hz := _continuous(settings)[0]:
            ring = Ring(settings.continuous_s, self._clock())
            self._own_sampler().attach(ring, rate_hz)
            self._ring = ring

    def close(self) -> None:
        """End the continuous samples; nothing else runs between profiles."""
        self.apply(ProfilerSettings(enabled=False))

    async def take(self, kind: str, seconds: float, format: str, rate_hz: float | None = None) -> bytes:
        """Take a profile and write it down, in at most `MAX_BYTES`.

        Args:
            kind: one of `KINDS`.
            seconds: more than 0, at most `MAX_SECONDS`; of `continuous`, how far back, whatever that is.
            format: one of `FORMATS`.
            rate_hz: samples in a second of CPU time; as configured if it is None.

        Raises: CannotProfile, ProfileRunning, ValueError for arguments that there are not. Cancelled, it ends at once.
        """
        if kind not in KINDS or format not in FORMATS:
            raise ValueError(f"no profile of kind {kind!r} and format {format!r}")
        if not (math.isfinite(seconds) and seconds > 0.0):
            raise ValueError(f"a profile of {seconds} seconds")
        if kind != "continuous" and seconds > MAX_SECONDS:
            raise ValueError(f"{seconds:g} s are more than a profile may take ({MAX_SECONDS:g} s)")
        if not self._settings.enabled:
            raise CannotProfile("profiles are switched off; profiler.enabled (PROFILER_ENABLED=true) switches them on")
        if self._is_busy:
            left_s = max(1.0, self._busy_until - self._clock())
            raise ProfileRunning(
                f"a profile of {self._process} is being taken; it takes {left_s:.0f} s more", retry_after_s=left_s
            )
        self._is_busy = True
        self._busy_until = self._clock() + (0.0 if kind == "continuous" else seconds)
        try:
            if kind == "memory":
                profile = await self._memory(seconds)
            elif kind == "continuous":
                profile = await asyncio.to_thread(self._profile, "continuous", *self._lately(seconds))
            else:
                profile = await self._cpu(seconds, self._settings.rate_hz if rate_hz is None else rate_hz)
            return await asyncio.to_thread(formats.render, profile, _format(format))
        finally:
            self._is_busy = False

    # -- the kinds -----------------------------------------------------------------------------------------

    async def _cpu(self, seconds: float, rate_hz: float) -> Profile:
        if not (rate_hz := rate_bounds(rate_hz)):
            raise ValueError("a CPU profile without samples")
        sampler, stacks = self._own_sampler(), Stacks()
        faults, began_at, process_s = sampler.faults, self._clock(), time.process_time()
        sampler.attach(stacks, rate_hz)
        try:
            await asyncio.sleep(seconds)
        finally:
            sampler.detach(stacks)
        notes = {"process_cpu_seconds": time.process_time() - process_s, "faults": sampler.faults - faults}
        return await asyncio.to_thread(self._profile, "cpu", stacks, sampler.frames, self._clock() - began_at, notes)

    def _lately(self, seconds: float) -> tuple[Stacks, Frames, float, dict[str, float]]:
        if self._ring is None or self._sampler is None:
            raise CannotProfile("no samples are taken continuously; profiler.continuous_hz above 0 switches that on")
        now = self._clock()
        stacks, began_at = self._ring.since(now - seconds, now)
        return stacks, self._sampler.frames, now - began_at, {}

    async def _memory(self, seconds: float) -> Profile:
        began_time, began_at = self._wall(), self._clock()
        grown = await memory.growth(seconds)
        took_s = self._clock() - began_at
        return await asyncio.to_thread(self._memory_profile, grown, began_time, took_s)

    def _memory_profile(self, grown: memory.Growth, began_time: float, seconds: float) -> Profile:
        numbers: dict[tuple[str, int], int] = {}
        stacks = tuple(
            Stack(tuple(numbers.setdefault(line, len(numbers)) for line in lines), size, count)
            for lines, size, count in grown.stacks
        )
        return Profile(
            kind="memory",
            process=self._process,
            unit="bytes",
            began_time=began_time,
            seconds=seconds,
            frames=tuple(Frame(f"{memory.short(file)}:{line}", file, line) for file, line in numbers),
            stacks=stacks,
            notes={
                "traced_bytes": grown.traced_bytes,
                "peak_bytes": grown.peak_bytes,
                "tracing_bytes": grown.tracing_bytes,
            },
        )

    def _profile(self, kind: Kind, stacks: Stacks, frames: Frames, seconds: float, notes: dict[str, float]) -> Profile:
        found: list[tuple[Indexes, float, int]] = sorted(stacks.items(), key=lambda item: -item[1])
        numbers = _numbers(stack for stack, _, _ in found)
        return Profile(
            kind=kind,
            process=self._process,
            unit="seconds",
            began_time=self._wall() - seconds,
            seconds=seconds,
            frames=tuple(frames[index] for index in numbers),
            stacks=tuple(
                Stack(tuple(numbers[index] for index in stack), spent_s, count) for stack, spent_s, count in found
            ),
            notes=notes,
        )

    def _own_sampler(self) -> Sampler:
        if self._sampler is None:
            self._sampler = Sampler(clock=self._clock)
        return self._sampler


def _continuous(settings: ProfilerSettings) -> tuple[float, float]:
    rate_hz = rate_bounds(settings.continuous_hz) if settings.enabled and settings.continuous_s > 0.0 else 0.0
    return rate_hz, settings.continuous_s if rate_hz else 0.0


def _numbers(stacks: Iterable[Indexes]) -> dict[int, int]:
    """Consecutive numbers for the frames that these stacks have."""
    numbers: dict[int, int] = {}
    for stack in stacks:
        for index in stack:
            numbers.setdefault(index, len(numbers))
    return numbers


def _format(name: str) -> Format:
    return next(format for format in FORMATS if format == name)
