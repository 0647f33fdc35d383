"""Sections about metrics, health, logs, traces and profiles: switches, bounds, and names that must exist."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm_router.config import load
from llm_router.config.settings import Settings
from llm_router.config.surfaces import CHECKS, ROUTES
from llm_router.errors import ConfigError
from llm_router.observe.health.checks import Check, passed
from llm_router.observe.health.settings import CheckSettings, ExternalTarget, Validation
from llm_router.observe.health.state import ALIASES, STATE_CHECKS
from llm_router.processes.probes.losses import Losses
from llm_router.processes.probes.standard import Probes, Sources
from llm_router.routing.table import RoutingTable

BASE = "backends: [{name: b, url: 'http://127.0.0.1:1/v1'}]\nmodels: [{name: m, deployments: [{backend: b}]}]\n"
SWITCHES = ("metrics", "health", "alerting", "profiler", "tracing")


def read(folder: Path, text: str = "", env: dict[str, str] | None = None) -> Settings:
    (folder / "r.yaml").write_text(BASE + text)
    return load(str(folder / "r.yaml"), {"DATA_DIR": str(folder / "data"), **(env or {})}, {})


def problem(folder: Path, text: str, env: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        read(folder, text, env)
    return str(caught.value)


def switched_on(settings: Settings) -> list[str]:
    return [name for name in SWITCHES if getattr(settings, name).enabled]


def test_all_but_the_profiler_is_on_unless_somebody_says_otherwise(tmp_path: Path) -> None:
    """Profiles cost CPU: they are asked for."""
    assert switched_on(read(tmp_path)) == ["metrics", "health", "alerting", "tracing"]


def test_one_switch_turns_all_of_the_monitoring_off(tmp_path: Path) -> None:
    """Logs go on: they are the operator's. A section that says it is on is told that it is not."""
    settings = read(tmp_path, "monitoring: {enabled: false}\nprofiler: {enabled: true}\nlogs: {access: true}\n")
    assert switched_on(settings) == []
    assert settings.logs.access
    assert settings.notes == ("profiler is off although it is enabled: monitoring.enabled is false",)
    assert switched_on(read(tmp_path, "", {"MONITORING_ENABLED": "false"})) == []


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("PROMETHEUS_ENABLED", "metrics"),
        ("HEALTH_CHECK_ENABLED", "health"),
        ("ALERTING_ENABLED", "alerting"),
        ("PROFILER_ENABLED", "profiler"),
    ],
)
@pytest.mark.parametrize(
    ("word", "is_on"),
    [
        *((word, True) for word in ("true", "TRUE", "1", "yes", "on")),
        *((word, False) for word in ("false", "0", "No", "off")),
    ],
)
def test_each_part_has_a_switch_in_the_environment(
    tmp_path: Path, name: str, section: str, word: str, is_on: bool
) -> None:
    """Over the file, in any of the words people write."""
    text = f"{section}: {{enabled: {str(not is_on).lower()}}}\n"
    assert getattr(read(tmp_path, text, {name: word}), section).enabled is is_on


def test_a_switch_that_is_neither_on_nor_off_is_refused(tmp_path: Path) -> None:
    """By the name of the variable."""
    for name in ("MONITORING_ENABLED", "PROMETHEUS_ENABLED", "HEALTH_CHECK_ENABLED", "ALERTING_ENABLED"):
        assert problem(tmp_path, "", {name: "maybe"}).startswith(
            f"{name} (environment): 'maybe' will not do: write true or false"
        )


def test_a_switch_may_be_a_number_in_the_file_too(tmp_path: Path) -> None:
    """1 and 0 are what the message offers."""
    assert read(tmp_path, "profiler: {enabled: 1}\n").profiler.enabled
    assert not read(tmp_path, "metrics: {enabled: 0}\n").metrics.enabled
    assert "2 will not do" in problem(tmp_path, "metrics: {enabled: 2}\n")


@pytest.mark.parametrize("written", ["off", "'off'", "no"])
def test_the_console_can_be_off_without_quotes(tmp_path: Path, written: str) -> None:
    """Which YAML takes for false."""
    assert read(tmp_path, f"logs: {{console: {written}}}\n").logs.console == "off"


@pytest.mark.parametrize(("written", "level"), [("DEBUG", "debug"), ("Warn", "warning"), ("fatal", "critical")])
def test_levels_may_be_written_as_elsewhere(tmp_path: Path, written: str, level: str) -> None:
    """In any case, and by their names in other programs."""
    assert read(tmp_path, "", {"LOG_LEVEL": written}).logs.level == level
    levels = read(tmp_path, f"logs: {{levels: {{llm_router.gateway: {written}}}}}\n").logs.levels
    assert levels == {"llm_router.gateway": level}


def test_each_logger_that_exists_can_have_its_level(tmp_path: Path) -> None:
    """Packages, modules and processes; nothing else, as its level would never be asked for."""
    for name in ("llm_router", "llm_router.worker", "llm_router.gateway.core", "llm_router.processes.control"):
        assert read(tmp_path, f"logs: {{levels: {{{name}: error}}}}\n").logs.levels == {name: "error"}
    for name in ("root", "gateway", "llm_router.gatewai", "llm_router.", "llm_router...", "llm_routerx", "'../x'"):
        assert "there is no logger" in problem(tmp_path, f"logs: {{levels: {{{name}: error}}}}\n")


def test_everything_about_logs_can_be_said(tmp_path: Path) -> None:
    """How long and how much is kept are two keys."""
    logs = read(
        tmp_path,
        "logs: {level: error, console: json, sample_ratio: 0.1, slow: 250ms, metrics_interval: 0, max_file: 1MiB,"
        " max_age: 1h, keep: 2d, keep_size: 5MiB, compress: no, max_line: 4KiB, max_field: 1KiB}\n",
    ).logs
    assert (logs.level, logs.console, logs.sample_ratio, logs.slow_s) == ("error", "json", 0.1, 0.25)
    assert (logs.max_file_bytes, logs.max_age_s, logs.keep_s, logs.keep_bytes) == (2**20, 3600, 172_800, 5 * 2**20)
    assert (logs.metrics_interval_s, logs.compress, logs.max_line_bytes, logs.max_field_bytes) == (0, False, 4096, 1024)


def test_routes_can_be_sampled(tmp_path: Path) -> None:
    """By their templates."""
    metrics = read(tmp_path, "metrics: {sample: {/v1/embeddings: 10, '/v1/models/{id}': 2}}\n").metrics
    assert metrics.sample == {"/v1/embeddings": 10, "/v1/models/{id}": 2}


def test_the_routes_that_can_be_sampled_are_those_that_are_served() -> None:
    """As the gateway's source names them."""
    source = Path(__file__).parents[3] / "src" / "llm_router" / "gateway"
    text = "".join((source / name).read_text(encoding="utf-8") for name in ("core.py", "replies.py"))
    assert [route for route in ROUTES if f'"{route}"' not in text] == []
    started = text[text.index("self._routes: dict") :]
    table = started[: started.index("        }\n")]
    own = {line.split(":")[0].strip().strip('"') for line in table.splitlines()[1:]}
    assert own - {"MESSAGES", "COUNT_TOKENS"} <= set(ROUTES)


def test_health_checks_can_be_told_what_to_do(tmp_path: Path) -> None:
    """Further services, prompts with expectations, and what single checks have differently."""
    health = read(
        tmp_path,
        f"""
health:
  interval: 10s
  disk_path: {tmp_path}
  process_memory: 2GiB
  external:
    - {{name: db, target: "tcp://db.example.org:5432", critical: true}}
    - {{name: web, target: "https://example.org/health?full=1"}}
  validate:
    - {{name: sums, model: m, prompt: "1+1=", expect: "\\\\b2\\\\b", interval: 1h}}
  checks:
    cpu_usage: {{enabled: false}}
    external_db: {{critical: false, timeout: 1s}}
    model_sums: {{interval: 2h}}
    backends: {{critical: true}}
    database:
""",
    ).health
    assert (health.interval_s, health.disk_path, health.process_memory_bytes) == (10, str(tmp_path), 2**31)
    assert health.external == (
        ExternalTarget(name="db", target="tcp://db.example.org:5432", critical=True),
        ExternalTarget(name="web", target="https://example.org/health?full=1"),
    )
    assert health.validate == (Validation(name="sums", model="m", prompt="1+1=", expect=r"\b2\b", interval_s=3600),)
    assert health.checks == {
        "cpu_usage": CheckSettings(enabled=False),
        "external_db": CheckSettings(critical=False, timeout_s=1),
        "model_sums": CheckSettings(interval_s=7200),
        "backends": CheckSettings(critical=True),
        "database": CheckSettings(),
    }


def test_the_checks_that_can_be_configured_are_those_there_are(tmp_path: Path) -> None:
    """As they are registered when there is something for each of them to look at."""
    names: list[str] = []

    async def look() -> Check:
        return passed("looked at")

    class Names:
        def add_check(self, name: str, function: object, **options: object) -> None:
            names.append(name)

    sources = Sources(
        table=RoutingTable,
        traffic=dict,
        cache=look,
        database=object,
        logs=lambda: Losses({}),
        traces=lambda: Losses({}),
    )
    Probes(read(tmp_path).health, sources, purse_path=str(tmp_path / "purse")).register(Names())
    assert sorted([*names, *STATE_CHECKS, *ALIASES]) == sorted(CHECKS)


def test_tracing_can_be_told_what_to_keep_and_where_to_send_it(tmp_path: Path) -> None:
    """A rate is a number, not a duration."""
    tracing = read(
        tmp_path,
        "tracing: {sample_ratio: 0.5, slow: 2s, recent_per_s: 0.2, endpoint: 'https://c:4318/v1/traces',"
        " headers: {authorization: Bearer x}, timeout: 3s, resource: {team: a}, service_name: x}\n",
    ).tracing
    assert (tracing.sample_ratio, tracing.slow_s, tracing.recent_per_s, tracing.timeout_s) == (0.5, 2, 0.2, 3)
    assert (tracing.endpoint, tracing.headers) == ("https://c:4318/v1/traces", {"authorization": "Bearer x"})
    assert (tracing.resource, tracing.service_name) == ({"team": "a"}, "x")


def test_a_collector_without_a_path_is_noted(tmp_path: Path) -> None:
    """It is posted to as it is written; a base address is what the variable of OpenTelemetry takes."""
    assert read(tmp_path, "tracing: {endpoint: 'http://c:4318'}\n").notes == (
        "tracing.endpoint has no path; most collectors want /v1/traces at the end",
    )
    assert read(tmp_path, "tracing: {endpoint: 'http://c:4318/v1/traces'}\n").notes == ()
    assert read(tmp_path, "", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}).notes == ()


def test_variables_of_opentelemetry_stand_over_the_file(tmp_path: Path) -> None:
    """What they cannot do is noted, what they get wrong is an error by their name."""
    text = "tracing: {sample_ratio: 0.5, endpoint: 'http://file:1/v1/traces'}\n"
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://env:4318", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}
    settings = read(tmp_path, text, env)
    assert (settings.tracing.endpoint, settings.tracing.sample_ratio) == ("http://env:4318/v1/traces", 0.5)
    assert len(settings.notes) == 1
    assert settings.notes[0].startswith("OTEL_EXPORTER_OTLP_PROTOCOL=grpc: ")
    assert not read(tmp_path, "", {"OTEL_SDK_DISABLED": "true"}).tracing.enabled
    assert problem(tmp_path, "", {"OTEL_EXPORTER_OTLP_ENDPOINT": "env"}).startswith("OTEL_EXPORTER_OTLP_ENDPOINT: is ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("monitoring: {enabld: no}\n", "monitoring.enabld: no such key; did you mean 'enabled'?"),
        (
            "metrics: {sample: {/v1/embedding: 2}}\n",
            "metrics.sample./v1/embedding: no such route; did you mean '/v1/em",
        ),
        ("metrics: {sample: {/v1/models: 0}}\n", "metrics.sample./v1/models: 0 will not do: of that many requests one"),
        ("metrics: {sample: {/v1/models: 1.5}}\n", "1.5 will not do: it should be a whole number"),
        ("metrics: {sample: [1]}\n", "metrics.sample: should hold names and whole numbers, not a list"),
        ("metrics: {endpoint: /debug}\n", "metrics.endpoint: '/debug' would hide a part of the API"),
        ("metrics: {endpoint: /debug/x}\n", "metrics.endpoint: '/debug/x' would hide a part of the API"),
        ("health: {endpoint: /admin/keys}\n", "health.endpoint: '/admin/keys' would hide a part of the API"),
        ("health: {endpoint: /health/live}\n", "health.endpoint: '/health/live' would hide a part of the API"),
        ("logs: {level: loud}\n", "logs.level: 'loud' will not do: choose one of debug, info, warning, error, critica"),
        ("logs: {levels: {llm_router: debag}}\n", "'debag' will not do: choose one of debug, info, warning, error, c"),
        ("logs: {levels: {llm_router: debag}}\n", "did you mean 'debug'? (line 3 of "),
        ("logs: {levels: debug}\n", "logs.levels: should hold names and texts, not 'debug'"),
        ("logs: {console: color}\n", "logs.console: 'color' will not do: choose one of auto, text, json, off"),
        ("logs: {sample_ratio: 10}\n", "logs.sample_ratio: 10 will not do: 0 (none) to 1 (all)"),
        ("logs: {slow: 5}\n", "logs.slow: 5 will not do: a duration has a unit, like 30s"),
        ("logs: {metrics_interval: 10ms}\n", "logs.metrics_interval: must be 1s or more, or 0 for never"),
        ("logs: {keep: 0}\n", "logs.keep: must be more than 0"),
        ("logs: {keep_size: 0}\n", "logs.keep_size: must be more than 0"),
        ("logs: {max_age: 0}\n", "logs.max_age: must be more than 0"),
        ("logs: {queue_lines: 1}\n", "logs.queue_lines: 1 will not do: 100 to 1000000"),
        ("logs: {max_line: 10B}\n", "logs.max_line: must be 1KiB to 1MiB"),
        ("logs: {max_field: 1MiB}\n", "logs.max_field: must be 64B or more, and not more than logs.max_line"),
        ("logs: {max_file: 1KiB}\n", "logs.max_file: must not be less than logs.max_line"),
        ("tracing: {sample_ratio: -1}\n", "tracing.sample_ratio: -1 will not do: 0 (none) to 1 (all)"),
        ("tracing: {recent_per_s: 1s}\n", "tracing.recent_per_s: '1s' will not do: it should be a number"),
        ("tracing: {recent_per_s: -1}\n", "tracing.recent_per_s: -1 will not do: 0 (none) to 1000"),
        ("tracing: {max_traces: 0}\n", "tracing.max_traces: 0 will not do: 1 to 100000"),
        ("tracing: {batch: 0}\n", "tracing.batch: 0 will not do: 1 to 10000"),
        ("tracing: {queue_spans: 1}\n", "tracing.queue_spans: 1 will not do: at least tracing.batch"),
        ("tracing: {timeout: 0}\n", "tracing.timeout: must be more than 0"),
        ("tracing: {service_name: ''}\n", "tracing.service_name: is empty"),
        ("tracing: {endpoint: 'c:4317'}\n", "tracing.endpoint: is no address of such a service: write http://"),
        ("tracing: {endpoint: 'http://u:hunter2@c/'}\n", "tracing.endpoint: holds a password, which would be shown"),
        ("tracing: {endpoint: 'http://c:x'}\n", "tracing.endpoint: is no URL"),
        ("tracing: {headers: {'a b': x}}\n", "tracing.headers.a b: is no valid header"),
        ("profiler: {rate_hz: 0}\n", "profiler.rate_hz: 0 will not do: 1 to 1000"),
        ("profiler: {continuous_hz: 100}\n", "profiler.continuous_hz: 100 will not do: 0 (none) to 50"),
        ("profiler: {continuous: 1s}\n", "profiler.continuous: must be 1m to 1d"),
        ("health: {cpu_percent: 101}\n", "health.cpu_percent: 101 will not do: more than 0, at most 100"),
        ("health: {disk_percent: 0}\n", "health.disk_percent: 0 will not do: more than 0, at most 100"),
        ("health: {interval: 0}\n", "health.interval: must be more than 0"),
        ("health: {process_memory: 4}\n", "health.process_memory: 4 will not do: a size has a unit"),
        ("health: {rise: 0}\n", "health.rise: 0 will not do: 1 to 100"),
        ("health: {paid_probe_daily_usd: -1}\n", "health.paid_probe_daily_usd: must be US dollars a day, or 0"),
        ("health: {disk_path: /no/such}\n", "health.disk_path: there is no '/no/such'"),
        ("health: {checks: {cpu: {}}}\n", "health.checks.cpu: there is no check 'cpu'"),
        ("health: {checks: {cpu_usag: {}}}\n", "there is no check 'cpu_usag'; did you mean 'cpu_usage'?"),
        ("health: {checks: {disk_usage: {}, disk_space: {}}}\n", "disk_space: is another name of disk_usage, which is"),
        ("health: {checks: {cpu_usag: {}}}\n", "; there are router_initialized, models_available, models,"),
        ("health: {checks: {cpu_usage: {timeout: 0}}}\n", "health.checks.cpu_usage.timeout: must be more than 0"),
        (
            "health: {checks: {cpu_usage: {timeout: 1s}}}\n",
            "checks.cpu_usage.timeout: cpu_usage is known at any moment",
        ),
        ("health: {checks: {disk_space: {interval: 1s}}}\n", "disk_space.interval: disk_space is known at any moment"),
        ("health: {checks: {cpu_usage: {of: 1}}}\n", "health.checks.cpu_usage.of: no such key"),
        ("health: {checks: {cpu_usage: 1}}\n", "health.checks.cpu_usage: should hold keys, not 1"),
        ("health: {checks: 1}\n", "health.checks: should hold names, each with keys below it, not 1"),
        ("health: {external: [{name: a}]}\n", "health.external[0].target: is missing"),
        ("health: {external: [{name: 'a b', target: x}]}\n", "health.external[0].name: 'a b' will not do"),
        ("health: {external: [{name: a, target: x}]}\n", "health.external[0].target: is no address of such a service"),
        ("health: {external: [{name: a, target: 'ftp://h:1'}]}\n", "write tcp://host:port, tls://host:port or https:"),
        ("health: {external: [{name: a, target: 'tcp://h'}]}\n", "health.external[0].target: needs a port"),
        ("health: {external: [{name: a, target: 'tcp://h:1/x'}]}\n", "health.external[0].target: should end with its"),
        ("health: {external: [{name: a, target: 'http://h/#x'}]}\n", "should end before the #"),
        (
            "health: {external: [{name: a, target: 'tcp://h:1'}, {name: a, target: 'tcp://h:2'}]}\n",
            "health.external[1].name: there is another 'a'",
        ),
        ("health: {validate: [{name: v, model: mm, prompt: p}]}\n", "health.validate[0].model: no model 'mm' is confi"),
        ("health: {validate: [{name: v, model: m, prompt: ' '}]}\n", "health.validate[0].prompt: is empty"),
        (
            "health: {validate: [{name: v, model: m, prompt: p, expect: '('}]}\n",
            "health.validate[0].expect: '(' is no regular expression: missing ), unterminated subpattern at character",
        ),
        ("health: {validate: [{name: v, model: m, prompt: p, max_tokens: 0}]}\n", "max_tokens: must be 1 or more"),
        ("health: {validate: [{name: v, model: m, prompt: p, interval: 0}]}\n", "interval: must be more than 0"),
    ],
)
def test_what_will_not_do_is_named_with_its_way_out(tmp_path: Path, text: str, message: str) -> None:
    """Key path, value and what to write."""
    found = problem(tmp_path, text)
    assert message in found
    assert "hunter2" not in found


def test_secrets_of_the_collector_are_not_shown(tmp_path: Path) -> None:
    """Neither by errors nor by the settings."""
    secret = "hunter2"
    for text in (
        f"tracing: {{headers: {{authorization: [{secret}]}}}}\n",
        f"tracing: {{headers: {secret}}}\n",
        f"tracing: {{endpoint: 'ftp://{secret}'}}\n",
    ):
        assert secret not in problem(tmp_path, text)
    settings = read(tmp_path, f"tracing: {{headers: {{authorization: Bearer {secret}}}}}\n")
    assert secret not in repr(settings)


def test_sections_without_content_are_the_defaults(tmp_path: Path) -> None:
    """`logs:` with everything commented out below it."""
    sections: dict[str, Any] = dict.fromkeys(("logs", "tracing", "profiler", "alerting", "monitoring", "health"))
    settings = read(tmp_path, "".join(f"{name}:\n" for name in sections))
    assert all(getattr(settings, name) == getattr(Settings(), name) for name in sections)


def test_all_sections_may_stand_beside_a_model_list(tmp_path: Path) -> None:
    """Where LiteLLM's file has nothing like them."""
    (tmp_path / "r.yaml").write_text(
        "model_list: [{model_name: m, litellm_params: {model: openai/gpt-4o, api_key: k}}]\n"
        "monitoring: {enabled: true}\nlogs: {level: error}\ntracing: {sample_ratio: 0}\nprofiler: {enabled: true}\n"
        "alerting: {enabled: false}\nhealth: {validate: [{name: v, model: m, prompt: p}]}\n"
    )
    settings = load(str(tmp_path / "r.yaml"), {"DATA_DIR": str(tmp_path)}, {})
    assert (settings.logs.level, settings.tracing.sample_ratio) == ("error", 0)
    assert switched_on(settings) == ["metrics", "health", "profiler", "tracing"]
