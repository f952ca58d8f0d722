"""The kernel's lists of sockets, as they are read."""

from pathlib import Path

from skep.linux.network.ports import read_listening_ports

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
    assert read_listening_ports(tmp_path, tmp_path) == low, "the kernel gives 40000 to whoever asks for any"
    chosen = tmp_path / "ip_local_port_range"
    chosen.write_text("50000\t60000\n")
    assert read_listening_ports(tmp_path, tmp_path) == low | {("tcp", 40000), ("udp", 40000)}
    chosen.write_text("1024\t60000\n")
    assert read_listening_ports(tmp_path, tmp_path) == {("tcp", 22), ("tcp", 80), ("udp", 53)}


def test_a_machine_without_lists_has_no_ports(tmp_path: Path) -> None:
    assert read_listening_ports(tmp_path) == frozenset()
