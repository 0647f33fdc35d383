"""Money for probes: never more than the day's amount, spread over the day, whatever crashes, clocks and disks do."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_router.processes.probes.purse import Purse
from llm_router.testing import FakeClock

DAY = 86_400.0
NOON = 20_000 * DAY + DAY / 2


def purse(tmp_path: Path, usd: float = 1.0, now: float = NOON) -> tuple[Purse, FakeClock]:
    wall = FakeClock(now)
    return Purse(str(tmp_path / "probes.json"), usd, wall=wall), wall


def test_what_was_taken_is_spent_until_it_is_put_back(tmp_path: Path) -> None:
    """A reservation counts in full; the answer's cost replaces it."""
    money, _ = purse(tmp_path)
    taken = money.take(0.2)
    assert taken is not None
    assert money.spent_usd() == pytest.approx(0.2)
    money.put_back(taken, 0.05)
    assert money.spent_usd() == pytest.approx(0.05)


def test_a_probe_may_have_cost_more_than_was_taken(tmp_path: Path) -> None:
    """A provider that ignores the bound of an answer is paid; nothing more is spent then."""
    money, _ = purse(tmp_path)
    taken = money.take(0.1)
    assert taken is not None
    money.put_back(taken, 3.0)
    assert money.spent_usd() == pytest.approx(3.0)
    assert "3.000000 of the day's 1 are spent" in money.why_not(0.01)


def test_it_survives_a_restart(tmp_path: Path) -> None:
    """Also one between the probe and its answer, and one that left a file half written."""
    money, wall = purse(tmp_path)
    money.take(0.2)
    (tmp_path / "probes.json.new").write_text("{")
    assert Purse(str(tmp_path / "probes.json"), 1.0, wall=wall).spent_usd() == pytest.approx(0.2)
    assert (tmp_path / "probes.json").stat().st_mode & 0o777 == 0o600


def test_spending_is_spread_over_the_day(tmp_path: Path) -> None:
    """The first probe at midnight, a half of the amount by noon, all of it by the end."""
    money, wall = purse(tmp_path, now=20_000 * DAY)
    counts = []
    for _ in range(24):
        count = 0
        while money.take(0.01) is not None:
            count += 1
        counts.append(count)
        wall.advance(3600.0)
    assert counts[0] == 1
    assert 49 <= sum(counts[:13]) <= 52
    assert 95 <= sum(counts) <= 100
    assert max(counts) <= 6


def test_midnight_in_utc_begins_anew(tmp_path: Path) -> None:
    """What was taken yesterday is not put back into today."""
    money, wall = purse(tmp_path, now=20_000 * DAY + DAY - 1)
    taken = money.take(0.9)
    assert taken is not None
    wall.advance(DAY / 2)
    assert money.spent_usd() == 0.0
    money.take(0.4)
    money.put_back(taken, 0.0)
    assert money.spent_usd() == pytest.approx(0.4)


def test_a_clock_that_goes_back_gives_no_money(tmp_path: Path) -> None:
    """The day of the file stays in force until the clock is past it."""
    money, wall = purse(tmp_path)
    assert money.take(0.4) is not None
    wall.now -= 3 * DAY
    assert money.spent_usd() == pytest.approx(0.4)
    assert money.take(0.1) is None


def test_without_an_amount_nothing_is_spent(tmp_path: Path) -> None:
    """0 is the default; what costs nothing may be done, and touches no file."""
    money, _ = purse(tmp_path, usd=0.0)
    assert money.why_not(1e-9) == "it costs money, and health.paid_probe_daily_usd is 0"
    assert money.take(1e-9) is None
    taken = money.take(0.0)
    assert taken is not None
    money.put_back(taken, 0.0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ("", "{", "[]", '{"day":20000,"usd":-1}', '{"day":20000,"usd":1e999}', "\xff\xfe"))
def test_a_file_that_says_nothing_spends_nothing_today(tmp_path: Path, text: str) -> None:
    """It could have been the whole amount. Tomorrow is another day."""
    (tmp_path / "probes.json").write_text(text, encoding="latin-1")
    money, wall = purse(tmp_path)
    assert money.take(0.01) is None
    assert "cannot be read from" in money.why_not(0.01)
    wall.advance(DAY)
    assert money.take(0.01) is not None
    assert money.spent_usd() == pytest.approx(0.01)


def test_what_cannot_be_written_down_is_not_spent(tmp_path: Path) -> None:
    """The probe is not sent then."""
    money = Purse(str(tmp_path / "not" / "there.json"), 1.0, wall=FakeClock(NOON))
    assert money.take(0.1) is None
    assert money.spent_usd() == 0.0


@given(
    st.lists(
        st.tuples(
            st.sampled_from(("take", "put back", "later", "earlier", "restart")),
            st.floats(0.0, 1.5),
            st.floats(0.0, 1.0),
        ),
        max_size=40,
    )
)
def test_a_day_never_costs_more_than_its_amount(steps: list[tuple[str, float, float]]) -> None:
    """Whatever is taken, put back and forgotten: no day's probes may cost more, when none costs more than was taken."""
    with tempfile.TemporaryDirectory() as folder:
        wall = FakeClock(NOON)
        path = f"{folder}/probes.json"
        money = Purse(path, 1.0, wall=wall)
        open_ones = []
        costs: dict[int, float] = {}
        for step, number, share in steps:
            if step == "take" and (taken := money.take(number)) is not None:
                open_ones.append(taken)
                costs[taken.day] = costs.get(taken.day, 0.0) + taken.usd
            elif step == "put back" and open_ones:
                taken = open_ones.pop()
                money.put_back(taken, taken.usd * share)
                costs[taken.day] -= taken.usd * (1.0 - share)
            elif step == "later":
                wall.advance(number * DAY)
            elif step == "earlier":
                wall.now -= number * DAY / 4
            elif step == "restart":
                money = Purse(path, 1.0, wall=wall)
        assert all(cost <= 1.0 + 1e-9 for cost in costs.values())
