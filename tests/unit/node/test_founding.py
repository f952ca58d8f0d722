"""What is refused before a cluster is made: its manager could not start."""

import errno
import socket
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from skep.api.errors import Untranslated
from skep.errors import InvalidArgument
from skep.model.swarm import CAConfig, DispatcherConfig, SwarmSpec
from skep.model.values.times import SECOND_NS
from skep.node.cluster.founding import check_listening, check_settings, chosen_peer_addr, peer_warning


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


@pytest.mark.parametrize("port", ["²", "9" * 5000, "65536", ""])
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
        ("[fd00::1]:3000", "", (), "[fd00::1]:13000"),
        (LISTEN, "", ("0.0.0.0:2378",), "0.0.0.0:12377"),
        (LISTEN, "", ("0.0.0.0:2378", "0.0.0.0:12377"), "0.0.0.0:12378"),
        (LISTEN, ":4000", (), "0.0.0.0:4000"),
        (LISTEN, "192.0.2.1:4000", (), "192.0.2.1:4000"),
        # A worker that is promoted cannot be asked for another port.
        (LISTEN, ":4000", ("0.0.0.0:4000",), "0.0.0.0:2378"),
        (LISTEN, ":2377", (), "0.0.0.0:2378"),
        # Nothing is free: etcd says what is wrong.
        ("0.0.0.0:65535", "", tuple(f"0.0.0.0:{port}" for port in range(55535, 55555)), "0.0.0.0:55535"),
    ],
)
def test_the_peer_port_is_the_one_wanted_or_the_default_or_a_free_one(
    listen: str, wanted: str, in_use: tuple[str, ...], chosen: str
) -> None:
    assert chosen_peer_addr(listen, wanted, taken(*in_use)) == chosen


def test_of_ports_that_are_all_taken_the_first_is_used() -> None:
    assert chosen_peer_addr(LISTEN, "", lambda _: OSError(errno.EADDRINUSE, "in use")) == "0.0.0.0:2378"


@pytest.mark.parametrize("first", [2477, 2379, 30000, 54998, 65533])
def test_managers_side_by_side_take_none_of_each_others_ports(first: int) -> None:
    """Each is made while those before it listen, whichever port it prefers."""
    listening: set[str] = set()
    for port in (first, first + 1, first + 2):
        listen = f"127.0.0.1:{port}"
        assert listen not in listening
        peer = chosen_peer_addr(listen, "", taken(*listening))
        assert peer not in listening
        listening |= {listen, peer}
    assert len(listening) == 6


def test_a_listen_port_that_is_etcds_of_the_default_manager_is_refused_with_the_reason() -> None:
    refusal = taken("0.0.0.0:2378", "0.0.0.0:2379")
    with pytest.raises(Untranslated, match=r"address already in use .etcd of a manager at 2377 has it"):
        check_listening("0.0.0.0:2378", refusal=refusal)
    with pytest.raises(Untranslated, match=r"address already in use$"):
        check_listening("0.0.0.0:2379", refusal=refusal)


@pytest.fixture
def listener() -> Iterator[tuple[str, int]]:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        yield server.getsockname()


def test_a_taken_port_refuses_no_promotion_and_another_is_chosen(listener: tuple[str, int]) -> None:
    host, port = listener
    listen = f"{host}:{port - 1}"
    assert chosen_peer_addr(listen, f":{port}") not in {listen, f"{host}:{port}"}


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
