"""The ledger that several routers share: counted in Redis or Valkey, by its clock, in one script that runs as a whole.

The rules are ledger.py's. Each limit is a hash: of a sliding limit the units of each slot of time with `t` their sum, `o`
the oldest slot and `n` the newest; of a budget `p` the day or month and `s` what is spent; of concurrency `u:BORROWER`
units and `t:BORROWER` when it was last heard of. `c` is the router that opened the account: only it may say what usage
rows know, so that routers which share the rows as well do not count them twice.

While Redis is away each router counts for itself, from what it last knew: together they may then exceed a limit, each for
itself does not. Not for: the cache (cache/redis.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Final, cast

import msgspec
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from llm_router.accounts.ledger import (
    BUDGET_LIFE_S,
    BUDGETS,
    WINDOWS,
    Account,
    Ask,
    BudgetWarning,
    Grant,
    MemoryLedger,
    Warner,
    accounts_of,
    lease_of,
)
from llm_router.accounts.limits import Limits, Subject

TIMEOUT_S: Final = 0.5
"""For an answer of Redis; a request waits for a lease twice as long at most, so it still gets one when this is over."""
PROBE_S: Final = 1.0
"""How often an absent Redis is tried again."""
_SILENCE_S: Final = 30.0
"""A borrower of which nothing is heard for this long has nothing in flight; borrowers speak every ten seconds."""
_BUDGET_KEPT_S: Final = 32 * 86_400.0
_MICRO_S: Final = 1_000_000
_BATCH: Final = 200
"""Entries of one call of the script, which holds up everybody else for about 40 us an entry."""
_QUEUE_BOUND: Final = 100_000
"""Charges that wait for Redis, about 300 bytes each; beyond it the oldest usage rows do not count."""

_SCRIPT: Final = """
local t = redis.call('TIME')
local now = tonumber(ARGV[4])
if now < 0 then now = t[1] * 1000000 + t[2] end
local epoch = redis.call('GET', KEYS[1])
if not epoch then
  epoch = ARGV[1]
  redis.call('SET', KEYS[1], epoch)
end
local router = ARGV[2]
local floor, max, min = math.floor, math.max, math.min

local function number(key, field) return tonumber(redis.call('HGET', key, field) or '0') end

-- days since 1970 to months since the year 0, and back (proleptic Gregorian calendar)
local function month_of(days)
  local z = days + 719468
  local era = floor(z / 146097)
  local doe = z - era * 146097
  local yoe = floor((doe - floor(doe / 1460) + floor(doe / 36524) - floor(doe / 146096)) / 365)
  local mp = floor((5 * (doe - (365 * yoe + floor(yoe / 4) - floor(yoe / 100))) + 2) / 153)
  local year = yoe + era * 400
  if mp < 10 then return year * 12 + mp + 2 end
  return (year + 1) * 12 + mp - 10
end
local function days_of(month)
  local year, mp = floor(month / 12), month % 12 - 2
  if mp < 0 then year, mp = year - 1, mp + 12 end
  local era = floor(year / 400)
  local yoe = year - era * 400
  return era * 146097 + yoe * 365 + floor(yoe / 4) - floor(yoe / 100) + floor((153 * mp + 2) / 5) - 719468
end

local window = {}
function window.open(key, e)
  local oldest, here = floor((now - e.length) / e.step), floor(now / e.step)
  e.here, e.far = here, floor((now + e.life) / e.step)
  local o = redis.call('HGET', key, 'o')
  e.total, e.newest = number(key, 't'), number(key, 'n')
  if not o or oldest > e.newest then
    local owner = redis.call('HGET', key, 'c')
    redis.call('DEL', key)
    if owner then redis.call('HSET', key, 'c', owner) end
    e.total, e.newest = 0, here
  else
    for slot = tonumber(o), oldest - 1 do
      local units = redis.call('HGET', key, slot)
      if units then
        e.total = e.total - units
        redis.call('HDEL', key, slot)
      end
    end
  end
  e.oldest = max(tonumber(o or oldest), oldest)
end
function window.add(key, e, slot, units)
  if units > 0 and slot >= e.oldest then
    redis.call('HINCRBY', key, slot, units)
    e.total = e.total + units
    e.newest = max(e.newest, slot)
  end
end
function window.remove(key, e, slot, units)
  local gone = min(number(key, slot), units)
  if gone > 0 then
    redis.call('HINCRBY', key, slot, -gone)
    e.total = e.total - gone
  end
end
function window.receive(key, e)
  if e.epoch == epoch then
    for _, u in ipairs(e.unused) do window.remove(key, e, u[1], u[2]) end
    window.remove(key, e, e.slot, e.used + e.left)
    window.add(key, e, e.here, e.used)
    window.add(key, e, e.far, e.left)
  else
    window.add(key, e, e.here, e.held)
  end
  window.add(key, e, e.here, e.spent)
  return e.here
end
function window.lend(key, e, units)
  window.add(key, e, e.far, units)
  return e.far, e.life
end
function window.free(key, e) return e.limit - e.total end
function window.wait(key, e, units)
  local lacking = units - (e.limit - e.total)
  for slot = e.oldest, e.newest do
    lacking = lacking - number(key, slot)
    if lacking <= 0 then return (slot + 1) * e.step + e.length - now end
  end
  return e.length
end
function window.reset(key, e)
  if e.total <= 0 then return 0 end
  return max(0, (e.newest + 1) * e.step + e.length - now)
end
function window.charge(key, e) window.add(key, e, floor((now - e.age) / e.step), e.units) end
function window.forget() end
function window.close(key, e)
  redis.call('HSET', key, 't', e.total, 'o', e.oldest, 'n', e.newest)
  redis.call('PEXPIRE', key, floor((e.length + e.life + 2 * e.step) / 1000))
end

local budget = {}
function budget.number(e, at)
  local days = floor(at / 86400000000)
  if e.monthly then return month_of(days) end
  return days
end
function budget.open(key, e)
  e.period = budget.number(e, now)
  local there = number(key, 'p')
  if there >= e.period then
    e.period, e.total = there, number(key, 's')
  else
    e.total = 0
  end
end
function budget.receive(key, e)
  if e.epoch == epoch then
    for _, u in ipairs(e.unused) do
      if u[1] == e.period then e.total = e.total - min(u[2], e.total) end
    end
    if e.slot ~= e.period then e.total = e.total + e.left end
  else
    e.total = e.total + e.held
  end
  e.total = e.total + e.spent
  return e.period
end
function budget.lend(key, e, units)
  e.total = e.total + units
  return e.period, max(0, min(e.life, budget.reset(key, e)))
end
function budget.free(key, e) return e.limit - e.total end
function budget.wait(key, e) return budget.reset(key, e) end
function budget.reset(key, e)
  if e.monthly then return days_of(e.period + 1) * 86400000000 - now end
  return (e.period + 1) * 86400000000 - now
end
function budget.charge(key, e)
  if budget.number(e, now - e.age) >= e.period then e.total = e.total + e.units end
end
function budget.forget() end
function budget.close(key, e)
  redis.call('HSET', key, 'p', e.period, 's', e.total)
  redis.call('PEXPIRE', key, floor(e.life_of_key / 1000))
end

local level = {}
function level.open(key, e)
  e.total = 0
  local all = redis.call('HGETALL', key)
  local units, heard = {}, {}
  for i = 1, #all, 2 do
    local name = string.sub(all[i], 3)
    if string.sub(all[i], 1, 2) == 'u:' then units[name] = tonumber(all[i + 1]) end
    if string.sub(all[i], 1, 2) == 't:' then heard[name] = tonumber(all[i + 1]) end
  end
  for name, held in pairs(units) do
    if now - (heard[name] or 0) > e.silence then
      redis.call('HDEL', key, 'u:' .. name, 't:' .. name)
    else
      e.total = e.total + held
    end
  end
end
function level.set(key, e, units)
  e.total = e.total - number(key, 'u:' .. e.borrower) + units
  if units > 0 then
    redis.call('HSET', key, 'u:' .. e.borrower, units, 't:' .. e.borrower, now)
  else
    redis.call('HDEL', key, 'u:' .. e.borrower, 't:' .. e.borrower)
  end
end
function level.receive(key, e)
  e.mine = e.held
  if e.epoch == epoch then e.mine = e.mine + e.left end
  level.set(key, e, e.mine)
  return 0
end
function level.lend(key, e, units)
  if units > 0 then level.set(key, e, e.mine + units) end
  return 0, 0
end
function level.free(key, e) return e.limit - e.total end
function level.wait() return 1000000 end
function level.reset(key, e)
  if e.total > 0 then return 1000000 end
  return 0
end
function level.charge() end
function level.forget(key, e) level.set(key, e, 0) end
function level.close(key, e) redis.call('PEXPIRE', key, floor(2 * e.silence / 1000)) end

local books = {window = window, budget = budget, level = level}
local answers = {}
for i, e in ipairs(cmsgpack.unpack(ARGV[3])) do
  local key, book = KEYS[i + 1], books[e.book]
  if e.op == 'claim' and redis.call('EXISTS', key) == 0 then redis.call('HSET', key, 'c', router) end
  book.open(key, e)
  if e.op == 'charge' and (e.ours or redis.call('HGET', key, 'c') == router) then book.charge(key, e) end
  if e.op == 'left' then book.forget(key, e) end
  local units, slot, expires, used_slot, wait = 0, 0, 0, 0, 0
  if e.op == 'ask' then
    used_slot = book.receive(key, e)
    local free = book.free(key, e)
    if e.want > 0 and free >= max(1, e.least) then units = min(free, e.want, max(e.need, e.lease)) end
    if e.want > 0 and units == 0 then wait = book.wait(key, e, max(1, e.least)) end
    slot, expires = book.lend(key, e, units)
  end
  book.close(key, e)
  answers[i] = {units, expires, max(0, book.free(key, e)), wait, book.reset(key, e), slot, used_slot}
end
return {epoch, answers}
"""

Entry = dict[str, Any]
"""What the script takes of one account: the fields that its book names."""


class RedisLedger:
    """Counts in Redis or Valkey (5 or later), with all routers that use the same server and prefix.

    Args:
        url: `redis://` or `rediss://` or `unix://`; never shown.
        name: of this router, the same after a restart, different on each machine.
        prefix: of every key. The braces keep a router's keys together in a cluster.
        now: Unix seconds; None for the server's clock, which is right when there is more than one router.
        on_unavailable: called once when Redis goes away, with the reason; `on_available` when it is back.

    Close it with `aclose`.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str = "",
        prefix: str = "{llm-router}:limits:",
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        now: Callable[[], float] | None = None,
        on_unavailable: Callable[[str], object] = lambda reason: None,
        on_available: Callable[[], object] = lambda: None,
        probe_s: float = PROBE_S,
    ) -> None:
        self._redis = Redis.from_url(
            url,
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
        )
        self._script = self._redis.register_script(_SCRIPT)
        self._name = name or socket.gethostname()
        self._claimant = uuid.uuid4().hex
        self._prefix = prefix
        self._clock = clock
        self._wall = wall
        self._now = now
        self._on_unavailable = on_unavailable
        self._on_available = on_available
        self._probe_s = probe_s
        self._limits: Mapping[Subject, Limits] = {}
        self._bounds: dict[Account, int] = {}
        self._known: dict[Account, int] = {}  # units that nobody had borrowed when we last heard
        self._queue: list[tuple[Account, Entry]] = []
        self._sending = asyncio.Lock()
        self._flushing: asyncio.Task[None] | None = None
        self._probing: asyncio.Task[None] | None = None
        self._warner = Warner(wall)
        self._local: MemoryLedger | None = None
        self._baseline: dict[Account, int] = {}
        self._fell_back_at = 0.0

    def __repr__(self) -> str:
        state = "away" if self._local is not None else "there"
        return f"RedisLedger({self._name!r}, {len(self._bounds)} accounts, {state})"

    @property
    def is_available(self) -> bool:
        """False while this router counts for itself."""
        return self._local is None

    def update(self, limits: Mapping[Subject, Limits]) -> tuple[Account, ...]:
        before = self._bounds
        self._limits = limits
        self._bounds = accounts_of(limits)
        self._known = {account: known for account, known in self._known.items() if account in self._bounds}
        if self._local is not None:
            self._local.update(limits)
        opened = tuple(account for account in self._bounds if account not in before)
        for account in opened:
            self._later(account, {"op": "claim"})
        return opened

    def charge(self, subject: Subject, kind: str, units: int, at: float) -> None:
        account = Account(subject, kind)
        bound = self._bounds.get(account)
        if bound is None:
            return
        if self._local is not None:
            self._local.charge(subject, kind, units, at)
        self._known[account] = self._known.get(account, bound) - units
        age_s = (self._now or self._wall)() - at
        self._later(account, {"op": "charge", "units": units, "age": round(age_s * _MICRO_S), "ours": False})

    def left(self, borrower: str) -> None:
        if self._local is not None:
            self._local.left(borrower)
            return  # Redis notices its silence
        for account in self._bounds:
            if account.kind == "concurrency":
                self._later(account, {"op": "left", "borrower": self._borrower(borrower)})

    async def lend(self, borrower: str, asks: tuple[Ask, ...]) -> tuple[Grant, ...]:
        if not asks:
            return ()
        if self._local is not None:
            return self._local.lend_now(borrower, asks)
        entries: list[tuple[Account, Entry]] = []
        for ask in asks:
            account = Account(Subject(ask.scope, ask.name), ask.kind)
            if account in self._bounds:
                entries.append((account, self._entry_of(account, ask, borrower)))
        try:
            if self._queue:
                await self._tell()
            epoch, answers = await self._run(entries)
        except (RedisError, OSError, TimeoutError) as error:
            return self._fall_back(error).lend_now(borrower, asks)
        answered = {account: answer for (account, _), answer in zip(entries, answers, strict=True)}
        return tuple(self._grant(ask, epoch, answered) for ask in asks)

    def remaining(self, subject: Subject, kind: str) -> int | None:
        if self._local is not None:
            return self._local.remaining(subject, kind)
        account = Account(subject, kind)
        bound = self._bounds.get(account)
        return None if bound is None else max(0, self._known.get(account, bound))

    def warnings(self) -> tuple[BudgetWarning, ...]:
        return self._warner.take()

    async def aclose(self) -> None:
        for task in (self._probing, self._flushing):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        await self._redis.aclose()

    # -- the script --------------------------------------------------------------------------------------------

    async def _run(self, entries: list[tuple[Account, Entry]]) -> tuple[str, list[list[int]]]:
        """One call of the script. Raises: RedisError, OSError, TimeoutError."""
        keys = [f"{self._prefix}epoch", *(self._key(account) for account, _ in entries)]
        payload = msgspec.msgpack.encode([self._book(account) | entry for account, entry in entries])
        now = -1 if self._now is None else round(self._now() * _MICRO_S)
        async with asyncio.timeout(TIMEOUT_S):
            reply = await self._script(keys=keys, args=[uuid.uuid4().hex, self._claimant, payload, now])
        epoch, answers = cast("tuple[bytes, list[list[int]]]", reply)
        return epoch.decode(), answers

    def _key(self, account: Account) -> str:
        return f"{self._prefix}{account.subject.scope}:{account.kind}:{account.subject.name}"

    def _book(self, account: Account) -> Entry:
        """How an account is counted, for the script. An account that is limited no more gets a bound of 0."""
        limit = self._bounds.get(account, 0)
        window = WINDOWS.get(account.kind)
        if window is not None:
            length, step, life = (round(seconds * _MICRO_S) for seconds in window)
            return {"book": "window", "limit": limit, "length": length, "step": step, "life": life}
        if account.kind in BUDGETS:
            return {
                "book": "budget",
                "limit": limit,
                "monthly": account.kind == "usd_per_month",
                "life": round(BUDGET_LIFE_S * _MICRO_S),
                "life_of_key": round(_BUDGET_KEPT_S * _MICRO_S),
            }
        return {"book": "level", "limit": limit, "silence": round(_SILENCE_S * _MICRO_S)}

    def _entry_of(self, account: Account, ask: Ask, borrower: str) -> Entry:
        return {
            "op": "ask",
            "lease": lease_of(self._bounds[account]),
            "borrower": self._borrower(borrower),
            "want": ask.want,
            "need": ask.need,
            "least": ask.least,
            "held": ask.held,
            "left": ask.left,
            "slot": ask.slot,
            "used": ask.used,
            "spent": ask.spent,
            "unused": ask.unused,
            "epoch": ask.epoch,
        }

    def _borrower(self, borrower: str) -> str:
        return f"{self._name}/{borrower}"

    def _grant(self, ask: Ask, epoch: str, answered: Mapping[Account, list[int]]) -> Grant:
        account = Account(Subject(ask.scope, ask.name), ask.kind)
        answer = answered.get(account)
        bound = self._bounds.get(account)
        if answer is None or bound is None:  # not limited any more
            return Grant(ask.scope, ask.name, ask.kind, ask.want, expires_s=1.0, remaining=ask.want, epoch=epoch)
        units, expires, remaining, wait, reset, slot, used_slot = answer
        self._known[account] = remaining
        if account.kind in BUDGETS:
            self._warner.look(account, bound, bound - remaining, self._limits[account.subject].warn_ratio)
        return Grant(
            ask.scope,
            ask.name,
            ask.kind,
            units,
            expires_s=expires / _MICRO_S,
            remaining=remaining,
            retry_after_s=wait / _MICRO_S,
            reset_s=reset / _MICRO_S,
            slot=slot,
            used_slot=used_slot,
            epoch=epoch,
        )

    # -- reports without an answer -------------------------------------------------------------------------------

    def _later(self, account: Account, entry: Entry) -> None:
        """Tell Redis with the next call, which is made soon."""
        if len(self._queue) < _QUEUE_BOUND or entry["op"] == "claim":
            self._queue.append((account, entry))
        if self._local is None and (self._flushing is None or self._flushing.done()):
            with contextlib.suppress(RuntimeError):  # no loop runs yet: the next lend tells
                self._flushing = asyncio.get_running_loop().create_task(self._flush())

    async def _flush(self) -> None:
        try:
            await self._tell()
        except (RedisError, OSError, TimeoutError) as error:
            self._fall_back(error)

    async def _tell(self) -> None:
        """Send what is queued, in its order; what was not sent stays queued. Raises: as `_run`."""
        async with self._sending:
            while self._queue:
                batch = self._queue[:_BATCH]
                del self._queue[:_BATCH]
                try:
                    await self._run(batch)
                except BaseException:
                    self._queue[:0] = batch
                    raise

    # -- without Redis ---------------------------------------------------------------------------------------------

    def _fall_back(self, error: Exception) -> MemoryLedger:
        """Count here, from what was last known, until Redis is back."""
        if self._local is not None:
            return self._local
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        local = MemoryLedger(clock=self._clock, wall=self._wall, warner=self._warner)
        local.update(self._limits)
        for account, bound in self._bounds.items():
            gone = bound - self._known.get(account, bound)
            if gone > 0:
                local.charge(account.subject, account.kind, gone, self._wall())
        self._baseline = local.counted()
        self._fell_back_at = self._clock()
        self._local = local
        self._probing = asyncio.get_running_loop().create_task(self._probe())
        self._on_unavailable(reason)
        return local

    async def _probe(self) -> None:
        """Wait until Redis answers, tell it what was used meanwhile, and let it count again."""
        while (local := self._local) is not None:
            await asyncio.sleep(self._probe_s)
            counted = local.counted()
            try:
                async with asyncio.timeout(
                    TIMEOUT_S
                ):  # one that hangs must not count the same again with every attempt
                    await self._redis.ping()
                await self._tell()
                await self._run(_charges(counted, self._baseline_now()))
            except (RedisError, OSError, TimeoutError):
                continue
            self._local = None
            for account, entry in _charges(local.counted(), counted):  # lent while the call was under way
                self._later(account, entry)
            self._on_available()

    def _baseline_now(self) -> dict[Account, int]:
        """What of the baseline is still counted: it left a minute's window when Redis was away for a minute."""
        away_s = self._clock() - self._fell_back_at
        return {
            account: units
            for account, units in self._baseline.items()
            if account.kind not in WINDOWS or away_s <= WINDOWS[account.kind].length_s
        }


def _charges(counted: Mapping[Account, int], before: Mapping[Account, int]) -> list[tuple[Account, Entry]]:
    """What was used since `before`. Of what is in flight borrowers say themselves what they have."""
    return [
        (account, {"op": "charge", "units": more, "age": 0, "ours": True})
        for account, units in counted.items()
        if (more := units - before.get(account, 0)) > 0 and account.kind != "concurrency"
    ]
