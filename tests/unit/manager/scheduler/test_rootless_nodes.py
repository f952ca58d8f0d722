"""A rootless node, and one that maps users, gets no task that it cannot run as asked, and each refusal says why."""

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.errors import FailedPrecondition
from skep.manager.control.nodes import update_node
from skep.manager.scheduler.explaining.explain import verdict
from skep.manager.scheduler.nodes.requirements import requirements_of
from skep.manager.scheduler.nodes.spread import CachedSpreads
from skep.manager.scheduler.placement import Placed, place
from skep.model.container import ContainerSpec
from skep.model.network import Network
from skep.model.node import EngineDescription, EnginePlugin, Node, NodeRole
from skep.model.node_reports.rootless import ROOTLESS_LABEL, RootlessNeeds, lacking, rootless_label
from skep.model.permissions.rights import ALLOW_LABEL
from skep.model.service import (
    EndpointSpec,
    Limits,
    PortConfig,
    PublishMode,
    ResourceRequirements,
    Service,
)
from skep.model.task import NetworkAttachment, Task
from skep.model.values.meta import Driver
from skep.model.values.user_map import MAPPED, USERS_LABEL
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, a_service, a_task, an_overlay
from tests.unit.manager.scheduler.test_placement import ALL, PENDING, accounting_of, nodes_of, reason
from tests.unit.manager.scheduler.test_scheduler_loop import put

NO_LIMITS = rootless_label((), 1024)
REFUSED = "no suitable node (not possible on 1 node in rootless mode)"


def rootless(id: str = "r1", label: str = NO_LIMITS) -> Node:
    return labelled(a_node(id), {ROOTLESS_LABEL: label})


def labelled(node: Node, labels: dict[str, str]) -> Node:
    engine = EngineDescription(engine_version="1", labels={"skep.node": "true", **labels})
    return replace(node, description=replace(node.description, engine=engine))


def limited(service: Service, **limits: int) -> Service:
    template = service.spec.task_template
    resources = ResourceRequirements(limits=Limits(**limits))
    return replace(service, spec=replace(service.spec, task_template=replace(template, resources=resources)))


def published(service: Service, port: int, protocol: str = "tcp") -> Service:
    ports = (
        PortConfig(protocol=protocol, target_port=80, published_port=port, publish_mode=PublishMode.HOST),
    )
    return replace(service, spec=replace(service.spec, endpoint_spec=EndpointSpec(ports=ports)))


def with_rights(service: Service, **labels: str) -> Service:
    template = service.spec.task_template
    container = replace(template.container_spec or ContainerSpec(), labels=labels)
    return replace(
        service, spec=replace(service.spec, task_template=replace(template, container_spec=container))
    )


def task_of(service: Service, *networks: Network) -> Task:
    task = a_task(service=service, state=PENDING)
    places = tuple(NetworkAttachment(network=network) for network in networks)
    return replace(task, spec=service.spec.task_template, networks_attachments=places)


def placed(service: Service, *networks: Network, nodes: tuple[Node, ...]) -> Placed:
    task = task_of(service, *networks)
    accounting = accounting_of(nodes)
    return place([task], requirements_of(task, service.spec), CachedSpreads(accounting), now=0.0, limit=ALL)


HOST = replace(an_overlay("host"), driver_state=Driver(name="host"))


@pytest.mark.parametrize(
    ("service", "networks", "why"),
    [
        (a_service(), (an_overlay("net1"),), "overlay network net1"),
        (a_service(), (HOST,), "host network"),
        (limited(a_service(), memory_bytes=1 << 26, pids=10), (), "limits of memory and pids"),
        (published(a_service(), 80), (), "port 80, which is below 1024"),
        (published(a_service(), 8080, "sctp"), (), "SCTP port"),
        (published(a_service(), 0, "sctp"), (), "SCTP port"),
        (with_rights(a_service(), **{"skep.executor": "process"}), (), "plain process"),
    ],
)
def test_what_a_rootless_node_cannot_do_is_refused_with_the_reason(
    service: Service, networks: tuple[Network, ...], why: str
) -> None:
    assert reason(placed(service, *networks, nodes=(rootless(),))) == REFUSED
    requirements = requirements_of(task_of(service, *networks), service.spec)
    (account,) = accounting_of([rootless()]).accounts.values()
    assert verdict(requirements, account, 0).reasons[0] == f"not possible in rootless mode: {why}"


def test_a_plain_task_runs_on_a_rootless_node() -> None:
    assert nodes_of(placed(a_service(), nodes=(rootless(),))) == {"r1": 1}
    assert nodes_of(placed(published(a_service(), 8080), nodes=(rootless(),))) == {"r1": 1}


def test_limits_are_placed_where_their_control_groups_are_delegated() -> None:
    service = limited(a_service(), memory_bytes=1 << 26)
    able = rootless("r2", rootless_label({"memory", "pids"}, 1024))
    assert nodes_of(placed(service, nodes=(rootless("r1"), able))) == {"r2": 1}
    assert reason(placed(limited(a_service(), nano_cpus=10**9), nodes=(able,))) == REFUSED


@pytest.mark.parametrize("label", ["", "ports-from=x", "limits", "ports-from=-1 limits=cpu", "x" * 10_000])
def test_an_unreadable_label_means_the_least_that_a_node_can_have(label: str) -> None:
    assert lacking(RootlessNeeds(limits=("memory",), lowest_port=80), {ROOTLESS_LABEL: label}) == (
        "limits of memory",
        "port 80, which is below 1024",
    )
    assert lacking(RootlessNeeds(limits=("memory",), lowest_port=80), {}) == ()


MAPS_USERS = labelled(a_node("u1"), {USERS_LABEL: MAPPED, ALLOW_LABEL: "privileged,namespaces"})


@pytest.mark.parametrize(
    ("service", "networks", "why"),
    [
        (a_service(), (HOST,), "host network"),
        (with_rights(a_service(), **{"skep.privileged": "true"}), (), "privileged"),
        (with_rights(a_service(), **{"skep.pid": "host"}), (HOST,), "host network, processes of the machine"),
    ],
)
def test_what_a_node_with_mapped_users_refuses_is_placed_on_another_one(
    service: Service, networks: tuple[Network, ...], why: str
) -> None:
    refused = placed(service, *networks, nodes=(MAPS_USERS,))
    assert reason(refused) == "no suitable node (not possible on 1 node with userns-remap)"
    requirements = requirements_of(task_of(service, *networks), service.spec)
    (account,) = accounting_of([MAPS_USERS]).accounts.values()
    assert f"not possible with userns-remap: {why}" in verdict(requirements, account, 0).reasons
    unmapped = labelled(a_node("u2"), {ALLOW_LABEL: "privileged,namespaces"})
    network = EnginePlugin(type="Network", name="host")
    unmapped = replace(
        unmapped,
        description=replace(
            unmapped.description, engine=replace(unmapped.description.engine, plugins=(network,))
        ),
    )
    assert nodes_of(placed(service, *networks, nodes=(MAPS_USERS, unmapped))) == {"u2": 1}


def test_other_tasks_run_on_a_node_with_mapped_users() -> None:
    service = limited(published(a_service(), 80), memory_bytes=1 << 26)
    assert nodes_of(placed(service, nodes=(MAPS_USERS,))) == {"u1": 1}


async def test_a_rootless_node_is_not_promoted() -> None:
    store = MemoryStore(SystemClock())
    await store.update_each(put, [rootless(), a_node("m1")])

    def promote(tx: object) -> None:
        node = tx.get(Node, rootless().id)  # type: ignore[attr-defined]
        spec = replace(node.spec, role=NodeRole.MANAGER)
        update_node(tx, node.id, spec, node.version.index)  # type: ignore[arg-type]

    with pytest.raises(FailedPrecondition, match="is rootless and cannot manage a cluster"):
        await store.update(promote)
