"""A node's executor for tests: real runc and conmon, in its own network namespace and cgroup."""

import asyncio
import os
import random
import secrets
import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from skep.agent.executor.attaching import ClusterAttachments, SessionRequests
from skep.agent.executor.oci import OciExecutor, oci_executor
from skep.agent.session.session_state import SessionState
from skep.aio.clock import SystemClock
from skep.dataplane.dataplane import DataPlane, Host, NetProcess
from skep.dataplane.endpoint_allocation import ClusterEndpoints
from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.dataplane.wireguard.tunnels import NO_ENCRYPTION, Options
from skep.engine.api_sockets import NONE as NO_API
from skep.engine.api_sockets import ApiSockets
from skep.engine.capacity import find_programs
from skep.engine.confinement import cgroups
from skep.engine.engine import EngineConfig
from skep.engine.images.digest import Digest
from skep.engine.images.image import ContainerDefaults, Image, ImageConfig
from skep.engine.images.platforms import this_platform
from skep.engine.images.store import ImageStore
from skep.errors import NotFound, Unavailable
from skep.linux.syscalls import unmount_if_mounted
from skep.model.values.user_map import UserMap
from skep.node.host.runtime_choice import look_up
from skep.paths import Paths
from tests.support.networks.reservations import OwnReservations

RUNTIME = os.environ.get("SKEP_TEST_RUNTIME", "runc")
"""OCI runtime of the containers.  crun needs a machine with cgroup v2 only."""
IMAGE = "busybox:1"
IMAGE_ID = Digest("sha256:" + "b" * 64)
_PROGRAMS = {name: name for name in ("runc", "crun")}
_APPLETS = (
    *(
        "sh",
        "sleep",
        "cat",
        "echo",
        "id",
        "ls",
        "env",
        "wget",
        "httpd",
        "ip",
        "nc",
        "grep",
        "head",
        "seq",
        "kill",
    ),
    *(
        "mount",
        "touch",
        "pwd",
        "hostname",
        "ulimit",
        "stty",
        "printf",
        "dd",
        "tail",
        "tr",
        "true",
        "false",
        "ping",
    ),
    *("chmod", "mkdir", "ps", "stat", "unshare", "yes"),
)


def busybox_tree(directory: Path) -> Path:
    """Create a root file system of busybox with a few users."""
    (directory / "bin").mkdir(parents=True)
    (directory / "etc").mkdir()
    (directory / "tmp").mkdir()
    shutil.copy(shutil.which("busybox") or "/bin/busybox", directory / "bin/busybox")
    for applet in _APPLETS:
        (directory / "bin" / applet).symlink_to("busybox")
    (directory / "etc/passwd").write_text(
        "root:x:0:0:root:/root:/bin/sh\nalice:x:1000:1001:Alice:/home/alice:/bin/sh\n"
    )
    (directory / "etc/group").write_text("root:x:0:\nalice:x:1001:\nstaff:x:50:alice\nvideo:x:44:\n")
    return directory


class TreeImages(ImageStore):
    """An image store with one image: an unpacked tree.  There is no registry."""

    def __init__(self, tree: Path, defaults: ContainerDefaults | None = None) -> None:
        super().__init__(tree.parent / "images")
        self._tree = tree
        here, defaults = this_platform(), defaults or ContainerDefaults(cmd=("sh",))
        config = ImageConfig(os=here.os, architecture=here.architecture, config=defaults)
        self.image = Image(id=IMAGE_ID, config=config)
        self.pulls = 0

    def resolve(self, word: str) -> Image | None:
        return self.image if word in (IMAGE, "busybox", IMAGE_ID) else None

    def get(self, word: str) -> Image:
        image = self.resolve(word)
        if image is None:
            raise NotFound(f"No such image: {word}")
        return image

    def layers(self, image: Image) -> Sequence[Path]:
        return (self._tree,) if image.id else ()

    @asynccontextmanager
    async def pin(self, chain: Sequence[str]) -> AsyncIterator[None]:
        yield

    async def pull(self, word: str, auth: str = "", *, uses_helper: bool = False) -> Image:
        self.pulls += 1
        raise Unavailable(f"cannot reach the registry of {word}")


def a_data_plane(
    paths: Paths,
    namespaces: Namespaces,
    ports: OwnReservations,
    endpoints: ClusterEndpoints | None = None,
    encryption: Options = NO_ENCRYPTION,
) -> DataPlane:
    """Return a node's networks without a net process."""
    clock = SystemClock()
    host = Host(paths=paths, namespaces=namespaces, clock=clock, rng=random.random)
    net = NetProcess(ports, OwnReservations(namespaces))
    return DataPlane(host, net, endpoints or no_cluster(), encryption)


def no_cluster() -> ClusterAttachments:
    """Return the attachments of a node outside of a swarm."""
    return ClusterAttachments(SessionRequests(SessionState(SystemClock())))


@cache
def _versions() -> Mapping[str, str]:
    return {name: found.version for name, found in look_up(_PROGRAMS).items()}


def an_executor(
    paths: Paths,
    images: Any,
    cgroup_parent: str,
    namespaces: Namespaces,
    ports: OwnReservations,
    users: UserMap | None = None,
) -> OciExecutor:
    """Return the containers and networks of a node outside of a swarm."""
    attachments = no_cluster()
    plane = a_data_plane(paths, namespaces, ports, attachments)
    config = EngineConfig(starts_max=2 * (os.cpu_count() or 1), hostname="lab")
    clock = SystemClock()
    return oci_executor(
        paths,
        images,
        plane,
        attachments,
        config,
        clock,
        cgroup_parent=cgroup_parent,
        programs=find_programs(_PROGRAMS, RUNTIME, versions=_versions()),
        cdi_directories=(paths.data.parent / "cdi",),
        users=users,
        with_selinux=True,
        apis=ApiSockets((), paths.run, NO_API.server),  # no container mounts these files, as with a daemon
    )


class Lab:
    """One machine: directories, a network namespace and cgroups, on which executors can be replaced.

    With ``users``, other users must be able to pass the directories above ``root``.
    """

    def __init__(self, root: Path, users: UserMap | None = None) -> None:
        self.users = users
        self.paths = Paths(root / "data", root / "run")
        self.cgroup_parent = f"skep-test-{secrets.token_hex(4)}"
        self._homes = Namespaces(root / "home")
        self.home = self._homes.path("node")
        self.tree = busybox_tree(root / "tree")
        self.images = TreeImages(self.tree)
        self._ports: OwnReservations | None = None

    def executor(self) -> OciExecutor:
        """Create an executor, as a restarted node process does.  The previous one's ports are released."""
        namespaces = Namespaces(self.paths.netns, self.home)
        if self._ports is not None:
            self._ports.close()
        self._ports = OwnReservations(namespaces)
        return an_executor(self.paths, self.images, self.cgroup_parent, namespaces, self._ports, self.users)

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Lab"]:
        """Run the machine.  Remaining processes and files are removed at the end."""
        self.paths.runc.mkdir(parents=True, exist_ok=True)  # as the daemon does
        await self._homes.create("node", {})
        async with self._homes.netlink(self.home) as home:
            await home.link("set", index=1, state="up")
        try:
            yield self
        finally:
            executor = self.executor()
            async with asyncio.timeout(30), executor.running():
                for container in executor.engine.list():
                    with suppress(NotFound):
                        await executor.engine.remove(container.id, force=True)
            if self._ports is not None:
                self._ports.close()
            unmount_if_mounted(self.paths.secrets)
            await _destroy_pins(self.paths.probes)
            await _destroy_pins(self.paths.overlays)  # as the next process would
            remove_cgroups(self.cgroup_parent)
            await self._homes.destroy("node")
            self._homes.close()

    def remains(self) -> list[str]:
        """Return leftovers of containers: directories, mounts, namespaces, cgroups, links, rules."""
        found = [str(path) for path in (*_entries(self.paths.containers), *_entries(self.paths.netns))]
        found += [str(path) for path in _entries(self.paths.runc) if path.name != ".cache"]  # crun's filters
        found += [
            line
            for line in Path("/proc/self/mounts").read_text().splitlines()
            if self._is_container_mount(line)
        ]
        for group in (f"{self.cgroup_parent}/ctr/*/", f"*/{self.cgroup_parent}/ctr/*/"):  # cgroup v2, then v1
            found += [str(path) for path in Path("/sys/fs/cgroup").glob(group)]
        return found

    def _is_container_mount(self, line: str) -> bool:
        target = line.split()[1]
        return target.startswith((str(self.paths.containers), str(self.paths.netns)))

    async def in_home(self, *command: str) -> str:
        """Return the output of a command in the node's network namespace."""
        process = await asyncio.create_subprocess_exec(
            "nsenter",
            f"--net={self.home}",
            *command,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await process.communicate()
        return output.decode(errors="replace")


def remove_cgroups(parent: str) -> None:
    """Remove a node's own cgroups, once they contain no container and no monitor."""
    for root in cgroups.Cgroups(parent).all_roots():
        cgroups.remove_tree(root / parent)


def with_defaults(images: TreeImages, defaults: ContainerDefaults) -> None:
    """Set other defaults for the lab's image."""
    images.image = msgspec.structs.replace(images.image, config=ImageConfig(config=defaults))


def _entries(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


async def _destroy_pins(directory: Path) -> None:
    spaces = Namespaces(directory)
    for id in spaces.pinned():
        await spaces.destroy(id)
    spaces.close()


def is_root() -> bool:
    """Return whether runc can work at all."""
    return os.geteuid() == 0
