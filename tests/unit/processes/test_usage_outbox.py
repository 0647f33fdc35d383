"""Usage rows reach control once each, whatever happens to the connection; what is lost is counted."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llm_router.accounts.usage import UsageRow
from llm_router.processes.snapshot import UsageBatch
from llm_router.processes.usage_outbox import BATCH_ROWS, MAX_BATCHES, UsageOutbox
from llm_router.processes.usage_rows import UsageRecorder
from llm_router.signals import Attempt, RequestRecord
from llm_router.testing import RecordingRecorder


class Line:
    """What an outbox sends, while it is there."""

    def __init__(self, *, is_there: bool = True) -> None:
        self.is_there = is_there
        self.sent: list[UsageBatch] = []
        self.dropped = 0

    def send(self, batch: UsageBatch) -> bool:
        if self.is_there:
            self.sent.append(batch)
        return self.is_there

    def drop(self) -> None:
        self.dropped += 1


def row(number: int) -> UsageRow:
    return UsageRow(id=str(number), time=0.0, request_id="r")


def test_rows_leave_in_order_and_are_forgotten_when_they_are_stored() -> None:
    """A batch is kept until it was acknowledged."""
    line = Line()
    outbox = UsageOutbox(line.send, line.drop)
    for number in range(3):
        outbox.add(row(number))
    outbox.flush()
    assert [r.id for r in line.sent[0].rows] == ["0", "1", "2"]
    assert outbox.statistics() == (0, 3, 0)
    outbox.taken(line.sent[0].number)
    assert outbox.statistics() == (0, 0, 0)


def test_what_was_not_acknowledged_is_sent_again_in_front() -> None:
    """A control that died may or may not have stored it: the store knows rows by their ids."""
    line = Line()
    outbox = UsageOutbox(line.send, line.drop)
    outbox.add(row(1))
    outbox.flush()
    outbox.add(row(2))
    outbox.connection_lost()
    outbox.flush()
    assert [r.id for r in line.sent[-1].rows] == ["1", "2"]
    outbox.taken(line.sent[0].number)  # late news of the old connection
    assert outbox.statistics().under_way == 2


def test_rows_of_before_a_lost_connection_are_told_from_those_after_it() -> None:
    """The control before may have stored them, and it lent what they used."""
    line = Line()
    outbox = UsageOutbox(line.send, line.drop)
    outbox.add(row(1))
    outbox.flush()
    outbox.add(row(2))
    outbox.connection_lost()
    outbox.add(row(3))
    line.is_there = False
    outbox.flush()
    line.is_there = True
    outbox.flush()
    assert [([r.id for r in batch.rows], batch.is_late) for batch in line.sent] == [
        (["1"], False),
        (["1", "2"], True),
        (["3"], False),
    ]


def test_only_so_many_batches_are_under_way() -> None:
    """The rest waits for acknowledgements."""
    line = Line()
    outbox = UsageOutbox(line.send, line.drop)
    for number in range(BATCH_ROWS * (MAX_BATCHES + 1)):
        outbox.add(row(number))
    outbox.flush()
    assert len(line.sent) == MAX_BATCHES
    assert outbox.statistics().waiting == BATCH_ROWS


def test_beyond_the_bound_the_oldest_waiting_rows_are_lost_and_counted() -> None:
    """What is under way is kept: it may be stored already."""
    line = Line()
    outbox = UsageOutbox(line.send, line.drop, max_rows=2)
    outbox.add(row(0))
    outbox.flush()
    for number in (1, 2):
        outbox.add(row(number))
    assert (outbox.statistics(), line.dropped) == ((1, 1, 1), 1)
    line.is_there = False
    outbox.connection_lost()
    outbox.flush()
    assert outbox.statistics() == (2, 0, 1)


@given(st.lists(st.sampled_from(["add", "flush", "take", "lose", "break", "mend"]), max_size=60))
def test_every_row_is_waiting_under_way_stored_or_counted_as_lost(steps: list[str]) -> None:
    """No sequence of events makes a row vanish."""
    line = Line()
    outbox = UsageOutbox(line.send, line.drop, max_rows=5)
    made, stored = 0, set[str]()
    for step in steps:
        match step:
            case "add":
                outbox.add(row(made))
                made += 1
            case "flush":
                outbox.flush()
            case "take" if line.sent:
                batch = line.sent.pop(0)
                stored |= {r.id for r in batch.rows}
                outbox.taken(batch.number)
            case "lose":
                outbox.connection_lost()
            case "break":
                line.is_there = False
            case "mend":
                line.is_there = True
    line.is_there = True
    while outbox.statistics()[:2] != (0, 0):
        outbox.connection_lost()
        outbox.flush()
        for batch in line.sent:
            stored |= {r.id for r in batch.rows}
            outbox.taken(batch.number)
    assert len(stored) + line.dropped >= made
    assert len(stored) <= made


def test_an_inference_makes_one_row_and_other_requests_none() -> None:
    """The row says what the record says; finishing twice is one row."""
    rows: list[UsageRow] = []
    inner = RecordingRecorder()
    recorder = UsageRecorder(inner, rows.append, wall=lambda: 50.0)
    for is_inference in (False, True):
        record = RequestRecord("POST", "/v1/chat/completions", "abc", 10.0)
        recorder.begin()
        record.is_inference = is_inference
        record.model, record.key, record.key_id = "m", "team", "k1"
        record.attempts.append(Attempt("b0", 10.0))
        record.input_tokens, record.output_tokens = 3, 4
        recorder.finish(record, 12.0)
        record.finished = True
        recorder.finish(record, 13.0)
    assert len(inner.finished) == 2
    (only,) = rows
    assert (only.time, only.duration_s, only.backend, only.key_id) == (50.0, 2.0, "b0", "k1")
    assert (only.input_tokens, only.output_tokens) == (3, 4)


def test_rows_hold_no_key_that_a_caller_sent_as_id() -> None:
    """Ids that are none stay as they are, with digits enough for a card."""
    rows: list[UsageRow] = []
    recorder = UsageRecorder(RecordingRecorder(), rows.append)
    given = ["0f64a3c97a8b12de-17", "4111111111111111", "order.17", "a.ghp_0123456789abcdefghijABCDEF"]
    for request_id in given:
        record = RequestRecord("POST", "/v1/chat/completions", request_id, 10.0)
        record.headers = {b"x-request-id": request_id.encode()}
        recorder.begin()
        record.is_inference = True
        recorder.finish(record, 12.0)
    assert [row.request_id for row in rows] == [*given[:3], "a.[REDACTED]"]
