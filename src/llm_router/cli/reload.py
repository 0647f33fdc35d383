"""`llm-router reload`: a running router reads its configuration again."""

from __future__ import annotations

from llm_router.cli.options import ConfigFile, DataDir


def reload(config: ConfigFile = None, data_dir: DataDir = None) -> None:
    """Let a running router read its configuration again. A bad file changes nothing, and is explained."""
    from llm_router.cli.control import call
    from llm_router.cli.options import settings_of

    answer = call(settings_of(config, data_dir=data_dir).server.control_socket, "POST", "/admin/reload", {})
    print("reloaded")
    for key in answer.get("needs_restart", ()):
        print(f"{key} takes effect after a restart")
