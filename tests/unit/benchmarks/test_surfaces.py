"""The comparison of logs, traces and health checks with nothing of it compares what it says."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from benchmarks import pieces, surfaces
from benchmarks.contenders import gateway

from llm_router.config import load
from llm_router.config.settings import Settings


def configured(tmp_path: Path, sections: dict[str, object]) -> Settings:
    (tmp_path / "r.yaml").write_text(json.dumps(sections))
    return load(str(tmp_path / "r.yaml"), {"DATA_DIR": str(tmp_path)}, {})


def test_on_is_what_a_user_gets(tmp_path: Path) -> None:
    """Every request has its lines, one in a hundred its trace, which is exported."""
    settings = configured(tmp_path, surfaces.settings_on("http://127.0.0.1:4318/v1/traces"))
    assert (settings.logs.access, settings.logs.sample_ratio, settings.logs.level) == (True, 1.0, "info")
    assert (settings.logs.compress, settings.health.enabled, settings.metrics.enabled) == (True, True, True)
    assert (settings.tracing.enabled, settings.tracing.sample_ratio) == (True, 0.01)
    assert settings.tracing.endpoint
    assert settings.tracing.recent_per_s == Settings().tracing.recent_per_s


def test_off_has_nothing_of_it_but_metrics(tmp_path: Path) -> None:
    """They were there before."""
    settings = configured(tmp_path, surfaces.settings_off())
    assert (settings.logs.access, settings.logs.level, settings.logs.metrics_interval_s) == (False, "critical", 0)
    parts = (settings.tracing, settings.health, settings.alerting, settings.profiler)
    assert not any(part.enabled for part in parts)
    assert settings.metrics.enabled


def test_lines_are_counted_in_all_files_of_a_log(tmp_path: Path) -> None:
    """Rotated and compressed ones too, and no other log's."""
    (tmp_path / "access.log").write_text("{}\n{}\n")
    (tmp_path / "access-20260131T120000Z.log").write_text("{}\n")
    with gzip.open(tmp_path / "access-20260130T120000Z.log.gz", "wb") as packed:
        packed.write(b"{}\n{}\n{}\n")
    (tmp_path / "error.log").write_text("{}\n")
    assert surfaces.count_lines(tmp_path, "access") == 6


def test_the_folder_of_logs_is_where_the_gateway_is_told_to_keep_its_data(tmp_path: Path) -> None:
    """Below the run's folder."""
    contender = gateway(1, tmp_path, name=surfaces.ON)
    assert surfaces.log_folder(contender) == tmp_path / "gateway-logs-and-traces" / "data" / "logs"


def test_lines_that_are_offered_are_written() -> None:
    """And none is dropped at a rate that any machine can do."""
    found = pieces.written(2000, 0.5)
    assert (found.dropped, found.written) == (0, found.lines)
    assert 500 < found.lines <= 1000
    assert found.bytes_each > 500
