"""LiteLLM's model_list, read as ours or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_router.config import Settings, load
from llm_router.errors import ConfigError
from llm_router.models.prices import Price


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


def test_providers_with_a_preset_have_it(tmp_path: Path) -> None:
    """Protocol, how the key is sent, and what LiteLLM's addresses leave out."""
    azure = "model: azure/gpt, api_base: 'https://n.openai.azure.com/'"
    text = (
        "model_list:\n"
        + entry("model: anthropic/claude")
        + entry("model: anthropic/claude, api_base: 'http://proxy:1', api_key: k")
        + entry(azure)
        + entry(f"{azure}, api_version: 2024-06-01")
        + entry("model: ollama/llama3, api_base: 'http://127.0.0.1:11434'")
        + entry("model: ollama_chat/llama3")
        + entry("model: lm_studio/q, api_base: 'http://127.0.0.1:1234/v1'")
    )
    settings = read(tmp_path, text, {"ANTHROPIC_API_KEY": "a", "AZURE_API_KEY": "z"})
    seen = [
        (b.url, b.query, b.protocol, b.auth, b.api_key, b.provider, d.upstream_model)
        for d in settings.models[0].deployments
        for b in settings.backends
        if b.name == d.backend
    ]
    assert seen == [
        ("https://api.anthropic.com/v1", "", "anthropic", "x-api-key", "a", "anthropic", "claude"),
        ("http://proxy:1/v1", "", "anthropic", "x-api-key", "k", "anthropic", "claude"),
        ("https://n.openai.azure.com/openai/v1", "", "openai", "api-key", "z", "azure", "gpt"),
        (
            "https://n.openai.azure.com/openai/deployments/gpt", "api-version=2024-06-01",
            "openai", "api-key", "z", "azure", "gpt",
        ),
        ("http://127.0.0.1:11434/v1", "", "openai", "bearer", "", "local", "llama3"),
        ("http://127.0.0.1:11434/v1", "", "openai", "bearer", "", "local", "llama3"),
        ("http://127.0.0.1:1234/v1", "", "openai", "bearer", "", "local", "q"),
    ]  # fmt: skip


def test_bounds_of_deployments_become_bounds_of_their_model(tmp_path: Path) -> None:
    """All together may do the sum."""
    shares = "rpm: 60, tpm: 1000, max_parallel_requests: 4"
    text = "model_list:\n" + entry(f"model: x, api_key: k, {shares}") + entry(f"model: y, api_key: k, {shares}")
    (model,) = read(tmp_path, text).models
    assert (model.limits.requests_per_minute, model.limits.tokens_per_minute, model.queue.slots) == (120, 2000, 8)


def test_what_an_entry_says_of_its_model_is_taken(tmp_path: Path) -> None:
    """Prices are for a million tokens here; abilities that it does not speak of are not known."""
    text = (
        "model_list:\n"
        + entry("model: x, api_key: k, input_cost_per_token: 2.5e-06, output_cost_per_token: 1e-5")
        + "    model_info: {id: one, mode: chat, supports_vision: false, supports_function_calling: true,"
        " max_input_tokens: 128000, cache_read_input_token_cost: 0.00000125,"
        " cache_creation_input_token_cost: 0.000003}\n"
        + entry("model: e, api_key: k")
        + "    model_info: {mode: embedding}\n"
        + entry("model: y, api_key: k")
        + "    model_info: {supports_vision: true}\n"
    )
    chat, embedding, plain = read(tmp_path, text).models[0].deployments
    assert chat.price == Price(input=2.5, output=10.0, cached_input=1.25, cache_write=3.0)
    assert (chat.context_tokens, chat.capabilities) == (128_000, ("tools", "json", "reasoning", "embeddings"))
    assert embedding.capabilities == ("embeddings",)
    assert (plain.capabilities, plain.price, plain.context_tokens) == (None, None, 0)


def test_an_alias_is_a_model_with_one_member(tmp_path: Path) -> None:
    """And may have fallbacks."""
    text = (
        "router_settings: {model_group_alias: {gpt: big}, fallbacks: [{gpt: [small]}]}\n"
        "model_list:\n" + entry("model: x, api_key: k", "big") + entry("model: y, api_key: k", "small")
    )
    alias = read(tmp_path, text).models[2]
    assert (alias.name, alias.members, alias.fallbacks) == ("gpt", ("big",), ("small",))


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("simple-shuffle", "random"),
        ("least-busy", "least-loaded"),
        ("latency-based-routing", "speed-priority"),
        ("cost-based-routing", "cost-optimized"),
    ],
)
def test_strategies_have_counterparts(tmp_path: Path, theirs: str, ours: str) -> None:
    """By what they do."""
    text = f"router_settings: {{routing_strategy: {theirs}}}\nmodel_list:\n" + entry("model: x, api_key: k")
    assert read(tmp_path, text).routing.strategy == ours


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model_list: {}\n", "model_list: should be a list"),
        ("model_list: [1]\n", r"model_list\[0\]: should hold model_name and litellm_params"),
        ("model_list: [{model_name: m}]\n", r"model_list\[0\].litellm_params: is missing"),
        ("model_list:\n" + entry("model: bedrock/claude"), "provider 'bedrock' speaks no protocol of ours"),
        ("model_list:\n" + entry("model: anthropic/claude"), "ANTHROPIC_API_KEY is not set"),
        ("model_list:\n" + entry("model: azure/x, api_key: k"), "api_base: is missing: azure has no address"),
        (
            "model_list:\n" + entry("model: azure/x, api_key: k, api_base: 'https://n.example', api_version: new"),
            "api_version: 'new' will not do: a date like",
        ),
        ("model_list:\n" + entry("model: x, api_key: k, api_version: v1"), "api_version: means nothing to openai"),
        ("model_list:\n" + entry("model: x, api_key: k, rpm: 0"), "rpm: must be 1 or more"),
        ("model_list:\n" + entry("model: x, api_key: k, tpm: many"), "tpm: 'many' is no whole number"),
        (
            "model_list:\n" + entry("model: x, api_key: k, rpm: 5") + entry("model: y, api_key: k"),
            "model_list: rpm stands at some entries of 'm' only",
        ),
        ("model_list:\n" + entry("model: x, api_key: k, max_budget: 5"), "max_budget: has no counterpart here"),
        ("model_list:\n" + entry("model: x, api_key: k, weight: 5"), "weight: has no counterpart here: the model's"),
        (
            "model_list:\n" + entry("model: x, api_key: k, input_cost_per_token: 0.1"),
            "output_cost_per_token: is missing: a price needs input and output",
        ),
        (
            "model_list:\n" + entry("model: x, api_key: k") + "    model_info: {input_cost_per_token: cheap}\n",
            "model_info.input_cost_per_token: 'cheap' is no number of US dollars",
        ),
        (
            "model_list:\n" + entry("model: x, api_key: k") + "    model_info: {suports_vision: true}\n",
            "model_info.suports_vision: has no counterpart here; did you mean 'supports_vision'",
        ),
        (
            "model_list:\n" + entry("model: x, api_key: k") + "    model_info: {mode: audio_speech}\n",
            "model_info.mode: 'audio_speech' has no counterpart",
        ),
        ("model_list:\n" + entry("model: x, api_key: k") + "    model_info: [1]\n", "model_info: should hold keys"),
        (
            "router_settings: {model_group_alias: {m: x}}\nmodel_list:\n" + entry("model: x, api_key: k"),
            "model_group_alias.m: there is a model 'm' in model_list",
        ),
        (
            "router_settings: {model_group_alias: {n: {model: m}}}\nmodel_list:\n" + entry("model: x, api_key: k"),
            "model_group_alias: should look like {alias: model}",
        ),
        ("model_list:\n" + entry("model: x, api_kye: k"), "api_kye: has no counterpart here; did you mean 'api_key'"),
        ("model_list:\n" + entry("model: x, api_key: k, timeout: 5s"), "timeout: '5s' is no number of seconds"),
        ("model_list:\n" + entry("model: hosted_vllm/x"), "api_base: is missing: hosted_vllm has no address"),
        ("model_list:\n" + entry("model: x, api_key: k", "'*'"), "wildcards have no counterpart"),
        ("general_settings: {master_key: x}\nmodel_list: []\n", "general_settings: belongs to LiteLLM"),
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
