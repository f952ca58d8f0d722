"""Tasks with rights over their machine get nodes that give them."""

from collections.abc import Mapping

from msgspec.structs import replace

from skep.manager.scheduler.nodes.requirements import requirements_of
from skep.manager.scheduler.nodes.spread import CachedSpreads
from skep.manager.scheduler.placement import place
from skep.model.container import ContainerSpec
from skep.model.networks.data_planes import NODE_LABEL
from skep.model.node import EngineDescription, Node
from skep.model.permissions.rights import ALLOW_LABEL, CDI_LABEL, DEVICES_LABEL
from skep.model.service import (
    DiscreteResource,
    GenericResource,
    NamedResource,
    ResourceRequirements,
    Resources,
    Service,
)
from skep.model.task import TaskState
from tests.support.builders import a_docker_node, a_node, a_service, a_task
from tests.unit.manager.scheduler.test_placement import accounting_of, nodes_of, reason


def a_service_with(labels: Mapping[str, str]) -> Service:
    service = a_service(replicas=1)
    container = ContainerSpec(image="i", labels=labels)
    template = replace(service.spec.task_template, container_spec=container)
    return replace(service, spec=replace(service.spec, task_template=template))


def a_node_with(id: str, allow: str, devices: str = "", cdi: str = "") -> Node:
    node = a_node(id)
    given = {NODE_LABEL: "true", ALLOW_LABEL: allow, DEVICES_LABEL: devices, CDI_LABEL: cdi}
    labels = {**node.description.engine.labels, **given}
    engine = EngineDescription(engine_version="1", labels=labels)
    return replace(node, description=replace(node.description, engine=engine))


def placed(labels: Mapping[str, str], *nodes: Node):
    service = a_service_with(labels)
    task = replace(a_task(service=service, state=TaskState.PENDING), spec=service.spec.task_template)
    requirements = requirements_of(task, service.spec)
    return place([task], requirements, CachedSpreads(accounting_of(nodes)), now=0.0, limit=100)


def test_a_task_with_a_right_runs_where_the_node_gives_it() -> None:
    labels = {"skep.privileged": "true"}
    nodes = (a_node_with("n1", "devices"), a_node_with("n2", "devices,privileged"), a_node("n3"))
    assert nodes_of(placed(labels, *nodes)) == {"n2": 1}
    refused = placed(labels, nodes[0], nodes[2], a_docker_node("n4"))
    assert reason(refused) == "no suitable node (rights over the machine not allowed on 3 nodes)"


def test_a_docker_engine_gives_no_right_whatever_its_labels_say() -> None:
    """A label of its daemon.json is text, and it would run the task without the right."""
    node = a_docker_node("n1")
    engine = replace(node.description.engine, labels={ALLOW_LABEL: "all", DEVICES_LABEL: "..."})
    node = replace(node, description=replace(node.description, engine=engine))
    refused = placed({"skep.privileged": "true"}, node)
    assert reason(refused) == "no suitable node (rights over the machine not allowed on 1 node)"
    assert nodes_of(placed({}, node)) == {"n1": 1}


def test_a_task_with_a_device_runs_where_the_device_is() -> None:
    labels = {"skep.devices": "/dev/ttyUSB0"}
    there, elsewhere = a_node_with("n1", "devices", "/dev/ttyUSB0"), a_node_with("n2", "devices", "/dev/fuse")
    assert nodes_of(placed(labels, elsewhere, there)) == {"n1": 1}
    assert reason(placed(labels, elsewhere)) == "no suitable node (missing device on 1 node)"


def test_a_task_with_gpus_runs_where_as_many_are() -> None:
    one = a_node_with("n1", "all", cdi="acme.com/gpu=0")
    two = a_node_with("n2", "all", cdi="acme.com/gpu=0,acme.com/gpu=1")
    assert nodes_of(placed({"skep.gpus": "2"}, one, two)) == {"n2": 1}
    assert nodes_of(placed({"skep.gpus": "all"}, one)) == {"n1": 1}


def test_no_two_tasks_get_the_same_reserved_gpu() -> None:
    kind = "acme.com/gpu"
    node = a_node_with("n1", "all", cdi=f"{kind}=0,{kind}=1")
    gpus = [GenericResource(named_resource_spec=NamedResource(kind=kind, value=name)) for name in "01"]
    resources = replace(node.description.resources, generic_resources=tuple(gpus))
    node = replace(node, description=replace(node.description, resources=resources))
    service = a_service_with({"skep.gpus": "reserved"})
    wanted = GenericResource(discrete_resource_spec=DiscreteResource(kind=kind, value=1))
    reserved = ResourceRequirements(reservations=Resources(generic_resources=(wanted,)))
    template = replace(service.spec.task_template, resources=reserved)
    tasks = [
        replace(a_task(slot=slot, service=service, state=TaskState.PENDING), spec=template)
        for slot in (1, 2, 3)
    ]
    requirements = requirements_of(tasks[0], replace(service.spec, task_template=template))
    found = place(tasks, requirements, CachedSpreads(accounting_of([node])), now=0.0, limit=100)
    assert nodes_of(found) == {"n1": 2}
    assert {one.generic_resources for one in found.assignments} == {(gpu,) for gpu in gpus}


def test_a_task_without_rights_runs_anywhere() -> None:
    assert nodes_of(placed({}, a_node_with("n1", ""))) == {"n1": 1}
