"""Quotas of stacks: what two managers let pass at one time is within the bound."""

import asyncio
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.errors import PermissionDenied
from skep.manager.control.files import create_config, create_secret, update_secret
from skep.manager.control.networks import add_subnets, create_network
from skep.manager.control.quotas import bounded, check_quota, quota_state, remove_quota, set_quota
from skep.manager.orchestrator.changes import RollBack, apply
from skep.manager.services.quotas import (
    USERS_TASKS_MAX,
    StackUsage,
    quota_of,
    refusal,
    usage_of,
    usage_of_network,
    usage_of_others,
)
from skep.model.network import IPAMConfig, IPAMOptions, Network, NetworkSpec
from skep.model.quota import QuotaSpec
from skep.model.secret import Config, ConfigSpec, Secret, SecretSpec
from skep.model.service import Resources, Service, ServiceSpec, UpdateState
from skep.model.values.ids import ConfigId, NetworkId, new_id
from skep.model.values.meta import Driver
from skep.model.values.stacks import STACK_LABEL
from skep.model.values.times import Timestamp
from skep.store.interface import Transaction
from skep.store.level import USERS
from tests.support.builders import a_service, a_service_spec
from tests.support.store.store_rigs import Rig
from tests.support.store.store_transactions import outcome

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


@pytest.mark.parametrize("stack", ["shop", ""])
async def test_users_at_two_managers_stay_within_their_bounds_together(rig: Rig, stack: str) -> None:
    """Without a quota there is no object of it that two requests at a time could conflict in."""
    half = USERS_TASKS_MAX // 2

    def write(tx: Transaction, name: str) -> Service:
        labels = {STACK_LABEL: stack} if stack else {}
        return tx.put(a_service(name, spec=replace(a_service_spec(name, replicas=half), labels=labels)))

    async def tried(name: str) -> object:
        store = rig.store if len(name) % 2 else rig.other
        return await outcome(store.update(bounded(write, stack, is_admin=False), name))

    results = await asyncio.gather(*(tried("s" * length) for length in range(1, 9)))
    refused = [one for one in results if isinstance(one, PermissionDenied)]
    assert len(refused) == 6, results
    assert f"has {USERS_TASKS_MAX} tasks and may have {USERS_TASKS_MAX} without a quota" in str(refused[0])
    await rig.store.barrier()
    assert len(rig.store.view().find(Service)) == 2
    await rig.store.update(bounded(write, stack, is_admin=True), "by_admin")


async def test_users_at_two_managers_stay_within_the_bound_of_data_together(rig: Rig) -> None:
    most = 64
    mebibyte = b"x" * (1 << 20)

    def write(tx: Transaction, name: str) -> Config:
        spec = ConfigSpec(name=name, labels={STACK_LABEL: "shop"}, data=mebibyte)
        return tx.put(Config(id=ConfigId(name), created_at=NOW, spec=spec))

    create = bounded(write, "shop", is_admin=False, measure=usage_of_others)
    for number in range(most - 1):
        await rig.store.update(create, f"c{number}")
    await rig.other.barrier()
    results = await asyncio.gather(
        *(outcome(store.update(create, name)) for store, name in ((rig.store, "here"), (rig.other, "there")))
    )
    assert len([one for one in results if isinstance(one, PermissionDenied)]) == 1, results


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
    assert usage_of(spec, 4) == StackUsage(tasks=4, nano_cpus=20, services=1)


def test_every_bound_is_checked() -> None:
    for name in StackUsage.__struct_fields__:
        quota = QuotaSpec(name="shop", **{name: 5})
        assert refusal(quota, StackUsage(), StackUsage(**{name: 3}), StackUsage(**{name: 2})) == ""
        assert refusal(quota, StackUsage(), StackUsage(**{name: 3}), StackUsage(**{name: 3})) != ""


def usages() -> st.SearchStrategy[StackUsage]:
    numbers = st.integers(0, 5)
    return st.builds(StackUsage, **dict.fromkeys(StackUsage.__struct_fields__, numbers))


@given(
    quota=st.builds(
        QuotaSpec, name=st.just("shop"), **dict.fromkeys(StackUsage.__struct_fields__, st.integers(0, 5))
    ),
    before=usages(),
    others=usages(),
    less=usages(),
)
def test_to_take_less_is_never_refused(
    quota: QuotaSpec, before: StackUsage, others: StackUsage, less: StackUsage
) -> None:
    wanted = StackUsage(
        **{
            name: max(getattr(before, name) - getattr(less, name), 0) if getattr(before, name) else 0
            for name in StackUsage.__struct_fields__
        }
    )
    # A service that gives up its reservations is not counted any more.
    gives_up = any(
        getattr(before, name) and not getattr(wanted, name) for name in ("nano_cpus", "memory_bytes")
    )
    assert refusal(quota, before, others, wanted) == "" or (gives_up and wanted.tasks)


async def test_a_service_without_reservations_may_shrink_and_not_grow(rig: Rig) -> None:
    service = await rig.store.update(create, in_shop("shop_a", 10))
    await limited(rig, memory_bytes=1 << 30)
    await rig.store.update(check_quota, in_shop("shop_a", 5), service)
    with pytest.raises(PermissionDenied, match="have to reserve memory"):
        await rig.store.update(check_quota, in_shop("shop_a", 11), service)


async def test_no_service_leaves_the_quota_by_giving_up_its_reservations(rig: Rig) -> None:
    await limited(rig, memory_bytes=1 << 30)
    reserved = in_shop("shop_a", 2, reserve=Resources(memory_bytes=256 << 20))
    service = await rig.store.update(create, reserved)
    with pytest.raises(PermissionDenied, match="have to reserve memory"):
        await rig.store.update(check_quota, in_shop("shop_a", 1), service)
    await rig.store.update(check_quota, in_shop("shop_a", 0), service)


async def test_the_leaders_rollback_over_the_quota_is_a_pause_that_says_why(rig: Rig) -> None:
    await limited(rig, tasks=10)
    service = await rig.store.update(create, in_shop("shop_a", 8))
    present = replace(service, spec=in_shop("shop_a", 2), previous_spec=service.spec)
    present = await rig.store.update(lambda tx: tx.put(present))
    other = await rig.store.update(create, in_shop("shop_b", 8))
    change = RollBack(present, "update rolled back due to failure of task t1")

    async def rolled_back() -> Service:
        await rig.store.update(apply, change, new_id, NOW)
        return rig.store.view().get(Service, present.id)

    paused = await rolled_back()
    assert (paused.spec.replicas, paused.previous_spec) == (2, service.spec)
    assert paused.update_status is not None
    assert paused.update_status.state is UpdateState.PAUSED
    assert paused.update_status.message == (
        "update paused due to failure of task t1: cannot roll back: the quota of the stack shop is exceeded: "
        "8 tasks wanted, 8 used by its other services, the limit is 10"
    )
    await rig.store.update(lambda tx: tx.put(replace(other, spec=in_shop("shop_b", 2))))
    await rig.store.update(lambda tx: tx.put(replace(tx.get(Service, present.id), update_status=None)))
    done = await rolled_back()
    assert (done.spec.replicas, done.previous_spec) == (8, None)


SHOP = {STACK_LABEL: "shop"}


def a_network(name: str, *subnets: str, labels: Mapping[str, str] = SHOP) -> NetworkSpec:
    ipam = IPAMOptions(
        driver=Driver(name="default"), configs=tuple(IPAMConfig(subnet=one) for one in subnets)
    )
    return NetworkSpec(
        name=name, labels=labels, driver_configuration=Driver(name="overlay"), ipam_options=ipam
    )


@pytest.mark.parametrize(
    ("subnets", "allocated", "addresses"),
    [
        ((), (), 256),
        ((), ("10.0.9.0/24",), 256),
        (("10.1.0.0/16",), (), 65536),
        (("10.1.0.0/25", ""), (), 128 + 256),
        (("10.1.0.0/25", ""), ("10.1.0.0/25", "10.0.9.0/24"), 128 + 256),
        (("fd00::/64",), (), 256),
    ],
)
async def test_the_addresses_of_a_network(
    rig: Rig, subnets: tuple[str, ...], allocated: tuple[str, ...], addresses: int
) -> None:
    spec = a_network("shop_n", *subnets)
    given = IPAMOptions(configs=tuple(IPAMConfig(subnet=one) for one in allocated))
    network = Network(id=NetworkId("n"), spec=spec, ipam_options=given)
    usage = usage_of_network(rig.store.view(), spec, network if allocated else None)
    assert usage == StackUsage(networks=1, addresses=addresses)


async def test_networks_and_their_addresses_count(rig: Rig) -> None:
    await limited(rig, networks=2, addresses=1024)

    async def made(spec: NetworkSpec) -> Network:
        return await rig.store.update(create_network, spec, new_id=new_id, now=NOW)

    with pytest.raises(PermissionDenied, match="2048 addresses wanted, 0 used"):
        await made(a_network("shop_a", "10.1.0.0/21"))
    network = await made(a_network("shop_a", "10.1.0.0/24"))
    await made(a_network("shop_b"))
    with pytest.raises(
        PermissionDenied, match="1 networks wanted, 2 used by its other objects, the limit is 2"
    ):
        await made(a_network("shop_c"))
    await made(a_network("blog_c", "10.2.0.0/16", labels={STACK_LABEL: "blog"}))
    with pytest.raises(PermissionDenied, match="2304 addresses wanted, 256 used by its other networks"):
        await rig.store.update(add_subnets, network.id, [IPAMConfig(subnet="10.3.0.0/21")])
    await rig.store.update(add_subnets, network.id, [IPAMConfig(subnet="10.3.0.0/24")])
    quota = quota_of(rig.store.view(), "shop")
    assert quota is not None
    used = quota_state(rig.store.view(), quota).used
    assert (used.networks, used.addresses) == (2, 768)


async def test_secrets_configs_and_their_data_count(rig: Rig) -> None:
    await limited(rig, secrets=2, configs=1, data_bytes=3 << 19)

    async def secret(name: str, size: int, labels: Mapping[str, str] = SHOP) -> Secret:
        spec = SecretSpec(name=name, labels=labels)
        return await rig.store.update(create_secret, spec, b"x" * size, new_id=new_id, now=NOW)

    async def config(name: str, size: int) -> Config:
        spec = ConfigSpec(name=name, labels=SHOP, data=b"x" * size)
        return await rig.store.update(create_config, spec, new_id=new_id, now=NOW)

    await config("shop_a", 900 << 10)
    with pytest.raises(PermissionDenied, match="1 configs wanted, 1 used"):
        await config("shop_b", 1)
    await secret("shop_s", 400 << 10)
    with pytest.raises(PermissionDenied, match="MiB of secrets and configs wanted"):
        await secret("shop_t", 400 << 10)
    await secret("shop_t", 1)
    with pytest.raises(PermissionDenied, match="1 secrets wanted, 2 used"):
        await secret("shop_u", 1)
    moved = await secret("blog_s", 1, {STACK_LABEL: "blog"})
    spec = replace(moved.spec, labels=SHOP)
    with pytest.raises(PermissionDenied, match="1 secrets wanted, 2 used"):
        await rig.store.update(update_secret, moved.id, spec, None, moved.version.index)


async def test_services_without_tasks_count(rig: Rig) -> None:
    await limited(rig, services=1)
    service = await rig.store.update(create, in_shop("shop_a", 0))
    with pytest.raises(PermissionDenied, match="1 services wanted, 1 used by its other services"):
        await rig.store.update(create, in_shop("shop_b", 0))
    await rig.store.update(check_quota, in_shop("shop_a", 3), service)


async def test_networks_at_two_managers_stay_within_the_quota_together(rig: Rig) -> None:
    await limited(rig, networks=3)
    results = await asyncio.gather(
        *(
            outcome(
                (rig.store if number % 2 else rig.other).update(
                    create_network, a_network(f"shop_{number}"), new_id=new_id, now=NOW
                )
            )
            for number in range(WRITERS)
        )
    )
    assert sum(isinstance(one, PermissionDenied) for one in results) == WRITERS - 3, results
