"""What a runner is given, and the checks before there is one."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from llm_router.errors import BadModelFile, BadOptions, OutOfMemory, RunnerFailed
from llm_router.models.launch import (
    RunnerSpec,
    check,
    default_threads,
    free_memory_bytes,
    new_key,
    usable_cpus,
)
from llm_router.processes.own_runners import OwnRunners, RunnerEvent
from support.aio import run
from support.gguf import model

GB = 1 << 30


def machine(root: Path, available: int, groups: str = "", files: dict[str, str] | None = None) -> Path:
    """A root with the files of /proc and /sys that tell about memory."""
    contents = {
        "proc/meminfo": f"MemTotal: 99999999 kB\nMemAvailable:    {available // 1024} kB\n",
        "proc/self/cgroup": groups,
        **(files or {}),
    }
    for name, content in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def spec(tmp_path: Path, data: bytes | None = None) -> RunnerSpec:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(model() if data is None else data)
    return RunnerSpec(name="tiny", path=str(path))


def test_specification_survives_the_way_to_the_runner(tmp_path: Path) -> None:
    """The payload is JSON and gives back the same specification."""
    before = spec(tmp_path)
    assert RunnerSpec.from_payload(json.loads(json.dumps(before.payload()))) == before
    with pytest.raises(RunnerFailed, match="parallel"):
        RunnerSpec.from_payload({**before.payload(), "parallel": "two"})


def test_keys_are_long_and_never_shown(tmp_path: Path) -> None:
    """Each runner has a key of its own that no repr contains."""
    assert len({new_key() for _ in range(100)}) == 100
    assert len(new_key()) == 32
    before = spec(tmp_path)
    assert before.key not in repr(before)


def test_context_is_bounded_by_default(tmp_path: Path) -> None:
    """Nobody gets a cache for 131,072 tokens without asking for it."""
    header = check(spec(tmp_path))
    assert spec(tmp_path).context_for(header) == 512
    assert RunnerSpec(name="x", path="", context_size=9999).context_for(header) == 9999


def test_impossible_numbers_are_refused(tmp_path: Path) -> None:
    """llama.cpp would end the process, or worse, work with them."""
    path = spec(tmp_path).path
    for wrong in ({"parallel": 0}, {"context_size": -1}, {"threads": 5000}, {"gpu_layers": -2}):
        with pytest.raises(BadOptions, match=next(iter(wrong))):
            check(RunnerSpec.from_payload({"name": "x", "path": path, **wrong}))


def test_bad_files_are_refused(tmp_path: Path) -> None:
    """The header is looked at before anything is started."""
    with pytest.raises(BadModelFile, match="truncated"):
        check(spec(tmp_path, model()[:-1]))


def test_a_model_larger_than_free_memory_is_refused(tmp_path: Path) -> None:
    """The message says how much is needed and how much there is; a GPU changes the question."""
    root = machine(tmp_path / "root", 50 << 20)
    with pytest.raises(OutOfMemory, match=r"model 'tiny' needs about 67 MB .* and 52 MB are free"):
        check(spec(tmp_path), root=root)
    check(spec(tmp_path), root=machine(tmp_path / "root", GB))
    check(RunnerSpec(name="x", path=spec(tmp_path).path, gpu_layers=99), root=machine(tmp_path / "root", 50 << 20))


def test_free_memory_of_the_machine(tmp_path: Path) -> None:
    """Without control groups it is what the kernel calls available; without /proc it is unknown."""
    assert free_memory_bytes(machine(tmp_path, 3 * GB)) == 3 * GB
    assert free_memory_bytes(tmp_path / "nothing") is None


def group(folder: str, limit: str, used: int, inactive: int = 0) -> dict[str, str]:
    return {
        f"sys/fs/cgroup/{folder}/memory.max": f"{limit}\n",
        f"sys/fs/cgroup/{folder}/memory.current": f"{used}\n",
        f"sys/fs/cgroup/{folder}/memory.stat": f"anon 1\ninactive_file {inactive}\n",
    }


def test_the_tightest_control_group_counts(tmp_path: Path) -> None:
    """A limit anywhere above us limits us; file pages that would be given up count as free."""
    files = group("a", str(2 * GB), GB, GB // 2) | group("a/b", "max", GB)
    assert free_memory_bytes(machine(tmp_path, 8 * GB, "0::/a/b\n", files)) == GB + GB // 2


def test_a_container_that_sees_only_its_own_group(tmp_path: Path) -> None:
    """The path in /proc may be the host's: then the group at the top is ours."""
    assert (
        free_memory_bytes(machine(tmp_path, 8 * GB, "0::/not/visible\n", group("", str(GB), GB // 4))) == GB - GB // 4
    )


def test_control_groups_of_the_first_version(tmp_path: Path) -> None:
    """The older layout has other names."""
    files = {
        "sys/fs/cgroup/memory/x/memory.limit_in_bytes": str(GB),
        "sys/fs/cgroup/memory/x/memory.usage_in_bytes": str(GB // 2),
        "sys/fs/cgroup/memory/x/memory.stat": "total_inactive_file 1024\n",
    }
    assert free_memory_bytes(machine(tmp_path, 8 * GB, "4:cpu,memory:/x\n1:name=systemd:/x\n", files)) == GB // 2 + 1024


def test_cpus_are_those_of_the_tightest_quota(tmp_path: Path) -> None:
    """A container's quota counts, in both layouts; without one it is the affinity."""
    all_cpus = usable_cpus(machine(tmp_path / "a", GB))
    assert all_cpus >= 1
    files = {"sys/fs/cgroup/x/cpu.max": "max 100000\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}
    assert usable_cpus(machine(tmp_path / "b", GB, "0::/x\n", files)) == 0.5
    files = {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "70000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}
    assert usable_cpus(machine(tmp_path / "c", GB, "3:cpu:/\n", files)) == 0.7
    files = {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}
    assert usable_cpus(machine(tmp_path / "d", GB, "3:cpu:/\n", files)) == all_cpus


@pytest.mark.parametrize(
    ("usable", "cores", "threads"), [(0.5, 8, 1), (1, 1, 1), (2, 2, 1), (2, 1, 1), (8, 8, 7), (16, 8, 8), (3.5, 64, 2)]
)
def test_a_cpu_is_left_to_the_router(usable: float, cores: int, threads: int) -> None:
    """One CPU stays free unless there is only one; no more threads than physical cores."""
    assert default_threads(usable, cores) == threads


def test_a_bad_file_starts_no_process(tmp_path: Path) -> None:
    """The refusal comes from the header: nothing was ever starting."""
    seen: list[RunnerEvent] = []

    async def scenario() -> None:
        async with OwnRunners(on_event=seen.append) as runners:
            with pytest.raises(BadModelFile):
                await runners.start(spec(tmp_path, b"PK\x03\x04"))
            assert runners.state("tiny") is None
            with pytest.raises(RunnerFailed, match="no runner 'tiny'"):
                await runners.stop("tiny")

    run(scenario())
    assert seen == []


def test_a_model_that_llama_cpp_refuses_fails_once(tmp_path: Path) -> None:
    """A whole GGUF file without a vocabulary is refused by llama.cpp: the reason comes back, there is no second try."""
    seen: list[RunnerEvent] = []

    async def scenario() -> None:
        async with OwnRunners(log_dir=str(tmp_path / "logs"), on_event=seen.append) as runners:
            with pytest.raises(RunnerFailed, match="cannot load model 'tiny'.*error loading model"):
                await runners.start(spec(tmp_path))
            assert runners.running == {}

    run(scenario())
    assert [event.state for event in seen] == ["starting", "failed"]
    assert "error loading model" in (tmp_path / "logs/runner-tiny.log").read_text()


def test_slots_that_crash_llama_cpp_with_embeddings_are_refused(tmp_path: Path) -> None:
    """It would abort the runner at every start."""
    before = spec(tmp_path)
    root = machine(tmp_path / "root", 8 * GB)
    for parallel in (1, 2, 4, 8):
        check(msgspec.structs.replace(before, parallel=parallel), root=root)
    with pytest.raises(BadOptions, match="power of two"):
        check(msgspec.structs.replace(before, parallel=3), root=root)
    check(msgspec.structs.replace(before, parallel=3, embeddings=False), root=root)
