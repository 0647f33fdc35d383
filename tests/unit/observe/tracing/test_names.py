"""The table of names against the published conventions."""

from __future__ import annotations

import importlib
import pkgutil

import opentelemetry.semconv._incubating.attributes as incubating
from opentelemetry.semconv.schemas import Schemas

from llm_router.observe.tracing import names


def published() -> set[str]:
    """Every attribute name of the conventions."""
    found: set[str] = set()
    for module in pkgutil.iter_modules(incubating.__path__):
        attributes = importlib.import_module(f"{incubating.__name__}.{module.name}")
        found.update(value for value in vars(attributes).values() if isinstance(value, str))
    return found


def test_every_standard_name_is_one_of_the_conventions() -> None:
    assert set(names.STANDARD) - published() == set()


def test_every_other_name_is_in_our_own_namespace_and_in_none_of_theirs() -> None:
    constants = {value for name, value in vars(names).items() if name.isupper() and isinstance(value, str)}
    dotted = {value for value in constants if "." in value} - {names.SEMCONV_VERSION, names.SCHEMA_URL}
    ours = dotted - set(names.STANDARD)
    assert all(name.startswith("llm_router.") for name in ours)
    assert not ours & published()


def test_the_version_of_the_conventions_is_a_published_one() -> None:
    assert names.SCHEMA_URL in {schema.value for schema in Schemas}


def test_providers_have_the_names_of_the_conventions_or_keep_their_own() -> None:
    values = importlib.import_module(f"{incubating.__name__}.gen_ai_attributes").GenAiProviderNameValues
    assert set(names.PROVIDERS.values()) <= {value.value for value in values}
    assert names.provider_name("azure") == "azure.ai.openai"
    assert names.provider_name("openrouter") == "openrouter"
    assert names.provider_name("") == "_OTHER"
