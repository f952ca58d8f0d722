"""HTTP routes: taken ones are refused when a service is created, updated or rolled back, and explained later."""

import pytest
from msgspec.structs import replace

from skep.errors import InvalidArgument, RouteTaken
from skep.manager.services.routes import route_problems
from skep.model.network import Network, NetworkSpec
from skep.model.service import ReplicatedJob, ServiceMode, ServiceSpec
from skep.model.task import NetworkAttachment, TaskState
from skep.model.values.ids import NetworkId
from tests.support.builders import a_node, a_service, a_service_spec, a_task
from tests.unit.manager.control.test_control_services import create, rollback, store, update

__all__ = ["store"]

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


async def test_the_host_of_another_stack_is_refused_without_its_name_for_its_users(store):
    await create(store, routed("shop_web", "a.example", "shop"))
    with pytest.raises(RouteTaken) as caught:
        await create(store, routed("evil_web", "a.example/login", "evil"))
    assert caught.value.stack == "shop"
    assert "shop" not in str(caught.value.without_name())
    await create(store, routed("shop_api", "a.example/api", "shop"))


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
