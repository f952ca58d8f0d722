"""A real HAProxy on this machine, with tasks that return the requests they get."""

import asyncio
import json
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from aiohttp import ClientSession, ClientTimeout, TCPConnector, web

from skep.agent.executor.payloads import Payloads
from skep.aio.clock import SystemClock
from skep.dataplane.door.configuration import DoorState, files
from skep.dataplane.door.holding import HeldRequests, HoldLimits
from skep.dataplane.door.listener import FrontDoor
from skep.errors import Unavailable
from skep.model.assignment import SecretFile
from skep.model.door.payloads import DoorPayload, door_file
from skep.model.door.settings import DoorSettings
from skep.model.networks.tables import NetworkHead, NetworkTable, TableEndpoint, TableNode, TableService
from skep.model.values.ids import NetworkId, NodeId, ServiceId, TaskId
from tests.conftest import SEARCHED

NODE = NodeId("node1")
DOOR_NETWORK = NetworkId("doornet")
WITHIN_S = 20.0
"""Seconds for HAProxy to start, on a machine with other work."""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


_AS_IN_ITS_IMAGE = """
mount -t tmpfs tmpfs /run
printf 'root:x:0:0:root:/:/bin/sh\nhaproxy:x:100:100::/:/bin/false\n' >/run/passwd
printf 'root:x:0:\nhaproxy:x:100:\n' >/run/group
mount --bind /run/passwd /etc/passwd
mount --bind /run/group /etc/group
exec "$@"
"""


def haproxy(*words: str) -> list[str]:
    """Return a command that runs HAProxy with the accounts of its image, because set-up only unpacks the program."""
    private = ("unshare", "--mount", "--propagation", "private", "sh", "-euc")
    return [*private, _AS_IN_ITS_IMAGE, "sh", shutil.which("haproxy", path=SEARCHED) or "haproxy", *words]


class DoorRig:
    """HAProxy in a directory, the listener that changes it, and the table that the listener gets."""

    def __init__(
        self,
        directory: Path,
        limits: HoldLimits | None = None,
        trusted: tuple[str, ...] = (),
        *,
        accepts_proxy: bool = False,
    ) -> None:
        self.directory = directory
        self._limits = limits or HoldLimits()
        self.port, self.tls_port, self.task_port = free_port(), free_port(), free_port()
        self.payloads = Payloads(directory.parent / "secrets", mount_ramfs=lambda _: None)
        self.payloads.open()
        self.payloads.materialize_door("proxy")
        self._settings = DoorSettings(
            ports=(self.port, self.tls_port), trusted=trusted, accepts_proxy=accepts_proxy
        )
        self.door = self._listener()
        self._holding: asyncio.Task[None] | None = None
        self.services = {
            "door": TableService(id=ServiceId("door"), name="door", labels={"skep.door": "true"})
        }
        self.endpoints = {"proxy": self._endpoint("proxy", "door", "127.0.0.1", is_serving=True)}
        self.nodes = (NODE,)
        self._first = files(DoorState(settings=self._settings), str(directory))
        self._process: subprocess.Popen[bytes] | None = None

    def _listener(self) -> FrontDoor:
        keys = self.payloads.door_mount("proxy").source
        return FrontDoor(
            lambda: self.directory,
            SystemClock(),
            partial(self.payloads.write_door, keys),
            seen_at=(str(self.directory), keys),
            settings=self._settings,
            held=HeldRequests(self._limits),
        )

    def restart_node(self, *, is_holding: bool = True) -> None:
        """Forget what HAProxy has, as a node process does that starts again."""
        self.door = self._listener()
        if is_holding:
            self._hold()

    def _hold(self) -> None:
        if self._holding is not None:
            self._holding.cancel()
        self._holding = asyncio.create_task(self._run(self.door))

    @staticmethod
    async def _run(door: FrontDoor) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(door.held.run())
            group.create_task(door.end_connections())

    def service(self, name: str, labels: Mapping[str, str], *, age: str = "1", port: bool = True) -> None:
        """Add or change a service.  Its tasks listen at ``task_port``, unless ``labels`` have a port."""
        ports = {"skep.http.port": str(self.task_port)} if port else {}
        self.services[name] = TableService(
            id=ServiceId(name), name=name, labels={**ports, **labels}, created_at=age
        )

    async def send(self, *payloads: DoorPayload) -> None:
        """Send the node these certificates and challenges, and no others."""
        await self.send_files(*map(door_file, payloads))

    async def send_files(self, *files: SecretFile) -> None:
        """Send the node these files, and no others."""
        self.payloads.put(files, ())
        self.payloads.keep_only([one.id for one in files], ())
        await self.apply()

    def task(
        self, id: str, service: str, address: str, *, is_serving: bool = True, node: NodeId = NODE
    ) -> None:
        """Add or change a task."""
        self.endpoints[id] = self._endpoint(id, service, address, is_serving=is_serving, node=node)

    def _endpoint(
        self, id: str, service: str, address: str, *, is_serving: bool, node: NodeId = NODE
    ) -> TableEndpoint:
        return TableEndpoint(
            task_id=TaskId(id),
            node_id=node,
            service_id=ServiceId(service),
            addresses=(address,),
            is_running=True,
            is_serving=is_serving,
        )

    async def apply(self, *, retries: bool = True) -> None:
        """Apply the table, until HAProxy has it."""
        async with asyncio.timeout(WITHIN_S):
            while True:
                try:
                    return await self._apply()
                except Unavailable:
                    if not retries:
                        raise
                    await asyncio.sleep(0.02)

    async def _apply(self) -> None:
        table = NetworkTable(
            head=NetworkHead(id=DOOR_NETWORK, name="skep-door", is_door=True),
            nodes={id: TableNode(id=id, underlay="127.0.0.1") for id in self.nodes},
            endpoints={one.task_id: one for one in self.endpoints.values()},
            services={one.id: one for one in self.services.values()},
        )
        await self.door.apply(NODE, {DOOR_NETWORK: table}, frozenset({DOOR_NETWORK}))

    async def start(self) -> None:
        """Start HAProxy with the files that are there, as its container does."""
        for name, text in self._first.items():
            if not (self.directory / name).exists():
                (self.directory / name).write_text(text)
        self._start()
        self._hold()
        await self.wait_listening()

    def _start(self) -> None:
        log = (self.directory / "log").open("ab")
        words = ("-W", "-S", f"{self.directory}/master.sock", "-f", f"{self.directory}/haproxy.cfg")
        self._process = subprocess.Popen(haproxy(*words), stdout=log, stderr=log)

    async def wait_listening(self) -> None:
        async with asyncio.timeout(WITHIN_S):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                    writer.close()
                    _, writer = await asyncio.open_unix_connection(self.directory / "master.sock")
                except OSError:
                    assert self._process is not None
                    assert self._process.poll() is None, self.log()
                    await asyncio.sleep(0.02)
                else:
                    writer.close()
                    return

    def stop(self) -> None:
        """Stop holding requests, and kill HAProxy with its workers, which end with their master."""
        if self._holding is not None:
            self._holding.cancel()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @property
    def pid(self) -> int:
        """Id of HAProxy's master process."""
        assert self._process is not None
        return self._process.pid

    def log(self) -> str:
        """Return the output of HAProxy."""
        return (self.directory / "log").read_text()

    async def wait_counted(self, responses: int) -> None:
        """Wait until HAProxy has counted so many responses, which it does shortly after it has sent them."""
        async with asyncio.timeout(WITHIN_S):
            while self.log().count('"status":') < responses:  # noqa: ASYNC110  # the log is a file of another process
                await asyncio.sleep(0.01)

    def reloads(self) -> int:
        """Return how often HAProxy was reloaded."""
        return self.log().count("Reloading HAProxy")

    @asynccontextmanager
    async def client(self) -> AsyncIterator[ClientSession]:
        """Return a client whose requests for any host reach HAProxy."""
        connector = TCPConnector(limit=0)
        async with ClientSession(
            f"http://127.0.0.1:{self.port}", connector=connector, timeout=ClientTimeout(10)
        ) as session:
            yield session

    async def ask(
        self, url: str, *, method: str = "GET", headers: Mapping[str, str] | None = None, data: bytes = b""
    ) -> tuple[int, str, Mapping[str, str]]:
        """Return the status, body and headers of the response to a request for ``host/path``."""
        host, _, path = url.partition("/")
        async with (
            self.client() as session,
            session.request(
                method,
                f"/{path}",
                headers={"Host": host, **(headers or {})},
                data=data,
                allow_redirects=False,
            ) as response,
        ):
            return response.status, await response.text(), response.headers.copy()

    async def ask_task(self, url: str, headers: Mapping[str, str] | None = None) -> dict[str, object]:
        """Return the request as the task got it."""
        status, body, _ = await self.ask(url, headers=headers)
        assert status == 200, (status, body)
        found: dict[str, object] = json.loads(body)
        return found

    async def exchange(self, *sent: bytes, address: str = "127.0.0.1", within_s: float = 10.0) -> bytes:
        """Send bytes, and return all that HAProxy sends until it closes the connection."""
        reader, writer = await asyncio.open_connection(address, self.port)
        try:
            async with asyncio.timeout(within_s):
                for part in sent:
                    writer.write(part)
                    await writer.drain()
                return await reader.read()
        except (ConnectionError, TimeoutError):  # it closes without reading the rest, or waits for more
            return b""
        finally:
            writer.close()

    @asynccontextmanager
    async def tasks(self, *addresses: str) -> AsyncIterator[None]:
        """Serve HTTP at these loopback addresses.  Each response has the address and the request."""

        async def respond(request: web.Request) -> web.StreamResponse:
            if request.headers.get("Upgrade") == "websocket":
                channel = web.WebSocketResponse()
                await channel.prepare(request)
                async for message in channel:
                    await channel.send_str(f"{message.data} again")
                return channel
            await asyncio.sleep(float(request.query.get("wait", "0")))
            local = request.transport.get_extra_info("sockname")[0] if request.transport else ""
            headers = {name.lower(): value for name, value in request.headers.items()}
            length = len(await request.read())
            body = {"task": local, "path": request.path_qs, "headers": headers, "length": length}
            fails = request.query.get("fails") == local
            return web.json_response(body, status=500 if fails else int(request.query.get("status", "200")))

        app = web.Application(client_max_size=1 << 22)
        app.router.add_route("*", "/{path:.*}", respond)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        try:
            for address in addresses:
                await web.TCPSite(runner, address, self.task_port).start()
            yield
        finally:
            await runner.cleanup()


@asynccontextmanager
async def a_door(
    directory: Path,
    limits: HoldLimits | None = None,
    trusted: tuple[str, ...] = (),
    *,
    accepts_proxy: bool = False,
) -> AsyncIterator[DoorRig]:
    """Run HAProxy in ``directory`` during the block."""
    rig = DoorRig(directory, limits, trusted, accepts_proxy=accepts_proxy)
    try:
        await rig.start()
        yield rig
    finally:
        rig.stop()
