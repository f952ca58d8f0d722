"""Ports of a rootless node: each reserved port is also opened on the machine, or nothing is reserved."""

import asyncio
import json
import socket
import socketserver
import threading
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest

from skep.aio.clock import SystemClock
from skep.dataplane.net_process.protocol import Reservation
from skep.dataplane.ports import AddressNotHere, Reservations
from skep.dataplane.rootless_ports import MachinePorts, refusal
from skep.errors import AlreadyExists, FailedPrecondition, SkepError, Unavailable
from tests.support.managers.wire_rig import until


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

    def ping(self) -> None:
        pass

    def restore(self, held: Iterable[Reservation]) -> None:
        pass


class RootlessKit(BaseHTTPRequestHandler):
    """RootlessKit's API.  Its server has the open ports by id, and what it does not do."""

    server: "Api"

    def do_GET(self) -> None:
        self._answer(200, [{"id": id, "spec": spec} for id, spec in self.server.ports.items()])

    def do_POST(self) -> None:
        spec = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if spec["parentPort"] in self.server.taken or spec in self.server.ports.values():
            self._answer(400, "bind: address already in use")
        else:
            self.server.ports[max(self.server.ports, default=0) + 1] = spec
            self._answer(201, {})

    def do_DELETE(self) -> None:
        del self.server.ports[int(self.path.rpartition("/")[2])]
        self._answer(200, {})

    def _answer(self, status: int, body: object) -> None:
        if self.server.is_silent:
            return  # the call was done all the same
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


class Api(socketserver.UnixStreamServer):
    ports: dict[int, dict[str, Any]]
    taken: set[int]
    is_silent = False

    def get_request(self) -> tuple[Any, Any]:
        return self.socket.accept()[0], ("rootlesskit", 0)

    def numbers(self) -> set[int]:
        return {one["parentPort"] for one in self.ports.values()}


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with Api(str(tmp_path / "api.sock"), RootlessKit) as server:
        server.ports, server.taken = {}, set()
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True


def test_a_port_whose_release_rootlesskit_missed_is_free_for_the_next_container(
    tmp_path: Path, api: Api
) -> None:
    ports = Reservations(tmp_path / "ports", {}, MachinePorts(tmp_path / "api.sock"))
    other, port = ports.reserve("tcp", 0, "other"), ports.reserve("tcp", 0, "a")
    api.is_silent = True
    ports.release("tcp", port)
    assert [
        one.port
        for one in msgspec.json.decode((tmp_path / "ports").read_bytes(), type=tuple[Reservation, ...])
    ] == [other]
    assert api.numbers() == {other, port}
    with pytest.raises(Unavailable):
        ports.reserve("tcp", port, "b")
    api.is_silent = False
    assert ports.reserve("tcp", port, "b") == port
    assert api.numbers() == {other, port}
    ports.release("tcp", port)
    ports.release("tcp", other)
    assert api.numbers() == set()


async def test_missed_calls_are_repeated_with_growing_pauses(tmp_path: Path, api: Api) -> None:
    class Pausing(SystemClock):
        pauses: ClassVar[list[float]] = []

        async def sleep(self, seconds: float) -> None:
            self.pauses.append(seconds)
            api.is_silent = len(self.pauses) < 3
            await super().sleep(0)

    ports = Reservations(tmp_path / "ports", {}, MachinePorts(tmp_path / "api.sock"))
    keeping = asyncio.create_task(ports.keep_outside(Pausing(), lambda: 1.0))
    port = ports.reserve("tcp", 0, "a")
    api.is_silent = True
    ports.release("tcp", port)
    assert api.numbers() == {port}
    await until(lambda: not api.ports)
    assert Pausing.pauses == [1.0, 2.0, 4.0]
    keeping.cancel()


def test_a_port_that_cannot_be_opened_keeps_no_other_closed(tmp_path: Path, api: Api) -> None:
    machine = MachinePorts(tmp_path / "api.sock")
    api.taken = {8081}
    api.ports = {7: {"proto": "tcp4", "parentIP": "0.0.0.0", "parentPort": 9000, "childPort": 9000}}
    held = {Reservation("tcp", number, str(number)): socket.socket() for number in (8080, 8081, 8082)}
    ports = Reservations(tmp_path / "ports", held, machine)
    with pytest.raises(AlreadyExists, match="8081"):
        ports.settle()
    assert api.numbers() == {8080, 8082}
    api.taken = set()
    ports.settle()
    assert api.numbers() == {8080, 8081, 8082}
    for one in held.values():
        one.close()


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
