"""The process that sends logs: what is wrong with one container, its files or its remote, ends that one's work only."""

import asyncio
import errno
import os
import shutil
import socket
import ssl
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from skep.aio.clock import SystemClock
from skep.engine.containers.container import LogConfig
from skep.engine.log_drivers.facts import LogFacts
from skep.engine.log_drivers.forwarder import Forwarder
from skep.engine.log_drivers.message import LogMessage
from skep.engine.log_drivers.orders import (
    LINE_BYTES_MAX,
    Done,
    End,
    Forward,
    Held,
    Hold,
    Peers,
    Report,
    Response,
)
from skep.engine.log_drivers.sender import Sender
from skep.engine.log_drivers.spool import Spool
from skep.engine.log_drivers.transport import (
    ANYWHERE,
    FILE_BYTES_MAX,
    RemoteAddress,
    RemoteTlsFiles,
    client_context,
    connect,
)
from skep.engine.logs.log_files import compress, rotate
from skep.engine.logs.log_forwarding import encoded
from skep.linux.filewatch import FileWatch
from tests.support.file_faults import file_faults

ID = "0123456789abcdef" * 4
FACTS = LogFacts(
    id=ID, name="web", image_id="sha256:ab", image="busybox", command="sh", created="", hostname="n1"
)


class Collected:
    """A sink that takes everything."""

    confirms_each = True

    def __init__(self) -> None:
        self.lines: list[str] = []

    async def open(self) -> None:
        """Nothing."""

    async def send(self, message: LogMessage) -> None:
        self.lines.append(message.line.decode())

    async def flush(self) -> None:
        """Nothing."""

    async def close(self) -> None:
        """Nothing."""


def written(current: Path, *numbers: int) -> None:
    with open(current, "a") as file:
        file.writelines(f"2026-01-31T12:00:00.{one:09d}+00:00 stdout F {one}\n" for one in numbers)


def with_compressed(directory: Path) -> Path:
    """A log of 1, 2 (compressed), 3."""
    directory.mkdir()
    current = directory / "current"
    written(current, 1, 2)
    assert rotate(current, LogConfig(max_size_bytes=1, max_files=4), current.touch)
    compress(current)
    written(current, 3)
    return current


async def eventually(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@asynccontextmanager
async def running(current: Path) -> AsyncIterator[tuple[Forwarder, Collected, list[str]]]:
    sink, events = Collected(), list[str]()

    def report(event: str, reason: str, lines: int) -> None:
        events.append(event)

    forwarder = Forwarder(Spool(current), FileWatch(current.parent), sink, SystemClock(), report)
    task = asyncio.create_task(forwarder.run())
    try:
        yield forwarder, sink, events
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
def no_room() -> Iterator[Callable[[], None]]:
    """Nothing can be unpacked until this is called."""
    temporary = Path(tempfile.gettempdir())
    with file_faults(temporary) as faults:
        faults.choose(errno.ENOSPC, lambda call, path: call == "open" and temporary in (path, path.parent))
        yield faults.end


async def test_a_log_that_cannot_be_read_is_tried_again(tmp_path: Path, no_room: Callable[[], None]) -> None:
    async with running(with_compressed(tmp_path / "log")) as (_, sink, events):
        await eventually(lambda: events)
        assert events == ["log cannot be read"]
        assert not sink.lines
        no_room()
        await eventually(lambda: len(sink.lines) == 3)
        assert sink.lines == ["1", "2", "3"]


async def test_a_damaged_file_costs_its_own_lines_only_and_is_reported_once(tmp_path: Path) -> None:
    current = with_compressed(tmp_path / "log")
    packed = current.with_name("current.1.gz")
    packed.write_bytes(packed.read_bytes()[:-8] + bytes(8))  # a wrong checksum
    async with running(current) as (_, sink, events):
        await eventually(lambda: "3" in sink.lines)
        written(current, 4)
        await eventually(lambda: "4" in sink.lines)
        assert events == ["damaged part of a log not sent"]


async def test_a_later_file_that_cannot_be_read_is_tried_again(
    tmp_path: Path, no_room: Callable[[], None]
) -> None:
    current = with_compressed(tmp_path / "log")
    written(current.with_name("current.2"), 0)
    async with running(current) as (_, sink, events):
        await eventually(lambda: events)
        assert (sink.lines, events) == (["0"], ["log cannot be read"])
        no_room()
        await eventually(lambda: len(sink.lines) == 4)
        assert sink.lines == ["0", "1", "2", "3"]


async def test_a_removed_log_that_cannot_be_unpacked_is_sent_once_it_can(
    tmp_path: Path, no_room: Callable[[], None]
) -> None:
    current = with_compressed(tmp_path / "log")
    async with running(current) as (forwarder, sink, events):
        await eventually(lambda: events)
        forwarder.hold()
        forwarder.end()
        shutil.rmtree(current.parent)
        no_room()
        await eventually(lambda: len(sink.lines) == 3)
        assert sink.lines == ["1", "2", "3"]


async def test_an_order_that_fails_ends_that_containers_work_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(Spool, "hold", broken)
    said: list[Response] = []
    sender = Sender(said.append)
    options = {"gelf-address": "udp://127.0.0.1:9"}
    order = Forward(
        id=ID, current=str(tmp_path / "current"), driver="gelf", options=options, facts=FACTS, has_ended=False
    )
    sender.take(order)
    sender.take(Hold(ID))
    assert [type(one) for one in said] == [Report, Held]
    said.clear()
    wrong = {"mode": "non-blocking", "max-buffer-size": "much", **options}
    sender.take(msgspec.structs.replace(order, id="other", options=wrong))
    assert [type(one) for one in said] == [Report, Done]
    sender.take(End(ID))
    await eventually(lambda: Done(ID) in said)
    await sender.end()


async def test_a_container_that_is_started_instead_of_removed_is_sent_although_its_remote_was_away(
    tmp_path: Path,
) -> None:
    (tmp_path / "current").write_text("2024-01-01T00:00:00.000000000+00:00 stdout F line\n")
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    said, received = list[Response](), asyncio.Event()
    sender = Sender(said.append, held_s=0.05)
    order = Forward(
        id=ID,
        current=str(tmp_path / "current"),
        driver="syslog",
        options={"syslog-address": f"tcp://127.0.0.1:{port}"},
        facts=FACTS,
        has_ended=True,
    )

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await reader.readline():
            received.set()
        writer.close()

    def failures() -> int:
        return [event_of(one) for one in said].count("log driver remote unreachable")

    sender.take(order)
    await eventually(lambda: failures() == 1)
    sender.take(Hold(ID))
    sender.take(msgspec.structs.replace(order, has_ended=False))
    await eventually(lambda: failures() == 2)
    async with await asyncio.start_server(take, "127.0.0.1", port):
        async with asyncio.timeout(20):
            await received.wait()
        await sender.end()


class Remote:
    """A syslog server that is away until ``serving``."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as reserved:
            self.port = reserved.getsockname()[1]
        self.received: list[str] = []

    def order_for(self, current: Path) -> Forward:
        """Send the log of a container that has ended."""
        options = {"syslog-address": f"tcp://127.0.0.1:{self.port}"}
        return Forward(
            id=ID, current=str(current), driver="syslog", options=options, facts=FACTS, has_ended=True
        )

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        async with await asyncio.start_server(self.take, "127.0.0.1", self.port):
            yield

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Receive the lines of one connection."""
        while line := await reader.readline():
            self.received.append(line.decode().split()[-1])
        writer.close()


async def test_a_second_order_to_hold_keeps_the_files_that_the_first_one_opened(tmp_path: Path) -> None:
    current = with_compressed(tmp_path / "log")
    remote, sender = Remote(), Sender(list[Response]().append)
    sender.take(remote.order_for(current))
    sender.take(Hold(ID))
    shutil.rmtree(current.parent)
    sender.take(Hold(ID))
    async with remote.serving():
        await eventually(lambda: remote.received == ["1", "2", "3"])
        await sender.end()


async def test_a_socket_that_does_not_exist_when_the_process_starts_gets_the_log_later(
    tmp_path: Path,
) -> None:
    """The collector restarts at the same time as the node process."""
    current, place = tmp_path / "current", tmp_path / "collector.sock"
    written(current, 1, 2)
    said, remote = list[Response](), Remote()
    sender = Sender(said.append)
    options = {"syslog-address": f"unix://{place}"}
    sender.take(msgspec.structs.replace(remote.order_for(current), options=options))
    await eventually(lambda: "log driver remote unreachable" in map(event_of, said))
    async with await asyncio.start_unix_server(remote.take, place):
        await eventually(lambda: remote.received == ["1", "2"])
        await sender.end()


async def test_a_restarted_container_that_is_removed_while_its_remote_is_away_is_sent_whole(
    tmp_path: Path,
) -> None:
    current = tmp_path / "log" / "current"
    current.parent.mkdir()
    written(current, 1)
    said, remote = list[Response](), Remote()
    sender = Sender(said.append)
    sender.take(remote.order_for(current))
    await eventually(lambda: "log driver remote unreachable" in map(event_of, said))
    written(current, 2)
    sender.take(remote.order_for(current))
    sender.take(Hold(ID))
    shutil.rmtree(current.parent)
    async with remote.serving():
        await eventually(lambda: Done(ID) in said)
        await eventually(lambda: remote.received == ["1", "2"])
        await sender.end()
    assert "log lines lost" not in map(event_of, said)


async def test_a_container_that_is_started_instead_of_removed_is_not_sent_twice(tmp_path: Path) -> None:
    current = tmp_path / "current"
    written(current, 1, 2)
    said, remote = list[Response](), Remote()
    sender = Sender(said.append)
    order = remote.order_for(current)
    sender.take(order)
    sender.take(Hold(ID))
    await eventually(lambda: "log driver remote unreachable" in map(event_of, said))
    sender.take(msgspec.structs.replace(order, has_ended=False))
    async with remote.serving():
        await eventually(lambda: remote.received[:2] == ["1", "2"])
        written(current, 3)
        await eventually(lambda: "3" in remote.received)
        await sender.end()
    assert remote.received == ["1", "2", "3"]


def event_of(response: Response) -> str:
    return response.event if isinstance(response, Report) else ""


def test_an_order_that_is_too_long_for_a_line_is_not_sent() -> None:
    label = "x" * LINE_BYTES_MAX
    facts = LogFacts(
        id=ID,
        name="web",
        image_id="",
        image="",
        command="",
        created="",
        hostname="",
        attributes={"one": label},
    )
    order = Forward(id=ID, current="/c", driver="gelf", options={}, facts=facts, has_ended=False)
    assert encoded(order) is None
    assert encoded(End(ID)) == b'{"type":"End","id":"%b"}\n' % ID.encode()


@pytest.mark.parametrize("field", ["ca", "certificate", "key"])
def test_certificates_are_regular_files_of_a_bounded_size(tmp_path: Path, field: str) -> None:
    fifo, large = tmp_path / "fifo", tmp_path / "large"
    os.mkfifo(fifo)
    with open(large, "wb") as file:
        file.truncate(FILE_BYTES_MAX + 1)
    for path in (str(fifo), "/dev/zero", str(large)):
        with pytest.raises(OSError, match=path):
            client_context(RemoteTlsFiles(**{field: path}))


def test_an_authority_is_trusted_beside_the_systems_or_alone(tmp_path: Path) -> None:
    command = (
        "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=one -keyout key -out ca"
    )
    subprocess.run(["openssl", *command.split()], check=True, cwd=tmp_path, capture_output=True)
    ca = str(tmp_path / "ca")
    systems = len(ssl.create_default_context().get_ca_certs())
    assert len(client_context(RemoteTlsFiles(ca=ca)).get_ca_certs()) == systems + 1
    alone = client_context(RemoteTlsFiles(ca=ca, is_ca_alone=True))
    assert [dict(part[0] for part in one["subject"]) for one in alone.get_ca_certs()] == [
        {"commonName": "one"}
    ]
    client_context(RemoteTlsFiles(certificate=ca, key=str(tmp_path / "key")))


@pytest.mark.parametrize("has_failed", [True, False])
async def test_a_connection_whose_remote_hangs_is_given_up_with_what_it_has_not_sent(
    has_failed: bool,
) -> None:
    """At once after an error, otherwise a while after it was closed."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        before = len(os.listdir("/proc/self/fd"))
        endpoint = RemoteAddress(network="tcp", host="127.0.0.1", port=server.getsockname()[1])
        connection = await connect(endpoint, ANYWHERE, send_s=0.5)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3600 if has_failed else 0.05):
                await connection.send(b"x" * (64 << 20))
        if not has_failed:
            connection.close()
        await eventually(lambda: len(os.listdir("/proc/self/fd")) == before)


@pytest.mark.parametrize(("is_restricted", "reason"), [(True, "an address of another node"), (False, "")])
async def test_a_restricted_log_is_not_sent_to_another_node(
    tmp_path: Path, is_restricted: bool, reason: str
) -> None:
    """The list of nodes may come after the container, and changes."""
    written(tmp_path / "current", 1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.2:{server.getsockname()[1]}"
        responses: list[Response] = []
        sender = Sender(responses.append)
        for peers in ("198.51.100.1", "198.51.100.2"):
            sender.take(Peers((peers,)))
        order = Forward(
            id=ID,
            current=str(tmp_path / "current"),
            driver="gelf",
            options={"gelf-address": "udp://198.51.100.2:9" if reason else address},
            facts=FACTS,
            has_ended=True,
            is_restricted=is_restricted,
        )
        sender.take(order)
        await eventually(lambda: responses)
        [report] = [one for one in responses if isinstance(one, Report)]
        assert (report.event, reason in report.reason) == ("log driver remote unreachable", True)
        assert ("administrator" in report.reason) is is_restricted
        await sender.end()
