"""Reads the configuration: file, then environment, then flags, checked as a whole.

Not for: watching the file, or turning settings into a routing table (processes/control.py).
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Mapping
from typing import Any, Final, cast
from urllib.parse import urlsplit

import msgspec

from llm_router.accounts.access import AccessSettings
from llm_router.accounts.database import read_url
from llm_router.accounts.limits import Limits
from llm_router.cache.base import CacheSettings
from llm_router.config import litellm
from llm_router.config.checks import (
    check_accounts,
    check_cache,
    check_limits,
    check_queue,
    check_routing,
    check_terms,
)
from llm_router.config.document import Document, read
from llm_router.config.presets import NEED_A_KEY, Preset, with_preset
from llm_router.config.settings import (
    SECTIONS,
    AccountsSettings,
    AlertingSettings,
    MetricsSettings,
    ModelSettings,
    MonitoringSettings,
    RoutingSettings,
    ServerSettings,
    Settings,
)
from llm_router.config.shape import Shaper, suggest
from llm_router.config.surfaces import (
    check_endpoints,
    check_health,
    check_logs,
    check_metrics,
    check_profiler,
    check_tracing,
    with_levels,
)
from llm_router.errors import ConfigError
from llm_router.gateway.front import FrontSettings
from llm_router.models.launch import RunnerSpec
from llm_router.models.registry import DEFAULT_MODEL, SUFFIX
from llm_router.observe.health.settings import HealthSettings
from llm_router.observe.logs.redact import redact
from llm_router.observe.logs.settings import LogSettings
from llm_router.observe.profiling.settings import ProfilerSettings
from llm_router.observe.tracing.environment import settings_from_env
from llm_router.observe.tracing.settings import TracingSettings
from llm_router.routing.table import BackendSpec
from llm_router.signals import OTHER

FILE_NAME: Final = "llm-router.yaml"
"""Looked for in the current folder when no path is given."""

_ENVIRONMENT: Final = {
    "HOST": "server.host",
    "PORT": "server.port",
    "METRICS_HOST": "server.metrics_host",
    "METRICS_PORT": "server.metrics_port",
    "DATA_DIR": "server.data_dir",
    "LOG_DIR": "server.log_dir",
    "ENVIRONMENT": "server.environment",
    "DATABASE_URL": "accounts.database",
    "REDIS_URL": "accounts.redis",
    "MONITORING_ENABLED": "monitoring.enabled",
    "PROMETHEUS_ENABLED": "metrics.enabled",
    "METRICS_ENDPOINT": "metrics.endpoint",
    "HEALTH_CHECK_ENABLED": "health.enabled",
    "HEALTH_ENDPOINT": "health.endpoint",
    "ALERTING_ENABLED": "alerting.enabled",
    "PROFILER_ENABLED": "profiler.enabled",
    "LOG_LEVEL": "logs.level",
}
_FLAGS: Final = {
    "host": "server.host",
    "port": "server.port",
    "metrics_host": "server.metrics_host",
    "metrics_port": "server.metrics_port",
    "workers": "server.workers",
    "drain": "server.drain",
    "data_dir": "server.data_dir",
    "log_dir": "server.log_dir",
    "insecure": "server.insecure",
}

_WORKERS_MAX: Final = 64
"""The supervisor keeps one metric segment and one socket per worker; more workers than this help nobody."""
_BACKEND_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MODEL_NAME: Final = re.compile(r"[^\s\x00-\x1f\x7f\"]{1,200}")
_PROVIDER: Final = re.compile(r"[A-Za-z0-9_-]{0,64}")
_SWITCHED: Final = ("metrics", "health", "alerting", "profiler", "tracing")
"""What `monitoring.enabled: false` turns off. Logs are the operator's, not the monitoring's."""


def load(
    path: str | None, env: Mapping[str, str], overrides: Mapping[str, Any], *, files_needed: bool = True
) -> Settings:
    """The settings of a router.

    Args:
        path: the file; None takes `llm-router.yaml` of the current folder if there is one.
        env: the process environment.
        overrides: flags of the command line, see `serve`: host, port, metrics_host, metrics_port, workers,
            drain, data_dir, log_dir, insecure. JSON can hold them, so that control reads the same again.
        files_needed: whether the model files that are named must exist; false for who is about to fetch them.

    Raises: ConfigError naming key, value and way out.
    """
    try:
        document = _document(path, env)
        settings = _Load(document, env, overrides, files_needed=files_needed).settings(
            os.path.abspath(document.name) if document.name else ""
        )
    except ConfigError as error:
        # Values are shown where they are no secrets; what looks like a key may stand there by mistake.
        raise ConfigError(redact(error.key), redact(error.problem)) from None
    return msgspec.structs.replace(settings, notes=tuple(redact(note) for note in settings.notes))


def usable_cpus() -> int:
    """CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _document(path: str | None, env: Mapping[str, str]) -> Document:
    if path is None:
        if not os.path.exists(FILE_NAME):
            return Document("", {}, {})
        path = FILE_NAME
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise ConfigError("", f"{path} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise ConfigError("", f"{path} cannot be read: {error.strerror}") from error
    return read(text, path, env)


class _Load:
    """One reading of one document: knows where each value came from, to say so when it will not do."""

    def __init__(
        self, document: Document, env: Mapping[str, str], overrides: Mapping[str, Any], *, files_needed: bool
    ) -> None:
        self._document = document
        self._env = env
        self._files_needed = files_needed
        self._origins: dict[str, str] = {}
        self._aliases: dict[str, str] = {}
        self._shaper = Shaper(SECTIONS, self.fail)
        self._notes: list[str] = []
        data = dict(document.data)
        if "model_list" in data:
            converted = litellm.convert(data, env, self.fail)
            data, self._aliases = converted.data, converted.aliases
            self._notes += converted.notes
        for name, key in _ENVIRONMENT.items():
            if env.get(name):
                self._set(data, key, env[name], f"{name} (environment)")
        for name, value in overrides.items():
            if name not in _FLAGS:
                raise ConfigError(name, f"no such override{suggest(name, _FLAGS)}")
            if value is not None:
                self._set(data, _FLAGS[name], value, f"--{name.replace('_', '-')}")
        self._data = data

    def fail(self, path: str, problem: str) -> ConfigError:
        """The error for the value at `path`, naming the variable, flag or line that it came from."""
        if path in self._origins:
            return ConfigError(self._origins[path], problem)
        for alias, original in sorted(self._aliases.items(), key=lambda pair: -len(pair[0])):
            if path == alias or path.startswith((f"{alias}.", f"{alias}[")):
                path = original
                break
        line = self._document.lines.get(path)
        if line is None or not path:
            return ConfigError(path, problem)
        return ConfigError(path, f"{problem} (line {line} of {self._document.name})")

    def settings(self, source: str) -> Settings:
        data = self._data
        known = [key for key in Settings.__struct_fields__ if key not in {"source", "notes"}]
        for key in data:
            if key not in known:
                raise self.fail(key, f"no such key{suggest(key, [*known, 'model_list'])}")
        server = self._server(data.get("server"))
        access = self._shaper.build(
            AccessSettings, data.get("access"), "access", {"bound_hosts": (server.host, server.metrics_host)}
        )
        backends = self._backends(data.get("backends"))
        models = self._models(data.get("models"), server, [backend.name for backend in backends])
        if not source and not models:
            models = self._default_models(server)
        routing = self._routing(data.get("routing"), models)
        limits = self._shaper.build(Limits, data.get("limits"), "limits")
        check_limits(limits, "limits", self.fail)
        cache = self._shaper.build(CacheSettings, data.get("cache"), "cache")
        check_cache(cache, self.fail)
        health = self._health(data.get("health"), models)
        metrics = self._shaper.build(MetricsSettings, data.get("metrics"), "metrics")
        check_metrics(metrics, self.fail)
        check_endpoints(metrics, health, self.fail)
        logs = self._shaper.build(LogSettings, with_levels(data.get("logs")), "logs")
        check_logs(logs, self.fail)
        profiler = self._shaper.build(ProfilerSettings, data.get("profiler"), "profiler")
        check_profiler(profiler, self.fail)
        accounts = self._accounts(data.get("accounts"), server)
        used = {deployment.backend for model in models for deployment in model.deployments}
        self._notes += [f"backend {backend.name!r} serves no model" for backend in backends if backend.name not in used]
        settings = Settings(
            server=server,
            access=access,
            front=self._front(data.get("front")),
            models=models,
            backends=backends,
            routing=routing,
            cache=cache,
            limits=limits,
            accounts=accounts,
            monitoring=self._shaper.build(MonitoringSettings, data.get("monitoring"), "monitoring"),
            metrics=metrics,
            health=health,
            logs=logs,
            tracing=self._tracing(data.get("tracing")),
            profiler=profiler,
            alerting=self._shaper.build(AlertingSettings, data.get("alerting"), "alerting"),
            source=source,
        )
        return msgspec.structs.replace(self._switched(settings), notes=tuple(self._notes))

    def _set(self, data: dict[str, Any], key: str, value: Any, origin: str) -> None:
        section, _, name = key.partition(".")
        inside = data.get(section)
        if inside is not None and not isinstance(inside, Mapping):
            return  # the section itself is wrong, which its own message says better
        data[section] = {**(inside or {}), name: value}
        self._origins[key] = origin

    def _server(self, raw: Any) -> ServerSettings:
        if isinstance(raw, Mapping):
            raw = dict(raw)
            if raw.get("workers") == "auto":
                raw["workers"] = min(usable_cpus(), _WORKERS_MAX)
            elif isinstance(raw.get("workers"), str) and not raw["workers"].strip().isdecimal():
                raise self.fail("server.workers", f"{raw['workers']!r} will not do: 1 to {_WORKERS_MAX}, or auto")
            # YAML 1.1 reads a bare `off` as false.
            if raw.get("metrics_port") is False or raw.get("metrics_port") == "off":
                raw["metrics_port"] = -1
        server = self._shaper.build(ServerSettings, raw, "server")
        for name, port, lowest in (("port", server.port, 0), ("metrics_port", server.metrics_port, -1)):
            if not lowest <= port <= 65535:
                off = "" if lowest == 0 else ", or off"
                raise self.fail(f"server.{name}", f"{port} is no port: choose 1 to 65535, 0 for any free one{off}")
        if server.port == server.metrics_port and server.port > 0:
            raise self.fail("server.metrics_port", f"{server.port} is the port of the API too: choose another, or off")
        if not 1 <= server.workers <= _WORKERS_MAX:
            raise self.fail("server.workers", f"{server.workers} will not do: 1 to {_WORKERS_MAX}, or auto")
        for name, host in (("host", server.host), ("metrics_host", server.metrics_host)):
            if not host or any(character.isspace() or character in "/@" for character in host):
                raise self.fail(f"server.{name}", f"{host!r} is no address or host name")
        if bool(server.tls_cert) != bool(server.tls_key):
            missing = "tls_key" if server.tls_cert else "tls_cert"
            raise self.fail(f"server.{missing}", "is missing: TLS needs certificate and key, both PEM files")
        tls = {
            name: os.path.abspath(os.path.expanduser(path)) if (path := getattr(server, name)) else ""
            for name in ("tls_cert", "tls_key")
        }
        self._check_certificate(**tls)
        data_dir = os.path.abspath(os.path.expanduser(server.data_dir))
        log_dir = os.path.abspath(os.path.expanduser(server.log_dir)) if server.log_dir else f"{data_dir}/logs"
        return msgspec.structs.replace(server, data_dir=data_dir, log_dir=log_dir, **tls)

    def _check_certificate(self, tls_cert: str, tls_key: str) -> None:
        """Fails for files that no TLS server could be started with."""
        if not tls_cert:
            return
        try:
            # Without a password OpenSSL would ask for one on the terminal.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tls_cert, tls_key, password="")
        except ssl.SSLError as error:
            problem = error.reason or "no certificate and key in PEM, or the key has a passphrase"
            raise self.fail(
                "server.tls_cert", f"{tls_cert!r} and {tls_key!r} do not make a TLS server: {problem}"
            ) from error
        except OSError as error:
            name, path = ("tls_key", tls_key) if os.path.exists(tls_cert) else ("tls_cert", tls_cert)
            raise self.fail(f"server.{name}", f"{path!r} cannot be read: {error.strerror}") from error

    def _front(self, raw: Any) -> FrontSettings:
        front = self._shaper.build(FrontSettings, raw, "front")
        for field in msgspec.structs.fields(FrontSettings):
            value = getattr(front, field.name)
            if value <= 0:
                key = field.name.removesuffix("_s").removesuffix("_bytes")
                raise self.fail(f"front.{key}", "must be more than 0")
        return front

    def _list(self, raw: Any, path: str) -> list[Any]:
        if raw is None:
            return []
        if not isinstance(raw, list):
            raise self.fail(path, "should be a list: each entry begins with a dash")
        return raw

    def _backends(self, raw: Any) -> tuple[BackendSpec, ...]:
        backends: dict[str, BackendSpec] = {}
        for index, entry in enumerate(self._list(raw, "backends")):
            path = f"backends[{index}]"
            backend = self._backend(entry, path)
            if not _BACKEND_NAME.fullmatch(backend.name) or backend.name == OTHER:
                raise self.fail(
                    f"{path}.name",
                    f"{backend.name!r} will not do: up to 64 letters, digits, dots, dashes and underscores",
                )
            if backend.name.startswith("runner-"):
                raise self.fail(
                    f"{path}.name", f"{backend.name!r} will not do: runner-... are the local models themselves"
                )
            if backend.name in backends:
                raise self.fail(f"{path}.name", f"there is another backend {backend.name!r}; names are unique")
            if backend.max_connections < 1:
                raise self.fail(f"{path}.max_connections", "must be 1 or more")
            for name, value in backend.headers.items():
                if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name) or re.search(r"[^\t -~\x80-\xff]", value):
                    raise self.fail(f"{path}.headers.{name}", "is no valid header")
            if not backend.api_key and isinstance(entry, Mapping) and "api_key" in entry:
                raise self.fail(f"{path}.api_key", "is empty; leave the key out if the backend needs none")
            if re.search(r"[^!-~]", backend.api_key):
                raise self.fail(f"{path}.api_key", "holds a space, a line end or no ASCII, which no key does")
            if re.search(r"[^!-~]|[?#]", backend.query):
                raise self.fail(f"{path}.query", "should look like name=value&other=value, percent-encoded, without ?")
            if not _PROVIDER.fullmatch(backend.provider):
                raise self.fail(f"{path}.provider", f"{backend.provider!r} will not do: a word like openai, or local")
            backends[backend.name] = msgspec.structs.replace(
                backend,
                url=self._url(backend.url, f"{path}.url"),
                tls_ca_file=self._authorities(backend.tls_ca_file, f"{path}.tls_ca_file"),
            )
        return tuple(backends.values())

    def _backend(self, entry: Any, path: str) -> BackendSpec:
        """An entry with what its preset says for the keys that it leaves out."""
        if not isinstance(entry, Mapping) or "preset" not in entry:
            return self._shaper.build(BackendSpec, entry, path)
        preset = cast("Preset", self._shaper.choice(Preset, entry["preset"], f"{path}.preset"))
        filled = with_preset(preset, {key: value for key, value in entry.items() if key != "preset"})
        if preset == "azure" and "url" not in filled:
            raise self.fail(f"{path}.url", "is missing: write the resource's address, https://NAME.openai.azure.com")
        backend = self._shaper.build(BackendSpec, filled, path)
        if preset in NEED_A_KEY and not backend.api_key and not backend.headers and "api_key" not in filled:
            self._notes.append(f"backend {backend.name!r} has no api_key, without which {preset} refuses requests")
        return backend

    def _authorities(self, file: str, path: str) -> str:
        """The absolute path of a PEM file that holds certificates; empty for none."""
        if not file:
            return ""
        file = os.path.abspath(os.path.expanduser(file))
        try:
            ssl.create_default_context(cafile=file)
        except OSError as error:  # ssl.SSLError too, which has no strerror of its own
            raise self.fail(path, f"{file!r} cannot be used: {error.strerror or error}") from error
        return file

    def _url(self, url: str, path: str) -> str:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise self.fail(path, f"is no URL: {error}") from None
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise self.fail(path, "should begin with http:// or https:// and a host, like https://api.openai.com/v1")
        if parts.username is not None or parts.password is not None:
            raise self.fail(path, "holds a password; use api_key or headers, whose values are never shown")
        if not url.isascii():
            raise self.fail(path, "should be ASCII; write other characters percent-encoded, host names as xn--...")
        if parts.query or parts.fragment:
            raise self.fail(path, "should end with its path, without ? and #")
        if port == 0:
            raise self.fail(path, "0 is no port to connect to")
        if not parts.path.strip("/"):
            self._notes.append(f"{path} has no path; most servers want /v1 at the end")
        return url.rstrip("/")

    def _models(self, raw: Any, server: ServerSettings, backends: list[str]) -> tuple[ModelSettings, ...]:
        models: dict[str, ModelSettings] = {}
        for index, entry in enumerate(self._list(raw, "models")):
            path = f"models[{index}]"
            model = self._model(entry, path, server)
            if model.name in models:
                raise self.fail(
                    f"{path}.name", f"there is another model {model.name!r}; give one model several deployments instead"
                )
            for number, deployment in enumerate(model.deployments):
                at = f"{path}.deployments[{number}]"
                if deployment.backend not in backends:
                    raise self.fail(
                        f"{at}.backend",
                        f"no backend {deployment.backend!r} is configured{suggest(deployment.backend, backends)}",
                    )
                check_terms(deployment.quality, deployment.price, deployment.context_tokens, at, self.fail)
            check_terms(model.quality, model.price, model.context_tokens, path, self.fail)
            check_queue(model.queue, f"{path}.queue", self.fail)
            check_limits(model.limits, f"{path}.limits", self.fail)
            models[model.name] = model
        self._members(models)
        for index, model in enumerate(models.values()):
            for number, fallback in enumerate(model.fallbacks):
                path = f"models[{index}].fallbacks[{number}]"
                if fallback == model.name:
                    raise self.fail(path, "a model cannot be its own fallback")
                if fallback not in models:
                    raise self.fail(path, f"no model {fallback!r} is configured{suggest(fallback, models)}")
        return tuple(models.values())

    def _members(self, models: dict[str, ModelSettings]) -> None:
        """Fails for members that do not exist, and for models that are their own members."""
        for index, model in enumerate(models.values()):
            path = f"models[{index}].members"
            if model.members == "all":
                if all(other.members for other in models.values()):
                    self._notes.append(f"model {model.name!r} has no members until a model is loaded")
                continue
            for number, member in enumerate(model.members):
                if member not in models:
                    raise self.fail(f"{path}[{number}]", f"no model {member!r} is configured{suggest(member, models)}")
            chain = _cycle(model.name, models)
            if chain:
                raise self.fail(path, f"model {model.name!r} would be its own member: {' has '.join(chain)}")

    def _model(self, entry: Any, path: str, server: ServerSettings) -> ModelSettings:
        if not isinstance(entry, Mapping):
            raise self.fail(path, "should hold keys like `name:`")
        entry = dict(entry)
        runner_data = entry.pop("runner", None)
        deployments = entry.get("deployments")
        if isinstance(deployments, list):
            # `model` may be left out: the backend knows it by the name that callers use.
            entry["deployments"] = [
                {"model": entry.get("name"), **deployment} if isinstance(deployment, Mapping) else deployment
                for deployment in deployments
            ]
        model = self._shaper.build(ModelSettings, entry, path)
        if not _MODEL_NAME.fullmatch(model.name) or model.name == OTHER:
            raise self.fail(f"{path}.name", f"{model.name!r} will not do: up to 200 characters, no spaces or quotes")
        if not model.file:
            if not model.deployments and not model.members:
                raise self.fail(
                    path,
                    f"model {model.name!r} needs a `file` to run here, `deployments` on backends, or other models as "
                    "`members`",
                )
            for key in ("quality", "price", "context", "capabilities"):
                if key in entry and not model.deployments:
                    raise self.fail(f"{path}.{key}", "stands where the members are: they have their own")
            for key in ("runner", "load"):
                if key in entry or (key == "runner" and runner_data is not None):
                    raise self.fail(f"{path}.{key}", "means something only together with `file`")
            return model
        file = self._file(model.file, server)
        if self._files_needed and not os.path.isfile(file):
            raise self.fail(
                f"{path}.file",
                f"there is no file {file}; fetch one with `llm-router models pull`, or leave the model out",
            )
        runner = self._shaper.build(RunnerSpec, runner_data, f"{path}.runner", {"name": model.name, "path": file})
        return msgspec.structs.replace(model, file=file, runner=runner)

    def _file(self, file: str, server: ServerSettings) -> str:
        """A plain name lies in the models folder; a path begins where the configuration file is."""
        if "/" not in file:
            return os.path.join(server.models_dir, file if file.endswith(SUFFIX) else file + SUFFIX)
        folder = os.path.dirname(os.path.abspath(self._document.name))
        return os.path.normpath(os.path.join(folder, os.path.expanduser(file)))

    def _default_models(self, server: ServerSettings) -> tuple[ModelSettings, ...]:
        file = os.path.join(server.models_dir, DEFAULT_MODEL + SUFFIX)
        if not os.path.isfile(file):
            self._notes.append(
                f"no {FILE_NAME} and no default model: nothing is served until a model is loaded "
                f"(llm-router models pull {DEFAULT_MODEL}, then llm-router models load {DEFAULT_MODEL})"
            )
            return ()
        return (ModelSettings(name=DEFAULT_MODEL, file=file, runner=RunnerSpec(name=DEFAULT_MODEL, path=file)),)

    def _routing(self, raw: Any, models: tuple[ModelSettings, ...]) -> RoutingSettings:
        routing = self._shaper.build(RoutingSettings, raw, "routing")
        names = [model.name for model in models]
        if routing.default_model and routing.default_model not in names:
            wanted = routing.default_model
            raise self.fail("routing.default_model", f"no model {wanted!r} is configured{suggest(wanted, names)}")
        check_routing(routing, self.fail)
        for index, model in enumerate(models):
            if model.strategy == "custom" and not routing.custom:
                raise self.fail(
                    f"models[{index}].strategy", "custom needs routing.custom, which says where the function is"
                )
        if not routing.default_model and names:
            routing = msgspec.structs.replace(routing, default_model=names[0])
        return routing

    def _accounts(self, raw: Any, server: ServerSettings) -> AccountsSettings:
        accounts = self._shaper.build(AccountsSettings, raw, "accounts")
        if not accounts.database:
            accounts = msgspec.structs.replace(accounts, database=f"sqlite:///{server.data_dir}/accounts.db")
        check_accounts(accounts, self.fail)
        if accounts.database.startswith("sqlite:"):  # absolute, whatever the current folder is later
            accounts = msgspec.structs.replace(accounts, database=str(read_url(accounts.database)))
        if server.insecure and accounts.require_key == "always":
            raise self.fail("server.insecure", "contradicts accounts.require_key: always; leave one of the two out")
        return accounts

    def _health(self, raw: Any, models: tuple[ModelSettings, ...]) -> HealthSettings:
        health = self._shaper.build(HealthSettings, raw, "health")
        if health.disk_path:
            path = os.path.abspath(os.path.expanduser(health.disk_path))
            health = msgspec.structs.replace(health, disk_path=path)
        check_health(health, [model.name for model in models], self.fail)
        return health

    def _tracing(self, raw: Any) -> TracingSettings:
        """The file's, with what OpenTelemetry's variables say over it."""
        tracing = self._shaper.build(TracingSettings, raw, "tracing")
        check_tracing(tracing, self.fail)
        found = settings_from_env(self._env, tracing)
        self._notes += found.notes
        endpoint = found.settings.endpoint
        if endpoint and endpoint == tracing.endpoint and not urlsplit(endpoint).path.strip("/"):
            self._notes.append("tracing.endpoint has no path; most collectors want /v1/traces at the end")
        return found.settings

    def _switched(self, settings: Settings) -> Settings:
        """The settings as they are, or without what the one switch for all of the monitoring turns off."""
        if settings.monitoring.enabled:
            return settings
        for name in _SWITCHED:
            section = self._data.get(name)
            if isinstance(section, Mapping) and "enabled" in section and getattr(settings, name).enabled:
                self._notes.append(f"{name} is off although it is enabled: monitoring.enabled is false")
        off = {name: msgspec.structs.replace(getattr(settings, name), enabled=False) for name in _SWITCHED}
        return msgspec.structs.replace(settings, **off)


def _cycle(name: str, models: Mapping[str, ModelSettings]) -> list[str]:
    """How a model comes to have itself as a member; empty if it does not."""
    ways = [[name]]
    seen: set[str] = set()
    while ways:
        way = ways.pop()
        members = models[way[-1]].members
        for member in () if members == "all" else members:
            if member == name:
                return [*way, name]
            if member in models and member not in seen:
                seen.add(member)
                ways.append([*way, member])
    return []
