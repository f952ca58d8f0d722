"""The state that outlives the node process: processes, control groups, namespaces, ports, mounts and files."""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Collection
from random import Random

from sim.world.time import VirtualLoop
from skep.engine.containers.container import Container, ContainerState, ProcessName
from skep.engine.runtime.runtime import Ended
from skep.model.values.ids import ContainerId

LIVES_S = (0.5, 3.0, 12.0, 40.0)
"""Lengths of runs that end by themselves."""
EXECS_S = (0.01, 0.5, 2.0, 90.0)
"""Lengths of execs that end by themselves.  The longest ones exceed the deadline of a probe."""
UNMONITORED = 0.1
"""Share of the runs whose monitor is killed, so that nobody reads their exit code."""
TERM_S = 3.0
"""Longest time in seconds from SIGTERM to the end of a process that handles it."""


class Process:
    """The first process of a container."""

    def __init__(self, name: ProcessName) -> None:
        self.name = name
        self.is_started = self.is_frozen = False
        self.is_monitored = True
        self.pending: int | None = None
        """Exit code of a signal that waits for the thaw."""
        self.exit_code: int | None = None
        self.ended = asyncio.Event()


class ExecProcess:
    """An additional process of a container."""

    def __init__(self, id: ContainerId, pid: int) -> None:
        self.container = id
        self.pid = pid
        self.exit_code: int | None = None
        self.ended = asyncio.Event()

    def end(self, code: int) -> None:
        if self.exit_code is None:
            self.exit_code = code
            self.ended.set()


class World:
    """One machine.  ``violations``: rules that a call has broken."""

    def __init__(self, loop: VirtualLoop, random: Random) -> None:
        self._loop = loop
        self._random = random
        self._pids = 1000
        self._namespaces = 0
        self.processes: dict[ContainerId, Process] = {}
        """Containers that runc knows.  A container whose process has ended stays until it is deleted."""
        self.exits: dict[ProcessName, int] = {}
        """Exit codes that a monitor has written."""
        self.reported: dict[ContainerId, Ended] = {}
        """The end of each container's last run, as the runtime has reported it."""
        self.cgroups: set[ContainerId] = set()
        self.execs: dict[str, ExecProcess] = {}
        self.namespaces: dict[ContainerId, str] = {}
        """The name of each container's network namespace."""
        self.networks: dict[ContainerId, dict[str, str]] = {}
        """The name under which a namespace is on each network."""
        self.limits: dict[ContainerId, int] = {}
        """The pids limit of each control group."""
        self.prepared: dict[ContainerId, tuple[str, ...]] = {}
        """The environment in each bundle."""
        self.prepared_for: dict[ContainerId, str] = {}
        """The namespace in each bundle."""
        self.name_files: dict[ContainerId, tuple[str, ...]] = {}
        """The networks that the name files of each bundle show."""
        self.environments: dict[ContainerId, tuple[str, ...]] = {}
        """The environment of each run."""
        self.ports: dict[int, ContainerId] = {}
        self.roots: set[ContainerId] = set()
        self.volumes: set[ContainerId] = set()
        """Users for which volumes are mounted."""
        self.directories: set[ContainerId] = set()
        self.records: dict[ContainerId, Container] = {}
        self.starts = Counter[ContainerId]()
        self.attempts = Counter[ContainerId]()
        """Number of starts that reached the networks step, where another container may already have the port."""
        self.behaviors: defaultdict[ContainerId, float] = defaultdict(float)
        """Chance that a run ends by itself."""
        self.unfreed: set[tuple[str, ContainerId]] = set()
        """Resources that could not be freed at the last attempt.  The record of their container stays, and a later
        attempt follows.
        """
        self.unwritten: set[ContainerId] = set()
        """Containers whose last record could not be written yet."""
        self.refused_writes = Counter[ContainerId]()
        """Number of failed writes of the record.  An attempt of the restart policy counts only if it is written."""
        self.lost: set[ContainerId] = set()
        """Containers of which a crash has lost a record.  A stop counts at once, although the disk is full."""
        self.violations: list[str] = []

    # --- processes ----------------------------------------------------------------------------------------------

    def create(self, id: ContainerId, limit: int) -> Process:
        self._require_kept(id, "created")
        self.limits[id] = limit
        self.unfreed.discard(("limit", id))
        if id in self.processes:
            raise RuntimeError(f"container with id {id[:4]} already exists")
        if id not in self.namespaces or id not in self.roots:
            self.violations.append(f"{id[:4]} was created without its namespace or root")
        elif self.prepared_for[id] != self.namespaces[id]:
            self.violations.append(f"{id[:4]} was created in an earlier namespace")
        self._pids += 1
        process = self.processes[id] = Process(ProcessName(self._pids, 1, "boot"))
        self.cgroups.add(id)
        return process

    def start(self, id: ContainerId) -> None:
        self._require_kept(id, "started")
        process = self.processes[id]
        process.is_started = True
        process.is_monitored = self._random.random() >= UNMONITORED
        self.environments[id] = self.prepared.get(id, ())
        self.starts[id] += 1
        if self._random.random() < self.behaviors[id]:
            length = self._random.choice(LIVES_S) * self._random.random()
            self._loop.call_later(length, self.end, process, self._random.choice((0, 1, 3, 3)))

    def signal(self, name: ProcessName, number: int) -> None:
        for process in self.processes.values():
            if process.name == name and process.exit_code is None:
                if number == 9:
                    self._loop.call_later(0.01, self._kill, process)
                elif self._random.random() < 0.7:  # others ignore it
                    self._loop.call_later(self._random.random() * TERM_S, self.end, process, 143)

    def end(self, process: Process, code: int) -> None:
        if process.is_frozen:
            process.pending = code
        elif process.exit_code is None:
            process.exit_code = code
            if process.is_monitored:
                self.exits[process.name] = code
            process.ended.set()
            for id in [id for id, one in self.processes.items() if one is process]:
                self.end_execs(id)

    def _kill(self, process: Process) -> None:
        process.is_frozen = False
        self.end(process, 137)

    def set_frozen(self, id: ContainerId, *, is_frozen: bool) -> None:
        process = self.processes.get(id)
        if process is None or process.exit_code is not None:
            raise RuntimeError("no running process")
        process.is_frozen = is_frozen
        if not is_frozen and process.pending is not None:
            self.end(process, process.pending)

    def delete(self, id: ContainerId) -> None:
        process = self.processes.get(id)
        if process is not None:
            self._kill(process)
            del self.processes[id]
        self.end_execs(id)
        self.cgroups.discard(id)

    # --- execs --------------------------------------------------------------------------------------------------

    def exec(self, id: ContainerId, exec_id: str) -> ExecProcess:
        process = self.processes.get(id)
        if process is None or process.exit_code is not None or not process.is_started or process.is_frozen:
            raise RuntimeError("no running process")
        self._pids += 1
        one = self.execs[exec_id] = ExecProcess(id, self._pids)
        self._loop.call_later(self._random.choice(EXECS_S), one.end, self._random.choice((0, 0, 1)))
        return one

    def kill_exec(self, pid: int) -> None:
        for one in self.execs.values():
            if one.pid == pid:
                one.end(137)

    def end_execs(self, id: ContainerId) -> None:
        for one in self.execs.values():
            if one.container == id:
                one.end(137)

    # --- networks -----------------------------------------------------------------------------------------------

    def attach(self, id: ContainerId, port: int, networks: Collection[str], name: str) -> None:
        self._require_kept(id, "attached to networks")
        self.attempts[id] += 1
        owner = self.ports.get(port)
        if owner not in (None, id):
            raise RuntimeError(f"port {port} is taken by {str(owner)[:4]}")
        if id not in self.namespaces:
            self._namespaces += 1
            self.namespaces[id] = f"n{self._namespaces}"
        self.networks[id] = dict.fromkeys(networks, name)
        if port:
            self.ports[port] = id

    def detach(self, id: ContainerId) -> None:
        self.namespaces.pop(id, None)
        self.networks.pop(id, None)
        self.ports = {port: owner for port, owner in self.ports.items() if owner != id}

    # --- volumes ------------------------------------------------------------------------------------------------

    def unmount(self, id: ContainerId) -> None:
        self.volumes.discard(id)
        self.unfreed.discard(("volume", id))

    # --- disk ---------------------------------------------------------------------------------------------------

    def save(self, container: Container) -> None:
        if container.id not in self.directories:
            raise FileNotFoundError(2, "No such file or directory")
        self.records[container.id] = container
        self.unwritten.discard(container.id)
        if self.limits.get(container.id) == container.config.pids:
            self.unfreed.discard(("limit", container.id))

    def discard(self, id: ContainerId) -> None:
        self.roots.discard(id)
        self.directories.discard(id)
        self.records.pop(id, None)

    # --- resources ----------------------------------------------------------------------------------------------

    def held_by(self, id: ContainerId) -> list[str]:
        """Return a container's resources that only a run needs, unless freeing them has failed."""
        resources: dict[str, Collection[ContainerId]] = {
            "process": self.processes,
            "namespace": self.namespaces,
            "root": self.roots,
            "volume": self.volumes,
        }
        return [what for what, owners in resources.items() if id in owners and (what, id) not in self.unfreed]

    def _require_kept(self, id: ContainerId, what: str) -> None:
        record = self.records.get(id)
        if record is not None and record.state is ContainerState.REMOVING:
            self.violations.append(f"{id[:4]} was {what} while it is being removed")
