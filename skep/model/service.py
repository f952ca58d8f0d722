"""Services: the user's spec for a set of tasks, and its status."""

from collections.abc import Mapping
from enum import Enum
from typing import Annotated, ClassVar, Literal

import msgspec

from skep.model.container import ContainerSpec
from skep.model.encoding import ApiObject, Float32, Uint32, Uint64, always
from skep.model.ids import NetworkId, ServiceId
from skep.model.meta import Driver, Version
from skep.model.times import SECOND_NS, ZERO_TIME, Nanoseconds, Timestamp

ModeName = Literal["replicated", "global", "replicated-job", "global-job"]

REPLICAS_MAX = 100_000
"""Maximum number of tasks of one service."""


class NamedResource(ApiObject):
    __go_name__: ClassVar[str | None] = "swarm.NamedGenericResource"

    kind: str = ""
    value: str = ""


class DiscreteResource(ApiObject):
    __go_name__: ClassVar[str | None] = "swarm.DiscreteGenericResource"

    kind: str = ""
    value: int = 0


class GenericResource(ApiObject):
    """A user-defined resource (``gpu``): one named unit, or a number of equal ones."""

    named_resource_spec: NamedResource | None = None
    discrete_resource_spec: DiscreteResource | None = None


class Limits(ApiObject):
    """Limits of one task.  0: no limit."""

    __go_name__: ClassVar[str | None] = "swarm.Limit"

    nano_cpus: int = msgspec.field(name="NanoCPUs", default=0)
    memory_bytes: int = 0
    pids: int = 0


class Resources(ApiObject):
    """Resources that one task reserves, or that a node has."""

    nano_cpus: int = msgspec.field(name="NanoCPUs", default=0)
    memory_bytes: int = 0
    generic_resources: tuple[GenericResource, ...] = ()


class ResourceRequirements(ApiObject):
    limits: Limits | None = None
    reservations: Resources | None = None


class RestartCondition(Enum):
    __go_name__ = "swarm.RestartPolicyCondition"

    NONE = "none"
    ON_FAILURE = "on-failure"
    ANY = "any"


class RestartPolicy(ApiObject):
    """When an ended task is replaced.  ``None`` means Docker's default (any, 5 s, no maximum, no window)."""

    condition: RestartCondition | None = None
    delay: Nanoseconds | None = None
    max_attempts: Uint64 | None = None
    window: Nanoseconds | None = None


class SpreadOver(ApiObject):
    spread_descriptor: str = always("")


class PlacementPreference(ApiObject):
    spread: SpreadOver | None = always(None)


class Platform(ApiObject):
    architecture: str = ""
    os: str = ""


class Placement(ApiObject):
    """Which nodes may run the tasks, and how to spread them there."""

    constraints: tuple[str, ...] = ()
    preferences: tuple[PlacementPreference, ...] = ()
    max_replicas: Uint64 = 0
    platforms: tuple[Platform, ...] = ()


class NetworkAttachmentConfig(ApiObject):
    """A requested network attachment.  ``target``: network id (``control`` resolves names)."""

    target: str = ""
    aliases: tuple[str, ...] = ()
    driver_opts: Mapping[str, str] = {}


class PluginPrivilege(ApiObject):
    __go_name__: ClassVar[str | None] = "runtime.PluginPrivilege"

    name: str = ""
    description: str = ""
    value: tuple[str, ...] = ()


class PluginSpec(ApiObject):
    __go_name__: ClassVar[str | None] = "runtime.PluginSpec"

    name: str = ""
    remote: str = ""
    privileges: tuple[PluginPrivilege, ...] = ()
    disabled: bool = False
    env: tuple[str, ...] = ()


class NetworkAttachmentSpec(ApiObject):
    """A task that is only the attachment of a plain container to a cluster network."""

    container_id: str = msgspec.field(name="ContainerID", default="")


class TaskSpec(ApiObject):
    """The spec of each task of a service.  A change of ``force_update`` restarts tasks with an unchanged spec."""

    plugin_spec: PluginSpec | None = None
    container_spec: ContainerSpec | None = None
    network_attachment_spec: NetworkAttachmentSpec | None = None
    resources: ResourceRequirements | None = None
    restart_policy: RestartPolicy | None = None
    placement: Placement | None = None
    force_update: Uint64 = always(0)
    runtime: Annotated[str, msgspec.Meta(extra={"go": "swarm.RuntimeType"})] = ""
    networks: tuple[NetworkAttachmentConfig, ...] = ()
    log_driver: Driver | None = None

    @property
    def stop_grace_s(self) -> float:
        """Time between the stop signal and SIGKILL."""
        return (self.container_spec or ContainerSpec()).stop_grace_ns / SECOND_NS


class ReplicatedService(ApiObject):
    replicas: Uint64 | None = None


class GlobalService(ApiObject):
    pass


class ReplicatedJob(ApiObject):
    max_concurrent: Uint64 | None = None
    total_completions: Uint64 | None = None


class GlobalJob(ApiObject):
    pass


class ServiceMode(ApiObject):
    """Exactly one of the four is set; ``name`` gives which (``control`` rejects anything else)."""

    replicated: ReplicatedService | None = None
    global_: GlobalService | None = msgspec.field(name="Global", default=None)
    replicated_job: ReplicatedJob | None = None
    global_job: GlobalJob | None = None

    @property
    def name(self) -> ModeName:
        """The alternative that is set; replicated if none is, as in Docker."""
        if self.global_ is not None:
            return "global"
        if self.replicated_job is not None:
            return "replicated-job"
        if self.global_job is not None:
            return "global-job"
        return "replicated"


class UpdateFailureAction(Enum):
    __go_name__ = "string"

    PAUSE = "pause"
    CONTINUE = "continue"
    ROLLBACK = "rollback"


class UpdateOrder(Enum):
    __go_name__ = "string"

    STOP_FIRST = "stop-first"
    START_FIRST = "start-first"


class UpdateConfig(ApiObject):
    """Settings of a rolling update.  ``parallelism`` 0: all tasks at once."""

    parallelism: Uint64 = always(0)
    delay: Nanoseconds = 0
    failure_action: UpdateFailureAction | None = None
    monitor: Nanoseconds = 0
    max_failure_ratio: Float32 = always(0.0)
    order: UpdateOrder | None = None


class PublishMode(Enum):
    __go_name__ = "swarm.PortConfigPublishMode"

    INGRESS = "ingress"
    HOST = "host"


class PortConfig(ApiObject):
    """A published port of the tasks.  ``published_port`` 0: allocated by the cluster (or node)."""

    name: str = ""
    protocol: Annotated[str, msgspec.Meta(extra={"go": "swarm.PortConfigProtocol"})] = always("tcp")
    target_port: Uint32 = 0
    published_port: Uint32 = 0
    publish_mode: PublishMode = always(PublishMode.INGRESS)


class EndpointSpec(ApiObject):
    """``mode``: vip or dnsrr."""

    mode: Annotated[str, msgspec.Meta(extra={"go": "swarm.ResolutionMode"})] = ""
    ports: tuple[PortConfig, ...] = ()


class ServiceSpec(ApiObject):
    """The user's spec of a service."""

    name: str = ""
    labels: Mapping[str, str] = always({})
    task_template: TaskSpec = always(TaskSpec())
    mode: ServiceMode = always(ServiceMode())
    update_config: UpdateConfig | None = None
    rollback_config: UpdateConfig | None = None
    networks: tuple[NetworkAttachmentConfig, ...] = ()
    endpoint_spec: EndpointSpec | None = None

    @property
    def replicas(self) -> int:
        """Desired number of tasks of a replicated service (1 if unset, as in Docker)."""
        replicated = self.mode.replicated
        if replicated is None or replicated.replicas is None:
            return 1
        return replicated.replicas

    @property
    def publishes_in_ingress(self) -> bool:
        """Whether it has ports that are published on every node."""
        ports = self.endpoint_spec.ports if self.endpoint_spec is not None else ()
        return any(port.publish_mode is PublishMode.INGRESS for port in ports)


class EndpointVirtualIP(ApiObject):
    network_id: NetworkId = NetworkId("")
    addr: str = ""


class Endpoint(ApiObject):
    """The allocated virtual addresses and ports of a service."""

    spec: EndpointSpec = always(EndpointSpec())
    ports: tuple[PortConfig, ...] = ()
    virtual_ips: tuple[EndpointVirtualIP, ...] = ()


class UpdateState(Enum):
    UPDATING = "updating"
    PAUSED = "paused"
    COMPLETED = "completed"
    ROLLBACK_STARTED = "rollback_started"
    ROLLBACK_PAUSED = "rollback_paused"
    ROLLBACK_COMPLETED = "rollback_completed"


UNDER_WAY = (UpdateState.UPDATING, UpdateState.ROLLBACK_STARTED)
"""States in which tasks are being replaced."""


class UpdateStatus(ApiObject):
    state: UpdateState | None = None
    started_at: Timestamp | None = None
    completed_at: Timestamp | None = None
    message: str = ""


class ServiceStatus(ApiObject):
    """Counts for ``service ls``; computed for a response, never stored."""

    running_tasks: int = always(0)
    desired_tasks: int = always(0)
    completed_tasks: int = always(0)


class JobStatus(ApiObject):
    job_iteration: Version = always(Version())
    last_execution: Timestamp | None = None


class Service(ApiObject):
    """A service.

    Writers: API: ``spec``, ``previous_spec``, ``version``, ``spec_version``, ``removed_at``; leader:
    ``update_status``, ``endpoint``, ``job_status``.  ``service_status`` and ``damage`` exist in
    API responses only.
    """

    id: ServiceId
    version: Version = always(Version())
    created_at: Timestamp = always(ZERO_TIME)
    updated_at: Timestamp = always(ZERO_TIME)
    spec: ServiceSpec = always(ServiceSpec())
    previous_spec: ServiceSpec | None = None
    spec_version: Version | None = None
    """Version at which the spec last changed; tasks refer to their spec by it."""
    endpoint: Endpoint = always(Endpoint())
    update_status: UpdateStatus | None = None
    service_status: ServiceStatus | None = None
    damage: str = ""
    """The parts that cannot be read; not in Docker's API."""
    job_status: JobStatus | None = None
    removed_at: Timestamp | None = None
    """Set when the user removed it: hidden from the API, but owner of its tasks until the last one has stopped."""
