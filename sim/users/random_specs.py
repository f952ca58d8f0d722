"""Random specs of services.  ``invalidated`` makes a spec that Docker refuses.

There are few names, labels, zones and ports, so that requests conflict.
"""

from collections.abc import Callable, Mapping, Sequence
from random import Random

import msgspec
from msgspec.structs import replace

from sim.world.images import BROKEN, CRASHING, HOPELESS
from skep.errors import InvalidArgument
from skep.model.container import ContainerSpec, Mount, SecretFileTarget, SecretReference
from skep.model.door.routes import HTTP
from skep.model.measures.queries import (
    AUTOSCALE_PROMETHEUS,
    AUTOSCALE_QUERY,
    AUTOSCALE_QUEUE,
    UPDATE_PROMETHEUS,
    UPDATE_QUERY,
)
from skep.model.options.affinity import (
    AFFINITY,
    AFFINITY_PREFERRED,
    ANTI_AFFINITY,
    ANTI_AFFINITY_PREFERRED,
    MAX_SKEW,
)
from skep.model.options.autoscaling import (
    AUTOSCALE,
    AUTOSCALE_DOWN_AFTER,
    AUTOSCALE_IDLE_AFTER,
    AUTOSCALE_QUERY_TARGET,
    AUTOSCALE_QUEUE_TARGET,
    AUTOSCALE_SCHEDULE,
)
from skep.model.options.dependencies import DEPENDS_ON, DependencyCondition
from skep.model.options.labels import (
    JOB_TTL,
    MIN_AVAILABLE,
    ON_DISCONNECT,
    ON_DISCONNECT_DELAY,
    PRIORITY,
    PROGRESS_DEADLINE,
    VOLUME_AFFINITY,
    VolumeAffinity,
)
from skep.model.options.schedules import CRON, CRON_CONCURRENCY, CRON_DEADLINE, CRON_MAX_ATTEMPTS
from skep.model.permissions.processes import NO_IMAGE, is_process
from skep.model.permissions.rights import EXECUTOR_LABEL, PROCESS
from skep.model.service import (
    DiscreteResource,
    EndpointSpec,
    GenericResource,
    GlobalJob,
    GlobalService,
    NetworkAttachmentConfig,
    Placement,
    PlacementPreference,
    PortConfig,
    PublishMode,
    ReplicatedJob,
    ReplicatedService,
    ResourceRequirements,
    Resources,
    RestartCondition,
    RestartPolicy,
    ServiceMode,
    ServiceSpec,
    SpreadOver,
    TaskSpec,
    UpdateConfig,
    UpdateFailureAction,
    UpdateOrder,
)
from skep.model.staging.updates import (
    BLUE_GREEN,
    CANARY,
    QUERY_MAX,
    UPDATE,
    UPDATE_KEEP,
    UPDATE_STEP_TIME,
    UPDATE_STEPS,
    check_staged_update,
)
from skep.model.values.ids import SecretId
from skep.model.values.stacks import STACK_LABEL
from skep.model.values.times import SECOND_NS

IMAGES = ("app:1", "app:2", "app:3", "app:4", *HOPELESS)
JOB_IMAGES = ("job:1", "job:2", BROKEN, CRASHING)
ENDING_IMAGES = {CRASHING: (0.4, 1), "job:1": (0.5, 0), "job:2": (1.5, 0)}
"""Seconds after which the containers of these images end, and their exit code."""

NAMES = ("web", "api", "db", "WEB")
MORE_NAMES = ("mail", "queue", "cache")
"""Additional names for runs with extensions, which have more services."""
ZONE, ZONES = "zone", ("north", "south")
HOST_PORTS = (8080, 8081)
INGRESS_PORTS = (90, 91, 8081)
FACT = "kernel"
"""The fact that machines report in runs with extensions, with one of ``KERNELS``."""
KERNELS = ("5.10.0-28-amd64", "6.1.0-18-amd64", "6.12.3")
"""Versions.  As texts they would have another order."""
DEVICE, DEVICES = "gpu", ("GPU-0", "GPU-1")
"""Kind and names of the exclusive devices of each machine in runs with extensions."""
MORE_CONSTRAINTS = (
    "node.labels.zone in (north, south)",
    "node.labels.zone not in (north)",
    "node.labels.zone exists",
    "node.labels.zone not exists",
    "node.hostname like w*",
    "node.labels.zone not like n*",
    f"node.facts.{FACT} >= 6.1",
    f"node.facts.{FACT} > 5.10",
    f"node.facts.{FACT} <= 5.10",
    f"node.facts.{FACT} < 6.1.0",
)
"""Constraints that Docker does not have."""
CONSTRAINTS = (
    "node.labels.zone==north",
    "node.labels.zone != north",
    " node.labels.zone == south ",
    "node.hostname!=w1",
    "node.role==worker",
)


OFF = 0.6
"""Probability that a spec lacks an extension that its mode can have, so that many specs combine two or three."""
RARE = 0.2
"""Probability of an extension that limits the nodes.  With more, many services would have no node."""
STAGED = 0.4
"""Probability of a staged update of a replicated service.  Many specs cannot have one."""
MEASURED = 0.5
"""Probability of measures other than CPU for an autoscaled service, and of a query for a canary."""
CONTRARY = 0.3
"""Probability that an affinity may name any service, so that two services' rules may contradict each other."""
PRIORITIES = (-10, 5, 10)
STACKS = ("shop", "blog")
MEMORY_BYTES = 512 << 20
"""Memory reserved by a task that reserves any."""


RESERVES = ("100MiB", "512MiB", "700MiB")
"""Memory that a node keeps for its system, in runs with extensions."""


class Dependencies(msgspec.Struct, frozen=True):
    """Objects that a service can refer to."""

    networks: tuple[str, ...] = ()
    secrets: tuple[str, ...] = ()
    services: tuple[str, ...] = ()
    """Names of services."""
    volumes: tuple[str, ...] = ()
    """Names of cluster volumes."""


def a_spec(
    name: str, random: Random, dependencies: Dependencies, extensions: Random | None = None
) -> ServiceSpec:
    """Return the spec of a random service.

    ``extensions`` draws the features that Docker does not have, or is None for a spec without them.
    """
    spec = _a_plain_spec(name, random, dependencies, MODES if extensions is None else EXTENDED_MODES)
    return spec if extensions is None else extended(spec, extensions, dependencies)


def _a_plain_spec(
    name: str, random: Random, dependencies: Dependencies, weights: Sequence[int]
) -> ServiceSpec:
    mode = a_mode(random, weights)
    is_job = mode.name in ("replicated-job", "global-job")
    memory = random.choice((0, 0, MEMORY_BYTES))
    update = an_update_config(random)
    rollback = UpdateConfig(order=update.order, monitor=SECOND_NS) if random.random() < 0.8 else None
    return ServiceSpec(
        name=name,
        labels=some_labels(random),
        task_template=TaskSpec(
            container_spec=ContainerSpec(
                image=random.choice(JOB_IMAGES[:2]) if is_job else "app:1",
                stop_grace_period=SECOND_NS,
                secrets=some_secrets(random, dependencies.secrets),
            ),
            restart_policy=a_restart_policy(random, is_job=is_job),
            networks=some_networks(random, dependencies.networks),
            resources=ResourceRequirements(reservations=Resources(memory_bytes=memory)) if memory else None,
            placement=a_placement(random),
        ),
        mode=mode,
        update_config=None if is_job else update,
        rollback_config=None if is_job else rollback,
        endpoint_spec=some_ports(random),
    )


MODES, EXTENDED_MODES = (60, 20, 10, 10), (40, 20, 20, 20)
"""Weights of replicated and global services, and of replicated and global jobs."""


def a_mode(random: Random, weights: Sequence[int] = MODES) -> ServiceMode:
    """Return a mode: mostly replicated, sometimes global, sometimes a job."""
    match random.choices(("replicated", "global", "job", "global job"), weights)[0]:
        case "global":
            return ServiceMode(global_=GlobalService())
        case "job":
            job = ReplicatedJob(max_concurrent=random.randint(1, 3), total_completions=random.randint(1, 6))
            return ServiceMode(replicated_job=job)
        case "global job":
            return ServiceMode(global_job=GlobalJob())
        case _:
            return ServiceMode(replicated=ReplicatedService(replicas=random.randint(1, 5)))


def an_update_config(random: Random) -> UpdateConfig:
    """Return a random update config."""
    return UpdateConfig(
        parallelism=random.randint(0, 3),
        delay=random.choice((0, SECOND_NS // 2)),
        monitor=random.choice((SECOND_NS // 2, 2 * SECOND_NS)),
        order=UpdateOrder.START_FIRST if random.random() < 0.4 else UpdateOrder.STOP_FIRST,
        failure_action=random.choice(list(UpdateFailureAction)),
        max_failure_ratio=random.choice((0.0, 0.5)),
    )


def some_labels(random: Random) -> dict[str, str]:
    """Return labels that sometimes set a progress deadline of updates, and a policy for tasks on disconnected
    nodes.
    """
    labels = {PROGRESS_DEADLINE: "1s"} if random.random() < 0.7 else {}
    match random.choices(("", "keep", "replace", "stop"), (60, 10, 10, 20))[0]:
        case "":
            return labels
        case "keep":
            return {**labels, ON_DISCONNECT: "keep"}
        case word:
            delay = random.choice(("1s", "4s"))
            return {**labels, ON_DISCONNECT: word, ON_DISCONNECT_DELAY: delay}


def a_restart_policy(random: Random, *, is_job: bool) -> RestartPolicy:
    """Return a restart policy, mostly without a limit."""
    delay = random.choice((0, SECOND_NS // 2, 2 * SECOND_NS))
    condition = random.choices(
        (RestartCondition.ANY, RestartCondition.ON_FAILURE, RestartCondition.NONE), (90, 7, 3)
    )
    if is_job or random.random() < 0.8:
        return RestartPolicy(delay=delay)
    return RestartPolicy(
        condition=condition[0],
        delay=delay,
        max_attempts=random.randint(0, 3),
        window=random.choice((0, 3 * SECOND_NS, 120 * SECOND_NS)),
    )


def some_secrets(random: Random, known: Sequence[str]) -> tuple[SecretReference, ...]:
    """Return references to known secrets, mostly none."""
    if not known or random.random() < 0.8:
        return ()
    id = random.choice(known)
    return (SecretReference(file=SecretFileTarget(name=id), secret_id=SecretId(id), secret_name=id),)


def some_networks(random: Random, known: Sequence[str]) -> tuple[NetworkAttachmentConfig, ...]:
    """Return attachments to known networks, often one, sometimes two."""
    if not known or random.random() < 0.6:
        return ()
    chosen = random.sample(sorted(known), min(random.choice((1, 1, 2)), len(known)))
    return tuple(NetworkAttachmentConfig(target=id) for id in chosen)


def a_placement(random: Random) -> Placement | None:
    """Return a placement with constraints, or mostly None."""
    constraints = (random.choice(CONSTRAINTS),) if random.random() < 0.2 else ()
    max_replicas = random.randint(1, 2) if random.random() < 0.15 else 0
    spread = PlacementPreference(spread=SpreadOver(spread_descriptor=f"node.labels.{ZONE}"))
    preferences = [spread] if random.random() < 0.1 else []
    if not constraints and not max_replicas and not preferences:
        return None
    return Placement(constraints=constraints, max_replicas=max_replicas, preferences=tuple(preferences))


def some_ports(random: Random) -> EndpointSpec | None:
    """Return one host or ingress port, with a fixed number or without, or mostly None."""
    match random.choices(("none", "host", "ingress", "any"), (70, 15, 10, 5))[0]:
        case "none":
            return None
        case "host":
            number, mode = random.choice(HOST_PORTS), PublishMode.HOST
        case "ingress":
            number, mode = random.choice(INGRESS_PORTS), PublishMode.INGRESS
        case _:
            number, mode = 0, PublishMode.INGRESS
    return EndpointSpec(ports=(PortConfig(target_port=80, published_port=number, publish_mode=mode),))


def extended(spec: ServiceSpec, random: Random, known: Dependencies) -> ServiceSpec:
    """Add the labels and mounts that Docker does not have, each one left out with probability ``OFF``."""
    is_job = spec.mode.name in ("replicated-job", "global-job")
    additions: list[_Addition] = [_a_priority, _a_stack, _a_dependency, _a_local_volume, _a_cluster_volume]
    additions.append(_some_attempts)
    if is_job:
        additions.append(random.choice((_a_schedule, _a_schedule, _a_time_to_live)))
    elif spec.mode.replicated is not None:
        additions += [_a_range, _a_minimum]
    for addition in additions:
        if random.random() >= OFF:
            spec = addition(spec, random, known)
    # Drawn by the spec, so that the other draws of a seed stay the same.
    by_spec = Random(str(spec))
    for addition in (_a_constraint, _an_affinity, _some_devices):
        if by_spec.random() < RARE:
            spec = addition(spec, by_spec, known)
    if spec.mode.name == "replicated" and by_spec.random() < STAGED:
        spec = _a_staged_update(spec, by_spec, known)
    if AUTOSCALE in spec.labels and by_spec.random() < MEASURED:
        spec = _measures(spec, by_spec, known)
    if spec.labels.get(UPDATE) == CANARY and by_spec.random() < MEASURED:
        query = {UPDATE_PROMETHEUS: "http://steady", UPDATE_QUERY: "errors", QUERY_MAX: "100"}
        spec = with_labels(spec, query)
    if AUTOSCALE in spec.labels and by_spec.random() < RARE:
        spec = _from_zero(spec)
    return _a_process(spec) if by_spec.random() < RARE else spec


_Addition = Callable[[ServiceSpec, Random, Dependencies], ServiceSpec]


def _a_process(spec: ServiceSpec) -> ServiceSpec:
    """Return ``spec`` with a program of the node that has the name of its image."""
    container = spec.task_template.container_spec
    assert container is not None, "only specs with a container are random"
    labels = {**container.labels, EXECUTOR_LABEL: PROCESS}
    container = replace(container, image=NO_IMAGE, args=(container.image,), labels=labels)
    return replace(spec, task_template=replace(spec.task_template, container_spec=container))


def _a_minimum(spec: ServiceSpec, random: Random, known: Dependencies) -> ServiceSpec:
    return with_labels(spec, {MIN_AVAILABLE: random.choice(("1", "2", "50%", "80%", "100%"))})


def _a_constraint(spec: ServiceSpec, random: Random, known: Dependencies) -> ServiceSpec:
    placement = spec.task_template.placement or Placement()
    placement = replace(placement, constraints=(*placement.constraints, random.choice(MORE_CONSTRAINTS)))
    return replace(spec, task_template=replace(spec.task_template, placement=placement))


def _some_devices(spec: ServiceSpec, random: Random, known: Dependencies) -> ServiceSpec:
    """Reserve one of the devices of a node, or both."""
    wanted = DiscreteResource(kind=DEVICE, value=random.randint(1, len(DEVICES)))
    resources = spec.task_template.resources or ResourceRequirements()
    reserved = resources.reservations or Resources()
    reserved = replace(reserved, generic_resources=(GenericResource(discrete_resource_spec=wanted),))
    resources = replace(resources, reservations=reserved)
    return replace(spec, task_template=replace(spec.task_template, resources=resources))


def _a_staged_update(spec: ServiceSpec, random: Random, known: Dependencies) -> ServiceSpec:
    """Add a staged update to a spec that may have one."""
    steps = random.choice(({}, {UPDATE_STEPS: "10%,50%"}, {UPDATE_STEPS: "100%"}))
    labels = {UPDATE: CANARY, UPDATE_STEP_TIME: random.choice(("0s", "2s", "5s")), **steps}
    if random.random() < 0.3:
        labels = {UPDATE: BLUE_GREEN, UPDATE_KEEP: random.choice(("0s", "5s"))}
    config = replace(spec.update_config or UpdateConfig(), failure_action=None)
    staged = replace(with_labels(spec, labels), update_config=config)
    try:
        check_staged_update(staged)
    except InvalidArgument:
        return spec
    return staged


def _an_affinity(spec: ServiceSpec, random: Random, known: Dependencies) -> ServiceSpec:
    """Add one rule about a service whose name comes later, or sometimes any, which may have a contrary rule."""
    order = list(dict.fromkeys(name.lower() for name in (*NAMES, *MORE_NAMES)))
    later = order[order.index(spec.name.lower()) + 1 :] if spec.name.lower() in order else []
    if random.random() < CONTRARY:
        later = [name for name in order if name != spec.name.lower()]
    topology = random.choice(("", f"@node.labels.{ZONE}"))
    if not later or random.random() < 0.3:
        is_global = spec.mode.name in ("global", "global-job")
        return (
            spec if is_global else with_labels(spec, {MAX_SKEW: f"{random.randint(1, 2)}@node.labels.{ZONE}"})
        )
    label = random.choice(
        (AFFINITY, ANTI_AFFINITY, ANTI_AFFINITY, AFFINITY_PREFERRED, ANTI_AFFINITY_PREFERRED)
    )
    return with_labels(spec, {label: f"{random.choice(later)}{topology}"})


def _a_priority(spec: ServiceSpec, random: Random, known: Dependencies) -> ServiceSpec:
    return with_labels(spec, {PRIORITY: str(random.choice(PRIORITIES))})


def _a_stack(spec: ServiceSpec, random: Random, known: Dependencies) -> ServiceSpec:
    return with_labels(spec, {STACK_LABEL: random.choice(STACKS)})


def _a_dependency(spec: ServiceSpec, random: Random, known: Dependencies) -> ServiceSpec:
    """Depend on a name that comes later, so that there is no cycle.  It may be written in upper case."""
    order = list(dict.fromkeys(name.lower() for name in (*NAMES, *MORE_NAMES)))
    later = order[order.index(spec.name.lower()) + 1 :] if spec.name.lower() in order else ()
    present = {name.lower() for name in known.services}
    if not (names := [each for name in later if name in present for each in (name, name.upper())]):
        return spec
    condition = random.choice(
        (DependencyCondition.STARTED, DependencyCondition.HEALTHY, DependencyCondition.COMPLETED)
    )
    return with_labels(spec, {DEPENDS_ON: f"{random.choice(names)}={condition.value}"})


def _a_local_volume(spec: ServiceSpec, random: Random, known: Dependencies) -> ServiceSpec:
    mount = Mount(type="volume", source=f"{spec.name}-{{{{.Task.Slot}}}}", target="/local")
    policy = random.choice(list(VolumeAffinity))
    return with_labels(with_mount(spec, mount), {VOLUME_AFFINITY: policy.value})


def _a_cluster_volume(spec: ServiceSpec, random: Random, known: Dependencies) -> ServiceSpec:
    if not known.volumes:
        return spec
    return with_mount(spec, Mount(type="cluster", source=random.choice(known.volumes), target="/shared"))


def _a_schedule(spec: ServiceSpec, random: Random, known: Dependencies) -> ServiceSpec:
    labels = {CRON: f"*/{random.choice((1, 2))} * * * *"}
    if random.random() < 0.3:
        labels[CRON_CONCURRENCY] = "replace"
    if random.random() < 0.5:
        labels[CRON_DEADLINE] = "20s"
    if random.random() < 0.3:
        labels[CRON_MAX_ATTEMPTS] = str(random.randint(1, 2))
    return with_labels(spec, labels)


def _a_time_to_live(spec: ServiceSpec, random: Random, known: Dependencies) -> ServiceSpec:
    return with_labels(spec, {JOB_TTL: random.choice(("2s", "20s"))})


def _a_range(spec: ServiceSpec, random: Random, known: Dependencies) -> ServiceSpec:
    least = random.randint(1, 2)
    return with_labels(spec, {AUTOSCALE: f"{least}..{least + 3}", AUTOSCALE_DOWN_AFTER: "30s"})


def _measures(spec: ServiceSpec, random: Random, known: Dependencies) -> ServiceSpec:
    """Add measures to a range: queries that are answered, or not in each minute, and a schedule."""
    least, most = map(int, spec.labels[AUTOSCALE].split(".."))
    host = random.choice(("steady", "flaky"))
    query = {AUTOSCALE_PROMETHEUS: f"http://{host}", AUTOSCALE_QUERY: "x", AUTOSCALE_QUERY_TARGET: "10"}
    queue = {AUTOSCALE_QUEUE: f"http://{host}", AUTOSCALE_QUEUE_TARGET: "20"}
    schedule = {AUTOSCALE_SCHEDULE: f"*/2 * * * * {least + 1}..{most}; 1-59/2 * * * * {least}..{most - 1}"}
    return with_labels(spec, random.choice((query, queue, schedule, query | queue | schedule)))


def _from_zero(spec: ServiceSpec) -> ServiceSpec:
    """Let the range start at 0, with a route to a host of its own."""
    most = spec.labels[AUTOSCALE].partition("..")[2]
    labels = {AUTOSCALE: f"0..{most}", AUTOSCALE_IDLE_AFTER: "15s", HTTP: f"{spec.name}.example"}
    return with_labels(spec, labels)


def _some_attempts(spec: ServiceSpec, random: Random, known: Dependencies) -> ServiceSpec:
    """Limit the attempts to so few that a few moves of a task would use them up if they counted."""
    policy = RestartPolicy(
        condition=random.choice((RestartCondition.ANY, RestartCondition.ON_FAILURE)),
        delay=SECOND_NS // 2,
        max_attempts=random.randint(1, 3),
    )
    return replace(spec, task_template=replace(spec.task_template, restart_policy=policy))


def with_labels(spec: ServiceSpec, labels: Mapping[str, str]) -> ServiceSpec:
    """Return ``spec`` with ``labels`` added to its own."""
    return replace(spec, labels={**spec.labels, **labels})


def with_image(spec: ServiceSpec, image: str) -> ServiceSpec:
    """Return ``spec`` with another image, or with another program for a process."""
    container = spec.task_template.container_spec
    assert container is not None, "only specs with a container are random"
    container = replace(container, **{"args": (image,)} if is_process(container) else {"image": image})
    return replace(spec, task_template=replace(spec.task_template, container_spec=container))


def with_mount(spec: ServiceSpec, mount: Mount) -> ServiceSpec:
    """Return ``spec`` with ``mount`` added to its own."""
    container = spec.task_template.container_spec
    assert container is not None, "only specs with a container are random"
    container = replace(container, mounts=(*container.mounts, mount))
    return replace(spec, task_template=replace(spec.task_template, container_spec=container))


def invalidated(spec: ServiceSpec, random: Random) -> ServiceSpec:
    """Return ``spec`` with one change that makes Docker refuse it."""
    return random.choice(_INVALID)(spec)


def placed_by(constraint: str) -> Callable[[ServiceSpec], ServiceSpec]:
    def placed(spec: ServiceSpec) -> ServiceSpec:
        placement = Placement(constraints=(constraint,))
        return replace(spec, task_template=replace(spec.task_template, placement=placement))

    return placed


def misnamed(spec: ServiceSpec) -> ServiceSpec:
    return replace(spec, name=f"-{spec.name}")


def without_image(spec: ServiceSpec) -> ServiceSpec:
    return replace(spec, task_template=replace(spec.task_template, container_spec=ContainerSpec()))


def with_too_little_memory(spec: ServiceSpec) -> ServiceSpec:
    few = ResourceRequirements(reservations=Resources(memory_bytes=1024))
    return replace(spec, task_template=replace(spec.task_template, resources=few))


def with_negative_delay(spec: ServiceSpec) -> ServiceSpec:
    policy = RestartPolicy(delay=-SECOND_NS)
    return replace(spec, task_template=replace(spec.task_template, restart_policy=policy))


def with_ratio_over_one(spec: ServiceSpec) -> ServiceSpec:
    """Exceed a ratio.  A job is refused for any update config."""
    return replace(spec, update_config=UpdateConfig(max_failure_ratio=1.5))


def twice_published(spec: ServiceSpec) -> ServiceSpec:
    port = PortConfig(target_port=80, published_port=8080, publish_mode=PublishMode.HOST)
    return replace(spec, endpoint_spec=EndpointSpec(ports=(port, replace(port, target_port=81))))


def _unknown_disconnect_policy(spec: ServiceSpec) -> ServiceSpec:
    return replace(spec, labels={**spec.labels, ON_DISCONNECT: "perhaps"})


_INVALID = (
    placed_by("node.labels.zone=north"),
    placed_by("node role==worker"),
    placed_by("node.role==~"),
    *(
        misnamed,
        without_image,
        with_too_little_memory,
        with_negative_delay,
        with_ratio_over_one,
        twice_published,
    ),
    _unknown_disconnect_policy,
)
