"""A return to a revision has the rights of the user who wrote it, in a cluster with users."""

import base64
import gzip
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from sim.cluster import SimulatedCluster
from sim.users.clients import ADMIN, ApiClient, Apis
from skep.errors import InvalidArgument, PermissionDenied, SkepError
from skep.model.container import Mount
from skep.model.permissions.access import Identity, Origin, parse_binding
from skep.model.service import Service
from skep.stack.cluster_state import config_names, existing_of, known_revisions
from skep.stack.created import CreatedObjects
from skep.stack.planning import plan_of
from skep.stack.project import Stack
from skep.stack.recording import carry_out, return_plan, undo
from skep.stack.revisions import before, refused, revisions_of
from tests.unit.stack.test_planning import a_stack

GOOD = "services: {web: {image: 'good:1', deploy: {replicas: 1}}}"
ANN = Identity(name="ann", origin=Origin.TOKEN, bindings=(parse_binding("operator:shop"),))
LABELS = {"com.docker.stack.namespace": "shop", "skep.stack.revision": "8", "skep.stack.state": "deployed"}


async def deploy(client: ApiClient, stack: Stack, created: CreatedObjects | None = None) -> None:
    plan = plan_of(stack, await existing_of(client, stack.name, config_names(stack)), images={}, prune=True)
    await carry_out(client, stack, plan, lambda *_: None, 60.0, pytest.fail, created=created)


def with_root(stack: Stack) -> Stack:
    """With the machine's root directory in its service."""
    (name, one) = next(iter(stack.services.items()))
    template = one.spec.task_template
    assert template.container_spec is not None
    container = replace(template.container_spec, mounts=(Mount(type="bind", source="/", target="/host"),))
    spec = replace(one.spec, task_template=replace(template, container_spec=container))
    return replace(stack, services={name: replace(one, spec=spec)})


async def forge(client: ApiClient, stack: Stack) -> None:
    """Write a revision by hand, as the users of the stack may."""
    data = base64.b64encode(gzip.compress(msgspec.json.encode(stack))).decode()
    await client.post("/configs/create", {"Name": "shop_revision-8", "Labels": LABELS, "Data": data})


def mounts(cluster: SimulatedCluster) -> list[str]:
    found = []
    for service in cluster.view.find(Service):
        container = service.spec.task_template.container_spec
        found += [one.source for one in container.mounts] if container is not None else []
    return found


def test_a_forged_revision_gives_no_rights_until_the_administrator_says_so() -> None:
    with SimulatedCluster(workers=2, seed=1) as cluster:
        apis = Apis(cluster)
        admin, ann = ApiClient(apis, "admin"), ApiClient(apis, "ann", ANN)

        async def attack() -> None:
            stack = a_stack(GOOD)
            await deploy(admin, stack)
            await forge(ann, with_root(stack))
            chosen = before("shop", await known_revisions(admin, "shop"), 8)
            found = await return_plan(admin, chosen)
            assert [one.partition(":")[0] for one in found.beyond] == ["shop_web"]
            assert "a bind mount of /: only administrators may give that" in found.beyond[0]
            assert "skep stack rollback --as-admin --to 8 shop" in refused(chosen, found.beyond)
            with pytest.raises(SkepError, match="only administrators may give that"):
                await carry_out(found.client, found.stack, found.plan, lambda *_: None, 60.0, pytest.fail)
            assert mounts(cluster) == []
            # Nor does an undo of the administrator's own deploy that failed.
            with pytest.raises(PermissionDenied, match="was written with the role operator:shop"):
                await undo(
                    admin,
                    plan_of(stack, await existing_of(admin, "shop"), images={}, prune=True),
                    *(lambda *_: None, 60.0, lambda _: None),
                )
            assert mounts(cluster) == []
            chosen_by_hand = await return_plan(admin, chosen, is_admin=True)
            await carry_out(
                chosen_by_hand.client,
                chosen_by_hand.stack,
                chosen_by_hand.plan,
                *(lambda *_: None, 60.0, pytest.fail),
            )

        cluster.do(attack())
        assert mounts(cluster) == ["/"]


def test_what_an_administrator_deployed_with_rights_is_returned_to_without_a_word() -> None:
    with SimulatedCluster(workers=2, seed=2) as cluster:
        admin = ApiClient(Apis(cluster), "admin")

        async def go() -> None:
            await deploy(admin, with_root(a_stack(GOOD)))
            await deploy(admin, a_stack(GOOD.replace("good:1", "good:2")))
            assert mounts(cluster) == []
            found = await return_plan(admin, before("shop", await known_revisions(admin, "shop"), None))
            assert found.beyond == ()
            await carry_out(found.client, found.stack, found.plan, lambda *_: None, 60.0, pytest.fail)

        cluster.do(go())
        assert mounts(cluster) == ["/"]


def test_the_labels_of_a_revision_take_rights_away_and_give_none() -> None:
    with SimulatedCluster(workers=2, seed=3) as cluster:
        apis = Apis(cluster)
        admin, ann = ApiClient(apis, "admin"), ApiClient(apis, "ann", ANN)

        async def roles() -> list[str]:
            return [str(one.role) for one in await known_revisions(admin, "shop")]

        async def relabel(client: ApiClient, **labels: str) -> None:
            (found,) = await client.get("/configs")
            spec = found["Spec"] | {"Labels": found["Spec"]["Labels"] | labels}
            await client.post(f"/configs/{found['ID']}/update", spec, version=str(found["Version"]["Index"]))

        async def go() -> None:
            await deploy(admin, with_root(a_stack(GOOD)))
            assert await roles() == ["admin"]
            await relabel(ann, **{"skep.stack.state": "failed"})
            assert await roles() == ["operator:shop"]
            await relabel(admin, **{"skep.stack.state": "deployed"})
            assert await roles() == ["operator:shop"]
            await relabel(ann, **{"skep.stack.revision": "99"})
            assert await roles() == [], "the number of a revision is that of its name"

        cluster.do(go())


def test_a_return_by_an_administrator_to_an_operators_revision_is_the_operators_again() -> None:
    """Otherwise two returns would make it the administrator's."""
    with SimulatedCluster(workers=2, seed=4) as cluster:
        apis = Apis(cluster)
        admin, ann = ApiClient(apis, "admin"), ApiClient(apis, "ann", ANN)

        async def go() -> list[str]:
            await deploy(ann, a_stack(GOOD))
            await deploy(ann, a_stack(GOOD.replace("good:1", "good:2")))
            found = await return_plan(admin, before("shop", await known_revisions(admin, "shop"), None))
            await carry_out(found.client, found.stack, found.plan, lambda *_: None, 60.0, pytest.fail)
            return [str(one.role) for one in await known_revisions(admin, "shop")]

        assert cluster.do(go()) == ["operator:shop"] * 3


@pytest.mark.parametrize("what", ["name", "service", "label"])
def test_a_revision_with_objects_of_another_stack_is_refused(what: str) -> None:
    stack = a_stack(GOOD)
    (key, one) = next(iter(stack.services.items()))
    other = {"com.docker.stack.namespace": "payments"}
    forged = {
        "name": replace(stack, name="payments"),
        "service": replace(stack, services={key: replace(one, spec=replace(one.spec, name="payments_api"))}),
        "label": replace(stack, services={key: replace(one, spec=replace(one.spec, labels=other))}),
    }[what]
    data = base64.b64encode(gzip.compress(msgspec.json.encode(forged))).decode()
    spec: dict[str, Any] = {"Name": "shop_revision-8", "Labels": LABELS, "Data": data}
    config = {"ID": "c", "Version": {"Index": 1}, "CreatedAt": "", "Spec": spec, "WrittenBy": "admin"}
    (revision,) = revisions_of("shop", [config])
    with pytest.raises(InvalidArgument, match=r"payments|of another stack"):
        revision.stack()


def test_a_service_of_that_name_that_is_not_of_the_stack_is_left_alone() -> None:
    with SimulatedCluster(workers=2, seed=5) as cluster:
        admin = ApiClient(Apis(cluster), "admin")

        async def go() -> None:
            spec = {"Name": "shop_web", "TaskTemplate": {"ContainerSpec": {"Image": "other"}}}
            await admin.post("/services/create", spec)
            with pytest.raises(SkepError, match="shop_web exists outside of the stack shop"):
                await deploy(admin, a_stack(GOOD))

        cluster.do(go())
        (service,) = cluster.view.find(Service)
        assert service.spec.task_template.container_spec is not None
        assert service.spec.task_template.container_spec.image == "other"


def test_a_limit_gives_no_rights() -> None:
    with SimulatedCluster(workers=1, seed=6) as cluster:
        apis = Apis(cluster)

        async def roles(identity: Identity, limit: str) -> list[str]:
            client = ApiClient(apis, "x", identity)
            return list((await client.get("/skep/access", headers={"X-Skep-Role": limit}))["Roles"])

        async def go() -> None:
            assert await roles(ADMIN, "operator:shop") == ["operator:shop"]
            assert await roles(ANN, "admin") == ["operator:shop"]
            assert await roles(ANN, "viewer") == ["viewer:shop"]
            with pytest.raises(PermissionDenied, match="the user has none"):
                await roles(ANN, "operator:payments")
            with pytest.raises(InvalidArgument, match="unknown role"):
                await roles(ADMIN, "root")

        cluster.do(go())
