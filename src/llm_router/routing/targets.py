"""What the router keeps of each model and deployment while a table is in force. Not for: choosing or asking them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llm_router.backends.base import Backend
from llm_router.chat import Endpoint
from llm_router.routing.breaker import Breaker
from llm_router.routing.policies import Policy
from llm_router.routing.queue import ModelQueue
from llm_router.routing.speed import Speed
from llm_router.routing.table import BackendSpec, Deployment, ModelSpec, QueueSpec

_ONLY_CHATS = frozenset({Endpoint.CHAT, Endpoint.MESSAGES})


class Target:
    """A deployment: its backend, and the model's name there. What a policy sees as a candidate.

    Args:
        elsewhere: requests that other processes have in flight, by backend; read when asked.
        speed: None where nothing ever chooses by it, so that it need not be measured.
    """

    __slots__ = (
        "_elsewhere",
        "backend",
        "breaker",
        "capabilities",
        "context_tokens",
        "deployment",
        "is_measured",
        "name",
        "price",
        "quality",
        "speed",
        "upstream_model",
    )

    def __init__(
        self,
        deployment: Deployment,
        backend: Backend,
        breaker: Breaker,
        speed: Speed | None,
        elsewhere: Mapping[str, int],
    ) -> None:
        self._elsewhere = elsewhere
        self.deployment = deployment
        self.backend = backend
        self.breaker = breaker
        self.name = backend.name
        self.upstream_model = deployment.upstream_model
        self.quality = deployment.quality
        self.price = deployment.price
        self.context_tokens = deployment.context_tokens
        self.capabilities = None if deployment.capabilities is None else frozenset(deployment.capabilities)
        self.is_measured = speed is not None
        self.speed = speed or Speed()

    def __repr__(self) -> str:
        return f"<Target {self.name} {self.upstream_model!r} {self.breaker.state.name}>"

    @property
    def key(self) -> tuple[str, str]:
        """The same deployment in a later table, or of another model, has the same one."""
        return (self.name, self.upstream_model)

    @property
    def in_use(self) -> int:
        return self.backend.in_use + self._elsewhere.get(self.name, 0)

    def measure(self, now: float, total_s: float, first_byte_s: float | None, output_tokens: int) -> None:
        """A reply came whole; see `Speed.observe`. Only where `is_measured`."""
        self.speed.observe(now, total_s, first_byte_s, output_tokens)


class Model:
    """A model with the targets that are up, its policy and its queue, which outlives the table."""

    __slots__ = ("_candidates", "fallbacks", "is_ready", "name", "policy", "queue", "spec", "wait_s")

    def __init__(
        self,
        spec: ModelSpec,
        targets: Sequence[Target],
        backends: Mapping[str, BackendSpec],
        policy: Policy,
        queue: ModelQueue,
    ) -> None:
        self.spec = spec
        self.name = spec.name
        self.fallbacks = spec.fallbacks
        self.policy = policy
        self.queue = queue
        self.wait_s = spec.queue.wait_s
        ready = tuple(target for target in targets if backends[target.name].ready)
        self.is_ready = bool(ready)
        # If no backend serves an endpoint, they are asked all the same: they explain best why not.
        self._candidates = {
            endpoint: tuple(target for target in ready if _serves(backends[target.name], endpoint)) or ready
            for endpoint in Endpoint
        }

    def __repr__(self) -> str:
        return f"<Model {self.name} {self._candidates[Endpoint.CHAT]} {self.queue}>"

    def candidates(self, endpoint: Endpoint) -> Sequence[Target]:
        """The deployments that are up and serve it; none while no backend of the model is up."""
        return self._candidates[endpoint]


def _serves(spec: BackendSpec, endpoint: Endpoint) -> bool:
    if spec.protocol == "anthropic":
        return endpoint in _ONLY_CHATS
    return endpoint is not Endpoint.EMBEDDING or spec.embeddings is not False


def slots_of(spec: QueueSpec, backends: Sequence[BackendSpec], workers: int) -> int:
    """One worker's part of a model's slots.

    Without a number of slots it is what the backends take: `max_connections` is a bound of each worker for remote
    ones, while a local model's runner is there once.
    """
    if spec.slots:
        return part_of(spec.slots, workers)
    total = sum(
        part_of(backend.max_connections, workers) if backend.local_model else backend.max_connections
        for backend in backends
    )
    return max(1, total)


def places_of(spec: QueueSpec, workers: int) -> int:
    """One worker's part of the places in a model's queue; none if nobody waits for any time."""
    return part_of(spec.max_waiting, workers) if spec.wait_s > 0 else 0


def part_of(bound: int, workers: int) -> int:
    """One worker's part of a bound of the whole router: rounded up, so that a bound of 1 leaves one to each."""
    return -(-bound // workers)
