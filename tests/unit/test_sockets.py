"""The kernel's count of sent bytes is that of TCP connections, and of nothing else."""

from __future__ import annotations

import socket

from sockets import sent_bytes


def test_data_of_open_connections_is_counted_once() -> None:
    """A count that leaves out a socket, or takes what was received, or a wrong field of the kernel's struct."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as here:
        there, _ = server.accept()
        with there:
            before = sent_bytes()
            here.sendall(bytes(100_000))
            _receive(there, 100_000)
            assert sent_bytes() - before == 100_000
            there.sendall(bytes(7))
            _receive(here, 7)
            assert sent_bytes() - before == 100_007


def test_pipes_between_processes_are_not_counted() -> None:
    here, there = socket.socketpair()
    with here, there:
        before = sent_bytes()
        here.sendall(bytes(1000))
        _receive(there, 1000)
        assert sent_bytes() == before


def _receive(connection: socket.socket, count: int) -> None:
    while count:
        count -= len(connection.recv(count))
