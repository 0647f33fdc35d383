"""Reading the configuration again over HTTP. A bad file changes nothing; the reply says what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from llm_router.admin.application import Audit, doer, json_response, read_body
from llm_router.errors import ConfigError, InvalidRequest


def routes(reload: Callable[[], list[str]], *, audit: Audit) -> list[Route]:
    """The endpoint `/admin/reload`.

    Args:
        reload: makes the new configuration the one in force; returns what needs a restart to take effect.
            Raises ConfigError and then has changed nothing.
    """

    async def post(request: Request) -> Response:
        await read_body(request, dict)
        try:
            needs_restart = reload()
        except ConfigError as error:
            audit("config_reloaded", **doer(request), success=False, problem=str(error))
            raise InvalidRequest(str(error), status=error.status, code=error.code, param=error.key or None) from error
        audit("config_reloaded", **doer(request), success=True, needs_restart=", ".join(needs_restart))
        return json_response({"reloaded": True, "needs_restart": needs_restart})

    return [Route("/admin/reload", post, methods=["POST"])]
