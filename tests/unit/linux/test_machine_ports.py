"""The kernel's lists of sockets, as they are read."""

import errno
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from skep.linux.network.ports import listening_sockets, read_listening_ports

HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
TCP = f"""{HEAD}\
   0: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   1: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 2 1 0 100 0 0 10 0
   2: 0100007F:D000 0100007F:1F90 01 00000000:00000000 00:00000000 00000000     0        0 3 1 0 100 0 0 10 0
   3: broken
   4: 00000000:9C40 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4 1 0 100 0 0 10 0
"""
TCP6 = f"""{HEAD}\
   0: {"0" * 32}:0050 {"0" * 32}:0000 0A 00000000:00000000 00:00000000 00000000     0        0 5 1 0 100 0 0 10 0
   1: {"0" * 24}01000000:0051 {"0" * 32}:0000 0A 00000000:00000000 00:00000000 00000000  0   0 6 1 0 100 0 0 10 0
"""
UDP = f"""{HEAD}\
   0: 00000000:0035 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 7 2 0 0
   1: 00000000:9C40 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 8 2 0 0
   2: 0100007F:0036 0100007F:0035 01 00000000:00000000 00:00000000 00000000     0        0 9 2 0 0
"""


def test_sockets_that_wait_for_anybody_are_listed_and_those_of_clients_are_not(tmp_path: Path) -> None:
    for name, text in (("tcp", TCP), ("tcp6", TCP6), ("udp", UDP)):
        (tmp_path / name).write_text(text)
    low = {("tcp", 22), ("tcp", 8080), ("tcp", 80), ("udp", 53)}  # 80 of all addresses, IPv4 too
    assert read_listening_ports(tmp_path, tmp_path, None) == low, (
        "the kernel gives 40000 to whoever asks for any"
    )
    chosen = tmp_path / "ip_local_port_range"
    chosen.write_text("50000\t60000\n")
    assert read_listening_ports(tmp_path, tmp_path, None) == low | {("tcp", 40000), ("udp", 40000)}
    chosen.write_text("1024\t60000\n")
    assert read_listening_ports(tmp_path, tmp_path, None) == {("tcp", 22), ("tcp", 80), ("udp", 53)}


def test_a_machine_without_lists_has_no_ports(tmp_path: Path) -> None:
    assert read_listening_ports(tmp_path, listening=None) == frozenset()


def test_the_kernel_lists_listening_sockets_without_its_table_of_connections(tmp_path: Path) -> None:
    (tmp_path / "ip_local_port_range").write_text(
        "1 1\n"
    )  # so that the ports that the kernel chooses here count
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
        socket.create_server(("::", 0), family=socket.AF_INET6) as anywhere,
        socket.create_server(("::1", 0), family=socket.AF_INET6) as loopback,
    ):
        found = read_listening_ports(tmp_path, tmp_path)  # no list is in this directory
        port, of_client, everywhere, of_loopback = (
            one.getsockname()[1] for one in (server, client, anywhere, loopback)
        )
        assert {("tcp", port), ("tcp", everywhere)} <= found
        assert not found & {("tcp", of_client), ("tcp", of_loopback)}
        assert port in {one for _, one in listening_sockets("")}


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EPROTONOSUPPORT])
def test_a_kernel_without_lists_of_sockets_has_files(number: int, tmp_path: Path) -> None:
    (tmp_path / "tcp").write_text(TCP)

    def absent(_family: str) -> Iterator[tuple[str, int]]:
        raise OSError(number, "no such protocol")

    assert read_listening_ports(tmp_path, tmp_path, absent) == {("tcp", 22), ("tcp", 8080)}


def test_a_list_that_cannot_be_read_is_not_empty(tmp_path: Path) -> None:
    def refused(_family: str) -> Iterator[tuple[str, int]]:
        raise PermissionError(errno.EPERM, "not permitted")

    with pytest.raises(PermissionError):
        read_listening_ports(tmp_path, tmp_path, refused)
