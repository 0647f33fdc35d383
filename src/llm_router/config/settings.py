"""The settings tree: one frozen struct per section of `llm-router.yaml`, put together from what the packages own.

A field's name ends in its unit (`drain_s`, `max_body_bytes`); its key does not (`drain: 30s`), see shape.py.
Every key is described in docs/reference/configuration.md; a test compares the two.
Not for: reading (load.py) or doing anything.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from llm_router.accounts.access import AccessSettings
from llm_router.accounts.limits import Limits
from llm_router.cache.base import CacheSettings
from llm_router.config.presets import Preset
from llm_router.config.shape import Section
from llm_router.gateway.front import FrontSettings
from llm_router.models.launch import RunnerSpec
from llm_router.models.prices import Price
from llm_router.observe.health.settings import HealthSettings
from llm_router.observe.logs.settings import LogSettings
from llm_router.observe.profiling.settings import ProfilerSettings
from llm_router.observe.tracing.settings import TracingSettings
from llm_router.routing.table import (
    BackendSpec,
    BreakerSpec,
    Capability,
    Deployment,
    QueueSpec,
    RetrySpec,
    Strategy,
)

_DAY_S: Final = 86_400.0


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Addresses, processes and folders.

    Args:
        host, port: where the API listens; port 0 takes any free one.
        metrics_host, metrics_port: where control listens for Prometheus; -1 (`off`) for nowhere.
        workers: processes of the data plane.
        drain_s: seconds that requests in flight may take to finish at a stop.
        data_dir, log_dir: absolute paths.
        insecure: whether other machines may use the router without a key.
        tls_cert, tls_key: absolute paths of PEM files; the API then speaks https. Both or neither.
        environment: a word of the operator's own for what this router is used for; shown by `/health`.
    """

    host: str = "127.0.0.1"
    port: int = 3006
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 9090
    workers: int = 1
    drain_s: float = 30.0
    data_dir: str = "~/.local/state/llm-router"
    log_dir: str = ""
    insecure: bool = False
    tls_cert: str = ""
    tls_key: str = ""
    environment: str = "production"

    @property
    def scheme(self) -> str:
        """`https` if the API has a certificate, else `http`."""
        return "https" if self.tls_cert else "http"

    @property
    def models_dir(self) -> str:
        """The folder of model files: the only one that the API can load from."""
        return f"{self.data_dir}/models"

    @property
    def control_socket(self) -> str:
        """The socket on which the command line talks to a running router."""
        return f"{self.data_dir}/control.sock"


class QueueSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a model's queue has differently from `routing.queue`; None: as there."""

    slots: int | None = None
    max_waiting: int | None = None
    wait_s: float | None = None

    def over(self, base: QueueSpec) -> QueueSpec:
        """`base` with what is different here."""
        different = {name: value for name in self.__struct_fields__ if (value := getattr(self, name)) is not None}
        return msgspec.structs.replace(base, **different)


class ModelSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Something that callers can ask for by name.

    Args:
        file: absolute path of a GGUF file to run here; empty if it is served by backends only.
        load: whether its runner is started with the router.
        runner: how it is run; None exactly when `file` is empty.
        deployments: backends that serve it, and the name they know it by.
        members: names of models whose deployments are this one's too; `all` for every model that has no members.
        fallbacks: names of other models, tried in order when this one fails.
        strategy: overrides `routing.strategy` for this model.
        quality, price, context_tokens, capabilities: of every deployment that does not say otherwise, see
            `routing.table.Deployment`. Not of members': they have their own.
        queue, limits: of requests for this name; members' count only for requests for the members.
    """

    name: str
    file: str = ""
    load: bool = True
    runner: RunnerSpec | None = None
    deployments: tuple[Deployment, ...] = ()
    members: Literal["all"] | tuple[str, ...] = ()
    fallbacks: tuple[str, ...] = ()
    strategy: Strategy | None = None
    quality: float | None = None
    price: Price | None = None
    context_tokens: int = 0
    capabilities: tuple[Capability, ...] | None = None
    queue: QueueSettings = QueueSettings()
    limits: Limits = Limits()


class RoutingSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How requests find their backend, see `routing.table.RoutingTable`.

    Args:
        default_model: answers requests that name none; empty: the first model.
        queue: of every model that does not say otherwise.
    """

    strategy: Strategy = "balanced"
    custom: str = ""
    default_model: str = ""
    deadline_s: float = 0.0
    max_waiting: int = 1000
    shed_lag_s: float = 1.0
    retry: RetrySpec = RetrySpec()
    breaker: BreakerSpec = BreakerSpec()
    queue: QueueSpec = QueueSpec()


class AccountsSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Where keys and usage are kept, and who needs a key.

    Args:
        database: URL of the store, `sqlite:////absolute/path` or `postgresql://…`; may hold a password.
        redis: URL of a Redis or Valkey that counts limits for several routers; empty: this router counts alone.
        usage_retention_s: how long usage rows are kept; 0 for ever. The default lets a month be compared with the
            same one of last year.
        require_key: `auto` asks for keys as soon as there are any, or other machines can reach the router.
    """

    database: str = ""
    redis: str = ""
    usage_retention_s: float = 400 * _DAY_S
    require_key: Literal["auto", "always"] = "auto"

    def __repr__(self) -> str:
        shared = ", redis=…" if self.redis else ""
        return f"AccountsSettings({self.database.partition(':')[0] or 'no database'}, {self.require_key}{shared})"


class MonitoringSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Off, `load` gives settings in which metrics, health, alerting, profiler and tracing are off; logs go on."""

    enabled: bool = True


class MetricsSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What is counted, and exported where.

    Args:
        enabled: off, nothing is counted and there is no such route.
        guide_names: adds the unprefixed names of the monitoring guide.
        sample: route template to n: of its requests, histograms observe one in n; counters stay exact.
    """

    enabled: bool = True
    endpoint: str = "/metrics"
    guide_names: bool = True
    sample: dict[str, int] = {}


class AlertingSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Whether rules are evaluated."""

    enabled: bool = True


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that can be configured. All names that are referred to exist.

    Args:
        limits: of all callers together.
        source: absolute path of the file that was read; empty if there was none.
        notes: what an operator should know although nothing is wrong.

    Where `monitoring` is off, so are `metrics`, `health`, `alerting`, `profiler` and `tracing`: nobody has to look at both.
    """

    server: ServerSettings = ServerSettings()
    access: AccessSettings = AccessSettings()
    front: FrontSettings = FrontSettings()
    models: tuple[ModelSettings, ...] = ()
    backends: tuple[BackendSpec, ...] = ()
    routing: RoutingSettings = RoutingSettings()
    cache: CacheSettings = CacheSettings()
    limits: Limits = Limits()
    accounts: AccountsSettings = AccountsSettings()
    monitoring: MonitoringSettings = MonitoringSettings()
    metrics: MetricsSettings = MetricsSettings()
    health: HealthSettings = HealthSettings()
    logs: LogSettings = LogSettings()
    tracing: TracingSettings = TracingSettings()
    profiler: ProfilerSettings = ProfilerSettings()
    alerting: AlertingSettings = AlertingSettings()
    source: str = ""
    notes: tuple[str, ...] = ()


SECTIONS: Final = (
    Section(Settings, internal=frozenset({"source", "notes"})),
    Section(AccessSettings, internal=frozenset({"bound_hosts"})),
    Section(Deployment, renamed={"upstream_model": "model", "context_tokens": "context"}),
    Section(ModelSettings, renamed={"context_tokens": "context"}),
    # By the size of the input, and by how long it is cached, costs only what is in the price list.
    Section(Price, internal=frozenset({"tiers", "cache_write_1h"})),
    Section(CacheSettings, renamed={"max_bytes": "max_size"}, secret=frozenset({"url"})),
    Section(AccountsSettings, secret=frozenset({"database", "redis"})),
    # `keep` is how long; both would lose their unit.
    Section(LogSettings, renamed={"keep_bytes": "keep_size"}),
    Section(TracingSettings, secret=frozenset({"endpoint", "headers"})),
    Section(RunnerSpec, internal=frozenset({"name", "path", "key"})),
    Section(
        BackendSpec,
        internal=frozenset({"local_model", "only_embeds", "ready"}),
        groups={"timeouts": ("connect_s", "first_byte_s", "gap_s", "total_s", "wait_s")},
        secret=frozenset({"api_key", "headers", "query"}),
        elsewhere={"preset": Preset},
    ),
)
