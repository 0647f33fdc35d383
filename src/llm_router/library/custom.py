"""Metrics of one's own: counters, gauges and histograms with labels, shown beside the router's.

    orders = metrics.counter("shop_orders_total", "Orders taken", labels=("country",))
    orders.inc(country="NZ")

Safe across threads: those of a web application may all count. A family has at most `max_series` label sets; the rest
is counted under `__other__`. Not for: the families that the router has already (metrics.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from threading import RLock
from typing import Final, Self

from llm_router.observe.metrics.slots import Writer
from llm_router.signals import Family, MetricType

BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Of a histogram that has none of its own: seconds of a web request, as prometheus_client has them."""

MAX_SERIES: Final = 1000
_MAX_BUCKETS: Final = 100

_NAME: Final = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]{0,199}")
_LABEL: Final = re.compile(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]{0,99}")
_SUFFIXES: Final = ("_bucket", "_sum", "_count", "_total", "_created", "_info")


def family_of(
    type: MetricType, name: object, help: str, labels: Sequence[object], buckets: Sequence[float], max_series: int
) -> Family:
    """The family that somebody describes; the name of a counter gets its `_total`.

    Raises: ValueError naming what cannot be used, and why.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"a metric cannot be called {str(name)[:200]!r}: write letters, digits and _, no digit first")
    if type == "counter":
        name = name if name.endswith("_total") else f"{name}_total"
    elif name.endswith(_SUFFIXES):
        raise ValueError(
            f"the name of the {type} {name!r} must not end in {', '.join(_SUFFIXES)}: these mean something"
        )
    if isinstance(labels, str):
        raise ValueError(f"the labels of {name} are a sequence of names, like ('{labels}',)")
    for label in labels:
        if not isinstance(label, str) or not _LABEL.fullmatch(label):
            raise ValueError(f"{name} cannot have the label {str(label)[:100]!r}: write letters, digits and _")
    if len(set(labels)) != len(labels):
        raise ValueError(f"{name} has a label twice: {', '.join(map(str, labels))}")
    if type == "histogram" and "le" in labels:
        raise ValueError(f"the histogram {name} cannot have a label 'le': that is the bound of a bucket")
    if max_series < 1:
        raise ValueError(f"max_series of {name} is {max_series}; it is at least 1")
    return Family(name, type, tuple(map(str, labels)), help or name, _bounds(name, buckets), cap=max_series)


def _bounds(name: str, buckets: Sequence[float]) -> tuple[float, ...]:
    bounds = tuple(float(bound) for bound in buckets if bound != math.inf)
    if any(not math.isfinite(bound) for bound in bounds) or list(bounds) != sorted(set(bounds)):
        raise ValueError(f"the buckets of {name} must be numbers that ascend: {list(buckets)}")
    if len(bounds) > _MAX_BUCKETS:
        raise ValueError(f"{name} has {len(bounds)} buckets; {_MAX_BUCKETS} are the most")
    return bounds


class Custom:
    """What counters, gauges and histograms have in common.

    Args:
        writer: None where metrics are switched off: then nothing is kept, and nothing costs anything.
        lock: held for each write.
    """

    def __init__(
        self, family: Family, writer: Writer | None, lock: RLock, bound: tuple[str, ...] | None = None
    ) -> None:
        self.family = family
        self._writer = writer
        self._lock = lock
        self._bound = bound

    def labels(self, *values: object, **named: object) -> Self:
        """The same with these label values, in the order of the labels or by name.

        Raises: ValueError when they are not those of the metric.
        """
        if values and (named or len(values) != len(self.family.labels)):
            raise ValueError(f"{self.family.name} has the labels {self._known()}, in this order")
        if values:
            named = dict(zip(self.family.labels, values, strict=True))
        return type(self)(self.family, self._writer, self._lock, self._values(named))

    def _values(self, named: dict[str, object]) -> tuple[str, ...]:
        if self._bound is not None:
            if named:
                raise ValueError(f"this {self.family.name} has its label values already")
            return self._bound
        labels = self.family.labels
        if len(named) != len(labels) or any(label not in named for label in labels):
            given = ", ".join(named) or "none"
            raise ValueError(f"{self.family.name} has the labels {self._known()}; given were {given}")
        return tuple(str(named[label]) for label in labels)

    def _known(self) -> str:
        return ", ".join(self.family.labels) or "none at all"

    def _number(self, value: float, what: str) -> float:
        number = float(value)
        if not math.isfinite(number):
            raise ValueError(f"{self.family.name}: {what} {value!r} is no number")
        return number

    def __repr__(self) -> str:
        return f"<{self.family.type} {self.family.name}{self._bound or self.family.labels}>"


class Counter(Custom):
    """A number that only grows."""

    def inc(self, n: float = 1.0, /, **labels: object) -> None:
        """Add `n`. Raises: ValueError if it is negative or no number, or for other labels."""
        n, values = self._number(n, "to add"), self._values(labels)
        if n < 0:
            raise ValueError(f"{self.family.name} is a counter: it grows, {n:g} cannot be added")
        if self._writer is not None:
            with self._lock:
                self._writer.counter(self.family, *values).inc(n)


class Gauge(Custom):
    """A level that goes up and down."""

    def set(self, value: float, /, **labels: object) -> None:
        """Set the level. Raises: ValueError if it is no number, or for other labels."""
        value, values = self._number(value, "to set"), self._values(labels)
        if self._writer is not None:
            with self._lock:
                self._writer.gauge(self.family, *values).set(value)

    def inc(self, n: float = 1.0, /, **labels: object) -> None:
        """Raise the level by `n`. Raises: as `set`."""
        n, values = self._number(n, "to add"), self._values(labels)
        if self._writer is not None:
            with self._lock:
                self._writer.gauge(self.family, *values).inc(n)

    def dec(self, n: float = 1.0, /, **labels: object) -> None:
        """Lower the level by `n`. Raises: as `set`."""
        self.inc(-n, **labels)

    def remove(self, **labels: object) -> None:
        """Take the series out: what it is about is gone."""
        values = self._values(labels)
        if self._writer is not None:
            with self._lock:
                self._writer.gauge(self.family, *values).remove()


class Histogram(Custom):
    """Observations counted by bucket."""

    def observe(self, value: float, /, **labels: object) -> None:
        """Count `value`. Raises: ValueError if it is no number, or for other labels."""
        value, values = self._number(value, "to observe"), self._values(labels)
        if self._writer is not None:
            with self._lock:
                self._writer.histogram(self.family, *values).observe(value)
