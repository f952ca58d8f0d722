"""The smallest change that would let a refused task run."""

import pytest

from skep.aio.time_slices import run_at_once
from skep.manager.scheduler.explaining.smallest_change import finding_smallest_change
from skep.manager.scheduler.nodes.accounting import Accounting
from skep.manager.scheduler.nodes.requirements import requirements_of
from skep.model.node import Availability
from skep.model.service import PortConfig, PublishMode, Resources
from tests.support.builders import a_node, a_service, a_task

GIB = 1 << 30
SMALL = Resources(nano_cpus=4_000_000_000, memory_bytes=GIB)


def smallest_change(*nodes: object, **spec: object) -> str:
    accounting = Accounting()
    for node in nodes:
        accounting.set_node(node)  # type: ignore[arg-type]
    service = a_service("web", **spec)
    task = a_task("t1", service=service)
    requirements = requirements_of(task, service.spec, (), accounting.affinities.of(task.service_id))
    return run_at_once(finding_smallest_change(requirements, accounting))


@pytest.mark.parametrize(
    ("spec", "change"),
    [
        ({"reserve": Resources(memory_bytes=3 * GIB // 2)}, "w1 would run it with 512 MiB of memory more"),
        (
            {"reserve": Resources(nano_cpus=5_000_000_000)},
            "w1 would run it with 1 CPU more",
        ),
        (
            {"constraints": ("node.labels.disk==ssd",)},
            "w1 would run it without the constraint node.labels.disk == ssd",
        ),
        (
            {"constraints": ("node.labels.disk==ssd",), "reserve": Resources(memory_bytes=2 * GIB)},
            "w1 would run it with 1024 MiB of memory more and without the constraint node.labels.disk == ssd",
        ),
        ({"constraints": ("node.labels.a==1", "node.labels.b==1", "node.labels.c==1")}, ""),
        ({}, ""),
    ],
)
def test_what_is_missing_on_one_node_is_named(spec: dict[str, object], change: str) -> None:
    assert smallest_change(a_node("w1", has=SMALL), **spec) == change


def test_the_node_with_the_fewest_changes_is_named_and_a_change_of_the_spec_comes_first() -> None:
    drained = a_node("w2", availability=Availability.DRAIN)
    fast = a_node("w3", labels={"disk": "ssd"}, has=SMALL)
    needs = {"constraints": ("node.labels.disk==ssd",), "reserve": Resources(memory_bytes=GIB + GIB // 4)}
    assert smallest_change(drained, fast, **needs) == "w3 would run it with 256 MiB of memory more"
    slow = a_node("w1")
    assert "w1 would run it without" in smallest_change(slow, fast, **needs)
    assert smallest_change(drained, constraints=()).startswith("w2 would run it except for this")


@pytest.mark.parametrize(
    ("holder", "change"), [("web", ""), ("other", "w1 would run it if port 80/tcp were free")]
)
def test_a_port_that_the_service_itself_holds_does_not_become_free(holder: str, change: str) -> None:
    port = PortConfig(target_port=80, published_port=80, publish_mode=PublishMode.HOST)
    service = a_service("web", replicas=2, ports=(port,))
    accounting = Accounting()
    accounting.set_node(a_node("w1", has=SMALL))
    accounting.add(a_task(service=a_service(holder, ports=(port,)), node="w1"), (("tcp", 80),))
    task = a_task(slot=2, service=service)
    requirements = requirements_of(task, service.spec, (), accounting.affinities.of(task.service_id))
    assert run_at_once(finding_smallest_change(requirements, accounting)) == change
