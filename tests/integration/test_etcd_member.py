"""The supervised etcd process when things go wrong around it."""

import asyncio
import os
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from msgspec.structs import replace

from skep.aio.backoff import Backoff
from skep.aio.clock import SystemClock
from skep.errors import FailedPrecondition
from skep.linux.processes import boot_id, start_ticks_of
from skep.manager.ca.peer_files import PeerFiles, place_revoked
from skep.model.secret import Secret
from skep.store.etcd.client import EtcdClient
from skep.store.etcd.membership import RaftMembers
from skep.store.etcd.process.binary import find_binary
from skep.store.etcd.process.damage import Damaged
from skep.store.etcd.process.deadlines import end_peer_connections
from skep.store.etcd.process.flags import MemberSettings
from skep.store.etcd.process.member import EtcdMember, MemberFailed, MemberRemoved
from skep.store.etcd.process.orphans import write_pid
from tests.support.store.etcd_calls import (
    CLOCK,
    a_fake_etcd,
    a_new_cluster,
    pid_of,
    put_secret,
    until,
    wait_ended,
)
from tests.support.store.etcd_rig import a_member, member_settings, peer_files


@pytest.fixture
def settings(tmp_path: Path) -> MemberSettings:
    return member_settings(tmp_path)


async def test_etcd_ends_with_its_block(settings: MemberSettings) -> None:
    async with a_member(settings).running() as member:
        pid = pid_of(member)
    assert not start_ticks_of(pid)
    assert not (settings.directory / "pid").exists()


async def test_etcd_dies_with_its_manager(tmp_path: Path) -> None:
    """A manager killed without a chance to clean up takes its etcd along."""
    program = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from tests.support.store.etcd_rig import a_member, member_settings\n"
        "async def main():\n"
        "    async with a_member(member_settings(Path(sys.argv[1]))).running() as member:\n"
        "        print('pid', member.pid, flush=True)\n"
        "        await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    manager = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        program,
        str(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).parents[2],
    )
    assert manager.stdout is not None
    line = b""
    while not line.startswith(b"pid "):
        line = await manager.stdout.readline()
        assert line, "the manager ended early"
    etcd = int(line.split()[1])
    assert start_ticks_of(etcd)
    manager.kill()
    await manager.wait()
    async with asyncio.timeout(5):
        await wait_ended(etcd)


async def test_a_single_member_does_not_wait_for_its_own_election(
    settings: MemberSettings,
) -> None:
    """With timers that would have it wait for ten seconds at the least, at its first start and at the next."""
    settings = replace(settings, solo_timers_ms=(10_000, 50_000))
    async with asyncio.timeout(9), a_member(settings).running() as member:
        pass
    async with asyncio.timeout(9), a_member(settings).running() as member:
        await member.restart(member.settings)
        assert member.starts == 2


async def test_a_member_that_takes_another_one_in_gets_the_timers_of_several_first(
    settings: MemberSettings,
) -> None:
    """It does not wait for an election timeout, and writes go on, also if the other one never comes."""
    settings = replace(settings, timers_ms=(10_000, 50_000))
    async with a_new_cluster(settings) as (member, store), EtcdClient(settings.socket) as client:
        await store.update(put_secret, "before")
        async with asyncio.timeout(9):
            members = await RaftMembers(client, member).add("m2", "https://m2:2378")
            assert [(one.name, one.is_learner) for one in members] == [("m1", False), ("m2", True)]
            await store.update(put_secret, "after")
        assert member.starts == 2
        assert not member.settings.is_solo
        assert "--heartbeat-interval=10000" in running_arguments(member)
        assert {one.spec.name for one in store.view().find(Secret)} == {"before", "after"}


async def test_no_request_fails_while_a_member_restarts_for_another_one(settings: MemberSettings) -> None:
    async with a_new_cluster(settings) as (member, store), EtcdClient(settings.socket) as client:
        adding = asyncio.create_task(RaftMembers(client, member).add("m2", "https://m2:2378"))
        written: list[str] = []
        while not adding.done() or len(written) < 20:
            assert await client.status()
            await store.update(put_secret, name := f"s{len(written)}")
            written.append(name)
        await adding
        assert member.starts == 2
        assert {one.spec.name for one in store.view().find(Secret)} == set(written)


async def test_a_member_that_learns_of_others_at_its_start_gets_their_timers(
    settings: MemberSettings,
) -> None:
    """Its manager ended after it had added another member, and before that was in the list of peers."""
    async with a_new_cluster(settings) as (member, _store), EtcdClient(settings.socket) as client:
        await client.add_learner("https://m2:2378")
        assert "--heartbeat-interval=1000" in running_arguments(member)
        members = RaftMembers(client, member)
        await members.count()
        assert not members.is_only_member()
        assert "--heartbeat-interval=100" in running_arguments(member)


def running_arguments(member: EtcdMember) -> list[str]:
    return Path(f"/proc/{pid_of(member)}/cmdline").read_text().split("\0")


async def test_an_etcd_left_behind_is_ended_first(settings: MemberSettings) -> None:
    """As if the parent-death signal had failed: the old process holds etcd's file lock."""
    async with a_member(settings).running() as member:
        os.kill(pid_of(member), 0)
    orphan = subprocess.Popen(  # noqa: ASYNC220 - it outlives what started it
        [
            find_binary().path,
            f"--data-dir={settings.data}",
            "--name=m1",
            f"--listen-client-urls=unix://{settings.socket}",
            "--advertise-client-urls=unix://m1:1",
            "--listen-peer-urls=http://127.0.0.1:0",
        ],
        env={},
        stderr=subprocess.DEVNULL,
    )
    try:
        await until(settings.socket.exists)
        write_pid(settings.directory, orphan.pid)
        async with a_member(settings).running() as member:
            assert member.pid != orphan.pid
            assert orphan.wait(5) is not None
    finally:
        orphan.kill()
        orphan.wait()


@pytest.mark.parametrize("differs", ["start", "boot"])
async def test_a_reused_process_number_is_left_alone(settings: MemberSettings, differs: str) -> None:
    """It started at another time; or at the very same one after its boot, which is another boot."""
    other = subprocess.Popen(["sleep", "60"])  # noqa: ASYNC220 - ended below
    try:
        started, boot = (start_ticks_of(other.pid) or 0), boot_id()
        if differs == "start":
            started -= 1
        else:
            boot = "8c1f6d0a-0000-4000-8000-000000000000"
        settings.directory.mkdir(parents=True)
        (settings.directory / "pid").write_text(f"{other.pid} {started} {boot}\n")
        async with a_member(settings).running() as member:
            assert member.pid is not None
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


async def test_a_second_manager_on_one_directory_is_refused(settings: MemberSettings) -> None:
    """etcd itself would wait for its lock without a word."""
    async with a_member(settings).running():
        with pytest.raises(FailedPrecondition, match="another manager runs on"):
            async with a_member(settings).running():
                pytest.fail("started twice")


async def test_a_stale_socket_is_no_obstacle(settings: MemberSettings) -> None:

    settings.socket.parent.mkdir(parents=True, exist_ok=True)
    settings.socket.write_text("left behind")
    async with a_member(settings).running():
        assert settings.socket.is_socket()


async def test_a_socket_path_of_108_bytes_is_refused_with_the_reason(settings: MemberSettings) -> None:

    folder = settings.socket.parent
    path = folder / ("x" * (108 - len(os.fsencode(folder)) - 1))
    with pytest.raises(FailedPrecondition, match="may have 107 bytes"):
        async with a_member(replace(settings, socket=path)).running():
            pytest.fail("started")


async def test_etcds_own_environment_variables_mean_nothing(
    settings: MemberSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:

    monkeypatch.setenv("ETCD_DATA_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("ETCD_UNSAFE_NO_FSYNC", "nonsense")
    monkeypatch.setenv("ETCD_NO_SUCH_FLAG", "1")
    async with a_member(settings).running() as member:
        environment = Path(f"/proc/{pid_of(member)}/environ").read_bytes()
    assert b"ETCD_" not in environment
    assert (settings.data / "member").exists()
    assert not (tmp_path / "elsewhere").exists()


async def test_the_etcd_directory_is_for_root_alone(settings: MemberSettings) -> None:
    async with a_member(settings).running():
        assert settings.directory.stat().st_mode & 0o777 == 0o700


async def test_a_member_whose_log_is_gone_is_not_started(settings: MemberSettings) -> None:
    """It would serve every read and finish no write."""
    async with a_new_cluster(settings) as (_, store):
        await store.update(put_secret, "s")
    for file in (settings.data / "member" / "wal").iterdir():
        file.unlink()
    with pytest.raises(FailedPrecondition, match="log is damaged or gone"):
        async with a_member(settings).running():
            pytest.fail("started")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ("log flipped", "log is damaged or gone"),
        ("log emptied", "log is damaged or gone"),
        ("database cut", "database is damaged or gone"),
        ("database overwritten", "database is damaged or gone"),
        ("database foreign", "database is damaged or gone"),
    ],
)
async def test_damage_ends_in_a_sentence_at_the_first_attempt(
    settings: MemberSettings, damage: str, sentence: str
) -> None:
    async with a_new_cluster(settings) as (_, store):
        await store.update_each(put_secret, [f"s{number}" for number in range(200)])
    (log,) = (settings.data / "member" / "wal").glob("*.wal")
    file = log if damage.startswith("log") else settings.data / "member" / "snap" / "db"
    content = file.read_bytes()
    match damage:
        case "log flipped":
            place = len(content.rstrip(b"\0")) // 2
            content = (
                content[:place]
                + bytes(255 - byte for byte in content[place : place + 64])
                + content[place + 64 :]
            )
        case "log emptied":
            content = b""
        case "database cut":
            content = content[: len(content) // 2]
        case "database overwritten":
            content = content[:8192] + b"\xff" * (len(content) - 8192)
        case _:
            content = b"foreign" * 1000
    file.write_bytes(content)
    member = a_member(settings)
    with pytest.raises(Damaged, match=sentence):
        async with member.running():
            pytest.fail("started")
    assert member.starts <= 1


async def test_a_log_that_was_cut_is_noticed_though_etcd_runs(settings: MemberSettings) -> None:

    async with a_new_cluster(settings) as (_, store):
        await store.update(put_secret, "s")
    (log,) = (settings.data / "member" / "wal").glob("*.wal")
    content = log.read_bytes()
    log.write_bytes(content[:200] + bytes(len(content) - 200))
    with pytest.raises(MemberFailed, match="log is damaged or gone"):
        async with a_member(replace(settings, ready_s=2.0)).running():
            pytest.fail("started")


async def test_what_etcd_said_last_is_in_the_error(settings: MemberSettings, tmp_path: Path) -> None:
    line = '{"level":"fatal","ts":"x","caller":"y","msg":"discovery failed","error":"no more stars"}'
    binary = a_fake_etcd(tmp_path / "etcd", f"echo '{line}' >&2; exit 1")
    with pytest.raises(MemberFailed, match="discovery failed: no more stars"):
        async with EtcdMember(settings, binary, CLOCK, Backoff(0.001, 0.002)).running():
            pytest.fail("started")


async def test_a_member_that_the_others_removed_is_not_started_again(
    settings: MemberSettings, tmp_path: Path
) -> None:
    """etcd ends with 0 by itself only in that case."""
    binary = a_fake_etcd(tmp_path / "etcd", "exit 0")
    member = EtcdMember(settings, binary, CLOCK, Backoff(0.001, 0.002))
    with pytest.raises(MemberRemoved, match="no longer a manager"):
        async with member.running():
            pytest.fail("started")
    assert member.starts == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=50m", "tmpfs", disk], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


async def test_a_disk_without_room_is_refused_with_the_missing_amount(small_disk: Path) -> None:

    settings = member_settings(small_disk)
    with pytest.raises(FailedPrecondition, match=r"1\d\d MB of disk space are missing"):
        async with a_member(settings).running():
            pytest.fail("started")


class CountingClock(SystemClock):
    """Pauses take no time, and are counted."""

    def __init__(self) -> None:
        self.pauses: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        await asyncio.sleep(0)


async def test_without_room_it_is_started_again_later_and_later_and_says_so(
    settings: MemberSettings, tmp_path: Path
) -> None:
    """Bytes may be free and inodes not; or the room is gone again as soon as the store begins to write."""
    script = 'echo \'{"level":"fatal","msg":"failed to create WAL: no space left on device"}\' >&2; exit 1'
    clock, reported = CountingClock(), []
    backoff = Backoff(0.03, 5.0, rng=lambda: 1.0)
    member = EtcdMember(settings, a_fake_etcd(tmp_path / "etcd", script), clock, backoff, reported.append)

    async def run() -> None:
        async with member.running():
            pytest.fail("it is never ready")

    async with asyncio.timeout(60):
        running = asyncio.create_task(run())
        await until(lambda: member.starts >= 8)  # more often than a member may crash
        assert not running.done(), running
        running.cancel()
        await asyncio.wait([running])
    grown = [0.03 * 2**number for number in range(7)]
    assert [pause for pause in clock.pauses if pause in grown][: len(grown)] == grown
    assert "has run out of disk space. Make room: it goes on by itself." in reported[0]
    assert reported[-1] == ""


@pytest.mark.parametrize(
    ("version", "reason"),
    [("3.4.23", "too old"), ("3.5.1", "too old"), ("3.6.2", "loses members on upgraded data")],
)
def test_a_version_that_loses_data_is_refused(tmp_path: Path, version: str, reason: str) -> None:

    binary = a_fake_etcd(tmp_path / "etcd", f"echo 'etcd Version: {version}'")
    with pytest.raises(FailedPrecondition, match=rf"is etcd {version}, which (is )?{reason}: install etcd"):
        find_binary(binary.path)


def test_something_else_called_etcd_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="prints no version"):
        find_binary(a_fake_etcd(tmp_path / "etcd", "echo hello").path)
    with pytest.raises(FailedPrecondition, match="cannot be run"):
        find_binary(tmp_path / "missing")


async def test_data_of_a_newer_etcd_are_refused(settings: MemberSettings) -> None:

    settings.directory.mkdir(parents=True)
    (settings.directory / "etcd-version").write_text("3.6.9\n")
    with pytest.raises(FailedPrecondition, match=r"last used by etcd 3\.6\.9"):
        async with a_member(settings).running():
            pytest.fail("started")


async def _offer(settings: MemberSettings, context: ssl.SSLContext) -> None:
    """Connect to the peer port and ask for something, so that a refused certificate shows."""
    host, _, number = settings.peer_listen.rpartition(":")
    async with asyncio.timeout(5):
        reader, writer = await asyncio.open_connection(host, int(number), ssl=context)
        try:
            writer.write(b"GET /version HTTP/1.1\r\nHost: m1\r\nConnection: close\r\n\r\n")
            await writer.drain()
            response = await reader.readline()
        finally:
            writer.close()
    if not response.startswith(b"HTTP/1.1 200"):
        raise ConnectionError(f"refused: {response[:40]!r}")


def _context(settings: MemberSettings, files: object = None) -> ssl.SSLContext:
    context = ssl.SSLContext(
        ssl.PROTOCOL_TLS_CLIENT
    )  # the default one is strict about fields that are not used here
    context.load_verify_locations(settings.peer_files.roots)
    context.check_hostname = False
    if files is not None:
        context.load_cert_chain(files.certificate, files.key)  # type: ignore[attr-defined]
    return context


async def test_the_peer_port_serves_managers_of_this_cluster_only(
    settings: MemberSettings, tmp_path: Path
) -> None:
    """No certificate, and another cluster's, are refused."""
    async with a_member(settings).running():
        await _offer(settings, _context(settings, settings.peer_files))
        stranger = peer_files(tmp_path / "stranger")
        for context in (_context(settings), _context(settings, stranger)):
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await _offer(settings, context)


async def test_open_connections_end_when_a_certificate_is_taken_back(
    settings: MemberSettings, tmp_path: Path
) -> None:
    """etcd looks at its list at handshakes only; the certificate is the first of as many as a node may have."""
    files = settings.peer_files
    revoked = place_revoked(files.roots.parent, tmp_path)
    settings = replace(settings, peer_files=replace(files, revoked=revoked))
    member = a_member(settings)

    def cut() -> None:
        end_peer_connections(member.pid, settings.peer_port)

    peers = PeerFiles(revoked.parent, tmp_path, member.wait_ready, cut)
    host, _, number = settings.peer_listen.rpartition(":")
    context = _context(settings, files)
    async with member.running():
        reader, writer = await asyncio.open_connection(host, int(number), ssl=context)
        writer.write(b"GET /version HTTP/1.1\r\nHost: m1\r\n\r\n")
        assert b"200" in await reader.readline()
        peers.refuse(())
        await _offer(settings, context)
        peers.refuse(["2", *(f"{serial:x}" for serial in range(100, 400))])
        async with asyncio.timeout(5):
            with suppress(ConnectionError):
                await reader.read()
        writer.close()
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await _offer(settings, context)
        async with EtcdClient(settings.socket) as client:
            await client.status()  # only those of peers


async def test_the_peer_port_never_speaks_plain_http(settings: MemberSettings) -> None:
    async with a_member(settings).running():
        host, _, number = settings.peer_listen.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(number))
        writer.write(b"GET /version HTTP/1.1\r\nHost: m1\r\nConnection: close\r\n\r\n")
        response = await reader.readline()
        writer.close()
    assert b"200" not in response
