"""Who gets in by a key, and how those are slowed who have none."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_router.accounts.keys import KeySpec, digest_of, new_key
from llm_router.errors import Forbidden, TooManyFailures, Unauthorized
from llm_router.gateway import auth
from llm_router.gateway.auth import (
    DELAYS_S,
    FORGIVEN_AFTER_S,
    FREE_FAILURES,
    MAX_ADDRESSES,
    Doorman,
    Failures,
)
from llm_router.testing import FakeClock
from support.aio import run, until

TEXT = "sk-llmr-" + "x" * 43
CLIENT = "10.0.0.7:5000"
NOW = 1_700_000_000.0
KEY = KeySpec(id="key-1", name="app", digest=digest_of(TEXT))
BEFORE_429 = FREE_FAILURES + len(DELAYS_S)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def doorman(clock: FakeClock) -> Doorman:
    made = Doorman(clock=clock, wall=lambda: NOW)
    made.update([KEY], key_needed=True)
    return made


def bearer(text: str = TEXT) -> dict[bytes, bytes]:
    return {b"host": b"localhost", b"authorization": b"Bearer " + text.encode()}


def refused(doorman: Doorman, headers: dict[bytes, bytes], client: str = CLIENT) -> Unauthorized:
    with pytest.raises(Unauthorized) as caught:
        doorman.identify(headers, client)
    return caught.value


# -- getting in -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {b"authorization": f"Bearer {TEXT}".encode()},
        {b"authorization": f"bearer {TEXT}".encode()},
        {b"authorization": f"BEARER   {TEXT}".encode()},
        {b"x-api-key": TEXT.encode()},
        {b"api-key": TEXT.encode()},
        {b"authorization": b"Bearer of-a-proxy", b"x-api-key": TEXT.encode()},
        {b"authorization": b"Basic dXNlcjpwYXNz", b"api-key": TEXT.encode()},
        {b"x-api-key": b"dummy", b"authorization": f"Bearer {TEXT}".encode()},
        {b"x-api-key": b"dummy", b"api-key": TEXT.encode()},
    ],
)
def test_a_key_is_found_where_clients_put_it(doorman: Doorman, headers: dict[bytes, bytes]) -> None:
    """OpenAI's, Anthropic's and Azure's clients; beside something else, too."""
    assert doorman.identify(headers, CLIENT) is KEY


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({}, "a key is needed"),
        ({b"authorization": b""}, "a key is needed"),
        ({b"authorization": TEXT.encode()}, "a key is needed"),
        ({b"authorization": f"Basic {TEXT}".encode()}, "a key is needed"),
        ({b"cookie": f"x-api-key={TEXT}".encode()}, "a key is needed"),
        ({b"authorization": b"Bearer "}, "not valid"),
        ({b"authorization": f"Bearer {TEXT}, Bearer {TEXT}".encode()}, "not valid"),
        ({b"authorization": f"Bearer {TEXT}x".encode()}, "not valid"),
        ({b"authorization": f"Bearer {TEXT[:-1]}".encode()}, "not valid"),
        ({b"x-api-key": TEXT.upper().encode()}, "not valid"),
        ({b"x-api-key": b""}, "not valid"),
        ({b"api-key": b"\xff\x00"}, "not valid"),
    ],
)
def test_who_shows_no_valid_key_stays_outside(doorman: Doorman, headers: dict[bytes, bytes], message: str) -> None:
    """401 with a challenge, and how to do it."""
    error = refused(doorman, headers)
    assert (error.status, error.code, error.headers) == (401, "unauthorized", ((b"www-authenticate", b"Bearer"),))
    assert message in error.message


def test_a_refusal_does_not_tell_which_keys_exist(doorman: Doorman) -> None:
    """Unknown and expired look the same; no text comes back, neither in the message nor in a traceback."""
    expired = new_key()
    doorman.update([KEY, KeySpec(id="key-2", name="old", digest=digest_of(expired), expires_time=NOW - 1)], True)
    unknown = new_key()
    errors = [refused(doorman, bearer(text)) for text in (unknown, expired)]
    assert errors[0].message == errors[1].message
    for error, text in zip(errors, (unknown, expired), strict=True):
        assert text not in "".join(traceback.format_exception(error))
        assert text not in repr(error)
    assert "old" not in errors[1].message
    assert TEXT not in repr(doorman)


def test_nobody_gets_in_before_the_keys_are_known(clock: FakeClock) -> None:
    """Closed is where it begins."""
    refused(Doorman(clock=clock, wall=lambda: NOW), bearer())


def test_a_key_for_something_else_is_forbidden(doorman: Doorman) -> None:
    """403, also for administrators: models are asked with keys that are for it. It is no failure: the key is valid."""
    doorman.update([msgspec.structs.replace(KEY, scopes=("admin", "metrics:read"))], True)
    with pytest.raises(Forbidden, match="'inference'"):
        doorman.identify(bearer(), CLIENT)
    assert doorman.failures.statistics().addresses == 0


def test_where_no_key_is_needed_one_is_still_recognised(doorman: Doorman) -> None:
    """A dummy is ignored, as OpenAI's client sends one always; scopes are not asked for."""
    doorman.update([msgspec.structs.replace(KEY, scopes=("admin",))], False)
    found = doorman.identify(bearer(), CLIENT)
    assert found is not None
    assert found.name == "app"
    for _ in range(100):
        assert doorman.identify(bearer("dummy"), CLIENT) is None
        assert doorman.identify({}, CLIENT) is None
    assert doorman.failures.statistics().addresses == 0


def test_a_revoked_key_ends_with_the_update(doorman: Doorman) -> None:
    """From the next request on."""
    assert doorman.identify(bearer(), CLIENT) is KEY
    doorman.update([], True)
    refused(doorman, bearer())


def test_models_that_a_key_is_not_for_are_forbidden() -> None:
    """In the same words whether or not the model exists."""
    limited = msgspec.structs.replace(KEY, models=("small",))
    Doorman.check_model(None, "any")
    Doorman.check_model(KEY, "any")
    Doorman.check_model(limited, "small")
    with pytest.raises(Forbidden, match="the key 'app' may not ask the model 'large'"):
        Doorman.check_model(limited, "large")


# -- slowing --------------------------------------------------------------------------------------------


def test_failures_are_slowed_more_and_more(doorman: Doorman) -> None:
    """A few are free, then each answer takes longer, then there is 429 with when to come back."""
    errors = [refused(doorman, bearer("wrong")) for _ in range(BEFORE_429 + 20)]
    assert [error.delay_s for error in errors[:BEFORE_429]] == [*([0.0] * FREE_FAILURES), *DELAYS_S]
    for error in errors[BEFORE_429:]:
        assert isinstance(error, TooManyFailures)
        assert (error.status, error.delay_s) == (429, 0.0)
        assert 1 <= error.retry_after_s <= 61
    assert "ask again in" in errors[-1].message


def test_a_valid_key_is_never_slowed(doorman: Doorman) -> None:
    """Whatever its neighbours behind the same address do."""
    for _ in range(1000):
        refused(doorman, bearer("wrong"))
    assert doorman.identify(bearer(), CLIENT) is KEY


def test_ports_make_no_new_address(doorman: Doorman) -> None:
    """Nor do addresses of one IPv6 network, nor an IPv4 address written as an IPv6 one. Others are others."""
    for number in range(BEFORE_429):
        refused(doorman, {}, f"10.0.0.7:{number}")
        refused(doorman, {}, f"[2001:db8::{number:x}]:443")
        refused(doorman, {}, "" if number % 2 else "unknown")
    for client in ("[::ffff:10.0.0.7]:1", "[2001:db8::ffff:1]:2", "", "[fe80::1%eth0]:1"):
        is_new = client.startswith("[fe80")
        assert isinstance(refused(doorman, {}, client), TooManyFailures) is not is_new
    for client in ("10.0.0.8:1", "[2001:db8:0:1::1]:1", "[fe80:1::1%eth0]:1"):
        assert refused(doorman, {}, client).delay_s == 0.0


def test_failures_are_forgiven(doorman: Doorman, clock: FakeClock) -> None:
    """One every ten seconds; who waits as long as was said gets a 401 again."""
    error = [refused(doorman, {}) for _ in range(BEFORE_429 + 20)][-1]
    assert isinstance(error, TooManyFailures)
    clock.advance(max(1, round(error.retry_after_s)))
    assert refused(doorman, {}).status == 401
    clock.advance(FORGIVEN_AFTER_S * 30)
    assert refused(doorman, {}).delay_s == 0.0


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.floats(0, 200)), min_size=1, max_size=200
    )
)  # fmt: skip
def test_whoever_comes_back_when_told_is_answered(steps: list[tuple[int, float]]) -> None:
    """However failures and pauses alternate: delays and waits have their bounds, and a wait that was kept suffices."""
    clock = FakeClock()
    failures = Failures(clock=clock)
    for number, pause_s in steps:
        clock.advance(pause_s)
        error = failures.failed(f"10.0.0.{number}", was_shown=False)
        assert 0 <= error.delay_s <= DELAYS_S[-1]
        if isinstance(error, TooManyFailures):
            assert 1 <= error.retry_after_s <= 61
            clock.advance(max(1, round(error.retry_after_s)))
            assert failures.failed(f"10.0.0.{number}", was_shown=False).status == 401


def test_memory_is_bounded(doorman: Doorman) -> None:
    """Those that failed longest ago are forgotten first."""
    for _ in range(BEFORE_429):
        refused(doorman, {}, "10.9.9.9:1")
    for number in range(MAX_ADDRESSES - 1):
        refused(doorman, {}, f"172.16.{number >> 8}.{number & 255}:1")
    assert isinstance(refused(doorman, {}, "10.9.9.9:1"), TooManyFailures)
    for number in range(2 * MAX_ADDRESSES):
        refused(doorman, {}, f"172.18.{number >> 8}.{number & 255}:1")
    assert doorman.failures.statistics().addresses == MAX_ADDRESSES
    assert refused(doorman, {}, "10.9.9.9:1").delay_s == 0.0


class Pauses:
    """Waits that the test ends."""

    def __init__(self) -> None:
        self.waited_s: list[float] = []
        self._ends: list[asyncio.Future[None]] = []

    async def __call__(self, seconds: float) -> None:
        self.waited_s.append(seconds)
        self._ends.append(asyncio.get_running_loop().create_future())
        await self._ends[-1]

    def end(self) -> None:
        for future in self._ends:
            if not future.done():
                future.set_result(None)


def test_only_so_many_answers_are_held_back(clock: FakeClock) -> None:
    """Beyond that, who fails is told to come back; when they are through, or left, there is room again."""

    async def scenario() -> None:
        pauses = Pauses()
        failures = Failures(clock=clock, max_held=2, pause=pauses)
        slow: Callable[[], Unauthorized] = lambda: Unauthorized("no", delay_s=0.4)  # noqa: E731
        first, second = (asyncio.create_task(failures.hold(slow())) for _ in range(2))
        await until(lambda: failures.statistics().held == 2)
        third = await failures.hold(slow())
        assert isinstance(third, TooManyFailures)
        assert third.retry_after_s == 0.4
        at_once = Unauthorized("no")
        assert await failures.hold(at_once) is at_once
        first.cancel()
        await asyncio.wait({first})
        assert failures.statistics().held == 1
        pauses.end()
        assert (await second).delay_s == 0.4
        assert failures.statistics().held == 0
        assert pauses.waited_s == [0.4, 0.4]

    run(scenario())


def test_a_doorman_holds_back_what_it_raised(clock: FakeClock) -> None:
    """Really: a tenth of a second at the least. One failure more than the free ones: the first is being forgiven already."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        doorman = Doorman(clock=loop.time, wall=lambda: NOW)
        error = [refused(doorman, {}) for _ in range(FREE_FAILURES + 2)][-1]
        began_at = loop.time()
        assert await doorman.hold(error) is error
        assert loop.time() - began_at >= DELAYS_S[0] * 0.9

    run(scenario())


def test_delays_grow_and_are_short(clock: FakeClock) -> None:
    """A connection is not held for longer than a few seconds."""
    assert list(DELAYS_S) == sorted(set(DELAYS_S))
    assert DELAYS_S[-1] <= 5
    assert auth.MAX_COUNT > BEFORE_429
