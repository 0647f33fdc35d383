"""OpenTelemetry's environment variables as settings of ours.

They are often set for everything on a machine, so what we cannot honour is noted and does not stop the router, as their
specification asks; an endpoint, headers or resource that cannot be understood does, because somebody means to see traces.
Not for: reading the environment (config) or checking bounds of what the configuration file says.

Source: https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/,
https://opentelemetry.io/docs/specs/otel/protocol/exporter/
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple
from urllib.parse import unquote, urlsplit

import msgspec

from llm_router.errors import ConfigError
from llm_router.observe.tracing.settings import TracingSettings

DEFAULT_ENDPOINT: Final = "http://localhost:4318/v1/traces"

_OTLP: Final = "OTEL_EXPORTER_OTLP_"
_TRACES: Final = "OTEL_EXPORTER_OTLP_TRACES_"

_SAMPLERS: Final[dict[str, float | None]] = {
    "always_on": 1.0,
    "always_off": 0.0,
    "traceidratio": None,
    "parentbased_always_on": 1.0,
    "parentbased_always_off": 0.0,
    "parentbased_traceidratio": None,
}
"""To the share that is sampled; None: OTEL_TRACES_SAMPLER_ARG says it."""

_FILES: Final = ("CERTIFICATE", "CLIENT_KEY", "CLIENT_CERTIFICATE")


class FromEnvironment(NamedTuple):
    """Settings with the environment over them, and a sentence for each variable that does not do what it says."""

    settings: TracingSettings
    notes: tuple[str, ...]


def settings_from_env(env: Mapping[str, str], settings: TracingSettings) -> FromEnvironment:
    """The settings as the OTEL_* variables change them. A variable that is empty is as if it were not set.

    Raises: ConfigError with the name of a variable whose endpoint, headers or resource cannot be understood. No message
        shows the value of a header.
    """
    given = _Given({name: env[name].strip() for name in env if name.startswith("OTEL_") and env[name].strip()})
    changes: dict[str, Any] = {}
    if given.boolean("OTEL_SDK_DISABLED"):
        changes["enabled"] = False
    _exporter(given, settings, changes)
    _resource(given, settings, changes)
    _sampler(given, changes)
    _batches(given, settings, changes)
    propagators = given.listed("OTEL_PROPAGATORS")
    if propagators and "tracecontext" not in propagators:
        given.note("OTEL_PROPAGATORS", "only tracecontext is read from callers and passed on to backends")
    return FromEnvironment(msgspec.structs.replace(settings, **changes), tuple(given.notes))


class _Given:
    """The variables that are set, and what must be said of them."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self.values = values
        self.notes: list[str] = []

    def note(self, name: str, problem: str) -> None:
        shown = self.values.get(name, "")
        self.notes.append(f"{name}={shown[:100]}: {problem}")

    def of_traces(self, word: str) -> tuple[str, str]:
        """Name and value of an exporter's variable, the one for traces first; two empty texts if neither is set."""
        for name in (_TRACES + word, _OTLP + word):
            if name in self.values:
                return name, self.values[name]
        return "", ""

    def listed(self, name: str) -> list[str]:
        return [item.strip().lower() for item in self.values.get(name, "").split(",") if item.strip()]

    def boolean(self, name: str) -> bool:
        value = self.values.get(name, "").lower()
        if value not in ("", "true", "false"):
            self.note(name, "is neither true nor false, and counts as false")
        return value == "true"

    def number(self, name: str, low: int) -> int | None:
        """A whole number that is at least `low`; None, with a note, for anything else."""
        value = self.values.get(name)
        if value is None:
            return None
        if not (value.isascii() and value.isdigit() and len(value) <= 9 and int(value) >= low):
            self.note(name, f"is no whole number from {low} on, and is ignored")
            return None
        return int(value)


def _exporter(given: _Given, settings: TracingSettings, changes: dict[str, Any]) -> None:
    name, endpoint = given.of_traces("ENDPOINT")
    if endpoint:
        changes["endpoint"] = _endpoint(name, endpoint)
    exporters = given.listed("OTEL_TRACES_EXPORTER")
    if "otlp" in exporters and not (endpoint or settings.endpoint):
        changes["endpoint"] = DEFAULT_ENDPOINT
    elif exporters and "otlp" not in exporters:
        changes["endpoint"] = ""
        if exporters != ["none"]:
            given.note("OTEL_TRACES_EXPORTER", "only otlp and none are known: nothing is exported")
    name, headers = given.of_traces("HEADERS")
    if headers:
        changes["headers"] = {key.lower(): value for key, value in _pairs(name, headers, is_secret=True).items()}
    name, protocol = given.of_traces("PROTOCOL")
    if protocol == "grpc":
        given.note(name, "gRPC is not spoken; OTLP/HTTP is sent: the endpoint must be the collector's HTTP port (4318)")
    elif protocol == "http/protobuf":
        given.note(name, "JSON is sent, to the same address: OTLP/HTTP collectors take both")
    elif protocol not in ("", "http/json"):
        given.note(name, "is unknown; http/json is sent")
    name, compression = given.of_traces("COMPRESSION")
    if compression not in ("", "gzip"):
        given.note(name, "what is sent is compressed by gzip, which every OTLP collector takes")
    for word in _FILES:
        name, _ = given.of_traces(word)
        if name:
            given.note(name, "is not read; SSL_CERT_FILE names the authorities that are trusted")


def _endpoint(name: str, value: str) -> str:
    try:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError(value)
    except ValueError:
        raise ConfigError(name, "is no URL of a collector; write one like http://localhost:4318") from None
    if name.startswith(_TRACES):
        return value
    return parts._replace(path=parts.path.rstrip("/") + "/v1/traces").geturl()


def _pairs(name: str, text: str, *, is_secret: bool = False) -> dict[str, str]:
    """`key=value,key=value`, values percent-encoded as in W3C baggage."""
    pairs: dict[str, str] = {}
    for number, part in enumerate(text.split(","), start=1):
        key, sign, value = part.partition("=")
        key = unquote(key.strip())
        if not part.strip():
            continue
        if not sign or not key:
            shown = "" if is_secret else f" ({part.strip()[:50]!r})"
            raise ConfigError(name, f"entry {number}{shown} is not key=value; write key=value,key=value")
        pairs[key] = unquote(value.strip())
    return pairs


def _resource(given: _Given, settings: TracingSettings, changes: dict[str, Any]) -> None:
    text = given.values.get("OTEL_RESOURCE_ATTRIBUTES")
    if text is not None:
        resource = _pairs("OTEL_RESOURCE_ATTRIBUTES", text)
        name = resource.pop("service.name", "")
        if name:
            changes["service_name"] = name
        changes["resource"] = {**settings.resource, **resource}
    name = given.values.get("OTEL_SERVICE_NAME", "")
    if name:
        changes["service_name"] = name


def _sampler(given: _Given, changes: dict[str, Any]) -> None:
    sampler = given.values.get("OTEL_TRACES_SAMPLER", "").lower()
    if not sampler:
        return
    if sampler not in _SAMPLERS:
        given.note("OTEL_TRACES_SAMPLER", f"is unknown and ignored; there are {', '.join(_SAMPLERS)}")
        return
    ratio = _SAMPLERS[sampler]
    changes["sample_ratio"] = _sampler_arg(given) if ratio is None else ratio
    if not sampler.startswith("parentbased_"):
        given.note("OTEL_TRACES_SAMPLER", f"a caller that decided is followed, as by parentbased_{sampler}")


def _sampler_arg(given: _Given) -> float:
    text = given.values.get("OTEL_TRACES_SAMPLER_ARG", "")
    if not text:
        return 1.0
    try:
        ratio = float(text)
    except ValueError:
        ratio = -1.0
    if 0.0 <= ratio <= 1.0:
        return ratio
    given.note("OTEL_TRACES_SAMPLER_ARG", "is no number from 0 to 1; 1 counts")
    return 1.0


def _batches(given: _Given, settings: TracingSettings, changes: dict[str, Any]) -> None:
    timeout_ms = given.number("OTEL_BSP_EXPORT_TIMEOUT", 1)
    for name in (_OTLP + "TIMEOUT", _TRACES + "TIMEOUT"):
        timeout_ms = given.number(name, 1) or timeout_ms
    if timeout_ms is not None:
        changes["timeout_s"] = timeout_ms / 1000
    queue = given.number("OTEL_BSP_MAX_QUEUE_SIZE", 1)
    batch = given.number("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", 1)
    if queue is not None or batch is not None:
        changes["queue_spans"] = queue_spans = queue or settings.queue_spans
        changes["batch"] = min(batch or settings.batch, queue_spans)
        if batch is not None and batch > queue_spans:
            given.note("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", f"more than the queue holds; {queue_spans} counts")
    if "OTEL_BSP_SCHEDULE_DELAY" in given.values:
        given.note("OTEL_BSP_SCHEDULE_DELAY", "is ignored: what waits is sent every second")
