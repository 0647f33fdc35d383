"""What control exports: levels, zeros, counts of series, and what a scrape costs."""

from __future__ import annotations

import gc
import os
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from llm_router import families
from llm_router.observe.metrics.slots import Segment, Writer
from llm_router.processes.measure import Levels, LoadedModel, Measurements
from llm_router.signals import Reading


class Stage:
    """Measurements over two workers' segments and levels of the test's choosing."""

    def __init__(self) -> None:
        self.own = Segment.private("control")
        self.workers = [Segment.private(f"worker-{number}") for number in range(2)]
        self.writers = [Writer(segment, families.FAMILIES) for segment in self.workers]
        self.levels = Levels(
            version="1.2.3",
            pids={"control": os.getpid(), "gone": 2**22 + 1},
            workers={"worker-0": True, "worker-1": False},
            backends={"far": True},
            models=(LoadedModel("tiny", "gguf", "small", os.getpid()), LoadedModel("big", "remote", "remote")),
            circuits={"far": 2},
            reload_succeeded=False,
            reload_time=1700000000.0,
            accounts=(Reading(families.ACTIVE_USERS, ("5m",), 3.0),),
        )
        self.measurements = self.make()

    def make(self) -> Measurements:
        return Measurements(self.own, self.workers, lambda: self.levels, guide_names=True, disks=["/"])


def samples(text: bytes) -> dict[tuple[str, tuple[str, ...]], float]:
    return {
        (sample.name.removeprefix("llm_router_"), tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_levels_show_as_they_are() -> None:
    """Zeros of every kind of model, who is up, what memory a model takes; what is gone is not there."""
    found = samples(Stage().measurements.render(openmetrics=False))
    assert found["build_info", ("1.2.3",)] == 1
    assert found["config_last_reload_successful", ()] == 0
    assert found["config_last_reload_timestamp_seconds", ()] == 1700000000
    assert {labels: value for (name, labels), value in found.items() if name == "models_loaded"} == {
        ("gguf", "small"): 1,
        ("gguf", "medium"): 0,
        ("gguf", "large"): 0,
        ("gguf", "xlarge"): 0,
        ("remote", "remote"): 1,
    }
    assert (found["worker_up", ("worker-0",)], found["worker_up", ("worker-1",)]) == (1, 0)
    assert found["backend_up", ("far",)] == 1
    assert found["model_memory_bytes", ("tiny", "gguf")] > 1e6
    assert ("model_memory_bytes", ("big", "remote")) not in found
    assert found["process_resident_memory_bytes", ("control",)] > 1e6
    assert ("process_resident_memory_bytes", ("gone",)) not in found
    assert 0 < found["system_disk_usage_ratio", ("/",)] < 1


def test_series_counts_what_is_exported() -> None:
    """For each family as many as there are lines, of itself too."""
    text = Stage().measurements.render(openmetrics=False)
    found = samples(text)
    lines = [line for line in text.decode().splitlines() if line.startswith("llm_router_models_loaded{")]
    assert found["series", ("llm_router_models_loaded",)] == len(lines) == 5
    counted = [labels for (name, labels) in found if name == "series"]
    assert found["series", ("llm_router_series",)] == len(counted)


def test_counts_of_all_processes_are_summed_and_survive_control() -> None:
    """Control's own go on where a predecessor left them."""
    stage = Stage()
    for writer in stage.writers:
        writer.counter(families.INFERENCE, "tiny", "round-robin", "success", "false").inc(3)
    stage.measurements.loaded("tiny", "gguf", 2.5)
    stage.measurements.error("model_load")
    stage.measurements.late(0.002)
    again = stage.make()
    again.error("model_load")
    collected = again.collect()
    assert collected.value(families.INFERENCE, "tiny", "round-robin", "success", "false") == 6
    assert collected.value(families.MODEL_LOAD_DURATION, "tiny", "gguf") == 1
    assert collected.value(families.ERRORS, "model_load", "runner", "error") == 2
    assert collected.value(families.EVENT_LOOP_LAG, "control") == 1


def test_a_scrape_counts_itself() -> None:
    """In the next one."""
    stage = Stage()
    stage.measurements.render(openmetrics=True)
    stage.measurements.render_json()
    assert stage.measurements.collect().value(families.SCRAPE_DURATION) == 2


def test_collections_are_counted_by_generation() -> None:
    """Each with its time, once it is flushed."""
    measurements = Stage().measurements
    measurements.collections.start()
    try:
        gc.collect(1)
        gc.collect(2)
    finally:
        measurements.collections.stop()
    collected = measurements.collect()
    assert (collected.value(families.GC_DURATION, "control", "2") or 0) >= 1
    row = collected.row(families.GC_DURATION, "control", "1")
    assert row is not None and row.values[-1] > 0


@pytest.mark.parametrize("openmetrics", [False, True])
def test_five_thousand_series_in_ten_milliseconds(openmetrics: bool) -> None:
    """Of CPU time, the best of several scrapes, so that a busy machine does not fail it."""
    stage = Stage()
    for writer in stage.writers:
        for number in range(125):
            model = f"model-{number}"
            for status in families.INFERENCE_STATUSES:
                writer.counter(families.INFERENCE, model, "round-robin", status, "false").inc()
            writer.histogram(families.INFERENCE_DURATION, model, "round-robin").observe(0.2)
            writer.histogram(families.TOKENS_PER_SECOND_FAMILY, model).observe(30.0)
    stage.measurements.render(openmetrics=openmetrics)
    best_s, text = 1.0, b""
    for _ in range(20):
        begin = time.process_time()
        text = stage.measurements.render(openmetrics=openmetrics)
        best_s = min(best_s, time.process_time() - begin)
    lines = sum(not line.startswith("#") for line in text.decode().splitlines())
    print(f"{lines} series in {best_s * 1000:.2f} ms")
    assert lines > 4900
    assert best_s < 0.010
