"""Asks one deployment something, the way a request would be sent, and unseen by everything that counts requests.

A router of one deployment over connections of its own: no metrics, no keys, no limits, no cache, no circuit, no queue of
the router's. Requests of users that come meanwhile share the backend with it, so what is asked should be small.
Importing this takes 25 ms, with all that it needs: `asking.ask` does when it has to. Not for: deciding whom to ask.
"""

from __future__ import annotations

import asyncio
import random
import time
from typing import Final
from urllib.parse import urlsplit

import msgspec

from llm_router.backends.connections import Connections
from llm_router.backends.messages_as_chat import is_openai
from llm_router.backends.openai_compatible import message_in
from llm_router.chat import NOT_JSON, Endpoint
from llm_router.errors import BackendRejected, BackendTimeout, BadReply
from llm_router.gateway.generate import generated
from llm_router.gateway.openai import read_request
from llm_router.processes.probes.asking import Answer, embeds
from llm_router.routing.exchange import Exchange
from llm_router.routing.router import Router
from llm_router.routing.table import BackendSpec, BreakerSpec, Deployment, ModelSpec, RetrySpec, RoutingTable
from llm_router.signals import NoRecorder, RequestRecord

_PROBLEM_CHARACTERS: Final = 200

_encode = msgspec.json.Encoder().encode


class _Embedding(msgspec.Struct):
    embedding: msgspec.Raw


class _Embeddings(msgspec.Struct):
    data: list[_Embedding]


_decode_embeddings = msgspec.json.Decoder(_Embeddings).decode


async def ask(spec: BackendSpec, deployment: Deployment, prompt: str, *, max_tokens: int, timeout_s: float) -> Answer:
    """As `asking.ask`."""
    connections = Connections(NoRecorder())
    router = Router(
        open_backend=connections.open,
        close_backend=connections.retire,
        on_backend=lambda name, is_up: None,
        clock=time.monotonic,
        rng=random.Random(),
    )
    # One connection and no timeouts of its own: nobody sweeps this router, it is bounded as a whole.
    own = msgspec.structs.replace(spec, ready=True, max_connections=1)
    model = deployment.upstream_model
    router.update(
        RoutingTable(
            models=(ModelSpec(name=model, deployments=(deployment,)),),
            backends=(own,),
            retry=RetrySpec(attempts=1),
            breaker=BreakerSpec(enabled=False),
        )
    )
    endpoint = Endpoint.EMBEDDING if embeds(spec, deployment) else Endpoint.CHAT
    request = read_request(endpoint, _body(spec, model, endpoint, prompt, max_tokens))
    begin = time.monotonic()
    exchange: Exchange | None = None
    try:
        async with asyncio.timeout(timeout_s):
            exchange = await router.send(request, RequestRecord("POST", "probe", "health-check", begin))
            return _answer(exchange, spec, deployment, endpoint, time.monotonic() - begin)
    except TimeoutError:
        raise BackendTimeout(spec.name, "total", timeout_s) from None
    finally:
        if exchange is not None:
            exchange.finish(time.monotonic(), "cancelled")
        await connections.aclose()


def _body(spec: BackendSpec, model: str, endpoint: Endpoint, prompt: str, max_tokens: int) -> bytes:
    if endpoint is Endpoint.EMBEDDING:
        return _encode({"model": model, "input": prompt})
    bound = "max_completion_tokens" if is_openai(urlsplit(spec.url).hostname or "") else "max_tokens"
    return _encode({"model": model, "messages": [{"role": "user", "content": prompt}], bound: max_tokens})


def _answer(
    exchange: Exchange, spec: BackendSpec, deployment: Deployment, endpoint: Endpoint, latency_s: float
) -> Answer:
    body = exchange.body
    if exchange.status != 200:
        said = " ".join(message_in(body).split())[:_PROBLEM_CHARACTERS]
        problem = f"answered {exchange.status}{': ' if said else ''}{said}"
        raise BackendRejected(spec.name, exchange.status, problem, exchange.retry_after_s)
    text = ""
    if endpoint is Endpoint.EMBEDDING:
        try:
            if not _decode_embeddings(body).data:
                raise BadReply(spec.name, "its reply holds no embedding")
        except NOT_JSON:
            raise BadReply(spec.name, "its reply holds no embedding") from None
    else:
        text = generated(body, spec.name, model="", strategy="", latency_ms=0.0).text
    usage, price = exchange.usage, deployment.price
    cost_usd = None if usage is None or price is None else price.cost_usd(usage)
    return Answer(text=text, usage=usage, cost_usd=cost_usd, latency_s=latency_s)
