"""Which lines are written: the level of a logger, and levels that are changed while the router runs.

A change holds until it is taken back, its time is over or control starts anew; a reload does not touch it. Not for:
asking for changes (admin/log_level.py) or telling the processes (the snapshot carries the settings in force).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, cast, get_args

import msgspec

from llm_router.observe.logs.settings import Level, LogSettings

LEVELS: Final[tuple[Level, ...]] = get_args(Level)

_OTHER_NAMES: Final[Mapping[str, Level]] = {"warn": "warning", "fatal": "critical", "trace": "debug"}
"""What other programs call the same."""

ROOT: Final = "llm_router"
"""The logger whose level is `LogSettings.level`."""

_SOURCES: Final = Path(__file__).parents[2]


def level_named(text: str) -> Level | None:
    """The level of that name, in whatever case and by whatever name other programs have for it; None for none."""
    word = text.strip().lower()
    word = _OTHER_NAMES.get(word, word)
    return word if word in LEVELS else None


def is_logger(name: str) -> bool:
    """Whether some module of ours may log by that name: one of its own, a package, or a process like `llm_router.worker`."""
    first, *rest = name.split(".")
    if first != ROOT or not all(part.isidentifier() for part in rest):
        return False
    if len(rest) == 1 and (_SOURCES / "processes" / f"{rest[0]}.py").is_file():
        return True
    place = _SOURCES.joinpath(*rest)
    return place.is_dir() or place.with_suffix(".py").is_file()


def loggers() -> list[str]:
    """Names that are of use, for who asked for another: of packages and processes. Those of modules are below them."""
    packages = [path.parent.name for path in _SOURCES.glob("*/__init__.py")]
    return sorted(f"{ROOT}.{name}" for name in (*packages, "control", "runner", "supervisor", "worker"))


def level_of(settings: LogSettings, logger: str) -> Level:
    """The level of a logger: of the longest name in `levels` that it has or is below, else of all."""
    name = logger
    while name:
        if name in settings.levels:
            return cast("Level", settings.levels[name])
        name = name.rpartition(".")[0]
    return settings.level


class Change(msgspec.Struct, frozen=True):
    """A level that was set while the router runs, until `until` (Unix seconds), None for as long as it runs."""

    logger: str
    level: Level
    until: float | None = None


class ChangedLevels:
    """The changes that are in force. Lives in one thread.

    Args:
        now: Unix seconds.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._changes: dict[str, Change] = {}

    def change(self, logger: str, level: Level, for_s: float | None = None) -> Change:
        """Set the level of a logger, `llm_router` for all that have none of their own; for so long, or for good."""
        change = Change(logger, level, None if for_s is None else self._now() + for_s)
        self._changes[logger] = change
        return change

    def take_back(self, logger: str) -> bool:
        """Let the configuration decide about a logger again. False if it did already."""
        return self._changes.pop(logger, None) is not None

    def end_due(self) -> tuple[Change, ...]:
        """Take back the changes whose time is over, and say which: whoever gets any has news for the processes."""
        now = self._now()
        due = tuple(change for change in self._changes.values() if change.until is not None and change.until <= now)
        for change in due:
            del self._changes[change.logger]
        return due

    def in_force(self, settings: LogSettings) -> LogSettings:
        """The settings, as configured, with the changes."""
        if not self._changes:
            return settings
        levels = settings.levels | {change.logger: change.level for change in self._changes.values()}
        level = cast("Level", levels.pop(ROOT, settings.level))
        return msgspec.structs.replace(settings, level=level, levels=levels)

    @property
    def changes(self) -> tuple[Change, ...]:
        return tuple(self._changes.values())

    def __repr__(self) -> str:
        return f"ChangedLevels({', '.join(f'{change.logger}={change.level}' for change in self._changes.values())})"
