"""HTTP routes: taken ones are refused when a service is created, updated or rolled back, and explained later."""

import pytest
from msgspec.structs import replace

from skep.aio.time_slices import run_at_once
from skep.errors import AlreadyExists, InvalidArgument, RouteTaken, Unavailable
from skep.manager.control.quotas import HOSTS_MAX, quota_state, set_quota
from skep.manager.orchestrator.changes import ROLLED_BACK, RollBack, apply
from skep.manager.services.quotas import quota_of
from skep.manager.services.routes import route_problem, route_problems, shown_routes
from skep.model.network import Network, NetworkSpec
from skep.model.quota import QuotaSpec
from skep.model.service import (
    ReplicatedJob,
    ReplicatedService,
    ServiceMode,
    ServiceSpec,
    UpdateState,
    UpdateStatus,
)
from skep.model.task import NetworkAttachment, TaskState
from skep.model.values.ids import NetworkId, new_id
from skep.model.values.times import Timestamp
from skep.store.level import USERS
from tests.support.builders import a_node, a_service, a_service_spec, a_task
from tests.support.store.damage_rigs import MemoryDamage
from tests.unit.manager.control.test_control_services import create, rollback, store, update

__all__ = ["store"]

NOW = Timestamp("2026-01-01T00:00:00Z")
DOOR = Network(id=NetworkId("front"), spec=NetworkSpec(name="skep-door", labels={"skep.door": "true"}))


def routed(name: str, routes: str, stack: str = "") -> ServiceSpec:
    labels = {"skep.http": routes, **({"com.docker.stack.namespace": stack} if stack else {})}
    return replace(a_service_spec(name), labels=labels)


async def test_a_taken_route_is_refused(store):
    web = await create(store, routed("web", "a.example"))
    with pytest.raises(RouteTaken, match=r"a\.example belongs to service web"):
        await create(store, routed("other", "b.example,A.example"))
    other = await create(store, routed("other", "b.example"))
    with pytest.raises(RouteTaken, match=r"b\.example belongs to service other"):
        await update(store, web, routed("web", "a.example,b.example"))  # although it is older
    web = await update(store, web, routed("web", "c.example"))
    await update(store, other, routed("other", "a.example,b.example"))
    with pytest.raises(RouteTaken, match=r"a\.example belongs to service other"):
        await rollback(store, web, web.spec)


async def test_a_failed_update_takes_no_route_back_that_another_service_has_by_now(store):
    """The older service would get the host, without a word to the users of the other one."""
    web = await create(store, routed("web", "a.example"))
    web = await update(store, web, routed("web", "c.example"))
    await create(store, routed("other", "a.example"))
    with pytest.raises(RouteTaken, match=r"a\.example belongs to service other"):
        await store.update(apply, RollBack(web, ROLLED_BACK), new_id, NOW)


async def test_a_second_service_with_a_name_is_refused_because_of_its_name(store):
    await create(store, routed("web", "a.example"))
    with pytest.raises(AlreadyExists, match="service web already exists"):
        await create(store, routed("web", "a.example"))


async def test_the_host_of_another_stack_is_refused_without_its_name_for_its_users(store):
    await create(store, routed("shop_web", "a.example", "shop"))
    with pytest.raises(RouteTaken) as caught:
        await create(store, routed("evil_web", "a.example/login", "evil"))
    assert caught.value.stack == "shop"
    assert "shop" not in str(caught.value.without_name())
    await create(store, routed("shop_api", "a.example/api", "shop"))


async def reserve(store, stack: str, *hosts: str) -> None:
    await store.update(set_quota, QuotaSpec(name=stack, hosts=hosts), new_id=lambda: stack, now=NOW)


async def test_the_hosts_of_a_quota_are_for_its_stack_alone_and_it_has_no_others(store):
    await store.update(lambda tx: tx.raise_level(USERS))
    old = await create(store, routed("old_web", "shop.example", "old"))
    await reserve(store, "shop", "shop.example", "*.shop.example")
    await reserve(store, "bank", "pay.shop.example")
    for host in ("a.shop.example", "*.shop.example"):
        with pytest.raises(RouteTaken, match="reserved by the quota of the stack shop") as caught:
            await create(store, routed("evil_web", host, "evil"))
        assert "stack shop" not in str(caught.value.without_name())
    with pytest.raises(
        RouteTaken, match=r"stack shop allows only the hosts shop\.example, \*\.shop\.example, and not"
    ):
        await create(store, routed("shop_web", "b.example", "shop"))
    # An exact host comes before the wildcard.
    with pytest.raises(RouteTaken, match="reserved by the quota of the stack bank"):
        await create(store, routed("shop_pay", "pay.shop.example", "shop"))
    await create(store, routed("bank_web", "pay.shop.example", "bank"))
    web = await create(store, routed("shop_web", "www.shop.example/a", "shop"))
    await create(store, routed("blog_web", "b.example", "blog"))
    # What is there stays, and is not given to another stack by a new label of the stack.
    old = await update(store, old, routed("old_web", "shop.example/new", "old"))
    with pytest.raises(RouteTaken, match="reserved by the quota of the stack shop"):
        await update(store, old, routed("old_web", "shop.example/new", "evil"))
    quota = quota_of(store.view(), "shop")
    assert quota_state(store.view(), quota).used.hosts == ("www.shop.example",)
    web = await update(store, web, routed("shop_web", "x.shop.example", "shop"))
    await reserve(store, "evil", "www.shop.example")
    with pytest.raises(RouteTaken, match="reserved by the quota of the stack evil"):
        await rollback(store, web, web.spec)


async def test_while_a_quota_cannot_be_read_no_service_gets_new_hosts():
    """They could be reserved by it.  Services keep the hosts that they have."""
    rig = MemoryDamage()
    await rig.store.update(lambda tx: tx.raise_level(USERS))
    web = await create(rig.store, routed("blog_web", "blog.example", "blog"))
    await reserve(rig.store, "shop", "shop.example")
    (key,) = await rig.keys("o/quota/")
    await rig.damage(key)
    store = await rig.load()
    with pytest.raises(Unavailable, match="a quota cannot be read here, so its hosts are unknown"):
        await create(store, routed("evil_web", "shop.example", "evil"))
    with pytest.raises(Unavailable, match="a quota cannot be read here"):
        await update(store, web, routed("blog_web", "blog.example,shop.example", "blog"))
    changed = routed("blog_web", "blog.example/new", "blog")
    assert (await update(store, web, changed)).spec.labels["skep.http"] == "blog.example/new"


@pytest.mark.parametrize(
    ("hosts", "reason"),
    [
        (("shop.example",), "in the quota of the stack shop"),
        (("http://a.example",), "has no scheme"),
        (("10.0.0.1",), "is an address"),
        (("A.example",), "write it in lower case"),
        (tuple(f"h{number}.example" for number in range(HOSTS_MAX + 1)), "at most 100 hosts"),
        ((), "needs a limit"),
    ],
)
async def test_a_quota_has_valid_hosts_that_no_other_quota_has(store, hosts, reason):
    await store.update(lambda tx: tx.raise_level(USERS))
    await reserve(store, "shop", "shop.example")
    await reserve(store, "shop", "shop.example", "b.example")
    with pytest.raises(InvalidArgument, match=reason):
        await reserve(store, "blog", *hosts)


async def test_a_job_has_no_routes(store):
    job = replace(routed("job", "a.example"), mode=ServiceMode(replicated_job=ReplicatedJob()))
    with pytest.raises(InvalidArgument, match="does not work on jobs"):
        await create(store, job)


async def test_a_route_that_does_not_work_is_explained(store):
    web = await create(store, routed("web", "a.example"))

    def problems() -> list[str]:
        return list(route_problems(store.view(), web, lambda stack: True))

    assert problems() == ["route a.example: there is no front door. Create it with skep door up"]
    await store.update(lambda tx: tx.put(DOOR))
    assert problems() == ["route a.example: there is no front door. Create it with skep door up"], (
        "its network stays after skep door down"
    )
    proxies = a_service("skep-door")
    proxies = replace(proxies, spec=replace(proxies.spec, labels={"skep.door": "true"}))
    await store.update(lambda tx: tx.put(proxies))
    assert problems() == ["route a.example: no proxy of the front door runs. Run skep door status"]
    proxy = a_task("p1", node="n1", service=proxies, state=TaskState.RUNNING)
    await store.update(lambda tx: [tx.put(a_node("n1")), tx.put(proxy)])
    assert problems() == ["route a.example: no task of the service runs"]
    task = a_task("t1", node="n1", service=web)
    task = replace(task, status=replace(task.status, state=TaskState.RUNNING))
    await store.update(lambda tx: tx.put(task))
    assert "not on the network skep-door" in problems()[0]
    attached = (NetworkAttachment(network=DOOR),)
    await store.update(lambda tx: tx.put(replace(tx.get(type(task), task.id), networks_attachments=attached)))
    assert problems() == []


async def test_the_list_has_the_same_reasons_and_the_state_of_each_route(store):
    await store.update(lambda tx: tx.put(DOOR))
    proxies = a_service("skep-door")
    proxies = replace(proxies, spec=replace(proxies.spec, labels={"skep.door": "true"}))
    proxy = a_task("p1", node="n1", service=proxies, state=TaskState.RUNNING)
    await store.update(lambda tx: [tx.put(one) for one in (proxies, a_node("n1"), proxy)])
    web = await create(store, routed("web", "a.example"))
    await create(store, routed("second", "b.example"))
    old = await create(store, routed("old", "old.example"))
    asleep = {**old.spec.labels, "skep.http": "night.example", "skep.autoscale": "0..2"}
    mode = ServiceMode(replicated=ReplicatedService(0))
    night = a_service("night")
    night = replace(night, spec=replace(night.spec, labels=asleep, mode=mode))
    bad = a_service("bad")
    bad = replace(bad, spec=replace(bad.spec, labels={"skep.http": "bad example"}))

    def write(tx):
        tx.put(bad)
        tx.put(night)
        for service, attachments in ((web, (NetworkAttachment(network=DOOR),)), (old, ())):
            task = a_task(f"t-{service.spec.name}", node="n1", service=service)
            status = replace(task.status, state=TaskState.RUNNING)
            tx.put(replace(task, status=status, networks_attachments=attachments))

    await store.update(write)
    found = run_at_once(shown_routes(store.view(), lambda _: True, (), lambda _: ""))
    rows = {one.route: (one.state, one.tasks, one.problem) for one in found}
    assert rows["a.example"] == ("ok", 1, "")
    assert rows["b.example"] == ("failing", 0, "no task of the service runs")
    assert rows["night.example"] == ("at zero", 0, "")
    state, tasks, problem = rows["old.example"]
    assert (state, tasks) == ("failing", 1)
    assert "1 of 1 tasks is not on the network skep-door" in problem
    assert "docker service update --force old" in problem
    assert "not a DNS name" in rows["-"][2]


def test_tasks_that_a_staged_update_replaces_need_no_other_update():
    web = a_service("web")
    labels = {"skep.http": "a.example", "skep.update": "canary"}
    status = UpdateStatus(state=UpdateState.UPDATING, message="update in progress: step 1 of 3")
    web = replace(web, spec=replace(web.spec, labels=labels), update_status=status)
    task = a_task("t1", node="n1", service=web)
    task = replace(task, status=replace(task.status, state=TaskState.RUNNING))
    problem = route_problem(web, [task], DOOR, {}, "a.example", has_proxy=True)
    assert problem.endswith("The update in progress replaces them (skep explain web)")
