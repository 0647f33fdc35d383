"""What a probe asks one deployment: something small, the way a request would be sent, at a price that is known before.

Not for: how it is sent (lone_router.py), whom to ask, or what an answer means (inference.py, validation.py).
"""

from __future__ import annotations

from typing import Final

import msgspec

from llm_router.chat import Usage
from llm_router.models.prices import Price
from llm_router.routing.table import BackendSpec, Deployment

TIMEOUT_S: Final = 30.0
"""For a generation, unless configured otherwise. A model of 8 billion parameters takes three seconds for a few tokens on
two CPU cores, several times that when it has to be read from the disk again, or another one computes meanwhile."""

_OVERHEAD_TOKENS: Final = 64  # chat templates; what providers add of their own is less


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What came back. `text` is empty for an embedding; `cost_usd` is None where usage or price are not known."""

    text: str
    usage: Usage | None
    cost_usd: float | None
    latency_s: float


def embeds(spec: BackendSpec, deployment: Deployment) -> bool:
    """Whether it does nothing but embed: then it is asked for that."""
    return spec.only_embeds or deployment.capabilities == ("embeddings",)


def most_usd(price: Price, prompt: str, max_tokens: int) -> float:
    """What asking can cost at the most: every byte a token, and each token the dearest there is."""
    return price.dearest() * (len(prompt.encode()) + _OVERHEAD_TOKENS + max_tokens) / 1_000_000


async def ask(spec: BackendSpec, deployment: Deployment, prompt: str, *, max_tokens: int, timeout_s: float) -> Answer:
    """The deployment's answer. One attempt.

    Raises: RouterError in words for people, without the backend's credentials. Cancelling it cuts the connection.
    """
    # Not before there is something to ask: it brings all along that sends requests, and control is to be ready first.
    from llm_router.processes.probes import lone_router

    return await lone_router.ask(spec, deployment, prompt, max_tokens=max_tokens, timeout_s=timeout_s)
