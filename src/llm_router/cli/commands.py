"""The tree of commands, and the options that several of them share.

Not for: what a command does; each has a file of its own.
"""

from __future__ import annotations

from typing import Annotated

import typer

from llm_router import __version__
from llm_router.cli import bench, chat, check, keys, models, profile, reload, serve, trace
from llm_router.cli.help import Command, Group
from llm_router.cli.logs import command as logs

_EPILOG = """A first look:

- `llm-router models pull smollm2-135m-instruct` fetches a small model
- `llm-router serve` runs it
- `llm-router chat "Say hello."`, in another terminal, talks to it
"""


def build() -> typer.Typer:
    """The application, ready to be called."""
    app = typer.Typer(
        name="llm-router",
        cls=Group,
        help="Runs language models, routes requests to them, and shows what happens.",
        epilog=_EPILOG,
        no_args_is_help=True,
        pretty_exceptions_enable=False,  # a traceback of ours belongs into a bug report, plain
        rich_markup_mode="markdown",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    app.command("serve", cls=Command, epilog=serve.EPILOG)(serve.serve)
    app.command("chat", cls=Command, epilog=chat.EPILOG)(chat.chat)
    app.add_typer(models.build(), name="models")
    app.add_typer(keys.build(), name="keys")
    app.command("check", cls=Command, epilog=check.EPILOG)(check.check)
    app.command("reload", cls=Command)(reload.reload)
    app.command("logs", cls=Command, epilog=logs.EPILOG)(logs.logs)
    app.command("profile", cls=Command, epilog=profile.EPILOG)(profile.profile)
    app.command("trace", cls=Command, epilog=trace.EPILOG)(trace.trace)
    app.command("bench", cls=Command, epilog=bench.EPILOG)(bench.bench)
    return app


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and leave.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


def _version(wanted: bool) -> None:
    if wanted:
        print(f"llm-router {__version__}")
        raise typer.Exit
