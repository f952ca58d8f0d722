"""Open connections of a container: those with a client that may still send or receive."""

import os

import pytest

from skep.dataplane.netns.kernel.namespaces import inbound, inbound_of

# Written by a kernel for a server at 10.99.0.2 with ports 8000 and, for both families, 9000.
TCP = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:1F40 00000000:0000 0A 00000000:00000001 00:00000000 00000000     0        0 392171 2 0 100 0 0 10 0
   1: 0100007F:B51E 0100007F:1F40 01 00000000:00000000 00:00000000 00000000     0        0 393973 2 0 20 0 0 10 -1
   2: 0200630A:1F40 0100630A:9B8C 08 00000000:00000001 00:00000000 00000000     0        0 393970 1 0 20 4 0 10 -1
   3: 0100007F:1F40 0100007F:B51E 01 00000000:00000000 00:00000000 00000000     0        0 0 1 0 20 0 0 10 -1
   4: 0200630A:A4FC 0100630A:1B58 01 00000000:00000000 00:00000000 00000000     0        0 393974 2 0 20 0 0 10 -1
   5: 0200630A:1F40 0100630A:9B88 01 00000000:00000000 00:00000000 00000000     0        0 392173 1 0 20 0 0 10 -1
"""
TCP6 = """\
  sl  local_address                         remote_address                        st tx_queue rx_queue tr tm->when
   0: 00000000000000000000000000000000:2328 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000
   1: 0000000000000000FFFF00000200630A:2328 0000000000000000FFFF00000100630A:E118 01 00000000:00000000 00:00000000
"""


def test_clients_from_elsewhere_count_also_half_closed_ones() -> None:
    assert inbound([TCP]) == 2


def test_a_socket_of_both_families_shows_its_clients_in_the_second_table() -> None:
    assert inbound([TCP6]) == 1
    assert inbound([TCP, TCP6]) == 3


@pytest.mark.parametrize("state", ["05", "06", "07", "02"])
def test_what_is_closed_on_our_side_or_only_asked_for_does_not_count(state: str) -> None:
    assert inbound([TCP.replace(" 08 ", f" {state} ").replace("9B88 01", f"9B88 {state}")]) == 0


def test_a_port_without_a_listener_has_no_clients() -> None:
    assert inbound([TCP.replace(" 0A ", " 07 ")]) == 0


@pytest.mark.parametrize("text", ["", "header\n", "header\nnonsense\n", "header\n a b c\n"])
def test_what_is_no_table_has_no_connections(text: str) -> None:
    assert inbound([text]) == 0


def test_a_process_that_is_gone_has_none() -> None:
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)

    assert inbound_of(pid) == 0
