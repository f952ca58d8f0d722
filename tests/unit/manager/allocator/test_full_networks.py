"""Of two networks one is full: what waits for it keeps nothing of the other."""

import asyncio
from random import Random

from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.allocator.allocations import Allocations
from skep.manager.allocator.loop import Allocator
from skep.model.network import Network
from skep.model.service import NetworkAttachmentConfig, Service
from skep.model.task import TaskState, TaskStatus
from skep.model.values.ids import new_id
from skep.store.memory import MemoryStore
from tests.support.builders import a_service_spec, a_task, an_overlay
from tests.support.managers.counted_calls import calls_of
from tests.support.managers.wire_rig import until

ATTEMPTS = 20
NET = an_overlay("a-net")
FULL = an_overlay("b-net", subnet="10.0.9.0/30")
"""Its only address of a service is taken."""


async def test_a_service_that_waits_for_a_full_network_keeps_no_addresses_of_another() -> None:
    store = MemoryStore(SystemClock())
    allocator = Allocator(store, SystemClock(), new_id, Random(1))

    def put_service(name: str, *networks: Network) -> Service:
        spec = a_service_spec(name)
        targets = tuple(NetworkAttachmentConfig(target=network.id) for network in networks)
        spec = replace(spec, task_template=replace(spec.task_template, networks=targets))
        return Service(id=name, spec=spec)  # type: ignore[arg-type]

    for one in (NET, FULL, put_service("first", FULL), put_service("second", FULL)):
        await store.update(lambda tx, one=one: tx.put(one))

    def attempts() -> int:
        return sum(call["network"].id == FULL.id for call in calls.of(Allocations.allocate_virtual))

    with calls_of(Allocations.allocate_virtual) as calls:
        async with asyncio.TaskGroup() as group:
            running = group.create_task(allocator.run())
            await until(lambda: attempts() >= 2)
            both = await store.update(lambda tx: tx.put(put_service("both", NET, FULL)))
            task = replace(a_task("t1", service=both), status=TaskStatus(state=TaskState.NEW))
            await store.update(lambda tx: tx.put(task))
            before = attempts()
            for number in range(ATTEMPTS):
                changed = replace(FULL, spec=replace(FULL.spec, labels={"change": str(number)}))
                await store.update(lambda tx, changed=changed: tx.put(changed))
                await until(lambda number=number: attempts() > before + number)
            running.cancel()
    assert allocator.state.allocations.addresses.usage(NET).used == 0
