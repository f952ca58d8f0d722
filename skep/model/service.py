"""Services: the user's spec for a set of tasks, and its status."""

from collections.abc import Mapping
from enum import Enum
from typing import Annotated, ClassVar, Final, Literal

import msgspec

from skep.model.container import ContainerSpec
from skep.model.measures.queries import MetricQuery
from skep.model.options.labels import is_stopped
from skep.model.values.encoding import ApiObject, Float32, Uint32, Uint64, always
from skep.model.values.ids import NetworkId, ServiceId
from skep.model.values.meta import Driver, Version
from skep.model.values.times import SECOND_NS, ZERO_TIME, Nanoseconds, Timestamp

ModeName = Literal["replicated", "global", "replicated-job", "global-job"]

REPLICAS_MAX = 100_000
"""Maximum number of tasks of one service."""
MAX_ATTEMPTS_MAX: Final = 1000
"""Largest number of restarts of a slot that are counted.  Each attempt leaves a task in the slot's history."""


class NamedResource(ApiObject):
    """One unit of a resource that has a name: ``gpu`` ``UUID1``."""

    __go_name__: ClassVar[str | None] = "swarm.NamedGenericResource"

    kind: str = ""
    value: str = ""


class DiscreteResource(ApiObject):
    """A number of equal units: ``gpu`` 4."""

    __go_name__: ClassVar[str | None] = "swarm.DiscreteGenericResource"

    kind: str = ""
    value: int = 0


class GenericResource(ApiObject):
    """A user-defined resource (``gpu``): one named unit, or a number of equal ones."""

    named_resource_spec: NamedResource | None = None
    discrete_resource_spec: DiscreteResource | None = None


class Limits(ApiObject):
    """Limits of one task.  0 means no limit."""

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
    """Limits hold for a running task; reservations decide where it is placed."""

    limits: Limits | None = None
    reservations: Resources | None = None
    swap_bytes: int | None = None
    """Swap in bytes in addition to the memory limit, or -1 for no limit.  None for as much as the memory limit.

    Nodes and managers of earlier versions ignore this field and the next one."""
    memory_swappiness: int | None = None
    """Swappiness from 0 to 100, or -1 for the kernel's.  None if unset."""


class RestartCondition(Enum):
    """The ends after which a task is replaced."""

    __go_name__ = "swarm.RestartPolicyCondition"

    NONE = "none"
    ON_FAILURE = "on-failure"
    ANY = "any"


class RestartPolicy(ApiObject):
    """Rules for replacing ended tasks.  ``None`` means Docker's default (any, 5 s, no maximum, no window)."""

    condition: RestartCondition | None = None
    delay: Nanoseconds | None = None
    max_attempts: Uint64 | None = None
    window: Nanoseconds | None = None

    @property
    def attempts_limit(self) -> int:
        """Restarts after which a slot is given up, or 0 for no limit.

        More than ``MAX_ATTEMPTS_MAX`` count as no limit.  Otherwise a task that always fails would fill the store with
        its history.
        """
        attempts = self.max_attempts or 0
        return attempts if attempts <= MAX_ATTEMPTS_MAX else 0


class SpreadOver(ApiObject):
    """``spread_descriptor``: the label to spread over, ``node.labels.zone`` or ``engine.labels.zone``."""

    spread_descriptor: str = always("")


class PlacementPreference(ApiObject):
    """One level of the spread; ``spread`` is the only strategy that Docker has."""

    spread: SpreadOver | None = always(None)


class Platform(ApiObject):
    """An operating system and an architecture, spelled as in their source: ``amd64``, or ``x86_64`` from uname."""

    architecture: str = ""
    os: str = ""


class Placement(ApiObject):
    """Rules for the nodes that may run the tasks, and for spreading the tasks over them."""

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
    """A permission that a plugin requests."""

    __go_name__: ClassVar[str | None] = "runtime.PluginPrivilege"

    name: str = ""
    description: str = ""
    value: tuple[str, ...] = ()


class PluginSpec(ApiObject):
    """A plugin in place of a container; ``control`` refuses it."""

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
        """Return the seconds between the stop signal and SIGKILL."""
        return (self.container_spec or ContainerSpec()).stop_grace_ns / SECOND_NS

    @property
    def ends_on_success(self) -> bool:
        """Return whether a task that ends with exit code 0 is not restarted."""
        condition = self.restart_policy.condition if self.restart_policy is not None else None
        return condition in (RestartCondition.NONE, RestartCondition.ON_FAILURE)


class ReplicatedService(ApiObject):
    """A number of equal tasks.  ``replicas`` None means 1."""

    replicas: Uint64 | None = None


class GlobalService(ApiObject):
    """One task on each eligible node."""


class ReplicatedJob(ApiObject):
    """Tasks that run to completion.  ``total_completions`` None means ``max_concurrent``, which is 1 by default."""

    max_concurrent: Uint64 | None = None
    total_completions: Uint64 | None = None


class GlobalJob(ApiObject):
    """One task on each eligible node, which runs to completion."""


class ServiceMode(ApiObject):
    """A service's mode: exactly one of the four is set (``control`` rejects anything else)."""

    replicated: ReplicatedService | None = None
    global_: GlobalService | None = msgspec.field(name="Global", default=None)
    replicated_job: ReplicatedJob | None = None
    global_job: GlobalJob | None = None

    @property
    def name(self) -> ModeName:
        """Return the mode that is set, or ``replicated`` without one, as in Docker."""
        if self.global_ is not None:
            return "global"
        if self.replicated_job is not None:
            return "replicated-job"
        return "global-job" if self.global_job is not None else "replicated"


class UpdateFailureAction(Enum):
    """Action when more than ``max_failure_ratio`` of the new tasks failed."""

    __go_name__ = "string"

    PAUSE = "pause"
    CONTINUE = "continue"
    ROLLBACK = "rollback"


class UpdateOrder(Enum):
    """Whether the old task of a slot is stopped before or after the start of the new one."""

    __go_name__ = "string"

    STOP_FIRST = "stop-first"
    START_FIRST = "start-first"


class UpdateConfig(ApiObject):
    """Settings of a rolling update.  ``parallelism`` 0 means all tasks at once."""

    parallelism: Uint64 = always(0)
    delay: Nanoseconds = 0
    failure_action: UpdateFailureAction | None = None
    monitor: Nanoseconds = 0
    max_failure_ratio: Float32 = always(0.0)
    order: UpdateOrder | None = None

    def __post_init__(self) -> None:
        """Make a whole ratio an integer, because Go writes 0 and not 0.0.  docker 29 prints the JSON as it is."""
        if self.max_failure_ratio in (0, 1):
            msgspec.structs.force_setattr(self, "max_failure_ratio", int(self.max_failure_ratio))


class PublishMode(Enum):
    """Ingress publishes on every node and forwards to any task, host publishes on the task's node only."""

    __go_name__ = "swarm.PortConfigPublishMode"

    INGRESS = "ingress"
    HOST = "host"


class PortConfig(ApiObject):
    """A published port of the tasks.  The cluster (or node) allocates ``published_port`` if it is 0."""

    name: str = ""
    protocol: Annotated[str, msgspec.Meta(extra={"go": "swarm.PortConfigProtocol"})] = always("tcp")
    target_port: Uint32 = 0
    published_port: Uint32 = 0
    publish_mode: PublishMode = always(PublishMode.INGRESS)


class EndpointSpec(ApiObject):
    """Published ports, and the ``mode`` of name resolution: vip or dnsrr."""

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
        """Return the desired number of tasks of a replicated service: 0 if it is stopped, 1 if unset as in Docker."""
        return 0 if is_stopped(self.labels) else self.given_replicas

    @property
    def given_replicas(self) -> int:
        """Return the number of replicas in the spec, which a stopped service keeps."""
        given = self.mode.replicated.replicas if self.mode.replicated is not None else None
        return 1 if given is None else given

    @property
    def publishes_in_ingress(self) -> bool:
        """Return whether it has ports that are published on every node."""
        ports = self.endpoint_spec.ports if self.endpoint_spec is not None else ()
        return any(port.publish_mode is PublishMode.INGRESS for port in ports)


class EndpointVirtualIP(ApiObject):
    """``addr``: ``ip/prefix length``."""

    network_id: NetworkId = NetworkId("")
    addr: str = ""


class Endpoint(ApiObject):
    """The allocated virtual addresses and ports of a service."""

    spec: EndpointSpec = always(EndpointSpec())
    ports: tuple[PortConfig, ...] = ()
    virtual_ips: tuple[EndpointVirtualIP, ...] = ()


class UpdateState(Enum):
    """The states of a rolling update or a rollback, with SwarmKit's names."""

    UPDATING = "updating"
    PAUSED = "paused"
    COMPLETED = "completed"
    ROLLBACK_STARTED = "rollback_started"
    ROLLBACK_PAUSED = "rollback_paused"
    ROLLBACK_COMPLETED = "rollback_completed"


UNDER_WAY = (UpdateState.UPDATING, UpdateState.ROLLBACK_STARTED)
"""States in which tasks are being replaced."""
PAUSED = (UpdateState.PAUSED, UpdateState.ROLLBACK_PAUSED)
"""States in which no further task is replaced until a user resumes the update."""
ENDED = (UpdateState.COMPLETED, UpdateState.ROLLBACK_COMPLETED)
"""States of an update that is over."""


class UpdateSplit(ApiObject):
    """The present step of a staged update (``skep.update``), and the share of new connections for its tasks.

    Attributes:
        percent: Share of new connections for the new tasks, or None to treat all tasks alike.  While few new tasks
            run, it is less than the share of the step.
        versions: Indexes of the spec versions whose tasks are new.
        old: Index of the last spec version that all tasks had, for old tasks that end and for added slots.  None if
            the update has no steps, and only withdraws new tasks.
        withdrawn: Indexes of the spec versions whose staged updates were replaced before their end.
        changes: Number of changes to the spec during the update that left it in progress.  The store drops a status
            that stays the same when the spec changes.
    """

    step: int = always(0)
    percent: int | None = None
    versions: tuple[int, ...] = ()
    changes: int = 0
    old: int | None = None
    withdrawn: tuple[int, ...] = ()


class UpdateStatus(ApiObject):
    """The last rolling update or rollback.  ``completed_at`` is None until it has ended."""

    state: UpdateState | None = None
    started_at: Timestamp | None = None
    completed_at: Timestamp | None = None
    message: str = ""
    tolerated_until: Timestamp | None = None
    """Creation time of the newest task when a user resumed the update.  Tasks up to this time that had ended by then do
    not count as failures.  Not in Docker's API.  Managers of older versions keep the field and ignore it."""
    split: UpdateSplit | None = None
    """Not in Docker's API, as ``tolerated_until``."""

    @property
    def withdrawn(self) -> UpdateSplit | None:
        """The split during a rollback, in which new tasks no longer get connections."""
        if (split := self.split) is None:
            return None
        return UpdateSplit(percent=0, versions=tuple(sorted({*split.versions, *split.withdrawn})))


class HealthState(Enum):
    """Whether a service is in its desired state."""

    HEALTHY = "healthy"
    CONVERGING = "converging"
    """It is not yet in its desired state, and nothing failed."""
    DEGRADED = "degraded"
    """Something failed, no node suits a task, or an update is paused."""


class ServiceHealth(ApiObject):
    """Whether a service is in its desired state, and why not.

    It is computed for a response and never stored.  Every view of the cluster shows it.
    """

    state: HealthState = always(HealthState.HEALTHY)
    reason: str = always("")
    """Does not change between two attempts to start a task.  A healthy service may have one, such as ``stopped``."""
    restart_summary: str = ""
    """Number of failures of a task, and time of the next attempt."""
    since: Timestamp = Timestamp("")
    """Start of the problem, or empty if unknown."""
    weight: int = always(0)
    """Rank of the problem (``CauseKind.weight``).  0 for failures, higher if the problem may resolve by itself."""


class ServiceStatus(ApiObject):
    """Counts for ``service ls``; computed for a response, never stored."""

    running_tasks: int = always(0)
    desired_tasks: int = always(0)
    completed_tasks: int = always(0)
    """Completed tasks of a job's present run.  For other services the slots that are done (``Task.is_done``), where
    Docker has 0."""
    total_tasks: int = 0
    """Number of tasks that the present run of a job has to complete.  Not in Docker's API."""
    health: ServiceHealth | None = None
    """Not in Docker's API, and only in a response to ``health=true``."""


class JobStart(ApiObject):
    """One decision about a scheduled job: a run that was started, or a due time that was skipped."""

    at: Timestamp = always(ZERO_TIME)
    """Time of the decision by the manager's clock."""
    iteration: Version | None = None
    """Iteration of the run, or None if it was skipped."""
    scheduled_at: Timestamp | None = None
    """The due time, or None if a user started the run."""
    missed_since: Timestamp | None = None
    """The first of the due times before ``scheduled_at`` that passed without a decision, as no manager led."""
    skipped: str = ""
    """Reason why the run was skipped, as a sentence."""
    outcome: str = ""
    """Outcome of the run: ``completed``, ``failed`` or ``stopped``, or empty until the next decision."""


STARTS_KEPT = 20
"""Latest decisions kept for a job, so that its part of the store stays below 4 KiB."""


class ScheduleStatus(ApiObject):
    """The status of a job with a schedule (``model.options.schedules``).

    ``settled``: every due time up to this time has been decided once.  Later decisions concern later times only,
    whichever manager leads and whatever its clock shows.
    """

    settled: Timestamp = always(ZERO_TIME)
    starts: tuple[JobStart, ...] = always(())
    """Decisions, oldest first."""


class JobStatus(ApiObject):
    """The status of a job.

    ``job_iteration`` counts the job's runs; tasks of earlier runs are ignored.  ``last_execution`` is None for a
    scheduled job that has not run yet.  The fields after it are not in Docker's API.
    """

    job_iteration: Version = always(Version())
    last_execution: Timestamp | None = None
    schedule: ScheduleStatus | None = None
    """Set for a job with a schedule."""
    spec_version: Version | None = None
    """Version of the present run's spec, or None for the service's present spec.  An update of a scheduled job applies
    from the next run on."""
    updates: int = 0
    """Number of spec updates since the run began.  It changes with each update, so the status is written with
    every new spec."""
    retried_until: Timestamp | None = None
    """Creation time of the newest task when a user requested another attempt.  Tasks up to this time that had failed by
    then do not count."""
    nodes_fixed: bool = False
    """Whether every node of a scheduled global job's present run has its task, so that no other node joins the run."""
    outcome: str = ""
    """Outcome of the present run, or empty until it ends.  A scheduled run of a global job does not start again."""
    settled_iteration: Version | None = None
    """The run of ``nodes_fixed`` and ``outcome``.  A manager of an older version starts a run without renewing them."""

    @property
    def has_fixed_nodes(self) -> bool:
        """Return whether no further node joins the present run."""
        return self.nodes_fixed and self.settled_iteration == self.job_iteration

    @property
    def present_outcome(self) -> str:
        """Return the outcome of the present run, or an empty string."""
        return self.outcome if self.settled_iteration == self.job_iteration else ""

    @property
    def awaits_first_run(self) -> bool:
        """Return whether it is a scheduled job that has not run yet."""
        return self.schedule is not None and self.last_execution is None


class Autoscaled(ApiObject):
    """The last change of a service's number of tasks by autoscaling.  Not in Docker's API."""

    before: int = 0
    after: int = 0
    reason: str = ""
    at: Timestamp = ZERO_TIME


class PastDisconnect(ApiObject):
    """Earlier values of ``skep.on-disconnect`` and its delay, until they were changed.  Not in Docker's API."""

    labels: Mapping[str, str] = {}
    until: Timestamp = ZERO_TIME


class Trusted(ApiObject):
    """Parts of a service's present and previous spec that an administrator wrote, by value."""

    log_drivers: tuple[Driver, ...] = ()
    repositories: tuple[str, ...] = ()  # names of images, without tags and digests
    queries: tuple[MetricQuery, ...] = ()


class SpecAuthor(ApiObject):
    """The author of a spec, and the time of the request.  Both are empty if an earlier version wrote the spec."""

    by: str = ""
    """``USER@NODE``: the user and the node whose API the request used.  ``cluster`` for a rollback after a failure."""
    at: Timestamp = Timestamp("")


class Service(ApiObject):
    """A service.

    The API writes ``spec``, ``author``, ``previous_spec``, ``version``, ``trusted`` and ``removed_at``.  With each new
    spec, the store writes ``spec_version`` and ``past_disconnects``.  The leader writes ``update_status``,
    ``endpoint``, ``job_status`` and ``autoscaled``, and with it the replicas of an autoscaled service.

    ``service_status`` and ``damage`` exist in API responses only.
    """

    id: ServiceId
    version: Version = always(Version())
    created_at: Timestamp = always(ZERO_TIME)
    updated_at: Timestamp = always(ZERO_TIME)
    spec: ServiceSpec = always(ServiceSpec())
    previous_spec: ServiceSpec | None = None
    spec_version: Version | None = None
    """Version at which the spec last changed; tasks refer to their spec by it."""
    past_disconnects: tuple[PastDisconnect, ...] = ()
    """The last few, oldest first, which disconnected nodes may still apply.  Not in API responses."""
    endpoint: Endpoint = always(Endpoint())
    update_status: UpdateStatus | None = None
    service_status: ServiceStatus | None = None
    damage: str = ""
    """The parts that cannot be read; not in Docker's API."""
    job_status: JobStatus | None = None
    autoscaled: Autoscaled | None = None
    autoscaling_problem: str = ""
    """Reason why measures are not known.  Managers of older versions keep both fields and ignore them."""
    trusted: Trusted | None = None
    """None if a version without this field wrote the service.  Not in API responses."""
    author: SpecAuthor | None = None
    """The author of ``spec``.  Managers of older versions keep the field and ignore it.  Not in API responses."""
    removed_at: Timestamp | None = None
    """Set when the user removed it: hidden from the API, but owner of its tasks until the last one has stopped."""

    @property
    def split(self) -> UpdateSplit | None:
        """Return the present step of a staged update, or None."""
        return self.update_status.split if self.update_status is not None else None

    @property
    def old_version(self) -> int | None:
        """Return the index of the spec version that a staged update still creates tasks of, or None."""
        return self.split.old if self.split is not None else None
