"""Ports of a rootless node: each reserved port is also opened on the machine, or nothing is reserved."""

import socket
from pathlib import Path

import pytest

from skep.dataplane.ports import AddressNotHere, Reservations
from skep.dataplane.rootless_ports import MachinePorts, refusal
from skep.errors import AlreadyExists, FailedPrecondition, SkepError, Unavailable


class Machine:
    """A machine whose other programs have the ``taken`` ports."""

    def __init__(self, taken: int = 0) -> None:
        self.open_ports: set[tuple[str, int, str]] = set()
        self.taken = taken
        self.asked: list[int] = []
        self.error: SkepError | None = None

    def check(self, protocol: str, address: str) -> None:
        pass

    def open(self, protocol: str, port: int, address: str) -> None:
        self.asked.append(port)
        if self.error is not None:
            raise self.error
        if self.taken:
            self.taken -= 1
            raise AlreadyExists("taken")
        self.open_ports.add((protocol, port, address))

    def close(self, protocol: str, port: int, address: str) -> None:
        self.open_ports.discard((protocol, port, address))


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True


def test_a_port_is_open_on_the_machine_while_it_is_reserved(tmp_path: Path) -> None:
    machine = Machine()
    ports = Reservations(tmp_path / "ports", {}, machine)
    port = ports.reserve("tcp", 0, "a")
    assert machine.open_ports == {("tcp", port, "")}
    assert not is_free(port)
    ports.release("tcp", port)
    assert machine.open_ports == set()
    assert is_free(port)


def test_a_chosen_port_that_the_machine_has_taken_is_chosen_again(tmp_path: Path) -> None:
    machine = Machine(taken=2)
    ports = Reservations(tmp_path / "ports", {}, machine)
    port = ports.reserve("tcp", 0, "a")
    assert len(machine.asked) == 3
    assert machine.asked[-1] == port
    ports.release("tcp", port)


def test_a_wanted_port_that_the_machine_refuses_is_not_reserved(tmp_path: Path) -> None:
    machine = Machine(taken=1)
    ports = Reservations(tmp_path / "ports", {}, machine)
    with socket.create_server(("127.0.0.1", 0)) as free:
        wanted = free.getsockname()[1]
    with pytest.raises(AlreadyExists):
        ports.reserve("tcp", wanted, "a")
    assert is_free(wanted)
    machine.error = Unavailable("rootlesskit does not respond")
    with pytest.raises(Unavailable):
        ports.reserve("tcp", wanted, "a")
    assert (ports.list(), is_free(wanted)) == ((), True)


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        (
            "listen tcp4 0.0.0.0:80: bind: address already in use",
            AlreadyExists,
            "Bind for 0.0.0.0:80 failed: port is already allocated",
        ),
        ("conflict with ID 3", AlreadyExists, "already allocated"),
        (
            "listen tcp4 0.0.0.0:80: bind: permission denied",
            FailedPrecondition,
            "ip_unprivileged_port_start=80",
        ),
        ("listen tcp6 [::]:80: bind: cannot assign requested address", AddressNotHere, "cannot assign"),
        ("something new", FailedPrecondition, "rootlesskit cannot listen on 0.0.0.0:80: something new"),
    ],
)
def test_a_refusal_of_rootlesskit_is_said_in_dockers_words(
    text: str, kind: type[SkepError], words: str
) -> None:
    error = refusal("0.0.0.0", 80, text)
    assert type(error) is kind
    assert words in str(error)


@pytest.mark.parametrize(
    ("protocol", "address", "words"),
    [
        ("sctp", "", "publishes no sctp ports"),
        ("tcp", "192.0.2.7", "does not publish on 192.0.2.7: use 127.0.0.1"),
    ],
)
def test_what_rootlesskit_cannot_open_is_refused_before_it_is_bound(
    tmp_path: Path, protocol: str, address: str, words: str
) -> None:
    ports = Reservations(tmp_path / "ports", {}, MachinePorts(tmp_path / "api.sock"))
    with pytest.raises(FailedPrecondition, match=words):
        ports.reserve(protocol, 8080, "a", address)


def test_a_silent_rootlesskit_is_named(tmp_path: Path) -> None:
    ports = Reservations(tmp_path / "ports", {}, MachinePorts(tmp_path / "api.sock"))
    with pytest.raises(Unavailable, match="rootlesskit does not respond"):
        ports.reserve("tcp", 0, "a")
    assert ports.list() == ()
