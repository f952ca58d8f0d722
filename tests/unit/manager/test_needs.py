"""The needs and holdings of tasks are one list, and every user of the list considers each resource.

A resource is a field of ``Needs``.  A new one fails here until it has a case, and until each user of the list is said
to consider it or not to be concerned.
"""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.cli.apps.rotation import CONFIG, SECRET, unused
from skep.errors import InvalidArgument, SkepError
from skep.manager.control.files import remove_config, remove_secret
from skep.manager.control.jobs import retry_job
from skep.manager.control.networks import remove_network
from skep.manager.nodes.image_directory import needed_images
from skep.manager.orchestrator.reaper.kept_nodes import KeptNodes
from skep.manager.scheduler.explaining.dry_run import DryRun
from skep.manager.scheduler.nodes.accounting import Accounting
from skep.manager.scheduler.nodes.filters import filters_for
from skep.manager.scheduler.nodes.requirements import requirements_of
from skep.model.container import (
    ConfigReference,
    ContainerSpec,
    FileTarget,
    Mount,
    SecretReference,
    VolumeOptions,
)
from skep.model.needs import Holdings, Needs, holds_of, host_ports, may_block, needs_of, references_of
from skep.model.network import Network, NetworkSpec
from skep.model.options.slot_volumes import SLOT_VOLUMES_LABEL
from skep.model.secret import Config, ConfigSpec, Secret, SecretSpec
from skep.model.service import (
    DiscreteResource,
    EndpointSpec,
    GenericResource,
    JobStatus,
    NetworkAttachmentConfig,
    Placement,
    PortConfig,
    PublishMode,
    ReplicatedJob,
    ResourceRequirements,
    Resources,
    Service,
    ServiceMode,
    ServiceSpec,
    TaskSpec,
)
from skep.model.task import Task, TaskState, VolumeAttachment
from skep.model.values.encoding import to_json
from skep.model.values.ids import ConfigId, NetworkId, SecretId, ServiceId, TaskId
from skep.model.values.stacks import STACK_LABEL
from skep.model.values.times import ZERO_TIME
from skep.model.volume import PublishState, PublishStatus, Volume, VolumeScope, VolumeSharing
from skep.stack.planning import superseded
from skep.stack.project import Stack
from skep.store.interface import Object
from skep.store.level import SCHEDULES
from skep.store.state import State
from skep.store.tables import KeyChange
from skep.store.transactions.transaction import LocalTransaction
from tests.support.builders import a_cluster_volume, a_node, a_service, a_service_spec, a_task, with_disks

GPU = GenericResource(discrete_resource_spec=DiscreteResource(kind="gpu", value=1))
NODE = with_disks(a_node("n1", has=Resources(nano_cpus=2, memory_bytes=2, generic_resources=(GPU,))))
SOURCE = "orders"


def a_spec(
    cpus: int = 0, memory: int = 0, gpu: bool = False, port: int = 0, limit: int = 0, mount: str = ""
) -> ServiceSpec:
    """``mount``: r or w, of the cluster volume."""
    reserve = Resources(nano_cpus=cpus, memory_bytes=memory, generic_resources=(GPU,) if gpu else ())
    published = PortConfig(target_port=80, published_port=port, publish_mode=PublishMode.HOST)
    spec = a_service_spec(reserve=reserve, ports=(published,) if port else (), max_replicas=limit)
    mounts = (Mount(type="cluster", source=SOURCE, target="/d", read_only=mount == "r"),) if mount else ()
    container = ContainerSpec(image="app", mounts=mounts)
    return replace(spec, task_template=replace(spec.task_template, container_spec=container))


SPECS = st.builds(
    a_spec,
    cpus=st.integers(0, 2),
    memory=st.integers(0, 2),
    gpu=st.booleans(),
    port=st.sampled_from([0, 80, 81]),
    limit=st.integers(0, 1),
    mount=st.sampled_from(["", "r", "w"]),
)
VOLUMES = st.builds(
    a_cluster_volume,
    st.just(SOURCE),
    scope=st.sampled_from(VolumeScope),
    sharing=st.sampled_from(VolumeSharing),
)


def a_running_task(service: Service, volume: Volume, id: str = "old", node: str = "n1") -> Task:
    """With what the scheduler gave it."""
    needs = needs_of(service.spec)
    attachments = [
        VolumeAttachment(id=volume.id, source=one.source, target=one.target) for one in needs.cluster_volumes
    ]
    return replace(
        a_task(id, node=node, service=service),
        generic_resources=needs.generic,
        volumes=tuple(attachments),
    )


def is_refused(spec: ServiceSpec, accounting: Accounting) -> bool:
    """Whether every node refuses a task of ``spec``."""
    service = a_service(spec=spec, version=2)
    requirements = requirements_of(a_task(service=service), spec)
    copies = accounting.copies(service.id)
    return not any(
        all(one.passes(requirements, account, copies[account.node.id]) for one in filters_for(requirements))
        for account in accounting.accounts.values()
    )


@given(old=SPECS, new=SPECS, volume=VOLUMES)
@example(old=a_spec(mount="w"), new=a_spec(mount="w"), volume=a_cluster_volume(SOURCE))
@example(old=a_spec(), new=a_spec(limit=1), volume=a_cluster_volume(SOURCE))
def test_a_task_whose_end_lets_a_refused_one_in_is_known_to_be_in_its_way(
    old: ServiceSpec, new: ServiceSpec, volume: Volume
) -> None:
    """Every filter that depends on the tasks of a node: an update would wait for its own old task for ever."""
    service = a_service(spec=old)
    task = a_running_task(service, volume)
    if needs_of(old).cluster_volumes:
        entry = PublishStatus(node_id=NODE.id, state=PublishState.PUBLISHED)
        volume = replace(volume, publish_status=(entry,))
    accounting = Accounting()
    accounting.set_node(NODE)
    accounting.update_volume(volume.id, volume)
    held = holds_of(task, host_ports(old))
    accounting.reserve(task.id, task.node_id, held)
    was_refused = is_refused(new, accounting)
    accounting.remove(TaskId("old"))
    if was_refused and not is_refused(new, accounting):
        assert may_block(held, needs_of(new), {volume.id: volume}.get)
    if may_block(held, needs_of(new), {volume.id: volume}.get):
        assert held.is_exclusive or needs_of(new).max_replicas


# -- resources by users ----------------------------------------------------------------------------------------------

RESOURCES = frozenset(field.name for field in msgspec.structs.fields(Needs))
IMAGE = "app"
FILE = FileTarget(name="f")


def with_container(**fields: Any) -> ServiceSpec:
    spec = a_service_spec("db", image=IMAGE)
    return replace(
        spec, task_template=replace(spec.task_template, container_spec=ContainerSpec(image=IMAGE, **fields))
    )


def on_network(id: str) -> ServiceSpec:
    spec, config = with_container(), NetworkAttachmentConfig(target=id)
    return replace(spec, task_template=replace(spec.task_template, networks=(config,)))


CASES: dict[str, ServiceSpec] = {
    "images": with_container(mounts=(Mount(type="image", source="tools:1", target="/t"),)),
    "secrets": with_container(secrets=(SecretReference(secret_id="id1", secret_name="it", file=FILE),)),
    "configs": with_container(configs=(ConfigReference(config_id="id1", config_name="it", file=FILE),)),
    "networks": on_network("id1"),
    "host_ports": a_spec(port=80),
    "nano_cpus": a_spec(cpus=2),
    "memory_bytes": a_spec(memory=2),
    "generic": a_spec(gpu=True),
    "max_replicas": a_spec(limit=1),
    "cluster_volumes": a_spec(mount="w"),
    "local_volumes": with_container(mounts=(Mount(type="volume", source="data", target="/d"),)),
}
"""Specs that need one resource each, beside their image ``app``."""


@pytest.mark.parametrize("resource", sorted(RESOURCES))
def test_every_resource_has_a_case_that_needs_nothing_else(resource: str) -> None:
    needs = needs_of(CASES[resource])
    found = {name for name in RESOURCES if getattr(needs, name)}
    assert found == {"images", resource}


EXISTING = (
    Secret(id=SecretId("id1"), spec=SecretSpec(name="it")),
    Config(id=ConfigId("id1"), spec=ConfigSpec(name="it")),
    Network(id=NetworkId("id1"), spec=NetworkSpec(name="it")),
)


def a_store(*revisions: tuple[Object, ...]) -> LocalTransaction:
    """A transaction on a store to which these objects were written one revision after the other."""
    state = State()
    for number, objects in enumerate((EXISTING, *revisions), 1):
        tx = LocalTransaction(state, 0)
        for one in objects:
            tx.put(one)
        proposal = tx.proposal()
        changes = [KeyChange(key, value, number, number) for key, value in proposal.puts]
        state.apply(number, [*changes, *(KeyChange(key, None, number) for key in proposal.deletes)])
    return LocalTransaction(state, 0)


def a_cluster(spec: ServiceSpec) -> LocalTransaction:
    """A job that runs with ``spec``, while its present and its previous spec need nothing."""
    job = ServiceMode(replicated_job=ReplicatedJob(max_concurrent=1, total_completions=1))
    labels = {"skep.cron": "0 3 * * *", "skep.volume-affinity": "required"}
    past = replace(spec, name="db", mode=job, labels=labels)
    present = replace(with_container(), name="db", mode=job, labels=labels)
    service = Service(id=ServiceId("db"), spec=past, job_status=JobStatus(last_execution=ZERO_TIME))
    before = a_store((service,)).get(Service, "db")
    running = JobStatus(last_execution=ZERO_TIME, spec_version=before.spec_version, updates=1)
    after = replace(before, spec=present, previous_spec=present, job_status=running)
    return a_store((service,), (after,))


def holding(resource: str) -> Holdings:
    spec, volume = CASES[resource], a_cluster_volume(SOURCE)
    return holds_of(a_running_task(a_service(spec=spec), volume), host_ports(spec))


def filters_refuse(resource: str) -> bool:
    volume, accounting = a_cluster_volume(SOURCE), Accounting()
    accounting.set_node(NODE)
    accounting.update_volume(volume.id, volume)
    accounting.reserve(TaskId("old"), NODE.id, holding(resource))
    return is_refused(CASES[resource], accounting)


def update_gives_it_up(resource: str) -> bool:
    volume = a_cluster_volume(SOURCE)
    return may_block(holding(resource), needs_of(CASES[resource]), {volume.id: volume}.get)


def preemption_waits_for_it(resource: str) -> bool:
    return holding(resource).is_exclusive


def dry_run_frees_it(resource: str) -> bool:
    """A service that is replaced stop-first has what its old task had."""
    volume, spec = a_cluster_volume(SOURCE), CASES[resource]
    service = a_service("db", spec=replace(spec, name="db"))
    tx = a_store((NODE, volume, service))
    task = tx.put(a_running_task(tx.get(Service, "db"), volume))
    accounting = Accounting()
    accounting.set_node(NODE)
    accounting.update_volume(volume.id, volume)
    accounting.add(task, host_ports(spec))
    template = spec.task_template
    assert template.container_spec is not None
    container = replace(template.container_spec, image="app:2")
    new = replace(spec, name="db", task_template=replace(template, container_spec=container))
    *_, planned = DryRun(tx, accounting, lambda one: one.spec.name).placing(new)
    assert planned is not None
    return filters_refuse(resource) and not planned.error


def lost_node_is_kept(resource: str) -> bool:
    tx = a_cluster(CASES[resource])
    engine = replace(NODE.description.engine, labels={SLOT_VOLUMES_LABEL: "data=db.1@1700000000000"})
    node = replace(NODE, description=replace(NODE.description, engine=engine))
    if needs_of(CASES[resource]).cluster_volumes:
        tx.put(a_cluster_volume(SOURCE, on={NODE.id: PublishState.PUBLISHED}))
    return bool(KeptNodes(tx).reason(node, 1e9))


def image_is_kept(resource: str) -> bool:
    return bool(needed_images(a_cluster(CASES[resource])) - {IMAGE})


def spec_refers_to_it(resource: str) -> bool:
    return bool(references_of(CASES[resource]))


def run_holds_it(resource: str) -> bool:
    """Nothing but the present run of a job needs it."""
    tx = a_cluster(CASES[resource])
    removals = (
        lambda: remove_secret(tx, SecretId("id1")),
        lambda: remove_config(tx, ConfigId("id1")),
        lambda: remove_network(tx, NetworkId("id1")),
    )
    return any(map(refuses, removals))


def refuses(removal: Callable[[], None]) -> bool:
    try:
        removal()
    except SkepError:
        return True
    return False


def stack_keeps_it(resource: str) -> bool:
    found = {"ID": "id1", "Spec": {"Name": "it", "Labels": {STACK_LABEL: "shop"}}}
    services = [a_service(spec=CASES[resource])]
    return not all(
        superseded(Stack(name="shop"), kind, [found], services) == [found] for kind in ("secret", "config")
    )


def prune_keeps_it(resource: str) -> bool:
    found = {"ID": "id1", "Spec": {"Name": "it"}}
    service = msgspec.json.decode(to_json(a_service(spec=CASES[resource])))
    return not all(unused(kind, [found], [service], all=True) == [found] for kind in (SECRET, CONFIG))


USERS: dict[Callable[[str], bool], set[str]] = {
    filters_refuse: {"host_ports", "nano_cpus", "memory_bytes", "generic", "max_replicas", "cluster_volumes"},
    update_gives_it_up: {
        "host_ports",
        "nano_cpus",
        "memory_bytes",
        "generic",
        "max_replicas",
        "cluster_volumes",
    },
    # A limit of replicas is never in the way of another service's task, so no other victim would help.
    preemption_waits_for_it: {"host_ports", "nano_cpus", "memory_bytes", "generic", "cluster_volumes"},
    dry_run_frees_it: {
        "host_ports",
        "nano_cpus",
        "memory_bytes",
        "generic",
        "max_replicas",
        "cluster_volumes",
    },
    lost_node_is_kept: {"cluster_volumes", "local_volumes"},
    image_is_kept: {"images"},
    spec_refers_to_it: {"secrets", "configs", "networks"},
    run_holds_it: {"secrets", "configs", "networks"},
    stack_keeps_it: {"secrets", "configs"},
    prune_keeps_it: {"secrets", "configs"},
}
"""Who decides by needs and holdings -> the resources that it considers."""

NOT_CONCERNED: dict[Callable[[str], bool], set[str]] = {
    user: {"images", "secrets", "configs", "networks", "local_volumes"}
    for user in (filters_refuse, update_gives_it_up, dry_run_frees_it)
} | {
    preemption_waits_for_it: {"images", "secrets", "configs", "networks", "local_volumes", "max_replicas"},
    # What any node can offer again is not lost with one.
    lost_node_is_kept: RESOURCES - {"cluster_volumes", "local_volumes"},
    image_is_kept: RESOURCES - {"images"},
    # Cluster volumes and images are named, and may be made later; the rest belongs to nodes.
    spec_refers_to_it: RESOURCES - {"secrets", "configs", "networks"},
    run_holds_it: RESOURCES - {"secrets", "configs", "networks"},
    # They remove nothing else.
    stack_keeps_it: RESOURCES - {"secrets", "configs"},
    prune_keeps_it: RESOURCES - {"secrets", "configs"},
}


@pytest.mark.parametrize("user", USERS, ids=lambda user: user.__name__)
def test_every_user_of_the_list_considers_each_resource_or_is_not_concerned(
    user: Callable[[str], bool],
) -> None:
    assert USERS[user] | NOT_CONCERNED[user] == RESOURCES, "a resource is missing in the table"
    assert {resource for resource in RESOURCES if user(resource)} == USERS[user]


@pytest.mark.parametrize(
    ("resource", "remove", "why"),
    [
        ("secrets", lambda tx: remove_secret(tx, SecretId("id1")), "secret not found: it"),
        ("networks", lambda tx: remove_network(tx, NetworkId("id1")), "network id1 not found"),
    ],
)
def test_what_a_run_that_has_failed_refers_to_may_be_removed_and_then_the_run_is_not_retried(
    resource: str, remove: Callable[[LocalTransaction], object], why: str
) -> None:
    tx = a_cluster(CASES[resource])
    tx.raise_level(SCHEDULES)
    job = tx.get(Service, "db")
    assert job.job_status is not None
    failed = replace(
        a_task(service=job, state=TaskState.FAILED),
        job_iteration=job.job_status.job_iteration,
        spec_version=job.job_status.spec_version,
    )
    tx.put(failed)
    remove(tx)
    with pytest.raises(InvalidArgument, match=why):
        retry_job(tx, job.id)


# -- every field of a spec -------------------------------------------------------------------------------------------

FIELDS: dict[type[msgspec.Struct], dict[str, str]] = {
    ServiceSpec: {"task_template": "*", "networks": "networks", "endpoint_spec": "*"},
    TaskSpec: {"container_spec": "*", "resources": "*", "placement": "*", "networks": "networks"},
    ContainerSpec: {"image": "images", "mounts": "*", "secrets": "secrets", "configs": "configs"},
    Mount: {"type": "*", "source": "*", "target": "*", "read_only": "*", "volume_options": "local_volumes"},
    VolumeOptions: {"driver_config": "local_volumes"},
    Placement: {"max_replicas": "max_replicas"},
    ResourceRequirements: {"reservations": "*"},
    Resources: {"nano_cpus": "nano_cpus", "memory_bytes": "memory_bytes", "generic_resources": "generic"},
    EndpointSpec: {"ports": "host_ports"},
    PortConfig: {"protocol": "host_ports", "published_port": "host_ports", "publish_mode": "host_ports"},
    NetworkAttachmentConfig: {"target": "networks"},
}
"""The fields that say what a task needs; ``*``: of several resources."""

SETTINGS: dict[type[msgspec.Struct], str] = {
    ServiceSpec: "name labels mode update_config rollback_config",
    # Plug-ins are refused; the log driver and network drivers are properties of nodes, which filters judge.
    TaskSpec: "plugin_spec network_attachment_spec restart_policy force_update runtime log_driver",
    # Rights and devices (labels) are properties of nodes.  The config of a credential spec is among the configs, too.
    ContainerSpec: "labels command args hostname env dir user groups privileges init stop_signal tty open_stdin "
    "read_only stop_grace_period healthcheck hosts dns_config isolation sysctls capability_add capability_drop "
    "ulimits oom_score_adj",
    Mount: "consistency bind_options image_options tmpfs_options cluster_options",
    VolumeOptions: "no_copy labels subpath",
    Placement: "constraints preferences platforms",
    ResourceRequirements: "limits swap_bytes memory_swappiness",
    Resources: "",
    # Ports on the ingress network belong to the service: the store's claims keep them apart.
    EndpointSpec: "mode",
    PortConfig: "name target_port",
    NetworkAttachmentConfig: "aliases driver_opts",
}
"""The others: settings of the task or its service, and properties of nodes."""


@pytest.mark.parametrize("kind", FIELDS, ids=lambda kind: kind.__name__)
def test_every_field_of_a_spec_is_a_need_or_a_setting(kind: type[msgspec.Struct]) -> None:
    names = {field.name for field in msgspec.structs.fields(kind)}
    assert names == {*FIELDS[kind], *SETTINGS[kind].split()}
    assert set(FIELDS[kind].values()) <= {"*", *RESOURCES}
