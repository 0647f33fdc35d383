"""Takes secrets out of what is written or shown: by the name of a field, and by what a text looks like.

Keys of providers and of ours, bearer tokens, JWTs, private keys, passwords in URLs and `name=value` pairs, and card
numbers are replaced by `[REDACTED]`. `clean` also makes a text safe for a terminal and bounded. Every function takes
anything and raises nothing. It finds what is shaped like a secret; a password that looks like a word in the middle of
a sentence cannot be found, which is why prompts are not logged at all. Not for: deciding which fields are written.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final
from urllib.parse import unquote

REDACTED: Final = "[REDACTED]"

FIELD_CHARS: Final = 8192
"""How long a text may be unless the caller says otherwise."""

_SLACK_CHARS: Final = 512
"""Read beyond the bound, so that a secret is recognised before its beginning is cut off from its end."""

_MAX_ITEMS: Final = 64
"""Of one list or mapping; a line is no place for more."""

_MAX_DEPTH: Final = 6

_MAX_NAME_CHARS: Final = 128

# -- by name ------------------------------------------------------------------------------------------

_SECRET_NAMES: Final = frozenset(
    {
        "auth", "authorization", "proxyauthorization", "bearer", "cookie", "cookies", "setcookie", "credential",
        "credentials", "jwt", "passphrase", "passwd", "pass", "password", "pwd", "secret", "secrets", "session",
        "sessionid", "sig", "signature", "token", "xamzsignature", "xamzcredential", "xamzsecuritytoken",
    }
)  # fmt: skip
_SECRET_ENDINGS: Final = (
    "apikey", "accesskey", "privatekey", "secretkey", "signingkey", "encryptionkey", "subscriptionkey", "masterkey",
    "password", "passwd", "secret", "token", "credential", "credentials", "cookie", "accountkey", "webhookurl",
)  # fmt: skip
_SECRET_PARAMETERS: Final = frozenset({"key", "code", "prompt", "messages", "input", "content"})
"""Names that are secrets in a query (Google's `?key=`, OAuth's `?code=`, what was asked of a model) and nothing special
elsewhere."""

_SEPARATORS: Final = str.maketrans("", "", "-_. ")


def is_secret_name(name: str) -> bool:
    """Whether a field of this name holds a secret: `Authorization`, `api_key`, `x-goog-api-key`, `refreshToken`.

    `max_tokens` and `token_count` do not.
    """
    plain = name[:_MAX_NAME_CHARS].translate(_SEPARATORS).lower()
    return plain in _SECRET_NAMES or plain.endswith(_SECRET_ENDINGS)


# -- by pattern ---------------------------------------------------------------------------------------

_TOKENS: Final = (
    r"sk-[A-Za-z0-9_-]{8,}",  # OpenAI, Anthropic (sk-ant-), OpenRouter (sk-or-), DeepSeek, and ours (sk-llmr-)
    *(rf"{kind}k_(?:live|test)_[A-Za-z0-9]{{8,}}" for kind in "spr"),  # Stripe
    r"AIza[A-Za-z0-9_-]{16,}",  # Google
    r"ya29\.[A-Za-z0-9_-]{8,}",
    r"A(?:KI|SI|GP|ID|NP|RO)A[A-Z0-9]{12,}",  # AWS
    r"gh[a-z]_[A-Za-z0-9]{16,}",  # GitHub
    r"github_pat_[A-Za-z0-9_]{16,}",
    r"glpat-[A-Za-z0-9_-]{12,}",  # GitLab
    r"xox[a-z](?:\.[a-z]+)?-[A-Za-z0-9-]{8,}",  # Slack
    r"xapp-[A-Za-z0-9-]{8,}",
    r"hf_[A-Za-z0-9]{12,}",  # Hugging Face
    r"gsk_[A-Za-z0-9]{12,}",  # Groq
    r"xai-[A-Za-z0-9]{20,}",
    r"pplx-[A-Za-z0-9]{20,}",  # Perplexity
    r"nvapi-[A-Za-z0-9_-]{20,}",
    r"csk-[A-Za-z0-9]{20,}",  # Cerebras
    r"fw_[A-Za-z0-9]{20,}",  # Fireworks
    r"r8_[A-Za-z0-9]{16,}",  # Replicate
    r"npm_[A-Za-z0-9]{20,}",
    r"pypi-[A-Za-z0-9_-]{20,}",
    r"key-[0-9a-f]{32}",  # Mailgun
    r"SG\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}",  # SendGrid
    r"eyJ[A-Za-z0-9_-]{6,}\.[A-Za-z0-9_-]{4,}(?:\.[A-Za-z0-9_-]*){0,3}",  # JWT and JWE
)
# A secret begins where a word does: also after an escape of JSON, of Python or of a URL, which ends in a letter or digit.
# That is looked at after the first literal, not before it: a pattern that begins with a set of literals is searched ten
# times as fast as one that begins with a condition.
_BEGINS: Final = (
    r"(?:(?<![A-Za-z0-9]{0})|(?<=\\[bfnrt]{0})|(?<=\\x[0-9A-Fa-f]{{2}}{0})|(?<=\\u[0-9A-Fa-f]{{4}}{0})"
    r"|(?<=%[0-9A-Fa-f]{{2}}{0}))"
)
_TOKEN: Final = re.compile("|".join(text[0] + _BEGINS.format(text[0]) + text[1:] for text in _TOKENS))
_SCHEME: Final = re.compile(
    r"((?i:bearer)(?:\s|%20|\+){1,4}(?=[\w.~+/-]{8})|(?i:basic)(?:\s|%20|\+){1,4}(?=[A-Za-z0-9+/]{12}))[\w.~+/=-]+"
)
_COLOUR: Final = re.compile(r"\x1b\[[0-9;:?]{0,32}[A-Za-z]")
_USER: Final = re.compile(r"(://)(?!USER:PASSWORD@)[^/\s@\"'<>?#]{1,256}@")
_PEM: Final = re.compile(r"-----BEGIN [A-Z ]{0,32}PRIVATE KEY-----[^-]*(?:-----END [A-Z ]{0,32}PRIVATE KEY-----)?")
_NAMED: Final = re.compile(
    r"((?:api[ _-]?key|access[_-]?key|account[_-]?key|client[_-]?secret|secret[_-]?key|private[_-]?key"
    r"|pass(?:wor[dt]|wd|phrase)|pwd|secret|(?:[a-z]{1,16}[_-])?token|authorization|(?:set-)?cookie)"
    r"(?:\\?[\"'])?\s{0,2}[:=]\s{0,2}(?:(?:bearer|basic)\s)?(?:b?\\?[\"'])?)(?![\[\s]|(?:bearer|basic)\s|-default\})[^\s\"'&,;<>(){}\\]{3,}",
    re.IGNORECASE,
)
_CARD: Final = re.compile(r"[2-6](?<![\w.-][2-6])(?:[ -]?[0-9]){12,18}(?![\w-]|\.[0-9])")


def redact(text: str) -> str:
    """The text without secrets, percent-encoded ones too (then all of it comes back decoded).

    Takes time in proportion to its length: bound it first, or use `clean`.
    """
    return _also_encoded(_everything, text)


def redact_keys(text: str) -> str:
    """Like `redact` without card numbers: for identifiers, where a run of digits means nothing."""
    return _also_encoded(_keys, text)


is_own_id: Final = re.compile(r"[0-9a-f]{16}-[0-9]{1,15}").fullmatch
"""The ids that the gateway gives; of an id that a caller gave one cannot know that it is no key."""


def clean_id(text: str, limit: int = 256) -> str:
    """The id of a request: bounded, safe to print, without keys. One of ours, and any run of digits, stays as it is.

    The same everywhere, so that whoever looks for an id finds all that is told about the request.
    """
    return text if is_own_id(text) else printable(bounded(redact_keys(text[: limit + _SLACK_CHARS]), limit))


def _also_encoded(take: Callable[[str], str], text: str) -> str:
    text = take(text)
    if "%" in text:
        plain = unquote(text, errors="backslashreplace")
        cleaned = take(plain)
        if cleaned != plain:
            return cleaned
    return text


def _everything(text: str) -> str:
    return _CARD.sub(_card, _keys(text))


def _keys(text: str) -> str:
    if "\x1b" in text:
        text = _COLOUR.sub("\x1b", text)  # its last letter would hide that a word begins
    text = _TOKEN.sub(REDACTED, text)
    # Most texts hold none of these words, and `in` is far quicker than the patterns.
    if not _SAYS_MORE(text):
        return text
    words = text.lower()
    if any(word in words for word in _NAMES_SAY) and (":" in words or "=" in words):
        text = _NAMED.sub(_rest_redacted, text)
    if "bearer" in words or "basic" in words:
        text = _SCHEME.sub(_rest_redacted, text)
    if "://" in words and "@" in words:
        text = _USER.sub(rf"\1{REDACTED}@", text)
    if "private key" in words:
        text = _PEM.sub(REDACTED, text)
    return text


_SAYS_MORE: Final = re.compile(r"[:=\s%+]").search
_NAMES_SAY: Final = ("key", "secret", "pass", "pwd", "token", "authorization", "cookie")


def _rest_redacted(match: re.Match[str]) -> str:
    return f"{match[1]}{REDACTED}"


def _card(match: re.Match[str]) -> str:
    return REDACTED if _luhn([int(digit) for digit in match[0] if digit not in " -"]) else match[0]


def _luhn(digits: list[int]) -> bool:
    """The check digit that every payment card has (ISO/IEC 7812-1, annex B)."""
    total = sum(digits[-1::-2])
    for digit in digits[-2::-2]:
        total += digit * 2 - 9 * (digit > 4)
    return total % 10 == 0


# -- safe to print ------------------------------------------------------------------------------------

# Besides C0 (ANSI escapes begin there), DEL and C1: separators that readers take for line ends, marks that turn the
# direction of what follows, the byte order mark, and halves of surrogate pairs, which no encoder takes.
_UNSAFE: Final = (
    "\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069\\ufeff\\ud800-\\udfff"
)
_CONTROL: Final = re.compile(f"[{_UNSAFE}]")
_CONTROL_BUT_LINES: Final = re.compile(f"(?![\\n\\t])[{_UNSAFE}]")


def printable(text: str, *, keep_lines: bool = False) -> str:
    r"""The text with control characters, as the text `\x1b` or `\u2028`; line ends and tabs only if they are not kept."""
    return (_CONTROL_BUT_LINES if keep_lines else _CONTROL).sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def bounded(text: str, limit: int) -> str:
    """At most `limit` characters, and how many were left out."""
    if len(text) <= limit:
        return text
    return f"{text[:limit]}... ({len(text) - limit} more characters)"


def clean(text: str, limit: int = FIELD_CHARS, *, keep_lines: bool = False) -> str:
    """Without secrets, at most `limit` characters and a note, safe to print: what may stand in a line or on a page."""
    if len(text) > limit + _SLACK_CHARS:
        left_out = len(text) - limit
        text = redact(text[: limit + _SLACK_CHARS])[:limit] + f"... ({left_out} more characters)"
    else:
        text = bounded(redact(text), limit)
    return printable(text, keep_lines=keep_lines)


# -- things that hold texts ---------------------------------------------------------------------------


def clean_query(query: str, limit: int = FIELD_CHARS) -> str:
    """A URL's query with the values of parameters that hold secrets taken out, then cleaned."""
    if "=" not in query:
        return clean(query, limit)
    looked_at = query[: limit + _SLACK_CHARS]
    text = redact("&".join(map(_parameter, looked_at.split("&"))))
    left_out = len(query) - len(looked_at)
    if left_out:
        left_out += max(0, len(text) - limit)
        return printable(f"{text[:limit]}... ({left_out} more characters)")
    return printable(bounded(text, limit))


def _parameter(part: str) -> str:
    name, sign, value = part.partition("=")
    plain = name.replace("%5F", "_").replace("%5f", "_").replace("%2D", "-").replace("%2d", "-")
    if value and (is_secret_name(plain) or plain.lower() in _SECRET_PARAMETERS):
        return f"{name}{sign}{REDACTED}"
    return part


def clean_url(url: str, limit: int = FIELD_CHARS) -> str:
    """A URL or a path with a query, without user, password and secret parameters."""
    address, mark, query = url.partition("?")
    return clean(address, limit) + mark + clean_query(query, limit) if mark else clean(url, limit)


def clean_value(value: Any, limit: int = FIELD_CHARS, *, depth: int = _MAX_DEPTH) -> Any:
    """Nested data as JSON can hold it, without secrets: by name in mappings, by pattern in every text.

    At most 64 items of each list and mapping and six levels; what is no JSON is its `str`.
    """
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str | bytes | bytearray):
        return clean(_text(value), limit)
    if depth <= 0:
        return "..."
    if isinstance(value, Mapping):
        cleaned: dict[str, Any] = {}
        for name, item in list(value.items())[:_MAX_ITEMS]:
            plain = clean(_text(name), _MAX_NAME_CHARS)
            hidden = item is not None and is_secret_name(plain)
            cleaned[plain] = REDACTED if hidden else clean_value(item, limit, depth=depth - 1)
        if len(value) > _MAX_ITEMS:
            cleaned["..."] = f"{len(value) - _MAX_ITEMS} more"
        return cleaned
    if isinstance(value, Iterable) and isinstance(value, list | tuple | set | frozenset):
        items = [clean_value(item, limit, depth=depth - 1) for item in list(value)[:_MAX_ITEMS]]
        return [*items, f"... ({len(value) - _MAX_ITEMS} more)"] if len(value) > _MAX_ITEMS else items
    return clean(_text(value), limit)


def clean_exception(error: BaseException, limit: int = FIELD_CHARS) -> dict[str, str]:
    """`name` (its class), `message` and `stack` of an exception, the end of a stack that is too long."""
    try:
        stack = "".join(traceback.format_exception(error))
    except Exception as problem:  # its __str__ may raise anything
        stack = f"a traceback that cannot be shown: {type(problem).__name__}"
    left_out = len(stack) - limit
    if left_out > 0:  # the end says what happened; the slack keeps a secret whole that the cut would halve
        stack = redact(stack[-limit - _SLACK_CHARS :])[-limit:]
        stack = f"... ({left_out} characters before)\n{stack}"
    return {
        "name": clean(type(error).__name__, _MAX_NAME_CHARS),
        "message": clean(_text(error), limit),
        "stack": clean(stack, limit + _SLACK_CHARS, keep_lines=True),
    }


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bytes | bytearray):
        return value.decode("utf-8", "backslashreplace")
    try:
        return str(value)
    except Exception as problem:  # whatever a foreign __str__ raises: a line is written all the same
        return f"<{type(value).__name__} that cannot be shown: {type(problem).__name__}>"
