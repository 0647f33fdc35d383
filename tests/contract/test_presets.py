"""Each preset against a scripted server in its place: where a request goes, how the key is sent, what is understood.

The servers' addresses are their public ones, but for scheme and host. What an answer costs comes from the price list.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import msgspec
import pytest

from llm_router.config import load
from llm_router.config.settings import Settings
from llm_router.models import price_list
from llm_router.processes.tables import routing_table
from llm_router.testing import ScriptedBackend, framed, json_reply, stream_head
from support import anthropic, chats
from support.gateway import Gateway

KEY = "sk-of-the-provider"
BEARER = {"authorization": f"Bearer {KEY}"}
AZURE = "https://name.openai.azure.com"


class Case(NamedTuple):
    """A preset, and what its server expects.

    Args:
        more: further keys of the backend.
        model: the name that the server knows it by.
        target: of a chat.
        credentials: the headers that show the key; no other one may.
        is_sold: whether the price list knows what the model costs there; else it costs nothing.
    """

    preset: str
    model: str
    target: str
    credentials: dict[str, str]
    more: str = ""
    is_sold: bool = True
    has_key: bool = True
    is_anthropic: bool = False


CASES = {
    "openai": Case("openai", "gpt-4o-mini", "/v1/chat/completions", BEARER),
    "azure": Case("azure", "gpt-4o", "/openai/v1/chat/completions", {"api-key": KEY}, f', url: "{AZURE}"'),
    "azure deployment": Case(
        "azure",
        "gpt-4o",
        "/openai/deployments/gpt-4o/chat/completions?api-version=2024-10-21",
        {"api-key": KEY},
        f', url: "{AZURE}/openai/deployments/{{model}}"',
    ),
    "openrouter": Case("openrouter", "openai/gpt-4o", "/api/v1/chat/completions", BEARER),
    "ollama": Case("ollama", "llama3.2:1b", "/v1/chat/completions", {}, is_sold=False, has_key=False),
    "vllm": Case("vllm", "meta-llama/Llama-3.1-8B-Instruct", "/v1/chat/completions", {}, is_sold=False, has_key=False),
    "llama-server": Case("llama-server", "any", "/v1/chat/completions", BEARER, is_sold=False),
    "anthropic": Case("anthropic", "claude-sonnet-4-5", "/v1/messages", {"x-api-key": KEY}, is_anthropic=True),
}
CREDENTIALS = ("authorization", "api-key", "x-api-key")


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def configured(folder: Path, case: Case, server: ScriptedBackend) -> Settings:
    """The settings of a file with the preset; its backend's address leads to the scripted server."""
    key = f", api_key: {KEY}" if case.has_key else ""
    (folder / "r.yaml").write_text(
        f"backends: [{{name: b, preset: {case.preset}{key}{case.more}}}]\n"
        f'models: [{{name: m, deployments: [{{backend: b, model: "{case.model}"}}]}}]\n'
    )
    settings = load(str(folder / "r.yaml"), {"DATA_DIR": str(folder)}, {})
    (backend,) = settings.backends
    there = msgspec.structs.replace(backend, url=f"http://127.0.0.1:{server.port}{urlsplit(backend.url).path}")
    return msgspec.structs.replace(settings, backends=(there,))


def test_a_preset_reaches_its_server_and_counts_what_it_costs(tmp_path: Path, case: Case) -> None:
    """Plain and as a stream, whose usage is asked for and hidden."""
    whole: dict[str, Any] = anthropic.message() if case.is_anthropic else chats.completion()
    events = anthropic.stream(whole) if case.is_anthropic else chats.stream(whole)
    with ScriptedBackend() as server:
        settings = configured(tmp_path, case, server)
        with Gateway(routing_table(settings, (), {}, prices=price_list.find)) as gateway:
            server.script(json_reply(whole))
            answer = gateway.chat(max_tokens=9)
            assert (answer.status, answer.json()["choices"][0]["message"]["role"]) == (200, "assistant")
            server.script(stream_head(), framed(events), framed(b""))
            stream = gateway.chat(max_tokens=9, stream=True)
            assert stream.status == 200
            assert b'"usage":{' not in stream.body.replace(b" ", b"")
            records = gateway.records(2)
    for sent in server.requests:
        assert (sent.method, sent.target) == ("POST", case.target)
        assert {name: sent.headers[name] for name in CREDENTIALS if name in sent.headers} == case.credentials
        assert json.loads(sent.body)["model"] == case.model
    asked = server.requests[1].json()
    assert case.is_anthropic or asked["stream_options"] == {"include_usage": True}
    for record in records:
        tokens = (record.input_tokens, record.output_tokens, record.cached_tokens, record.reasoning_tokens)
        assert (record.usage_source, record.cost_status, tokens) == ("provider", "exact", (10, 7, 3, 4))
        assert (record.cost_usd > 0) is case.is_sold
