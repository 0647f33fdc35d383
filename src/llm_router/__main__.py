"""`python -m llm_router` is the command `llm-router`."""

from __future__ import annotations

from llm_router.cli import main

if __name__ == "__main__":
    main()
