"""Services that wait for each other are refused; an update restarts those that ask for it."""

import pytest
from msgspec.structs import replace

from skep.errors import InvalidArgument
from skep.manager.orchestrator.changes import RollBack, apply
from skep.manager.services import dependent_services
from skep.manager.services.dependent_services import RESTARTED_MAX, reached, requiring
from skep.model.options.dependencies import DEPENDS_ON, dependencies_of
from skep.model.service import (
    Placement,
    ReplicatedJob,
    Service,
    ServiceMode,
    ServiceSpec,
    UpdateState,
    UpdateStatus,
)
from skep.model.values.ids import new_id
from skep.model.values.meta import Version
from tests.support.builders import a_service_spec
from tests.support.managers.counted_calls import calls_of
from tests.unit.manager.control.test_control_services import NOW, create, rollback, store, update

__all__ = ["store"]


def depending(name: str, text: str) -> ServiceSpec:
    return replace(a_service_spec(name), labels={DEPENDS_ON: text})


async def test_services_cannot_wait_for_each_other(store):
    await create(store, depending("web", "api=service_started"))
    await create(store, depending("api", "db=service_started,cache=service_started"))
    with pytest.raises(
        InvalidArgument, match=r"cannot depend on each other in a cycle: db -> web -> api -> db \(label"
    ):
        await create(store, depending("db", "web=service_healthy"))
    database = await create(store, a_service_spec("db"))
    with pytest.raises(InvalidArgument, match="db -> web -> api -> db"):
        await update(store, database, depending("db", "web=service_healthy"))
    with pytest.raises(InvalidArgument, match="self -> self"):
        await create(store, depending("self", "self=service_started"))


async def test_names_of_dependencies_are_written_in_any_case(store):
    """A service name belongs to one service, however it is written."""
    await create(store, depending("api", "WEB=service_started+restart,mail=service_started"))
    with pytest.raises(InvalidArgument, match="cannot depend on each other in a cycle: web -> api -> web"):
        await create(store, depending("web", "api=service_started"))
    web = await create(store, a_service_spec("web"))
    assert requiring(store.view(), "web") == ["api"]
    assert reached(store.view(), dependencies_of({DEPENDS_ON: "API=service_started"})) == {
        "api",
        "web",
        "mail",
    }
    await update(store, web, a_service_spec("web", image="app:2"))
    (api,) = store.view().find(Service, name="api")
    assert api.spec.task_template.force_update == 1


async def test_a_label_that_cannot_be_read_is_refused(store):
    with pytest.raises(InvalidArgument, match=r"expected SERVICE=CONDITION\[\+restart\]"):
        await create(store, depending("web", "db=healthy"))


async def test_an_update_of_the_tasks_restarts_the_services_that_ask_for_it(store):
    database = await create(store, a_service_spec("db"))
    await create(store, depending("web", "db=service_started+restart"))
    await create(store, depending("api", "db=service_started"))
    job = ServiceMode(replicated_job=ReplicatedJob(max_concurrent=1, total_completions=1))
    await create(store, replace(depending("job", "db=service_started+restart"), mode=job))

    def forced() -> dict[str, int]:
        return {
            one.spec.name: one.spec.task_template.force_update
            for one in store.view().find(Service)
            if one.spec.task_template.force_update
        }

    database = await update(store, database, replace(database.spec, labels={"a": "b"}))
    template = replace(database.spec.task_template, placement=Placement(constraints=("node.role==worker",)))
    database = await update(store, database, replace(database.spec, task_template=template))
    assert forced() == {}, "its tasks stay as they are"
    database = await update(
        store, database, replace(a_service_spec("db", image="busybox:2"), labels={"a": "b"})
    )
    assert forced() == {"web": 1, "job": 1}
    found = store.view().resolve(Service, "job")
    assert found.job_status.job_iteration == Version(index=1)
    assert found.previous_spec.task_template.force_update == 0
    database = await rollback(store, database, database.spec)
    assert forced() == {"web": 2, "job": 2}
    await store.update(apply, RollBack(database, "failed"), new_id, NOW)
    assert forced() == {"web": 3, "job": 3}


async def test_a_rollback_closes_no_circle(store):
    await create(store, a_service_spec("db"))
    web = await create(store, depending("web", "db=service_started"))
    web = await update(store, web, a_service_spec("web"))
    await update(store, store.view().resolve(Service, "db"), depending("db", "web=service_started"))
    with pytest.raises(InvalidArgument, match="web -> db -> web"):
        await rollback(store, web, web.spec)
    with pytest.raises(InvalidArgument, match="web -> db -> web"):
        await store.update(apply, RollBack(web, "failed"), new_id, NOW)


async def test_a_rollback_that_changes_no_task_restarts_nothing(store):
    database = await create(store, a_service_spec("db", replicas=1))
    web = await create(store, depending("web", "db=service_started+restart"))
    database = await update(store, database, a_service_spec("db", replicas=2))
    await rollback(store, database, database.spec)
    assert store.view().get(Service, web.id) == web


@pytest.mark.parametrize(
    ("state", "is_kept"),
    [
        (None, True),
        (UpdateState.UPDATING, True),
        (UpdateState.PAUSED, True),
        (UpdateState.ROLLBACK_STARTED, True),
        (UpdateState.COMPLETED, False),
    ],
)
async def test_a_restart_leaves_an_update_of_the_dependent_its_way_back_and_its_pause(store, state, is_kept):
    database = await create(store, a_service_spec("db"))
    web = await create(store, depending("web", "db=service_started+restart"))
    labels = web.spec.labels
    web = await update(store, web, replace(a_service_spec("web", image="web:2"), labels=labels))
    status = UpdateStatus(state=state, message="as before") if state is not None else None
    web = await store.update(lambda tx: tx.put(replace(tx.get(Service, web.id), update_status=status)))
    await update(store, database, a_service_spec("db", image="db:2"))
    found = store.view().get(Service, web.id)
    assert found.spec.task_template.force_update == 1
    kept = replace(status, started_at=NOW) if status is not None else None
    assert (found.previous_spec, found.update_status) == (
        (web.previous_spec, kept) if is_kept else (web.spec, None)
    )


async def test_a_restart_after_scaling_returns_to_no_other_number_of_tasks(store):
    database = await create(store, a_service_spec("db"))
    web = await create(store, depending("web", "db=service_started+restart"))
    web = await update(store, web, replace(a_service_spec("web", replicas=9), labels=web.spec.labels))
    await update(store, database, a_service_spec("db", image="db:2"))
    assert store.view().get(Service, web.id).previous_spec == web.spec


async def test_as_many_services_are_restarted_with_one_as_a_transaction_holds_and_more_are_refused(store):
    database = await create(store, a_service_spec("db"))
    for number in range(RESTARTED_MAX):
        await create(store, depending(f"web{number}", "db=service_started+restart"))
    with pytest.raises(InvalidArgument, match="updates of service db would restart 101 services"):
        await create(store, depending("more", "db=service_started+restart"))
    await create(store, depending("more", "db=service_started"))
    await update(store, database, a_service_spec("db", image="busybox:2"))
    await update(store, _named(store, "db"), a_service_spec("db", image="busybox:3"))
    assert _named(store, "web99").spec.task_template.force_update == 2
    assert _named(store, "more").spec.task_template.force_update == 0
    changed = replace(_named(store, "web99").spec, labels={DEPENDS_ON: "db=service_healthy+restart"})
    await update(store, _named(store, "web99"), changed)
    with pytest.raises(InvalidArgument, match="would restart 101 services"):
        await update(store, _named(store, "more"), depending("more", "db=service_started+restart"))


async def test_no_more_is_restarted_together_than_a_transaction_has_room_for(store):
    def large(number: int) -> ServiceSpec:
        spec = depending(f"web{number}", "db=service_started+restart")
        return replace(spec, labels=spec.labels | {"text": "x" * 40_000})

    for number in range(8):
        await create(store, large(number))
    with pytest.raises(InvalidArgument, match=r"would restart 9 services .*: their specs have 36"):
        await create(store, large(8))
    database = await create(store, a_service_spec("db"))
    await update(store, database, a_service_spec("db", image="busybox:2"))
    assert _named(store, "web7").spec.task_template.force_update == 1


async def test_a_label_with_many_names_is_not_read_once_for_each_of_them(store):
    """With a hundred services of a hundred names each that held the manager's loop for three seconds."""
    label = {DEPENDS_ON: ",".join(f"db{number}=service_started+restart" for number in range(20))}
    for number in range(20):
        await create(store, replace(a_service_spec(f"web{number}"), labels=label))
    with calls_of(dependencies_of) as read:
        dependent_services.check_dependencies(store.view(), replace(a_service_spec("more"), labels=label))
    assert len(read) == 21


async def test_too_many_of_an_earlier_version_are_named_at_the_update(store):
    database = await create(store, a_service_spec("db"))
    for number in range(300):
        service = replace(
            database, id=f"web{number}", spec=depending(f"web{number}", "db=service_started+restart")
        )
        await store.update(lambda tx, service=service: tx.put(service))
    with pytest.raises(InvalidArgument, match="updates of service db would restart 300 services"):
        await update(store, database, a_service_spec("db", image="busybox:2"))


def _named(store, name: str) -> Service:
    (found,) = store.view().find(Service, name=name)
    return found
