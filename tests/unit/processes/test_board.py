"""The heartbeat board: what one process writes, another reads."""

from __future__ import annotations

import subprocess
import sys

import pytest

from llm_router.processes.board import CONTROL_ROW, Board, worker_row


def test_rows_start_unbeaten_and_are_separate() -> None:
    """A beat changes its own row only, and clearing forgets it."""
    board = Board.create(3)
    assert [board.read(row) for row in range(board.rows)] == [0.0, 0.0, 0.0]
    board.beat(1, 12.5)
    assert [board.read(row) for row in range(board.rows)] == [0.0, 12.5, 0.0]
    board.clear(1)
    assert board.read(1) == 0.0
    board.close()


def test_a_row_that_is_not_there_is_an_error() -> None:
    """Nobody writes into somebody else's memory."""
    board = Board.create(1)
    with pytest.raises(IndexError):
        board.beat(1, 1.0)
    board.close()


def test_control_and_workers_have_rows_of_their_own() -> None:
    """Row 0 is control's, and workers follow."""
    assert CONTROL_ROW == 0
    assert [worker_row(index) for index in range(3)] == [1, 2, 3]


def test_another_process_beats_on_the_inherited_board() -> None:
    """The memory is shared, not copied."""
    board = Board.create(4)
    code = "import sys; from llm_router.processes.board import Board; Board.attach(int(sys.argv[1])).beat(2, 7.25)"
    subprocess.run([sys.executable, "-c", code, str(board.fd)], pass_fds=[board.fd], check=True)
    assert board.read(2) == 7.25
    assert repr(board) == "Board([0.0, 0.0, 7.25, 0.0])"
    board.close()
