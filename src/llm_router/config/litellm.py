"""Reads LiteLLM's `model_list` shape as ours, so that such a file can be tried without rewriting it.

Understood: `model_list` entries of providers that speak a protocol of ours, what they say about limits, prices and
abilities, and the parts of `litellm_settings` and `router_settings` that we have a counterpart for. Everything else is
refused by name: a limit or a key that is silently not applied would be worse than an error.
Not for: checking names and values; what this makes goes through the same checks as our own shape.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from llm_router.config.presets import LOCAL, Preset
from llm_router.config.shape import suggest
from llm_router.errors import ConfigError
from llm_router.routing.table import CAPABILITIES


class _Provider(NamedTuple):
    """What LiteLLM knows of a provider.

    Args:
        url: its address; empty if each has its own.
        variable: of the environment, with its key; empty if it needs none.
        preset: ours for it; empty for none.
        path: what LiteLLM's `api_base` leaves out.
        price_list: the provider whose prices count, if neither preset nor address tell.
    """

    url: str = ""
    variable: str = ""
    preset: Preset | None = None
    path: str = ""
    price_list: str = ""


_OLLAMA: Final = _Provider("http://127.0.0.1:11434/v1", preset="ollama", path="/v1")
_PROVIDERS: Final[Mapping[str, _Provider]] = {
    "openai": _Provider("https://api.openai.com/v1", "OPENAI_API_KEY"),
    "anthropic": _Provider("https://api.anthropic.com/v1", "ANTHROPIC_API_KEY", "anthropic", "/v1"),
    "azure": _Provider(variable="AZURE_API_KEY", preset="azure"),
    "deepseek": _Provider("https://api.deepseek.com/v1", "DEEPSEEK_API_KEY"),
    "groq": _Provider("https://api.groq.com/openai/v1", "GROQ_API_KEY"),
    "mistral": _Provider("https://api.mistral.ai/v1", "MISTRAL_API_KEY"),
    "openrouter": _Provider("https://openrouter.ai/api/v1", "OPENROUTER_API_KEY", "openrouter"),
    "together_ai": _Provider("https://api.together.xyz/v1", "TOGETHERAI_API_KEY"),
    "xai": _Provider("https://api.x.ai/v1", "XAI_API_KEY"),
    "ollama": _OLLAMA,
    "ollama_chat": _OLLAMA,
    "custom_openai": _Provider(),
    "hosted_vllm": _Provider(preset="vllm"),
    "litellm_proxy": _Provider(),
    "llamafile": _Provider(price_list=LOCAL),
    "lm_studio": _Provider(price_list=LOCAL),
    "openai_like": _Provider(),
    "text-completion-openai": _Provider("https://api.openai.com/v1", "OPENAI_API_KEY"),
}
"""Providers that speak a protocol of ours."""

_STRATEGIES: Final = {
    "simple-shuffle": "random",
    "least-busy": "least-loaded",
    "latency-based-routing": "speed-priority",
    "cost-based-routing": "cost-optimized",
}
_SHARES: Final = {
    "rpm": ("limits", "requests_per_minute"),
    "tpm": ("limits", "tokens_per_minute"),
    "max_parallel_requests": ("queue", "slots"),
}
"""Bounds of deployments; here models have them, of all their deployments together."""

_PRICES: Final = {
    "input_cost_per_token": "input",
    "output_cost_per_token": "output",
    "cache_read_input_token_cost": "cached_input",
    "cache_creation_input_token_cost": "cache_write",
}
_ABILITIES: Final = {
    "supports_function_calling": "tools",
    "supports_vision": "vision",
    "supports_response_schema": "json",
    "supports_reasoning": "reasoning",
}
_PARAMS: Final = (
    "model", "api_base", "base_url", "api_key", "api_version", "timeout", "extra_headers", "ssl_verify",
    *_SHARES, *_PRICES,
)  # fmt: skip
_INFO: Final = (*_PRICES, *_ABILITIES, "max_input_tokens", "mode")
_INFO_ONLY: Final = ("id", "description")
"""Names and remarks: nothing would be applied."""

_API_VERSION: Final = re.compile(r"\d{4}-\d{2}-\d{2}(?:-preview)?")
_OURS: Final = {
    "server", "access", "front", "routing", "cache", "limits", "accounts",
    "monitoring", "metrics", "health", "logs", "tracing", "profiler", "alerting",
}  # fmt: skip

Fail = Callable[[str, str], ConfigError]


class Converted(NamedTuple):
    """`data` in our shape; `aliases` from paths in it to the paths in the file they came from."""

    data: dict[str, Any]
    aliases: dict[str, str]
    notes: list[str]


def convert(data: Mapping[str, Any], env: Mapping[str, str], fail: Fail) -> Converted:
    """Our shape of a document with a `model_list`.

    Raises: ConfigError (made by `fail`) for what has no counterpart here.
    """
    for key in ("models", "backends"):
        if key in data:
            raise fail(key, "cannot stand beside model_list: put every model into one of the two")
    return _Conversion(env, fail).convert(data)


class _Conversion:
    def __init__(self, env: Mapping[str, str], fail: Fail) -> None:
        self._env = env
        self._fail = fail
        self._aliases: dict[str, str] = {}
        self._notes: list[str] = []
        self._backends: list[dict[str, Any]] = []
        self._models: dict[str, dict[str, Any]] = {}
        self._shares: dict[str, list[dict[str, int]]] = {}
        self._timeout: str | None = None

    def convert(self, data: Mapping[str, Any]) -> Converted:
        rest = {key: value for key, value in data.items() if key in _OURS}
        for key in data:
            if key == "general_settings":
                raise self._fail(
                    key,
                    "belongs to LiteLLM's proxy; remove it. Keys are made with `llm-router keys create`, where they are "
                    "kept is accounts.database",
                )
            if key not in _OURS | {"model_list", "litellm_settings", "router_settings"}:
                known = [*sorted(_OURS), "model_list", "litellm_settings", "router_settings"]
                raise self._fail(key, f"no such key{suggest(key, known)}")
        retries, fallbacks, aliases = self._general(data, rest)
        entries = data["model_list"]
        if not isinstance(entries, list):
            raise self._fail("model_list", "should be a list: each entry begins with a dash")
        for index, entry in enumerate(entries):
            self._entry(entry, f"model_list[{index}]")
        self._share()
        for path, name, member in aliases:
            if name in self._models:
                raise self._fail(path, f"there is a model {name!r} in model_list")
            at = f"models[{len(self._models)}]"
            self._aliases[at] = path
            self._models[name] = {"name": name, "members": [member]}
        for path, name, wanted in fallbacks:
            if name not in self._models:
                raise self._fail(path, f"no model {name!r} is in model_list{suggest(name, self._models)}")
            model = self._models[name]
            self._aliases[f"models[{list(self._models).index(name)}].fallbacks"] = path
            model["fallbacks"] = [*model.get("fallbacks", []), *wanted]
        routing = dict(rest.get("routing") or {})
        if retries is not None:
            routing["retry"] = {"attempts": retries + 1, **(routing.get("retry") or {})}
        if routing:
            rest["routing"] = routing
        return Converted(
            {**rest, "backends": self._backends, "models": list(self._models.values())}, self._aliases, self._notes
        )

    def _general(
        self, data: Mapping[str, Any], rest: dict[str, Any]
    ) -> tuple[int | None, list[tuple[str, str, list[str]]], list[tuple[str, str, str]]]:
        """Retries, fallbacks and aliases from the general sections; strategy and timeout are noted on the way."""
        retries: int | None = None
        fallbacks: list[tuple[str, str, list[str]]] = []
        aliases: list[tuple[str, str, str]] = []
        for section in ("litellm_settings", "router_settings"):
            settings = data.get(section) or {}
            if not isinstance(settings, Mapping):
                raise self._fail(section, "should hold keys")
            for key, value in settings.items():
                path = f"{section}.{key}"
                if key == "num_retries":
                    retries = self._count(value, path)
                    self._aliases["routing.retry.attempts"] = path
                elif key in {"request_timeout", "timeout"}:
                    self._timeout = self._duration(value, path)
                elif key == "fallbacks":
                    fallbacks += self._fallbacks(value, path)
                elif key == "routing_strategy" and section == "router_settings":
                    if value not in _STRATEGIES:
                        listed = ", ".join(_STRATEGIES)
                        raise self._fail(path, f"{value!r} has no counterpart here; understood: {listed}")
                    routing = dict(rest.get("routing") or {})
                    rest["routing"] = {"strategy": _STRATEGIES[value], **routing}
                elif key == "model_group_alias" and section == "router_settings":
                    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value.values()):
                        raise self._fail(path, "should look like {alias: model}")
                    aliases += [(f"{path}.{alias}", str(alias), name) for alias, name in value.items()]
                elif key == "drop_params" and value is False:
                    continue  # we never drop any
                else:
                    raise self._fail(path, "has no counterpart here; remove it")
        return retries, fallbacks, aliases

    def _fallbacks(self, value: Any, path: str) -> list[tuple[str, str, list[str]]]:
        if not isinstance(value, list):
            raise self._fail(path, "should be a list like [{model: [other-model]}]")
        found = []
        for index, entry in enumerate(value):
            at = f"{path}[{index}]"
            if not isinstance(entry, Mapping) or not all(isinstance(names, list) for names in entry.values()):
                raise self._fail(at, "should look like {model: [other-model]}")
            found += [(at, str(name), [str(other) for other in names]) for name, names in entry.items()]
        return found

    def _entry(self, entry: Any, path: str) -> None:
        if not isinstance(entry, Mapping):
            raise self._fail(path, "should hold model_name and litellm_params")
        for key in entry:
            if key not in {"model_name", "litellm_params", "model_info"}:
                raise self._fail(f"{path}.{key}", "has no counterpart here; remove it")
        for key in ("model_name", "litellm_params"):
            if not entry.get(key):
                raise self._fail(f"{path}.{key}", "is missing")
        name, params, info = str(entry["model_name"]), entry["litellm_params"], entry.get("model_info") or {}
        if "*" in name:
            raise self._fail(f"{path}.model_name", f"{name!r}: wildcards have no counterpart here; name each model")
        if not isinstance(params, Mapping):
            raise self._fail(f"{path}.litellm_params", "should hold keys like `model:`")
        if not isinstance(info, Mapping):
            raise self._fail(f"{path}.model_info", "should hold keys like `supports_vision:`")
        backend, upstream_model = self._backend(params, f"{path}.litellm_params")
        if name not in self._models:
            self._aliases[f"models[{len(self._models)}]"] = path
            self._aliases[f"models[{len(self._models)}].name"] = f"{path}.model_name"
            self._models[name] = {"name": name, "deployments": []}
        terms = self._terms(params, info, path)
        self._models[name]["deployments"].append({"backend": backend, "model": upstream_model, **terms})
        self._shares.setdefault(name, []).append(
            {key: self._bound(params[key], f"{path}.litellm_params.{key}") for key in _SHARES if key in params}
        )

    def _terms(self, params: Mapping[str, Any], info: Mapping[str, Any], path: str) -> dict[str, Any]:
        """Price, context and capabilities of a deployment, as far as the entry says them."""
        for key in info:
            if key not in (*_INFO, *_INFO_ONLY):
                raise self._fail(f"{path}.model_info.{key}", f"has no counterpart here{suggest(key, _INFO)}")
        terms: dict[str, Any] = {}
        price: dict[str, float] = {}
        for section, values in (("litellm_params", params), ("model_info", info)):
            for theirs, ours in _PRICES.items():
                if theirs in values:
                    price[ours] = self._per_million(values[theirs], f"{path}.{section}.{theirs}")
        if price:
            for key, ours in (("input_cost_per_token", "input"), ("output_cost_per_token", "output")):
                if ours not in price:
                    raise self._fail(f"{path}.litellm_params.{key}", "is missing: a price needs input and output")
            terms["price"] = price
        if "max_input_tokens" in info:
            terms["context"] = self._count(info["max_input_tokens"], f"{path}.model_info.max_input_tokens")
        mode = info.get("mode", "chat")
        if mode not in {"chat", "completion", "embedding"}:
            raise self._fail(f"{path}.model_info.mode", f"{mode!r} has no counterpart here")
        # What an entry does not speak of is not known, which counts as able.
        unable = {ours for theirs, ours in _ABILITIES.items() if info.get(theirs) is False}
        if mode == "embedding":
            terms["capabilities"] = ["embeddings"]
        elif unable:
            terms["capabilities"] = [able for able in CAPABILITIES if able not in unable]
        return terms

    def _share(self) -> None:
        """Makes the bounds of deployments bounds of their models: the sum, which is what all together may do."""
        for number, (name, shares) in enumerate(self._shares.items()):
            for theirs, (section, ours) in _SHARES.items():
                given = [share[theirs] for share in shares if theirs in share]
                if not given:
                    continue
                if len(given) < len(shares):
                    raise self._fail(
                        "model_list",
                        f"{theirs} stands at some entries of {name!r} only: give it to all of them or none",
                    )
                self._models[name].setdefault(section, {})[ours] = sum(given)
                self._aliases[f"models[{number}].{section}.{ours}"] = "model_list"

    def _backend(self, params: Mapping[str, Any], path: str) -> tuple[str, str]:
        """The name of the backend that serves such an entry, made unless an equal one exists, and its model name."""
        for key in params:
            if key in {"weight", "order"}:
                raise self._fail(f"{path}.{key}", "has no counterpart here: the model's strategy chooses; remove it")
            if key not in _PARAMS:
                raise self._fail(f"{path}.{key}", f"has no counterpart here{suggest(key, _PARAMS)}")
        if not params.get("model"):
            raise self._fail(f"{path}.model", "is missing")
        provider, slash, upstream_model = str(params["model"]).partition("/")
        if not slash:
            provider, upstream_model = "openai", str(params["model"])
        if provider not in _PROVIDERS:
            listed = ", ".join(_PROVIDERS)
            raise self._fail(
                f"{path}.model",
                f"provider {provider!r} speaks no protocol of ours, or is not known; known: {listed}. "
                f"If it speaks OpenAI's, write openai/{upstream_model} with its api_base",
            )
        known = _PROVIDERS[provider]
        base_key = "api_base" if params.get("api_base") else "base_url"
        url = self._address(str(params.get(base_key) or ""), known, f"{path}.{base_key}") or known.url
        if not url:
            raise self._fail(f"{path}.api_base", f"is missing: {provider} has no address of its own")
        backend: dict[str, Any] = {"url": url}
        if known.preset:
            backend["preset"] = known.preset
        if known.price_list:
            backend["provider"] = known.price_list
        if provider == "azure":
            backend |= self._azure(url, upstream_model, params, path)
        elif "api_version" in params:
            raise self._fail(f"{path}.api_version", f"means nothing to {provider}; remove it")
        if params.get("api_key"):
            backend["api_key"] = params["api_key"]
        elif known.variable and (url == known.url or not known.url):
            if not self._env.get(known.variable):
                raise self._fail(
                    f"{path}.api_key", f"is missing, and the environment variable {known.variable} is not set"
                )
            backend["api_key"] = self._env[known.variable]
        if params.get("extra_headers"):
            backend["headers"] = params["extra_headers"]
        if "ssl_verify" in params:
            backend["tls_verify"] = params["ssl_verify"]
        timeout = self._duration(params["timeout"], f"{path}.timeout") if "timeout" in params else self._timeout
        if timeout:
            backend["timeouts"] = {"total": timeout}
        for other in self._backends:
            if {key: value for key, value in other.items() if key != "name"} == backend:
                return str(other["name"]), upstream_model
        at = f"backends[{len(self._backends)}]"
        self._aliases[at] = path
        self._aliases[f"{at}.url"] = f"{path}.{base_key}"
        for ours, theirs in (("headers", "extra_headers"), ("tls_verify", "ssl_verify"), ("timeouts", "timeout")):
            self._aliases[f"{at}.{ours}"] = f"{path}.{theirs}"
        backend["name"] = self._name(provider, url if url != known.url else "")
        self._backends.append(backend)
        return backend["name"], upstream_model

    def _address(self, url: str, provider: _Provider, path: str) -> str:
        """A provider's address with the version that LiteLLM leaves out."""
        try:
            has_path = bool(urlsplit(url).path.strip("/"))
        except ValueError as error:
            raise self._fail(path, f"is no URL: {error}") from None
        return url.rstrip("/") + provider.path if url and not has_path else url

    def _azure(self, url: str, deployment: str, params: Mapping[str, Any], path: str) -> dict[str, str]:
        """What is different where an `api_version` is given: then each deployment has a path of its own."""
        version = str(params.get("api_version") or "v1")
        if version in {"v1", "latest"}:
            return {}
        if not _API_VERSION.fullmatch(version):
            raise self._fail(f"{path}.api_version", f"{version!r} will not do: a date like 2024-10-21, or v1")
        if "/openai/" not in url:
            url = f"{url.rstrip('/')}/openai/deployments/{deployment}"
        return {"url": url, "query": f"api-version={version}"}

    def _name(self, provider: str, url: str) -> str:
        """A backend name that tells provider and host, and is not taken."""
        host = re.sub(r"[^A-Za-z0-9.-]+", "-", url.partition("://")[2].partition("/")[0]).strip("-")
        base = f"{provider}-{host}"[:56] if host else provider
        taken = {backend["name"] for backend in self._backends}
        name, number = base, 2
        while name in taken:
            name, number = f"{base}-{number}", number + 1
        return name

    def _duration(self, value: Any, path: str) -> str:
        """LiteLLM's timeouts are bare seconds."""
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise self._fail(path, f"{value!r} is no number of seconds")
        return f"{value}s"

    def _count(self, value: Any, path: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self._fail(path, f"{value!r} is no whole number")
        return value

    def _bound(self, value: Any, path: str) -> int:
        """Nothing at all may mean no bound here: it is refused."""
        count = self._count(value, path)
        if not count:
            raise self._fail(path, "must be 1 or more; leave it out for no limit")
        return count

    def _per_million(self, value: Any, path: str) -> float:
        """LiteLLM's prices are for one token."""
        try:
            dollars = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            dollars = math.nan
        if not math.isfinite(dollars) or dollars < 0:
            raise self._fail(path, f"{value!r} is no number of US dollars")
        return round(dollars * 1_000_000, 9)
