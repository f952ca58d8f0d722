"""The supervised etcd process and the store on it, when things go wrong.

Points of the etcd note's fault list are named in brackets.
"""

import asyncio
import os
import signal
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from msgspec.structs import replace

from skep.aio.backoff import Backoff
from skep.aio.clock import SystemClock
from skep.errors import AlreadyExists, FailedPrecondition, Unavailable
from skep.model.ids import ClusterId, ConfigId, NodeId, SecretId
from skep.model.secret import Config, ConfigSpec, Secret, SecretSpec
from skep.model.swarm import Swarm
from skep.store import keys
from skep.store.etcd import etcd_pb2 as pb
from skep.store.etcd import initialize, new_wrapping_key, open_store
from skep.store.etcd.binary import Binary, find_binary
from skep.store.etcd.client import Client
from skep.store.etcd.flags import MemberSettings
from skep.store.etcd.founding import Unfinished
from skep.store.etcd.member import Member, MemberFailed, MemberRemoved
from skep.store.etcd.orphans import started_at, write_pid
from skep.store.etcd.requests import PREFIX, etcd_key
from skep.store.etcd.store import EtcdStore
from skep.store.interface import Transaction
from skep.store.kinds import Payload
from tests.etcd_rig import a_member, member_settings, peer_files

pytestmark = pytest.mark.point("3")

CLOCK = SystemClock()
KEY = new_wrapping_key()
NODE = NodeId("m1")


@pytest.fixture
def settings(tmp_path: Path) -> MemberSettings:
    return member_settings(tmp_path)


def found(tx: Transaction) -> None:
    tx.put(Swarm(id=ClusterId("cluster")))


def a_secret(name: str) -> Secret:
    return Secret(id=SecretId(name), spec=SecretSpec(name=name))


def put_secret(tx: Transaction, name: str) -> Secret:
    return tx.put(a_secret(name))


@asynccontextmanager
async def founded(settings: MemberSettings) -> AsyncIterator[tuple[Member, EtcdStore]]:
    """A running member with a cluster in it, and its store."""
    async with a_member(settings).running() as member:
        with suppress(AlreadyExists):
            await initialize(settings.socket, KEY, CLOCK, found)
        async with open_store(settings.socket, NODE, KEY, CLOCK) as store:
            yield member, store


def pid_of(member: Member) -> int:
    pid = member.pid
    assert pid is not None
    return pid


async def until(holds: Callable[[], object]) -> None:
    """Return when ``holds()``; the test's own deadline bounds it."""
    while not holds():  # noqa: ASYNC110 - processes announce nothing
        await asyncio.sleep(0.005)


async def wait_ended(pid: int) -> None:
    await until(lambda: not started_at(pid))


def a_fake_etcd(path: Path, script: str) -> Binary:
    """A program in place of etcd; it says the version of a good one."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return Binary(path, (3, 5, 30))


# -- the process -----------------------------------------------------------------------------------------------


async def test_acknowledged_writes_survive_the_kill_of_etcd(settings: MemberSettings) -> None:
    """[1] The store's users only see a pause; no write is lost or doubled."""
    acknowledged: list[str] = []
    async with founded(settings) as (member, store):
        first = pid_of(member)

        async def write() -> None:
            for number in range(200):
                await store.update(put_secret, f"s{number:03}")
                acknowledged.append(f"s{number:03}")

        async with asyncio.TaskGroup() as group:
            writing = group.create_task(write())
            for _ in range(3):
                enough = len(acknowledged) + 20
                await until(lambda enough=enough: len(acknowledged) >= enough)
                os.kill(pid_of(member), signal.SIGKILL)
                await wait_ended(first)
                await member.wait_ready()
                first = pid_of(member)
            await writing
        assert member.starts >= 4
        assert [secret.id for secret in store.view().find(Secret)] == acknowledged
    async with founded(settings) as (_, again):
        assert [secret.id for secret in again.view().find(Secret)] == acknowledged


async def test_leadership_and_its_fence_come_back_after_the_kill_of_etcd(settings: MemberSettings) -> None:
    """[1] The new term has a new fence; the old one's writes are refused."""
    async with founded(settings) as (member, store):
        terms = store.terms(NODE, "127.0.0.1:2377")
        first = await anext(terms)
        await first.update(put_secret, "before")
        os.kill(pid_of(member), signal.SIGKILL)
        # raft's term grew, so the same manager leads again under a new fence only if it lost the old one.
        async with asyncio.timeout(20):
            await first.update(put_secret, "after")
        assert store.view().lookup(Secret, "after") is not None


async def test_a_frozen_etcd_is_no_answer_and_no_double_write(settings: MemberSettings) -> None:
    """[2] SIGSTOP: writes fail within their deadline; after SIGCONT everything goes on."""
    async with founded(settings) as (member, store):
        os.kill(pid_of(member), signal.SIGSTOP)
        try:
            async with asyncio.timeout(7):
                with pytest.raises(Unavailable, match="does not have a leader"):
                    await store.update(put_secret, "frozen")
        finally:
            os.kill(pid_of(member), signal.SIGCONT)
        await store.barrier()
        found_before = store.view().lookup(Secret, "frozen")
        if found_before is None:
            await store.update(put_secret, "frozen")
        assert [secret.id for secret in store.view().find(Secret)] == ["frozen"]


async def test_a_write_during_a_short_freeze_is_written_once(settings: MemberSettings) -> None:
    """[4] Longer than the write's own deadline, shorter than the update's: its outcome is found out."""
    ids = iter(f"s{number}" for number in range(10))

    def create(tx: Transaction) -> Secret:
        return tx.put(replace(a_secret("one"), id=SecretId(next(ids))))

    async with founded(settings) as (member, store):
        await store.update(put_secret, "warm")
        os.kill(pid_of(member), signal.SIGSTOP)
        async with asyncio.TaskGroup() as group:
            creating = group.create_task(store.update(create))
            await asyncio.sleep(1.5)  # the fault itself: a pause longer than one write may take
            os.kill(pid_of(member), signal.SIGCONT)
        assert creating.result().id == "s0"
        assert [secret.id for secret in store.view().find(Secret)] == ["s0", "warm"]


async def test_etcd_ends_with_its_block(settings: MemberSettings) -> None:
    async with a_member(settings).running() as member:
        pid = pid_of(member)
    assert not started_at(pid)
    assert not (settings.directory / "pid").exists()


async def test_etcd_dies_with_its_manager(tmp_path: Path) -> None:
    """[21] A manager killed without a chance to clean up takes its etcd along."""
    program = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from tests.etcd_rig import a_member, member_settings\n"
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
    assert started_at(etcd)
    manager.kill()
    await manager.wait()
    async with asyncio.timeout(5):
        await wait_ended(etcd)


async def test_an_etcd_left_behind_is_ended_first(settings: MemberSettings) -> None:
    """[21] As if the parent-death signal had failed: the old process holds etcd's file lock."""
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


async def test_a_reused_process_number_is_left_alone(settings: MemberSettings) -> None:
    settings.directory.mkdir(parents=True)
    (settings.directory / "pid").write_text(f"{os.getpid()} 12345\n")
    async with a_member(settings).running() as member:
        assert member.pid is not None


async def test_a_second_manager_on_one_directory_is_refused(settings: MemberSettings) -> None:
    """[21] etcd itself would wait for its lock without a word."""
    async with a_member(settings).running():
        with pytest.raises(FailedPrecondition, match="another manager runs on"):
            async with a_member(settings).running():
                pytest.fail("started twice")


async def test_a_stale_socket_is_no_obstacle(settings: MemberSettings) -> None:
    """[21]"""
    settings.socket.parent.mkdir(parents=True, exist_ok=True)
    settings.socket.write_text("left behind")
    async with a_member(settings).running():
        assert settings.socket.is_socket()


async def test_a_socket_path_of_108_bytes_is_refused_with_the_reason(settings: MemberSettings) -> None:
    """[21]"""
    folder = settings.socket.parent
    path = folder / ("x" * (108 - len(os.fsencode(folder)) - 1))
    with pytest.raises(FailedPrecondition, match="may have 107 bytes"):
        async with a_member(replace(settings, socket=path)).running():
            pytest.fail("started")


async def test_etcds_own_environment_variables_mean_nothing(
    settings: MemberSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """[22]"""
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


# -- damage ----------------------------------------------------------------------------------------------------


async def test_a_member_whose_log_is_gone_is_not_started(settings: MemberSettings) -> None:
    """[16] It would serve every read and finish no write."""
    async with founded(settings) as (_, store):
        await store.update(put_secret, "s")
    for file in (settings.data / "member" / "wal").iterdir():
        file.unlink()
    with pytest.raises(FailedPrecondition, match="log is damaged or gone"):
        async with a_member(settings).running():
            pytest.fail("started")


async def test_a_damaged_log_ends_in_a_sentence_after_five_attempts(settings: MemberSettings) -> None:
    """[16]"""
    async with founded(settings) as (_, store):
        await store.update(put_secret, "s")
    (log,) = (settings.data / "member" / "wal").glob("*.wal")
    content = bytearray(log.read_bytes())
    content[len(content.rstrip(b"\0")) - 100] ^= 0xFF
    log.write_bytes(content)
    member = a_member(settings)
    with pytest.raises(MemberFailed, match=r"etcd ended 5 times in a minute: .*crc mismatch"):
        async with member.running():
            pytest.fail("started")
    assert member.starts == 5


async def test_a_log_that_was_cut_is_noticed_though_etcd_runs(settings: MemberSettings) -> None:
    """[16]"""
    async with founded(settings) as (_, store):
        await store.update(put_secret, "s")
    (log,) = (settings.data / "member" / "wal").glob("*.wal")
    content = log.read_bytes()
    log.write_bytes(content[:200] + bytes(len(content) - 200))
    with pytest.raises(MemberFailed, match="log is damaged or gone"):
        async with a_member(replace(settings, ready_s=2.0)).running():
            pytest.fail("started")


async def test_what_etcd_said_last_is_in_the_error(settings: MemberSettings, tmp_path: Path) -> None:
    line = '{"level":"fatal","ts":"x","caller":"y","msg":"discovery failed","error":"walpb: crc mismatch"}'
    binary = a_fake_etcd(tmp_path / "etcd", f"echo '{line}' >&2; exit 1")
    with pytest.raises(MemberFailed, match="discovery failed: walpb: crc mismatch"):
        async with Member(settings, binary, CLOCK, Backoff(0.001, 0.002)).running():
            pytest.fail("started")


async def test_a_member_that_the_others_removed_is_not_started_again(
    settings: MemberSettings, tmp_path: Path
) -> None:
    """[14] etcd ends with 0 by itself only in that case."""
    binary = a_fake_etcd(tmp_path / "etcd", "exit 0")
    member = Member(settings, binary, CLOCK, Backoff(0.001, 0.002))
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
    """[17]"""
    settings = member_settings(small_disk)
    with pytest.raises(FailedPrecondition, match=r"1\d\d MB of disk space are missing"):
        async with a_member(settings).running():
            pytest.fail("started")


# -- versions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "reason"),
    [("3.4.23", "too old"), ("3.5.1", "too old"), ("3.6.2", "loses members on upgraded data")],
)
def test_a_version_that_loses_data_is_refused(tmp_path: Path, version: str, reason: str) -> None:
    """[25]"""
    binary = a_fake_etcd(tmp_path / "etcd", f"echo 'etcd Version: {version}'")
    with pytest.raises(FailedPrecondition, match=rf"is etcd {version}, which (is )?{reason}: install etcd"):
        find_binary(binary.path)


def test_something_else_called_etcd_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="does not say its version"):
        find_binary(a_fake_etcd(tmp_path / "etcd", "echo hello").path)
    with pytest.raises(FailedPrecondition, match="cannot be run"):
        find_binary(tmp_path / "missing")


async def test_data_of_a_newer_etcd_are_refused(settings: MemberSettings) -> None:
    """[25]"""
    settings.directory.mkdir(parents=True)
    (settings.directory / "etcd-version").write_text("3.6.9\n")
    with pytest.raises(FailedPrecondition, match=r"last served by etcd 3\.6\.9"):
        async with a_member(settings).running():
            pytest.fail("started")


# -- who may come in -------------------------------------------------------------------------------------------


async def _offer(settings: MemberSettings, context: ssl.SSLContext) -> None:
    """Connect to the peer port and ask for something, so that a refused certificate shows."""
    host, _, number = settings.peer_listen.rpartition(":")
    async with asyncio.timeout(5):
        reader, writer = await asyncio.open_connection(host, int(number), ssl=context)
        try:
            writer.write(b"GET /version HTTP/1.1\r\nHost: m1\r\nConnection: close\r\n\r\n")
            await writer.drain()
            answer = await reader.readline()
        finally:
            writer.close()
    if not answer.startswith(b"HTTP/1.1 200"):
        raise ConnectionError(f"refused: {answer[:40]!r}")


def _context(settings: MemberSettings, files: object = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(settings.peer_files.roots))
    context.check_hostname = False
    if files is not None:
        context.load_cert_chain(files.certificate, files.key)  # type: ignore[attr-defined]
    return context


async def test_the_peer_port_serves_managers_of_this_cluster_only(
    settings: MemberSettings, tmp_path: Path
) -> None:
    """[20] No certificate, and another cluster's, are refused."""
    async with a_member(settings).running():
        await _offer(settings, _context(settings, settings.peer_files))
        stranger = peer_files(tmp_path / "stranger")
        for context in (_context(settings), _context(settings, stranger)):
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await _offer(settings, context)


async def test_the_peer_port_never_speaks_plain_http(settings: MemberSettings) -> None:
    async with a_member(settings).running():
        host, _, number = settings.peer_listen.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(number))
        writer.write(b"GET /version HTTP/1.1\r\nHost: m1\r\nConnection: close\r\n\r\n")
        answer = await reader.readline()
        writer.close()
    assert b"200" not in answer


async def test_values_at_rest_are_encrypted(settings: MemberSettings) -> None:
    async with founded(settings) as (_, store):

        def fill(tx: Transaction) -> None:
            tx.put(Payload(id="secret/s", data=b"correct horse battery staple"))
            tx.put(
                replace(a_secret("visible-name"), spec=SecretSpec(name="visible-name", labels={"k": "plain"}))
            )

        await store.update(fill)
        async with Client(settings.socket) as client:
            reply = await client.range(pb.RangeRequest(key=PREFIX, range_end=b"/skep/v2"))
    stored = {kv.key: kv.value for kv in reply.kvs}
    assert etcd_key("o/secret/visible-name") in stored
    everything = b"".join(stored.values())
    for word in (b"correct horse", b"Y29ycmVjdCBob3Jz", b"plain", b"service", KEY):
        assert word not in everything
    disk = b"".join(path.read_bytes() for path in settings.data.rglob("*") if path.is_file())
    assert b"correct horse" not in disk


# -- founding --------------------------------------------------------------------------------------------------


async def test_a_store_without_a_format_is_an_unfinished_init(settings: MemberSettings) -> None:
    async with a_member(settings).running():
        with pytest.raises(Unfinished, match="not finished"):
            async with open_store(settings.socket, NODE, KEY, CLOCK):
                pytest.fail("opened")


async def test_a_cluster_is_founded_once(settings: MemberSettings) -> None:
    async with a_member(settings).running():
        await initialize(settings.socket, KEY, CLOCK, found)
        with pytest.raises(AlreadyExists):
            await initialize(settings.socket, KEY, CLOCK, found)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        (keys.FORMAT, b"2", "have format 2"),
        (keys.LEVEL, b"9", "is at level 9"),
        (keys.LEVEL, b"x", "damaged"),
    ],
)
async def test_what_this_version_does_not_know_is_refused(
    settings: MemberSettings, key: str, value: bytes, reason: str
) -> None:
    async with a_member(settings).running():
        await initialize(settings.socket, KEY, CLOCK, found)
        async with Client(settings.socket) as client:
            await client.put(etcd_key(key), value)
        with pytest.raises(FailedPrecondition, match=reason):
            async with open_store(settings.socket, NODE, KEY, CLOCK):
                pytest.fail("opened")


async def test_another_clusters_key_opens_nothing(settings: MemberSettings) -> None:
    async with a_member(settings).running():
        await initialize(settings.socket, KEY, CLOCK, found)
        with pytest.raises(FailedPrecondition, match="another cluster"):
            async with open_store(settings.socket, NODE, new_wrapping_key(), CLOCK):
                pytest.fail("opened")


async def test_many_large_objects_are_loaded_page_by_page(settings: MemberSettings) -> None:
    def put_config(tx: Transaction, number: int) -> Config:
        id = ConfigId(f"c{number:02}")
        return tx.put(Config(id=id, spec=ConfigSpec(name=id, data=bytes([number]) * 1000 * 1024)))

    async with founded(settings) as (_, store):
        await store.update_each(put_config, range(20))
        expected = store.view().find(Config)
    async with founded(settings) as (_, again):
        assert again.view().find(Config) == expected
        assert len(expected) == 20


async def test_a_damaged_value_is_left_out_and_stops_nobody(settings: MemberSettings) -> None:
    async with founded(settings) as (_, store):
        for name in ("a", "b", "c"):
            await store.update(put_secret, name)
        async with Client(settings.socket) as client:
            whole = await client.range(pb.RangeRequest(key=etcd_key("o/secret/a")))
            await client.put(etcd_key("o/secret/b"), whole.kvs[0].value)  # moved from another key
            await client.put(etcd_key("o/secret/c"), b"nonsense")
        await store.barrier()
        await store.update(put_secret, "d")
        assert [secret.id for secret in store.view().find(Secret)] == ["a", "b", "c", "d"]
    async with founded(settings) as (_, again):
        assert [secret.id for secret in again.view().find(Secret)] == ["a", "d"]
