"""The names of spans and attributes: OpenTelemetry's semantic conventions, and ours where there are none.

The one place that changes when the conventions do. HTTP, URL, client, server, error and network names are stable. The `gen_ai.*`
names are in development: they are those of OpenTelemetry's GenAI conventions as of version 1.41 and of the repository of
their own that they have since moved to, and only such of them as both have. Not for: who gets which (spans.py).

Source: https://opentelemetry.io/docs/specs/semconv/http/http-spans/, https://github.com/open-telemetry/semantic-conventions-genai
"""

from __future__ import annotations

from typing import Final

SEMCONV_VERSION: Final = "1.44.0"
SCHEMA_URL: Final = f"https://opentelemetry.io/schemas/{SEMCONV_VERSION}"

# -- HTTP ----------------------------------------------------------------------------------------------

HTTP_METHOD: Final = "http.request.method"
HTTP_METHOD_ORIGINAL: Final = "http.request.method_original"
HTTP_ROUTE: Final = "http.route"
HTTP_STATUS: Final = "http.response.status_code"
URL_SCHEME: Final = "url.scheme"
URL_PATH: Final = "url.path"
URL_QUERY: Final = "url.query"
USER_AGENT: Final = "user_agent.original"
CLIENT_ADDRESS: Final = "client.address"
CLIENT_PORT: Final = "client.port"
SERVER_ADDRESS: Final = "server.address"
SERVER_PORT: Final = "server.port"
ERROR_TYPE: Final = "error.type"

OTHER_METHOD: Final = "_OTHER"
METHODS: Final = frozenset(("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "QUERY"))
"""Anything else is `_OTHER`, and the span's name says HTTP."""

# -- GenAI ---------------------------------------------------------------------------------------------

OPERATION: Final = "gen_ai.operation.name"
PROVIDER: Final = "gen_ai.provider.name"
REQUEST_MODEL: Final = "gen_ai.request.model"
REQUEST_STREAM: Final = "gen_ai.request.stream"
TIME_TO_FIRST_CHUNK: Final = "gen_ai.response.time_to_first_chunk"
INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
CACHE_READ_TOKENS: Final = "gen_ai.usage.cache_read.input_tokens"
REASONING_TOKENS: Final = "gen_ai.usage.reasoning.output_tokens"
INPUT_MESSAGES: Final = "gen_ai.input.messages"
OUTPUT_MESSAGES: Final = "gen_ai.output.messages"

CHAT: Final = "chat"
OPERATIONS: Final = {"/v1/completions": "text_completion", "/v1/embeddings": "embeddings"}
"""By route; everything else that is an inference is a chat."""

PROVIDERS: Final = {
    "openai": "openai",
    "anthropic": "anthropic",
    "azure": "azure.ai.openai",
    "aws": "aws.bedrock",
    "google": "gcp.gemini",
    "cohere": "cohere",
    "deepseek": "deepseek",
    "groq": "groq",
    "mistral": "mistral_ai",
    "perplexity": "perplexity",
    "x-ai": "x_ai",
}
"""By the ids of price lists, which configurations use; a provider that the conventions do not know keeps its id."""

UNKNOWN_PROVIDER: Final = "_OTHER"

# -- resource ------------------------------------------------------------------------------------------

SERVICE_NAME: Final = "service.name"
SERVICE_VERSION: Final = "service.version"
ENVIRONMENT: Final = "deployment.environment.name"
HOST_NAME: Final = "host.name"
SDK_LANGUAGE: Final = "telemetry.sdk.language"
SDK_NAME: Final = "telemetry.sdk.name"
SDK_VERSION: Final = "telemetry.sdk.version"

# -- ours ----------------------------------------------------------------------------------------------

REQUEST_ID: Final = "llm_router.request_id"
PROCESS: Final = "llm_router.process"
KEPT: Final = "llm_router.kept"
KEY: Final = "llm_router.key"
MODEL: Final = "llm_router.model"
BACKEND: Final = "llm_router.backend"
STRATEGY: Final = "llm_router.strategy"
REASON: Final = "llm_router.reason"
OUTCOME: Final = "llm_router.outcome"
ERROR: Final = "llm_router.error"
ATTEMPT: Final = "llm_router.attempt"
ATTEMPTS: Final = "llm_router.attempts"
RETRIES: Final = "llm_router.retries"
FALLBACKS: Final = "llm_router.fallbacks"
CACHE: Final = "llm_router.cache"
CACHED: Final = "llm_router.cached"
LIMIT_SCOPE: Final = "llm_router.limit.scope"
LIMIT: Final = "llm_router.limit.name"
COST_USD: Final = "llm_router.cost_usd"
USAGE_SOURCE: Final = "llm_router.usage_source"

STANDARD: Final = (
    HTTP_METHOD, HTTP_METHOD_ORIGINAL, HTTP_ROUTE, HTTP_STATUS, URL_SCHEME, URL_PATH, URL_QUERY, USER_AGENT,
    CLIENT_ADDRESS, CLIENT_PORT, SERVER_ADDRESS, SERVER_PORT, ERROR_TYPE, OPERATION, PROVIDER, REQUEST_MODEL,
    REQUEST_STREAM, TIME_TO_FIRST_CHUNK, INPUT_TOKENS, OUTPUT_TOKENS, CACHE_READ_TOKENS, REASONING_TOKENS,
    INPUT_MESSAGES, OUTPUT_MESSAGES, SERVICE_NAME, SERVICE_VERSION, ENVIRONMENT, HOST_NAME, SDK_LANGUAGE, SDK_NAME,
    SDK_VERSION,
)  # fmt: skip
"""What the conventions define, for the test that holds this table to them."""

# -- steps of a request --------------------------------------------------------------------------------

RECEIVE: Final = "receive"
AUTH: Final = "auth"
LIMITS: Final = "limits"
CACHE_LOOKUP: Final = "cache"
QUEUE: Final = "queue"
ROUTE: Final = "route"
FIRST_TOKEN: Final = "first token"  # noqa: S105  # no password
STREAM: Final = "stream"


def provider_name(id: str) -> str:
    """The provider's name in the conventions, from its id in the configuration; `_OTHER` if it has none."""
    return PROVIDERS.get(id, id) or UNKNOWN_PROVIDER
