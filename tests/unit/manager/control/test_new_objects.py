"""What permissions depend on: of a service to be made or changed, and of what there is."""

from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.control.validation.new_objects import (
    known_service,
    known_task,
    new_service,
    planned_service,
    stacks_of,
)
from skep.model.container import Mount, SecretReference
from skep.model.permissions.user import User, UserSpec
from skep.model.quota import QuotaSpec, StackQuota
from skep.model.service import JobStatus, NetworkAttachmentConfig, Service, ServiceSpec
from skep.model.task import Task
from skep.model.values.ids import QuotaId, ServiceId, UserId, VolumeId
from skep.model.values.stacks import STACK_LABEL
from skep.model.volume import Volume, VolumeSpec
from skep.store.memory import MemoryStore
from tests.support.builders import a_service, a_service_spec, a_task
from tests.support.store.damage_rigs import MemoryDamage
from tests.support.store.store_transactions import put

BIND = "a bind mount of /"


def of_priority(priority: int) -> ServiceSpec:
    return replace(a_service_spec("shop_web"), labels={"skep.priority": str(priority)})


async def test_a_priority_is_raised_above_0_and_above_what_the_service_has() -> None:
    store = MemoryStore(SystemClock())

    def raised(priority: int) -> int:
        return new_service(store.view(), of_priority(priority)).raised_priority

    assert (raised(-5), raised(0), raised(10)) == (0, 0, 10)
    for present, wanted in ((10, (0, 0, 0, 11)), (-10, (0, 0, 10, 11))):
        service: Service = a_service("shop_web", spec=of_priority(present))
        await store.update(lambda tx, one=service: tx.put(one))
        assert tuple(map(raised, (-5, 0, 10, 11))) == wanted


def plain(image: str = "busybox:1") -> ServiceSpec:
    return replace(a_service_spec("shop_web", image=image), labels={STACK_LABEL: "shop"})


def with_bind() -> ServiceSpec:
    """As an administrator makes one."""
    spec = plain()
    assert spec.task_template.container_spec is not None
    container = replace(
        spec.task_template.container_spec, mounts=(Mount(type="bind", source="/", target="/host"),)
    )
    return replace(spec, task_template=replace(spec.task_template, container_spec=container))


async def updated_twice(store: MemoryStore) -> Task:
    """A task that both updates of its service have left running, made with a bind mount."""
    service = await store.update(put, Service(id=ServiceId("web"), spec=with_bind()))
    await store.update(put, replace(a_task("old", service=service), spec_version=service.spec_version))
    for image in ("one:1", "two:1"):
        present = store.view().get(Service, ServiceId("web"))
        await store.update(put, replace(present, spec=plain(image), previous_spec=present.spec))
    return store.view().find(Task)[0]


async def test_a_task_has_the_rights_that_it_was_made_with() -> None:
    store = MemoryStore(SystemClock())
    old = await updated_twice(store)
    view = store.view()
    service = view.get(Service, old.service_id)
    assert known_service(view, service).machine_rights == ""
    known = known_task(view, old)
    assert (known.id, known.stack, known.machine_rights) == ("old", "shop", BIND)
    new = replace(a_task("new", service=service), spec_version=service.spec_version)
    assert known_task(view, new).machine_rights == ""


async def test_a_task_whose_spec_cannot_be_read_may_have_any_right() -> None:
    rig = MemoryDamage()
    old = await updated_twice(rig.store)
    assert old.spec_version is not None
    await rig.damage(f"o/spec/web/{old.spec_version.index}")
    view = (await rig.load()).view()
    assert known_task(view, view.get(Task, old.id)).machine_rights == "a spec that cannot be read"


async def test_a_job_has_the_rights_of_its_present_run() -> None:
    store = MemoryStore(SystemClock())
    service = await store.update(put, Service(id=ServiceId("job"), spec=with_bind()))
    run = JobStatus(spec_version=service.spec_version)
    # Its next runs have no such right, and neither has the spec that a rollback returns to.
    await store.update(put, replace(service, spec=plain(), previous_spec=plain(), job_status=run))
    view = store.view()
    found = known_service(view, view.get(Service, service.id)).machine_rights
    assert found == f"{BIND} (in the spec of the job's current run)"


async def test_a_right_that_a_task_does_not_have_is_said_to_be_one_of_its_services_specs() -> None:
    store = MemoryStore(SystemClock())
    service: Service = await store.update(put, Service(id=ServiceId("web"), spec=plain()))
    own = replace(a_task("own", service=service), spec_version=service.spec_version)
    task: Task = await store.update(put, own)
    for spec, previous, where in (
        (plain("two:1"), with_bind(), "the service's previous spec, to which a rollback returns"),
        (with_bind(), plain(), "the service's current spec"),
    ):
        present = store.view().get(Service, service.id)
        await store.update(put, replace(present, spec=spec, previous_spec=previous))
        view = store.view()
        assert known_task(view, view.get(Task, task.id)).machine_rights == f"{BIND} (in {where})"
    assert known_service(view, view.get(Service, service.id)).machine_rights == BIND


async def test_a_planned_service_uses_what_there_is_and_the_service_of_its_name() -> None:
    store = MemoryStore(SystemClock())
    spec = plain()
    assert spec.task_template.container_spec is not None
    container = replace(spec.task_template.container_spec, secrets=(SecretReference(secret_name="s"),))
    networks = (NetworkAttachmentConfig(target="shop_default"),)
    template = replace(spec.task_template, container_spec=container, networks=networks)
    spec = replace(spec, task_template=template)
    assert [one[0] for one in new_service(store.view(), spec).uses] == ["network", "secret"]
    missing = (("network", None, "shop_default"), ("secret", None, "s"))
    assert planned_service(store.view(), spec).uses == missing
    others = await store.update(
        put, a_service("shop_web", spec=replace(plain(), labels={STACK_LABEL: "blog"}))
    )
    (*_, (kind, known, word)) = planned_service(store.view(), spec).uses
    assert known is not None
    assert (kind, known.id, known.stack, word) == ("service", others.id, "blog", "shop_web")


async def test_a_mount_of_a_cluster_volume_means_the_volume_that_the_scheduler_takes() -> None:
    """Names only.  With prefixes of ids, the answer would also tell of other stacks' ids."""
    store = MemoryStore(SystemClock())
    for id, name, stack in (
        ("v11", "shop_data", "shop"),
        ("v22", "blog_data", "blog"),
        ("v33", "group:fast", "shop"),
    ):
        labels = {STACK_LABEL: stack}
        await store.update(put, Volume(id=VolumeId(id), spec=VolumeSpec(name=name, labels=labels)))

    def stack_of(source: str) -> str | None:
        spec = plain()
        assert spec.task_template.container_spec is not None
        mounts = (Mount(type="cluster", source=source, target="/d"),)
        container = replace(spec.task_template.container_spec, mounts=mounts)
        spec = replace(spec, task_template=replace(spec.task_template, container_spec=container))
        ((kind, known, word),) = new_service(store.view(), spec).uses
        assert (kind, word) == ("volume", source)
        return known.stack if known is not None else None

    assert (stack_of("shop_data"), stack_of("blog_data")) == ("shop", "blog")
    for source in ("v11", "v1", "v", "shop", "group:fast"):
        assert stack_of(source) is None, source


async def test_the_stacks_are_those_of_objects_quotas_and_roles() -> None:
    store = MemoryStore(SystemClock())
    label = {STACK_LABEL: "of-a-volume"}
    objects = (
        a_service("web", spec=replace(plain(), labels={STACK_LABEL: "of-a-service"})),
        a_service("plain"),
        Volume(id=VolumeId("v"), spec=VolumeSpec(name="v", labels=label)),
        StackQuota(id=QuotaId("q"), spec=QuotaSpec(name="of-a-quota", tasks=1)),
        User(id=UserId("u"), spec=UserSpec(name="ann", roles=("viewer", "admin", "operator:of-a-role"))),
    )
    for one in objects:
        await store.update(put, one)
    assert stacks_of(store.view()) == {"of-a-service", "of-a-volume", "of-a-quota", "of-a-role"}
