"""The verbs of a playground: start a cluster, break it, repair it, and remove it without a trace."""

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from skep.aio.trees import discard_tree
from skep.api.client.client import ApiClient
from skep.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from skep.paths import SOCKET_PATH_BYTES_MAX
from skep.playground import cgroups, docker, engine, names, node, processes, relay, underlay
from skep.playground import tls as certificates
from skep.playground.commands import RERUN, find, run, together, wait_until
from skep.playground.description import DescriptionFile, PlaygroundDescription, PlaygroundNode
from skep.playground.images.busybox import busybox_archive

_READY_WITHIN_S = 60
"""Time limit in seconds until all nodes are ready."""
_PORT = 2377
"""Docker's port of managers."""
_LISTEN = f"0.0.0.0:{_PORT}"
_NAME_BYTES_MAX = 16
"""Limit in bytes for a playground's name together with a node's name (see ``names``)."""
API = "API"
"""Key for the managers' TLS API among published ports."""
Progress = Callable[[str], None]
"""Called with a line of text whenever a step is done that the user waits for."""


class Playground:
    """The playground in one directory.  Every verb needs root."""

    def __init__(self, directory: Path, name: str | None, progress: Progress) -> None:
        """``name`` None means the name in the description, or ``playground``."""
        self._directory = directory.resolve()
        self._file = DescriptionFile(self._directory)
        self._wanted_name = name
        self._progress = progress

    @property
    def images(self) -> Path:
        """Directory of image archives that were built for this playground.  ``down`` removes it."""
        return self._directory / "images"

    @property
    def _busybox(self) -> Path:
        return self.images / "busybox.tar"

    def cluster(self) -> PlaygroundDescription:
        """Return the described cluster.  Raises: NotFound: it does not exist, or has another name."""
        cluster = self._file.require()
        if self._wanted_name not in (None, cluster.name):
            raise NotFound(
                f"the playground in {self._directory} is called {cluster.name}, not {self._wanted_name}. Use --name "
                f"{cluster.name}, or another --dir."
            )
        return cluster

    def described(self) -> PlaygroundDescription | None:
        """Return the described cluster, or None.  Raises: NotFound: it has another name."""
        return None if self._file.read() is None else self.cluster()

    async def up(
        self,
        *,
        managers: int,
        workers: int,
        docker_workers: int = 0,
        subnets: int = 1,
        relays: str | None = relay.LOOPBACK,
        tls: bool = False,
    ) -> PlaygroundDescription:
        """Start the nodes, load busybox into each, and form a swarm.

        Args:
            docker_workers: Number of nodes with an unmodified Docker Engine, which join like any Docker worker.
            relays: Address of this machine at which published ports are also served, or None.
            tls: Whether the managers also serve their API by TLS.

        Raises: AlreadyExists, InvalidArgument, Unimplemented: before anything is created.  After a later failure,
        everything created stays for inspection until ``down``.
        """
        if min(workers, docker_workers) < 0:
            raise InvalidArgument("The number of workers cannot be negative.")
        if docker_workers:
            find("dockerd")
        manager: names.Role = "manager"
        worker: names.Role = "worker"
        kinds: list[tuple[names.Role, names.Engine]] = [(manager, "skep")] * managers
        kinds += [(worker, "skep")] * workers
        kinds += [(worker, "docker")] * docker_workers
        await self.plug_in(kinds, subnets, tls=tls)
        await self._form_swarm(self.cluster())
        if relays is not None:
            await relay.start(self._directory, relays)
        if docker_workers and not docker.has_ipvs():
            self._progress(docker.NO_IPVS)
        return self.cluster()

    async def plug_in(
        self, kinds: Sequence[tuple[names.Role, names.Engine]], subnets: int = 1, *, tls: bool = False
    ) -> PlaygroundDescription:
        """Start new nodes that have the busybox image and are not in a swarm yet.

        Their roles are recorded in the description and take effect when they join.
        Raises: AlreadyExists, InvalidArgument: before anything is created.
        """
        managers = sum(role == "manager" for role, _ in kinds)
        cluster = await self._describe(managers, subnets)
        await underlay.make_switch(cluster.name, subnets)
        for role, kind in kinds:
            new_name = names.free_name(role, _names(cluster), kind)
            cluster = cluster.with_node(self._next(cluster, new_name, role, kind))
        cluster = msgspec.structs.replace(cluster, tls=tls)
        if tls:
            await asyncio.to_thread(certificates.write, self._directory, cluster)
        archive = await busybox_archive()
        cluster = msgspec.structs.replace(cluster, image=archive.image_id)
        self.images.mkdir(exist_ok=True)
        self._busybox.write_bytes(archive.data)
        with self._file.locked():
            self._file.write(cluster)
        await together(*(self._make(new, self._then_up()) for new in cluster.nodes))
        return self.cluster()

    async def down(self) -> bool:
        """Remove everything of this playground, however far ``up`` got.  Return whether anything existed."""
        cluster = self.described()
        if cluster is not None and (state := relay.read_state(self._directory)) is not None:
            processes.kill_exactly(state.pid, state.started)
        name = names.check_name(self._wanted_name or (cluster.name if cluster else names.DEFAULT))
        left = {names.node_of_namespace(name, found) or "" for found in underlay.namespaces(name)}
        left |= set(cgroups.nodes(name)) | set(_names(cluster) if cluster else ())
        await together(*(self._destroy(name, found, cluster) for found in sorted(left)))
        await underlay.remove(name)
        if cluster is None:
            return bool(left)
        if cluster.netns_root_made:
            await underlay.remove_root()
        await discard_tree(self.images)
        await discard_tree(certificates.folder(self._directory))
        self._file.remove()
        for left_file in (relay.state_file(self._directory), self._directory / "relay.log"):
            left_file.unlink(missing_ok=True)
        if cluster.directory_made and not os.listdir(self._directory):
            self._directory.rmdir()
        return True

    async def add(
        self, role: names.Role, name: str | None = None, kind: names.Engine = "skep"
    ) -> PlaygroundNode:
        """Start a new machine on the playground's network, with busybox, outside any swarm."""
        with self._file.locked():
            cluster = self.cluster()
            name = names.check_name(name) if name else names.free_name(role, _names(cluster), kind)
            if name in _names(cluster):
                raise AlreadyExists(f"The node {name} already exists. Choose another name.")
            new = self._next(cluster, name, role, kind)
            self._file.write(cluster.with_node(new))
        return await self._make(new)

    async def kill(self, name: str) -> None:
        """Simulate a power loss: kill the node's daemons, conmon processes and containers at once.

        The link is unplugged first, so that peers cannot observe how the processes ended, and stays unplugged while the
        node is off.  Otherwise the kernel, which keeps running, would send their last packets and reset every
        connection.
        """
        cluster = self.cluster()
        known = cluster.node(name)
        if await underlay.is_connected(cluster.name, name):
            known = msgspec.structs.replace(known, unplugged=True)
            self._file.put(known)
        await underlay.set_cable(cluster.name, name, connected=False)
        self._file.put(await node.kill(cluster.name, known))

    async def start(self, name: str) -> PlaygroundNode:
        """Start a killed node again with its old disk.  Does nothing if its daemon runs.

        A node whose daemon keeps stopping is killed first, so that it starts with its present configuration.
        """
        cluster = self.cluster()
        known = cluster.node(name)
        if node.is_up(known):
            # A failing daemon may have recovered, but it would not serve hosts that its file has only now.
            has_recovered = node.runs_as_configured(self._directory, known) and await engine.is_up(
                known.endpoint
            )
            if not node.keeps_stopping(known) or has_recovered:
                return known
        # A measuring tool may have killed the node without this verb, and left processes.
        dead = await node.kill(cluster.name, known)
        await underlay.restart_network(cluster.name, name, dead.addr)
        if dead.unplugged:
            await underlay.set_cable(cluster.name, name, connected=True)
        return await self._switch_on(cluster, msgspec.structs.replace(dead, unplugged=False))

    async def cut(self, name: str, way: underlay.Way | None = None) -> None:
        """Unplug the node's cable, or drop only the packets in the direction ``way``."""
        cluster = self.cluster()
        known = cluster.node(name)
        if way is None:
            self._file.put(msgspec.structs.replace(known, unplugged=False))
            await underlay.set_cable(cluster.name, name, connected=False)
        else:
            await underlay.block(cluster.name, name, way)

    async def reconnect(self, name: str) -> None:
        """Undo every ``cut`` of the node."""
        cluster = self.cluster()
        known = cluster.node(name).name
        await underlay.unblock(cluster.name, known)
        await underlay.set_cable(cluster.name, known, connected=True)

    async def pause(self, name: str) -> None:
        """Pause every process of the node, like on a machine that hangs.  Its connections stay open and silent."""
        cluster = self.cluster()
        await processes.pause_all(cluster.name, cluster.node(name).name)

    async def resume(self, name: str) -> None:
        """Resume a paused node."""
        cluster = self.cluster()
        await asyncio.to_thread(processes.resume_all, cluster.name, cluster.node(name).name)

    async def load(self, archive: Path) -> None:
        """Load an image archive into every node."""
        content = await asyncio.to_thread(archive.read_bytes)
        await together(*(engine.load(target.endpoint, content) for target in self.cluster().nodes))

    async def wait_relayed(self, port: int) -> int:
        """Return this machine's port that serves the published ``port``.  Raises: Unavailable: it is not relayed."""
        return await relay.wait_served(self._directory, port)

    def relayed_ports(self) -> Mapping[str, str]:
        """Return the URL that serves each published port on this machine.  Keys are ``8080``, ``53/udp`` or ``API``."""
        cluster, state = self.cluster(), relay.read_state(self._directory)
        if state is None:
            return {}
        tcp = {str(port): f"http://127.0.0.1:{local}" for port, local in state.ports.items()}
        if cluster.tls and (api := tcp.pop(str(certificates.PORT), None)):
            tcp[API] = api.replace("http:", "tcp:")
        return tcp | {f"{port}/udp": f"udp://127.0.0.1:{local}" for port, local in state.udp.items()}

    async def states(self) -> list[tuple[PlaygroundNode, str]]:
        """Return each node with its state (see ``node.state``)."""
        cluster = self.cluster()
        words = await asyncio.gather(*(node.state(cluster.name, known) for known in cluster.nodes))
        return list(zip(cluster.nodes, words, strict=True))

    def command_inside(self, name: str, command: Sequence[str]) -> list[str]:
        """Return the command line that runs ``command`` in the node's network, mounts and host name.

        Raises: NotFound; FailedPrecondition: the node is down.
        """
        known = self.cluster().node(name)
        if not node.is_up(known):
            raise FailedPrecondition(f"{name} is down: skep playground start --dir {self._directory} {name}")
        return ["nsenter", f"--target={known.pids[0]}", "--net", "--mount", "--uts", "--", *command]

    # --- the steps ----------------------------------------------------------------------------------------------

    async def _describe(self, managers: int, subnets: int) -> PlaygroundDescription:
        """Check the settings, then write the description, so that ``down`` finds the name even if ``up`` fails."""
        if os.geteuid() != 0:
            raise FailedPrecondition("A playground needs namespaces and cgroups. Run the command as root.")
        if managers < 1:
            raise InvalidArgument("A playground needs at least one manager.")
        if not 1 <= subnets <= names.SUBNETS_MAX:
            raise InvalidArgument(f"Use 1 to {names.SUBNETS_MAX} --subnets.")
        name = names.check_name(self._wanted_name or names.DEFAULT)
        await _check_directory(self._directory)
        if self._file.read() is not None:
            raise AlreadyExists(
                f"{self._directory} already has a playground. Run skep playground down --dir {self._directory} first."
            )
        if underlay.namespaces(name):
            raise AlreadyExists(f"A playground called {name} is running. Choose another --name.")
        made = not self._directory.exists()
        self._directory.mkdir(parents=True, exist_ok=True)
        cluster = PlaygroundDescription(
            name=name,
            subnets=subnets,
            directory_made=made,
            netns_root_made=not underlay.root_is_mounted(),
        )
        with self._file.locked():
            self._file.write(cluster)
        return cluster

    def _next(
        self, cluster: PlaygroundDescription, name: str, role: names.Role, kind: names.Engine = "skep"
    ) -> PlaygroundNode:
        address = names.free_address((known.addr for known in cluster.nodes), cluster.subnets)
        return node.described(self._directory, cluster.name, name, role, address.ip, kind)

    def _then_up(self) -> str:
        """Return the step after ``up`` has failed, which leaves a description that a second ``up`` refuses."""
        return f"run skep playground down --dir {self._directory} and {RERUN}"

    async def _make(self, new: PlaygroundNode, then: str = RERUN) -> PlaygroundNode:
        """Create a node: attach its cable, start its daemon and load its image."""
        cluster = self.cluster()
        await underlay.attach(cluster.name, new.name, names.address_of(new.addr))
        started = await self._switch_on(cluster, new, then)
        await engine.load(started.endpoint, await asyncio.to_thread(self._busybox.read_bytes))
        self._progress(f"{new.name} is up ({new.addr})")
        return started

    async def _switch_on(
        self, cluster: PlaygroundDescription, off: PlaygroundNode, then: str = RERUN
    ) -> PlaygroundNode:
        """Start the node, record it, and wait for its API."""
        holder = node.switch_on(self._directory, cluster.name, off)
        self._file.put(holder.node)
        await holder.wait_for_api(then)
        return holder.node

    async def _form_swarm(self, cluster: PlaygroundDescription) -> None:
        """Initialize the swarm on the first manager, join all others at once, and wait until all are ready."""
        first, *others = cluster.nodes
        async with ApiClient.at(first.endpoint) as manager:
            await manager.post("/swarm/init", {"ListenAddr": _LISTEN, "AdvertiseAddr": first.addr})
            self._progress(f"{first.name} created a swarm")
            tokens = (await manager.get("/swarm"))["JoinTokens"]
            await together(*(_join(other, first, tokens[other.role.capitalize()]) for other in others))

            async def all_ready() -> bool:
                nodes = await manager.get("/nodes")
                ready = [known for known in nodes if known["Status"]["State"] == "ready"]
                return len(ready) == len(cluster.nodes)

            await wait_until(all_ready, "every node is ready", _READY_WITHIN_S, self._then_up())
        self._progress(f"all {len(cluster.nodes)} nodes are ready" if others else f"{first.name} is ready")

    async def _destroy(self, playground: str, name: str, cluster: PlaygroundDescription | None) -> None:
        """End the node's processes, then remove their leftovers."""
        if cluster is not None and name in _names(cluster):
            known = cluster.node(name)
            for pid in known.pids:
                processes.kill_exactly(pid, known.started)
        await processes.kill_all(playground, name)
        await cgroups.remove(playground, name)
        if cluster is not None:
            await node.remove_files(self._directory / name)


async def _join(node: PlaygroundNode, manager: PlaygroundNode, token: str) -> None:
    request = {
        "ListenAddr": _LISTEN,
        "AdvertiseAddr": node.addr,
        "RemoteAddrs": [f"{manager.addr}:{_PORT}"],
        "JoinToken": token,
    }
    async with ApiClient.at(node.endpoint) as client:
        await client.post("/swarm/join", request)


def _names(cluster: PlaygroundDescription) -> list[str]:
    return [known.name for known in cluster.nodes]


async def _check_directory(directory: Path) -> None:
    """Check that the directory can hold the nodes' state.

    Raises: InvalidArgument: its path is unsuitable; FailedPrecondition: its file system is unsuitable.
    """
    if any(character in str(directory) for character in ' :,"\\\n'):
        raise InvalidArgument(
            f"{directory}: The path of an overlay mount cannot contain blanks, colons, commas or quotes. Choose "
            "another directory."
        )
    if len(str(directory / "x" / "skep.sock")) + _NAME_BYTES_MAX > SOCKET_PATH_BYTES_MAX:
        raise InvalidArgument(
            f"{directory} is too long, because paths of sockets have at most {SOCKET_PATH_BYTES_MAX} bytes. Choose "
            "another directory."
        )
    if directory.is_relative_to("/run"):
        raise InvalidArgument(f"{directory}: Every node has its own /run. Choose another directory.")
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    kind = (await run("stat", "--file-system", "--format=%T", str(existing))).decode().strip()
    if kind == "overlayfs":
        raise FailedPrecondition(
            f"{directory} is on an overlay file system, which cannot hold another one. "
            "Choose a directory on a disk, a volume or a tmpfs with --dir."
        )
