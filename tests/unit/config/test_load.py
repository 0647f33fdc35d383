"""Settings as a whole: precedence, and a precise message for everything that will not do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm_router.config import check_exposure, load
from llm_router.config.settings import Settings
from llm_router.errors import ConfigError
from llm_router.models.registry import DEFAULT_MODEL

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
            "routing: {strategy: random}\n",
            "routing.strategy: 'random' will not do: choose one of round-robin, least-loaded",
        ),
        ("routing: {strategy: least_loaded}\n", "did you mean 'least-loaded'?"),
        ("routing: {retry: {attempts: 0}}\n", "routing.retry.attempts: 0 will not do: 1 (no retries) to 10"),
        ("routing: {retry: {budget_ratio: 2}}\n", "routing.retry.budget_ratio: 2 will not do: 0 to 1"),
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
        ("models: [{name: m}]\n", "models[0]: model 'm' needs a `file` to run here or `deployments` on backends"),
        ("models: [{name: m, file: none.gguf}]\n", "models[0].file: there is no file "),
        ("models: [m]\n", "models[0]: should hold keys like `name:`"),
        ("models: [{deployments: []}]\n", "models[0].name: is missing"),
        (BACKEND + MODEL.replace("backend: b", "backend: c"), "models[0].deployments[0].backend: no backend 'c'"),
        (BACKEND + MODEL.replace("name: m", "name: m, fallbacks: [m]"), "a model cannot be its own fallback"),
        (BACKEND + MODEL.replace("name: m", "name: m, fallbacks: [x]"), "models[0].fallbacks[0]: no model 'x'"),
        (BACKEND + MODEL.replace("name: m", "name: m, runner: {}"), "models[0].runner: means something only together"),
        (BACKEND + MODEL.replace("name: m", "name: 'm m'"), "models[0].name: 'm m' will not do"),
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
def test_loopback_needs_no_leave(host: str) -> None:
    """Only this machine can reach it."""
    check_exposure(load(None, {"HOST": host}, {}))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org"])
def test_other_machines_are_let_in_only_on_purpose(host: str) -> None:
    """No key protects the router."""
    with pytest.raises(ConfigError, match="--insecure"):
        check_exposure(load(None, {"HOST": host}, {}))
    with pytest.raises(ConfigError, match="server.metrics_host"):
        check_exposure(load(None, {"METRICS_HOST": host}, {}))
    check_exposure(load(None, {"METRICS_HOST": host}, {"metrics_port": "off"}))
    check_exposure(load(None, {"HOST": host}, {"insecure": True}))


def test_overrides_are_a_closed_list() -> None:
    """A typo in the caller is not a setting."""
    with pytest.raises(ConfigError, match="did you mean 'port'"):
        load(None, {}, {"prot": 1})
