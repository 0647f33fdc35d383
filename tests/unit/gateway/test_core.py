"""What the core decides by itself: which kind an error is counted as, and what it hands to control."""

from __future__ import annotations

import pytest

from llm_router.errors import BackendTimeout, InvalidRequest, RouterError
from llm_router.families import ERROR_KINDS
from llm_router.gateway.replies import error_type


@pytest.mark.parametrize(
    ("error", "kind", "component"),
    [
        (InvalidRequest("no"), "bad_request", "gateway"),
        (InvalidRequest("no", status=404), "not_found", "gateway"),
        (InvalidRequest("no", status=421), "forbidden", "gateway"),
        (InvalidRequest("slow client", status=408), "bad_request", "gateway"),
        (InvalidRequest("too many connections", status=503), "limit", "router"),
        (BackendTimeout("b", "gap", 1.0), "timeout", "backend"),
        (RouterError("a fault"), "internal", "gateway"),
    ],
)
def test_an_error_is_counted_where_it_belongs(error: RouterError, kind: str, component: str) -> None:
    """A slow client is no slow backend, and a full house is no bad request."""
    assert error_type(error) == kind
    assert ERROR_KINDS[kind][0] == component


def test_every_error_of_the_tree_has_a_kind() -> None:
    """Whatever class is added, its kind is one that is counted."""

    def below(kind: type[RouterError]) -> list[type[RouterError]]:
        return [kind, *(found for child in kind.__subclasses__() for found in below(child))]

    for error in below(RouterError):
        assert error_type(error.__new__(error)) in ERROR_KINDS
