"""What the processes of one router hand each other at start, and where they find each other.

`llm-router serve` turns its configuration into a `LaunchPlan` and becomes the supervisor, which knows
nothing else; the supervisor hands each child a `ChildSpec`. Both travel as JSON in an anonymous file
whose descriptor is inherited: nothing of it shows in argv or the environment, or stays on disk.
Not for: reading configuration (config.py), or what a worker may do (the snapshot).
Standard library only: the supervisor imports it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from typing import Any, Final, Literal, NamedTuple, NoReturn, Self

Role = Literal["worker", "control", "runner"]

LONGEST_UNIX_PATH: Final = 100
"""Bytes of a Unix socket address that fit everywhere (sun_path has 104 on macOS, 108 on Linux)."""


class LaunchPlan(NamedTuple):
    """Everything the supervisor needs to know. Durations in seconds, sizes in rows of a metric segment.

    `config_path` ("" for none) and `overrides` (the flags of the command line) let control load the same
    configuration again. `port` 0 takes any free port; `metrics_port` 0 likewise, below 0 opens none.
    `banner` is the text that control announces on stdout when the router is ready to serve. `console`, `log_level`,
    `log_levels`, `service` and `environment` say how lines on stderr look until others are known, see
    `observe.logs.console`: children learn of changes by their snapshot, the supervisor by control's orders.
    """

    data_dir: str
    log_dir: str
    config_path: str = ""
    overrides: dict[str, Any] = {}  # defaults of a NamedTuple: never changed
    host: str = "127.0.0.1"
    port: int = 3006
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 9090
    workers: int = 1
    drain_s: float = 30.0
    banner: str = ""
    segment_rows: int = 2048
    segment_slots: int = 32768
    hang_s: float = 5.0
    console: str = "auto"
    log_level: str = "info"
    log_levels: dict[str, str] = {}
    service: str = "llm-router"
    environment: str = "production"

    @property
    def run_dir(self) -> str:
        """The folder (0700) of the sockets that only the router's own processes use."""
        return os.path.join(self.data_dir, "run")

    @property
    def cli_path(self) -> str:
        """The socket of the command line."""
        return os.path.join(self.data_dir, "control.sock")

    @property
    def forward_path(self) -> str:
        """The socket on which control answers what workers forward."""
        return os.path.join(self.run_dir, "forward.sock")

    @property
    def snapshot_path(self) -> str:
        """The socket on which control publishes the routing snapshot."""
        return os.path.join(self.run_dir, "snapshot.sock")

    def to_json(self) -> bytes:
        return json.dumps(self._asdict()).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Raises TypeError or ValueError when `data` was not made by `to_json` of the same version."""
        return cls(**json.loads(data))


class ChildSpec(NamedTuple):
    """What one child is, and the descriptors it inherits.

    `lifeline_fd` is read: bytes are orders, its end means that the supervisor is gone. `status_fd` takes
    JSON lines to the supervisor. `segments` are pairs (name, descriptor), the child's own first: a worker
    gets those of the other workers too, control those of all others, a runner none. `listen_fds` are listening
    sockets, for workers only; control finds its sockets in `payload` as `monitoring_fd` (-1 for none), `cli_fd`,
    `forward_fd`, `snapshot_fd` and `channel_fd`; the payload of a runner is what control handed in.
    """

    role: Role
    name: str
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody wants of a specification
    lifeline_fd: int
    status_fd: int
    board_fd: int
    board_index: int
    plan: LaunchPlan
    segments: list[tuple[str, int]] = []
    listen_fds: list[int] = []
    payload: dict[str, Any] = {}

    @property
    def run_dir(self) -> str:
        return self.plan.run_dir

    def to_json(self) -> bytes:
        return json.dumps({**self._asdict(), "plan": self.plan._asdict()}).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Raises TypeError, KeyError or ValueError when `data` was not made by `to_json` of the same version."""
        fields = json.loads(data)
        fields["plan"] = LaunchPlan(**fields["plan"])
        fields["segments"] = [(name, fd) for name, fd in fields["segments"]]
        return cls(**fields)


def memory_file(name: str, data: bytes = b"") -> int:
    """A descriptor of an anonymous file that holds `data`; it disappears with its last descriptor.

    Not inherited by children unless they are handed it. `name` only shows in /proc.
    """
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create(name, os.MFD_CLOEXEC)
    else:
        fd, path = tempfile.mkstemp(prefix=f"{name}-")
        os.unlink(path)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    return fd


def read_file(fd: int) -> bytes:
    """All that a file or pipe holds, from its beginning, and close it."""
    with os.fdopen(fd, "rb") as file:
        if file.seekable():
            file.seek(0)
        return file.read()


def become_supervisor(plan: LaunchPlan) -> NoReturn:
    """Replace this process by the supervisor of `plan`, so that nothing imported so far weighs on it."""
    sys.stdout.flush()
    sys.stderr.flush()
    fd = memory_file("llm-router-plan", plan.to_json())
    os.set_inheritable(fd, True)
    # -P: a json.py in the current folder must not take the place of the standard library's.
    os.execv(sys.executable, [*module_command("llm_router.processes.supervisor"), "--plan-fd", str(fd)])


def module_command(module: str) -> list[str]:
    """The command that runs a module of ours in this interpreter, without the current folder on its path."""
    return [sys.executable, "-P", "-m", module]


_folders: dict[str, int] = {}
"""Descriptors of folders, kept for the life of the process: few, and addresses made from them stay valid."""


def unix_address(path: str) -> str:
    """What to bind or connect to for the Unix socket at `path`: `path`, or a short way to it.

    Socket addresses are limited to about 100 bytes. On Linux a longer path is reached through a
    descriptor of its folder, which must exist. Raises OSError when the folder is missing, or, elsewhere
    than on Linux, when the path is too long.
    """
    if len(os.fsencode(path)) <= LONGEST_UNIX_PATH:
        return path
    if not os.path.isdir("/proc/self/fd"):
        raise OSError(f"{path}: too long for a Unix socket ({LONGEST_UNIX_PATH} bytes); choose a shorter DATA_DIR")
    folder, name = os.path.split(path)
    fd = _folders.get(folder, -1)
    # A folder that was removed and made again has another inode behind the same path.
    if fd < 0 or os.fstat(fd).st_nlink == 0:
        fd = _folders[folder] = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    return f"/proc/self/fd/{fd}/{name}"
