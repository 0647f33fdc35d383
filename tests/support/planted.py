"""Secrets that can be told from everything else: planted in requests, looked for in whatever a router leaves behind.

Each has a core that nothing else in the world has, made from what it is and where it was put: a test that finds one
can say how it came there. Not for: sending requests, or knowing where to look.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple
from urllib.parse import unquote_to_bytes

_MARK: Final = "Zq7x"
_CARD: Final = "492971"  # begins each card here
_BASIC: Final = base64.b64encode(f"alice:{_MARK}"[:9].encode()).decode()  # whole groups of three
_FOUND: Final = re.compile(
    rb"(?i:zq7x)[0-9A-Za-z]{12}|4929[ -]?71[0-9]{2}[ -]?[0-9]{4}[ -]?[0-9]{4}|"
    + _BASIC.encode()
    + rb"[0-9A-Za-z+/]{10}"
)
_LETTERS: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


class Plant(NamedTuple):
    """A secret: `text` is what is put somewhere, `core` what must not be found anywhere."""

    kind: str
    place: str
    text: str
    core: str


def _jwt(core: str) -> str:
    return f"eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxMjM0In0.{core}{core}"


def _card(core: str) -> str:
    """A number with a right check digit."""
    digits = _CARD + str(int.from_bytes(hashlib.sha256(core.encode()).digest()[:8], "big"))[:9].zfill(9)
    for last in "0123456789":
        number = [int(digit) for digit in digits + last]
        odd = sum(number[-1::-2])
        if (odd + sum(digit * 2 - 9 * (digit > 4) for digit in number[-2::-2])) % 10 == 0:
            return digits + last
    raise AssertionError("one of ten digits is right")


KINDS: Final[Mapping[str, Callable[[str], str]]] = {
    "ours": lambda core: f"sk-llmr-{core}{'a1B2' * 7}",
    "openai": lambda core: f"sk-proj-{core}T3BlbkFJ{'x9Y8' * 4}",
    "anthropic": lambda core: f"sk-ant-api03-{core}-{'w7V6' * 6}AA",
    "bearer": lambda core: f"Bearer {core}",
    "basic": lambda core: f"Basic {base64.b64encode(f'alice:{core}'.encode()).decode()}",
    "jwt": _jwt,
    "aws": lambda core: f"AKIA{core.upper()}",
    "google": lambda core: f"AIza{core}Sy5D4C3B2A1z0y9x8w7",
    "github": lambda core: f"ghp_{core}{'q1W2' * 5}",
    "github-fine": lambda core: f"github_pat_11A_{core}{'q1W2' * 5}",
    "slack": lambda core: f"xoxb-2222222222-{core}",
    "hugging-face": lambda core: f"hf_{core}{'e3R4' * 4}",
    "userinfo": lambda core: f"https://alice:{core}@db.example.org/x",
    "parameter": lambda core: f"https://example.org/x?access_token={core}",
    "password": lambda core: f"password={core}",
    "cookie": lambda core: f"Cookie: sid={core}",
    "card": _card,
    "card-spaced": lambda core: re.sub(r"(\d{4})(?=\d)", r"\1 ", _card(core)),
}
"""Of secrets that somebody shows by mistake where nobody expects them."""

OPAQUE: Final = "opaque"
"""A secret that looks like nothing: only what it is sent as tells that it is one."""

PROMPT: Final = "prompt"
"""Words of a user: no pattern can know them."""


def plant(kind: str, place: str) -> Plant:
    """The secret of this kind for this place; always the same."""
    digest = hashlib.sha256(f"{kind} in {place}".encode()).digest()
    core = _MARK + "".join(_LETTERS[byte % len(_LETTERS)] for byte in digest[:12])
    if kind == PROMPT:
        return Plant(kind, place, f"why did my neighbour call his parrot {core} of all names", core)
    if kind == OPAQUE:
        return Plant(kind, place, f"plain-{core}-words", core)
    return Plant(kind, place, KINDS[kind](core), core)


class Garden:
    """Everything that was planted, by what can be found of it."""

    def __init__(self) -> None:
        self._plants: dict[bytes, Plant] = {}

    def __len__(self) -> int:
        return len(self._plants)

    def plant(self, kind: str, place: str) -> Plant:
        planted = plant(kind, place)
        found = _FOUND.findall(planted.text.encode())
        assert found, planted
        self._plants[_plain(found[0])] = planted
        return planted

    def found_in(self, data: bytes) -> set[Plant]:
        """What of all this is there: as it was planted, in other letters, or percent-encoded."""
        texts = {*_FOUND.findall(data)}
        if b"%" in data:
            texts.update(_FOUND.findall(unquote_to_bytes(data)))
        return {self._plants.get(_plain(text), Plant("unknown", "nowhere", text.decode(), "")) for text in texts}


def _plain(found: bytes) -> bytes:
    return re.sub(rb"[ -]", b"", found).lower()
