"""`llm-router models`: which local models there are, load and unload them, fetch new ones.

All but `pull` ask a running router over its control socket.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llm_router.cli.help import Command, Group
from llm_router.cli.options import ConfigFile, DataDir

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

_PULL_EPILOG = """Examples:

- `llm-router models pull smollm2-135m-instruct`: a small model to begin with
- `llm-router models pull https://example.org/model.gguf --name mine`
- `llm-router models pull hf:OWNER/REPOSITORY/FILE.gguf`
"""

_LOAD_EPILOG = """Examples:

- `llm-router models load mistral-7b`
- `llm-router models load mistral-7b --option context_size=8192 --option parallel=4`
"""


def build() -> typer.Typer:
    """The commands below `llm-router models`."""
    app = typer.Typer(cls=Group, help="List, load, unload and fetch local models.", no_args_is_help=True)
    app.command("list", cls=Command)(show)
    app.command("load", cls=Command, epilog=_LOAD_EPILOG)(load)
    app.command("unload", cls=Command)(unload)
    app.command("pull", cls=Command, epilog=_PULL_EPILOG)(pull)
    return app


def show(config: ConfigFile = None, data_dir: DataDir = None) -> None:
    """List the local models of a running router and what they are doing."""
    from rich.console import Console
    from rich.table import Table

    models = _control(config, data_dir, "GET", "/admin/models")["models"]
    if not models:
        print("no models; fetch one with `llm-router models pull smollm2-135m-instruct`")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    for title in ("model", "state", "file", "size", "memory"):
        table.add_column(title, justify="right" if title in {"size", "memory"} else "left", overflow="fold")
    for model in models:
        state = "unusable" if model["state"] == "available" and model.get("error") else model["state"]
        table.add_row(model["name"], state, model["file"], _size(model["size_bytes"]), _size(model.get("memory_bytes")))
    _wide(Console()).print(table)
    problems = [f"{model['name']}: {model['error']}" for model in models if model.get("error")]
    if problems:
        print("\n" + "\n".join(problems))


def load(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A configured model, or a file of the models folder without .gguf.")
    ],
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option", "-o", metavar="KEY=VALUE", help="How to run it, as below `runner` in the configuration."
        ),
    ] = None,
    config: ConfigFile = None,
    data_dir: DataDir = None,
) -> None:
    """Load a model into a running router; returns when it serves."""
    options = dict(_option(text) for text in option or ())
    model = _control(config, data_dir, "POST", "/admin/models/load", {"name": name, "options": options})["model"]
    took = f" in {model['load_s']:.1f} s" if model.get("load_s") is not None else ""
    memory = f", {_size(model['memory_bytes'])}" if model.get("memory_bytes") else ""
    print(f"{model['name']}: {model['state']}{took}{memory}")


def unload(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A loaded model.")],
    config: ConfigFile = None,
    data_dir: DataDir = None,
) -> None:
    """Unload a model: its requests finish, then its memory is free."""
    model = _control(config, data_dir, "POST", "/admin/models/unload", {"name": name})["model"]
    print(f"{model['name']}: unloaded")


def pull(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A known name, an https URL, or hf:OWNER/REPOSITORY/FILE.gguf.")
    ],
    name: Annotated[
        str, typer.Option("--name", metavar="NAME", help="What to call it.  [default: the name of the file]")
    ] = "",
    replace: Annotated[bool, typer.Option("--replace", help="Fetch again what is there already.")] = False,
    config: ConfigFile = None,
    data_dir: DataDir = None,
) -> None:
    """Fetch a model file into the models folder, for `models load`. A known model that is there already is kept."""
    from llm_router.cli.options import settings_of
    from llm_router.models.pull import pull as fetch

    # The configuration may name the very file that is to be fetched: only the folder is asked of it.
    models_dir = settings_of(config, data_dir=data_dir, files_needed=False).server.models_dir
    with _progress(source) as progress:
        path = fetch(source, models_dir, progress.report, name=name, replace=replace)
    print(f"{path.stem}: {'fetched into' if progress.was_needed else 'already in'} {path.parent}")


class _Bar:
    """A progress bar on a terminal; elsewhere one line, so that a log shows what takes so long."""

    def __init__(self, source: str, bar: Progress) -> None:
        self._source = source
        self._bar = bar
        self._task: TaskID | None = None
        self._most = 0
        self.was_needed = False

    def report(self, done: int, total: int) -> None:
        self.was_needed = True
        if self._task is None:
            if not self._bar.console.is_terminal:
                print(f"fetching {self._source}" + (f" ({_size(total)})" if total else ""), flush=True)
            self._task = self._bar.add_task(f"fetching {self._source}", total=total or None)
        # pip moves its file out of sight before it is done: a bar that falls back would look like a fault.
        self._most = max(self._most, done)
        self._bar.update(self._task, completed=self._most, total=total or None)


@contextlib.contextmanager
def _progress(source: str) -> Iterator[_Bar]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield _Bar(source, bar)


def _control(
    config: str | None, data_dir: str | None, method: str, path: str, body: dict[str, Any] | None = None
) -> Any:
    from llm_router.cli.control import call
    from llm_router.cli.options import settings_of

    return call(settings_of(config, data_dir=data_dir).server.control_socket, method, path, body)


def _option(text: str) -> tuple[str, Any]:
    """`context_size=8192` as a pair; numbers and true or false become what they look like."""
    import yaml

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise typer.BadParameter(f"{text!r} should look like context_size=8192", param_hint="--option")
    return key, yaml.safe_load(value)


def _size(count: int | None) -> str:
    """Bytes in the unit that a person would choose; nothing for none."""
    if not count:
        return ""
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:.0f} MB" if count >= 1e6 else f"{math.ceil(count / 1e3)} kB"


def _wide(console: Console) -> Console:
    """Output that goes into a pipe is not folded to 80 columns."""
    if not console.is_terminal:
        console.width = 200
    return console
