"""Thousands of simulated agents on one manager: they register, get one task each, and report its status.

::

    python -m bench.dispatching --agents 500,1000,2000

The results are compared with SwarmKit's dispatcher, which was measured on its in-memory store with the agents in the
same process.  Here the store is also in memory.  The agents are a second process, because SwarmKit used both
processors.  Each agent has its own certificate and TLS connection and keeps its streams open.  50 register at a time.
"""

import argparse
import asyncio
import logging
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from random import Random

import msgspec
import structlog

from bench.crowd import crowd
from bench.machine import noise, resident_mib
from bench.run import commit, result_name, write_result
from skep.aio.clock import SystemClock
from skep.aio.event_loop import gc_settings
from skep.manager.dispatcher.loop import Dispatcher
from skep.manager.dispatcher.node_sessions.messages import ManagerPeer
from skep.model.container import ContainerSpec, FileTarget, SecretReference
from skep.model.node import Node, NodeRole
from skep.model.secret import Secret, SecretSpec
from skep.model.service import Service, ServiceSpec, TaskSpec
from skep.model.swarm import DEFAULT_SWARM_SPEC, DispatcherConfig, Swarm, SwarmSpec
from skep.model.task import Task, TaskState, TaskStatus
from skep.model.values.ids import ClusterId, NodeId, SecretId, ServiceId, TaskId, new_id
from skep.model.values.times import SECOND_NS
from skep.security import keypair
from skep.security.authority import Authority
from skep.security.identity import NodeIdentity
from skep.security.keypair import KeyPair
from skep.security.keys import new_private_key, private_pem, signing_request
from skep.security.tls import ServerTls
from skep.store.interface import Object, Transaction
from skep.store.kinds import Payload
from skep.store.memory import MemoryStore
from skep.wire.server import serve

HEARTBEAT_S = 5
SWARMKIT: dict[int, dict[str, float]] = {
    100: {"register_s": 0.185, "commit_and_assign_s": 0.105, "status_s": 0.101, "memory_mib": 74},
    500: {"register_s": 1.035, "commit_and_assign_s": 0.137, "status_s": 0.126, "memory_mib": 266},
    1000: {"register_s": 2.009, "commit_and_assign_s": 0.232, "status_s": 0.133, "memory_mib": 517},
    2000: {"register_s": 4.249, "commit_and_assign_s": 0.764, "status_s": 0.444, "memory_mib": 800},
}
"""Measured with Go 1.19.8 on 2 processors, at the SwarmKit commit that dockerd 20.10.24 uses."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.dispatching", description=__doc__)
    parser.add_argument("--agents", type=_counts, default=(500, 1000, 2000), help="how many, comma-separated")
    options = parser.parse_args()
    busy = noise()
    measured = {}
    # Each count runs in a new process, because after 1,000 agents a process has spare memory for the next ones.
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as managers:
        for count in options.agents:
            print(f"{count} agents ...", file=sys.stderr, flush=True)
            measured[count] = managers.submit(manage, count).result()
    keep(measured, busy)


def manage(count: int, secret_bytes: int = 0) -> dict[str, float]:
    """Run as the manager's process (``measure``)."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    return asyncio.run(measure(count, secret_bytes))


def _counts(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def keep(measured: dict[int, dict[str, float]], busy: float) -> None:
    """Write the result files.  ``busy`` is the share of the machine that was busy before."""
    now = datetime.now(UTC)
    result = {"machine_busy_before": busy, "skep": measured, "swarmkit": SWARMKIT}
    lines = [
        f"# Simulated agents on one manager, {now:%Y-%m-%d %H:%M UTC}, commit {commit()}",
        "",
        f"{os.cpu_count()} processors, {busy:.0%} of them busy before. SwarmKit's figures are of another run, on this",
        "machine; its memory is that of dispatcher and agents together, and they share one process.",
        "",
        "| agents | what | SwarmKit | Skep | ratio | limit |",
        "|---|---|---|---|---|---|",
    ]
    for count, skep_values in measured.items():
        swarmkit = SWARMKIT.get(count, {})
        both = skep_values["memory_manager_mib"] + skep_values["memory_agents_mib"]
        values = skep_values | {"memory_mib": both}
        for metric, value in values.items():
            beside = swarmkit.get(metric)
            limit = 0.5 if metric == "memory_mib" else 2.0
            compared = (
                f"{beside:g} | {value:.3g} | {value / beside:.2f} | {limit}"
                if beside
                else f"| {value:.3g} | |"
            )
            lines.append(f"| {count} | {metric.replace('_', ' ')} | {compared} |")
    text = "\n".join([*lines, ""])
    write_result(result_name(now, commit(), "dispatching"), text, result)
    print(text)


async def measure(count: int, secret_bytes: int = 0) -> dict[str, float]:
    """Return seconds and MiB by name.  ``secret_bytes`` is the size of a secret that every task has, or 0 for none."""
    authority, cluster = Authority.create(), ClusterId(new_id())
    clock = SystemClock()
    store = MemoryStore(clock)
    manager = NodeId("manager")
    nodes = [NodeId(f"n{number:05}") for number in range(count)]
    await store.update(lambda tx: tx.put(Swarm(id=cluster, spec=_spec())))
    await store.update_each(_put, [Node(id=id) for id in nodes])
    template = await _template(store, secret_bytes)
    own = ManagerPeer(node_id=manager, addr="127.0.0.1:1")
    dispatcher = Dispatcher(store, own, clock, new_id, Random(1))
    tls = ServerTls(_pair(authority, cluster, manager, NodeRole.MANAGER))
    with tempfile.TemporaryDirectory(prefix="skep-agents-") as directory:
        for id in nodes:
            keypair.save(_pair(authority, cluster, id, NodeRole.WORKER), Path(directory) / id)
        async with AsyncExitStack() as stack:
            bound = await stack.enter_async_context(
                serve(dispatcher.services(), host="127.0.0.1", port=0, tls=tls.front, cluster_id=cluster)
            )
            running = asyncio.create_task(dispatcher.run())
            stack.callback(running.cancel)
            agents = await stack.enter_async_context(
                crowd("bench.simulated_agents", directory, f"127.0.0.1:{bound.port}")
            )
            result: dict[str, float] = {}

            @asynccontextmanager
            async def measure_step(step: str) -> AsyncIterator[None]:
                """Measure the wall clock of a step, and the processor time of both processes."""
                ours, theirs, began = time.process_time(), await agents("processor"), time.monotonic()
                yield
                result[f"{step}_s"] = time.monotonic() - began
                result[f"{step}_manager_processor_s"] = time.process_time() - ours
                result[f"{step}_agents_processor_s"] = await agents("processor") - theirs

            before_mib = resident_mib()
            gc_settings.configure_gc()  # as a manager does
            async with measure_step("register"):
                await agents("register")

            tasks = [
                msgspec.structs.replace(
                    template,
                    id=TaskId(f"t{number:05}"),
                    node_id=id,
                    status=TaskStatus(state=TaskState.ASSIGNED),
                    desired_state=TaskState.RUNNING,
                )
                for number, id in enumerate(nodes)
            ]
            async with measure_step("commit_and_assign"):
                began = time.monotonic()
                waiting = asyncio.create_task(agents("assigned"))
                await store.update_each(_put, tasks)
                result["commit_s"] = time.monotonic() - began
                await waiting
            async with measure_step("status"):
                await agents("status")
            result["memory_manager_mib"] = resident_mib()
            result["memory_before_mib"] = before_mib
            result["memory_agents_mib"] = await agents("memory")
            running_tasks = sum(task.status.state is TaskState.RUNNING for task in store.view().find(Task))
            assert running_tasks == count, f"{running_tasks} of {count} statuses were stored"
            return result


async def _template(store: MemoryStore, secret_bytes: int) -> Task:
    """Return a task template, with a secret of this size if it is not 0."""
    if not secret_bytes:
        return Task(id=TaskId(""))
    secret = Secret(id=SecretId("s1"), spec=SecretSpec(name="key"))
    payload = Payload(id=f"secret/{secret.id}", data=os.urandom(secret_bytes))
    reference = SecretReference(
        file=FileTarget(name="key"), secret_id=secret.id, secret_name=secret.spec.name
    )
    template = TaskSpec(container_spec=ContainerSpec(image="busybox:1", secrets=(reference,)))
    service = Service(id=ServiceId("s"), spec=ServiceSpec(name="s", task_template=template))
    await store.update(lambda tx: [tx.put(one) for one in (secret, payload, service)])
    stored = store.view().get(Service, service.id)
    return Task(id=TaskId(""), service_id=stored.id, spec_version=stored.spec_version, spec=template)


def _spec() -> SwarmSpec:
    """Return a spec with a heartbeat period as long as SwarmKit's, because agents on one shared processor cannot be
    punctual to the second.
    """
    dispatcher = DispatcherConfig(heartbeat_period=HEARTBEAT_S * SECOND_NS)
    return msgspec.structs.replace(DEFAULT_SWARM_SPEC, dispatcher=dispatcher)


def _put(tx: Transaction, object: Object) -> None:
    tx.put(object)


def _pair(authority: Authority, cluster: ClusterId, id: NodeId, role: NodeRole) -> KeyPair:
    key = new_private_key()
    identity = NodeIdentity(node_id=id, cluster_id=cluster, role=role)
    return KeyPair(
        certificate_pem=authority.sign(signing_request(key), identity),
        key_pem=private_pem(key),
        root_pem=authority.root_pem,
    )


if __name__ == "__main__":
    main()
