"""Plans and specifications survive the way to another process; long socket paths work."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from llm_router.processes.plan import (
    LONGEST_UNIX_PATH,
    ChildSpec,
    LaunchPlan,
    memory_file,
    read_file,
    unix_address,
)

PLAN = LaunchPlan(
    data_dir="/data/ünï",
    log_dir="/logs",
    config_path="/etc/llm-router.yaml",
    overrides={"server": {"port": 1}, "models": ["a"]},
    host="::1",
    port=0,
    metrics_port=-1,
    workers=3,
    drain_s=1.5,
    banner='two\nlines "quoted"',
)


def test_a_plan_comes_back_as_it_was() -> None:
    """Every field of a plan survives JSON."""
    assert LaunchPlan.from_json(PLAN.to_json()) == PLAN


def test_a_plan_of_another_version_is_refused() -> None:
    """An unknown field is an error, not a default."""
    with pytest.raises(TypeError, match="surprise"):
        LaunchPlan.from_json(b'{"data_dir": "/d", "log_dir": "/l", "surprise": 1}')


def test_paths_follow_from_the_data_folder() -> None:
    """Children find each other by the data folder alone."""
    assert PLAN.cli_path == "/data/ünï/control.sock"
    assert PLAN.forward_path == "/data/ünï/run/forward.sock"
    assert PLAN.snapshot_path == "/data/ünï/run/snapshot.sock"


def test_a_specification_comes_back_as_it_was() -> None:
    """Every field of a specification survives JSON, the plan and the pairs of segments included."""
    spec = ChildSpec(
        role="worker",
        name="worker-1",
        index=1,
        lifeline_fd=3,
        status_fd=4,
        board_fd=5,
        board_index=2,
        plan=PLAN,
        segments=[("worker-1", 6)],
        listen_fds=[7, 8],
        payload={"key": "value"},
    )
    assert ChildSpec.from_json(spec.to_json()) == spec
    assert spec.run_dir == "/data/ünï/run"


def test_another_process_reads_a_memory_file_from_its_beginning() -> None:
    """The offset that the writer left behind does not matter."""
    fd = memory_file("test", b"x" * 200_000)
    code = "import sys; from llm_router.processes.plan import read_file; print(len(read_file(int(sys.argv[1]))))"
    found = subprocess.run([sys.executable, "-c", code, str(fd)], pass_fds=[fd], capture_output=True, check=True)
    assert found.stdout == b"200000\n"
    assert len(read_file(fd)) == 200_000


def test_a_pipe_can_carry_a_plan() -> None:
    """A plan needs no anonymous file where there is a pipe."""
    reading, writing = os.pipe()
    os.write(writing, PLAN.to_json())
    os.close(writing)
    assert LaunchPlan.from_json(read_file(reading)) == PLAN


def test_a_memory_file_is_not_inherited_unless_handed_on() -> None:
    """No child gets what was not meant for it."""
    fd = memory_file("test")
    assert not os.get_inheritable(fd)
    os.close(fd)


def test_a_short_path_is_its_own_address(tmp_path: Path) -> None:
    """Nothing is changed that need not be."""
    assert unix_address("/run/a.sock") == "/run/a.sock"


@pytest.mark.skipif(sys.platform != "linux", reason="the way through /proc/self/fd exists on Linux only")
def test_a_long_path_is_reached_through_its_folder(tmp_path: Path) -> None:
    """Binding and connecting work beyond the length of a socket address, also after the folder was made anew."""
    folder = tmp_path / ("deep" * 20) / ("deeper" * 20)
    path = str(folder / "a.sock")
    assert len(path) > LONGEST_UNIX_PATH
    for _ in range(2):
        folder.mkdir(parents=True)
        with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
            server.bind(unix_address(path))
            server.listen()
            assert Path(path).is_socket()
            client.connect(unix_address(path))
        shutil.rmtree(folder)
