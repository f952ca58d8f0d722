"""A container: its configuration, its state, its sandbox, and the values that its operations take and give.

A ``Container`` is one immutable record, appended to ``<data>/containers/<id>/record`` at every change; the Engine
API's ``docker ps`` and ``docker inspect`` are renderings of it.  Nothing secret is in it but what the user put into the
environment.  Records are read by other versions: the names of serialized fields stay.
"""

from collections.abc import Mapping
from enum import Enum
from typing import NamedTuple

import msgspec

from skep.engine.machine import MachineOptions
from skep.errors import AlreadyExists
from skep.model.container import HealthConfig, Mount, Ulimit
from skep.model.ids import ContainerId
from skep.model.rights import ApiAccess
from skep.model.sandbox import EndpointConfig, EndpointRequest, NetworkMode, PublishedPort, Sandbox
from skep.model.times import SECOND_NS, ZERO_TIME, Nanoseconds, Timestamp


class ContainerState(Enum):
    """What is recorded of ``Container.status``."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    EXITED = "exited"
    REMOVING = "removing"


class ProcessName(msgspec.Struct, frozen=True):
    """A process, identified so that a later one with the same pid differs.

    ``start_ticks``: field 22 of /proc/PID/stat; ``boot_id``: the kernel's, since ticks count from the boot.
    """

    pid: int
    start_ticks: int
    boot_id: str


class Interruption(Enum):
    """An end from outside the container, which says nothing about its program."""

    MACHINE_RESTARTED = "machine-restarted"
    MONITOR_LOST = "monitor-lost"


class HealthStatus(Enum):
    """``State.Health.Status``, in Docker's words."""

    STARTING = "starting"
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"


class Probe(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    """One run of a health check, as ``docker inspect`` shows it.  ``exit_code`` -1: it could not be run."""

    start: Timestamp
    end: Timestamp
    exit_code: int
    output: str


class Health(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    """State of a container's health check, as ``docker inspect`` shows it.  ``log``: the last probes, oldest first."""

    status: HealthStatus = HealthStatus.STARTING
    failing_streak: int = 0
    log: tuple[Probe, ...] = ()


class MountPoint(msgspec.Struct, frozen=True, kw_only=True):
    """A file system placed into the container.

    ``source``: absolute path on the node (empty for tmpfs); ``name``: of a volume.  ``options``: of the
    mount, as runc takes them.  ``internal``: made by the node itself (secrets), not shown by ``docker
    inspect``.
    """

    type: str
    destination: str
    source: str = ""
    name: str = ""
    driver: str = ""
    read_only: bool = False
    propagation: str = ""
    options: tuple[str, ...] = ()
    read_only_below: bool | None = None
    """Whether mounts below a read-only one are read-only, too; None: where the node can have them so."""
    internal: bool = False
    anonymous: bool = False
    """A volume made for this container alone, and removed with it."""
    subpath: str = ""
    """What is mounted of the volume, relative to it; empty: all of it."""
    layers: tuple[str, ...] = ()
    """Of an image that is mounted, whose id is ``name``: directories of its files, top first."""


class LogConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How output is logged.  ``max_size_bytes`` 0: one file without a bound; ``type`` none: not at all."""

    type: str = "json-file"
    options: Mapping[str, str] = {}
    max_size_bytes: int = 0
    max_files: int = 1
    compress: bool = False
    """Files that are not written to any more."""
    is_readable: bool = True
    """Whether ``docker logs`` shows it; False: its user has disabled the cache, or it is not kept at all."""
    attributes: Mapping[str, str] | None = None
    """What the options add to each line; None: a version before these wrote the record."""
    is_restricted: bool = False
    """Whether a user below the administrator chose it: then it reaches no address of the cluster's machines."""


class ContainerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a container was asked to be, with the image's defaults merged in.  Limits: 0 means none."""

    path: str
    """What is executed; with ``args`` it is entrypoint and command together."""
    args: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    """``entrypoint`` and ``command`` are kept apart only to be shown."""
    command: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    working_dir: str = ""
    user: str = ""
    groups: tuple[str, ...] = ()
    hostname: str = ""
    tty: bool = False
    open_stdin: bool = False
    stdin_once: bool = False
    stop_signal: str = ""
    stop_grace_ns: Nanoseconds = 10 * SECOND_NS
    """From the stop signal to the kill; negative: it is not killed."""
    stop_timeout: int | None = None
    """The same in seconds as its user or its image gave it, to be shown; None: they did not, or it is a task's."""
    init: bool = False
    read_only: bool = False
    mounts: tuple[MountPoint, ...] = ()
    nano_cpus: int = 0
    """Where ``machine`` has a quota: what that is."""
    memory_bytes: int = 0
    memory_reservation_bytes: int = 0
    pids: int = 0
    shm_bytes: int = 64 << 20
    ulimits: tuple[Ulimit, ...] = ()
    sysctls: Mapping[str, str] = {}
    capability_add: tuple[str, ...] = ()
    capability_drop: tuple[str, ...] = ()
    seccomp: str = "default"
    """``default``, ``unconfined``, or a profile in Docker's JSON."""
    apparmor: str = "default"
    """``default``, ``unconfined``, or a profile that is loaded in the kernel; ignored where there is no AppArmor."""
    no_new_privileges: bool = False
    oom_score_adj: int = 0
    hosts: tuple[str, ...] = ()
    """Extra lines of /etc/hosts, as in a service: ``address name...``."""
    nameservers: tuple[str, ...] = ()
    search_domains: tuple[str, ...] = ()
    dns_options: tuple[str, ...] = ()
    ports: tuple[PublishedPort, ...] = ()
    """Host-mode ports to publish on the node."""
    endpoints: tuple[EndpointConfig, ...] = msgspec.field(name="places", default=())
    """Networks it is on, in the order of its interfaces; none: the node's gateway bridge alone."""
    is_on_host: bool = False
    """It has no network namespace of its own, but the node's."""
    exposed_ports: tuple[str, ...] = ()
    machine: MachineOptions = MachineOptions()
    """What it is given of the machine, as its user asked for it."""
    api: ApiAccess = ApiAccess.READ
    """What it may call on the Engine API, if it mounts the socket."""
    binds: tuple[str, ...] = ()
    """``HostConfig.Binds`` of the request; it and the next two are kept to be shown."""
    requested_mounts: tuple[Mount, ...] | None = None
    """``HostConfig.Mounts`` of the request; None: made by a version that did not keep them."""
    tmpfs: Mapping[str, str] = {}
    """``HostConfig.Tmpfs`` of the request."""
    healthcheck: HealthConfig | None = None
    log: LogConfig = LogConfig()


class RestartPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """``--restart``.  ``name``: no, always, unless-stopped, on-failure; ``attempts_max`` 0: as often as needed."""

    name: str = "no"
    attempts_max: int = 0


class PlainOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options that only a plain container has: its user decides when it runs, and on which networks."""

    mode: NetworkMode = NetworkMode.BRIDGE
    networks: tuple[EndpointRequest, ...] = ()
    """With ``NETWORKS``, in the order of its interfaces."""
    network_mode: str = "default"
    """As the user gave it."""
    mac_address: str = ""
    """On the node's bridge; empty: any."""
    restart: RestartPolicy = RestartPolicy()
    auto_remove: bool = False
    restarts: int = 0
    """Starts by its policy since the user started it."""
    is_stopped: bool = False
    """By its user: its policy does not start it again."""
    security_options: tuple[str, ...] = ()
    """As the user gave them."""
    volumes_from: tuple[str, ...] = ()
    """As the user gave them."""
    attached: tuple[str, ...] = ()
    """Streams that the client attached when it was created: stdin, stdout, stderr."""
    is_step: bool = False
    """Of a build: it is removed by its build, or by the next process if that of the build has ended."""

    def wants_restart(self, exit_code: int) -> bool:
        """Whether its policy starts it again after a run, or a start that failed, with ``exit_code``.

        Source: moby 20.10, restartmanager/restartmanager.go (ShouldRestart).
        """
        if self.is_stopped:
            return False
        match self.restart.name:
            case "always" | "unless-stopped":
                return True
            case "on-failure":
                limit = self.restart.attempts_max
                return exit_code != 0 and (not limit or self.restarts < limit)
            case _:
                return False


class Container(msgspec.Struct, frozen=True, kw_only=True):
    """One container.  Times are Docker's; ``ZERO_TIME`` where it has not happened yet."""

    id: ContainerId
    name: str
    image: str
    """The reference as the user gave it."""
    image_id: str
    """``sha256:...`` of the image's configuration."""
    config: ContainerConfig
    labels: Mapping[str, str] = {}
    layers: tuple[str, ...] = ()
    """Lower directories of the root file system, top first."""
    created_at: Timestamp = ZERO_TIME
    sandbox: Sandbox | None = msgspec.field(name="endpoint", default=None)
    state: ContainerState = ContainerState.CREATED
    process: ProcessName | None = None
    monitor: ProcessName | None = None
    """Its conmon."""
    exit_code: int = 0
    error: str = ""
    """Why it could not start, or that its monitor was lost; the runtime's words."""
    interruption: Interruption | None = None
    """What ended the container from outside, or None if it ended by itself or was stopped."""
    oom_killed: bool = False
    health: Health | None = None
    """None: it has no health check, or never ran."""
    started_at: Timestamp = ZERO_TIME
    finished_at: Timestamp = ZERO_TIME
    plain: PlainOptions | None = None
    """None: it is a task's."""
    is_retired: bool = False
    """It never ran and never will: its sandbox is freed."""
    is_at_rest: bool = False
    """Its policy follows its next end only, or the next node process: since the last one its user has begun a start, or
    changed the policy."""
    warnings: tuple[str, ...] = ()
    """What of its configuration this node could not give it when it was last prepared."""
    stack: str = ""
    """That of its task's service.  Not what its label says: that may be its image's."""

    @property
    def mode(self) -> NetworkMode:
        """What it has for a network; a task without networks is on the gateway bridge alone."""
        if self.plain is not None:
            return self.plain.mode
        if self.config.is_on_host:
            return NetworkMode.HOST
        return NetworkMode.NETWORKS if self.config.endpoints else NetworkMode.BRIDGE

    @property
    def network_mode(self) -> str:
        """The same, as Docker's API shows it."""
        if self.plain is not None:
            return self.plain.network_mode
        return "host" if self.config.is_on_host else "default"

    @property
    def pid(self) -> int:
        """Pid of its first process on the node; 0 when none runs."""
        return self.process.pid if self.process is not None and self.is_running else 0

    @property
    def is_running(self) -> bool:
        """Whether it has a process (a paused one does)."""
        return self.state in (ContainerState.RUNNING, ContainerState.PAUSED)

    @property
    def is_restarting(self) -> bool:
        """Whether it has ended and its policy starts it again: known before the restart monitor has begun, too."""
        if self.plain is None or self.is_at_rest or self.state is not ContainerState.EXITED:
            return False
        return self.plain.wants_restart(self.exit_code)

    @property
    def is_active(self) -> bool:
        """``State.Running``: Docker counts one that is restarting as running, so that it is kept.

        Source: moby, container/state.go (SetRestarting).
        """
        return self.is_running or self.is_restarting

    @property
    def status(self) -> str:
        """``State.Status``, in Docker's words."""
        return "restarting" if self.is_restarting else self.state.value

    @property
    def was_started(self) -> bool:
        """Whether it ever ran."""
        return self.started_at != ZERO_TIME

    def require_running(self) -> None:
        """Raises: NotRunning."""
        if self.is_restarting:
            raise NotRunning(f"Container {self.id} is restarting, wait until the container is running")
        if not self.is_running:
            raise NotRunning(f"Container {self.id} is not running")


class NewContainer(msgspec.Struct, frozen=True, kw_only=True):
    """A container to create.  ``layers``: lower directories of its file system, top first."""

    name: str
    image: str
    image_id: str
    layers: tuple[str, ...]
    config: ContainerConfig
    labels: Mapping[str, str] = {}
    plain: PlainOptions | None = None
    """A plain container has no sandbox before its start; None: a task's, which has."""
    stack: str = ""


class Stream(Enum):
    """An output stream; the values are those of Docker's framing."""

    STDOUT = 1
    STDERR = 2


class LogEntry(NamedTuple):
    """A piece of a container's output: one line with its newline, or up to 16 KiB of a longer one without."""

    timestamp_ns: int
    stream: Stream
    data: bytes


class LogFilter(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a log.  ``tail`` None: all; ``since_ns``/``until_ns`` 0: no bound (Unix time)."""

    streams: frozenset[Stream] = frozenset(Stream)
    follow: bool = False
    tail: int | None = None
    since_ns: int = 0
    until_ns: int = 0


class ExecConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A further process in a running container (``POST /containers/{id}/exec``)."""

    command: tuple[str, ...]
    env: tuple[str, ...] = ()
    working_dir: str = ""
    user: str = ""
    tty: bool = False
    attach_stdin: bool = False
    attach_stdout: bool = True
    attach_stderr: bool = True
    privileged: bool = False
    detach_keys: str = ""


class Exec(msgspec.Struct, frozen=True, kw_only=True):
    """State of an exec.  ``exit_code`` None: it has not ended."""

    id: str
    container_id: ContainerId
    config: ExecConfig
    running: bool = False
    pid: int = 0
    monitor: ProcessName | None = None
    console_size: tuple[int, int] | None = None
    """Rows and columns of its terminal, as they were last set."""
    exit_code: int | None = None


class ContainerEvent(msgspec.Struct, frozen=True, kw_only=True):
    """Something happened to a container, or to another object of the engine (``docker events``).

    ``action``: create, start, die, oom, kill, stop, pause, unpause, attach, resize, ``exec_create: <command>``,
    ``exec_start: <command>``, exec_die, ``health_status: <status>``, update, destroy.  ``attributes``: Docker's
    (image, name, labels, exitCode, ...).
    """

    action: str
    container_id: ContainerId
    """Of a volume: its name.  Of a network: its id."""
    time_ns: int
    attributes: Mapping[str, str] = {}
    type: str = "container"


class Top(NamedTuple):
    """The processes of a container as ``ps`` prints them."""

    titles: tuple[str, ...]
    processes: tuple[tuple[str, ...], ...]


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """Containers by state, and images, as ``/info`` shows them; probes of health checks since the process began."""

    running: int = 0
    paused: int = 0
    stopped: int = 0
    images: int = 0
    health_checks: int = 0
    failed_health_checks: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(**{name: getattr(self, name) + getattr(other, name) for name in self.__struct_fields__})


class WaitCondition(Enum):
    """What ``docker wait`` waits for."""

    NOT_RUNNING = "not-running"
    NEXT_EXIT = "next-exit"
    REMOVED = "removed"


class NotRunning(AlreadyExists):
    """The operation needs a running container.  The Engine API responds with 409, as where a name is taken."""


class StillRunning(AlreadyExists):
    """The operation needs a container that does not run.  The Engine API responds with 409 here, too."""


class Conflicting(AlreadyExists):
    """The operation contradicts what the container was given before.  The Engine API responds with 409 here, too."""


class BeingRemoved(AlreadyExists):
    """The operation needs a container that stays: what a removal that failed has left may be a part.  409 here, too."""
