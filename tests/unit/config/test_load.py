"""Settings as a whole: precedence, and a precise message for everything that will not do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm_router.config import KeysNeeded, keys_needed, load
from llm_router.config.settings import Settings
from llm_router.errors import ConfigError
from llm_router.models.prices import Price
from llm_router.models.registry import DEFAULT_MODEL
from llm_router.routing.table import BreakerSpec, QueueSpec

BACKEND = "backends: [{name: b, url: 'http://127.0.0.1:1/v1'}]\n"
MODEL = "models: [{name: m, deployments: [{backend: b}]}]\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(folder: Path, text: str, env: dict[str, str] | None = None, **overrides: Any) -> Settings:
    (folder / "r.yaml").write_text(text)
    return load("r.yaml", {"DATA_DIR": str(folder / "data"), **(env or {})}, overrides)


def problem(folder: Path, text: str, env: dict[str, str] | None = None, **overrides: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read(folder, text, env, **overrides)
    return str(caught.value)


def put_model(folder: Path, name: str) -> str:
    path = folder / "data" / "models" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"GGUF")
    return str(path)


def test_without_a_file_the_default_model_is_served_if_it_is_there(folder: Path) -> None:
    """And a note says how to get it if it is not."""
    env = {"DATA_DIR": str(folder / "data")}
    empty = load(None, env, {})
    assert (empty.models, empty.source, empty.routing.default_model) == ((), "", "")
    assert "models pull" in empty.notes[0]
    path = put_model(folder, f"{DEFAULT_MODEL}.gguf")
    settings = load(None, env, {})
    (model,) = settings.models
    assert (model.name, model.file, settings.routing.default_model) == (DEFAULT_MODEL, path, DEFAULT_MODEL)
    assert model.runner is not None
    assert settings.notes == ()


def test_the_file_of_the_current_folder_is_found(folder: Path) -> None:
    """`llm-router.yaml`; its absolute path is kept for reloads."""
    (folder / "llm-router.yaml").write_text("server: {port: 4000}\n")
    settings = load(None, {}, {})
    assert settings.server.port == 4000
    assert settings.source == str(folder / "llm-router.yaml")


def test_environment_stands_over_the_file_and_flags_over_both(folder: Path) -> None:
    """A variable set to nothing is not set."""
    text = "server: {host: 127.0.0.2, port: 1000, metrics_port: 2000}\n"
    server = read(folder, text, {"PORT": "1001", "METRICS_PORT": "2001", "HOST": ""}, port=1002).server
    assert (server.host, server.port, server.metrics_port) == ("127.0.0.2", 1002, 2001)


def test_the_environment_has_a_name(folder: Path) -> None:
    """Production unless somebody says otherwise."""
    assert load(None, {}, {}).server.environment == "production"
    assert load(None, {"ENVIRONMENT": "staging"}, {}).server.environment == "staging"


def test_folders_become_absolute(folder: Path) -> None:
    """Logs go below the data unless said otherwise; `~` is the home folder."""
    server = load(None, {"DATA_DIR": "d"}, {}).server
    assert (server.data_dir, server.log_dir) == (str(folder / "d"), str(folder / "d" / "logs"))
    assert load(None, {"DATA_DIR": "~/x", "LOG_DIR": "l"}, {}).server.log_dir == str(folder / "l")
    assert "~" not in load(None, {}, {}).server.data_dir


def test_a_wrong_value_names_the_variable_or_flag_it_came_from(folder: Path) -> None:
    """Not a line of a file that is innocent."""
    assert problem(folder, "", {"PORT": "http"}).startswith("PORT (environment): 'http' will not do")
    assert problem(folder, "server: {drain: 5s}\n", drain="long").startswith("--drain: 'long' will not do")
    assert problem(folder, "", metrics_port="70000").startswith("--metrics-port: 70000 is no port")


def test_a_model_with_everything(folder: Path) -> None:
    """Here and on a backend, with fallbacks and a strategy of its own."""
    path = put_model(folder, "m.gguf")
    settings = read(
        folder,
        BACKEND
        + """
models:
  - {name: m, file: m.gguf, load: false, deployments: [{backend: b, model: big}], fallbacks: [n], strategy: least-loaded}
  - {name: n, deployments: [{backend: b}]}
""",
    )
    first, second = settings.models
    assert first.runner is not None
    assert (first.file, first.load, first.strategy, first.fallbacks) == (path, False, "least-loaded", ("n",))
    assert first.runner.path == path
    assert first.deployments[0].upstream_model == "big"
    assert second.deployments[0].upstream_model == "n", "left out, it is the model's own name"


def test_model_files_are_found(folder: Path) -> None:
    """A name, with or without suffix, in the models folder; a path from where the configuration file is."""
    path = put_model(folder, "m.gguf")
    (folder / "etc").mkdir()
    for written in ("m.gguf", "m", "../data/models/m.gguf", path):
        (folder / "etc" / "r.yaml").write_text(f"models: [{{name: m, file: {written}}}]\n")
        settings = load("etc/r.yaml", {"DATA_DIR": str(folder / "data")}, {})
        assert settings.models[0].file == path, written


def test_backends_have_timeouts_as_durations(folder: Path) -> None:
    """In a mapping of their own."""
    text = "backends: [{name: b, url: 'https://h/v1/', timeouts: {connect: 250ms, total: 1m30s}, tls_verify: false}]\n"
    (backend,) = read(folder, text).backends
    assert (backend.connect_s, backend.total_s, backend.tls_verify, backend.url) == (0.25, 90.0, False, "https://h/v1")


def test_presets_fill_what_is_left_out(folder: Path) -> None:
    """And what is written wins."""
    text = """
backends:
  - {name: a, preset: openai, api_key: k}
  - {name: b, preset: openrouter, api_key: k, url: "https://proxy/v1", provider: local}
  - {name: c, preset: ollama}
  - {name: d, preset: vllm, url: "http://10.0.0.1:8000/v1", stream_usage: false}
  - {name: e, preset: llama-server}
  - {name: f, preset: anthropic, api_key: k}
  - {name: g, preset: azure, url: "https://n.openai.azure.com", api_key: k}
  - {name: h, preset: azure, url: "https://n.openai.azure.com/openai/deployments/gpt", api_key: k}
"""
    assert [(b.url, b.protocol, b.auth, b.query, b.provider, b.stream_usage) for b in read(folder, text).backends] == [
        ("https://api.openai.com/v1", "openai", "bearer", "", "openai", True),
        ("https://proxy/v1", "openai", "bearer", "", "local", True),
        ("http://127.0.0.1:11434/v1", "openai", "bearer", "", "local", True),
        ("http://10.0.0.1:8000/v1", "openai", "bearer", "", "local", False),
        ("http://127.0.0.1:8080/v1", "openai", "bearer", "", "local", True),
        ("https://api.anthropic.com/v1", "anthropic", "x-api-key", "", "anthropic", True),
        ("https://n.openai.azure.com/openai/v1", "openai", "api-key", "", "azure", True),
        (
            "https://n.openai.azure.com/openai/deployments/gpt", "openai", "api-key", "api-version=2024-10-21",
            "azure", True,
        ),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("preset", "is_noted"), [("openai", True), ("openrouter", True), ("anthropic", True), ("vllm", False)]
)
def test_a_provider_without_a_key_is_noted(folder: Path, preset: str, is_noted: bool) -> None:
    """It would refuse every request."""
    text = f"backends: [{{name: b, preset: {preset}}}]\n" + MODEL
    assert any("has no api_key" in note for note in read(folder, text).notes) is is_noted


def test_a_model_has_a_price_and_bounds_of_its_own(folder: Path) -> None:
    """And so may each deployment; what a queue does not say is as in `routing.queue`."""
    settings = read(
        folder,
        BACKEND
        + """
models:
  - name: m
    deployments: [{backend: b, price: {input: 1, output: 2}, context: 4096, capabilities: []}]
    quality: 0.9
    price: {input: 2.5, output: 10, cached_input: 1.25}
    context: 128000
    capabilities: [tools, vision]
    queue: {slots: 4}
    limits: {requests_per_minute: 60, usd_per_month: 100}
routing: {queue: {max_waiting: 7, wait: 5s}}
""",
    )
    (model,) = settings.models
    assert model.price == Price(input=2.5, output=10.0, cached_input=1.25)
    assert (model.quality, model.context_tokens, model.capabilities) == (0.9, 128_000, ("tools", "vision"))
    (deployment,) = model.deployments
    assert deployment.price == Price(input=1.0, output=2.0)
    assert (deployment.context_tokens, deployment.capabilities) == (4096, ())
    assert model.queue.over(settings.routing.queue) == QueueSpec(slots=4, max_waiting=7, wait_s=5.0)
    assert (model.limits.requests_per_minute, model.limits.usd_per_month) == (60, 100.0)


def test_models_are_made_of_models(folder: Path) -> None:
    """Of those that are named, or of all."""
    text = BACKEND + MODEL.replace("}]\n", "}, {name: some, members: [m]}, {name: every, members: all}]\n")
    assert [model.members for model in read(folder, text).models] == [(), ("m",), "all"]
    alone = read(folder, "models: [{name: every, members: all}]\n")
    assert alone.notes == ("model 'every' has no members until a model is loaded",)


def test_routing_cache_and_limits_have_sections(folder: Path) -> None:
    """Below keys without units."""
    settings = read(
        folder,
        """
routing:
  strategy: custom
  custom: house.policies:choose
  deadline: 2m
  max_waiting: 50
  shed_lag: 250ms
  breaker: {window: 1m, min_attempts: 5, slow: 20s, cooldown: 2s, probes: 1}
cache: {url: "redis://h:6379/1", ttl: 10m, per_key: true}
limits: {concurrency: 100}
""",
    )
    routing = settings.routing
    assert (routing.strategy, routing.custom, routing.deadline_s) == ("custom", "house.policies:choose", 120.0)
    assert (routing.max_waiting, routing.shed_lag_s) == (50, 0.25)
    assert routing.breaker == BreakerSpec(window_s=60.0, min_attempts=5, slow_s=20.0, cooldown_s=2.0, probes=1)
    assert (settings.cache.url, settings.cache.ttl_s, settings.cache.per_key) == ("redis://h:6379/1", 600.0, True)
    assert settings.limits.concurrency == 100


def test_accounts_are_kept_beside_the_data_unless_said_otherwise(folder: Path) -> None:
    """In the file, or by the variables that many hosts set."""
    assert read(folder, "").accounts.database == f"sqlite:///{folder}/data/accounts.db"
    env = {"DATABASE_URL": "postgres://u:p@h/d", "REDIS_URL": "rediss://h:6379/0"}
    accounts = read(folder, "accounts: {database: 'sqlite:////x.db', usage_retention: 30d}\n", env).accounts
    assert (accounts.database, accounts.redis) == ("postgres://u:p@h/d", "rediss://h:6379/0")
    assert accounts.usage_retention_s == 30 * 86400.0
    assert read(folder, "accounts: {database: 'sqlite:///a.db'}\n").accounts.database == f"sqlite:///{folder}/a.db"
    assert read(folder, "accounts: {redis: 'unix:///run/redis.sock'}\n").accounts.redis == "unix:///run/redis.sock"


def test_secrets_do_not_show(folder: Path) -> None:
    """Neither in the settings nor in messages about them."""
    text = "backends: [{name: b, url: 'https://h/v1', api_key: '${KEY}', headers: {x-key: '${KEY}'}}]\n"
    settings = read(folder, text, {"KEY": "sk-very-secret"})
    assert settings.backends[0].api_key == "sk-very-secret"
    assert "sk-very-secret" not in repr(settings)
    assert "secret" not in problem(folder, "backends: [{name: b, url: '${KEY}'}]\n", {"KEY": "ftp://secret"})
    assert "sk-" not in problem(folder, "backends: [{name: b, url: 'https://h', api_key: [sk-1]}]\n")
    assert "sk-" not in problem(folder, "backends: [{name: b, url: 'https://h', api_key: 'sk-1 2'}]\n")
    assert "sk-" not in problem(folder, "server: {port: '${KEY}'}\n", {"KEY": "sk-2"})
    text = (
        "cache: {url: 'redis://:sk-3@h'}\naccounts: {database: 'postgresql://u:sk-4@h/d', redis: 'redis://:sk-5@h'}\n"
    )
    assert "sk-" not in repr(read(folder, text))
    for text in (
        "cache: {url: 'http://:sk-3@h'}\n",
        "cache: {url: [sk-3]}\n",
        "accounts: {redis: 'http://:sk-5@h'}\n",
        "accounts: {database: 'mysql://u:sk-4@h/d'}\n",
        "accounts: {database: 'postgresql://u:sk-4@h'}\n",
        "backends: [{name: b, url: 'https://h', query: 'key=sk-6 7'}]\n",
    ):
        assert "sk-" not in problem(folder, text), text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sever: {}\n", "sever: no such key; did you mean 'server'? (line 1 of r.yaml)"),
        ("server:\n  prot: 1\n", "server.prot: no such key; did you mean 'port'? (line 2 of r.yaml)"),
        ("server: [1]\n", "server: should hold keys, not a list (line 1 of r.yaml)"),
        ("server: {port: yes}\n", "server.port: True will not do: it should be a whole number (line 1 of r.yaml)"),
        ("server: {drain: 30}\n", "server.drain: 30 will not do: a duration has a unit, like 30s, 1m30s or 250ms"),
        ("server: {workers: 0}\n", "server.workers: 0 will not do: 1 to 64, or auto"),
        ("server: {port: 9090}\n", "server.metrics_port: 9090 is the port of the API too: choose another, or off"),
        ("server: {host: 'a b'}\n", "server.host: 'a b' is no address or host name"),
        ("front: {max_body: 10}\n", "front.max_body: 10 will not do: a size has a unit, like 64KiB, 10MiB or 2GB"),
        ("front: {max_headers: 0}\n", "front.max_headers: must be more than 0"),
        ("access: {bound_hosts: [a]}\n", "access.bound_hosts: no such key"),
        ("access: {allowed_hosts: a}\n", "access.allowed_hosts: should be a list, not 'a'"),
        (
            "routing: {strategy: fastest}\n",
            "routing.strategy: 'fastest' will not do: choose one of balanced, quality-first, cost-optimized",
        ),
        ("routing: {strategy: least_loaded}\n", "did you mean 'least-loaded'?"),
        ("routing: {retry: {attempts: 0}}\n", "routing.retry.attempts: 0 will not do: 1 (no retries) to 10"),
        ("routing: {retry: {budget_ratio: 2}}\n", "routing.retry.budget_ratio: 2 will not do: 0 to 1"),
        ("routing: {strategy: custom}\n", "routing.strategy: custom needs routing.custom"),
        ("routing: {custom: 'a b'}\n", "routing.custom: 'a b' will not do: package.module:function, or the name of"),
        ("routing: {max_waiting: 0}\n", "routing.max_waiting: must be 1 or more"),
        ("routing: {deadline: 30}\n", "routing.deadline: 30 will not do: a duration has a unit"),
        (
            "routing: {breaker: {error_ratio: 0}}\n",
            "routing.breaker.error_ratio: 0 will not do: more than 0, at most 1",
        ),
        (
            "routing: {breaker: {error_ratio: .nan}}\n",
            "routing.breaker.error_ratio: nan will not do: it should be a nu",
        ),
        ("routing: {breaker: {probes: 0}}\n", "routing.breaker.probes: must be 1 or more"),
        ("routing: {breaker: {window: 0s}}\n", "routing.breaker.window: must be more than 0"),
        ("routing: {breaker: {cooldown: 5m}}\n", "routing.breaker.cooldown_max: must not be less than cooldown"),
        ("routing: {queue: {slots: -1}}\n", "routing.queue.slots: must be 1 or more, or 0 to take what the backends"),
        ("routing: {queue: {wait: 0}}\n", "routing.queue.wait: must be more than 0"),
        ("limits: {requests_per_minute: -1}\n", "limits.requests_per_minute: must be more than 0, or 0 for no limit"),
        ("limits: {tokens_per_hour: 1}\n", "limits.tokens_per_hour: no such key; did you mean 'tokens_per_"),
        ("limits: {warn_ratio: 80}\n", "limits.warn_ratio: 80 will not do: more than 0, at most 1"),
        ("limits: {usd_per_day: .inf}\n", "limits.usd_per_day: inf will not do: it should be a number"),
        ("cache: {ttl: 0}\n", "cache.ttl: must be more than 0; to keep no answers, write enabled: false"),
        ("cache: {max_size: 0}\n", "cache.max_size: must be more than 0"),
        ("cache: {max_size: 1MiB, max_entry: 2MiB}\n", "cache.max_entry: must not be more than cache.max_size"),
        ("cache: {url: 'http://h'}\n", "cache.url: is no address of a Redis: write redis://host:6379/0"),
        ("accounts: {redis: 'redis://'}\n", "accounts.redis: is no address of a Redis"),
        ("accounts: {redis: 'redis://h:x'}\n", "accounts.redis: is no address of a Redis"),
        ("accounts: {database: 'accounts.db'}\n", "accounts.database: this is no URL; write sqlite:///PATH or"),
        ("accounts: {database: 'sqlite://a.db'}\n", "accounts.database: a SQLite URL has three slashes"),
        ("accounts:\n  database: postgres://h:1\n", "write postgresql://USER:PASSWORD@HOST/NAME; characters"),
        ("accounts:\n  database: postgres://h:1\n", "%2F) (line 2 of r.yaml)"),
        ("accounts: {require_key: never}\n", "accounts.require_key: 'never' will not do: choose one of auto, always"),
        ("accounts: {require_key: always}\nserver: {insecure: true}\n", "server.insecure: contradicts accounts.requi"),
        ("metrics: {endpoint: metrics}\n", "metrics.endpoint: 'metrics' is no path"),
        ("metrics: {endpoint: /v1/models}\n", "would hide a part of the API"),
        ("metrics: {endpoint: /health}\n", "health.endpoint: '/health' is the path of the metrics too"),
        ("metrics: {guide_names: maybe}\n", "metrics.guide_names: 'maybe' will not do: write true or false"),
        ("backends: {name: b}\n", "backends: should be a list"),
        ("backends: [{name: b}]\n", "backends[0].url: is missing"),
        ("backends: [{name: b, url: h}]\n", "backends[0].url: should begin with http://"),
        ("backends: [{name: b, url: 'http://u:p@h'}]\n", "backends[0].url: holds a password; use api_key"),
        ("backends: [{name: b, url: 'http://h:x'}]\n", "backends[0].url: is no URL"),
        ("backends: [{name: b, url: 'http://h/?a=1'}]\n", "without ? and #"),
        ("backends: [{name: 'a b', url: 'http://h'}]\n", "backends[0].name: 'a b' will not do"),
        ("backends: [{name: runner-m, url: 'http://h'}]\n", "backends[0].name: 'runner-m' will not do"),
        ("backends: [{name: b, url: 'http://h', ready: true}]\n", "backends[0].ready: no such key"),
        ("backends: [{name: b, prest: vllm}]\n", "backends[0].prest: no such key; did you mean 'preset'?"),
        ("backends: [{name: b, preset: vlm}]\n", "backends[0].preset: 'vlm' will not do: choose one of openai, azure"),
        ("backends: [{name: b, preset: vlm}]\n", "did you mean 'vllm'? (line 1 of r.yaml)"),
        ("backends: [{name: b, preset: azure}]\n", "backends[0].url: is missing: write the resource's address"),
        ("backends: [{name: b, preset: azure, url: 'http://h:x'}]\n", "backends[0].url: is no URL"),
        ("backends: [{name: b, preset: vllm, url: '//[h'}]\n", "backends[0].url: is no URL"),
        ("backends: [{name: b, url: 'http://h', query: '?a=1'}]\n", "backends[0].query: should look like name=value"),
        ("backends: [{name: b, url: 'http://h', auth: basic}]\n", "backends[0].auth: 'basic' will not do: choose one"),
        ("backends: [{name: b, url: 'http://h', provider: 'a b'}]\n", "backends[0].provider: 'a b' will not do"),
        ("backends: [{name: b, url: 'http://h', api_key: ''}]\n", "backends[0].api_key: is empty"),
        ("backends: [{name: b, url: 'http://h', headers: {a: 1}}]\n", "backends[0].headers.a: should be text"),
        ("backends: [{name: b, url: 'http://h', headers: {'a b': x}}]\n", "is no valid header"),
        ("backends: [{name: b, url: 'http://h', headers: {a: '\u20ac'}}]\n", "is no valid header"),
        ("backends: [{name: b, url: 'http://h', api_key: 'k\u00e4'}]\n", "backends[0].api_key: holds a space"),
        ("backends: [{name: b, url: 'http://h/\u20ac'}]\n", "backends[0].url: should be ASCII"),
        ("backends: [{name: b, url: 'https://h', tls_ca_file: none.pem}]\n", "backends[0].tls_ca_file: "),
        ("backends: [{name: b, url: 'https://h', tls_ca_file: r.yaml}]\n", "r.yaml' cannot be used"),
        (
            "backends: [{name: b, url: 'http://h', timeouts: {conect: 1s}}]\n",
            "timeouts.conect: no such key; did you mean",
        ),
        (BACKEND.replace("[{", "[{name: b, url: 'http://h'}, {"), "backends[1].name: there is another backend 'b'"),
        ("models: [{name: m}]\n", "models[0]: model 'm' needs a `file` to run here, `deployments` on backends, or"),
        ("models: [{name: m, file: none.gguf}]\n", "models[0].file: there is no file "),
        ("models: [m]\n", "models[0]: should hold keys like `name:`"),
        ("models: [{deployments: []}]\n", "models[0].name: is missing"),
        (BACKEND + MODEL.replace("backend: b", "backend: c"), "models[0].deployments[0].backend: no backend 'c'"),
        (BACKEND + MODEL.replace("name: m", "name: m, fallbacks: [m]"), "a model cannot be its own fallback"),
        (BACKEND + MODEL.replace("name: m", "name: m, fallbacks: [x]"), "models[0].fallbacks[0]: no model 'x'"),
        (BACKEND + MODEL.replace("name: m", "name: m, runner: {}"), "models[0].runner: means something only together"),
        (BACKEND + MODEL.replace("name: m", "name: 'm m'"), "models[0].name: 'm m' will not do"),
        (BACKEND + MODEL.replace("name: m", "name: m, strategy: custom"), "models[0].strategy: custom needs routing.c"),
        (BACKEND + MODEL.replace("name: m", "name: m, quality: 2"), "models[0].quality: 2 will not do: 0 (worst) to 1"),
        (BACKEND + MODEL.replace("name: m", "name: m, context: -1"), "models[0].context: must be a number of tokens"),
        (BACKEND + MODEL.replace("name: m", "name: m, context: 8k"), "models[0].context: '8k' will not do: it should"),
        (BACKEND + MODEL.replace("name: m", "name: m, price: 1"), "models[0].price: should hold keys, not 1"),
        (BACKEND + MODEL.replace("name: m", "name: m, price: {input: 1}"), "models[0].price.output: is missing"),
        (
            BACKEND + MODEL.replace("backend: b", "backend: b, price: {input: 1, output: -1}"),
            "models[0].deployments[0].price.output: must be 0 or more",
        ),
        (
            BACKEND + MODEL.replace("name: m", "name: m, capabilities: [tols]"),
            "models[0].capabilities[0]: 'tols' will not do: choose one of tools, vision, json, reasoning, embeddings; did",
        ),
        (BACKEND + MODEL.replace("name: m", "name: m, queue: {slots: -1}"), "models[0].queue.slots: must be 1 or more"),
        (
            BACKEND + MODEL.replace("name: m", "name: m, limits: {concurrency: -1}"),
            "models[0].limits.concurrency: must",
        ),
        (
            BACKEND + MODEL.replace("name: m", "name: m, members: al"),
            "models[0].members: 'al' will not do: all, or a li",
        ),
        (
            BACKEND + MODEL.replace("name: m", "name: m, members: [n]"),
            "models[0].members[0]: no model 'n' is configured",
        ),
        (BACKEND + MODEL.replace("name: m", "name: m, members: [m]"), "would be its own member: m has m"),
        (
            "models: [{name: a, members: [b]}, {name: b, members: [a]}]\n",
            "models[0].members: model 'a' would be its own ",
        ),
        (
            "models: [{name: g, members: [h], quality: 1}, {name: h, members: all}]\n",
            "models[0].quality: stands where the members are",
        ),
        (
            BACKEND + MODEL + "routing: {default_model: mm}\n",
            "routing.default_model: no model 'mm' is configured; did you",
        ),
    ],
)
def test_what_will_not_do_is_named_with_its_way_out(folder: Path, text: str, message: str) -> None:
    """Key path, value, suggestion and line."""
    assert message in problem(folder, text)


def test_a_file_that_cannot_be_read_is_named(folder: Path) -> None:
    """Missing, a folder, not text."""
    for path, expected in (("none.yaml", "none.yaml cannot be read: No such file"), (".", "cannot be read")):
        with pytest.raises(ConfigError, match=expected):
            load(path, {}, {})
    (folder / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="b.yaml is not UTF-8"):
        load("b.yaml", {}, {})


def test_what_an_operator_should_know_is_noted(folder: Path) -> None:
    """Nothing is wrong, but it may not be what was meant."""
    notes = read(folder, "backends: [{name: b, url: 'http://h:1'}]\n").notes
    assert notes == ("backends[0].url has no path; most servers want /v1 at the end", "backend 'b' serves no model")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    """Only this machine can reach it; unless a key is always wanted."""
    assert keys_needed(load(None, {"HOST": host}, {})) == KeysNeeded(inference=False, admin=False)


def test_a_key_may_be_wanted_everywhere(folder: Path) -> None:
    """On loopback too."""
    assert keys_needed(read(folder, "accounts: {require_key: always}\n")) == KeysNeeded(inference=True, admin=True)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org"])
def test_other_machines_need_keys(host: str) -> None:
    """For all that they can reach: the API's port serves monitoring too, the monitoring port no models."""
    assert keys_needed(load(None, {"HOST": host}, {})) == KeysNeeded(inference=True, admin=True)
    assert keys_needed(load(None, {"METRICS_HOST": host}, {})) == KeysNeeded(inference=False, admin=True)
    assert not any(keys_needed(load(None, {"METRICS_HOST": host}, {"metrics_port": "off"})))
    assert not any(keys_needed(load(None, {"HOST": host}, {"insecure": True})))


def test_overrides_are_a_closed_list() -> None:
    """A typo in the caller is not a setting."""
    with pytest.raises(ConfigError, match="did you mean 'port'"):
        load(None, {}, {"prot": 1})
