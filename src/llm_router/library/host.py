"""What this process and its machine use, for metrics and for health checks of a program that is not our router.

Not for: the processes of `llm-router serve` (processes/measure.py).
"""

from __future__ import annotations

import os
from typing import Any, Final

from llm_router import families
from llm_router.app import LLMRouter, LoadedModel
from llm_router.observe.health.state import Inputs, ModelState
from llm_router.observe.metrics.system import Machine, Processes
from llm_router.processes.measure import MACHINE_FAMILIES, PROCESS_FAMILIES
from llm_router.signals import Reading

PROCESS: Final = "application"
"""The value of the label `process`."""


def state_of(model: LoadedModel) -> Any:
    """The state of one of the registry's models; of a remote one nobody here knows whether its backends are up."""
    return "loaded" if model.status == "remote" else model.status


def disk_path(wanted: str, router: LLMRouter | None) -> str:
    """Whose file system is looked at: as configured, else where the router keeps its data, else where we are."""
    data_dir = "" if router is None else router.settings.server.data_dir
    return wanted or (data_dir if data_dir and os.path.exists(data_dir) else os.getcwd())


class Host:
    """Reads it all anew whenever it is asked; some 200 us. One thread at a time.

    Args:
        disk_path: whose file system is looked at.
    """

    def __init__(self, disk_path: str) -> None:
        self.disk_path = disk_path
        self._processes = Processes(PROCESS_FAMILIES)
        self._machine = Machine(MACHINE_FAMILIES, [disk_path])

    def readings(self) -> list[Reading]:
        """Families `process_*` and `system_*`."""
        return [*self._processes.readings({PROCESS: os.getpid()}), *self._machine.readings()]

    def inputs(self, router: LLMRouter | None, environment: str) -> Inputs:
        """What the checks of the state look at."""
        levels = {reading.family.name: reading.value for reading in self._machine.readings()}
        use = self._processes.use(os.getpid())
        status: dict[str, Any] = (
            {"initialized": True, "failed": {}, "engine": ""} if router is None else router.get_status()
        )
        models = [] if router is None else router.registry.list()
        return Inputs(
            is_initialized=status["initialized"],
            models=tuple(
                ModelState(
                    name=model.name,
                    state=state_of(model),
                    error=status["failed"].get(model.name, ""),
                )
                for model in models
            ),
            cpu_ratio=levels.get(families.SYSTEM_CPU.name),
            memory_used_bytes=levels.get(families.SYSTEM_MEMORY.name),
            memory_limit_bytes=levels.get(families.SYSTEM_MEMORY_LIMIT.name),
            disk_ratio=levels.get(families.SYSTEM_DISK.name),
            disk_path=self.disk_path,
            rss_bytes=0.0 if use is None else use.resident_bytes,
            heap_bytes=0.0 if use is None or use.heap_bytes is None else use.heap_bytes,
            runner_bytes=float(sum(model.memory for model in models)),
            engine=status["engine"],
            environment=environment,
        )
