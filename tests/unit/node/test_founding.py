"""What is refused before a cluster is made: its manager could not start."""

import errno
import socket
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from skep.api.errors import Untranslated
from skep.errors import InvalidArgument
from skep.model.swarm import CAConfig, DispatcherConfig, SwarmSpec
from skep.model.times import SECOND_NS
from skep.node.founding import check_listening, check_settings, chosen_peer_addr, peer_warning


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            SwarmSpec(ca_config=CAConfig(node_cert_expiry=60 * SECOND_NS)),
            "minimum certificate expiry time is: 1h0m0s",
        ),
        (SwarmSpec(dispatcher=DispatcherConfig(heartbeat_period=-1)), "period cannot be a negative duration"),
    ],
)
def test_settings_that_a_manager_refuses_are_refused_before_there_is_one(
    spec: SwarmSpec, message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        check_settings(spec)


def test_settings_that_are_left_out_are_the_defaults() -> None:
    check_settings(SwarmSpec())


@pytest.mark.parametrize("port", ["²", "9" * 5000, "65535", ""])
def test_a_port_that_is_none_is_refused(port: str) -> None:
    with pytest.raises(Untranslated, match="invalid port"):
        check_listening(f"127.0.0.1:{port}")


# --- ports ----------------------------------------------------------------------------------------------------------

LISTEN = "0.0.0.0:2377"


def taken(*addrs: str) -> Callable[[str], OSError | None]:
    return lambda addr: OSError(errno.EADDRINUSE, "in use") if addr in addrs else None


@pytest.mark.parametrize(
    ("listen", "wanted", "in_use", "chosen"),
    [
        (LISTEN, "", (), "0.0.0.0:2378"),
        ("[fd00::1]:3000", "", (), "[fd00::1]:3001"),
        (LISTEN, "", ("0.0.0.0:2378",), "0.0.0.0:2379"),
        (LISTEN, "", ("0.0.0.0:2378", "0.0.0.0:2379"), "0.0.0.0:2380"),
        (LISTEN, ":4000", (), "0.0.0.0:4000"),
        (LISTEN, "192.0.2.1:4000", (), "192.0.2.1:4000"),
        # A worker that is promoted cannot be asked for another port.
        (LISTEN, ":4000", ("0.0.0.0:4000",), "0.0.0.0:2378"),
        (LISTEN, ":2377", (), "0.0.0.0:2378"),
        # Nothing is free: etcd says what is wrong.
        ("0.0.0.0:65534", "", ("0.0.0.0:65535",), "0.0.0.0:65535"),
    ],
)
def test_the_peer_port_is_the_one_wanted_or_the_next_that_is_free(
    listen: str, wanted: str, in_use: tuple[str, ...], chosen: str
) -> None:
    assert chosen_peer_addr(listen, wanted, taken(*in_use)) == chosen


def test_of_twenty_ports_that_are_taken_the_first_is_used() -> None:
    in_use = (f"0.0.0.0:{port}" for port in range(2378, 2398))
    assert chosen_peer_addr(LISTEN, "", taken(*in_use)) == "0.0.0.0:2378"


@pytest.fixture
def listener() -> Iterator[tuple[str, int]]:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        yield server.getsockname()


def test_the_next_port_being_taken_refuses_nothing_and_another_is_chosen(listener: tuple[str, int]) -> None:
    host, port = listener
    listen = f"{host}:{port - 1}"
    assert chosen_peer_addr(listen, "") not in {listen, f"{host}:{port}"}


def test_ports_that_a_user_named_and_that_are_taken_are_refused_by_name(listener: tuple[str, int]) -> None:
    host, port = listener
    with pytest.raises(Untranslated, match=rf"listen tcp {host}:{port}: bind: address already in use"):
        check_listening(f"{host}:{port}")
    with pytest.raises(Untranslated, match=rf"{host}:{port} \(peer-addr\): bind: address already in use"):
        check_listening(f"{host}:0", f":{port}")
    with pytest.raises(Untranslated, match=r"\(peer-addr\): bind: cannot assign requested address"):
        check_listening(f"{host}:0", "192.0.2.1:2378")
    check_listening(f"{host}:0", "127.0.0.2:0")


@pytest.mark.parametrize(
    ("wanted", "used", "says"),
    [
        ("", "0.0.0.0:2378", ""),
        (":2378", "0.0.0.0:2378", ""),
        ("", "0.0.0.0:2379", "TCP port 2379"),
        (":4000", "0.0.0.0:4000", "TCP port 4000"),
        (":4000", "0.0.0.0:2378", "peer-addr 4000 is not used"),
        ("192.0.2.1:4000", "0.0.0.0:4000", "peer-addr 192.0.2.1:4000 is not used"),
    ],
)
def test_an_unexpected_peer_port_is_logged(wanted: str, used: str, says: str) -> None:
    assert says in peer_warning(LISTEN, wanted, used)
    assert bool(says) == bool(peer_warning(LISTEN, wanted, used))
