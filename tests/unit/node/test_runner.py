"""Agent and manager of a node: what happens until the first session, and with it."""

import asyncio
import errno
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest

from skep.agent.session.managers import KnownManager
from skep.aio.clock import SystemClock
from skep.api.backups import BackupManifest, Sealer, key_of, new_header
from skep.api.client.client import ApiClient
from skep.api.errors import Untranslated
from skep.configuration.configuration import Configuration
from skep.errors import Unavailable
from skep.model.node import NodeRole
from skep.model.values.ids import ClusterId, NodeId, new_id
from skep.node.cluster.local import LocalNode, read_local_node
from skep.node.cluster.manager_files import ManagerFiles
from skep.node.cluster.membership import Membership
from skep.node.cluster.runner import Dependencies, NodeRunner
from skep.paths import Paths
from skep.security.authority import Authority
from skep.security.identity import NodeIdentity
from skep.security.keypair import KeyPair
from skep.security.keys import new_private_key, private_pem, signing_request
from tests.support.file_faults import file_faults


class FakeAgent:
    """Has a session when the test says so."""

    managers: tuple[KnownManager, ...] = ()
    removal = ""

    def __init__(self, role: NodeRole) -> None:
        self.role = role
        self.registered = asyncio.Event()
        self.tries = 0
        self.is_running = False

    def renew_certificate(self) -> None:
        pass

    async def run(self) -> None:
        self.is_running = True
        await asyncio.Event().wait()

    def try_now(self) -> None:
        self.tries += 1


class FakeProcess:
    """A manager process that never ends."""

    error = ""

    async def run(self) -> None:
        await asyncio.Event().wait()

    def dismiss(self) -> None:
        pass

    def reload(self) -> None:
        pass


class FakeProcesses:
    """Manager processes that do nothing."""

    def __init__(self) -> None:
        self.has_spare = True

    def new_manager(self) -> FakeProcess:
        return FakeProcess()

    async def keep_spare_manager(self, wanted: bool) -> None:
        self.has_spare = wanted


class FakeWork:
    """A node on which nothing runs."""

    async def release_attachments(self) -> None:
        pass

    async def remove_all(self) -> None:
        pass


class Fakes:
    """What a runner is given: the agent and the processes are real enough to be run."""

    def __init__(self, paths: Paths, role: NodeRole) -> None:
        self.agent = FakeAgent(role)
        self.has_looked = False
        """Whether the machine was looked at before the agent ran."""
        self.processes = FakeProcesses()
        self.save_managers: Callable[[tuple[KnownManager, ...]], None] = lambda _: None
        configuration = Configuration(data_dir=paths.data, run_dir=paths.run)
        self.dependencies = Dependencies(
            paths=paths,
            clock=SystemClock(),
            configuration=lambda: configuration,
            manager_files=ManagerFiles(lambda: configuration, "host"),
            processes=self.processes,
            new_agent=self._new_agent,
            work=FakeWork(),
            look=self._look,
        )

    async def _look(self) -> None:
        self.has_looked = not self.agent.is_running

    def _new_agent(
        self,
        node: LocalNode,
        save_managers: Callable[[tuple[KnownManager, ...]], None],
        set_role: Callable[[NodeRole], None],
    ) -> FakeAgent:
        self.save_managers = save_managers
        return self.agent


def local_node(role: NodeRole) -> LocalNode:
    return LocalNode(
        node_id=NodeId("n1"),
        cluster_id=ClusterId("c1"),
        is_manager=role is NodeRole.MANAGER,
        listen_addr="0.0.0.0:2377",
        advertise_addr="10.0.0.1:2377",
        local_addr="10.0.0.1",
    )


@asynccontextmanager
async def running(paths: Paths, role: NodeRole) -> AsyncIterator[Fakes]:
    node = local_node(role)
    fakes = Fakes(paths, role)
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        task = group.create_task(NodeRunner(node, fakes.dependencies).run())
        yield fakes
        task.cancel()


async def until(holds: Callable[[], object]) -> None:
    while not holds():  # noqa: ASYNC110 - files announce nothing
        await asyncio.sleep(0.005)


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    found = Paths(tmp_path / "data", tmp_path / "run")
    for directory in (found.data, found.run):
        directory.mkdir()
    return found


async def test_a_session_is_requested_at_once_from_a_manager_that_begins_to_serve(paths: Paths) -> None:
    """And from another one in its place, too."""
    async with running(paths, NodeRole.MANAGER) as fakes:
        paths.manager_socket.touch()
        await until(lambda: fakes.agent.tries == 1)
        beside = paths.run / "beside"
        beside.touch()
        beside.rename(paths.manager_socket)
        await until(lambda: fakes.agent.tries == 2)
        fakes.agent.registered.set()


async def test_a_worker_keeps_no_spare_manager_process_once_it_has_a_session(paths: Paths) -> None:
    async with running(paths, NodeRole.WORKER) as fakes:
        await asyncio.sleep(0)
        assert fakes.processes.has_spare
        fakes.agent.registered.set()
        await until(lambda: not fakes.processes.has_spare)


def a_member() -> tuple[LocalNode, KeyPair]:
    """A worker with a certificate."""
    authority, key = Authority.create(), new_private_key()
    node = local_node(NodeRole.WORKER)
    identity = NodeIdentity(node_id=node.node_id, cluster_id=node.cluster_id, role=NodeRole.WORKER)
    pair = KeyPair(
        certificate_pem=authority.sign(signing_request(key), identity),
        key_pem=private_pem(key),
        root_pem=authority.root_pem,
    )
    return node, pair


async def test_managers_that_arrive_while_the_file_of_a_new_member_is_written_are_kept(paths: Paths) -> None:
    """The file is written in a thread, and until it exists nothing else writes it."""
    fakes = Fakes(paths, NodeRole.WORKER)
    fakes.processes.has_spare = False
    fakes.agent.registered.set()
    node, pair = a_member()
    membership = Membership(
        fakes.dependencies, manager_api=ApiClient.local(paths.manager_socket, "m"), new_id=new_id
    )
    loop, managers = asyncio.get_running_loop(), (KnownManager(NodeId("m2"), "10.0.0.2:2377"),)

    async def arrive() -> None:
        fakes.save_managers(managers)

    def write(call: str, path: Path) -> None:
        if call in ("rename", "replace") and path.name.startswith(paths.node_json.name) and not has_arrived:
            has_arrived.append(True)
            asyncio.run_coroutine_threadsafe(arrive(), loop).result(5)

    has_arrived: list[bool] = []
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        running = group.create_task(membership.run())
        await until(lambda: fakes.processes.has_spare)
        with file_faults(paths.data) as disk:
            disk.before_each = write
            await membership.enter(node, pair, lambda: None, timeout_s=10)
        assert has_arrived
        running.cancel()
    kept = read_local_node(paths.node_json)
    assert kept is not None
    assert kept.managers == managers


async def test_what_a_leave_could_not_remove_is_no_part_of_the_next_swarm(paths: Paths) -> None:
    """An etcd with its data would start as a member of the former one."""
    fakes = Fakes(paths, NodeRole.WORKER)
    fakes.processes.has_spare = False
    fakes.agent.registered.set()
    node, pair = a_member()
    membership = Membership(
        fakes.dependencies, manager_api=ApiClient.local(paths.manager_socket, "m"), new_id=new_id
    )
    former = paths.etcd / "member"
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        running = group.create_task(membership.run())
        await until(lambda: fakes.processes.has_spare)
        await membership.enter(node, pair, lambda: None, timeout_s=10)
        former.mkdir(parents=True)
        with file_faults(paths.data) as disk:
            disk.choose(errno.EIO, lambda call, path: call in ("open", "rmdir") and path.name == former.name)
            await membership.leave(force=True)
            assert former.is_dir()
            with pytest.raises(Unavailable, match="of a former swarm"):
                await membership.enter(node, pair, lambda: None, timeout_s=10)
        await membership.enter(node, pair, lambda: None, timeout_s=10)
        assert not former.exists()
        running.cancel()


async def test_the_machine_is_looked_at_before_its_first_description(paths: Paths) -> None:
    """The first networks of a cluster avoid those of its machine, also one of a moment ago."""
    fakes = Fakes(paths, NodeRole.WORKER)
    fakes.processes.has_spare = False
    fakes.agent.registered.set()
    node, pair = a_member()
    membership = Membership(
        fakes.dependencies, manager_api=ApiClient.local(paths.manager_socket, "m"), new_id=new_id
    )
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        running = group.create_task(membership.run())
        await until(lambda: fakes.processes.has_spare)
        await membership.enter(node, pair, lambda: None, timeout_s=10)
        assert fakes.has_looked
        running.cancel()


@pytest.mark.parametrize("is_dry", [True, False])
async def test_a_dry_restore_is_refused_as_the_restore_would_be(paths: Paths, is_dry: bool) -> None:
    with closing(socket.create_server(("0.0.0.0", 0))) as taken:
        address = f"0.0.0.0:{taken.getsockname()[1]}"
        header = new_header("hkdf")
        sealer = Sealer(header, key := key_of(bytes(32), header))
        manifest = BackupManifest(
            cluster_id="c",
            node_id="n",
            hostname="m1",
            listen_addr=address,
            advertise_addr="192.0.2.7:2377",
            created_at="",
            incarnation=1,
            skep_version="1",
            counts={},
            root_pem=b"",
            root_key_pem=b"",
            wrapping_key=b"",
        )
        content = sealer.manifest(manifest) + sealer.add(b"snapshot") + sealer.end()

        async def pieces() -> AsyncIterator[bytes]:
            yield content

        fakes = Fakes(paths, NodeRole.MANAGER)
        manager = ApiClient.local(paths.manager_socket, "m")
        membership = Membership(fakes.dependencies, manager_api=manager, new_id=new_id)
        with pytest.raises(Untranslated, match=f"listen tcp {address}: bind: address already in use"):
            await membership.restore(pieces(), key, "127.0.0.1", is_dry=is_dry)
