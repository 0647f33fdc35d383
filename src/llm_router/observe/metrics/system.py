"""What processes and the machine use, read at the moment of a scrape: CPU, memory, descriptors, disks, network.

Linux is read from /proc and the control groups (v1 and v2), whose roots are arguments; where there is no
/proc, psutil is asked. What cannot be read is left out, never reported as 0.
Not for: which processes there are (the caller says), nor for metric families (handed in).
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

from llm_router.signals import Family, Reading

_SECTOR_BYTES: Final = 512  # of /proc/diskstats, whatever the device's own sector size is
_NOT_DISKS: Final = (
    "loop",
    "ram",
    "zram",
    "dm-",
    "md",
    "sr",
    "fd",
    "nbd",
)  # virtual, or counted by the disks below them
_CPU_WINDOW_S: Final = (
    0.5  # a share of less than 50 clock ticks says little; scrapers close together see the same value
)


class ProcessFamilies(NamedTuple):
    """Families with the one label `process`."""

    cpu_seconds: Family
    resident_memory: Family
    heap: Family
    open_fds: Family
    start_time: Family


class MachineFamilies(NamedTuple):
    """`disk_usage` has the label path; the last two have direction: read and write, receive and transmit."""

    cpu_usage: Family
    memory_usage: Family
    memory_limit: Family
    disk_usage: Family
    disk_io: Family
    network: Family


class ProcessUse(NamedTuple):
    """What one process uses; None where this machine does not say."""

    cpu_s: float
    resident_bytes: float
    heap_bytes: float | None
    open_fds: int | None
    start_time: float


class _ProcessSource(Protocol):
    def use(self, pid: int) -> ProcessUse | None:
        """None if there is no such process, or only what is left of it."""


class Processes:
    """Reads `process_*` of other processes by pid; one read of a process costs some 60 us.

    Args:
        proc: where /proc is; if it is not there, psutil is asked.
        ticks_per_s: the unit of CPU times in /proc.
    """

    def __init__(self, families: ProcessFamilies, *, proc: Path = Path("/proc"), ticks_per_s: int = 0) -> None:
        self._families = families
        linux = (proc / "stat").exists()
        self._source: _ProcessSource = (
            _LinuxProcesses(proc, ticks_per_s or os.sysconf("SC_CLK_TCK")) if linux else _PortableProcesses()
        )

    def use(self, pid: int) -> ProcessUse | None:
        """What a process uses now; None if it is gone or not ours to look at."""
        return self._source.use(pid)

    def readings(self, pids: Mapping[str, int]) -> list[Reading]:
        """All values of these processes by their label value; those that are gone are left out."""
        families, readings = self._families, []
        for name, pid in pids.items():
            use = self._source.use(pid)
            if use is None:
                continue
            labels = (name,)
            readings.append(Reading(families.cpu_seconds, labels, use.cpu_s))
            readings.append(Reading(families.resident_memory, labels, use.resident_bytes))
            readings.append(Reading(families.start_time, labels, use.start_time))
            if use.heap_bytes is not None:
                readings.append(Reading(families.heap, labels, use.heap_bytes))
            if use.open_fds is not None:
                readings.append(Reading(families.open_fds, labels, use.open_fds))
        return readings


class _LinuxProcesses:
    def __init__(self, proc: Path, ticks_per_s: int) -> None:
        self._proc = proc
        self._ticks = ticks_per_s
        self._boot_time = float(_fields(proc / "stat", "btime")[0])

    def use(self, pid: int) -> ProcessUse | None:
        folder = self._proc / str(pid)
        try:
            # The name in parentheses may hold spaces and parentheses itself.
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
            status = (folder / "status").read_text()
        except (OSError, UnicodeDecodeError):
            return None
        if stat[0] in "ZX":
            return None
        sizes = {}
        for line in status.splitlines():
            if line.startswith(("VmRSS:", "RssAnon:")):
                name, value, _ = line.split()
                sizes[name] = float(value) * 1024
        try:
            open_fds: int | None = sum(1 for _ in os.scandir(folder / "fd"))
        except OSError:
            open_fds = None
        return ProcessUse(
            (int(stat[11]) + int(stat[12])) / self._ticks,
            sizes.get("VmRSS:", 0.0),
            sizes.get("RssAnon:"),
            open_fds,
            self._boot_time + int(stat[19]) / self._ticks,
        )


class _PortableProcesses:
    def __init__(self) -> None:
        import psutil  # only where there is no /proc: it costs 15 ms and memory

        self._psutil: Any = psutil

    def use(self, pid: int) -> ProcessUse | None:
        psutil = self._psutil
        try:
            process = psutil.Process(pid)
            with process.oneshot():
                if process.status() == psutil.STATUS_ZOMBIE:
                    return None
                cpu = process.cpu_times()
                return ProcessUse(
                    cpu.user + cpu.system,
                    float(process.memory_info().rss),
                    self._optional(lambda: float(process.memory_full_info().uss)),
                    self._optional(process.num_fds),
                    process.create_time(),
                )
        except psutil.Error:
            return None

    def _optional(self, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except self._psutil.AccessDenied:
            return None


# -- the machine --------------------------------------------------------------------------------------


class _MachineSource(Protocol):
    def cpu(self) -> tuple[float, float] | None:
        """CPU seconds spent so far, and how many CPUs we may use."""

    def memory(self) -> tuple[float, float] | None:
        """Bytes in use, and how many there may be."""

    def disk_io(self) -> tuple[float, float] | None:
        """Bytes read and written."""

    def network(self) -> tuple[float, float] | None:
        """Bytes received and sent, loopback left out."""


class Machine:
    """Reads `system_*`: of the control group where it sets a limit, else of the machine.

    Memory in use is without file pages that could be dropped at once. The share of the CPUs is that
    since the last reading that was at least half a second ago.

    Args:
        disks: paths whose file systems are reported, each under the label `path` as given.
        proc, sys: where /proc and /sys are; without /proc psutil is asked.
        cpus: the CPUs this process may run on.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        families: MachineFamilies,
        disks: Iterable[str] = (),
        *,
        proc: Path = Path("/proc"),
        sys: Path = Path("/sys"),
        cpus: Callable[[], set[int]] | None = None,
        ticks_per_s: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._families = families
        self._disks = tuple(disks)
        self._clock = clock
        self._source: _MachineSource = (
            _LinuxMachine(proc, sys, cpus or _own_cpus, ticks_per_s or os.sysconf("SC_CLK_TCK"))
            if (proc / "stat").exists()
            else _PortableMachine()
        )
        self._cpu_at = clock()
        self._cpu_before = self._source.cpu()
        self._cpu_ratio: float | None = None

    def readings(self) -> list[Reading]:
        """All values that this machine tells."""
        families, source, readings = self._families, self._source, []
        ratio = self._cpu_share()
        if ratio is not None:
            readings.append(Reading(families.cpu_usage, (), ratio))
        memory = source.memory()
        if memory is not None:
            readings.append(Reading(families.memory_usage, (), memory[0]))
            readings.append(Reading(families.memory_limit, (), memory[1]))
        for path in self._disks:
            try:
                usage = shutil.disk_usage(path)
            except OSError:
                continue
            # As df does: of what is not reserved for the superuser.
            readings.append(Reading(families.disk_usage, (path,), usage.used / max(1, usage.used + usage.free)))
        for family, directions, values in (
            (families.disk_io, ("read", "write"), source.disk_io()),
            (families.network, ("receive", "transmit"), source.network()),
        ):
            if values is not None:
                readings += [Reading(family, (label,), value) for label, value in zip(directions, values, strict=True)]
        return readings

    def _cpu_share(self) -> float | None:
        now = self._clock()
        elapsed = now - self._cpu_at
        if elapsed >= _CPU_WINDOW_S:
            before, after = self._cpu_before, self._source.cpu()
            if before is not None and after is not None:
                self._cpu_ratio = min(1.0, max(0.0, (after[0] - before[0]) / (elapsed * after[1])))
            self._cpu_at, self._cpu_before = now, after
        return self._cpu_ratio


def _own_cpus() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


class _Group(NamedTuple):
    """The folders of our control group for one controller, innermost first, and which version they are."""

    version: int
    folders: list[Path]


class _LinuxMachine:
    def __init__(self, proc: Path, sys: Path, cpus: Callable[[], set[int]], ticks_per_s: int) -> None:
        self._proc = proc
        self._sys = sys
        self._cpus = cpus
        self._ticks = ticks_per_s
        self._memory_group = self._group("memory")
        self._cpu_group = self._group("cpu")
        self._cpu_use_group = self._group("cpuacct")

    def cpu(self) -> tuple[float, float] | None:
        cpus = self._cpus()
        quota = self._quota()
        if quota is not None and quota[1] < len(cpus):
            return quota
        busy = 0.0
        try:
            for line in (self._proc / "stat").read_text().splitlines():
                name, *ticks = line.split()
                if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cpus:
                    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, ticks[:8])
                    busy += user + nice + system + irq + softirq + steal
        except (OSError, ValueError):
            return None
        return busy / self._ticks, float(len(cpus))

    def _quota(self) -> tuple[float, float] | None:
        """CPU seconds used and CPUs allowed by the tightest group, if one limits us."""
        tightest: tuple[float, int] | None = None
        for depth, folder in enumerate(self._cpu_group.folders):
            if self._cpu_group.version == 2:
                quota, _, period = _text(folder / "cpu.max").partition(" ")
            else:
                quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
            if quota.isdigit() and period.isdigit() and int(period):
                allowed = int(quota) / int(period)
                if tightest is None or allowed < tightest[0]:
                    tightest = allowed, depth
        if tightest is None:
            return None
        allowed, depth = tightest
        if self._cpu_group.version == 2:
            used = _fields(self._cpu_group.folders[depth] / "cpu.stat", "usage_usec")
            return (int(used[0]) / 1e6, allowed) if used else None
        if depth >= len(self._cpu_use_group.folders):
            return None
        nanoseconds = _text(self._cpu_use_group.folders[depth] / "cpuacct.usage")
        return (int(nanoseconds) / 1e9, allowed) if nanoseconds.isdigit() else None

    def memory(self) -> tuple[float, float] | None:
        total, available = (
            _fields(self._proc / "meminfo", "MemTotal:"),
            _fields(self._proc / "meminfo", "MemAvailable:"),
        )
        if not total or not available:
            return None
        use, limit = (int(total[0]) - int(available[0])) * 1024.0, int(total[0]) * 1024.0
        version = self._memory_group.version
        names = ("memory.max", "memory.current", "inactive_file")
        if version == 1:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        for folder in self._memory_group.folders:
            allowed, used = _text(folder / names[0]), _text(folder / names[1])
            if allowed.isdigit() and used.isdigit() and int(allowed) < limit:
                droppable = _fields(folder / "memory.stat", names[2])
                limit = float(allowed)
                use = max(0.0, float(used) - (float(droppable[0]) if droppable else 0.0))
        return use, limit

    def disk_io(self) -> tuple[float, float] | None:
        try:
            disks = {path.name for path in (self._sys / "block").iterdir() if not path.name.startswith(_NOT_DISKS)}
            lines = (self._proc / "diskstats").read_text().splitlines()
        except OSError:
            return None
        rows = [fields for fields in map(str.split, lines) if fields[2] in disks]
        read, written = sum(int(row[5]) for row in rows), sum(int(row[9]) for row in rows)
        return read * float(_SECTOR_BYTES), written * float(_SECTOR_BYTES)

    def network(self) -> tuple[float, float] | None:
        lines = _text(self._proc / "net" / "dev").splitlines()
        if not lines:
            return None
        received = sent = 0.0
        for line in lines[2:]:
            name, _, numbers = line.partition(":")
            if name.strip() != "lo":
                fields = numbers.split()
                received += int(fields[0])
                sent += int(fields[8])
        return received, sent

    def _group(self, controller: str) -> _Group:
        """Our group for a controller. A container may see its path on the host: then the root it sees is its own."""
        root = self._sys / "fs" / "cgroup"
        unified = ""
        for line in _text(self._proc / "self" / "cgroup").splitlines():
            number, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):
                base = root / controller
                return _Group(1, _upwards(base if base.exists() else root / controllers, path))
            if number == "0":
                unified = path
        return _Group(2, _upwards(root, unified)) if (root / "cgroup.controllers").exists() else _Group(2, [])


def _upwards(base: Path, path: str) -> list[Path]:
    folders, folder = [base], base
    for part in Path(path.lstrip("/")).parts:
        folder /= part
        if part == ".." or not folder.is_dir():
            return [base]
        folders.insert(0, folder)
    return folders


def _text(path: Path) -> str:
    """What a file of the kernel says, "" if it cannot be read."""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _fields(path: Path, name: str) -> list[str]:
    """The fields behind `name` on its line; none if there is no such line."""
    for line in _text(path).splitlines():
        first, *rest = line.split() or [""]
        if first == name:
            return rest
    return []


class _PortableMachine:
    def __init__(self) -> None:
        import psutil  # only where there is no /proc: it costs 15 ms and memory

        self._psutil: Any = psutil

    def cpu(self) -> tuple[float, float] | None:
        times = self._psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        # Guests are counted within user time already.
        doubled = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
        return sum(times) - idle - doubled, float(self._psutil.cpu_count() or 1)

    def memory(self) -> tuple[float, float] | None:
        memory = self._psutil.virtual_memory()
        return float(memory.total - memory.available), float(memory.total)

    def disk_io(self) -> tuple[float, float] | None:
        counters = self._psutil.disk_io_counters()
        return None if counters is None else (float(counters.read_bytes), float(counters.write_bytes))

    def network(self) -> tuple[float, float] | None:
        counters = self._psutil.net_io_counters(pernic=True)
        wired = [c for name, c in counters.items() if name not in ("lo", "lo0")]
        return float(sum(c.bytes_recv for c in wired)), float(sum(c.bytes_sent for c in wired))
