"""What a process that reads from its peers is given: the only I/O is on loopback, between descriptors of this one."""

import os
import socket

import pytest

from skep.store.etcd.process.deadlines import SILENT_S, Deadlines, end_connections


def timeout_ms(one: socket.socket) -> int:
    return one.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)


def test_each_connection_is_given_a_deadline_once_on_both_sides_and_a_listener_none() -> None:
    deadlines = Deadlines(os.getpid())
    deadlines.apply()  # whatever this process has besides
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with socket.create_connection(listener.getsockname()) as near, listener.accept()[0] as far:
            assert deadlines.apply() == 2
            for end in (near, far):
                assert timeout_ms(end) == SILENT_S * 1000
                assert end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                idle, pause, count = (
                    end.getsockopt(socket.IPPROTO_TCP, option)
                    for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
                )
                assert idle + pause * count == SILENT_S
            assert timeout_ms(listener) == 0
            assert deadlines.apply() == 0
            near.sendall(b"it goes on")
            assert far.recv(100) == b"it goes on"
        with socket.create_connection(listener.getsockname()), listener.accept()[0]:
            assert deadlines.apply() == 2, "the next ones, too"


def test_a_process_that_has_ended_has_no_connections() -> None:
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(ProcessLookupError):
        Deadlines(child).apply()


def test_connections_that_others_have_made_end_and_no_others() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_server(("127.0.0.1", 0)) as other:
        port = listener.getsockname()[1]
        with (
            socket.create_connection(listener.getsockname()) as near,
            listener.accept()[0] as far,
            socket.create_connection(other.getsockname()) as stays,
            other.accept()[0] as answering,
        ):
            assert end_connections(os.getpid(), port) == 1
            assert near.recv(1) == far.recv(1) == b""
            stays.sendall(b"x")
            assert answering.recv(1) == b"x"
        with socket.create_connection(listener.getsockname()) as again, listener.accept()[0] as taken:
            again.sendall(b"x")
            assert taken.recv(1) == b"x"
