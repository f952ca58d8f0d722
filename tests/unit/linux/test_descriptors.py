"""Sockets that stay leave the low descriptors to libnftables."""

import os
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from skep.dataplane.netns.kernel import nft
from skep.linux.descriptors import SELECT_MAX, Listener, lowest_free, set_aside


@pytest.fixture(autouse=True)
def _many_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4 * SELECT_MAX), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_socket_that_is_set_aside_is_the_same_with_its_timeout() -> None:
    before = lowest_free()
    one, other = socket.socketpair()
    one.settimeout(7)
    moved = set_aside(one)
    with moved, other:
        assert moved.fileno() >= SELECT_MAX
        assert one.fileno() == -1
        assert moved.gettimeout() == 7
        assert not os.get_inheritable(moved.fileno())
        moved.sendall(b"hello")
        assert other.recv(5) == b"hello"
        assert lowest_free() == before


def test_what_a_listener_accepts_is_set_aside() -> None:
    with (
        Listener.of(socket.create_server(("127.0.0.1", 0))) as listener,
        socket.create_connection(listener.getsockname()) as client,
    ):
        connection, peer = listener.accept()
        with connection:
            assert peer == client.getsockname()
            assert min(listener.fileno(), connection.fileno()) >= SELECT_MAX


def test_without_room_above_it_stays_where_it_is() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (SELECT_MAX, hard))
    one, other = socket.socketpair()
    moved = set_aside(one)
    with moved, other:
        assert 0 <= moved.fileno() < SELECT_MAX


def test_with_no_low_descriptor_left_rules_are_refused_instead_of_ending_the_process() -> None:
    with ExitStack() as held:
        while lowest_free() < SELECT_MAX:
            held.enter_context(open(os.devnull))
        with pytest.raises(nft.NftFailed, match="too many open files"):
            nft.run("list tables")
