"""Quotas of stacks: what two managers let pass at one time is within the bound."""

import asyncio

import pytest
from msgspec.structs import replace

from skep.api.permissions import STACK_LABEL
from skep.errors import PermissionDenied
from skep.manager.control.quotas import (
    Usage,
    check_quota,
    quota_of,
    quota_state,
    refusal,
    remove_quota,
    set_quota,
    usage_of,
)
from skep.model.ids import new_id
from skep.model.quota import QuotaSpec
from skep.model.service import Resources, Service, ServiceSpec
from skep.model.times import Timestamp
from skep.store.interface import Transaction
from skep.store.level import USERS
from tests.support.builders import a_service, a_service_spec
from tests.support.store_rigs import Rig
from tests.support.store_transactions import outcome

NOW = Timestamp("2026-01-01T00:00:00Z")
WRITERS = 20


def in_shop(name: str, replicas: int = 1, **requested: object) -> ServiceSpec:
    return replace(
        a_service_spec(name, replicas=replicas, **requested),  # type: ignore[arg-type]
        labels={STACK_LABEL: "shop"},
    )


def create(tx: Transaction, spec: ServiceSpec) -> Service:
    check_quota(tx, spec)
    return tx.put(a_service(spec.name, spec=spec))


async def limited(rig: Rig, **bounds: int) -> None:
    await rig.store.update(lambda tx: tx.raise_level(USERS))
    await rig.store.update(set_quota, QuotaSpec(name="shop", **bounds), new_id=new_id, now=NOW)
    await rig.other.barrier()


async def test_writers_at_two_managers_stay_within_the_quota_together(rig: Rig) -> None:
    await limited(rig, tasks=7)
    results = await asyncio.gather(
        *(
            outcome((rig.store if number % 2 else rig.other).update(create, in_shop(f"shop_{number}")))
            for number in range(WRITERS)
        )
    )
    refused = [one for one in results if isinstance(one, PermissionDenied)]
    assert len(refused) == WRITERS - 7, results
    assert "1 tasks wanted, 7 used by its other services, the limit is 7" in str(refused[0])
    await rig.store.barrier()
    view = rig.store.view()
    assert len(view.find(Service)) == 7
    quota = quota_of(view, "shop")
    assert quota is not None
    assert quota_state(view, quota).used.tasks == 7


async def test_other_stacks_have_no_bound_and_a_removed_quota_none(rig: Rig) -> None:
    await limited(rig, tasks=1)
    await rig.store.update(create, replace(in_shop("blog_a", 50), labels={STACK_LABEL: "blog"}))
    with pytest.raises(PermissionDenied):
        await rig.store.update(create, in_shop("shop_a", 2))
    await rig.store.update(remove_quota, "shop")
    await rig.store.update(create, in_shop("shop_a", 2))


async def test_what_exceeds_already_may_shrink_and_not_grow(rig: Rig) -> None:
    service = await rig.store.update(lambda tx: tx.put(a_service("shop_a", spec=in_shop("shop_a", 9))))
    await limited(rig, tasks=3)
    await rig.store.update(check_quota, in_shop("shop_a", 5), service)
    with pytest.raises(PermissionDenied, match="10 tasks wanted, 0 used"):
        await rig.store.update(check_quota, in_shop("shop_a", 10), service)


async def test_a_bound_of_reservations_needs_them(rig: Rig) -> None:
    await limited(rig, memory_bytes=1 << 30)
    with pytest.raises(PermissionDenied, match="have to reserve memory"):
        await rig.store.update(create, in_shop("shop_a"))
    half = Resources(memory_bytes=512 << 20)
    await rig.store.update(create, in_shop("shop_a", 2, reserve=half))
    with pytest.raises(PermissionDenied, match="512 MiB of reserved memory wanted, 1024 used"):
        await rig.store.update(create, in_shop("shop_b", 1, reserve=half))


def test_a_global_service_takes_a_task_of_each_node() -> None:
    spec = a_service_spec("shop_a", is_global=True, reserve=Resources(nano_cpus=5))
    assert usage_of(spec, 4) == Usage(tasks=4, nano_cpus=20)


def test_every_bound_is_checked() -> None:
    for name in Usage.__struct_fields__:
        quota = QuotaSpec(name="shop", **{name: 5})
        assert refusal(quota, Usage(), Usage(**{name: 3}), Usage(**{name: 2})) == ""
        assert refusal(quota, Usage(), Usage(**{name: 3}), Usage(**{name: 3})) != ""
