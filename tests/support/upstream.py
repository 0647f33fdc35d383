"""Requests for a pool, as bytes."""

from __future__ import annotations


def request(
    body: bytes = b"", *, method: str = "POST", target: str = "/v1/chat/completions", host: str = "backend.test"
) -> tuple[bytes, bytes]:
    """Head and body of a request with Content-Length."""
    head = f"{method} {target} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode(), body
