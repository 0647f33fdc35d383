"""The command `llm-router`: one command a file, errors in one line, exit status 2 for what the user can correct.

Commands import what they need when they run, so that `--help` and `serve` start fast.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from llm_router.errors import ConfigError, RouterError


def main() -> NoReturn:
    """Run the command that the arguments name, then exit: 0 done, 1 failed, 2 wrong usage or configuration."""
    from llm_router.cli.commands import build

    try:
        build()(prog_name="llm-router")
    except ConfigError as error:
        _leave(f"configuration: {error.message}", 2)
    except RouterError as error:
        _leave(error.message, 1)
    except BrokenPipeError:
        # Whoever read our output left, `llm-router models list | head -1`; nothing more can be said there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(0)


def _leave(message: str, status: int) -> NoReturn:
    print(f"llm-router: {message}", file=sys.stderr)
    sys.exit(status)
