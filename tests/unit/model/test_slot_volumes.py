"""Volumes of slots: what a node reports, and which node has a slot's data."""

from collections.abc import Mapping

import pytest
from msgspec.structs import replace

from skep.model.container import ContainerSpec, Mount, VolumeOptions
from skep.model.node import EngineDescription, Node
from skep.model.options.slot_volumes import (
    FORGOTTEN_LABEL,
    LABEL_CHARACTERS_MAX,
    SLOT_VOLUMES_LABEL,
    Home,
    SlotVolume,
    SlotVolumeIndex,
    homes_of,
    local_volumes,
    shape_of,
    slot_volumes_label,
    slot_volumes_of,
)
from skep.model.service import TaskSpec
from skep.model.task import ContainerStatus, Task, TaskState
from skep.model.values.meta import Driver
from tests.support.builders import a_node, a_task
from tests.support.managers.counted_calls import calls_of


def reporting(id: str, label: str) -> Node:
    node = a_node(id)
    engine = EngineDescription(labels={SLOT_VOLUMES_LABEL: label})
    return replace(node, description=replace(node.description, engine=engine))


def mounting(task: Task, *sources: str, options: Mapping[str, str] | None = None, driver: str = "") -> Task:
    given = VolumeOptions(driver_config=Driver(name=driver, options=options)) if options is not None else None
    mounts = tuple(
        Mount(type="volume", source=source, target=f"/{number}", volume_options=given)
        for number, source in enumerate(sources)
    )
    return replace(task, spec=TaskSpec(container_spec=ContainerSpec(image="app:1", mounts=mounts)))


def created(task: Task) -> Task:
    """Return the task with the container that its node has reported."""
    return replace(task, status=replace(task.status, container_status=ContainerStatus(container_id="c1")))


def homes(task: Task, *, past: tuple[Task, ...] = (), nodes: tuple[Node, ...] = ()) -> list[str]:
    return [home.node_id for home in homes_of(task, "web", past, SlotVolumeIndex(nodes))]


def test_what_a_node_reports_is_read_again() -> None:
    found = [SlotVolume("data", "stack_db", 2, 1763894400000), SlotVolume("a.b-c", "web", 1, 7)]
    label = slot_volumes_label(reversed(found))
    assert label == "data=stack_db.2@1763894400000 a.b-c=web.1@7"
    assert slot_volumes_of(reporting("n1", label)) == found


def test_of_many_volumes_the_latest_are_reported() -> None:
    many = [SlotVolume(f"data-{number}", "web", number, number) for number in range(5000)]
    label = slot_volumes_label(many)
    assert LABEL_CHARACTERS_MAX - 40 < len(label) <= LABEL_CHARACTERS_MAX
    read = slot_volumes_of(reporting("n1", label))
    assert read == list(reversed(many))[: len(read)]


def test_a_name_is_read_once_however_many_volumes_are_reported() -> None:
    names = ("{{" * 4000, "data-{{.Task.Slot}}")
    label = " ".join(f"data-{number}=web.1@{number}" for number in range(100))
    with calls_of(shape_of) as read:
        assert homes(mounting(a_task(slot=1), *names), nodes=(reporting("n1", label),)) == ["n1"]
    assert [call["name"] for call in read.of(shape_of)] == list(names)


def test_a_label_that_cannot_be_read_reports_nothing() -> None:
    for label in (
        "=",
        "data",
        "data=web.1",
        "data=web.x@1",
        "d=web.1@1",
        "data=web.99999999999@1",
        "x" * (1 << 20),
    ):
        assert slot_volumes_of(reporting("n1", label)) == [], label


def test_local_volumes_are_those_whose_data_stays_on_the_node() -> None:
    for options, driver, is_local in (
        (None, "", True),
        ({}, "local", True),
        ({"size": "0"}, "local", True),
        ({"type": "nfs", "device": ":/x", "o": "addr=10.0.0.1"}, "local", False),
        ({"type": "tmpfs", "device": "tmpfs"}, "", False),
        ({}, "rexray", False),
    ):
        spec = mounting(a_task(), "data", options=options, driver=driver).spec
        assert bool(local_volumes(spec)) == is_local, (options, driver)
    assert local_volumes(mounting(a_task(), "").spec) == (), "it has a new one each time"
    bind = ContainerSpec(image="app:1", mounts=(Mount(type="bind", source="/srv", target="/data"),))
    assert local_volumes(TaskSpec(container_spec=bind)) == ()


def test_a_slots_data_is_where_its_last_task_was() -> None:
    past = (
        mounting(a_task(slot=2, node="n1", state=TaskState.FAILED), "data"),
        created(mounting(a_task(slot=2, node="n2", state=TaskState.SHUTDOWN), "data")),
        mounting(a_task(slot=2, node="n3", state=TaskState.REJECTED), "data"),
        mounting(a_task(slot=2, node="n4", state=TaskState.PREPARING), "data"),
        mounting(a_task(slot=2, node="n5"), "other"),
    )
    assert homes(mounting(a_task(slot=2), "data", "logs"), past=past) == ["n2", "n1"]
    assert homes(mounting(a_task(slot=2), "new"), past=past) == []


@pytest.mark.parametrize("state", [TaskState.SHUTDOWN, TaskState.REJECTED, TaskState.ORPHANED])
def test_a_task_that_ended_before_its_container_was_created_has_no_data(state: TaskState) -> None:
    older = mounting(a_task(slot=2, node="n1", state=TaskState.FAILED), "data")
    stopped = mounting(a_task(slot=2, node="n2", state=state), "data")
    assert homes(mounting(a_task(slot=2), "data"), past=(older, stopped)) == ["n1"]
    assert homes(mounting(a_task(slot=2), "data"), past=(stopped,)) == []
    assert homes(mounting(a_task(slot=2), "data"), past=(older, created(stopped))) == ["n2", "n1"]


def test_a_slot_without_tasks_is_found_by_what_nodes_report() -> None:
    nodes = (
        reporting("n1", "data=web.2@100 data=web.1@300"),
        reporting("n2", "data=web.2@200 data=api.2@400 other=web.2@500"),
    )
    assert homes(mounting(a_task(slot=2), "data"), nodes=nodes) == ["n2", "n1"]
    assert homes(mounting(a_task(slot=1), "data"), nodes=nodes) == ["n1"]
    assert homes(mounting(a_task(slot=3), "data"), nodes=nodes) == []
    past = (mounting(a_task(slot=2, node="n3"), "data"),)
    assert homes(mounting(a_task(slot=2), "data"), past=past, nodes=nodes) == ["n3", "n2", "n1"]


def test_a_volume_with_a_name_of_its_slot_is_found() -> None:
    nodes = (reporting("n1", "data-2-web=web.2@1"), reporting("n2", "web-2=web.2@2"))
    for source, expected in (
        ("data-{{.Task.Slot}}-web", ["n1"]),
        ("{{.Service.Name}}-{{.Task.Slot}}", ["n2", "n1"]),
        ("logs-{{.Task.Slot}}", []),
        ("data-2{{", []),
    ):
        assert homes(mounting(a_task(slot=2), source), nodes=nodes) == expected, source


def test_the_index_follows_its_nodes() -> None:
    index = SlotVolumeIndex()
    task = mounting(a_task(slot=2), "data")
    index.set_node(reporting("n1", "data=web.2@100"))
    index.set_node(reporting("n2", "data=web.2@200"))
    assert homes_of(task, "web", (), index) == (Home("n2", "data"), Home("n1", "data"))
    index.set_node(reporting("n2", "data=web.1@200"))
    assert homes_of(task, "web", (), index) == (Home("n1", "data"),)
    index.remove_node("n1")
    index.remove_node("n1")
    assert not homes_of(task, "web", (), index)
    index.set_node(a_node("n2"))
    assert not index.by_slot


def test_a_forgotten_volume_attracts_no_task_until_it_is_used_again() -> None:
    task = mounting(a_task("t9", slot=2), "data-{{.Task.Slot}}")

    def homes(until_ms: int, *past: Task) -> list[str]:
        node = reporting("n1", "data-2=web.2@5000")
        labels = {FORGOTTEN_LABEL: f"data-2@{until_ms} broken @ x@y"} if until_ms else {}
        index = SlotVolumeIndex([replace(node, spec=replace(node.spec, labels=labels))])
        return [home.node_id for home in homes_of(task, "web", past, index)]

    assert homes(0) == ["n1"]
    assert homes(5000) == []
    assert homes(4999) == ["n1"]
    earlier = mounting(a_task("t1", slot=2, node="n1"), "data-{{.Task.Slot}}")
    assert homes(0, earlier) == homes(4999, earlier) == ["n1"]
    assert homes(10**14, earlier) == []


def test_a_node_is_remembered_again_when_nothing_of_it_is_forgotten() -> None:
    node = reporting("n1", "data=web.1@5000")
    index = SlotVolumeIndex([replace(node, spec=replace(node.spec, labels={FORGOTTEN_LABEL: "data@5000"}))])
    assert index.is_forgotten(node.id, "data", 5000)
    index.set_node(node)
    assert not index.is_forgotten(node.id, "data", 5000)
