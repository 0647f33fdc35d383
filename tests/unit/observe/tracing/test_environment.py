"""OpenTelemetry's environment variables."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_router.errors import ConfigError
from llm_router.observe.tracing.environment import DEFAULT_ENDPOINT, settings_from_env
from llm_router.observe.tracing.settings import TracingSettings

PLAIN = TracingSettings()


def changed(settings: TracingSettings = PLAIN, **env: str) -> dict[str, object]:
    """What the variables change, when nothing must be said of them."""
    found, notes = settings_from_env(env, settings)
    assert notes == ()
    before, after = msgspec.structs.asdict(settings), msgspec.structs.asdict(found)
    return {key: value for key, value in after.items() if value != before[key]}


def noted(name: str, **env: str) -> str:
    """The one note, which is about `name`."""
    (note,) = settings_from_env(env, PLAIN).notes
    assert note.startswith(f"{name}=")
    return note


def test_nothing_set_changes_nothing() -> None:
    assert changed(PATH="/bin", OTEL_EXPORTER_OTLP_ENDPOINT=" ", OTEL_SDK_DISABLED="") == {}


@pytest.mark.parametrize(
    ("base", "whole"),
    [
        ("http://c:4318", "http://c:4318/v1/traces"),
        ("http://c:4318/", "http://c:4318/v1/traces"),
        ("https://c/otlp", "https://c/otlp/v1/traces"),
        ("https://c/otlp/?key=1", "https://c/otlp/v1/traces?key=1"),
    ],
)
def test_the_endpoint_of_all_signals_gets_the_path_of_traces(base: str, whole: str) -> None:
    assert changed(OTEL_EXPORTER_OTLP_ENDPOINT=base) == {"endpoint": whole}


def test_what_is_set_for_traces_comes_first_and_is_taken_as_it_is() -> None:
    assert changed(
        OTEL_EXPORTER_OTLP_ENDPOINT="http://all:4318",
        OTEL_EXPORTER_OTLP_TRACES_ENDPOINT="http://traces:4318/in",
        OTEL_EXPORTER_OTLP_HEADERS="a=1",
        OTEL_EXPORTER_OTLP_TRACES_HEADERS="B=2, c=x%20y%3D",
        OTEL_EXPORTER_OTLP_TIMEOUT="1000",
        OTEL_EXPORTER_OTLP_TRACES_TIMEOUT="2500",
        OTEL_EXPORTER_OTLP_PROTOCOL="grpc",
        OTEL_EXPORTER_OTLP_TRACES_PROTOCOL="http/json",
        OTEL_EXPORTER_OTLP_COMPRESSION="gzip",
    ) == {"endpoint": "http://traces:4318/in", "headers": {"b": "2", "c": "x y="}, "timeout_s": 2.5}


def test_the_environment_goes_over_the_configuration() -> None:
    settings = TracingSettings(endpoint="http://file:4318/v1/traces", service_name="a", resource={"x": "1", "y": "2"})
    assert changed(
        settings, OTEL_TRACES_EXPORTER="none", OTEL_SERVICE_NAME="b", OTEL_RESOURCE_ATTRIBUTES="y=3,service.name=c"
    ) == {"endpoint": "", "service_name": "b", "resource": {"x": "1", "y": "3"}}
    assert changed(settings, OTEL_TRACES_EXPORTER="otlp") == {}
    assert changed(OTEL_TRACES_EXPORTER="otlp") == {"endpoint": DEFAULT_ENDPOINT}
    assert changed(OTEL_RESOURCE_ATTRIBUTES="service.name=c") == {"service_name": "c"}


@pytest.mark.parametrize(
    ("sampler", "arg", "ratio"),
    [
        ("parentbased_always_on", "", 1.0),
        ("parentbased_always_off", "0.7", 0.0),
        ("parentbased_traceidratio", "0.25", 0.25),
        ("PARENTBASED_TRACEIDRATIO", "", 1.0),
    ],
)
def test_samplers_are_shares(sampler: str, arg: str, ratio: float) -> None:
    assert changed(OTEL_TRACES_SAMPLER=sampler, OTEL_TRACES_SAMPLER_ARG=arg) == {"sample_ratio": ratio}


def test_switched_off_means_that_no_trace_begins() -> None:
    assert changed(OTEL_SDK_DISABLED="TRUE") == {"enabled": False}
    assert changed(OTEL_SDK_DISABLED="false") == {}


def test_batches_and_their_time() -> None:
    assert changed(
        OTEL_BSP_MAX_QUEUE_SIZE="100", OTEL_BSP_MAX_EXPORT_BATCH_SIZE="50", OTEL_BSP_EXPORT_TIMEOUT="3000"
    ) == {"queue_spans": 100, "batch": 50, "timeout_s": 3.0}
    assert changed(OTEL_BSP_EXPORT_TIMEOUT="3000", OTEL_EXPORTER_OTLP_TIMEOUT="1000") == {"timeout_s": 1.0}
    assert changed(OTEL_BSP_MAX_QUEUE_SIZE="100") == {"queue_spans": 100, "batch": 100}


def test_what_cannot_be_honoured_is_noted_with_its_way_out() -> None:
    assert "4318" in noted("OTEL_EXPORTER_OTLP_PROTOCOL", OTEL_EXPORTER_OTLP_PROTOCOL="grpc")
    assert "JSON" in noted("OTEL_EXPORTER_OTLP_PROTOCOL", OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf")
    assert "unknown" in noted("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", OTEL_EXPORTER_OTLP_TRACES_PROTOCOL="carrier/pigeon")
    assert "gzip" in noted("OTEL_EXPORTER_OTLP_COMPRESSION", OTEL_EXPORTER_OTLP_COMPRESSION="none")
    assert "SSL_CERT_FILE" in noted("OTEL_EXPORTER_OTLP_CERTIFICATE", OTEL_EXPORTER_OTLP_CERTIFICATE="/ca.pem")
    assert "always_on" in noted("OTEL_TRACES_SAMPLER", OTEL_TRACES_SAMPLER="jaeger_remote")
    assert "caller" in noted("OTEL_TRACES_SAMPLER", OTEL_TRACES_SAMPLER="always_on")
    assert "nothing is exported" in noted("OTEL_TRACES_EXPORTER", OTEL_TRACES_EXPORTER="zipkin")
    assert "tracecontext" in noted("OTEL_PROPAGATORS", OTEL_PROPAGATORS="b3")
    assert "second" in noted("OTEL_BSP_SCHEDULE_DELAY", OTEL_BSP_SCHEDULE_DELAY="100")
    assert "neither" in noted("OTEL_SDK_DISABLED", OTEL_SDK_DISABLED="yes")
    assert "100" in noted(
        "OTEL_BSP_MAX_EXPORT_BATCH_SIZE", OTEL_BSP_MAX_QUEUE_SIZE="100", OTEL_BSP_MAX_EXPORT_BATCH_SIZE="200"
    )
    assert changed(OTEL_PROPAGATORS="tracecontext,baggage") == {}


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "soon", "1e3", "²", "9" * 40])
def test_a_number_that_is_none_is_noted_and_ignored(value: str) -> None:
    for name in ("OTEL_EXPORTER_OTLP_TIMEOUT", "OTEL_BSP_MAX_QUEUE_SIZE"):
        found, notes = settings_from_env({name: value}, PLAIN)
        assert found == PLAIN
        assert len(notes) == 1
        assert "ignored" in notes[0]


@pytest.mark.parametrize("value", ["2", "-0.1", "nan", "inf", "half"])
def test_a_share_that_is_none_counts_as_one(value: str) -> None:
    found, notes = settings_from_env(
        {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": value}, PLAIN
    )
    assert found.sample_ratio == 1.0
    assert notes[0].startswith("OTEL_TRACES_SAMPLER_ARG=")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4318"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "ftp://c"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://c:99999"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://[::1"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "authorization Bearer s3cret"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "a=1,=s3cret"),
        ("OTEL_RESOURCE_ATTRIBUTES", "team"),
    ],
)
def test_an_endpoint_headers_or_a_resource_that_are_none_stop_the_start_by_name(name: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings_from_env({name: value}, PLAIN)
    assert caught.value.key == name
    assert "write" in caught.value.problem
    assert "s3cret" not in str(caught.value)


NAMES = [
    "OTEL_SDK_DISABLED",
    "OTEL_TRACES_EXPORTER",
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_HEADERS",
    "OTEL_EXPORTER_OTLP_TIMEOUT",
    "OTEL_EXPORTER_OTLP_PROTOCOL",
    "OTEL_RESOURCE_ATTRIBUTES",
    "OTEL_TRACES_SAMPLER",
    "OTEL_TRACES_SAMPLER_ARG",
    "OTEL_BSP_MAX_QUEUE_SIZE",
    "OTEL_BSP_MAX_EXPORT_BATCH_SIZE",
    "OTEL_PROPAGATORS",
]


@given(st.dictionaries(st.sampled_from(NAMES), st.text(max_size=30)))
def test_any_environment_gives_settings_that_work_or_names_what_is_wrong(env: dict[str, str]) -> None:
    try:
        found, _ = settings_from_env(env, PLAIN)
    except ConfigError as error:
        assert error.key in env
    else:
        assert 0.0 <= found.sample_ratio <= 1.0
        assert 1 <= found.batch <= found.queue_spans
        assert found.timeout_s > 0
