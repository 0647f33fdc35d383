"""Metric values in shared memory: fixed-size segments of float64 slots, one writing thread each, read from any process.

A `Segment` is a descriptor that outlives the process that writes it: the successor of a killed process
adopts the segment and its totals go on. A child metric is bound once and is then an index into a
memoryview, so counting is an addition and no call into the kernel.
Not for: declaring families (families.py), text formats (exposition.py), deciding which label values are
admitted (control). Standard library only: the supervisor writes metrics too.

Layout, native byte order, every part 8-byte aligned:

    header     128 bytes  8 words: magic, rows, slots, exemplars, row count, exemplar count, alive, reserved; then the name
    table      rows       x 32 bytes: family, base, width, type, text size, checksum, live, reserved (u32 each)
    texts      rows       x 480 bytes: the label values, each a u16 size and its UTF-8
    exemplars  exemplars  x 192 bytes: sequence word, row, bucket, value, time, text size, checksum, text
    slots      slots      x 8 bytes: float64; slot 0 is a bin that nobody reads

A row is published in this order: slots zeroed, text, record with checksum, live, row count. A writer that is
killed in between leaves a row that is not counted, or whose checksum is wrong; readers pass over it and the
next writer takes it again. A histogram has one slot per bucket (not cumulative, the last one +Inf) and then
its sum; its count is the sum of its buckets, made at reading.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import sys
import tempfile
import zlib
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from llm_router.signals import OTHER, Family, MetricType, Reading

_MAGIC: Final = int.from_bytes(b"LLMRSEG1", "little")
_ROWS, _SLOTS, _EXEMPLARS, _ROW_COUNT, _EXEMPLAR_COUNT, _ALIVE = range(1, 7)
_HEADER_BYTES: Final = 128
_NAME_AT: Final = 64
_NAME_BYTES: Final = 63

_RECORD: Final = struct.Struct("=IIIIIII4x")
_SUMMED: Final = struct.Struct("=IIIII")  # the part of a record that the checksum covers, together with the text
_LIVE_AT: Final = 24
_TYPES: Final[tuple[MetricType, ...]] = ("counter", "gauge", "histogram")
_TEXT_BYTES: Final = 480

_EXEMPLAR: Final = struct.Struct("=IIddI")  # row, bucket, value, time, text size; behind the sequence word
_EXEMPLAR_BYTES: Final = 192
_EXEMPLAR_CHECKSUM_AT: Final = 36
_EXEMPLAR_TEXT_AT: Final = 40
EXEMPLAR_TEXT_BYTES: Final = 128
"""OpenMetrics allows 128 characters of label names and values; we count the punctuation too."""

_BIN: Final = 0
_TRIES: Final = 8  # a writer needs microseconds to finish a row; a reader that meets one eight times meets a dead one


class Segment:
    """A block of shared memory with room for a fixed number of rows and slots. It never grows.

    `fd` is inherited by the processes that attach (-1 for a private segment). Closing it invalidates
    every child that was bound in it.
    """

    def __init__(self, memory: mmap.mmap, fd: int, *, owns_fd: bool, writable: bool) -> None:
        self._memory = memory
        self._owns_fd = owns_fd
        self.fd = fd
        self.writable = writable
        self.raw = memoryview(memory)
        self.words = self.raw.cast("Q")
        if self.words[0] != _MAGIC:
            raise ValueError("the descriptor does not hold a metric segment")
        self.rows: int = self.words[_ROWS]
        self.slots: int = self.words[_SLOTS]
        self.exemplars: int = self.words[_EXEMPLARS]
        if _size(self.rows, self.slots, self.exemplars) > len(self.raw):
            raise ValueError(f"the metric segment is cut off after {len(self.raw)} bytes")
        self.texts_at = _HEADER_BYTES + self.rows * _RECORD.size
        self.exemplars_at = self.texts_at + self.rows * _TEXT_BYTES
        slots_at = self.exemplars_at + self.exemplars * _EXEMPLAR_BYTES
        self.values: memoryview[float] = self.raw[slots_at : slots_at + 8 * self.slots].cast("d")
        size = self.raw[_NAME_AT]
        self.name = bytes(self.raw[_NAME_AT + 1 : _NAME_AT + 1 + size]).decode()

    @classmethod
    def create(cls, name: str, *, rows: int = 2048, slots: int = 32768, exemplars: int = 512) -> Segment:
        """A new segment behind a descriptor that children may inherit (close-on-exec is set: pass it explicitly).

        Anonymous memory on Linux, an unlinked temporary file elsewhere: nothing is left behind by any kill.
        """
        size = _size(rows, slots, exemplars)
        if sys.platform == "linux":
            fd = os.memfd_create(f"llm-router-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, size)
            # A truncated mapping kills its readers with SIGBUS, so nobody may shrink it.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        else:
            fd, path = tempfile.mkstemp(prefix="llm-router-")
            os.unlink(path)
            os.ftruncate(fd, size)
        memory = mmap.mmap(fd, size)
        _format(memory, name, rows, slots, exemplars)
        return cls(memory, fd, owns_fd=True, writable=True)

    @classmethod
    def attach(cls, fd: int, *, writable: bool) -> Segment:
        """The segment behind an inherited descriptor, which stays open and the caller's.

        Raises: ValueError if it is not a segment or is cut off.
        """
        size = os.fstat(fd).st_size
        if size < _HEADER_BYTES:
            raise ValueError(f"the descriptor holds {size} bytes, less than the header of a metric segment")
        memory = mmap.mmap(fd, size, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
        return cls(memory, fd, owns_fd=False, writable=writable)

    @classmethod
    def private(cls, name: str = "local", *, rows: int = 2048, slots: int = 32768, exemplars: int = 512) -> Segment:
        """A segment of this process alone, for library mode and tests."""
        memory = mmap.mmap(-1, _size(rows, slots, exemplars))
        _format(memory, name, rows, slots, exemplars)
        return cls(memory, -1, owns_fd=False, writable=True)

    @property
    def alive(self) -> bool:
        """Whether a writer has adopted the segment and has not been reported dead since."""
        return bool(self.words[_ALIVE])

    def mark_left(self) -> None:
        """Its writer is gone (call it after waitpid): from now on readers pass over its gauges."""
        self.words[_ALIVE] = 0

    def close(self) -> None:
        """Unmap the memory, and close the descriptor if this object made it. Bound children raise ValueError afterwards."""
        self.values.release()
        self.words.release()
        self.raw.release()
        self._memory.close()
        if self._owns_fd:
            os.close(self.fd)
            self._owns_fd = False

    def table(self) -> bytes:
        """A copy of the records of all published rows."""
        return bytes(self.raw[_HEADER_BYTES : _HEADER_BYTES + self.words[_ROW_COUNT] * _RECORD.size])

    def __repr__(self) -> str:
        rows, alive = self.words[_ROW_COUNT], "alive" if self.alive else "left"
        return f"<Segment {self.name}: {rows} of {self.rows} rows, {self.slots} slots, {alive}>"


def _size(rows: int, slots: int, exemplars: int) -> int:
    return _HEADER_BYTES + rows * (_RECORD.size + _TEXT_BYTES) + exemplars * _EXEMPLAR_BYTES + 8 * slots


def _format(memory: mmap.mmap, name: str, rows: int, slots: int, exemplars: int) -> None:
    encoded = name.encode()
    if len(encoded) > _NAME_BYTES:
        raise ValueError(f"a segment name has at most {_NAME_BYTES} bytes: {name!r}")
    memory[_NAME_AT : _NAME_AT + 1 + len(encoded)] = bytes([len(encoded)]) + encoded
    with memoryview(memory) as raw, raw.cast("Q") as words:
        words[_ROWS], words[_SLOTS], words[_EXEMPLARS] = rows, slots, exemplars
        words[0] = _MAGIC


# -- rows -------------------------------------------------------------------------------------------


Key = tuple[str, tuple[str, ...]]
"""The name of a family and label values, in the order of its labels."""


def family_id(family: Family) -> int:
    """The number that stands for a family in a record: families that differ in shape differ in it."""
    return zlib.crc32(repr((family.name, family.type, family.labels, family.buckets)).encode())


def width_of(family: Family) -> int:
    """How many slots a row of the family has."""
    return len(family.buckets) + 2 if family.type == "histogram" else 1


def _encode(labels: Sequence[str]) -> bytes:
    parts = []
    for label in labels:
        text = label.encode("utf-8", "replace")
        parts.append(struct.pack("=H", min(len(text), 0xFFFF)) + text)
    return b"".join(parts)


def _decode(text: bytes) -> tuple[str, ...]:
    labels, at = [], 0
    while at < len(text):
        (size,) = struct.unpack_from("=H", text, at)
        labels.append(text[at + 2 : at + 2 + size].decode())
        at += 2 + size
    return tuple(labels)


class _Row(NamedTuple):
    family: int
    labels: tuple[str, ...]
    base: int
    width: int
    type: MetricType
    live: bool


def _parse(segment: Segment, index: int, record: bytes) -> _Row | None:
    """The row if its checksum is right, else None."""
    family, base, width, type, size, checksum, live = _RECORD.unpack(record)
    if size > _TEXT_BYTES or type >= len(_TYPES) or base + width > segment.slots:
        return None
    at = segment.texts_at + index * _TEXT_BYTES
    text = bytes(segment.raw[at : at + size])
    if zlib.crc32(text, zlib.crc32(record[: _SUMMED.size])) != checksum:
        return None
    return _Row(family, _decode(text), base, width, _TYPES[type], bool(live))


# -- children ---------------------------------------------------------------------------------------


class Counter:
    """A number that only grows. Owned by the thread that owns the writer.

    Code that writes many metrics at once may add to `writer.values[counter.index]` itself.
    """

    __slots__ = ("_values", "index")

    def __init__(self, values: memoryview[float], index: int) -> None:
        self._values = values
        self.index = index

    def inc(self, n: float = 1.0) -> None:
        """Add `n`, which must not be negative."""
        self._values[self.index] += n

    @property
    def value(self) -> float:
        """What this segment has counted, predecessors of this process included."""
        value: float = self._values[self.index]
        return value


class Gauge:
    """A level that this process owns; it is forgotten when the process dies."""

    __slots__ = ("_key", "_row", "_values", "_writer", "index")

    def __init__(self, writer: Writer, key: Key, row: int, index: int) -> None:
        self._writer = writer
        self._values = writer.values
        self._key = key
        self._row = row
        self.index = index

    def set(self, value: float) -> None:
        """Set the level."""
        self._values[self.index] = value

    def inc(self, n: float = 1.0) -> None:
        """Raise the level by `n`."""
        self._values[self.index] += n

    def dec(self, n: float = 1.0) -> None:
        """Lower the level by `n`."""
        self._values[self.index] -= n

    @property
    def value(self) -> float:
        """The level."""
        value: float = self._values[self.index]
        return value

    def remove(self) -> None:
        """Take the series out: its object is gone. Later writes to this child are lost; removing twice does nothing."""
        if self.index != _BIN:
            self._writer.forget(self._key, self._row, self.index)
            self.index = _BIN


class Histogram:
    """Observations counted by bucket.

    Code that writes many metrics at once may do what `observe` does: add 1 to
    `values[base + bisect_left(bounds, v)]` and `v` to `values[sum_index]`.
    """

    __slots__ = ("_row", "_values", "_writer", "base", "bounds", "sum_index")

    def __init__(self, writer: Writer, row: int, base: int, bounds: tuple[float, ...]) -> None:
        self._writer = writer
        self._values = writer.values
        self._row = row
        self.base = base
        self.bounds = bounds
        self.sum_index = base + len(bounds) + 1

    def observe(self, value: float) -> None:
        """Count `value`, which must be a number (not NaN)."""
        values = self._values
        values[self.base + bisect_left(self.bounds, value)] += 1.0
        values[self.sum_index] += value

    def observe_with_exemplar(self, value: float, labels: str, time: float) -> None:
        """Count `value` and keep it as the example of its bucket.

        Args:
            labels: as they stand between the braces, escaped: `trace_id="4bf92f35"`. Longer than
                `EXEMPLAR_TEXT_BYTES`: counted, without an example. So too when the segment holds no more of them.
            time: of the observation, Unix seconds.
        """
        self.observe(value)
        self._writer.keep_exemplar(self._row, bisect_left(self.bounds, value), value, labels, time)

    @property
    def count(self) -> float:
        """How many observations there were."""
        total: float = sum(self._values[self.base : self.sum_index])
        return total

    @property
    def sum(self) -> float:
        """The sum of all observed values."""
        value: float = self._values[self.sum_index]
        return value


class WriterStatistics(NamedTuple):
    """How full a segment is."""

    rows: int
    rows_limit: int
    slots: int
    slots_limit: int
    exemplars: int
    exemplars_limit: int


class _Declared:
    """What a writer knows of one family. `used` counts its rows but for the one that stands for all others."""

    __slots__ = ("family", "id", "other", "used", "width")

    def __init__(self, family: Family) -> None:
        self.family = family
        self.id = family_id(family)
        self.width = width_of(family)
        self.other = (OTHER,) * len(family.labels)
        self.used = 0


class Writer:
    """The one writer of a segment. Only the thread that made it may bind children or write to them.

    Making one adopts what a dead predecessor left: counters and histograms go on from where they were,
    gauges go away until they are bound again. Every declared family is promised one row (`__other__`), so
    that there is always something to count on.

    Args:
        families: those that may be bound; more can follow by `declare`.
        dropped: a counter with the one label `family`: how often label sets of that family were refused.
    Raises: ValueError if the segment is too small for one row per family, or was attached for reading.
    """

    def __init__(self, segment: Segment, families: Iterable[Family], *, dropped: Family | None = None) -> None:
        if not segment.writable:
            raise ValueError(f"the metric segment {segment.name} was attached for reading only")
        self.segment = segment
        self.values = segment.values
        self._counters: dict[Key, Counter] = {}
        self._gauges: dict[Key, Gauge] = {}
        self._histograms: dict[Key, Histogram] = {}
        self._declared: dict[str, _Declared] = {}
        self._dropped = dropped
        self._promised: dict[Key, int] = {}  # rows that must always be possible -> their width
        self._promised_slots = 0
        self._count = 0
        self._next_slot = _BIN + 1
        self._torn_rows: list[int] = []
        self._free: list[tuple[int, int]] = []  # (row, slot) of gauges that were removed
        self._adopted: dict[int, list[tuple[int, _Row]]] = {}
        self._left_levels: dict[int, dict[tuple[str, ...], float]] = {}
        self._exemplar_at: dict[tuple[int, int], int] = {}  # (row, bucket) -> offset
        self._torn_exemplars: list[int] = []
        self._adopt_rows()
        self._adopt_exemplars()
        if dropped is not None:
            if dropped.type != "counter" or len(dropped.labels) != 1:
                raise ValueError(f"{dropped.name} must be a counter with one label, the name of a family")
            self.declare(dropped)
        for family in families:
            self.declare(family)
        segment.words[_ALIVE] = 1

    def declare(self, family: Family) -> None:
        """Let children of `family` be bound. Declaring the same family again does nothing.

        Raises: ValueError for another shape under the same name, for buckets that do not ascend, and if the
            segment has no room left for a single row of it.
        """
        known = self._declared.get(family.name)
        if known is not None:
            if known.id != family_id(family):
                raise ValueError(f"{family.name} is declared already, with another type, labels or buckets")
            return
        if list(family.buckets) != sorted(set(family.buckets)):
            raise ValueError(f"the buckets of {family.name} must ascend: {family.buckets}")
        declared = self._declared[family.name] = _Declared(family)
        for index, row in self._adopted.pop(declared.id, ()):
            declared.used += row.labels != declared.other
            key = (family.name, row.labels)
            self._redeem(key)
            if family.type == "counter":
                self._counters[key] = Counter(self.values, row.base)
            else:
                self._histograms[key] = Histogram(self, index, row.base, family.buckets)
        self._promise((family.name, declared.other), declared.width)
        if self._dropped is not None:
            self._promise((self._dropped.name, (family.name,)), 1)

    def counter(self, family: Family, *labels: str) -> Counter:
        """The child for these label values, always the same one; beyond the cap the one of `__other__`."""
        child = self._counters.get((family.name, labels))
        if child is None:
            declared, row, base = self._place(family, "counter", labels)
            if row < 0:
                return self.counter(family, *declared.other)
            child = self._counters[family.name, labels] = Counter(self.values, base)
        return child

    def gauge(self, family: Family, *labels: str) -> Gauge:
        """The child for these label values, the same one until it is removed; beyond the cap the one of `__other__`."""
        key = (family.name, labels)
        child = self._gauges.get(key)
        if child is None:
            declared, row, base = self._place(family, "gauge", labels)
            if row < 0:
                return self.gauge(family, *declared.other)
            child = self._gauges[key] = Gauge(self, key, row, base)
        return child

    def histogram(self, family: Family, *labels: str) -> Histogram:
        """The child for these label values, always the same one; beyond the cap the one of `__other__`."""
        child = self._histograms.get((family.name, labels))
        if child is None:
            declared, row, base = self._place(family, "histogram", labels)
            if row < 0:
                return self.histogram(family, *declared.other)
            child = self._histograms[family.name, labels] = Histogram(self, row, base, family.buckets)
        return child

    def inherited(self, family: Family) -> dict[tuple[str, ...], float]:
        """The levels of a gauge that the predecessor left, by label values: what was open when it was killed."""
        return dict(self._left_levels.get(family_id(family), {}))

    def reset(self, *, levels: bool) -> None:
        """Set counters and histograms to 0, for tests: whoever scrapes takes it for a restart. Gauges only with `levels`."""
        values = self.values
        for counter in self._counters.values():
            values[counter.index] = 0.0
        for histogram in self._histograms.values():
            for slot in range(histogram.base, histogram.sum_index + 1):
                values[slot] = 0.0
        for gauge in self._gauges.values() if levels else ():
            values[gauge.index] = 0.0
        self.segment.words[_EXEMPLAR_COUNT] = 0
        self._exemplar_at.clear()
        self._torn_exemplars.clear()

    def statistics(self) -> WriterStatistics:
        """How full the segment is."""
        return WriterStatistics(
            self._count - len(self._free) - len(self._torn_rows),
            self.segment.rows,
            self._next_slot - len(self._free),
            self.segment.slots,
            len(self._exemplar_at),
            self.segment.exemplars,
        )

    def __repr__(self) -> str:
        return f"<Writer of {self.segment!r}>"

    # -- adopting

    def _adopt_rows(self) -> None:
        table = self.segment.table()
        self._count = len(table) // _RECORD.size
        for index in range(self._count):
            row = _parse(self.segment, index, table[index * _RECORD.size : (index + 1) * _RECORD.size])
            if row is None:
                self._set_live(index, False)  # readers need not look at it again
                self._torn_rows.append(index)
                continue
            self._next_slot = max(self._next_slot, row.base + row.width)
            if row.type != "gauge":
                self._set_live(index, True)  # killed in its very last step, if it was not
                self._adopted.setdefault(row.family, []).append((index, row))
                continue
            if row.live:
                self._left_levels.setdefault(row.family, {})[row.labels] = self.values[row.base]
            self._set_live(index, False)
            self.values[row.base] = 0.0
            self._free.append((index, row.base))

    def _adopt_exemplars(self) -> None:
        segment = self.segment
        for index in range(segment.words[_EXEMPLAR_COUNT]):
            at = segment.exemplars_at + index * _EXEMPLAR_BYTES
            found = _read_exemplar(segment, at)
            if found is None:
                self._torn_exemplars.append(at)
            else:
                self._exemplar_at[found[1], found[2]] = at

    # -- placing rows

    def _promise(self, key: Key, width: int) -> None:
        if key in self._counters or key in self._histograms or key in self._promised:
            return
        if not self._has_room(width):
            raise ValueError(f"{self.segment!r} is too small: no room for one row of {key[0]}")
        self._promised[key] = width
        self._promised_slots += width

    def _redeem(self, key: Key) -> bool:
        """Whether the row was promised; it is not any more."""
        width = self._promised.pop(key, 0)
        self._promised_slots -= width
        return width > 0

    def _has_room(self, width: int) -> bool:
        """Whether a row of this width leaves enough for all that was promised."""
        spare = len(self._free) if width == 1 else 0
        rows = self.segment.rows - self._count + len(self._torn_rows) + spare
        slots = self.segment.slots - self._next_slot + spare
        return rows > len(self._promised) and slots >= self._promised_slots + width

    def _place(self, family: Family, type: MetricType, labels: tuple[str, ...]) -> tuple[_Declared, int, int]:
        """Publish a row and return its index and first slot; index -1 if the label set was refused (and counted)."""
        declared = self._declared.get(family.name)
        if declared is None:
            raise ValueError(f"{family.name} was not declared to {self!r}")
        if family.type != type or len(labels) != len(family.labels):
            raise ValueError(
                f"{family.name} is a {family.type} with the labels {family.labels}, not a {type} of {labels}"
            )
        text, width = _encode(labels), declared.width
        if not self._redeem((family.name, labels)) and (
            declared.used >= family.cap or len(text) > _TEXT_BYTES or not self._has_room(width)
        ):
            if self._dropped is not None:
                self.counter(self._dropped, family.name).inc()
            return declared, -1, _BIN
        if labels != declared.other:
            declared.used += 1
        if width == 1 and self._free:
            row, base = self._free.pop()
        else:
            row = self._torn_rows.pop() if self._torn_rows else self._count
            base = self._next_slot
            self._next_slot += width
        self._publish(row, declared, base, text)
        return declared, row, base

    def _publish(self, row: int, declared: _Declared, base: int, text: bytes) -> None:
        segment = self.segment
        for slot in range(base, base + declared.width):
            self.values[slot] = 0.0
        self._set_live(row, False)
        at = segment.texts_at + row * _TEXT_BYTES
        segment.raw[at : at + len(text)] = text
        summed = _SUMMED.pack(declared.id, base, declared.width, _TYPES.index(declared.family.type), len(text))
        at = _HEADER_BYTES + row * _RECORD.size
        checksum = zlib.crc32(text, zlib.crc32(summed))
        segment.raw[at : at + _RECORD.size] = summed + struct.pack("=II4x", checksum, 0)
        self._set_live(row, True)
        if row == self._count:
            self._count += 1
            segment.words[_ROW_COUNT] = self._count

    def _set_live(self, row: int, live: bool) -> None:
        self.segment.raw[_HEADER_BYTES + row * _RECORD.size + _LIVE_AT] = live

    def forget(self, key: Key, row: int, slot: int) -> None:
        """Take the row of a gauge back; called by the gauge."""
        self._set_live(row, False)
        self.values[slot] = 0.0
        self._free.append((row, slot))
        del self._gauges[key]
        declared = self._declared[key[0]]
        if key[1] == declared.other:
            self._promised[key] = 1
            self._promised_slots += 1
        else:
            declared.used -= 1

    # -- exemplars

    def keep_exemplar(self, row: int, bucket: int, value: float, labels: str, time: float) -> None:
        """Replace the exemplar of a bucket; called by the histogram."""
        text = labels.encode("utf-8", "replace")
        if len(text) > EXEMPLAR_TEXT_BYTES:
            return
        segment = self.segment
        at = self._exemplar_at.get((row, bucket), -1)
        if at < 0:
            at = self._new_exemplar()
            if at < 0:
                return
            self._exemplar_at[row, bucket] = at
        words, word = segment.words, at // 8
        writing = words[word] | 1  # odd while it is being written, and left odd by a writer that was killed
        words[word] = writing
        summed = _EXEMPLAR.pack(row, bucket, value, time, len(text))
        checksum = zlib.crc32(text, zlib.crc32(summed))
        body = summed + struct.pack("=I", checksum) + text
        segment.raw[at + 8 : at + 8 + len(body)] = body
        words[word] = writing + 1

    def _new_exemplar(self) -> int:
        if self._torn_exemplars:
            return self._torn_exemplars.pop()
        segment = self.segment
        count = segment.words[_EXEMPLAR_COUNT]
        if count >= segment.exemplars:
            return -1
        segment.words[_EXEMPLAR_COUNT] = count + 1
        return segment.exemplars_at + count * _EXEMPLAR_BYTES


# -- reading ----------------------------------------------------------------------------------------


class Exemplar(NamedTuple):
    """One observation as an example. `labels` stand as between the braces: `trace_id="4bf92f35"`; `time` is Unix seconds."""

    labels: str
    value: float
    time: float


def _read_exemplar(segment: Segment, at: int) -> tuple[int, int, int, Exemplar] | None:
    """(sequence, row, bucket, exemplar), or None if it is torn."""
    words, word = segment.words, at // 8
    for _ in range(_TRIES):
        sequence = words[word]
        body = bytes(segment.raw[at + 8 : at + _EXEMPLAR_BYTES])
        if sequence % 2 or not sequence or words[word] != sequence:
            continue
        row, bucket, value, time, size = _EXEMPLAR.unpack_from(body)
        text = body[_EXEMPLAR_TEXT_AT - 8 : _EXEMPLAR_TEXT_AT - 8 + min(size, EXEMPLAR_TEXT_BYTES)]
        (checksum,) = struct.unpack_from("=I", body, _EXEMPLAR_CHECKSUM_AT - 8)
        if zlib.crc32(text, zlib.crc32(body[: _EXEMPLAR.size])) == checksum:
            return sequence, row, bucket, Exemplar(text.decode(), value, time)
    return None


class Row(NamedTuple):
    """The values of one label set.

    `values` has one number for counters and gauges; for histograms one per bucket (not cumulative, +Inf
    last), then the sum. `exemplars` is empty, or has one entry per bucket.
    """

    labels: tuple[str, ...]
    values: Sequence[float]
    exemplars: tuple[Exemplar | None, ...] = ()


class FamilyRows(NamedTuple):
    """All rows of a family, ascending by label values."""

    family: Family
    rows: list[Row]

    @property
    def series(self) -> int:
        """How many series they are in an exposition."""
        if self.family.type != "histogram":
            return len(self.rows)
        return len(self.rows) * (width_of(self.family) + 1)


class Collected:
    """What was read at one moment: families in the order of their declaration, those without rows too."""

    def __init__(self, families: list[FamilyRows]) -> None:
        self.families = families
        self._by_name = {rows.family.name: rows for rows in families}

    def rows(self, family: Family) -> list[Row]:
        """The rows of a family; none if it was not read."""
        found = self._by_name.get(family.name)
        return found.rows if found is not None else []

    def row(self, family: Family, *labels: str) -> Row | None:
        """The row of one label set."""
        return next((row for row in self.rows(family) if row.labels == labels), None)

    def value(self, family: Family, *labels: str) -> float | None:
        """The value of a counter or gauge, the number of observations of a histogram; None if there is no such series."""
        row = self.row(family, *labels)
        return None if row is None else _total(family, row)

    def total(self, family: Family, /, **where: str) -> float:
        """The sum of `value` over all rows that have these label values."""
        wanted = [(family.labels.index(name), value) for name, value in where.items()]
        return sum(
            _total(family, row)
            for row in self.rows(family)
            if all(row.labels[position] == value for position, value in wanted)
        )

    @property
    def series(self) -> int:
        """How many series there are in all."""
        return sum(rows.series for rows in self.families)

    def __repr__(self) -> str:
        return f"<Collected: {len(self.families)} families, {self.series} series>"


def _total(family: Family, row: Row) -> float:
    return sum(row.values[:-1]) if family.type == "histogram" else row.values[0]


class _Source:
    """What a reader knows of one segment. Rows that are torn are looked at again at the next refresh."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.rows: list[_Row | None] = []
        self.values: Sequence[float] = ()
        self.alive = False
        self._table = b""
        self._torn = False
        self._used = 0
        self._exemplars: dict[int, tuple[int, int, int, Exemplar]] = {}  # offset -> as _read_exemplar gave it

    def refresh(self) -> bool:
        """Read the values; True if other rows are there than before, or the writer came or left."""
        segment, changed, alive = self.segment, False, False
        # The table is read before and after the values: a gauge's slot may have been given to another label set.
        for _ in range(_TRIES):
            alive, table = segment.alive, segment.table()
            if table != self._table or self._torn:
                changed |= self._look_at(table)
            self.values = segment.values[: self._used].tolist()
            if segment.table() == table and segment.alive == alive and not self._torn:
                break
        changed |= alive != self.alive
        self.alive = alive
        return changed

    def _look_at(self, table: bytes) -> bool:
        """Take in the rows of a table; True if they are others than before."""
        known, step = self._table, _RECORD.size
        rows: list[_Row | None] = []
        self._torn = False
        for index in range(len(table) // step):
            record = table[index * step : (index + 1) * step]
            row = self.rows[index] if index < len(self.rows) else None
            if not record[_LIVE_AT]:
                row = None
            elif row is None or known[index * step : (index + 1) * step] != record:
                row = _parse(self.segment, index, record)
                self._torn |= row is None
            rows.append(row)
        changed = rows != self.rows
        self.rows = rows
        self._table = table
        self._used = max((row.base + row.width for row in rows if row is not None), default=0)
        return changed

    def exemplars(self) -> Iterable[tuple[int, int, int, Exemplar]]:
        """Those that can be read; while one is being rewritten, the one before it."""
        segment = self.segment
        count: int = segment.words[_EXEMPLAR_COUNT]
        if not count:
            return ()
        first, step = segment.exemplars_at // 8, _EXEMPLAR_BYTES // 8
        for index, sequence in enumerate(segment.words[first : first + count * step : step].tolist()):
            at = segment.exemplars_at + index * _EXEMPLAR_BYTES
            known = self._exemplars.get(at)
            if known is None or known[0] != sequence:
                found = _read_exemplar(segment, at)
                if found is not None:
                    self._exemplars[at] = found
        return self._exemplars.values()


class _Part(NamedTuple):
    """Where one row of one segment lies: values[base:end] of a source."""

    source: int
    row: int
    base: int
    end: int


class Reader:
    """Sums equal label sets over segments, written by this or by other processes. Owned by one thread.

    Rows of families it was not given are passed over, so a process may keep numbers for itself.
    """

    def __init__(self, segments: Iterable[Segment], families: Iterable[Family]) -> None:
        self.families = tuple(families)
        self._sources = [_Source(segment) for segment in segments]
        self._has_histograms = any(family.type == "histogram" for family in self.families)
        self._plan: list[tuple[Family, list[tuple[tuple[str, ...], list[_Part]]]]] = [(f, []) for f in self.families]

    def collect(self, readings: Iterable[Reading] = ()) -> Collected:
        """All values now. A reading is added to the row with its labels, or makes one; its family need not be known."""
        changed = [source.refresh() for source in self._sources]
        if any(changed):
            self._make_plan()
        by_family: dict[str, list[Reading]] = {}
        for reading in readings:
            by_family.setdefault(reading.family.name, []).append(reading)
        values = [source.values for source in self._sources]
        exemplars = self._exemplars() if self._has_histograms else {}
        collected = []
        for family, entries in self._plan:
            rows = []
            for labels, parts in entries:
                if len(parts) == 1:
                    source, _, base, end = parts[0]
                    row_values = values[source][base:end]
                else:
                    columns = zip(*(values[part.source][part.base : part.end] for part in parts), strict=True)
                    row_values = [sum(column) for column in columns]
                rows.append(Row(labels, row_values, _newest(family, parts, exemplars) if exemplars else ()))
            extra = by_family.pop(family.name, None)
            collected.append(FamilyRows(family, _with_readings(rows, extra) if extra else rows))
        collected.extend(FamilyRows(extra[0].family, _with_readings([], extra)) for extra in by_family.values())
        return Collected(collected)

    def _make_plan(self) -> None:
        found: dict[int, dict[tuple[str, ...], list[_Part]]] = {}
        for number, source in enumerate(self._sources):
            for index, row in enumerate(source.rows):
                if row is None or (row.type == "gauge" and not source.alive):
                    continue
                part = _Part(number, index, row.base, row.base + row.width)
                found.setdefault(row.family, {}).setdefault(row.labels, []).append(part)
        self._plan = [(family, sorted(found.get(family_id(family), {}).items())) for family in self.families]

    def _exemplars(self) -> dict[tuple[int, int], list[tuple[int, Exemplar]]]:
        """(source, row) -> [(bucket, exemplar)]."""
        found: dict[tuple[int, int], list[tuple[int, Exemplar]]] = {}
        for number, source in enumerate(self._sources):
            for _, row, bucket, exemplar in source.exemplars():
                found.setdefault((number, row), []).append((bucket, exemplar))
        return found

    def __repr__(self) -> str:
        return f"<Reader of {[source.segment.name for source in self._sources]}, {len(self.families)} families>"


def _newest(
    family: Family, parts: list[_Part], exemplars: dict[tuple[int, int], list[tuple[int, Exemplar]]]
) -> tuple[Exemplar | None, ...]:
    """One exemplar per bucket, over all segments."""
    chosen: list[Exemplar | None] = []
    for part in parts:
        for bucket, exemplar in exemplars.get((part.source, part.row), ()):
            chosen = chosen or [None] * (len(family.buckets) + 1)
            before = chosen[bucket]
            if before is None or before.time < exemplar.time:
                chosen[bucket] = exemplar
    return tuple(chosen)


def _with_readings(rows: list[Row], readings: list[Reading]) -> list[Row]:
    values = {row.labels: row for row in rows}
    for _, labels, value in readings:
        before = values.get(labels)
        values[labels] = Row(labels, (value if before is None else before.values[0] + value,))
    return [values[labels] for labels in sorted(values)]
