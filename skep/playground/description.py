"""``DIR/cluster.json``: the description of a playground, read by its verbs and by measuring tools.

The verbs run as separate commands, possibly at the same time.  A command that changes the file holds ``DIR/lock``.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from skep.errors import FailedPrecondition, NotFound
from skep.playground.names import Engine, Role


class PlaygroundNode(msgspec.Struct, frozen=True, kw_only=True):
    """One machine of the playground."""

    name: str
    role: Role
    endpoint: str
    """Socket of this node's Engine API (``unix:///...``), which can be reached from the machine."""
    addr: str
    """IP address of the node on the playground's network."""
    pids: tuple[int, ...] = ()
    """Pid of the holder process, the ancestor of the node's daemons.  Empty while the node is down."""
    started: int = 0
    """Start time of the holder in clock ticks since boot (``/proc/PID/stat``), to detect reused pids."""
    netns: str
    """Path of the pinned network namespace."""
    cgroup: str
    state_dir: str
    link: tuple[str, str]
    """Namespace and name of the interface at the other end of the node's cable.  Taking it down disconnects the node.
    """
    unplugged: bool = False
    """Whether ``kill`` has unplugged the cable.  ``start`` plugs it in again."""
    start: tuple[str, ...]
    """Command that starts the node after a kill.  It returns when the API responds."""
    engine: Engine = "skep"
    """The node's software: Skep's daemon, or an unmodified Docker Engine."""


class PlaygroundDescription(msgspec.Struct, frozen=True, kw_only=True):
    """The content of the file."""

    system: str = "skep"
    name: str
    image: str = ""
    """Id of busybox, the image that every node has."""
    subnets: int = 1
    tls: bool = False
    """Whether the managers also serve their API by TLS."""
    directory_made: bool = False
    """Whether ``up`` created DIR, so that ``down`` removes it."""
    netns_root_made: bool = False
    """Whether ``up`` made /run/netns a mount, so that ``down`` unmounts it when it is empty."""
    nodes: tuple[PlaygroundNode, ...] = ()

    def node(self, name: str) -> PlaygroundNode:
        """Return a node.  Raises: NotFound."""
        for node in self.nodes:
            if node.name == name:
                return node
        names = " ".join(node.name for node in self.nodes) or "none"
        raise NotFound(f"The playground {self.name} has no node {name}. Choose one of {names}.")

    def with_node(self, node: PlaygroundNode) -> "PlaygroundDescription":
        """Return the cluster with ``node`` in place of the node of the same name, or added."""
        if any(other.name == node.name for other in self.nodes):
            nodes = tuple(node if other.name == node.name else other for other in self.nodes)
        else:
            nodes = (*self.nodes, node)
        return msgspec.structs.replace(self, nodes=nodes)


class DescriptionFile:
    """The file in one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "cluster.json"
        self._lock = directory / "lock"

    def read(self) -> PlaygroundDescription | None:
        """Return the description, or None without a playground.  Raises: FailedPrecondition: the file is damaged."""
        try:
            return msgspec.json.decode(self.path.read_bytes(), type=PlaygroundDescription)
        except FileNotFoundError:
            return None
        except msgspec.DecodeError as error:
            raise FailedPrecondition(
                f"{self.path} is damaged ({error}). Remove it, then run skep playground down with --name."
            ) from error

    def require(self) -> PlaygroundDescription:
        """Return the description.  Raises: NotFound."""
        if (cluster := self.read()) is None:
            raise NotFound(
                f"No playground in {self.directory}. Start one with skep playground up --dir {self.directory}."
            )
        return cluster

    def write(self, cluster: PlaygroundDescription) -> None:
        """Replace the file atomically.  Call it inside ``locked``."""
        temporary = self.path.with_suffix(".json.new")
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(cluster), indent=1) + b"\n")
        temporary.replace(self.path)

    def put(self, node: PlaygroundNode) -> PlaygroundDescription:
        """Add or replace one node.  Takes the lock."""
        with self.locked():
            cluster = self.require().with_node(node)
            self.write(cluster)
        return cluster

    def remove(self) -> None:
        """Forget the playground."""
        for path in (self.path, self.path.with_suffix(".json.new"), self._lock):
            path.unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock within the context.  Use it only to read and write the file, never across an await."""
        descriptor = os.open(self._lock, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
