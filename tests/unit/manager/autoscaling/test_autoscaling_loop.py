"""What the leader writes, and what keeps it from writing."""

import pytest
from msgspec.structs import replace

from sim.world.time import VirtualClock, VirtualLoop
from skep.aio.clock import SystemClock
from skep.errors import PermissionDenied
from skep.manager.autoscaling.state import (
    SET_BACK_S,
    AutoscalerState,
    AutoscalingCounts,
    Doors,
    Quota,
    Scaling,
    write_problem,
    write_replicas,
)
from skep.manager.control.quotas import check_quota, set_quota
from skep.manager.control.services import rollback_service, update_service
from skep.manager.services.quotas import replicas_within_quota
from skep.model.measures.readings import ScalingMeasurements
from skep.model.options.autoscaling import autoscaling_of
from skep.model.quota import QuotaSpec
from skep.model.service import Autoscaled, Service, ServiceSpec, UpdateState
from skep.model.values.ids import ServiceId, new_id
from skep.model.values.stacks import STACK_LABEL
from skep.model.values.times import Timestamp
from skep.store.interface import Commit, Created, Updated
from skep.store.level import USERS
from skep.store.memory import MemoryCluster, MemoryStore
from tests.support.builders import a_service, a_service_spec

NOW = Timestamp("2026-01-01T00:00:00Z")
LABELS = {"skep.autoscale": "2..10", STACK_LABEL: "shop"}


def scaled_spec(replicas: int, image: str = "busybox:1") -> ServiceSpec:
    return replace(a_service_spec("web", replicas=replicas, image=image), labels=LABELS)


def scaling(present: int, replicas: int) -> Scaling:
    found = autoscaling_of(LABELS)
    assert found is not None
    return Scaling(
        service_id=a_service("web").id,
        present=present,
        scaling=found,
        replicas=replicas,
        reason="why",
        now_ns=0,
    )


async def a_store(service: Service) -> MemoryStore:
    store = MemoryStore(SystemClock(), MemoryCluster())
    await store.update(lambda tx: tx.put(service))
    return store


async def written(store: MemoryStore, one: Scaling) -> bool:
    return await store.update(write_replicas, one, check_quota)


async def test_the_number_and_the_reason_are_written_and_the_rest_stays() -> None:
    store = await a_store(a_service("web", spec=scaled_spec(2)))
    before = store.view().get(Service, "web")
    assert await written(store, scaling(2, 4))
    after = store.view().get(Service, "web")
    assert after.spec == scaled_spec(4)
    assert after.previous_spec is None
    assert after.version.index > before.version.index, (
        "a user's update with the old version is out of sequence"
    )
    assert after.autoscaled == Autoscaled(
        before=2, after=4, reason="why", at=Timestamp("1970-01-01T00:00:00Z")
    )


@pytest.mark.parametrize(
    "changed",
    [
        a_service("web", spec=scaled_spec(3)),
        a_service("web", spec=replace(scaled_spec(2), labels={**LABELS, "skep.autoscale": "2..9"})),
        a_service("web", spec=replace(scaled_spec(2), labels={})),
        a_service("web", spec=scaled_spec(2), state=UpdateState.UPDATING),
        replace(a_service("web", spec=scaled_spec(2)), removed_at=NOW),
    ],
)
async def test_a_service_that_has_changed_since_the_decision_is_left_alone(changed: Service) -> None:
    store = await a_store(changed)
    before = store.view().get(Service, "web")
    assert not await written(store, scaling(2, 4))
    assert store.view().get(Service, "web") == before
    assert not await store.update(write_replicas, replace(scaling(2, 4), service_id="gone"), check_quota)


async def test_a_rollback_returns_to_the_image_and_not_to_the_number() -> None:
    store = await a_store(a_service("web", spec=scaled_spec(2)))
    service = store.view().get(Service, "web")
    spec = scaled_spec(2, "busybox:2")
    await store.update(lambda tx: update_service(tx, service.id, spec, service.version.index, now=NOW))
    assert await written(store, scaling(2, 4))
    service = store.view().get(Service, "web")
    await store.update(
        lambda tx: rollback_service(tx, service.id, service.spec, service.version.index, now=NOW)
    )
    assert store.view().get(Service, "web").spec == scaled_spec(4)


async def test_an_update_that_names_no_number_keeps_it() -> None:
    store = await a_store(a_service("web", spec=scaled_spec(2)))
    assert await written(store, scaling(2, 7))
    service = store.view().get(Service, "web")
    spec = replace(a_service_spec("web", replicas=None, image="busybox:2"), labels=LABELS)
    await store.update(lambda tx: update_service(tx, service.id, spec, service.version.index, now=NOW))
    assert store.view().get(Service, "web").spec.replicas == 7


async def test_the_quota_of_a_stack_is_the_bound() -> None:
    store = await a_store(a_service("web", spec=scaled_spec(2)))
    await store.update(lambda tx: tx.raise_level(USERS))
    await store.update(lambda tx: tx.put(a_service("db", spec=replace(a_service_spec("db"), labels=LABELS))))
    await store.update(set_quota, QuotaSpec(name="shop", tasks=6), new_id=new_id, now=NOW)
    service = store.view().get(Service, "web")
    number, why = replicas_within_quota(store.view(), service, 8)
    assert number == 5
    assert "the quota of the stack shop is exceeded: 8 tasks wanted, 1 used" in why
    assert replicas_within_quota(store.view(), service, 4) == (4, "")
    assert replicas_within_quota(store.view(), service, 1) == (1, "")
    with pytest.raises(PermissionDenied, match="quota"):
        await written(store, scaling(2, 8))
    assert await written(store, scaling(2, 5))


@pytest.mark.parametrize(("back_s", "replicas"), [(120, 4), (SET_BACK_S + 120, 2)])
async def test_a_clock_that_is_set_back_does_not_undo_an_entry_of_a_schedule(
    back_s: int, replicas: int
) -> None:
    labels = {"skep.autoscale": "1..9", "skep.autoscale.schedule": "0 8 * * * 4..9; 0 20 * * * 2..2"}
    store = await a_store(a_service("web", spec=replace(scaled_spec(3), labels=labels)))
    loop = VirtualLoop()
    clock = VirtualClock(loop)
    state = AutoscalerState(store.view, clock, Quota(replicas_within_quota, check_quota), AutoscalingCounts())
    state.start(store.view())
    clock.wall_off_s = -(clock.now_ns() // 10**9 % 86400) + 8 * 3600 + 60  # a minute past eight

    def wanted() -> int | None:
        found = state.decide(ServiceId("web"), ScalingMeasurements(), 1000.0, Doors())
        return found.replicas if found is not None else None

    assert wanted() == 4
    clock.wall_off_s -= back_s
    assert wanted() == replicas
    loop.close()


@pytest.mark.parametrize("sees_change", [False, True])
async def test_a_problem_with_measures_ends_with_autoscaling(sees_change: bool) -> None:
    problem = "queue not known: timeout"
    scaled = replace(a_service("web", spec=scaled_spec(2)), autoscaling_problem=problem)
    plain = replace(scaled, spec=a_service_spec("web", replicas=2))
    store = await a_store(plain)
    quota = Quota(lambda view, service, number: (number, ""), check_quota)
    state = AutoscalerState(store.view, SystemClock(), quota, AutoscalingCounts())
    if sees_change:
        state.on_commit(Commit(1, (Created(scaled),)))
        assert state.outdated_problems() == []
        state.on_commit(Commit(2, (Updated(scaled, plain),)))
    else:
        state.start(store.view())
    assert [one.problem for one in state.outdated_problems()] == [""]
    for one in state.outdated_problems():
        await store.update(write_problem, one)
    after = store.view().get(Service, "web")
    assert after.autoscaling_problem == ""
    state.on_commit(Commit(3, (Updated(plain, after),)))
    assert state.outdated_problems() == []
