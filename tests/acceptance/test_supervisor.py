"""The real supervisor over small real children: everything that may happen to processes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from llm_router.observe.logs.schema import problems
from llm_router.processes.plan import LaunchPlan, memory_file
from support.net import free_port
from support.supervised import Supervised, connected, exchange, is_alive
from support.wait import until

Start = Callable[..., Supervised]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    running: list[Supervised] = []

    def start(terminal: str = "", **fields: Any) -> Supervised:
        folder = tmp_path / str(len(running))
        folder.mkdir()
        settings = {"data_dir": str(folder / "data"), "port": free_port(), "metrics_port": 0, "drain_s": 5.0, **fields}
        plan = LaunchPlan(**{"log_dir": str(folder), "segment_rows": 64, "segment_slots": 256, **settings})
        running.append(Supervised(plan, folder, terminal))
        return running[-1]

    yield start
    for supervised in running:
        supervised.end()


def children_of(supervised: Supervised) -> list[int]:
    return [child["pid"] for child in supervised.state()["children"] if child["pid"]]


def all_ready(supervised: Supervised) -> None:
    supervised.wait_for("control")
    for index in range(supervised.plan.workers):
        supervised.wait_for(f"worker-{index}")


# -- what children are given -----------------------------------------------------------------------------


def test_children_get_what_their_role_needs(start: Start) -> None:
    """A worker has its listening socket and the workers' segments; control has all segments and its own sockets."""
    supervised = start(workers=2)
    all_ready(supervised)
    control = supervised.ask("spec")
    assert [name for name, _ in control["segments"]] == ["control", "worker-0", "worker-1", "supervisor"]
    assert control["payload"]["monitoring_fd"] >= 0
    assert control["plan"]["metrics_port"] > 0
    assert control["listen_fds"] == []
    worker = supervised.ask("spec", supervised.app())
    assert worker["role"] == "worker"
    names = [name for name, _ in worker["segments"]]
    assert (names[0], sorted(names)) == (worker["name"], ["worker-0", "worker-1"])
    assert len(worker["listen_fds"]) == 1


def test_children_inherit_nothing_else(start: Start) -> None:
    """The write ends of lifelines stay with the supervisor: else they would not end with it."""
    supervised = start()
    all_ready(supervised)
    if not Path("/proc/self/fd").exists():
        pytest.skip("descriptors are looked up in /proc")
    pid = supervised.child("worker-0")["pid"]
    spec = supervised.ask("spec", supervised.app())
    pipes = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile: no pipe that stays
            if os.readlink(fd).startswith("pipe:"):
                pipes.add(int(fd.name))
    assert pipes == {spec["lifeline_fd"], spec["status_fd"]}


def test_children_lead_sessions_of_their_own_and_ignore_stop_signals(start: Start) -> None:
    """Ctrl-C in a terminal reaches the supervisor alone."""
    supervised = start()
    all_ready(supervised)
    pid = supervised.child("worker-0")["pid"]
    assert os.getsid(pid) == pid
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGINT)
    assert supervised.ask("pid", supervised.app()) == pid


def test_the_supervisor_imports_the_standard_library_only_and_stays_small(start: Start) -> None:
    """Nothing in it can be slow or large: at most 20 MB."""
    code = """
import sys
import llm_router.processes.supervisor
foreign = {name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names - {"__main__", "__mp_main__"}
print(sorted(name for name in foreign if not name.startswith("_")))
"""
    found = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, check=True, text=True)
    assert found.stdout.strip() == "['llm_router']"
    supervised = start(workers=2)
    all_ready(supervised)
    assert psutil.Process(supervised.process.pid).memory_info().rss <= 20e6


# -- deaths ---------------------------------------------------------------------------------------------------


def test_a_killed_worker_is_replaced_within_a_second(start: Start) -> None:
    """A client that connects in between waits for the successor, and nobody else is touched."""
    supervised = start(workers=1)
    all_ready(supervised)
    control = supervised.child("control")["pid"]
    pid = supervised.ask("pid", supervised.app())
    os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    assert supervised.ask("pid", supervised.app()) != pid
    assert time.monotonic() - began < 1.0
    worker = supervised.wait_for("worker-0", unlike_pid=pid)
    assert worker["restarts"] == 1
    assert supervised.child("control")["pid"] == control
    assert "was killed by SIGKILL" in supervised.log


def test_a_worker_that_is_killed_again_and_again_is_always_back_soon(start: Start) -> None:
    """A worker that had been ready waits at most half a second, however often it dies."""
    supervised = start()
    all_ready(supervised)
    for _ in range(6):
        pid = supervised.ask("pid", supervised.app())
        os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        until(lambda killed=pid: supervised.ask("pid", supervised.app()) != killed)  # type: ignore[misc]
        assert time.monotonic() - began < 1.5
    assert supervised.wait_for("worker-0")["restarts"] == 6


def test_a_worker_that_exits_is_replaced(start: Start) -> None:
    """Also with status 0 or 2: once it had been ready, it is started again."""
    supervised = start()
    all_ready(supervised)
    for status in (0, 2):
        pid = supervised.ask("pid", supervised.app())
        with pytest.raises(ConnectionError):
            supervised.ask(f"exit {status}", supervised.app())
        supervised.wait_for("worker-0", unlike_pid=pid)
    assert supervised.process.poll() is None


def test_a_new_control_learns_everything_at_once(start: Start) -> None:
    """Kill -9 of control: workers and runners are untouched, the new one has their state and payloads."""
    supervised = start()
    all_ready(supervised)
    assert supervised.order("start_runner", name="tiny", payload={"port": 4711, "key": "secret"})["ok"]
    runner = supervised.wait_for("tiny")
    worker, control = supervised.child("worker-0"), supervised.child("control")
    os.kill(control["pid"], signal.SIGKILL)
    began = time.monotonic()
    fresh = supervised.wait_for("control", unlike_pid=control["pid"])
    assert time.monotonic() - began < 3.0
    assert fresh["restarts"] == 1
    assert supervised.child("tiny") == runner
    assert runner["payload"] == {"port": 4711, "key": "secret"}
    assert runner["info"] == {"port": 4711}
    assert supervised.child("worker-0") == worker
    assert supervised.order("stop_runner", name="tiny", grace_s=5) == {"id": 2, "ok": True}


def test_a_killed_runner_comes_back(start: Start) -> None:
    """With a backoff, its payload, and a count of restarts."""
    supervised = start()
    all_ready(supervised)
    supervised.order("start_runner", name="tiny", payload={"port": 1})
    pid = supervised.wait_for("tiny")["pid"]
    os.kill(pid, signal.SIGKILL)
    runner = supervised.wait_for("tiny", unlike_pid=pid)
    assert runner["restarts"] == 1
    assert runner["payload"] == {"port": 1}


@pytest.mark.parametrize("script", [{}, {"deaf": True}])
def test_nothing_is_left_of_a_killed_supervisor(start: Start, script: dict[str, Any]) -> None:
    """Kill -9 of the supervisor: listening ends at once, and after 5 s no child is there, heeding or not."""
    supervised = start(workers=2, overrides={"worker": script, "control": script})
    all_ready(supervised)
    supervised.order("start_runner", name="tiny", payload=script)
    supervised.wait_for("tiny")
    children = children_of(supervised)
    assert len(children) == 4
    supervised.process.kill()
    supervised.process.wait()
    began = time.monotonic()

    def refused() -> bool:
        try:
            socket.create_connection(supervised.app(), timeout=1).close()
        except OSError:
            return True
        return False

    until(refused, 1.0, "refusing connections")
    until(lambda: not any(is_alive(pid) for pid in children), 5.0, "the end of all children")
    assert time.monotonic() - began < 5.0


def test_a_hanging_worker_leaves_too_when_the_supervisor_is_killed(start: Start) -> None:
    """Its lifeline has a thread of its own, which also ends its listening."""
    supervised = start(hang_s=30.0)
    all_ready(supervised)
    pid = supervised.ask("pid", supervised.app())
    with connected(supervised.plan, supervised.app()) as hung:
        hung.sendall(b"hang\n")
        until(lambda: "hang_here" in stack_of(supervised, pid))
        supervised.process.kill()
        supervised.process.wait()

        def refused() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(supervised.app()) != 0

        until(refused, 1.0, "refusing connections")
        until(lambda: not is_alive(pid), 5.0, "the end of the hung worker")


def stack_of(supervised: Supervised, pid: int) -> str:
    """What the log has after the child was asked to print its stacks."""
    os.kill(pid, signal.SIGUSR1)
    return supervised.log


def test_a_hung_worker_is_replaced_and_its_stack_logged(start: Start) -> None:
    """The stale heartbeat gives it away; the stack says where it hangs."""
    supervised = start(hang_s=1.0)
    all_ready(supervised)
    pid = supervised.ask("pid", supervised.app())
    with connected(supervised.plan, supervised.app()) as hung:
        hung.sendall(b"hang\n")
        worker = supervised.wait_for("worker-0", unlike_pid=pid)
    assert worker["restarts"] == 1
    assert re.search(r"worker-0 \(pid \d+\) gives no sign of life for 1\.\d s; its stacks:", supervised.log)
    assert "in hang_here" in supervised.log
    assert not is_alive(pid)


def test_a_supervisor_that_stood_still_replaces_nobody(start: Start) -> None:
    """All were stopped together, like a suspended machine: stale heartbeats mean nothing then."""
    supervised = start(hang_s=1.0)
    all_ready(supervised)
    worker = supervised.child("worker-0")["pid"]
    stopped_at = time.monotonic()
    for pid in (supervised.process.pid, worker):
        os.kill(pid, signal.SIGSTOP)
    until(lambda: time.monotonic() - stopped_at > 2.5)
    os.kill(supervised.process.pid, signal.SIGCONT)
    reloads = supervised.ask("reloads")
    os.kill(supervised.process.pid, signal.SIGHUP)
    until(lambda: supervised.ask("reloads") > reloads)  # the supervisor has turned
    os.kill(worker, signal.SIGCONT)
    assert supervised.ask("pid", supervised.app()) == worker
    assert "no sign of life" not in supervised.log


# -- starting ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["control", "worker"])
def test_a_refused_configuration_ends_the_start(start: Start, role: str) -> None:
    """Status 2 before ever being ready: it said why, and no storm of restarts follows."""
    supervised = start(workers=2, overrides={role: {"exit_at_start": 2}})
    assert supervised.wait_for_exit() == 1
    assert supervised.log.count("I will not start") <= 2
    assert f"{role}" in supervised.log


def test_a_child_that_never_gets_ready_ends_the_start(start: Start) -> None:
    """After five deaths, whatever their status."""
    supervised = start(overrides={"worker": {"exit_at_start": 1}})
    assert supervised.wait_for_exit() == 1
    assert supervised.log.count("I will not start") == 5


def test_a_second_instance_is_refused(start: Start) -> None:
    """It names the pid of the first, exits 1 and leaves the first alone."""
    first = start()
    all_ready(first)
    second = start(data_dir=first.plan.data_dir)
    assert second.wait_for_exit() == 1
    assert second.log.count("\n") == 1
    assert f"(pid {first.process.pid})" in second.log
    assert first.ask("pid", first.app())


def test_a_taken_port_is_refused_in_one_line(start: Start) -> None:
    """It names the port and the way out, and exits 1."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        supervised = start(port=port)
        assert supervised.wait_for_exit() == 1
    assert re.fullmatch(rf"llm-router: port {port} on 127\.0\.0\.1 is in use; .*--port\n", supervised.log)


def test_a_taken_monitoring_port_is_a_warning(start: Start) -> None:
    """Prometheus also likes 9090; the app port serves the paths."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        supervised = start(metrics_port=port)
        all_ready(supervised)
    assert f"port {port} on 127.0.0.1 is in use" in supervised.log
    assert supervised.ask("spec")["payload"]["monitoring_fd"] == -1


def test_a_long_data_folder_works(start: Start, tmp_path: Path) -> None:
    """Unix sockets have short addresses; paths need not."""
    supervised = start(data_dir=str(tmp_path / ("deep" * 20) / ("deeper" * 20)))
    all_ready(supervised)


def test_several_workers_share_the_port(start: Start) -> None:
    """Each has a socket of its own, and the kernel spreads the connections."""
    supervised = start(workers=2)
    all_ready(supervised)
    until(lambda: supervised.ask("spec", supervised.app())["name"] == "worker-0")
    until(lambda: supervised.ask("spec", supervised.app())["name"] == "worker-1")


# -- orders -----------------------------------------------------------------------------------------------------


def test_a_runner_that_fails_is_not_started_again(start: Start) -> None:
    """Its error stays in the state until control starts or stops it anew."""
    supervised = start()
    all_ready(supervised)
    assert supervised.order("start_runner", name="bad", payload={"fail": "not enough memory"})["ok"]
    runner = supervised.wait_for("bad", "failed")
    assert runner["error"] == "not enough memory"
    assert runner["info"]["code"] == "runner_failed"
    until(lambda: supervised.child("bad")["pid"] == 0)
    assert supervised.child("bad")["restarts"] == 0
    assert supervised.order("start_runner", name="bad", payload={"port": 7})["ok"]
    assert supervised.wait_for("bad")["info"] == {"port": 7}


def test_orders_that_make_no_sense_are_answered(start: Start) -> None:
    """With an error, and nothing else happens."""
    supervised = start()
    all_ready(supervised)
    assert "no runner" in supervised.order("stop_runner", name="nobody")["error"]
    assert "unknown order" in supervised.order("dance")["error"]
    assert "malformed" in supervised.order("start_runner")["error"]
    assert "malformed" in supervised.order("start_runner", name="x", payload=5)["error"]
    supervised.order("start_runner", name="one", payload={})
    assert "there already" in supervised.order("start_runner", name="one", payload={})["error"]
    with connected(supervised.plan) as connection:
        connection.sendall(b"raw nonsense\n")
        assert exchange(connection, "pid") == supervised.child("control")["pid"]


def test_a_stopped_runner_is_gone_when_the_answer_comes(start: Start) -> None:
    """Heeding or not: after the grace it is killed."""
    supervised = start()
    all_ready(supervised)
    for name, payload in (("heeding", {}), ("deaf", {"deaf": True})):
        supervised.order("start_runner", name=name, payload=payload)
        pid = supervised.wait_for(name)["pid"]
        assert supervised.order("stop_runner", name=name, grace_s=0.3)["ok"]
        assert not is_alive(pid)
        assert supervised.child(name) == {}


def test_a_runner_that_cannot_be_started_is_an_error(start: Start) -> None:
    """The machine gives no process: the answer says so, and the runner is not in the state."""
    if not hasattr(psutil.Process, "rlimit"):
        pytest.skip("limits of another process can be set on Linux only")
    supervised = start()
    all_ready(supervised)
    psutil.Process(supervised.process.pid).rlimit(psutil.RLIMIT_NOFILE, (3, 3))
    answer = supervised.order("start_runner", name="tiny", payload={})
    assert not answer["ok"]
    assert "cannot start a process" in answer["error"]
    assert supervised.child("tiny") == {}


def test_announcements_go_to_stdout_and_nothing_else_does(start: Start) -> None:
    """stdout is for people: the log is on stderr."""
    supervised = start()
    all_ready(supervised)
    assert supervised.order("announce", text="ready on http://127.0.0.1\ntry curl")["ok"]
    assert supervised.out == "ready on http://127.0.0.1\ntry curl\n"


def test_log_lines_are_json_where_no_terminal_is(start: Start) -> None:
    """As every line of application.log, where they stand too."""
    supervised = start(environment="test")
    all_ready(supervised)
    lines = supervised.log.splitlines()
    assert len(lines) >= 4
    for line in lines:
        entry = json.loads(line)
        assert problems("application", entry) == []
        assert (entry["process"], entry["pid"], entry["env"]) == ("supervisor", supervised.process.pid, "test")
    appended = Path(supervised.plan.log_dir, "application.log").read_text(encoding="utf-8").splitlines()
    assert appended[: len(lines)] == lines


def test_log_lines_can_be_text(start: Start) -> None:
    """Plain, a time and one line each, that anybody can read and sort."""
    supervised = start(console="text")
    all_ready(supervised)
    for line in supervised.log.splitlines():
        assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z supervisor: INFO \S", line), line


def test_a_folder_for_logs_that_cannot_be_written_stops_nothing(start: Start, tmp_path: Path) -> None:
    """A file is in its place; stderr has the lines."""
    (tmp_path / "file").touch()
    supervised = start(log_dir=str(tmp_path / "file"))
    all_ready(supervised)
    assert "worker-0 ready" in supervised.log


def test_the_level_can_be_changed(start: Start) -> None:
    """At the start and by control's order; what is no level is refused."""
    supervised = start(log_level="debug", log_levels={"llm_router.supervisor": "warning"})
    all_ready(supervised)
    assert supervised.log == ""
    assert supervised.order("set_log", level="info", console="text")["ok"]
    os.kill(supervised.child("worker-0")["pid"], signal.SIGKILL)
    until(lambda: "supervisor: INFO worker-0 started" in supervised.log)
    assert "supervisor: WARNING worker-0" in supervised.log
    refused = supervised.order("set_log", level="loud", console="text")
    assert not refused["ok"]
    assert "'loud'" in refused["error"]


def test_sighup_reaches_control(start: Start) -> None:
    """And nobody else: control reads the configuration again."""
    supervised = start()
    all_ready(supervised)
    supervised.process.send_signal(signal.SIGHUP)
    until(lambda: supervised.ask("reloads") == 1)
    assert supervised.ask("reloads", supervised.app()) == 0


# -- stopping -----------------------------------------------------------------------------------------------------


def test_a_closed_terminal_stops_the_router(start: Start) -> None:
    """SIGHUP then does not mean reload: nobody is there any more who could press Ctrl-C."""
    ours, theirs = os.openpty()
    supervised = start(terminal=os.ttyname(theirs))
    os.close(theirs)
    all_ready(supervised)
    supervised.process.send_signal(signal.SIGHUP)
    until(lambda: supervised.ask("reloads") == 1)
    os.close(ours)
    assert supervised.wait_for_exit() == 0
    assert "SIGHUP: draining" in supervised.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_requests_in_flight_finish(start: Start, number: signal.Signals) -> None:
    """Control knows of the drain, new connections are refused, the one in flight is answered, the exit is 0."""
    supervised = start(workers=2)
    all_ready(supervised)
    supervised.order("start_runner", name="tiny", payload={})
    supervised.wait_for("tiny")
    children = children_of(supervised)
    with connected(supervised.plan, supervised.app()) as connection:
        exchange(connection, "pid")
        assert exchange(connection, "hold") == "holding"
        supervised.process.send_signal(number)
        until(lambda: supervised.state().get("draining"))

        def refused() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(supervised.app()) != 0

        until(refused)
        assert supervised.child("tiny")["state"] == "ready"  # the answer may need it
        assert exchange(connection, "go") == "held until now"
    assert supervised.wait_for_exit() == 0
    assert not any(is_alive(pid) for pid in children)
    assert list(Path(supervised.plan.run_dir).iterdir()) == []


def test_what_does_not_leave_in_time_is_killed(start: Start) -> None:
    """The drain is bounded; the exit is 0 all the same."""
    supervised = start(drain_s=0.2, overrides={"worker": {"deaf": True}})
    all_ready(supervised)
    began = time.monotonic()
    supervised.process.terminate()
    assert supervised.wait_for_exit() == 0
    assert time.monotonic() - began < 4.0
    assert "did not leave in time: killed" in supervised.log


def test_a_second_interrupt_ends_at_once(start: Start) -> None:
    """Who presses Ctrl-C twice does not want to wait."""
    supervised = start(drain_s=30.0, overrides={"worker": {"deaf": True}})
    all_ready(supervised)
    children = children_of(supervised)
    supervised.process.send_signal(signal.SIGINT)
    until(lambda: supervised.state().get("draining"))
    supervised.process.send_signal(signal.SIGINT)
    assert supervised.wait_for_exit(3.0) == 130
    assert not any(is_alive(pid) for pid in children)


def test_nobody_is_replaced_while_draining(start: Start) -> None:
    """A child that dies then has only left early."""
    supervised = start(workers=2, overrides={"worker-0": {"deaf": True}})
    all_ready(supervised)
    deaf = supervised.child("worker-0")["pid"]
    supervised.process.terminate()
    until(lambda: supervised.state().get("draining"))
    os.kill(deaf, signal.SIGKILL)
    assert supervised.wait_for_exit() == 0
    assert supervised.log.count("worker-0 started") == 1


def test_the_supervisor_counts_restarts_in_its_segment(start: Start) -> None:
    """Every reason exists at 0, and a kill counts as one."""
    supervised = start()
    all_ready(supervised)
    pid = supervised.child("worker-0")["pid"]
    os.kill(pid, signal.SIGKILL)
    supervised.wait_for("worker-0", unlike_pid=pid)
    assert supervised.ask("restarts") == {"exited": 0.0, "hung": 0.0, "killed": 1.0}


def test_started_without_a_plan_it_says_how_to_start() -> None:
    """The module is no command for people."""
    found = subprocess.run(
        [sys.executable, "-m", "llm_router.processes.supervisor"], capture_output=True, check=False, text=True
    )
    assert found.returncode == 2
    assert "llm-router serve" in found.stderr


def test_the_real_commands_name_modules_of_ours(tmp_path: Path) -> None:
    """A plan in an inherited descriptor is all that `python -m` needs; a taken lock shows that it was read."""
    plan = LaunchPlan(data_dir=str(tmp_path / "file" / "data"), log_dir=str(tmp_path))
    (tmp_path / "file").write_text("")
    fd = memory_file("plan", plan.to_json())
    command = [sys.executable, "-P", "-m", "llm_router.processes.supervisor", "--plan-fd", str(fd)]
    found = subprocess.run(command, pass_fds=[fd], capture_output=True, check=False, text=True)
    os.close(fd)
    assert found.returncode == 1
    assert "choose another DATA_DIR" in found.stderr
