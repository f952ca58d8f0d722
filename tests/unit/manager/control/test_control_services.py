"""Operations on services, on a store in memory."""

from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.api.formats.service_form import settled
from skep.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfSequence,
    PermissionDenied,
    SkepError,
    Unavailable,
    Unimplemented,
)
from skep.manager.control.networks import first_networks, ingress_network, remove_network
from skep.manager.control.services import create_service, remove_service, rollback_service, update_service
from skep.manager.orchestrator.changes import ROLLED_BACK, RollBack, apply
from skep.model.container import ContainerSpec, Mount
from skep.model.options.dependencies import DEPENDS_ON
from skep.model.options.schedules import CRON
from skep.model.permissions.registry_auth import decoded_auth
from skep.model.service import (
    EndpointSpec,
    GlobalService,
    PortConfig,
    ReplicatedJob,
    ReplicatedService,
    Service,
    ServiceMode,
    ServiceSpec,
    UpdateConfig,
    UpdateOrder,
    UpdateState,
)
from skep.model.staging.updates import CANARY, UPDATE
from skep.model.swarm import Swarm
from skep.model.values.ids import ClusterId, new_id
from skep.model.values.times import Timestamp
from skep.model.volume import VolumeSharing
from skep.store.kinds import Payload, spec_history_id
from skep.store.level import LEVEL
from skep.store.memory import MemoryStore
from tests.support.builders import a_cluster_volume, a_service_spec, an_auth

NO_NAMES: Iterator[str] = iter(())
NOW = Timestamp("2026-01-02T03:04:05Z")


@pytest.fixture
async def store():
    store = MemoryStore(SystemClock())

    def networks(tx):
        for network in first_networks(new_id=new_id, now=NOW):
            tx.put(network)

    await store.update(networks)
    return store


async def create(store, spec: ServiceSpec, auth: str = "", names: Iterator[str] = NO_NAMES) -> Service:
    return await store.update(
        create_service, settled(spec), new_id=new_id, new_name=names.__next__, now=NOW, registry_auth=auth
    )


async def update(store, service: Service, spec: ServiceSpec, **options) -> Service:
    return await store.update(
        update_service, service.id, settled(spec), service.version.index, now=NOW, **options
    )


async def rollback(store, service: Service, spec: ServiceSpec) -> Service:
    return await store.update(rollback_service, service.id, settled(spec), service.version.index, now=NOW)


def payloads(store) -> dict[str, bytes]:
    return {payload.id: payload.data for payload in store.view().find(Payload)}


async def test_a_service_without_a_name_gets_a_readable_one_that_is_free(store):
    await create(store, a_service_spec("quiet_fern"))
    names = iter(("quiet_fern", "bold_oak"))
    assert (await create(store, a_service_spec(""), names=names)).spec.name == "bold_oak"


async def test_a_name_can_be_had_once(store):
    await create(store, a_service_spec("web"))
    with pytest.raises(AlreadyExists, match="service web already exists"):
        await create(store, a_service_spec("web"))


async def test_a_removed_service_frees_its_name_and_ports_at_once(store):
    ports = (PortConfig(target_port=80, published_port=8080),)
    old = await create(store, a_service_spec("web", ports=ports))
    await store.update(remove_service, old.id, now=NOW)
    new = await create(store, a_service_spec("web", ports=ports))
    assert store.view().resolve(Service, "web") == new
    assert store.view().get(Service, old.id).removed_at == NOW


async def test_a_removal_that_names_a_version_removes_that_version_only(store):
    service = await create(store, a_service_spec("web"))
    with pytest.raises(OutOfSequence):
        await store.update(remove_service, service.id, now=NOW, version=service.version.index + 1)
    assert store.view().get(Service, service.id).removed_at is None
    await store.update(remove_service, service.id, now=NOW, version=service.version.index)
    assert store.view().get(Service, service.id).removed_at == NOW


async def test_a_removed_service_cannot_be_changed(store):
    service = await create(store, a_service_spec())
    await store.update(remove_service, service.id, now=NOW)
    with pytest.raises(NotFound):
        await update(store, service, a_service_spec())
    with pytest.raises(NotFound):
        await store.update(remove_service, service.id, now=NOW)


async def test_an_update_keeps_the_spec_before_it(store):
    service = await create(store, a_service_spec(image="busybox:1"))
    updated = await update(store, service, a_service_spec(image="busybox:2"))
    assert updated.previous_spec == service.spec
    assert updated.version.index > service.version.index


async def test_an_update_of_an_older_version_is_refused(store):
    service = await create(store, a_service_spec())
    await update(store, service, a_service_spec(replicas=2))
    with pytest.raises(OutOfSequence, match="update out of sequence"):
        await update(store, service, a_service_spec(replicas=3))
    assert store.view().get(Service, service.id).spec.replicas == 2


async def test_a_rollback_swaps_the_two_specs(store):
    first = await create(store, a_service_spec(image="busybox:1"))
    second = await update(store, first, a_service_spec(image="busybox:2"))
    third = await store.update(rollback_service, first.id, second.spec, second.version.index, now=NOW)
    assert (third.spec, third.previous_spec) == (first.spec, second.spec)
    assert third.update_status.state is UpdateState.ROLLBACK_STARTED


async def test_there_is_nothing_to_roll_a_new_service_back_to(store):
    service = await create(store, a_service_spec())
    with pytest.raises(FailedPrecondition, match="does not have a previous spec"):
        await store.update(rollback_service, service.id, service.spec, service.version.index, now=NOW)


async def test_mode_and_name_stay(store):
    service = await create(store, a_service_spec("web"))
    with pytest.raises(Unimplemented, match="renaming"):
        await update(store, service, a_service_spec("other"))
    with pytest.raises(Unimplemented, match="mode change"):
        await update(store, service, a_service_spec("web", is_global=True))


async def test_an_update_of_a_job_runs_it_again(store):
    spec = ServiceSpec(
        name="job",
        mode=ServiceMode(replicated_job=ReplicatedJob(max_concurrent=1)),
        task_template=a_service_spec().task_template,
    )
    job = await create(store, spec)
    assert job.job_status.job_iteration.index == 0
    assert (await update(store, job, spec)).job_status.job_iteration.index == 1


async def test_a_rollback_of_a_job_starts_a_run_and_has_no_state_that_would_never_end(store):
    mode = ServiceMode(replicated_job=ReplicatedJob(max_concurrent=1))
    spec = replace(a_service_spec("job"), mode=mode)
    job = await create(store, spec)
    other = replace(spec, task_template=a_service_spec(image="busybox:2").task_template)
    job = await update(store, job, other)
    job = await rollback(store, job, other)
    assert (job.update_status.state, job.job_status.job_iteration.index) == (
        UpdateState.ROLLBACK_COMPLETED,
        2,
    )


async def test_a_rollback_of_a_job_with_a_schedule_starts_no_run(store):
    """Only a forced update and ``skep job run`` do, and a run would end the present one."""
    await store.update(lambda tx: tx.raise_level(LEVEL))
    mode = ServiceMode(replicated_job=ReplicatedJob(max_concurrent=1, total_completions=1))
    spec = replace(a_service_spec("job"), mode=mode, labels={CRON: "@daily"})
    job = await create(store, spec)
    forced = replace(spec, task_template=replace(spec.task_template, force_update=1))
    job = await update(store, job, forced)
    assert len(job.job_status.schedule.starts) == 1
    for _ in range(2):
        job = await rollback(store, job, forced)
        assert len(job.job_status.schedule.starts) == 1


async def test_a_job_whose_run_cannot_be_read_is_not_changed(store):
    """Without the number of its next run it would be no job any more, for no manager."""
    mode = ServiceMode(replicated_job=ReplicatedJob(max_concurrent=1))
    spec = replace(a_service_spec("job"), mode=mode)
    job = await update(store, await create(store, spec), spec)
    other = replace(a_service_spec("other"), mode=mode, labels={DEPENDS_ON: "web=service_started+restart"})
    web, dependent = await create(store, a_service_spec("web")), await create(store, other)
    for id in (job.id, dependent.id):
        store.view().damaged(Service)[id] = {"job": "rotten"}
    for changing in (
        update(store, job, spec),
        rollback(store, job, spec),
        update(store, web, a_service_spec("web", image="busybox:2")),
    ):
        with pytest.raises(Unavailable, match="this manager cannot read the current run of job"):
            await changing
    assert [store.view().get(Service, one.id) for one in (job, web, dependent)] == [job, web, dependent]


async def test_credentials_are_kept_apart_and_never_in_the_service(store):
    service = await create(store, a_service_spec(), auth="c2VjcmV0")
    assert payloads(store) == {f"registry/{service.id}": b"c2VjcmV0"}
    assert "c2VjcmV0" not in repr(service)


async def test_an_update_without_credentials_keeps_the_ones_before(store):
    service = await create(store, a_service_spec(), auth="one")
    service = await update(store, service, a_service_spec(image="busybox:2"))
    assert payloads(store)[f"registry/{service.id}"] == b"one"


async def test_an_update_can_take_the_credentials_of_the_previous_spec(store):
    service = await create(store, a_service_spec(), auth="one")
    service = await update(store, service, a_service_spec(image="busybox:2"), registry_auth="two")
    service = await update(
        store, service, a_service_spec(image="busybox:3"), registry_auth_from="previous-spec"
    )
    assert payloads(store)[f"registry/{service.id}"] == b"one"


def credentials(store, id, kind="registry"):
    """User and registry of the credentials that are kept."""
    known = decoded_auth(payloads(store)[f"{kind}/{id}"].decode())
    return known["username"], known["serveraddress"]


@pytest.mark.parametrize(
    ("image", "given", "address"),
    [
        ("corp.example/shop:1", "", "corp.example"),
        ("corp.example:5000/shop:1", "https://corp.example:5000/v2/", "https://corp.example:5000/v2/"),
        ("shop:1", "", "https://index.docker.io/v1/"),
        ("team/shop:1", "docker.io", "docker.io"),
    ],
)
async def test_credentials_are_kept_with_their_registry(store, image, given, address):
    service = await create(store, a_service_spec(image=image), auth=an_auth(address=given))
    assert credentials(store, service.id) == ("corp", address)


@pytest.mark.parametrize("address", ["", "corp.example", "https://corp.example/v1/"])
@pytest.mark.parametrize("image", ["evil.example/x", "localhost:5000/x", "shop:1", "corp.example:444/shop"])
async def test_an_update_to_another_registry_drops_the_credentials(store, image, address):
    spec = a_service_spec(image="corp.example/shop:1")
    service = await create(store, spec, auth=an_auth(address=address))
    service = await update(store, service, a_service_spec(image=image))
    assert f"registry/{service.id}" not in payloads(store)
    service = await update(store, service, spec, registry_auth_from="previous-spec")
    assert credentials(store, service.id)[0] == "corp"


async def test_credentials_that_an_older_manager_kept_are_those_of_the_image_then(store):
    service = await create(store, a_service_spec(image="corp.example/shop:1"))

    def keep(tx):
        tx.put(Payload(id=f"registry/{service.id}", data=an_auth().encode()))

    await store.update(keep)
    service = await update(store, service, a_service_spec(image="evil.example/shop:1"))
    assert payloads(store).keys() == {f"registry-previous/{service.id}", spec_history_id(service.id)}
    assert credentials(store, service.id, "registry-previous") == ("corp", "corp.example")


async def test_a_chain_of_updates_leads_no_credentials_to_another_registry(store):
    """Neither do rollbacks, nor the previous spec as their source."""
    service = await create(store, a_service_spec(image="corp.example/shop:1"), auth=an_auth())
    evil = a_service_spec(image="evil.example/x")
    service = await update(store, service, evil)
    service = await update(store, service, evil, registry_auth_from="previous-spec")
    assert f"registry/{service.id}" not in payloads(store)
    service = await rollback(store, service, evil)
    assert f"registry/{service.id}" not in payloads(store)


async def test_an_update_that_replaces_a_canary_keeps_the_credentials_of_the_spec_before_it(store):
    """Its old tasks still run, and a rollback leads to them."""

    def canary(image):
        return replace(a_service_spec(image=image), labels={UPDATE: CANARY})

    service = await create(store, canary("corp.example/shop:1"), auth=an_auth())
    auth = an_auth(address="other.example")
    service = await update(store, service, canary("other.example/shop:2"), registry_auth=auth)
    service = await update(store, service, canary("other.example/shop:3"))
    assert credentials(store, service.id)[1] == "other.example"
    assert credentials(store, service.id, "registry-previous")[1] == "corp.example"
    service = await rollback(store, service, service.spec)
    assert credentials(store, service.id)[1] == "corp.example"


async def test_a_removal_forgets_the_credentials(store):
    service = await create(store, a_service_spec(), auth="one")
    await update(store, service, a_service_spec(image="busybox:2"), registry_auth="two")
    await store.update(remove_service, service.id, now=NOW)
    assert payloads(store) == {}


async def test_too_many_replicas_are_refused(store):
    with pytest.raises(InvalidArgument, match="at most 100000"):
        await create(store, a_service_spec(replicas=100_001))


async def test_ingress_ports_need_the_ingress_network():
    bare = MemoryStore(SystemClock())
    with pytest.raises(FailedPrecondition, match="no ingress network is present"):
        await create(bare, a_service_spec(ports=(PortConfig(target_port=80),)))


async def test_a_rollback_to_ingress_ports_needs_the_ingress_network(store):
    service = await create(store, a_service_spec("web", ports=(PortConfig(target_port=80),)))
    updated = await update(store, service, a_service_spec("web"))
    await store.update(remove_network, ingress_network(store.view()).id)
    with pytest.raises(FailedPrecondition, match="no ingress network is present"):
        await rollback(store, updated, a_service_spec("web"))
    assert store.view().get(Service, service.id) == updated


def test_a_settled_spec_settles_no_further():
    spec = settled(
        ServiceSpec(
            mode=ServiceMode(global_=GlobalService()),
            endpoint_spec=EndpointSpec(ports=(PortConfig(protocol="UDP"),)),
            task_template=a_service_spec().task_template,
        )
    )
    assert settled(spec) == spec
    assert spec.endpoint_spec.mode == "vip"
    assert spec.endpoint_spec.ports[0].protocol == "udp"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (a_service_spec(replicas=10**9), "at most 100000 tasks"),
        (a_service_spec(constraints=("node.role",)), "constraint expected one operator"),
        (
            a_service_spec(ports=(PortConfig(target_port=80, published_port=8080),)),
            "port '8080' is already in use",
        ),
    ],
)
async def test_of_what_is_refused_nothing_stays(store, spec, message):
    """Neither its name nor its port is taken, and an update leaves the service as it was."""
    first = await create(
        store, a_service_spec("first", ports=(PortConfig(target_port=80, published_port=8080),))
    )
    other = await create(store, a_service_spec("other"))
    before = store.view().find(Service)
    with pytest.raises(SkepError, match=message):
        await create(store, replace(spec, name="new"))
    with pytest.raises(SkepError, match=message):
        await update(store, other, replace(spec, name="other"))
    assert store.view().find(Service) == before
    await create(store, a_service_spec("new"))
    assert store.view().get(Service, first.id) == first


def with_labels(spec: ServiceSpec, **labels: str) -> ServiceSpec:
    container = replace(spec.task_template.container_spec, labels=labels)
    return replace(spec, task_template=replace(spec.task_template, container_spec=container))


async def allow(store, rights: str) -> None:
    def write(tx) -> None:
        swarm = next(iter(tx.find(Swarm)), Swarm(id=ClusterId("c"), created_at=NOW))
        tx.put(replace(swarm, spec=replace(swarm.spec, labels={"skep.allow": rights})))

    await store.update(write)


async def test_a_service_gets_no_right_over_its_nodes_that_the_cluster_does_not_allow(store):
    plain = a_service_spec("web")
    privileged = with_labels(plain, **{"skep.privileged": "true", "skep.shm-size": "1g"})
    words = "this cluster does not allow services to use: privileged"
    await allow(store, "resources")
    with pytest.raises(PermissionDenied, match=words):
        await create(store, privileged)
    await allow(store, "privileged")
    with pytest.raises(PermissionDenied, match=r"use: resources \(requested by skep.shm-size; see"):
        await create(store, privileged)
    await allow(store, "resources,privileged")
    service = await create(store, privileged)
    service = await update(store, service, plain)
    await allow(store, "resources")
    with pytest.raises(PermissionDenied, match=words):
        await update(store, service, privileged)
    with pytest.raises(PermissionDenied, match=words):
        await rollback(store, service, plain)
    with pytest.raises(PermissionDenied, match=words):
        await store.update(apply, RollBack(service, ROLLED_BACK), new_id, NOW)
    assert store.view().get(Service, service.id).spec == settled(plain)
    await allow(store, "all")
    assert (await rollback(store, service, plain)).spec == settled(privileged)


async def test_a_canary_returns_to_its_old_tasks_when_the_cluster_allows_less(store):
    """They still run, so no task gets a right that it did not have."""
    await allow(store, "all")
    privileged = with_labels(a_service_spec("web"), **{"skep.privileged": "true"})
    old, new = (replace(one, labels={UPDATE: CANARY}) for one in (privileged, a_service_spec("web")))
    service = await update(store, await create(store, old), new)
    await allow(store, "none")
    assert (await rollback(store, service, new)).spec == settled(old)


async def test_what_leaves_the_tasks_as_they_are_is_not_refused_when_the_cluster_allows_less(store):
    await allow(store, "all")
    service = await create(store, with_labels(a_service_spec("web"), **{"skep.devices": "/dev/ttyUSB0"}))
    await allow(store, "none")
    present = service.spec
    more = replace(present, mode=ServiceMode(replicated=ReplicatedService(replicas=7)))
    service = await update(store, service, more)
    assert service.spec.replicas == 7
    service = await rollback(store, service, service.spec)
    assert service.spec == present
    words = "this cluster does not allow services to use: devices"
    container = present.task_template.container_spec
    for changed in (
        with_labels(present, **{"skep.devices": "/dev/sda"}),
        replace(
            present,
            task_template=replace(present.task_template, container_spec=replace(container, image="other")),
        ),
    ):
        with pytest.raises(PermissionDenied, match=words):
            await update(store, service, changed)


async def test_a_right_that_cannot_be_read_or_is_the_services_own_label_is_refused(store):
    with pytest.raises(InvalidArgument, match=r"invalid label skep\.gpus=many"):
        await create(store, with_labels(a_service_spec("web"), **{"skep.gpus": "many"}))
    for label in ({"skep.gpus": "all"}, {"skep.executor": "process"}):
        with pytest.raises(InvalidArgument, match="works on containers only"):
            await create(store, replace(a_service_spec("web"), labels=label))


def mounting(order: UpdateOrder, *, read_only: bool = False, is_rollback: bool = False) -> ServiceSpec:
    config = UpdateConfig(order=order)
    spec = a_service_spec("db", **{"rollback" if is_rollback else "update": config})
    mount = Mount(type="cluster", source="orders", target="/d", read_only=read_only)
    container = ContainerSpec(image="db:1", mounts=(mount,))
    return replace(spec, task_template=replace(spec.task_template, container_spec=container))


@pytest.mark.parametrize("is_rollback", [False, True])
@pytest.mark.parametrize(
    ("sharing", "read_only", "is_refused"),
    [
        (VolumeSharing.NONE, False, True),
        (VolumeSharing.NONE, True, True),
        (VolumeSharing.ONE_WRITER, False, True),
        (VolumeSharing.ONE_WRITER, True, False),
        (VolumeSharing.ALL, False, False),
    ],
)
async def test_start_first_is_refused_with_a_volume_that_two_tasks_cannot_have(
    store, sharing: VolumeSharing, read_only: bool, is_refused: bool, is_rollback: bool
):
    """Such an update would never end: the old task stops when the new one runs, which waits for the volume."""
    await store.update(lambda tx: tx.put(a_cluster_volume("orders", sharing=sharing)))
    stop_first = mounting(UpdateOrder.STOP_FIRST, read_only=read_only, is_rollback=is_rollback)
    start_first = mounting(UpdateOrder.START_FIRST, read_only=read_only, is_rollback=is_rollback)
    service = await create(store, stop_first)
    if not is_refused:
        await update(store, service, start_first)
        return
    with pytest.raises(InvalidArgument, match="cluster volume orders has sharing mode"):
        await update(store, service, start_first)
    with pytest.raises(InvalidArgument, match="use stop-first"):
        await create(store, replace(start_first, name="other"))


async def test_a_staged_update_is_refused_with_a_volume_that_old_and_new_tasks_cannot_have(store):
    """They only read it, so its data would not forbid that both run."""
    await store.update(lambda tx: tx.put(a_cluster_volume("orders", sharing=VolumeSharing.NONE)))
    service = await create(store, mounting(UpdateOrder.STOP_FIRST, read_only=True))
    staged = replace(service.spec, labels={UPDATE: CANARY})
    with pytest.raises(InvalidArgument, match=r"cannot start while .* remove the label skep\.update$"):
        await update(store, service, staged)
    with pytest.raises(InvalidArgument, match="cluster volume orders has sharing mode"):
        await create(store, replace(staged, name="other"))


async def test_a_service_that_was_made_before_its_volume_can_still_be_scaled(store):
    service = await create(store, mounting(UpdateOrder.START_FIRST))
    await store.update(lambda tx: tx.put(a_cluster_volume("orders")))
    scaled = replace(service.spec, mode=ServiceMode(replicated=ReplicatedService(replicas=0)))
    service = await update(store, service, scaled)
    assert service.spec.replicas == 0
    with pytest.raises(InvalidArgument, match="use stop-first"):
        await update(store, service, replace(scaled, labels={"a": "b"}))
