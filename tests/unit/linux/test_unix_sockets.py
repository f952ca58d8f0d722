"""Unix sockets that other users of the machine cannot connect to."""

import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from skep.linux.unix_sockets import private_socket


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM])
def test_only_this_user_may_connect_from_the_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: socket.SocketKind
) -> None:
    modes: list[int] = []
    listen = socket.socket.listen

    def listening(self: socket.socket) -> None:
        modes.append(stat.S_IMODE((tmp_path / "socket").stat().st_mode))
        listen(self)

    monkeypatch.setattr(socket.socket, "listen", listening)
    is_listening = kind != socket.SOCK_DGRAM
    with private_socket(tmp_path / "socket", kind, is_listening=is_listening):
        modes.append(stat.S_IMODE((tmp_path / "socket").stat().st_mode))
    assert set(modes) == {0o600}


def test_what_other_threads_make_meanwhile_keeps_its_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The umask is the whole process's."""
    seen: list[int] = []
    set_mask: Callable[[int], int] = os.umask

    def umask(mask: int) -> int:
        seen.append(mask)
        return set_mask(mask)

    monkeypatch.setattr(os, "umask", umask)
    private_socket(tmp_path / "socket").close()
    assert seen == []


def test_it_takes_the_place_of_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    private_socket(path).close()
    with private_socket(path, is_listening=True), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
