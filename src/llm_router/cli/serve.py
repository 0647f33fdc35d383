"""`llm-router serve`: checks the configuration, then becomes the supervisor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from llm_router import __version__
from llm_router.cli.options import ConfigFile, DataDir, reachable

if TYPE_CHECKING:
    from llm_router.config import Settings
    from llm_router.processes.plan import LaunchPlan

EPILOG = """Examples:

- `llm-router serve` on 127.0.0.1:3006 and, for Prometheus, 127.0.0.1:9090
- `llm-router serve --port 4000 --workers auto`
- `llm-router serve --config production.yaml --host 0.0.0.0`

Ctrl-C or SIGTERM stops it: requests in flight finish first. SIGHUP reads the configuration again."""

DEFAULT_PROMPT = "Say hello in one sentence."


def serve(
    config: ConfigFile = None,
    host: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Where the API listens.  [env: HOST; default: 127.0.0.1]")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(metavar="PORT", help="Port of the API; 0 takes a free one.  [env: PORT; default: 3006]"),
    ] = None,
    metrics_port: Annotated[
        str | None,
        typer.Option(metavar="PORT", help="Port for Prometheus, or off.  [env: METRICS_PORT; default: 9090]"),
    ] = None,
    workers: Annotated[
        str | None, typer.Option(metavar="N", help="Processes that serve requests, or auto: one a CPU.  [default: 1]")
    ] = None,
    data_dir: DataDir = None,
    log_dir: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Log files.  [env: LOG_DIR; default: logs in the data folder]")
    ] = None,
    drain: Annotated[
        str | None,
        typer.Option(metavar="DURATION", help="How long requests in flight may take at a stop.  [default: 30s]"),
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Ask no other machine for a key either.")] = False,
) -> None:
    """Start the router: an OpenAI-compatible API, with its monitoring."""
    overrides = {
        "host": host,
        "port": port,
        "metrics_port": metrics_port,
        "workers": workers,
        "data_dir": data_dir,
        "log_dir": log_dir,
        "drain": drain,
        "insecure": insecure or None,
    }
    from llm_router.processes.plan import become_supervisor

    become_supervisor(plan_of(config, {name: value for name, value in overrides.items() if value is not None}))


def plan_of(config: str | None, overrides: dict[str, Any]) -> LaunchPlan:
    """The plan of a router with this configuration.

    Raises: ConfigError, also for broken model files and a custom policy that cannot be had.
    """
    from llm_router.cli.check import check_models, check_policy
    from llm_router.cli.options import settings_of
    from llm_router.processes.plan import LaunchPlan

    settings = settings_of(config, **overrides)
    check_models(settings)
    check_policy(settings)
    server = settings.server
    return LaunchPlan(
        data_dir=server.data_dir,
        log_dir=server.log_dir,
        config_path=settings.source,
        overrides=overrides,
        host=server.host,
        port=server.port,
        metrics_host=server.metrics_host,
        metrics_port=server.metrics_port,
        workers=server.workers,
        drain_s=server.drain_s,
        banner=banner(settings),
        console=settings.logs.console,
        log_level=settings.logs.level,
        log_levels=settings.logs.levels,
        service=settings.tracing.service_name,
        environment=server.environment,
    )


def banner(settings: Settings) -> str:
    """What is printed when the router is ready: addresses, and one request that answers.

    Ports that are chosen at the start stand as `{port}` and `{metrics_port}`, and `{key}` where a key would be shown, for
    who knows them to fill in.
    """
    server = settings.server
    api = f"{server.scheme}://{reachable(server.host)}:{server.port or '{port}'}"
    lines = [f"LLM Runner Router {__version__} is ready.", f"  API      {api}/v1"]
    monitoring = api
    if server.metrics_port >= 0:
        monitoring = f"http://{reachable(server.metrics_host)}:{server.metrics_port or '{metrics_port}'}"
    if settings.metrics.enabled:
        lines.append(f"  metrics  {monitoring}{settings.metrics.endpoint}")
    if settings.health.enabled:
        lines.append(f"  health   {monitoring}{settings.health.endpoint}")
    lines += [f"  note     {note}" for note in settings.notes]
    if settings.routing.default_model:
        body = (
            f'{{"model": "{settings.routing.default_model}", '
            f'"messages": [{{"role": "user", "content": "{DEFAULT_PROMPT}"}}]}}'
        )
        lines += [
            "Try:",
            f"  curl {api}/v1/chat/completions{{key}} -H 'content-type: application/json' \\",
            f"    -d '{body}'",
        ]
    lines.append("Ctrl-C stops it.")
    return "\n".join(lines)
