"""A service with routes and no network of its own is on the network of the front door, like any other service."""

import asyncio
from functools import partial
from random import Random

from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.allocator.loop import Allocator
from skep.model.service import Service
from skep.model.task import Task, TaskState, TaskStatus
from skep.model.values.ids import ServiceId, TaskId, new_id
from skep.store.memory import MemoryStore
from tests.support.builders import a_service_spec, a_task, an_overlay
from tests.support.managers.wire_rig import until

DOOR = an_overlay("skep-door", labels={"skep.door": "true"})
TASKS = 5


def is_pending(store: MemoryStore, id: TaskId) -> bool:
    return store.view().get(Task, id).status.state is TaskState.PENDING


async def test_its_tasks_cost_no_addresses_besides_their_own() -> None:
    store = MemoryStore(SystemClock())
    allocator = Allocator(store, SystemClock(), new_id, Random(1))
    spec = replace(a_service_spec("web"), labels={"skep.http": "a.example"})
    web = Service(id=ServiceId("web"), spec=spec)
    await store.update(lambda tx: (tx.put(DOOR), tx.put(web)))
    async with asyncio.TaskGroup() as group:
        running = group.create_task(allocator.run())
        for number in range(TASKS):
            task = replace(a_task(f"t{number}", service=web), status=TaskStatus(state=TaskState.NEW))
            await store.update(lambda tx, task=task: tx.put(task))
            await until(partial(is_pending, store, task.id))
        running.cancel()
    addresses = [one.addr for one in store.view().get(Service, web.id).endpoint.virtual_ips]
    for task in store.view().find(Task):
        addresses += [address for one in task.networks_attachments for address in one.addresses]
    assert addresses
    assert allocator.state.allocations.addresses.usage(DOOR).used == len(addresses)
