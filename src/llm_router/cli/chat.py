"""`llm-router chat`: talk to a model of a running router; answers appear as they are generated.

One-shot output is the bare answer, so that it can be piped.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import sys
from collections.abc import Iterator
from typing import Annotated, Any, Final

import typer

from llm_router.cli.options import ApiKey, CannotAsk, ConfigFile, Url, first_model, problem, request, router_url

EPILOG = """Examples:

- `llm-router chat` for a conversation
- `llm-router chat "Why is the sky blue?"` for one answer
- `git log -5 | llm-router chat "Summarise:"` sends what comes through the pipe after the prompt

In a conversation `/clear` forgets what was said, `/exit` or Ctrl-D ends it, and Ctrl-C stops an answer."""

_COMMANDS: Final = "/clear forgets, /exit or Ctrl-D ends, Ctrl-C stops an answer."


def chat(
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="What to ask; without it a conversation begins.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="NAME", help="Model to ask.  [default: the first it lists]")
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="Instructions for the model.")] = None,
    max_tokens: Annotated[int | None, typer.Option(metavar="N", min=1, help="Longest answer, in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(metavar="T", min=0.0, help="0 is the most predictable.")] = None,
    url: Url = None,
    api_key: ApiKey = None,
    config: ConfigFile = None,
) -> None:
    """Talk to a model of a running router."""
    piped = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read()
    question = "\n\n".join(part for part in (prompt, piped.strip()) if part)
    is_terminal = sys.stdin is not None and sys.stdin.isatty()
    if not question and not is_terminal:
        raise typer.BadParameter("say what to ask", param_hint="PROMPT")
    base = router_url(url, config)
    options = {"model": model or first_model(base, api_key), "max_tokens": max_tokens, "temperature": temperature}
    given = {name: value for name, value in options.items() if value is not None}
    conversation = Conversation(base, api_key, system, given)
    if question:
        try:
            for text in conversation.ask(question):
                print(text, end="", flush=True)
        except KeyboardInterrupt:
            print()  # the shell's prompt belongs on a line of its own
            raise
        print()
    else:
        _converse(conversation)


class Conversation:
    """What was said so far, and the router that it is said to. `options` go into every request."""

    def __init__(self, url: str, api_key: str | None, system: str | None, options: dict[str, Any]) -> None:
        self._url = url
        self._api_key = api_key
        self._options = options
        self._opening = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = list(self._opening)

    def clear(self) -> None:
        """Forget what was said."""
        self.messages = list(self._opening)

    def ask(self, question: str) -> Iterator[str]:
        """The answer in pieces, as they arrive.

        What arrived is remembered, also of an answer that was cut short; a question that got no answer is not.
        Raises: CannotAsk.
        """
        said = {"role": "user", "content": question}
        body = {**self._options, "messages": [*self.messages, said], "stream": True}
        answer = ""
        try:
            with request(self._url, "POST", "/v1/chat/completions", body, self._api_key) as reply:
                for text in _contents(reply):
                    answer += text
                    yield text
        finally:
            if answer:
                self.messages += [said, {"role": "assistant", "content": answer}]


def _contents(reply: http.client.HTTPResponse) -> Iterator[str]:
    """The text in a stream of chat completion chunks. Raises CannotAsk for an error inside it, or no proper end."""
    for line in reply:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise CannotAsk(problem(data, reply.status))
        for choice in event.get("choices", ()):
            text = choice.get("delta", {}).get("content")
            if text:
                yield text
    # http.client takes a connection that breaks inside a chunk for an ordinary end.
    raise CannotAsk("the answer ended early: the router or its backend went away")


def _converse(conversation: Conversation) -> None:
    """Questions from the terminal until its end."""
    from rich.console import Console

    with contextlib.suppress(ImportError):  # a Python built without it: the arrow keys just do nothing
        import readline  # noqa: F401  (gives `input` its line editing)

    console = Console(highlight=False)
    console.print(f"[dim]Ask something. {_COMMANDS}[/dim]")
    while True:
        try:
            # Not by the console: line editing has to know the prompt, or it draws over it.
            question = input("> ").strip()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print(f"\n[dim]{_COMMANDS}[/dim]")
            continue
        if question == "/exit":
            return
        if question == "/clear":
            conversation.clear()
        elif re.fullmatch(r"/\w*", question):
            console.print(f"[dim]There is no {question}. {_COMMANDS}[/dim]")
        elif question:
            _answer(conversation, question)


def _answer(conversation: Conversation, question: str) -> None:
    try:
        for text in conversation.ask(question):
            print(text, end="", flush=True)
        print()
    except KeyboardInterrupt:
        print(" (stopped)")
    except CannotAsk as error:
        # The conversation goes on: the router may be back for the next question.
        print(f"llm-router: {error.message}", file=sys.stderr)
