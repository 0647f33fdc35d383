"""Accepting: many connections in one turn of the loop, and none while descriptors are out."""

from __future__ import annotations

import asyncio
import errno
import socket

from llm_router.gateway.listener import Listener
from support.aio import run, until


class Counting(asyncio.Protocol):
    """Counts the connections that were made."""

    made = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        type(self).made += 1
        transport.close()


def listening() -> socket.socket:
    sock = socket.create_server(("127.0.0.1", 0), backlog=1024)
    sock.setblocking(False)
    return sock


def test_a_burst_of_connections_is_accepted_in_few_turns() -> None:
    """200 clients that connected before the loop looked are all served after a handful of turns."""

    async def scenario() -> None:
        sock = listening()
        clients = [socket.create_connection(sock.getsockname()) for _ in range(200)]
        Counting.made = 0
        listener = Listener(sock, Counting, loop=asyncio.get_running_loop())
        for _ in range(20):
            await asyncio.sleep(0)
        assert Counting.made == 200
        listener.close()
        listener.close()
        for client in clients:
            client.close()

    run(scenario())


class Exhausted(socket.socket):
    """A listening socket of a process that has no descriptor left, until `relieved`."""

    relieved = False
    tries = 0

    def accept(self) -> tuple[socket.socket, object]:
        if not self.relieved:
            self.tries += 1
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


def test_accepting_pauses_while_descriptors_are_out() -> None:
    """Without the pause the loop would spin on a socket that is readable and cannot be accepted."""

    async def scenario() -> None:
        plain = listening()
        sock = Exhausted(fileno=plain.detach())
        client = socket.create_connection(sock.getsockname())
        Counting.made = 0
        listener = Listener(sock, Counting, loop=asyncio.get_running_loop(), exhausted_s=0.02)
        await until(lambda: sock.tries >= 2)
        assert sock.tries < 20
        sock.relieved = True
        await until(lambda: Counting.made == 1)
        listener.close()
        client.close()

    run(scenario())


def test_closing_during_the_pause_leaves_nothing_behind() -> None:
    async def scenario() -> None:
        plain = listening()
        sock = Exhausted(fileno=plain.detach())
        client = socket.create_connection(sock.getsockname())
        listener = Listener(sock, Counting, loop=asyncio.get_running_loop())
        await until(lambda: sock.tries == 1)
        listener.close()
        assert sock.fileno() == -1
        client.close()

    run(scenario())
