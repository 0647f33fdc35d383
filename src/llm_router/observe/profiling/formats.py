"""A profile written down: for speedscope.app, as folded stacks for flame graph tools, or as plain JSON.

Bounded: what does not fit is one stack, `(other stacks)`, so that the sums stay true. Not for: taking profiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from llm_router.observe.profiling.profile import MAX_BYTES, Format, Frame, Profile, Stack

CONTENT_TYPES: Final[dict[Format, str]] = {
    "speedscope": "application/json",
    "folded": "text/plain; charset=utf-8",
    "json": "application/json",
}
FILE_ENDINGS: Final[dict[Format, str]] = {"speedscope": "speedscope.json", "folded": "folded", "json": "json"}

_SCHEMA: Final = "https://www.speedscope.app/file-format-schema.json"
_MICRO: Final = 1e6  # folded stacks have whole numbers only


def render(profile: Profile, format: Format, max_bytes: int = MAX_BYTES) -> bytes:
    """`profile` in `format`, in at most `max_bytes` as long as that is enough for one stack."""
    write = {"speedscope": _speedscope, "folded": _folded, "json": _json}[format]
    kept = len(profile.stacks)
    while True:
        body = write(_heaviest(profile, kept))
        if len(body) <= max_bytes or kept <= 1:
            return body
        # Stacks are about as long as each other; a tenth less, so that one or two turns are enough.
        kept = min(kept - 1, int(kept * 0.9 * max_bytes / len(body)))


def _heaviest(profile: Profile, kept: int) -> Profile:
    """The profile with `kept` stacks, the others summed, and only the frames that these have."""
    stacks = list(profile.stacks[:kept])
    rest = profile.stacks[kept:]
    frames = list(profile.frames)
    if rest:
        frames.append(Frame("(other stacks)"))
        stacks.append(Stack((len(frames) - 1,), sum(s.value for s in rest), sum(s.count for s in rest)))
    numbers: dict[int, int] = {}
    renumbered = tuple(
        Stack(tuple(numbers.setdefault(index, len(numbers)) for index in stack.frames), stack.value, stack.count)
        for stack in stacks
    )
    return msgspec.structs.replace(profile, frames=tuple(frames[index] for index in numbers), stacks=renumbered)


def _folded(profile: Profile) -> bytes:
    """`outermost;...;innermost N`, N in microseconds or bytes."""
    scale = _MICRO if profile.unit == "seconds" else 1.0
    names = [" ".join(frame.name.replace(";", ":").split()) for frame in profile.frames]
    lines: dict[str, float] = {}
    for stack in profile.stacks:  # functions of the same name become one
        text = ";".join(names[index] for index in stack.frames)
        lines[text] = lines.get(text, 0.0) + stack.value * scale
    return "".join(f"{text} {round(value)}\n" for text, value in lines.items() if round(value)).encode(
        "utf-8", "backslashreplace"
    )


def _speedscope(profile: Profile) -> bytes:
    """One profile for each thread, the busiest first; memory is one."""
    threads: dict[str, list[Stack]] = {}
    for stack in profile.stacks:
        name = profile.frames[stack.frames[0]].name if stack.frames and profile.unit == "seconds" else profile.kind
        threads.setdefault(name, []).append(stack)
    title = f"{profile.process} {profile.kind}"
    document = {
        "$schema": _SCHEMA,
        "name": title,
        "exporter": "llm-router",
        "activeProfileIndex": 0,
        "shared": {"frames": [_frame(frame) for frame in profile.frames]},
        "profiles": [
            _sampled(f"{title}: {name}", profile.unit, stacks)
            for name, stacks in sorted(threads.items(), key=lambda item: -sum(stack.value for stack in item[1]))
        ]
        or [_sampled(title, profile.unit, [])],
    }
    return msgspec.json.encode(document)


def _sampled(name: str, unit: str, stacks: Sequence[Stack]) -> dict[str, Any]:
    weights = [_number(stack.value, unit) for stack in stacks]
    return {
        "type": "sampled",
        "name": name,
        "unit": unit,
        "startValue": 0,
        "endValue": _number(sum(weights), unit),
        "samples": [stack.frames for stack in stacks],
        "weights": weights,
    }


def _json(profile: Profile) -> bytes:
    document = {
        "kind": profile.kind,
        "process": profile.process,
        "unit": profile.unit,
        "began": profile.began_time,
        "seconds": round(profile.seconds, 3),
        "total": _number(sum(stack.value for stack in profile.stacks), profile.unit),
        "count": sum(stack.count for stack in profile.stacks),
        "notes": profile.notes,
        "frames": [_frame(frame) for frame in profile.frames],
        "stacks": [
            {"frames": stack.frames, "value": _number(stack.value, profile.unit), "count": stack.count}
            for stack in profile.stacks
        ],
    }
    return msgspec.json.encode(document)


def _frame(frame: Frame) -> dict[str, Any]:
    name = frame.name.encode("utf-8", "backslashreplace").decode()
    if not frame.file:
        return {"name": name}
    return {"name": name, "file": frame.file.encode("utf-8", "backslashreplace").decode(), "line": frame.line}


def _number(value: float, unit: str) -> float:
    return round(value) if unit == "bytes" else round(value, 6)
