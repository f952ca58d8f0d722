"""Records of containers (configuration, state, sandbox), and arguments and results of container operations.

A ``Container`` is one immutable record, appended to ``<data>/containers/<id>/record`` at every change.  The Engine
API's ``docker ps`` and ``docker inspect`` render it.  It contains no secrets, except in environment variables that the
user has set.  Other versions of Skep read the records, so names of serialized fields never change.
"""

from collections.abc import Collection, Mapping
from enum import Enum
from typing import NamedTuple, Self

import msgspec

from skep.engine.confinement.machine import MachineOptions
from skep.errors import AlreadyExists
from skep.model.container import HealthConfig, Mount, Ulimit
from skep.model.networks.sandbox import EndpointConfig, EndpointRequest, NetworkMode, PublishedPort, Sandbox
from skep.model.permissions.rights import ApiAccess
from skep.model.values.ids import ContainerId
from skep.model.values.times import SECOND_NS, ZERO_TIME, Nanoseconds, Timestamp
from skep.model.values.user_map import UserMap


class ContainerState(Enum):
    """The state in a container's record.  ``Container.status`` also depends on other fields."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    EXITED = "exited"
    REMOVING = "removing"


class ProcessName(msgspec.Struct, frozen=True):
    """The identity of a process, which differs from a later process with the same pid."""

    pid: int
    start_ticks: int
    """Start time in clock ticks since boot (field 22 of /proc/PID/stat)."""
    boot_id: str
    """The kernel's boot id, because ticks are comparable only within one boot."""


class Interruption(Enum):
    """A cause outside the container that has ended it, so that its exit code says nothing about its program."""

    MACHINE_RESTARTED = "machine-restarted"
    MONITOR_LOST = "monitor-lost"


class HealthStatus(Enum):
    """``State.Health.Status``, in Docker's values."""

    STARTING = "starting"
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"


class Probe(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    """One run of a health check, as ``docker inspect`` shows it.  ``exit_code`` is -1 if it could not run."""

    start: Timestamp
    end: Timestamp
    exit_code: int
    output: str


class Health(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    """State of a health check, as ``docker inspect`` shows it.  ``log`` has the last probes, oldest first."""

    status: HealthStatus = HealthStatus.STARTING
    failing_streak: int = 0
    log: tuple[Probe, ...] = ()


class MountPoint(msgspec.Struct, frozen=True, kw_only=True):
    """A mount in the container."""

    type: str
    destination: str
    source: str = ""
    """Absolute path on the node.  Empty for tmpfs."""
    name: str = ""
    """Name of the volume, or id of the mounted image."""
    driver: str = ""
    read_only: bool = False
    propagation: str = ""
    options: tuple[str, ...] = ()
    """Mount options as runc takes them."""
    read_only_below: bool | None = None
    """Whether mounts below a read-only mount are read-only too.  None makes them read-only if the node supports it."""
    internal: bool = False
    """Whether the node has added the mount itself (for secrets).  ``docker inspect`` does not show it."""
    anonymous: bool = False
    """Whether the volume was created for this container only, and is removed with it."""
    subpath: str = ""
    """Path inside the volume that is mounted, relative to its root.  Empty for the whole volume."""
    layers: tuple[str, ...] = ()
    """For an image mount, the directories of the image's layers, top first."""


class LogConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Log driver and its options."""

    type: str = "json-file"
    """Log driver.  ``none`` discards the output."""
    options: Mapping[str, str] = {}
    max_size_bytes: int = 0
    """Size at which the file is rotated, or 0 for a single file without a limit."""
    max_files: int = 1
    compress: bool = False
    """Whether to compress rotated files."""
    is_readable: bool = True
    """Whether ``docker logs`` can read the output.  False if the user disabled the cache or nothing is kept."""
    attributes: Mapping[str, str] | None = None
    """Attributes that the log options add to each line.  None if an earlier version of Skep wrote the record."""
    is_restricted: bool = False
    """Whether a user below administrator chose the driver.

    Such a driver must not connect to the cluster's machines.
    """


class ContainerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The requested configuration with the image's defaults merged in.  A limit of 0 means unlimited."""

    path: str
    """The executable.  ``path`` and ``args`` together are entrypoint and command."""
    args: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    """``entrypoint`` and ``command`` are kept separately only for display."""
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
    """Nanoseconds between the stop signal and SIGKILL.  Negative to never kill."""
    stop_timeout: int | None = None
    """The grace period in seconds as the user or the image gave it, for display.  None if unset or for a task."""
    init: bool = False
    read_only: bool = False
    mounts: tuple[MountPoint, ...] = ()
    nano_cpus: int = 0
    """CPU limit in billionths of a processor.  If ``machine`` has a CPU quota, the equivalent of the quota."""
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
    """``default``, ``unconfined``, or a profile loaded in the kernel.  Ignored on nodes without AppArmor."""
    label_options: tuple[str, ...] = ()
    """Values of ``--security-opt label=``."""
    process_label: str = ""
    """SELinux label of its processes.  Empty without SELinux, or without confinement by it."""
    mount_label: str = ""
    """SELinux label of its files.  Empty without SELinux."""
    relabel: Mapping[str, str] = {}
    """For each mount's target, how SELinux labels the source: ``z`` for all containers, ``Z`` for this container."""
    no_new_privileges: bool = False
    oom_score_adj: int = 0
    hosts: tuple[str, ...] = ()
    """Extra lines of /etc/hosts, in a service's format: ``address name...``."""
    nameservers: tuple[str, ...] = ()
    search_domains: tuple[str, ...] = ()
    dns_options: tuple[str, ...] = ()
    ports: tuple[PublishedPort, ...] = ()
    """Host-mode ports to publish on the node."""
    endpoints: tuple[EndpointConfig, ...] = msgspec.field(name="places", default=())
    """Networks in the order of the container's interfaces.

    If empty, the container is only on the node's gateway bridge.
    """
    is_on_host: bool = False
    """Whether it shares the node's network namespace instead of having its own."""
    is_process: bool = False
    """Whether it runs a program of the machine, whose directories it sees, instead of an image's (``machine_files``).
    """
    exposed_ports: tuple[str, ...] = ()
    machine: MachineOptions = MachineOptions()
    """Host resources and namespaces that the user requested."""
    api: ApiAccess = ApiAccess.READ
    """Engine API access if the container mounts the API socket."""
    binds: tuple[str, ...] = ()
    """``HostConfig.Binds`` of the request.  This field and the next two are kept only for ``docker inspect``."""
    requested_mounts: tuple[Mount, ...] | None = None
    """``HostConfig.Mounts`` of the request.  None if an earlier version of Skep created the container."""
    tmpfs: Mapping[str, str] = {}
    """``HostConfig.Tmpfs`` of the request."""
    healthcheck: HealthConfig | None = None
    log: LogConfig = LogConfig()


class RestartPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """The ``--restart`` policy."""

    name: str = "no"
    """``no``, ``always``, ``unless-stopped`` or ``on-failure``."""
    attempts_max: int = 0
    """Retries of ``on-failure``.  0 for unlimited."""


class PlainOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of a plain container, whose user decides when it runs and on which networks."""

    mode: NetworkMode = NetworkMode.BRIDGE
    networks: tuple[EndpointRequest, ...] = ()
    """Networks in the order of the interfaces, for the mode ``NETWORKS``."""
    network_mode: str = "default"
    """The network mode as the user gave it."""
    mac_address: str = ""
    """MAC address on the node's bridge.  Empty for any."""
    restart: RestartPolicy = RestartPolicy()
    auto_remove: bool = False
    restarts: int = 0
    """Restarts by the policy since the user last started the container."""
    is_stopped: bool = False
    """Whether the user stopped it.  The policy then does not restart it."""
    security_options: tuple[str, ...] = ()
    """Security options as the user gave them."""
    volumes_from: tuple[str, ...] = ()
    """``--volumes-from`` values as the user gave them."""
    attached: tuple[str, ...] = ()
    """Streams that the client attached at creation: stdin, stdout, stderr."""
    console_size: tuple[int, int] = (0, 0)
    """Rows and columns of the terminal when the command starts.  0 for the kernel's default."""
    is_step: bool = False
    """Whether a build has created the container.

    The build removes it.  If the build's process has ended, the next process does.
    """

    def wants_restart(self, exit_code: int) -> bool:
        """Return whether the policy restarts the container after a run, or a failed start, that ended with
        ``exit_code``.

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
    """One container.  A time is ``ZERO_TIME`` if its event has not happened yet."""

    id: ContainerId
    name: str
    image: str
    """The image reference as the user gave it."""
    image_id: str
    """``sha256:...`` digest of the image's configuration."""
    config: ContainerConfig
    labels: Mapping[str, str] = {}
    layers: tuple[str, ...] = ()
    """Lower directories of the root file system, top first."""
    runtime: str = "runc"
    """Name of its OCI runtime.  Earlier versions of Skep, which did not record it, had only runc."""
    users: UserMap | None = None
    """Mapping of its users to the machine's, or None if they are the same."""
    created_at: Timestamp = ZERO_TIME
    sandbox: Sandbox | None = msgspec.field(name="endpoint", default=None)
    state: ContainerState = ContainerState.CREATED
    process: ProcessName | None = None
    monitor: ProcessName | None = None
    """The container's conmon process."""
    exit_code: int = 0
    error: str = ""
    """The runtime's message if the container could not start, or a message that its conmon was lost."""
    interruption: Interruption | None = None
    """The cause outside the container that has ended it.  None if it ended by itself or was stopped."""
    oom_killed: bool = False
    health: Health | None = None
    """Health, or None if the container has no health check or never ran."""
    started_at: Timestamp = ZERO_TIME
    finished_at: Timestamp = ZERO_TIME
    plain: PlainOptions | None = None
    """Options of a plain container, or None for a task's container."""
    is_retired: bool = False
    """Whether the container never ran and never will, so that its sandbox was freed."""
    is_unfilled: bool = False
    """Whether its creation has yet to fill its new volumes.  The next node process removes such a container."""
    is_at_rest: bool = False
    """Whether the restart policy ignores that the container has ended, until its next end or the next start of the node
    process.

    Set when the user starts the container or changes the policy.
    """
    warnings: tuple[str, ...] = ()
    """Warnings about parts of the configuration that this node could not provide at the last start."""
    stack: str = ""
    """Stack of the task's service.  It can be trusted, unlike the label, which an image may set."""

    @property
    def mode(self) -> NetworkMode:
        """Network mode.  A task without networks is only on the gateway bridge."""
        if self.plain is not None:
            return self.plain.mode
        if self.config.is_on_host:
            return NetworkMode.HOST
        return NetworkMode.NETWORKS if self.config.endpoints else NetworkMode.BRIDGE

    @property
    def network_mode(self) -> str:
        """Network mode as Docker's API shows it."""
        if self.plain is not None:
            return self.plain.network_mode
        return "host" if self.config.is_on_host else "default"

    @property
    def pid(self) -> int:
        """Pid of the first process on the node, or 0 if it does not run."""
        return self.process.pid if self.process is not None and self.is_running else 0

    @property
    def is_running(self) -> bool:
        """Whether the container has a process.  A paused container has one."""
        return self.state in (ContainerState.RUNNING, ContainerState.PAUSED)

    @property
    def is_restarting(self) -> bool:
        """Whether the container has ended and its policy will restart it, even if the restart monitor has not noticed
        yet.
        """
        if self.plain is None or self.is_at_rest or self.state is not ContainerState.EXITED:
            return False
        return self.plain.wants_restart(self.exit_code)

    @property
    def is_active(self) -> bool:
        """``State.Running`` of ``docker inspect``.

        As in Docker, a restarting container counts as running, so that it is not pruned.

        Source: moby, container/state.go (SetRestarting).
        """
        return self.is_running or self.is_restarting

    @property
    def status(self) -> str:
        """``State.Status``, in Docker's values."""
        return "restarting" if self.is_restarting else self.state.value

    @property
    def was_started(self) -> bool:
        """Whether the container has ever run."""
        return self.started_at != ZERO_TIME

    def require_running(self) -> None:
        """Raise NotRunning unless the container runs."""
        if self.is_restarting:
            raise NotRunning(f"Container {self.id} is restarting, wait until the container is running")
        if not self.is_running:
            raise NotRunning(f"Container {self.id} is not running")


class NewContainer(msgspec.Struct, frozen=True, kw_only=True):
    """A container to create."""

    name: str
    image: str
    image_id: str
    layers: tuple[str, ...]
    """Lower directories of the root file system, top first."""
    config: ContainerConfig
    labels: Mapping[str, str] = {}
    plain: PlainOptions | None = None
    """Options of a plain container, which gets its sandbox at its start.

    None for a task's container, which gets its sandbox at its creation.
    """
    stack: str = ""
    runtime: str = ""
    """Name of the requested OCI runtime.  Empty for the node's default."""


class StandardStream(Enum):
    """An output stream.  The values are the ids in Docker's stream framing."""

    STDOUT = 1
    STDERR = 2


class LogEntry(NamedTuple):
    """A piece of output: a line with its newline, or a piece of up to 16 KiB of a longer line, without a newline."""

    timestamp_ns: int
    stream: StandardStream
    data: bytes


class LogFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Selects a part of a log."""

    streams: frozenset[StandardStream] = frozenset(StandardStream)
    follow: bool = False
    catches_up: bool = False
    """Whether an empty batch marks the current end also without ``follow``, and output since then comes after it."""
    tail: int | None = None
    """Number of last lines, or None for all."""
    since_ns: int = 0
    """Unix time in nanoseconds from which on entries are selected.  0 selects from the start."""
    until_ns: int = 0
    """Unix time in nanoseconds up to which entries are selected.  0 selects up to the end."""


class ExecConfig(msgspec.Struct, frozen=True, kw_only=True):
    """An additional process in a running container (``POST /containers/{id}/exec``)."""

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
    """State of an exec."""

    id: str
    container_id: ContainerId
    config: ExecConfig
    running: bool = False
    pid: int = 0
    monitor: ProcessName | None = None
    console_size: tuple[int, int] | None = None
    """Rows and columns of the terminal, as last set."""
    exit_code: int | None = None
    """Exit code, or None before the exec has ended."""


class ContainerEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An event of a container or of another object of the engine (``docker events``).

    ``action`` is create, start, die, oom, kill, stop, pause, unpause, attach, resize, ``exec_create: <command>``,
    ``exec_start: <command>``, exec_die, ``health_status: <status>``, update or destroy.  ``attributes`` has the
    attributes that Docker sends (image, name, labels, exitCode, ...).
    """

    action: str
    container_id: ContainerId
    """For a volume event the volume's name, for a network event the network's id."""
    time_ns: int
    attributes: Mapping[str, str] = {}
    type: str = "container"


class Top(NamedTuple):
    """A container's processes as ``ps`` prints them."""

    titles: tuple[str, ...]
    processes: tuple[tuple[str, ...], ...]


class EngineCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Numbers of containers by state and of images for ``/info``, and of health probes since the process started."""

    running: int = 0
    paused: int = 0
    stopped: int = 0
    images: int = 0
    health_checks: int = 0
    failed_health_checks: int = 0

    @classmethod
    def of(cls, containers: Collection[Container]) -> Self:
        """Count ``containers`` by state, and their images."""
        states = [one.state for one in containers]
        running, paused = states.count(ContainerState.RUNNING), states.count(ContainerState.PAUSED)
        return cls(
            running=running,
            paused=paused,
            stopped=len(states) - running - paused,
            images=len({one.image_id for one in containers}),
        )

    def __add__(self, other: "EngineCounts") -> "EngineCounts":
        return EngineCounts(
            **{name: getattr(self, name) + getattr(other, name) for name in self.__struct_fields__}
        )


class WaitCondition(Enum):
    """The condition that ``docker wait`` waits for."""

    NOT_RUNNING = "not-running"
    NEXT_EXIT = "next-exit"
    REMOVED = "removed"


class NotRunning(AlreadyExists):
    """The operation needs a running container.  The Engine API responds with 409, as for a taken name."""


class StillRunning(AlreadyExists):
    """The operation needs a container that is not running.  The Engine API responds with 409."""


class Conflicting(AlreadyExists):
    """The operation contradicts the container's configuration.  The Engine API responds with 409."""


class BeingRemoved(AlreadyExists):
    """The container is being removed, or a failed removal left parts of it.  The Engine API responds with 409."""
