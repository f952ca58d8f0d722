"""The scheduler alone, as SwarmKit's own Go benchmark measures its: nodes and tasks are there, until all are assigned.

::

    .venv/bin/python -m bench.scheduling --nodes 1000 --tasks 10000 --plugin

One operation: a fresh in-memory store with READY nodes (with ``--plugin`` every third of them has the network plugin
that each task asks for) and PENDING tasks, each of a service of its own.  The clock runs from the start of the
scheduler, which takes everything into its books first, until every task was seen assigned.  SwarmKit's clock also holds
the commit of one transaction that creates all objects; transactions as large as that do not exist here, so it is told
apart (``created``).
"""

import argparse
import asyncio
import gc
import statistics
import time
from random import Random

from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.scheduler.loop import Scheduler
from skep.model.ids import NetworkId, NodeId, ServiceId, TaskId, new_id
from skep.model.meta import Driver
from skep.model.network import Network
from skep.model.node import (
    EngineDescription,
    EnginePlugin,
    Node,
    NodeDescription,
    NodeSpec,
    NodeState,
    NodeStatus,
)
from skep.model.service import (
    Placement,
    PlacementPreference,
    ResourceRequirements,
    Resources,
    SpreadOver,
    TaskSpec,
)
from skep.model.task import NetworkAttachment, Task, TaskState, TaskStatus
from skep.store.interface import Transaction, Updated
from skep.store.memory import MemoryStore

PLUGIN = EnginePlugin(type="Network", name="network")
ZONES = 3


def main() -> None:
    """Print the seconds of each repetition, and the median."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument(
        "--plugin", action="store_true", help="only every third node has what the tasks ask for"
    )
    parser.add_argument(
        "--wishes", action="store_true", help="constraints, reservations and a spread preference as well"
    )
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    seconds = []
    for _ in range(options.repeat):
        gc.collect()
        seconds.append(asyncio.run(operation(options.nodes, options.tasks, options.plugin, options.wishes)))
        print(f"assigned in {seconds[-1]:.3f} s", flush=True)
    print(f"median {statistics.median(seconds):.3f} s, smallest {min(seconds):.3f} s")


async def operation(nodes: int, tasks: int, has_plugin: bool, has_wishes: bool) -> float:
    """Seconds until all ``tasks`` are assigned to ``nodes``."""
    clock = SystemClock()
    store = MemoryStore(clock)
    began = time.perf_counter()
    await store.update_each(_create, [_node(number, has_plugin) for number in range(nodes)])
    await store.update_each(_create, [_task(number, has_plugin, has_wishes) for number in range(tasks)])
    print(f"created in {time.perf_counter() - began:.3f} s, ", end="")
    async for term in store.terms(NodeId("m1"), ""):
        scheduler = Scheduler(term, clock, new_id, Random(1))
        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            assigned = group.create_task(_all_assigned(store, tasks))
            await asyncio.sleep(0)  # it watches
            running = group.create_task(scheduler.run())
            await assigned
            took = time.perf_counter() - began
            running.cancel()
        return took
    raise AssertionError("never elected")


def _create(tx: Transaction, object: Node | Task) -> None:
    tx.put(object)


async def _all_assigned(store: MemoryStore, wanted: int) -> None:
    seen = 0
    async with store.watch(Task) as watch:
        async for commit in watch:
            for event in commit.events:
                match event:
                    case Updated(_, Task() as task):
                        seen += task.status.state is TaskState.ASSIGNED
            if seen >= wanted:
                return


def _node(number: int, has_plugin: bool) -> Node:
    plugins = (PLUGIN,) if has_plugin and number % 3 == 0 else ()
    return Node(
        id=NodeId(f"node{number}"),
        spec=NodeSpec(labels={"zone": f"z{number % ZONES}", "disk": "ssd" if number % 2 else "hdd"}),
        status=NodeStatus(state=NodeState.READY),
        description=NodeDescription(
            hostname=f"name{number}",
            engine=EngineDescription(plugins=plugins),
            resources=Resources(nano_cpus=256_000_000_000, memory_bytes=1 << 40),
        ),
    )


def _task(number: int, has_plugin: bool, has_wishes: bool) -> Task:
    spec = TaskSpec()
    if has_wishes:
        spread = PlacementPreference(spread=SpreadOver(spread_descriptor="node.labels.zone"))
        spec = TaskSpec(
            placement=Placement(constraints=("node.labels.disk == ssd",), preferences=(spread,)),
            resources=ResourceRequirements(
                reservations=Resources(nano_cpus=10_000_000, memory_bytes=1 << 20)
            ),
        )
    task = Task(
        id=TaskId(f"task{number:07}"),
        service_id=ServiceId(f"service{number}"),
        spec=spec,
        status=TaskStatus(state=TaskState.PENDING),
        desired_state=TaskState.RUNNING,
    )
    if not has_plugin:
        return task
    network = Network(id=NetworkId("net"), driver_state=Driver(name=PLUGIN.name))
    return replace(task, networks_attachments=(NetworkAttachment(network=network),))


if __name__ == "__main__":
    main()
