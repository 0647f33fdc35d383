"""The process that owns sockets, metric segments and children, and does nothing that can be slow or large.

One thread, one `selectors` loop; signals arrive through a wakeup descriptor. It starts the workers and
control, starts and stops runners when control says so, replaces what dies or hangs, and ends everything
on SIGTERM: workers first, with their requests in flight, then runners, then control. If it is killed,
its end of every child's lifeline closes, and the children leave by themselves (child.py).

A child is `starting` until it reports `ready`; then it is `stopping`, or dies and is `backoff` until it is
started again. A runner that reports `failed` is not started again until control says so.

Not for: what children do, or any policy about models (control). Standard library only.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import resource
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal, cast, get_args

from llm_router import __version__, families
from llm_router.observe.logs.console import AppendedFile, Console, Form, write_now
from llm_router.observe.logs.logged import NUMBERS
from llm_router.observe.logs.service import Service
from llm_router.observe.metrics.slots import Segment, Writer
from llm_router.processes.board import CONTROL_ROW, Board, worker_row
from llm_router.processes.channel import Channel, Lines
from llm_router.processes.child import DRAIN, EXIT_REFUSED, RELOAD
from llm_router.processes.listen import CannotStart, listen_tcp, listen_unix, lock_data_dir
from llm_router.processes.plan import ChildSpec, LaunchPlan, Role, memory_file, module_command, read_file
from llm_router.processes.restart import Backoff, Punctuality

COMMANDS: Final[Mapping[Role, Sequence[str]]] = {
    "worker": module_command("llm_router.processes.worker"),
    "control": module_command("llm_router.processes.control"),
    "runner": module_command("llm_router.processes.runner"),
}

MOST_RUNNERS: Final = 256
"""Rows of the board for runners: far more models than any machine holds in memory."""

_TICK_S: Final = 0.25
_LATE_S: Final = 1.0  # a tick this late says that the machine stood still, not that children hang
_START_S: Final = 60.0  # a worker or control that is not ready by then hangs; imports take about 0.3 s
_CONTROL_HANG_S: Final = 30.0  # control may do what is slow; requests go on without it
_DUMP_S: Final = 0.2  # for a hung child to print its stack: the C handler needs no turn of the interpreter
_LEAVE_S: Final = 3.0  # for runners and control, which have nothing left in flight when they are told to leave
_GRACE_S: Final = 3.0  # workers bound their drain themselves, then cut what is left, which takes them up to 2 s
_SERVED_CEILING_S: Final = 0.5  # a worker or control that had been ready is back within 1 s, however often it dies
_START_ATTEMPTS: Final = 5  # deaths of a child that was never ready, until the whole start has failed
_MOST_DESCRIPTORS: Final = 65536  # a worker holds up to 4,096 clients and as many upstream connections

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
_SEGMENT_NAME: Final = "supervisor"

_log = logging.getLogger("llm_router.supervisor")

State = Literal["starting", "ready", "backoff", "stopping", "failed"]
RestartReason = Literal["exited", "killed", "hung"]
_REASONS: Final[tuple[RestartReason, ...]] = ("exited", "killed", "hung")


class _Post:
    """A place in the tree of processes, filled by one process after the other. Instants are monotonic."""

    def __init__(
        self, role: Role, name: str, index: int, row: int, backoff: Backoff, payload: dict[str, Any] | None = None
    ) -> None:
        self.role = role
        self.name = name
        self.index = index
        self.row = row
        self.backoff = backoff
        self.payload = payload if payload is not None else {}
        self.segment: Segment | None = None
        self.sockets: list[socket.socket] = []
        self.process: subprocess.Popen[bytes] | None = None
        self.state: State = "starting"
        self.restarts = 0
        self.deaths_before_ready = 0
        self.was_ready = False
        self.started_at = 0.0
        self.started_time = 0.0
        self.ready_at = 0.0
        self.retry_at = math.inf
        self.kill_at = math.inf
        self.is_hung = False
        self.info: dict[str, Any] = {}
        self.error = ""
        self.lifeline_fd = -1
        self.status_fd = -1
        self.lines = Lines()
        self.stop_ids: list[Any] = []

    @property
    def label(self) -> str:
        return f"runner {self.name}" if self.role == "runner" else self.name

    def describe(self) -> dict[str, Any]:
        """The child as control sees it."""
        seen = {
            "name": self.name,
            "role": self.role,
            "pid": self.process.pid if self.process is not None else 0,
            "state": self.state,
            "restarts": self.restarts,
            "started_time": self.started_time,
            "info": self.info,
            "error": self.error,
        }
        return {**seen, "payload": self.payload} if self.role == "runner" else seen

    def __repr__(self) -> str:
        return f"_Post({self.label}, {self.state}, restarts={self.restarts})"


class Supervisor:
    """Everything that runs under one `llm-router serve`. Make it, `run` it once, in the main thread.

    Args:
        commands: how to start a child of each role; `--spec-fd N` is appended.
    Raises: CannotStart from `run` before any child is started.
    """

    def __init__(self, plan: LaunchPlan, commands: Mapping[Role, Sequence[str]] = COMMANDS) -> None:
        self._plan = plan
        self._commands = commands
        self._selector = selectors.DefaultSelector()
        self._punctuality = Punctuality(_LATE_S)
        self._posts: list[_Post] = []
        self._stage: Literal["running", "workers", "runners", "control", "done"] = "running"
        self._exit_status = 0
        self._channel: Channel | None = None
        self._channel_events = 0
        self._has_terminal = _terminal_is_there()

    def run(self) -> int:
        """Serve until told to stop. Returns the exit status."""
        with contextlib.ExitStack() as stack:
            self._open(stack)
            for post in self._posts:
                if not self._start(post):
                    self._retry_later(post, time.monotonic(), 0.0)
            while self._stage != "done":
                self._turn()
        return self._exit_status

    # -- what children are given ----------------------------------------------------------------------

    def _open(self, stack: contextlib.ExitStack) -> None:
        plan = self._plan
        stack.callback(self._selector.close)
        # Released last: whoever gets the lock next may be sure that nothing of ours is left.
        stack.callback(os.close, lock_data_dir(plan))
        groups, port = listen_tcp(plan.host, plan.port, plan.workers)
        for sock in {sock for sockets in groups for sock in sockets}:
            stack.callback(sock.close)
        plan = plan._replace(port=port)
        self._control_sockets: dict[str, socket.socket] = {}
        if plan.metrics_port >= 0:
            try:
                ((sock, *others),), port = listen_tcp(plan.metrics_host, plan.metrics_port, 1)
            except CannotStart as problem:
                _log.warning("monitoring has no port of its own, the app port serves its paths: %s", problem)
            else:
                for other in others:
                    other.close()
                self._control_sockets["monitoring_fd"] = sock
                plan = plan._replace(metrics_port=port)
        for key, path in (
            ("cli_fd", plan.cli_path),
            ("forward_fd", plan.forward_path),
            ("snapshot_fd", plan.snapshot_path),
        ):
            self._control_sockets[key] = listen_unix(path)
            stack.callback(_unlink, path)
        for sock in self._control_sockets.values():
            stack.callback(sock.close)
        self._plan = plan

        self._board = Board.create(worker_row(plan.workers) + MOST_RUNNERS)
        stack.callback(self._board.close)
        self._free_rows = list(range(self._board.rows - 1, worker_row(plan.workers) - 1, -1))
        control = _Post("control", "control", 0, CONTROL_ROW, Backoff(0.0, 0.1, 5.0, 10.0))
        workers = [
            _Post("worker", f"worker-{index}", index, worker_row(index), Backoff(0.0, 0.1, 5.0, 10.0))
            for index in range(plan.workers)
        ]
        for post in (control, *workers):
            post.segment = Segment.create(post.name, rows=plan.segment_rows, slots=plan.segment_slots)
            stack.callback(post.segment.close)
        for worker, sockets in zip(workers, groups, strict=True):
            worker.sockets = sockets
        # Control first: workers wait for its snapshot.
        self._control, self._posts = control, [control, *workers]

        self._segment = Segment.create(_SEGMENT_NAME, rows=1024, slots=2048, exemplars=0)
        stack.callback(self._segment.close)
        restarts = (families.WORKER_RESTARTS, families.RUNNER_RESTARTS)
        self._writer = Writer(self._segment, restarts, dropped=families.SERIES_DROPPED)
        for worker in workers:
            for reason in _REASONS:
                self._writer.counter(families.WORKER_RESTARTS, worker.name, reason)
        self._listen_for_signals(stack)

    def _listen_for_signals(self, stack: contextlib.ExitStack) -> None:
        wakeup, woken = socket.socketpair()
        for sock in (wakeup, woken):
            sock.setblocking(False)
            stack.callback(sock.close)
        stack.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False))
        for number in _SIGNALS:
            stack.callback(signal.signal, number, signal.signal(number, _noted))
        self._selector.register(wakeup, selectors.EVENT_READ, lambda: self._on_signals(wakeup))

    def _segments_for(self, post: _Post) -> list[tuple[str, int]]:
        if post.segment is None:
            return []
        own = (post.name, post.segment.fd)
        others = [(other.name, other.segment.fd) for other in self._posts if other.segment and other is not post]
        if post.role == "control":
            return [own, *others, (_SEGMENT_NAME, self._segment.fd)]
        return [own, *((name, fd) for name, fd in others if name != self._control.name)]

    # -- starting ---------------------------------------------------------------------------------------

    def _start(self, post: _Post) -> bool:
        """Start a process for the post. False, with `post.error`, if the machine does not give us one."""
        self._board.clear(post.row)
        post.lines = Lines()
        post.info, post.error, post.ready_at, post.is_hung = {}, "", 0.0, False
        post.retry_at = post.kill_at = math.inf
        post.state, post.started_at, post.started_time = "starting", time.monotonic(), time.time()
        self._changed()
        try:
            with contextlib.ExitStack() as theirs:
                post.process = self._spawn(post, theirs)
        except OSError as error:
            post.error = f"cannot start a process: {error.strerror or error}"
            _log.error("%s: %s", post.label, post.error)
            self._close_pipes(post)
            if post.role == "control":
                self._close_channel()
            return False
        self._selector.register(post.status_fd, selectors.EVENT_READ, lambda: self._on_status(post))
        _log.info("%s started (pid %d)", post.label, post.process.pid)
        return True

    def _spawn(self, post: _Post, theirs: contextlib.ExitStack) -> subprocess.Popen[bytes]:
        """The new process. What only the child needs to hold is closed here when `theirs` is left."""
        lifeline, post.lifeline_fd = os.pipe()
        theirs.callback(os.close, lifeline)
        post.status_fd, status = os.pipe()
        theirs.callback(os.close, status)
        os.set_blocking(post.lifeline_fd, False)
        os.set_blocking(post.status_fd, False)
        segments = self._segments_for(post)
        inherited = [lifeline, status, self._board.fd, *(fd for _, fd in segments)]
        payload = post.payload
        if post.role == "control":
            self._close_channel()
            self._channel = Channel(self._describe)
            theirs.callback(self._channel.theirs.close)
            payload = {key: sock.fileno() for key, sock in self._control_sockets.items()}
            payload["channel_fd"] = self._channel.theirs.fileno()
            inherited += payload.values()
            payload.setdefault("monitoring_fd", -1)
        listening = [sock.fileno() for sock in post.sockets]
        spec = ChildSpec(
            role=post.role,
            name=post.name,
            index=post.index,
            lifeline_fd=lifeline,
            status_fd=status,
            board_fd=self._board.fd,
            board_index=post.row,
            plan=self._plan,
            segments=segments,
            listen_fds=listening,
            payload=payload,
        )
        spec_fd = memory_file("llm-router-spec", spec.to_json())
        theirs.callback(os.close, spec_fd)
        return subprocess.Popen(
            [*self._commands[post.role], "--spec-fd", str(spec_fd)],
            stdin=subprocess.DEVNULL,
            stdout=2,  # stdout is for what control announces
            pass_fds=[*inherited, *listening, spec_fd],
            start_new_session=True,
        )

    def _close_channel(self) -> None:
        if self._channel is not None:
            if self._channel_events:
                self._selector.unregister(self._channel.ours)
            self._channel.close()
            self._channel, self._channel_events = None, 0
            for post in self._posts:
                post.stop_ids.clear()  # the next control numbers its orders anew

    def _close_pipes(self, post: _Post) -> None:
        for fd in (post.status_fd, post.lifeline_fd):
            if fd >= 0:
                os.close(fd)
        post.status_fd = post.lifeline_fd = -1

    # -- the loop -----------------------------------------------------------------------------------------

    def _turn(self) -> None:
        for key, _ in self._selector.select(max(0.0, self._next_at() - time.monotonic())):
            call: Callable[[], None] = key.data
            call()
        self._reap()
        now = time.monotonic()
        self._punctuality.tick(now)
        for post in tuple(self._posts):
            self._look_after(post, now)
        if self._stage != "running":
            self._stop_further(now)
        self._flush_channel()

    def _next_at(self) -> float:
        due = (min(post.retry_at, post.kill_at) for post in self._posts)
        return min(time.monotonic() + _TICK_S, *due)

    def _on_signals(self, wakeup: socket.socket) -> None:
        # SIGCHLD only has to wake the loop: every turn reaps.
        for number in wakeup.recv(4096):
            if number == signal.SIGHUP and (not self._has_terminal or _terminal_is_there()):
                _log.info("SIGHUP: control reads the configuration again")
                self._order(self._control, RELOAD)
            elif number in {signal.SIGTERM, signal.SIGINT, signal.SIGHUP} and self._stage == "running":
                _log.info("%s: draining, for at most %g s", _signal_name(number), self._plan.drain_s)
                self._stop(0)
            elif number == signal.SIGINT:
                _log.warning("SIGINT again: ending at once")
                self._end_at_once()

    def _look_after(self, post: _Post, now: float) -> None:
        """Do what is due for a child: kill it, start it again, find out that it hangs."""
        if now >= post.kill_at:
            post.kill_at = math.inf
            why = "hung" if post.is_hung else "did not leave in time"
            _log.warning("%s (%s) %s: killed", post.label, _pid(post), why)
            _kill(post)
        if now >= post.retry_at:
            post.restarts += 1
            if not self._start(post):
                self._retry_later(post, now, 0.0)
        if post.process is None or post.is_hung or post.role == "runner" or post.state == "stopping":
            return
        if post.state == "starting":
            seen_at, hang_s = post.started_at, _START_S
        else:
            seen_at = max(post.ready_at, self._board.read(post.row))
            hang_s = self._plan.hang_s if post.role == "worker" else max(_CONTROL_HANG_S, self._plan.hang_s)
        if self._punctuality.is_hung(seen_at, now, hang_s):
            post.is_hung = True
            post.kill_at = now + _DUMP_S
            what = "is not ready" if post.state == "starting" else "gives no sign of life"
            _log.error("%s (%s) %s for %.1f s; its stacks:", post.label, _pid(post), what, now - seen_at)
            post.process.send_signal(signal.SIGUSR1)

    # -- reports and deaths ---------------------------------------------------------------------------------

    def _on_status(self, post: _Post) -> None:
        messages, ended = post.lines.read_all(post.status_fd)
        for message in messages:
            self._on_report(post, message)
        if ended:
            # The rest comes with SIGCHLD; until then the end of file would wake us without pause.
            self._unregister(post)

    def _unregister(self, post: _Post) -> None:
        with contextlib.suppress(KeyError, ValueError):  # done before
            self._selector.unregister(post.status_fd)

    def _on_report(self, post: _Post, message: dict[str, Any]) -> None:
        event = message.pop("event", "")
        if event == "ready" and post.state == "starting":
            post.state, post.info, post.ready_at, post.was_ready = "ready", message, time.monotonic(), True
            post.deaths_before_ready = 0
            _log.info("%s ready after %.2f s", post.label, post.ready_at - post.started_at)
        elif event == "failed" and post.role == "runner" and post.state in {"starting", "ready"}:
            post.state, post.info = "failed", message
            post.error = str(message.get("error", "it did not say why"))
            post.kill_at = time.monotonic() + _LEAVE_S
            _log.error("%s failed: %s", post.label, post.error)
        else:
            _log.warning("%s: a report %r makes no sense while it is %s", post.label, event, post.state)
        self._changed()

    def _reap(self) -> None:
        for post in tuple(self._posts):
            if post.process is not None and post.process.poll() is not None:
                self._on_death(post, post.process.returncode)

    def _on_death(self, post: _Post, status: int) -> None:
        now = time.monotonic()
        # Its last words decide what becomes of it.
        self._on_status(post)
        self._unregister(post)
        self._close_pipes(post)
        how = f"exited with status {status}" if status >= 0 else f"was killed by {_signal_name(-status)}"
        was_told = post.state in {"stopping", "failed"}
        _log.log(logging.INFO if was_told else logging.WARNING, "%s (%s) %s", post.label, _pid(post), how)
        post.process = None
        post.kill_at = math.inf
        if post.segment is not None:
            post.segment.mark_left()
        if post.role == "control":
            self._close_channel()
        self._changed()
        if post.state == "stopping":
            if post.role == "runner":
                self._forget(post)
        elif post.state != "failed":
            post.error = "hung" if post.is_hung else how
            self._replace(post, now, status)

    def _replace(self, post: _Post, now: float, status: int) -> None:
        if self._stage != "running":
            post.state = "stopping"
            return
        if post.role != "runner" and not post.was_ready:
            post.deaths_before_ready += 1
            if status == EXIT_REFUSED or post.deaths_before_ready >= _START_ATTEMPTS:
                _log.critical("%s cannot start; ending", post.label)
                self._stop(1)
                return
        reason: RestartReason = "hung" if post.is_hung else "killed" if status < 0 else "exited"
        family = families.RUNNER_RESTARTS if post.role == "runner" else families.WORKER_RESTARTS
        if post.role != "control":
            self._writer.counter(family, post.name, reason).inc()
        self._retry_later(post, now, now - post.started_at)

    def _retry_later(self, post: _Post, now: float, lived_s: float) -> None:
        wait_s = post.backoff.after_death(lived_s)
        if post.role != "runner" and post.ready_at:
            wait_s = min(wait_s, _SERVED_CEILING_S)
        post.state, post.retry_at = "backoff", now + wait_s

    # -- control's orders ---------------------------------------------------------------------------------------

    def _describe(self) -> dict[str, Any]:
        children = [post.describe() for post in self._posts]
        return {"event": "state", "draining": self._stage != "running", "children": children}

    def _changed(self) -> None:
        if self._channel is not None:
            self._channel.changed()

    def _flush_channel(self) -> None:
        channel = self._channel
        if channel is None:
            return
        channel.flush()
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if channel.is_waiting else 0)
        if channel.broken:
            # Control closed its end, or does not read: it is leaving, or must, for it cannot do its work.
            self._close_channel()
            self._control.kill_at = min(self._control.kill_at, time.monotonic() + _LEAVE_S)
        elif self._channel_events != events:
            if self._channel_events:
                self._selector.modify(channel.ours, events, self._on_channel)
            else:
                self._selector.register(channel.ours, events, self._on_channel)
            self._channel_events = events

    def _on_channel(self) -> None:
        channel = self._channel
        for order in channel.receive() if channel is not None else ():
            try:
                answer = self._obey(order)
            except (KeyError, TypeError, ValueError) as error:
                answer = f"malformed order: {type(error).__name__}: {error}"
            if channel is not None and "id" in order and answer is not None:
                channel.reply({"id": order["id"], "ok": not answer, **({"error": answer} if answer else {})})

    def _obey(self, order: dict[str, Any]) -> str | None:
        """What is wrong with the order, "" if it is done, None if the answer follows later."""
        match order["op"]:
            case "start_runner":
                return self._start_runner(str(order["name"]), dict(order["payload"]))
            case "stop_runner":
                return self._stop_runner(str(order["name"]), float(order.get("grace_s", _LEAVE_S)), order.get("id"))
            case "announce":
                return "" if write_now(1, f"{order['text']}\n") == "all" else "stdout does not take it"
            case "set_log":
                return self._set_log(str(order["level"]), str(order["console"]))
            case unknown:
                return f"unknown order {unknown!r}"

    def _set_log(self, level: str, console: str) -> str:
        """Write lines from this level on, in this form."""
        if level not in NUMBERS or console not in get_args(Form):
            return f"no such level or form: {level!r}, {console!r}"
        _log.setLevel(level.upper())
        for handler in _log.handlers:
            if isinstance(handler, Console):
                handler.form = cast("Form", console)
        return ""

    def _start_runner(self, name: str, payload: dict[str, Any]) -> str:
        former = self._runner(name)
        if former is not None and former.process is None and former.state == "failed":
            self._forget(former)
        elif former is not None:
            return f"runner {name!r} is there already ({former.state})"
        if self._stage != "running":
            return "the router is shutting down"
        if not self._free_rows:
            return f"there are {MOST_RUNNERS} runners already"
        post = _Post("runner", name, 0, self._free_rows.pop(), Backoff(0.2, 0.4, 10.0, 60.0), payload)
        self._posts.append(post)
        for reason in _REASONS:
            self._writer.counter(families.RUNNER_RESTARTS, name, reason)
        if self._start(post):
            return ""
        self._forget(post)
        return post.error

    def _stop_runner(self, name: str, grace_s: float, id: Any) -> str | None:
        post = self._runner(name)
        if post is None:
            return f"there is no runner {name!r}"
        post.stop_ids.append(id)
        self._tell_to_leave(post, time.monotonic() + grace_s)
        if post.process is None:
            self._forget(post)
        return None

    def _runner(self, name: str) -> _Post | None:
        return next((post for post in self._posts if post.role == "runner" and post.name == name), None)

    def _forget(self, post: _Post) -> None:
        """A runner is gone for good: answer whoever asked for that."""
        self._posts.remove(post)
        self._board.clear(post.row)
        self._free_rows.append(post.row)
        self._changed()
        for id in post.stop_ids:
            if self._channel is not None and id is not None:
                self._channel.reply({"id": id, "ok": True})

    # -- stopping ---------------------------------------------------------------------------------------------------

    def _order(self, post: _Post, order: bytes) -> None:
        # A child that died or reads nothing needs no order.
        with contextlib.suppress(BrokenPipeError, BlockingIOError):
            if post.lifeline_fd >= 0:
                os.write(post.lifeline_fd, order)

    def _tell_to_leave(self, post: _Post, kill_at: float) -> None:
        post.retry_at = math.inf
        post.state = "stopping"
        post.kill_at = min(post.kill_at, kill_at) if post.process is not None else math.inf
        self._order(post, DRAIN)
        self._changed()

    def _of(self, role: Role) -> Iterator[_Post]:
        return (post for post in self._posts if post.role == role)

    def _stop(self, status: int) -> None:
        self._exit_status = status
        self._stage = "workers"
        kill_at = time.monotonic() + (self._plan.drain_s if status == 0 else 0.0) + _GRACE_S
        for post in self._posts:
            post.retry_at = math.inf
        for worker in self._of("worker"):
            self._tell_to_leave(worker, kill_at)
            for sock in worker.sockets:  # else nobody would refuse the connections that workers accept no more
                sock.close()

    def _stop_further(self, now: float) -> None:
        """Go on to the next stage for as long as nobody of this one is left."""
        if self._stage == "workers" and _all_gone(self._of("worker")):
            self._stage = "runners"
            for runner in self._of("runner"):
                self._tell_to_leave(runner, now + _LEAVE_S)
        if self._stage == "runners" and _all_gone(self._of("runner")):
            self._stage = "control"
            self._tell_to_leave(self._control, now + _LEAVE_S)
        if self._stage == "control" and _all_gone(self._of("control")):
            self._stage = "done"
            _log.info("stopped")

    def _end_at_once(self) -> None:
        for post in self._posts:
            _kill(post)
        for post in self._posts:
            if post.process is not None:
                # A process in the kernel's hands may take longer; it is not ours to wait for.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    post.process.wait(1.0)
        self._exit_status = 128 + signal.SIGINT
        self._stage = "done"


def _all_gone(posts: Iterable[_Post]) -> bool:
    return all(post.process is None for post in posts)


def _pid(post: _Post) -> str:
    return f"pid {post.process.pid}" if post.process is not None else "no process"


def _kill(post: _Post) -> None:
    """Kill a child that is not reaped yet, with whatever it started: it leads a process group."""
    if post.process is not None and post.process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(post.process.pid, signal.SIGKILL)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _noted(number: int, frame: object) -> None:
    """The handler of every signal: that there is one makes Python write to the wakeup descriptor."""


def _terminal_is_there() -> bool:
    """Whether this process has a terminal. One that is closed sends SIGHUP, which then does not mean reload."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _unlink(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def _log_as(plan: LaunchPlan) -> None:
    """Let log lines go to stderr and to application.log, each as it comes: there are few, and none may wait."""
    service = Service.here(__version__, plan.environment, plan.service)
    _log.addHandler(Console("supervisor", service, form=cast("Form", plan.console)))
    if plan.log_dir:
        _log.addHandler(AppendedFile(plan.log_dir, "supervisor", service))
    for name, level in {"llm_router": plan.log_level, **plan.log_levels}.items():
        logging.getLogger(name).setLevel(level.upper())
    _log.propagate = False


def _prepare_process() -> None:
    """Give this process, and so its children, standard descriptors and as many others as they may have."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # one of the standard descriptors was closed: the next pipe would have taken its place
    os.close(fd)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # macOS has further limits of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main(argv: Sequence[str], commands: Mapping[Role, Sequence[str]] = COMMANDS) -> int:
    """Run the supervisor of the plan behind `--plan-fd N`. Returns the exit status."""
    if len(argv) != 2 or argv[0] != "--plan-fd":
        write_now(2, "llm-router: the supervisor is started by `llm-router serve`\n")
        return 2
    _prepare_process()
    plan = LaunchPlan.from_json(read_file(int(argv[1])))
    _log_as(plan)
    try:
        return Supervisor(plan, commands).run()
    except CannotStart as problem:
        write_now(2, f"llm-router: {problem}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
