"""Which single loss takes which service down."""

from msgspec.structs import replace

from skep.manager.what_if.survival import LossEffect, SurvivalQuestion
from skep.model.container import Mount
from skep.model.node import ManagerStatus, NodeRole, Reachability
from skep.model.service import Service
from skep.model.values.ids import ServiceId
from skep.store.interface import Object
from tests.support.builders import a_service, a_service_spec
from tests.unit.manager.what_if.test_what_if import a_state, node, with_tasks


def losses_of(names: tuple[str, ...], *objects: Object) -> dict[tuple[str, str], LossEffect]:
    question = SurvivalQuestion(a_state(*objects), 0, [ServiceId(name) for name in names])
    for _ in question.steps():
        pass
    assert question.answer.services == tuple(sorted(names))
    return {(one.kind, one.name): one for one in question.answer.losses}


def with_mount(service: Service, mount: Mount) -> Service:
    template = service.spec.task_template
    assert template.container_spec is not None
    container = replace(template.container_spec, mounts=(mount,))
    spec = replace(service.spec, task_template=replace(template, container_spec=container))
    return replace(service, spec=spec)


def test_nodes_and_zones_take_down_what_runs_nowhere_else() -> None:
    nodes = [node(id, labels={"zone": zone}) for id, zone in (("w1", "a"), ("w2", "a"), ("w3", "b"))]
    pinned = a_service("db", replicas=1, constraints=("node.labels.zone==a",))
    spread = a_service("web", replicas=2)
    single = a_service("api", replicas=1)
    found = losses_of(
        ("api", "db", "web"),
        *nodes,
        *with_tasks(pinned, "w1"),
        *with_tasks(spread, "w1", "w3"),
        *with_tasks(single, "w3"),
    )
    assert found["node", "w1"].down == ()
    assert found["node", "w1"].interrupted == ("db",)
    assert found["node", "w1"].seconds > 15
    assert ("node", "w2") not in found, "it runs none of their tasks"
    assert found["node", "w3"].interrupted == ("api",)
    assert (found["zone", "a"].down, found["zone", "b"].down) == (("db",), ())


def test_a_manager_may_take_the_quorum_with_it() -> None:
    status = ManagerStatus(reachability=Reachability.REACHABLE)
    m1 = replace(node("m1", role=NodeRole.MANAGER), manager_status=status)
    found = losses_of(("web",), m1, node("w1"), *with_tasks(a_service("web", replicas=2), "m1", "w1"))
    assert (found["manager", "m1"].reduced, "no quorum" in found["manager", "m1"].note) == (("web",), True)
    assert found["node", "w1"].note == ""


def test_images_and_data_on_one_node_are_named() -> None:
    volume = Mount(type="volume", source="data-{{.Task.Slot}}", target="/data")
    db = with_mount(a_service("db", replicas=1), volume)
    spec = a_service_spec("api", replicas=1, image="registry.local:5000/api:1")
    found = losses_of(
        ("api", "db", "web"),
        node("w1"),
        node("w2"),
        *with_tasks(db, "w1"),
        *with_tasks(a_service("api", spec=spec), "w2"),
        *with_tasks(a_service("web", replicas=2), "w1", "w2"),
    )
    assert found["registry", "registry.local:5000"].not_startable == ("api",)
    assert ("registry", "docker.io") not in found, "two nodes have that image"
    assert found["volume", "data-{{.Task.Slot}} on w1"].without_data == ("db",)
