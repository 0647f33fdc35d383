"""What the condition of an alert rule sees: the metrics of now, and how much they grew since the last look.

    lambda metrics: metrics.queue_size > 100
    lambda metrics: metrics.rate("http_requests_total", status_code="500") > 1
    lambda metrics: metrics.quantile("inference_duration_seconds", 0.95) > 30

Names may lack `llm_router_`, counters their `_total`. Not for: expressions over time (PromQL does that), or families of
foreign collectors, which are shown and not read.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Final

from llm_router.families import PREFIX
from llm_router.observe.metrics.quantiles import quantile
from llm_router.observe.metrics.slots import Collected, FamilyRows, Row
from llm_router.signals import Family

_PARTS: Final = {"_count": "count", "_sum": "sum"}


class NoSuchMetric(AttributeError):
    """A rule asks for a metric, or a label, that there is not; the message says which come close."""


class Current:
    """The metrics of one moment, as attributes: the sum over all label sets. Nothing here changes them.

    Args:
        now, before: what was read at this and at the previous evaluation; None where there was none.
        seconds: between the two.
        health: check to 1 healthy, 0.5 degraded, 0 critical.

    Attributes:
        read: the last value that was asked for; None before the first.
    """

    def __init__(
        self,
        now: Collected,
        before: Collected | None = None,
        seconds: float = 0.0,
        health: Mapping[str, float] | None = None,
    ) -> None:
        self._now = _by_name(now)
        self._before = None if before is None else _by_name(before)
        self._seconds = seconds
        self.health: Mapping[str, float] = health or {}
        self.read: float | None = None

    def __repr__(self) -> str:
        return f"<Current {len(self._now)} families>"

    def __getattr__(self, name: str) -> float:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.value(name)

    def __getitem__(self, name: str) -> float:
        return self.value(name)

    def value(self, name: str, /, **labels: str) -> float:
        """The sum over the label sets that have these values; of a histogram by `NAME_count` or `NAME_sum`.

        A counter without any is 0; a gauge is nan, which is neither more nor less than anything.

        Raises: NoSuchMetric.
        """
        rows, part = self._rows(self._now, name)
        return self._told(_total(rows.family, _where(rows, labels), part))

    def increase(self, name: str, /, **labels: str) -> float:
        """By how much a counter grew since the previous evaluation; 0 at the first. Raises: NoSuchMetric."""
        rows, part = self._rows(self._now, name)
        now = _total(rows.family, _where(rows, labels), part)
        if self._before is None:
            return self._told(0.0)
        earlier = self._before.get(rows.family.name)
        before = 0.0 if earlier is None else _total(earlier.family, _where(earlier, labels), part)
        return self._told(now - before if now >= before else now)  # it began again at 0

    def rate(self, name: str, /, **labels: str) -> float:
        """The same a second. Raises: NoSuchMetric."""
        increase = self.increase(name, **labels)
        return self._told(increase / self._seconds if self._seconds > 0 else 0.0)

    def quantile(self, name: str, q: float, /, **labels: str) -> float:
        """An estimate of a quantile (0..1) of all that a histogram observed; nan of none. Raises: NoSuchMetric."""
        rows, _ = self._rows(self._now, name)
        if rows.family.type != "histogram":
            raise NoSuchMetric(f"{rows.family.name} is a {rows.family.type}; only histograms have quantiles")
        if not 0 <= q <= 1:
            raise ValueError(f"there is no quantile {q!r}; it is from 0 to 1")
        columns = zip(*(row.values[:-1] for row in _where(rows, labels)), strict=True)
        return self._told(quantile(q, rows.family.buckets, [sum(column) for column in columns]))

    def _told(self, value: float) -> float:
        self.read = value
        return value

    def _rows(self, families: Mapping[str, FamilyRows], name: str) -> tuple[FamilyRows, str]:
        for full in (name, PREFIX + name):
            for candidate in (full, f"{full}_total"):
                if (found := families.get(candidate)) is not None:
                    return found, "count"
            for ending, part in _PARTS.items():
                found = families.get(full.removesuffix(ending)) if full.endswith(ending) else None
                if found is not None and found.family.type == "histogram":
                    return found, part
        known = [*families, *(full.removeprefix(PREFIX) for full in families)]
        close = difflib.get_close_matches(name, known, 3)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise NoSuchMetric(f"there is no metric {name!r}{hint}")


def _by_name(collected: Collected) -> dict[str, FamilyRows]:
    return {rows.family.name: rows for rows in collected.families}


def _where(rows: FamilyRows, labels: Mapping[str, str]) -> list[Row]:
    family = rows.family
    for label in labels:
        if label not in family.labels:
            known = ", ".join(family.labels) or "none at all"
            raise NoSuchMetric(f"{family.name} has no label {label!r}; it has {known}")
    wanted = [(family.labels.index(label), str(value)) for label, value in labels.items()]
    return [row for row in rows.rows if all(row.labels[position] == value for position, value in wanted)]


def _total(family: Family, rows: list[Row], part: str) -> float:
    if family.type == "histogram":
        return sum(row.values[-1] if part == "sum" else sum(row.values[:-1]) for row in rows)
    if not rows and family.type == "gauge":
        return math.nan
    return sum(row.values[0] for row in rows)
