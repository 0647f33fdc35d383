"""`llm-router keys`: make keys, list, change and revoke them, in a running router over its control socket.

A new key is printed once, alone on stdout, so that it can go straight into a file or a variable. Not for: what a key
may be (admin/keys.py checks it).
"""

from __future__ import annotations

import json
import math
import sys
import time
from datetime import UTC, datetime
from typing import Annotated, Any
from urllib.parse import quote

import typer

from llm_router.cli.help import Command, Group
from llm_router.cli.options import CannotAsk, ConfigFile, DataDir

_CREATE_EPILOG = """Examples:

- `llm-router keys create --name laptop`
- `llm-router keys create --name app --model gpt-4o-mini --expires 90d --limit requests_per_minute=60`
- `llm-router keys create --name prometheus --scope metrics:read > prometheus.key`

The key is shown this once: the router keeps only its hash.
"""

_LIMIT_EPILOG = """Examples:

- `llm-router keys limit app requests_per_minute=60 tokens_per_day=2000000`
- `llm-router keys limit app usd_per_month=50 warn_ratio=0.9`
- `llm-router keys limit app concurrency=0` takes that limit away
"""

_CHANGE_EPILOG = """Examples:

- `llm-router keys change app --model gpt-4o --model gpt-4o-mini`
- `llm-router keys change app --all-models --expires never`
"""

_PIPE_WIDTH = 10_000  # output that goes into a pipe is a line for each key

NameOrId = Annotated[str, typer.Argument(metavar="NAME|ID", help="The key, as `llm-router keys list` shows it.")]
Scopes = Annotated[
    list[str] | None,
    typer.Option("--scope", metavar="SCOPE", help="inference, metrics:read or admin; repeat it for more."),
]
Models = Annotated[
    list[str] | None,
    typer.Option("--model", metavar="MODEL", help="A model that it may ask; repeat it for more."),
]
Expires = Annotated[
    str | None,
    typer.Option("--expires", metavar="WHEN", help="From when on it is not valid: 30d, 12h, 2027-01-31, or never."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print what the router answers.")]


def build() -> typer.Typer:
    """The commands below `llm-router keys`."""
    app = typer.Typer(cls=Group, help="Create, list, change and revoke keys.", no_args_is_help=True)
    app.command("create", cls=Command, epilog=_CREATE_EPILOG)(create)
    app.command("list", cls=Command)(show)
    app.command("rename", cls=Command)(rename)
    app.command("limit", cls=Command, epilog=_LIMIT_EPILOG)(limit)
    app.command("change", cls=Command, epilog=_CHANGE_EPILOG)(change)
    app.command("revoke", cls=Command)(revoke)
    return app


def create(
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="Who will use it; shown in metrics and usage.")],
    scope: Scopes = None,
    model: Models = None,
    expires: Expires = None,
    limit: Annotated[
        list[str] | None,
        typer.Option("--limit", metavar="LIMIT=N", help="Like requests_per_minute=60 or usd_per_month=20."),
    ] = None,
    as_json: AsJson = False,
    config: ConfigFile = None,
    data_dir: DataDir = None,
) -> None:
    """Make a key and print it, this once. By default it is for inference with every model, and never expires."""
    wanted: dict[str, Any] = {"name": name, "models": model or [], "limits": dict(map(_limit, limit or ()))}
    if scope:
        wanted["scopes"] = scope
    if expires is not None:
        wanted["expires"] = _instant(expires)
    answer = _control(config, data_dir, "POST", "/admin/keys", wanted)
    if as_json:
        print(json.dumps(answer))
        return
    key = answer["key"]
    print(answer["secret"], flush=True)
    print(f"key {_described(key)}. It is not shown again.", file=sys.stderr)
    if answer.get("closes"):
        print(
            f"It is the first one for {' and '.join(answer['closes'])}: without a key that is closed now.",
            file=sys.stderr,
        )


def show(
    everything: Annotated[bool, typer.Option("--all", help="Revoked ones too.")] = False,
    as_json: AsJson = False,
    config: ConfigFile = None,
    data_dir: DataDir = None,
) -> None:
    """List the keys: what they are for, and when they were last used. Never the keys themselves."""
    from rich.console import Console
    from rich.table import Table

    answer = _control(config, data_dir, "GET", "/admin/keys" + ("?all=true" if everything else ""))
    if as_json:
        print(json.dumps(answer))
        return
    if not answer["keys"]:
        print("no keys; make one with `llm-router keys create --name NAME`")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    for title in ("name", "id", "state", "scopes", "models", "limits", "expires", "last used"):
        table.add_column(title, overflow="fold")
    for key in answer["keys"]:
        table.add_row(
            key["name"],
            key["id"],
            key["state"],
            " ".join(key["scopes"]),
            " ".join(key["models"]) or "all",
            " ".join(_limits(key)) or "none",
            _minute(key["expires"]),
            _minute(key["last_used"]),
        )
    console = Console()
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    console.print(table, markup=False)


def rename(
    key: NameOrId,
    name: Annotated[str, typer.Argument(metavar="NEW", help="What to call it from now on.")],
    config: ConfigFile = None,
    data_dir: DataDir = None,
) -> None:
    """Call a key something else. Its id, its text and its usage stay."""
    print(f"key {_described(_change(config, data_dir, key, {'name': name}))}")


def limit(
    key: NameOrId,
    limits: Annotated[list[str], typer.Argument(metavar="LIMIT=N", help="0 takes a limit away.")],
    config: ConfigFile = None,
    data_dir: DataDir = None,
) -> None:
    """Set limits of a key; those that are not named stay."""
    print(f"key {_described(_change(config, data_dir, key, {'limits': dict(map(_limit, limits))}))}")


def change(
    key: NameOrId,
    scope: Scopes = None,
    model: Models = None,
    all_models: Annotated[bool, typer.Option("--all-models", help="It may ask every model.")] = False,
    expires: Expires = None,
    config: ConfigFile = None,
    data_dir: DataDir = None,
) -> None:
    """Change what a key is for and how long it is valid; the options replace what was there."""
    if model and all_models:
        raise typer.BadParameter("either --model or --all-models", param_hint="--all-models")
    wanted: dict[str, Any] = {}
    if scope:
        wanted["scopes"] = scope
    if model or all_models:
        wanted["models"] = model or []
    if expires is not None:
        wanted["expires"] = _instant(expires)
    if not wanted:
        raise typer.BadParameter("say what to change", param_hint="OPTIONS")
    print(f"key {_described(_change(config, data_dir, key, wanted))}")


def revoke(key: NameOrId, config: ConfigFile = None, data_dir: DataDir = None) -> None:
    """End a key: within a second nothing accepts it any more. Its usage stays."""
    id = _id_of(config, data_dir, key)
    revoked = _control(config, data_dir, "DELETE", f"/admin/keys/{quote(id, safe='')}")["key"]
    print(f"key {revoked['name']} ({revoked['id']}) is revoked")


def _control(
    config: str | None, data_dir: str | None, method: str, path: str, body: dict[str, Any] | None = None
) -> Any:
    from llm_router.cli.control import call
    from llm_router.cli.options import settings_of

    # Model files that are missing are no reason to keep a key that should be revoked.
    server = settings_of(config, data_dir=data_dir, files_needed=False).server
    return call(server.control_socket, method, path, body)


def _change(config: str | None, data_dir: str | None, key: str, wanted: dict[str, Any]) -> Any:
    id = _id_of(config, data_dir, key)
    return _control(config, data_dir, "PATCH", f"/admin/keys/{quote(id, safe='')}", wanted)["key"]


def _id_of(config: str | None, data_dir: str | None, key: str) -> str:
    """The id of the key that is called so, or has this id."""
    keys = _control(config, data_dir, "GET", "/admin/keys")["keys"]
    for field in ("id", "name"):
        for found in keys:
            if found[field] == key:
                return str(found["id"])
    raise CannotAsk(f"there is no key {key!r}; `llm-router keys list` shows them")


def _limit(text: str) -> tuple[str, float]:
    """`requests_per_minute=60` as a pair."""
    kind, _, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not kind or not math.isfinite(number):
        raise typer.BadParameter(f"{text!r} should look like requests_per_minute=60", param_hint="LIMIT")
    return kind, int(number) if number.is_integer() else number


def _instant(text: str) -> str | None:
    """When a key expires, as the router reads it; None for never."""
    from llm_router.config.units import seconds

    if text == "never":
        return None
    try:
        expires = datetime.fromtimestamp(time.time() + seconds(text), UTC)
    except (ValueError, OverflowError, OSError):
        try:
            expires = datetime.fromisoformat(text)
        except ValueError:
            raise typer.BadParameter(
                f"{text!r} is neither a time from now, like 30d, nor a date, like 2027-01-31, nor never",
                param_hint="--expires",
            ) from None
    # A date without a zone is that of whoever types it.
    return (expires if expires.tzinfo is not None else expires.astimezone()).isoformat()


def _described(key: Any) -> str:
    """A key in one line."""
    parts = [" ".join(key["scopes"])]
    if key["models"]:
        parts.append(f"models {' '.join(key['models'])}")
    parts += _limits(key)
    if key["expires"]:
        parts.append(f"until {_minute(key['expires'])}")
    return f"{key['name']} ({key['id']}): {', '.join(parts)}"


def _limits(key: Any) -> list[str]:
    """The limits that are set; when to warn says something only where there is a budget."""
    limits = key["limits"]
    has_budget = limits["usd_per_day"] or limits["usd_per_month"]
    return [
        f"{kind}={value:g}" if isinstance(value, float) else f"{kind}={value}"
        for kind, value in limits.items()
        if value and (kind != "warn_ratio" or has_budget)
    ]


def _minute(time: str | None) -> str:
    """An instant without seconds, UTC; `never` for none."""
    return "never" if time is None else time[:16].replace("T", " ") + "Z"
