"""Where managers find each other."""

from pathlib import Path

import pytest

from skep.errors import InvalidArgument
from skep.manager.membership.peer_addresses import PeerAddresses, addresses_in, full_address, peers_of
from skep.model.node import ManagerStatus, Node
from skep.model.values.ids import NodeId
from skep.store.etcd.membership import RaftMember
from skep.store.etcd.peers import HOSTS_FILE, EtcdPeer, hosts_content, load_peers, save_peers


def a_manager(id: str, addr: str) -> Node:
    return Node(id=NodeId(id), manager_status=ManagerStatus(addr=addr))


def a_member(name: str) -> RaftMember:
    return RaftMember(name=name, url=f"https://{name}:2378", id=1)


def test_the_addresses_are_those_of_members_and_those_about_to_become_one() -> None:
    nodes = [a_manager("a", "10.0.0.1:2377"), a_manager("b", "[fd00::2]:2377"), Node(id=NodeId("w"))]
    assert peers_of(addresses_in(nodes), [a_member("a")], []) == (
        EtcdPeer(name="a", url="https://a:2378", ip="10.0.0.1", manager_port=2377),
        EtcdPeer(name="b", url="", ip="fd00::2", manager_port=2377),
    )


def test_the_manager_beside_a_member_is_where_its_node_says_whatever_the_members_port() -> None:
    nodes = [a_manager("a", "10.0.0.1:2377")]
    (peer,) = peers_of(addresses_in(nodes), [RaftMember(name="a", url="https://a:2380", id=1)], [])
    assert (peer.manager_addr, peer.peer_addr) == ("10.0.0.1:2377", "10.0.0.1:2380")
    # As a manager of before wrote it.
    assert EtcdPeer(name="b", url="https://b:2378", ip="fd00::2").manager_addr == "[fd00::2]:2377"
    assert EtcdPeer(name="c", url="", ip="10.0.0.3").manager_addr == ""


def test_a_member_of_which_nothing_is_said_keeps_the_address_it_had() -> None:
    known = [EtcdPeer(name="a", url="", ip="10.0.0.9"), EtcdPeer(name="gone", url="", ip="10.0.0.8")]
    assert peers_of({}, [a_member("a")], known) == (EtcdPeer(name="a", url="https://a:2378", ip="10.0.0.9"),)


def test_the_hosts_file_is_written_in_place(tmp_path: Path) -> None:
    """It is mounted in etcd's namespace by its inode; a shorter content leaves nothing of the longer one."""
    a, b = EtcdPeer(name="a", url="u", ip="10.0.0.1"), EtcdPeer(name="b", url="u", ip="10.0.0.2")
    save_peers(tmp_path, [b, a])
    file = tmp_path / HOSTS_FILE
    inode = file.stat().st_ino
    assert file.read_text().splitlines()[-2:] == ["10.0.0.1 a", "10.0.0.2 b"]
    save_peers(tmp_path, [a])
    assert file.read_text().splitlines()[-1] == "10.0.0.1 a"
    assert file.stat().st_ino == inode
    assert load_peers(tmp_path) == (a,)


@pytest.mark.parametrize(
    ("said", "seen", "address"),
    [
        ("10.0.0.1:2377", "192.0.2.1", "10.0.0.1:2377"),
        (":2377", "192.0.2.1", "192.0.2.1:2377"),
        (":2377", "fd00::1", "[fd00::1]:2377"),
    ],
)
def test_an_unknown_address_is_taken_from_the_source_of_the_call(said: str, seen: str, address: str) -> None:
    assert full_address(said, seen) == address


@pytest.mark.parametrize("said", ["", "10.0.0.1", "10.0.0.1:", "10.0.0.1:70000", ":x"])
def test_what_is_no_address_is_refused(said: str) -> None:
    with pytest.raises(InvalidArgument):
        full_address(said, "192.0.2.1")


class Saved:
    """What was saved last."""

    def __init__(self) -> None:
        self.peers: tuple[EtcdPeer, ...] = ()

    def __call__(self, peers: tuple[EtcdPeer, ...]) -> None:
        self.peers = peers

    @property
    def ips(self) -> dict[str, str]:
        return {peer.name: peer.ip for peer in self.peers}


def a_book() -> tuple[PeerAddresses, Saved]:
    saved = Saved()
    peer_addresses = PeerAddresses([], saved)
    peer_addresses.note(
        [a_manager("a", "10.0.0.1:2377"), a_manager("b", "10.0.0.2:2377")], [a_member("a"), a_member("b")]
    )
    return peer_addresses, saved


def test_a_manager_that_announces_itself_elsewhere_is_there() -> None:
    peer_addresses, saved = a_book()
    peer_addresses.record_move("b", "10.9.0.2")
    assert saved.ips == {"a": "10.0.0.1", "b": "10.9.0.2"}
    assert [peer.name for peer in peer_addresses.moved] == ["b"]


def test_an_announced_address_lasts_until_its_own_node_object_changes() -> None:
    peer_addresses, saved = a_book()
    members = [a_member("a"), a_member("b")]
    peer_addresses.record_move("b", "10.9.0.2")
    peer_addresses.note([a_manager("a", "10.0.0.7:2377"), a_manager("b", "10.0.0.2:2377")], members)
    assert saved.ips == {"a": "10.0.0.7", "b": "10.9.0.2"}
    peer_addresses.note([a_manager("a", "10.0.0.7:2377"), a_manager("b", "10.9.0.2:2377")], members)
    assert peer_addresses.moved == []
    peer_addresses.note([a_manager("a", "10.0.0.7:2377"), a_manager("b", "10.0.0.2:2377")], members)
    assert saved.ips["b"] == "10.0.0.2", "it has moved back, and that is written down"


def test_a_stranger_that_announces_itself_is_not_taken_note_of() -> None:
    peer_addresses, saved = a_book()
    peer_addresses.record_move("x", "10.9.0.9")
    assert "x" not in saved.ips


@pytest.mark.parametrize(
    "said", ["10.0.0.1\n6.6.6.6 others:2377", "evil.example:2377", "10.0.0.1 x:2377", "fe80::1%x\ny:2377"]
)
def test_a_managers_address_is_an_address_and_nothing_else(said: str) -> None:
    with pytest.raises(InvalidArgument, match="expected ip:port"):
        full_address(said, "10.0.0.9")


def test_a_hosts_file_has_addresses_and_names_only() -> None:
    peers = [
        EtcdPeer(name="a", url="", ip="10.0.0.1"),
        EtcdPeer(name="b", url="", ip="10.0.0.2\n6.6.6.6 a"),
        EtcdPeer(name="c\n6.6.6.6 a", url="", ip="10.0.0.3"),
        EtcdPeer(name="d", url="", ip="fd00::1"),
    ]
    lines = hosts_content(peers).decode().splitlines()[2:]
    assert lines == ["10.0.0.1 a", "fd00::1 d"]
