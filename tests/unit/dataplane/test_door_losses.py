"""When the connections to tasks of nodes that no longer respond are ended."""

import asyncio

from sim.world.time import VirtualClock, VirtualLoop
from skep.dataplane.door.configuration import CONNECT_S, DoorState, ServerLine
from skep.dataplane.door.derivation import state_of
from skep.dataplane.door.losses import LostTasks, endings
from skep.model.networks.tables import NetworkHead, NetworkTable, TableEndpoint, TableNode, TableService
from skep.model.values.ids import NetworkId, NodeId, ServiceId, TaskId
from tests.support.harness.clocks import on_virtual_time

T1, T2, T3 = TaskId("t1"), TaskId("t2"), TaskId("t3")


def virtual_clock() -> VirtualClock:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    return VirtualClock(loop)


def a_table(nodes: dict[str, TaskId]) -> NetworkTable:
    """Return a table with one serving task on each of these nodes."""
    web = ServiceId("web")
    labels = {"skep.http": "a.example"}
    endpoints = [
        TableEndpoint(
            task_id=task,
            node_id=NodeId(node),
            service_id=web,
            addresses=(f"10.0.0.{number}",),
            is_running=True,
            is_serving=True,
        )
        for number, (node, task) in enumerate(nodes.items())
    ]
    return NetworkTable(
        head=NetworkHead(id=NetworkId("door"), name="skep-door", is_door=True),
        nodes={NodeId(id): TableNode(id=NodeId(id), underlay="192.0.2.1") for id in nodes},
        services={web: TableService(id=web, name="web", labels=labels)},
        endpoints={one.task_id: one for one in endpoints},
    )


def lines_of(state: DoorState) -> dict[str, ServerLine]:
    (backend,) = state.backends.values()
    return {one.task: one for one in backend.servers if one.task}


@on_virtual_time
async def test_a_lost_task_keeps_its_line_until_its_connections_have_opened_or_failed() -> None:
    clock = virtual_clock()
    lost = LostTasks(clock)
    whole, without = a_table({"n1": T1, "n2": T2}), a_table({"n2": T2})
    before = state_of(whole, DoorState())
    began = clock.monotonic()
    lost.follow(whole)
    lost.follow(without)
    state = state_of(a_table({"n2": T2, "n3": T3}), before, lost=lost.present())
    lines = lines_of(state)
    assert {id: one.is_ready for id, one in lines.items()} == {T1: False, T2: True, T3: True}
    assert lines[T1].address == "10.0.0.0", "no other task has the line, whose connections are ended"
    assert await lost.due() == [T1]
    assert clock.monotonic() - began >= CONNECT_S
    (command,) = endings(state, [T1])
    assert command.startswith("shutdown sessions server web-")
    assert lines_of(state_of(without, state, lost=lost.present())).keys() == {T1, T2}, "until they have ended"
    lost.forget([T1])
    assert lines_of(state_of(without, state, lost=lost.present())).keys() == {T2}


@on_virtual_time
async def test_a_task_that_is_lost_again_while_its_connections_are_ended_is_due_again() -> None:
    lost = LostTasks(virtual_clock())
    whole, without = a_table({"n1": T1, "n2": T2}), a_table({"n2": T2})
    for table in (whole, without):
        lost.follow(table)
    ended = await lost.due()
    await asyncio.sleep(1)  # for the commands
    for table in (whole, without):
        lost.follow(table)
    lost.forget(ended)
    assert await lost.due() == [T1]
    lost.forget([T1])
    assert not lost.present()


@on_virtual_time
async def test_the_connections_to_a_task_that_serves_again_are_not_ended() -> None:
    lost = LostTasks(virtual_clock())
    whole, without = a_table({"n1": T1, "n2": T2}), a_table({"n2": T2})
    lost.follow(whole)
    lost.follow(without)
    waiting = asyncio.create_task(lost.due())
    await asyncio.sleep(1)
    lost.follow(whole)
    assert not lost.present()
    assert not endings(state_of(whole, DoorState()), [T1]), "not even if the time has come at the same moment"
    await asyncio.sleep(10)
    assert not waiting.done()
    lost.follow(a_table({"n1": T1}))
    assert await waiting == [T2]
