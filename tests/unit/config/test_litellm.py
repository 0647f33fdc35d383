"""LiteLLM's model_list, read as ours or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_router.config import Settings, load
from llm_router.errors import ConfigError


def read(folder: Path, text: str, env: dict[str, str] | None = None) -> Settings:
    (folder / "config.yaml").write_text(text)
    return load(str(folder / "config.yaml"), env or {}, {})


def entry(params: str, name: str = "m") -> str:
    return f"  - model_name: {name}\n    litellm_params: {{{params}}}\n"


def test_entries_of_one_name_are_deployments_of_one_model(tmp_path: Path) -> None:
    """Equal backends are one backend."""
    text = (
        "model_list:\n"
        + entry("model: openai/gpt-4o, api_key: os.environ/KEY", "big")
        + entry("model: openai/gpt-4o-mini, api_key: os.environ/KEY", "small")
        + entry("model: hosted_vllm/org/llama, api_base: 'http://127.0.0.1:8000/v1', timeout: 2.5", "big")
    )
    settings = read(tmp_path, text, {"KEY": "k"})
    big, small = settings.models
    assert [(d.backend, d.upstream_model) for d in big.deployments] == [
        ("openai", "gpt-4o"),
        ("hosted_vllm-127.0.0.1-8000", "org/llama"),
    ]
    assert [(d.backend, d.upstream_model) for d in small.deployments] == [("openai", "gpt-4o-mini")]
    openai, vllm = settings.backends
    assert (openai.url, openai.api_key) == ("https://api.openai.com/v1", "k")
    assert (vllm.url, vllm.api_key, vllm.total_s) == ("http://127.0.0.1:8000/v1", "", 2.5)


def test_the_key_of_a_known_provider_comes_from_its_variable(tmp_path: Path) -> None:
    """As with LiteLLM; missing, it is named."""
    text = "model_list:\n" + entry("model: groq/llama")
    assert read(tmp_path, text, {"GROQ_API_KEY": "g"}).backends[0].api_key == "g"
    with pytest.raises(ConfigError, match=r"model_list\[0\].litellm_params.api_key: .* GROQ_API_KEY is not set"):
        read(tmp_path, text)


def test_two_keys_at_one_provider_are_two_backends(tmp_path: Path) -> None:
    """With names of their own."""
    text = "model_list:\n" + entry("model: openai/a, api_key: k1") + entry("model: openai/a, api_key: k2")
    assert [backend.name for backend in read(tmp_path, text).backends] == ["openai", "openai-2"]


def test_general_settings_that_have_a_counterpart_are_taken(tmp_path: Path) -> None:
    """Retries, timeout, fallbacks, strategy; our own sections may stand beside them."""
    text = (
        "server: {port: 4000}\n"
        "litellm_settings: {num_retries: 4, request_timeout: 30, fallbacks: [{a: [b]}], drop_params: false}\n"
        "router_settings: {routing_strategy: least-busy}\n"
        "model_list:\n" + entry("model: x, api_key: k", "a") + entry("model: y, api_key: k", "b")
    )
    settings = read(tmp_path, text)
    assert settings.server.port == 4000
    assert (settings.routing.retry.attempts, settings.routing.strategy) == (5, "least-loaded")
    assert settings.models[0].fallbacks == ("b",)
    assert settings.backends[0].total_s == 30.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model_list: {}\n", "model_list: should be a list"),
        ("model_list: [1]\n", r"model_list\[0\]: should hold model_name and litellm_params"),
        ("model_list: [{model_name: m}]\n", r"model_list\[0\].litellm_params: is missing"),
        ("model_list:\n" + entry("model: anthropic/claude"), "provider 'anthropic' does not speak the OpenAI protocol"),
        ("model_list:\n" + entry("model: x, api_key: k, rpm: 5"), "rpm: limits per deployment are not supported"),
        ("model_list:\n" + entry("model: x, api_key: k, weight: 5"), "weight: has no counterpart here"),
        ("model_list:\n" + entry("model: x, api_kye: k"), "api_kye: has no counterpart here; did you mean 'api_key'"),
        ("model_list:\n" + entry("model: x, api_key: k, timeout: 5s"), "timeout: '5s' is no number of seconds"),
        ("model_list:\n" + entry("model: hosted_vllm/x"), "api_base: is missing: hosted_vllm has no address"),
        ("model_list:\n" + entry("model: x, api_key: k", "'*'"), "wildcards have no counterpart"),
        ("general_settings: {master_key: x}\nmodel_list: []\n", "general_settings: keys, databases"),
        ("litellm_settings: {cache: true}\nmodel_list: []\n", "litellm_settings.cache: has no counterpart"),
        ("router_settings: {routing_strategy: usage-based-routing}\nmodel_list: []\n", "has no counterpart"),
        ("models: []\nmodel_list: []\n", "models: cannot stand beside model_list"),
        ("litelm_settings: {}\nmodel_list: []\n", "litelm_settings: no such key; did you mean 'litellm_settings'"),
        ("litellm_settings: {fallbacks: [{a: [b]}]}\nmodel_list: []\n", "no model 'a' is in model_list"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    """Better an error than a limit that is not applied."""
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, text)


def test_errors_found_later_name_the_place_in_this_file(tmp_path: Path) -> None:
    """Not in the shape that it was turned into."""
    text = "model_list:\n" + entry("model: openai/x, api_base: 'ftp://h', api_key: k")
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert str(caught.value).startswith("model_list[0].litellm_params.api_base: should begin with http://")
    assert "(line 3 of " in str(caught.value)
    text = "litellm_settings: {fallbacks: [{a: [b]}]}\nmodel_list:\n" + entry("model: x, api_key: k", "a")
    with pytest.raises(ConfigError, match=r"litellm_settings.fallbacks\[0\]: no model 'b' is configured"):
        read(tmp_path, text)
