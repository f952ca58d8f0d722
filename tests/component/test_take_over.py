"""What a new leader does before it leads: it reads every task, and decides about every service.

Counted are the calls of Python's functions, which are the same on any machine however busy.
"""

import cProfile
import gc
from asyncio import TaskGroup, timeout
from random import Random

from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.control_loops.loops import loops
from skep.model.task import NetworkAttachment, Task
from skep.model.values.ids import NodeId, ServiceId, TaskId, new_id
from skep.store.interface import Transaction
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, a_service, a_task, an_overlay

NODES, SERVICES, REPLICAS = 20, 100, 20
CALLS_MAX = 90
"""Per task, of all loops together.  It is 68, and 190 where every slot is decided about by itself."""

NETWORK = an_overlay("net1", subnet="10.0.0.0/8", plane="skep")


async def test_taking_over_costs_a_few_calls_for_each_task() -> None:
    store = MemoryStore(SystemClock())
    await store.update(lambda tx: [tx.put(a_node(f"n{number:02}")) for number in range(NODES)])
    await store.update(lambda tx: tx.put(NETWORK))
    services = [a_service(f"s{number:03}", replicas=REPLICAS) for number in range(SERVICES)]
    await store.update_each(lambda tx, one: tx.put(one), services)
    await store.update_each(running, range(SERVICES * REPLICAS))
    await store.update(lambda tx: tx.put(a_service("waiting", replicas=1)))
    gc.collect()
    profile = cProfile.Profile()
    async for term in store.terms(NodeId("m1"), "127.0.0.1:2377"):
        async with TaskGroup() as group, timeout(120):
            profile.enable()
            leading = [
                group.create_task(loop.run()) for loop in loops(term, SystemClock(), new_id, Random(1))
            ]
            await assigned(store)
            profile.disable()
            for one in leading:
                one.cancel()
        break
    calls = sum(entry.callcount for entry in profile.getstats()) / (SERVICES * REPLICAS)
    print(f"{calls:.1f} calls for each task")
    assert calls <= CALLS_MAX


def running(tx: Transaction, number: int) -> Task:
    service, slot = f"s{number // REPLICAS:03}", number % REPLICAS + 1
    place = NetworkAttachment(network=NETWORK, addresses=(f"10.1.{number >> 8}.{number & 255}/8",))
    task = replace(a_task(slot=slot, node=f"n{number % NODES:02}"), id=TaskId(f"t{number:024d}"))
    return tx.put(replace(task, service_id=ServiceId(service), networks_attachments=(place,)))


async def assigned(store: MemoryStore) -> None:
    """Return when the task of the last service has its node: everything is read and decided by then."""
    async with store.watch(Task) as watch:
        async for _ in watch:
            if any(task.node_id for task in store.view().find(Task, service_id="waiting")):
                return
