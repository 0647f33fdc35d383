"""Says what a runner process is given, and whether the model fits, before there is a process.

`RunnerSpec.payload()` is what `processes/runner.py` gets; `check` refuses a bad file or a model too large.
Not for: starting runners (processes), routing to them, or what they answer.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Self

import msgspec

from llm_router.errors import BadOptions, OutOfMemory, RunnerFailed
from llm_router.models.gguf import Header, read_header

MOST_CONTEXT: Final = 4096
"""Tokens a request may use unless configured otherwise: chats fit, and the cache of a small model stays small."""

MOST_PARALLEL: Final = 256
"""More slots than llama.cpp can batch with any use."""

_OVERHEAD_BYTES: Final = 64 << 20
"""Of a runner beyond weights and cache: interpreter, library and work buffers (measured: 55 MB)."""


def new_key() -> str:
    """A fresh bearer token of 192 random bits: other users of the machine must not talk to a runner."""
    return secrets.token_urlsafe(24)


class RunnerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One runner: which model file, under which name, and with how much.

    Args:
        name: what the runner calls the model in its replies; a label value.
        path: the model file.
        context_size: tokens that one request may use, prompt and answer; 0 takes what the model was
            trained for, at most 4,096. (llama.cpp's own n_ctx is the sum over all slots.)
        parallel: requests served at the same time; more wait inside llama.cpp. Each slot has its own cache.
        threads: CPU threads; 0 takes `default_threads`.
        gpu_layers: layers on the GPU; -1 as many as fit. Without a GPU build it changes nothing.
        embeddings: whether `/v1/embeddings` answers. Measured: costs completions nothing.
        chat_template: Jinja source that takes the place of the model's own; "" for the model's own.
        key: the bearer token that the runner demands.
    """

    name: str
    path: str
    context_size: int = 0
    parallel: int = 2
    threads: int = 0
    gpu_layers: int = -1
    embeddings: bool = True
    chat_template: str = ""
    key: str = msgspec.field(default_factory=new_key)

    def payload(self) -> dict[str, Any]:
        """The specification as JSON values, for `ChildSpec.payload`. Contains the key: never log it."""
        return {field: getattr(self, field) for field in self.__struct_fields__}

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> Self:
        """Raises RunnerFailed for what `payload` did not make."""
        try:
            return msgspec.convert(payload, cls)
        except msgspec.ValidationError as error:
            raise RunnerFailed(f"the specification of the runner is not valid: {error}") from error

    def context_for(self, header: Header) -> int:
        """Tokens a request may use with this model."""
        return self.context_size or min(header.context_length or MOST_CONTEXT, MOST_CONTEXT)

    def __repr__(self) -> str:
        return f"RunnerSpec({self.name!r}, {self.path!r}, context_size={self.context_size}, parallel={self.parallel})"


def check(spec: RunnerSpec, *, root: Path = Path("/")) -> Header:
    """Make sure that a runner can be started: the file is a whole model, the numbers make sense, it fits.

    Blocks on the disk. Raises BadModelFile, BadOptions, OutOfMemory.
    """
    for field, least, most in (
        ("context_size", 0, 1 << 24),
        ("parallel", 1, MOST_PARALLEL),
        ("threads", 0, 1024),
        ("gpu_layers", -1, 10_000),
    ):
        if not least <= getattr(spec, field) <= most:
            raise BadOptions(f"model {spec.name!r}: {field} is {getattr(spec, field)}, not {least} to {most}")
    if spec.embeddings and spec.parallel & (spec.parallel - 1):
        # llama.cpp aborts in an assertion while it sets up pooling (seen with 3, 5 and 6 slots).
        raise BadOptions(
            f"model {spec.name!r}: with embeddings, parallel must be 1, 2, 4, 8 or another power of two, "
            f"not {spec.parallel}; change it, or set embeddings: false"
        )
    header = read_header(spec.path)
    if spec.gpu_layers <= 0:
        _check_memory(spec, header, free_memory_bytes(root))
    return header


def _check_memory(spec: RunnerSpec, header: Header, free: int | None) -> None:
    context = spec.context_for(header)
    cache = header.cache_bytes_per_token * context * spec.parallel
    needed = header.size_bytes + cache + _OVERHEAD_BYTES
    if free is not None and needed > free:
        raise OutOfMemory(
            f"model {spec.name!r} needs about {_mb(needed)} ({_mb(header.size_bytes)} of weights, {_mb(cache)} of cache "
            f"for {spec.parallel} x {context:,} tokens), and {_mb(free)} are free; "
            "unload another model, or take a smaller one, less context or fewer slots"
        )


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.0f} MB"


def free_memory_bytes(root: Path = Path("/")) -> int | None:
    """Memory that can be had without swapping, here and in every control group above us; None where unknown.

    Args:
        root: where `proc` and `sys` are, for tests.
    """
    rooms = [_available(root / "proc/meminfo")]
    rooms += [_room(group) for group in _control_groups(root, "memory")]
    return min((room for room in rooms if room is not None), default=None)


def usable_cpus(root: Path = Path("/")) -> float:
    """CPUs that this process may use: its affinity, and the quotas of every control group above it."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = (_quota(group) for group in _control_groups(root, "cpu"))
    return min(float(cpus), *(quota for quota in quotas if quota is not None), math.inf)


def default_threads(usable: float, cores: int) -> int:
    """Threads for a runner: the physical cores, but one CPU less than we may use, at least one.

    llama.cpp's threads wait for each other by spinning many times a token. If one of them is not running
    because something else is, all wait: measured on 2 CPUs beside other work, 2 threads gave 3 to 117
    tokens a second, changing by the second, and one thread a steady 80. So one CPU is left to the router.
    """
    return max(1, min(cores or 1, int(usable) - 1))


def _control_groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of our control group for a controller and of those above it, in both versions of the kernel's tree."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            base = root / "sys/fs/cgroup" / controller
        else:
            continue
        # In a container the path may be the host's and not visible: then only the top, which is ours, counts.
        group = base / path.strip("/")
        yield from (level for level in (group, *group.parents) if level == base or base in level.parents)


def _quota(group: Path) -> float | None:
    """The CPUs a control group may use; None without a quota."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text().strip()
            period = (group / "cpu.cfs_period_us").read_text().strip()
        return int(quota) / int(period) if quota.isdigit() and int(period) > 0 else None
    except (OSError, ValueError):
        return None


def _available(meminfo: Path) -> int | None:
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _room(group: Path) -> int | None:
    """What a control group has left, counting file pages that it would give up; None without a limit."""
    limit, used = "memory.max", "memory.current"
    if not (group / limit).exists():
        limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
    try:
        most = (group / limit).read_text().strip()
        if not most.isdigit():
            return None
        taken = int((group / used).read_text())
        details = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        reclaimable = int(details.get("total_inactive_file", details.get("inactive_file", 0)))
    except (OSError, ValueError):
        return None
    return max(0, int(most) - taken + reclaimable)
