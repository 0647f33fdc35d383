"""Reads LiteLLM's `model_list` shape as ours, so that such a file can be tried without rewriting it.

Understood: `model_list` entries of providers that speak the OpenAI protocol, and the parts of `litellm_settings`
and `router_settings` that we have a counterpart for. Everything else is refused by name: a limit or a key that
is silently not applied would be worse than an error.
Not for: checking names and values; what this makes goes through the same checks as our own shape.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from llm_router.config.shape import suggest
from llm_router.errors import ConfigError

_PROVIDERS: Final = {
    "openai": ("https://api.openai.com/v1", "OPENAI_API_KEY"),
    "deepseek": ("https://api.deepseek.com/v1", "DEEPSEEK_API_KEY"),
    "groq": ("https://api.groq.com/openai/v1", "GROQ_API_KEY"),
    "mistral": ("https://api.mistral.ai/v1", "MISTRAL_API_KEY"),
    "openrouter": ("https://openrouter.ai/api/v1", "OPENROUTER_API_KEY"),
    "together_ai": ("https://api.together.xyz/v1", "TOGETHERAI_API_KEY"),
    "xai": ("https://api.x.ai/v1", "XAI_API_KEY"),
    "custom_openai": ("", ""),
    "hosted_vllm": ("", ""),
    "litellm_proxy": ("", ""),
    "llamafile": ("", ""),
    "lm_studio": ("", ""),
    "openai_like": ("", ""),
    "text-completion-openai": ("https://api.openai.com/v1", "OPENAI_API_KEY"),
}
"""Providers that speak the OpenAI protocol: their address ("" if each has its own) and the variable of their key."""

_STRATEGIES: Final = {"simple-shuffle": "round-robin", "least-busy": "least-loaded"}
_PARAMS: Final = ("model", "api_base", "base_url", "api_key", "timeout", "extra_headers", "ssl_verify")
_OURS: Final = {"server", "access", "front", "routing", "metrics", "health"}

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
        self._timeout: str | None = None

    def convert(self, data: Mapping[str, Any]) -> Converted:
        rest = {key: value for key, value in data.items() if key in _OURS}
        for key in data:
            if key == "general_settings":
                raise self._fail(
                    key, "keys, databases and alerts of LiteLLM's proxy have no counterpart here; remove this section"
                )
            if key not in _OURS | {"model_list", "litellm_settings", "router_settings"}:
                known = [*sorted(_OURS), "model_list", "litellm_settings", "router_settings"]
                raise self._fail(key, f"no such key{suggest(key, known)}")
        retries, fallbacks = self._general(data, rest)
        entries = data["model_list"]
        if not isinstance(entries, list):
            raise self._fail("model_list", "should be a list: each entry begins with a dash")
        for index, entry in enumerate(entries):
            self._entry(entry, f"model_list[{index}]")
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
    ) -> tuple[int | None, list[tuple[str, str, list[str]]]]:
        """Retries and fallbacks from the general sections; strategy and timeout are noted on the way."""
        retries: int | None = None
        fallbacks: list[tuple[str, str, list[str]]] = []
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
                elif key == "drop_params" and value is False:
                    continue  # we never drop any
                else:
                    raise self._fail(path, "has no counterpart here; remove it")
        return retries, fallbacks

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
            if key not in {"model_name", "litellm_params"}:
                raise self._fail(f"{path}.{key}", "has no counterpart here; remove it")
        for key in ("model_name", "litellm_params"):
            if not entry.get(key):
                raise self._fail(f"{path}.{key}", "is missing")
        name, params = str(entry["model_name"]), entry["litellm_params"]
        if "*" in name:
            raise self._fail(f"{path}.model_name", f"{name!r}: wildcards have no counterpart here; name each model")
        if not isinstance(params, Mapping):
            raise self._fail(f"{path}.litellm_params", "should hold keys like `model:`")
        backend, upstream_model = self._backend(params, f"{path}.litellm_params")
        if name not in self._models:
            self._aliases[f"models[{len(self._models)}]"] = path
            self._aliases[f"models[{len(self._models)}].name"] = f"{path}.model_name"
            self._models[name] = {"name": name, "deployments": []}
        self._models[name]["deployments"].append({"backend": backend, "model": upstream_model})

    def _backend(self, params: Mapping[str, Any], path: str) -> tuple[str, str]:
        """The name of the backend that serves such an entry, made unless an equal one exists, and its model name."""
        for key in params:
            if key in {"rpm", "tpm", "max_parallel_requests", "max_budget"}:
                raise self._fail(f"{path}.{key}", "limits per deployment are not supported by this version; remove it")
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
                f"provider {provider!r} does not speak the OpenAI protocol, or is not known; known: {listed}. "
                f"If it does, write openai/{upstream_model} with its api_base",
            )
        address, variable = _PROVIDERS[provider]
        base_key = "api_base" if params.get("api_base") else "base_url"
        url = str(params.get(base_key) or address)
        if not url:
            raise self._fail(f"{path}.api_base", f"is missing: {provider} has no address of its own")
        backend: dict[str, Any] = {"url": url}
        if params.get("api_key"):
            backend["api_key"] = params["api_key"]
        elif url == address:
            if not self._env.get(variable):
                raise self._fail(f"{path}.api_key", f"is missing, and the environment variable {variable} is not set")
            backend["api_key"] = self._env[variable]
        if params.get("extra_headers"):
            backend["headers"] = params["extra_headers"]
        if "ssl_verify" in params:
            backend["tls_verify"] = params["ssl_verify"]
        timeout = self._duration(params["timeout"], f"{path}.timeout") if "timeout" in params else self._timeout
        if timeout:
            backend["timeouts"] = {"total": timeout}
        for known in self._backends:
            if {key: value for key, value in known.items() if key != "name"} == backend:
                return str(known["name"]), upstream_model
        at = f"backends[{len(self._backends)}]"
        self._aliases[at] = path
        self._aliases[f"{at}.url"] = f"{path}.{base_key}"
        for ours, theirs in (("headers", "extra_headers"), ("tls_verify", "ssl_verify"), ("timeouts", "timeout")):
            self._aliases[f"{at}.{ours}"] = f"{path}.{theirs}"
        backend["name"] = self._name(provider, url if url != address else "")
        self._backends.append(backend)
        return backend["name"], upstream_model

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
            raise self._fail(path, f"{value!r} is no number of retries")
        return value
