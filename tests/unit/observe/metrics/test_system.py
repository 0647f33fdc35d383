"""Readings of processes and machines, from recorded /proc and /sys trees, and of the machine we are on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llm_router.observe.metrics.system import Machine, MachineFamilies, Processes, ProcessFamilies
from llm_router.signals import Family, Reading

RECORDED = Path(__file__).parents[3] / "recorded" / "machines"
NOWHERE = Path("/nowhere")

PROCESS = ProcessFamilies(*(Family(name, "gauge", ("process",), "") for name in ProcessFamilies._fields))
MACHINE = MachineFamilies(
    *(Family(name, "gauge", (), "") for name in ("cpu_usage", "memory_usage", "memory_limit")),
    *(Family(name, "gauge", ("path",), "") for name in ("disk_usage", "disk_io", "network")),
)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def by_name(readings: list[Reading]) -> dict[tuple[str, ...], float]:
    return {(reading.family.name, *reading.labels): reading.value for reading in readings}


# -- processes


def test_a_process_is_read_whatever_its_name_contains() -> None:
    processes = Processes(PROCESS, proc=RECORDED / "unlimited" / "proc", ticks_per_s=100)
    assert by_name(processes.readings({"worker-0": 77})) == {
        ("cpu_seconds", "worker-0"): 4.0,
        ("resident_memory", "worker-0"): 20_480_000.0,
        ("heap", "worker-0"): 12_288_000.0,
        ("open_fds", "worker-0"): 3.0,
        ("start_time", "worker-0"): 1_700_000_123.45,
    }


def test_what_cannot_be_read_is_left_out() -> None:
    """No reading for a zombie or a process that is gone, and no 0 for what an old kernel does not say."""
    processes = Processes(PROCESS, proc=RECORDED / "unlimited" / "proc", ticks_per_s=100)
    assert processes.readings({"zombie": 78, "gone": 12345}) == []
    assert {key[0] for key in by_name(processes.readings({"old": 79}))} == {
        "cpu_seconds",
        "resident_memory",
        "start_time",
    }


@pytest.mark.parametrize("proc", (Path("/proc"), NOWHERE), ids=("proc", "psutil"))
def test_a_real_process_is_read(proc: Path) -> None:
    """The same from /proc and, as where there is none, from psutil."""
    if proc.parts[-1] == "proc" and not proc.exists():
        pytest.skip("this system has no /proc")
    processes = Processes(PROCESS, proc=proc)
    found = by_name(processes.readings({"me": os.getpid()}))
    assert found["cpu_seconds", "me"] > 0
    assert found["resident_memory", "me"] > found["heap", "me"] > 1e6
    assert found["open_fds", "me"] >= 3
    assert 0 <= time.time() - found["start_time", "me"] < 3600
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert processes.use(child.pid) is None  # a zombie until it is waited for
    assert processes.use(child.pid) is None


# -- the machine


def machine(name: str, tree: Path, clock: Clock, disks: tuple[str, ...] = ()) -> Machine:
    root = tree / name
    return Machine(
        MACHINE, disks, proc=root / "proc", sys=root / "sys", cpus=lambda: {0, 1}, ticks_per_s=100, clock=clock
    )


@pytest.mark.parametrize(
    ("name", "usage", "limit"),
    (
        ("cgroup1", 900_000_000 - 300_000_000, 2_147_483_648),
        ("cgroup2", 3_000_000_000 - 500_000_000, 4_294_967_296),  # its parent's limit
        ("unlimited", 7_000_000 * 1024, 16_000_000 * 1024),
    ),
)
def test_memory_is_that_of_the_tightest_group_or_of_the_machine(name: str, usage: float, limit: float) -> None:
    found = by_name(machine(name, RECORDED, Clock()).readings())
    assert (found["memory_usage",], found["memory_limit",]) == (usage, limit)


def test_disks_and_networks_are_counted_once() -> None:
    """No partitions, no virtual devices, no loopback."""
    found = by_name(machine("unlimited", RECORDED, Clock()).readings())
    assert found["disk_io", "read"] == (200_000 + 2_000) * 512
    assert found["disk_io", "write"] == (400_000 + 8) * 512
    assert (found["network", "receive"], found["network", "transmit"]) == (1_550_000, 730_000)


def test_disk_usage_is_that_of_df(tmp_path: Path) -> None:
    found = by_name(machine("unlimited", RECORDED, Clock(), (str(tmp_path), "/not/there")).readings())
    assert 0 < found["disk_usage", str(tmp_path)] < 1
    assert ("disk_usage", "/not/there") not in found


@pytest.mark.parametrize(
    ("name", "file", "old", "new", "ratio"),
    (
        # Two of three CPUs are ours, busy for 100 ticks in 2 s; the third is none of our business.
        ("unlimited", "proc/stat", "cpu0 1000 50", "cpu0 1100 50", 0.25),
        ("unlimited", "proc/stat", "cpu2 1000", "cpu2 9000", 0.0),
        # Half a CPU is ours, used for 0.8 s of 2 s.
        ("cgroup1", "sys/fs/cgroup/cpuacct/cpuacct.usage", "7000000000", "7800000000", 0.8),
        # One and a half CPUs are ours, used for 1.5 s of 2 s.
        ("cgroup2", "sys/fs/cgroup/app.slice/cpu.stat", "usage_usec 12500000", "usage_usec 14000000", 0.5),
        ("cgroup2", "sys/fs/cgroup/app.slice/cpu.stat", "usage_usec 12500000", "usage_usec 99000000", 1.0),
    ),
)
def test_the_cpu_share_is_of_the_cpus_we_may_use(
    name: str, file: str, old: str, new: str, ratio: float, tmp_path: Path
) -> None:
    tree = shutil.copytree(RECORDED, tmp_path / "machines")
    clock = Clock()
    read = machine(name, tree, clock)
    assert ("cpu_usage",) not in by_name(read.readings())  # nothing to compare with yet
    path = tree / name / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    clock.now += 2.0
    assert by_name(read.readings())["cpu_usage",] == pytest.approx(ratio)
    clock.now += 0.1
    assert by_name(read.readings())["cpu_usage",] == pytest.approx(ratio)  # too soon for another


def test_a_tree_with_nothing_in_it_gives_no_readings(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "stat").write_text("cpu garbage\n")
    readings = Machine(MACHINE, proc=tmp_path / "proc", sys=tmp_path / "sys").readings()
    assert [name for name, *_ in by_name(readings)] == []


@pytest.mark.parametrize("proc", (Path("/proc"), NOWHERE), ids=("proc", "psutil"))
def test_the_real_machine_is_read(proc: Path) -> None:
    clock = Clock()
    read = Machine(MACHINE, ("/",), proc=proc, clock=clock)
    clock.now += 1
    found = by_name(read.readings())
    assert 0 <= found["cpu_usage",] <= 1
    assert 0 < found["memory_usage",] < found["memory_limit",]
    assert 0 < found["disk_usage", "/"] < 1
    assert found["network", "receive"] >= 0
