"""HAProxy on a machine follows the catalog of a manager, while services on other machines register and fail."""

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import msgspec
import pytest
from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector, web

from skep.aio.clock import SystemClock
from skep.api.client.raw import RawClient
from skep.api.client.requests import PlainRequests
from skep.api.http.server import runner
from skep.catalog.balancing import Balancer, HaproxyFiles
from skep.catalog.following import CatalogReader, KnownCatalog
from skep.catalog.haproxy import BalancedPort
from skep.catalog.registering import CheckRules, ServiceRegistrar, command_check, http_check, tcp_check
from skep.errors import FailedPrecondition
from skep.manager.catalog.registrations import register
from skep.manager.routes import application
from skep.manager.routes.access import ManagerApi
from skep.model.catalog import CatalogInstance, CatalogService, ServiceRegistration
from tests.conformance.manager import a_manager_api
from tests.conftest import SEARCHED
from tests.support.machines.playground_rig import SKEP
from tests.support.networks.names_lab import wait_until
from tests.support.store.store_transactions import raise_level

pytestmark = [pytest.mark.needs("haproxy"), pytest.mark.timeout(60)]

SERVICE = "db"


class Backend:
    """A server on this machine, with requests that it can hold open."""

    def __init__(self, name: str) -> None:
        self.name, self.port = name, 0
        self.is_healthy = True
        self._stack = AsyncExitStack()
        self.released = asyncio.Event()

    async def start(self, port: int = 0) -> None:
        app = web.Application()
        app.router.add_get("/", self._answer)
        app.router.add_get("/slow", self._answer_slowly)
        app.router.add_get("/health", self._health)
        served = web.AppRunner(app, shutdown_timeout=0.1)
        await served.setup()
        self._stack.push_async_callback(served.cleanup)
        await web.TCPSite(served, "127.0.0.1", port or self.port).start()
        self.port = served.addresses[0][1]

    async def stop(self) -> None:
        await self._stack.aclose()

    async def _answer(self, _: web.Request) -> web.Response:
        return web.Response(text=self.name)

    async def _answer_slowly(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"begun ")
        await self.released.wait()
        await response.write(self.name.encode())
        return response

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(status=200 if self.is_healthy else 503)


class Machine:
    """A machine with HAProxy and the balancer."""

    def __init__(self, directory: Path, port: int, messages: list[str]) -> None:
        self.pid, self.port, self.messages = directory / "pid", port, messages
        file, socket = directory / "haproxy.cfg", directory / "admin.sock"
        start = f"haproxy -W -D -p {self.pid} -f {file}"
        reload = f"sh -c 'if [ -e {self.pid} ]; then kill -USR2 $(cat {self.pid}); else {start}; fi'"
        self.files = HaproxyFiles(file=file, socket=str(socket), user="", reload=reload)
        listener = BalancedPort(SERVICE, "127.0.0.1", port, "http")
        self.balancer = Balancer([listener], self.files, SystemClock(), messages.append, 0.2)

    async def has_pid(self) -> bool:
        """Return whether HAProxy has written its pid, which it does once more at each reload, or never started."""
        return not self.pid.exists() or bool(self.pid.read_text())

    def kill(self) -> None:
        with suppress(FileNotFoundError, ProcessLookupError):
            os.kill(int(self.pid.read_text()), signal.SIGTERM)


@pytest.fixture
async def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Machine]:
    monkeypatch.setenv("PATH", SEARCHED)
    placeholder = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = placeholder.sockets[0].getsockname()[1]
    placeholder.close()
    made = Machine(tmp_path, port, [])
    yield made
    await wait_until(made.has_pid, within_s=10)
    made.kill()


@asynccontextmanager
async def served(api: ManagerApi, socket: Path) -> AsyncIterator[None]:
    """Let the manager answer on a socket."""
    run = runner(application(api), shutdown_timeout=0.1)
    await run.setup()
    try:
        await web.UnixSite(run, str(socket)).start()
        yield
    finally:
        await run.cleanup()


@asynccontextmanager
async def following(machine: Machine, socket: Path) -> AsyncIterator[KnownCatalog]:
    """Run the balancer during the block."""
    async with PlainRequests(RawClient(f"unix://{socket}", None)) as client, asyncio.TaskGroup() as group:
        reader = CatalogReader(client, SystemClock(), machine.messages.append, 0.05, (0.1, 0.2))
        tasks = [
            group.create_task(reader.run()),
            group.create_task(machine.balancer.run(reader.known)),
        ]
        try:
            yield reader.known
        finally:
            for task in tasks:
                task.cancel()


def a_registration(backend: Backend, instance: str = "") -> ServiceRegistration:
    # The routes refuse loopback addresses, at which this test has its servers.
    return ServiceRegistration(
        service=SERVICE, instance=instance or backend.name, address="127.0.0.1", port=backend.port
    )


async def answers(port: int, path: str = "/", count: int = 1) -> list[str]:
    """The answers to some requests, each on a new connection, or the failures."""
    found = []
    async with ClientSession(connector=TCPConnector(force_close=True), timeout=ClientTimeout(10)) as session:
        for _ in range(count):
            try:
                async with session.get(f"http://127.0.0.1:{port}{path}") as response:
                    found.append(await response.text() if response.status == 200 else str(response.status))
            except (ClientError, OSError) as error:
                found.append(type(error).__name__)
    return found


async def test_servers_come_and_go_without_a_lost_connection(machine: Machine, tmp_path: Path) -> None:
    one, two = Backend("one"), Backend("two")
    async with a_manager_api() as api, served(api, tmp_path / "m.sock"):
        await api.store.update(raise_level)
        await one.start()
        await two.start()
        await api.store.update(register, a_registration(one))
        async with following(machine, tmp_path / "m.sock"):
            await wait_until(lambda: is_answered_by(machine, {"one"}), within_s=10)
            held = asyncio.create_task(answers(machine.port, "/slow"))
            seen: Counter[str] = Counter()
            asking = asyncio.create_task(ask_until_cancelled(machine.port, seen))
            for count in (2, 3):
                await api.store.update(register, a_registration(two, f"two-{count}"))
                await wait_until(lambda count=count: has_servers(machine, count), within_s=10)
            await wait_until(lambda: is_answered_by(machine, {"one", "two"}), within_s=10)
            asking.cancel()
            await asyncio.wait([asking])
            one.released.set()
            two.released.set()
            assert await held == ["begun one"]
            assert set(seen) == {"one", "two"}, seen
    reloads = [line for line in machine.messages if "reloaded" in line]
    assert len(reloads) == 3, machine.messages
    await one.stop()
    await two.stop()


async def has_servers(machine: Machine, count: int) -> bool:
    return f" has {count} server" in machine.messages[-1]


async def is_answered_by(machine: Machine, names: set[str]) -> bool:
    return set(await answers(machine.port, count=6)) == names


async def ask_until_cancelled(port: int, seen: Counter[str]) -> None:
    while True:
        seen.update(await answers(port))


async def test_without_managers_it_goes_on_and_leaves_out_what_fails(
    machine: Machine, tmp_path: Path
) -> None:
    one, two = Backend("one"), Backend("two")
    await one.start()
    await two.start()
    socket = tmp_path / "m.sock"
    async with a_manager_api() as api, following(machine, socket) as known:
        await api.store.update(raise_level)
        for backend in (one, two):
            await api.store.update(register, a_registration(backend))
        async with served(api, socket):
            await wait_until(lambda: is_answered_by(machine, {"one", "two"}), within_s=10)
        written = machine.files.file.read_bytes()
        await one.stop()
        seen = Counter(await answers(machine.port, count=50))
        assert seen == {"two": 50}
        assert machine.files.file.read_bytes() == written
        assert known.services[SERVICE].instances
        three = Backend("three")
        await three.start()
        await api.store.update(register, a_registration(three))
        socket.unlink()
        async with served(api, socket):
            await wait_until(lambda: is_answered_by(machine, {"two", "three"}), within_s=20)
        await three.stop()
    await two.stop()


async def test_a_file_of_somebody_else_and_a_refused_configuration_change_nothing(
    machine: Machine, tmp_path: Path
) -> None:
    machine.files.file.write_text("global\n")
    with pytest.raises(FailedPrecondition, match="was not written by skep balance"):
        await machine.balancer.apply({})
    machine.files.file.unlink()
    assert await machine.balancer.apply({})
    assert not await machine.balancer.apply({})
    written = machine.files.file.read_text()
    twice = CatalogInstance(id="t1", address="10.0.0.1", port=70)  # HAProxy refuses a second server of a name
    broken = CatalogService(name=SERVICE, instances=(twice, twice))
    with pytest.raises(FailedPrecondition, match="haproxy -c"):
        await machine.balancer.apply({SERVICE: broken})
    assert machine.files.file.read_text() == written


async def test_a_catalog_that_returns_after_a_failed_reload_is_applied_again(
    machine: Machine, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    reload = f"sh -c 'test ! -e {broken}'"
    files = msgspec.structs.replace(machine.files, reload=reload)
    balancer = Balancer([BalancedPort(SERVICE, "127.0.0.1", machine.port)], files, SystemClock(), [].append)
    before, after = (
        {SERVICE: CatalogService(name=SERVICE, instances=(CatalogInstance(id=id, address=address, port=70),))}
        for id, address in (("t1", "10.0.0.1"), ("t2", "10.0.0.2"))
    )
    assert await balancer.apply(before)
    written = files.file.read_text()
    broken.touch()
    with pytest.raises(FailedPrecondition, match="test ! -e"):
        await balancer.apply(after)
    broken.unlink()
    assert await balancer.apply(before), "the reload may have taken effect"
    assert files.file.read_text() == written


async def test_a_service_is_registered_while_its_check_passes(tmp_path: Path) -> None:
    backend, messages = Backend("one"), list[str]()
    await backend.start()
    socket = tmp_path / "m.sock"
    async with (
        a_manager_api() as api,
        served(api, socket),
        PlainRequests(RawClient(f"unix://{socket}", None)) as client,
    ):
        await api.store.update(raise_level)
        registration = msgspec.structs.replace(a_registration(backend), address="192.0.2.7", ttl=5)
        check = http_check("127.0.0.1", backend.port, "/health")
        rules = CheckRules(interval_s=0.02, rise=2, fall=2)
        registrar = ServiceRegistrar(client, registration, check, rules, SystemClock(), messages.append)
        running = asyncio.create_task(registrar.run())
        reader = CatalogReader(client, SystemClock(), messages.append, 0.05)
        async with reader.following() as known:
            await known_when(known, {"one"})
            backend.is_healthy = False
            await known_when(known, set())
            backend.is_healthy = True
            await known_when(known, {"one"})
            running.cancel()
            await known_when(known, set())
        await asyncio.wait([running])
    await backend.stop()
    assert messages[:3] == [
        "db@one registered",
        f"db@one removed: http://127.0.0.1:{backend.port}/health: status 503",
        "db@one registered",
    ]


async def known_when(known: KnownCatalog, instances: set[str]) -> None:
    """Wait until these are the instances of the service."""
    async with asyncio.timeout(10):
        while True:
            index, service = known.index, known.services.get(SERVICE)
            if {one.id for one in service.instances if service} == instances if service else not instances:
                return
            await known.wait_changed(index)


async def test_a_listener_without_servers_says_why(machine: Machine) -> None:
    inside = CatalogService(name=SERVICE, instances=(CatalogInstance(id="t1", address="10.0.0.1"),))
    texts = [machine.balancer.summary(services) for services in ({}, {SERVICE: inside})]
    place = f"HAProxy reloaded: 127.0.0.1:{machine.port} has 0 servers of db"
    assert texts == [
        f"{place}, which is not in the catalog (see skep catalog ls)",
        f"{place}, which publishes no port",
    ]


async def test_a_command_is_a_check_that_ends_in_time(tmp_path: Path) -> None:
    healthy, pid = tmp_path / "healthy", tmp_path / "pid"
    check = command_check(("test", "-e", str(healthy)), 5)
    assert await check() == "test exited with 1"
    healthy.touch()
    assert await check() == ""
    assert "no such file" in await command_check((str(tmp_path / "missing"),), 5)()
    hanging = command_check(("sh", "-c", f"echo $$ >{pid}; exec sleep 600"), 0.5)
    assert await hanging()
    assert not Path("/proc", pid.read_text().strip()).exists()


async def test_a_service_is_registered_while_a_command_passes(tmp_path: Path) -> None:
    healthy, socket = tmp_path / "healthy", tmp_path / "m.sock"
    command = ("register", SERVICE, "--address", "192.0.2.7", "--port", "5432", "--interval", "100ms")
    async with (
        a_manager_api() as api,
        served(api, socket),
        PlainRequests(RawClient(f"unix://{socket}", None)) as client,
    ):
        await api.store.update(raise_level)
        reader = CatalogReader(client, SystemClock(), [].append, 0.05)
        words = (*command, "--rise", "1", "--fall", "1", "--", "test", "-e", str(healthy))
        process = await asyncio.create_subprocess_exec(SKEP, "--host", f"unix://{socket}", *words)
        try:
            async with reader.following() as known:
                for count in range(2):
                    healthy.touch()
                    await known_when(known, {"192-0-2-7-5432"})
                    if count == 0:
                        healthy.unlink()
                        await known_when(known, set())
                process.terminate()
                await known_when(known, set())
            assert await process.wait() == 0
        finally:
            if process.returncode is None:
                process.kill()


async def test_a_check_of_a_port_fails_without_a_listener() -> None:
    backend = Backend("one")
    await backend.start()
    check = tcp_check("127.0.0.1", backend.port)
    assert await check() == ""
    await backend.stop()
    assert "refused" in (await check()).lower()
