"""Thousands of simulated agents on one manager: register, one task each, its status back.

::

    python -m bench.dispatching --agents 500,1000,2000

The figures to compare with are SwarmKit's (its dispatcher on its in-memory store, agents in the same process): here
the store is the one in memory, too, and the agents are a second process, as SwarmKit's used both processors.  Each
agent has a certificate and a TLS connection of its own and keeps its streams open; 50 register at a time.
"""

import argparse
import asyncio
import json
import logging
import os
import resource
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import structlog

from bench.machine import noise
from bench.run import RESULTS, commit
from skep.aio.clock import SystemClock
from skep.manager.dispatcher.loop import Dispatcher
from skep.manager.dispatcher.messages import ManagerPeer
from skep.model.ids import ClusterId, NodeId, TaskId, new_id
from skep.model.node import Node, NodeDescription, NodeRole
from skep.model.swarm import DEFAULT_SWARM_SPEC, DispatcherConfig, Swarm, SwarmSpec
from skep.model.task import Task, TaskState, TaskStatus
from skep.model.times import SECOND_NS
from skep.security import keypair
from skep.security.authority import Authority
from skep.security.identity import Identity
from skep.security.keypair import KeyPair
from skep.security.keys import new_private_key, private_pem, signing_request
from skep.security.tls import MANAGER_NAME, ServerTls, client_context
from skep.store.interface import Object, Transaction
from skep.store.memory import MemoryStore
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire import swarm_pb2 as pb
from skep.wire.client import Channel, connected
from skep.wire.convert.node import description_to_pb
from skep.wire.convert.task import status_to_pb
from skep.wire.server import TLS_READ_BYTES, serve

REGISTERING_AT_ONCE = 50
HEARTBEAT_S = 5
SWARMKIT: dict[int, dict[str, float]] = {
    100: {"register_s": 0.185, "commit_and_assign_s": 0.105, "status_s": 0.101, "memory_mib": 74},
    500: {"register_s": 1.035, "commit_and_assign_s": 0.137, "status_s": 0.126, "memory_mib": 266},
    1000: {"register_s": 2.009, "commit_and_assign_s": 0.232, "status_s": 0.133, "memory_mib": 517},
    2000: {"register_s": 4.249, "commit_and_assign_s": 0.764, "status_s": 0.444, "memory_mib": 800},
}
"""Go 1.19.8, 2 processors, the commit that dockerd 20.10.24 has."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.dispatching", description=__doc__)
    parser.add_argument("--agents", type=_counts, default=(500, 1000, 2000), help="how many, comma-separated")
    parser.add_argument("--as-agents", nargs=2, metavar=("DIRECTORY", "ADDRESS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    if options.as_agents:
        directory, address = options.as_agents
        asyncio.run(Agents(Path(directory), address).run())
        return
    busy = noise()
    measured = {}
    for count in options.agents:
        print(f"{count} agents ...", file=sys.stderr, flush=True)
        measured[count] = asyncio.run(measure(count))
    keep(measured, busy)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def keep(measured: dict[int, dict[str, float]], busy: float) -> None:
    """Write the result files.  ``busy``: share of the machine that was busy before."""
    now = datetime.now(UTC)
    path = RESULTS / f"{now:%Y-%m-%d-%H%M}-{commit()}-dispatching"
    result = {"machine_busy_before": busy, "skep": measured, "swarmkit": SWARMKIT}
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
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
    path.with_suffix(".md").write_text(text)
    print(text)


async def measure(count: int) -> dict[str, float]:
    """Seconds and MiB, by name."""
    authority, cluster = Authority.create(), ClusterId(new_id())
    clock = SystemClock()
    store = MemoryStore(clock)
    manager = NodeId("manager")
    nodes = [NodeId(f"n{number:05}") for number in range(count)]
    await store.update(lambda tx: tx.put(Swarm(id=cluster, spec=_spec())))
    await store.update_each(_put, [Node(id=id) for id in nodes])
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
            agents = await stack.enter_async_context(_agents(directory, f"127.0.0.1:{bound.port}"))
            before_mib, busy = _memory_mib(), time.process_time()
            result = {"register_s": await agents("register")}
            result["register_processor_s"] = time.process_time() - busy

            tasks = [
                Task(
                    id=TaskId(f"t{number:05}"),
                    node_id=id,
                    status=TaskStatus(state=TaskState.ASSIGNED),
                    desired_state=TaskState.RUNNING,
                )
                for number, id in enumerate(nodes)
            ]
            began, busy = time.monotonic(), time.process_time()
            waiting = asyncio.create_task(agents("assigned"))
            await store.update_each(_put, tasks)
            result["commit_s"] = time.monotonic() - began
            await waiting
            result["commit_and_assign_s"] = time.monotonic() - began
            result["assign_processor_s"] = time.process_time() - busy
            busy = time.process_time()
            result["status_s"] = await agents("status")
            result["status_processor_s"] = time.process_time() - busy
            result["memory_manager_mib"] = _memory_mib()
            result["memory_before_mib"] = before_mib
            result["memory_agents_mib"] = await agents("memory")
            running_tasks = sum(task.status.state is TaskState.RUNNING for task in store.view().find(Task))
            assert running_tasks == count, f"{running_tasks} of {count} statuses were stored"
            return result


@asynccontextmanager
async def _agents(directory: str, address: str) -> AsyncIterator[Callable[[str], Any]]:
    """The process of the agents; gives a function that has it do something and gives its figure."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.dispatching", "--as-agents", directory, address,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None

    async def ask(word: str) -> float:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{word}\n".encode())
        if not (line := await process.stdout.readline()):
            raise ConnectionError("the agents have ended: what they said is above")
        return float(line)

    try:
        await process.stdout.readline()  # ready
        yield ask
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


class Agents:
    """The other process."""

    def __init__(self, directory: Path, address: str) -> None:
        self._address = address
        self._directory = directory
        self._sessions: list[tuple[Channel, str]] = []
        self._assigned: dict[str, str] = {}
        self._all_assigned = asyncio.Event()
        self._count = 0

    async def run(self) -> None:
        asyncio.sslproto.SSLProtocol.max_size = TLS_READ_BYTES
        contexts = [client_context(keypair.load(path)) for path in sorted(self._directory.iterdir())]
        self._count = len(contexts)
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
        )
        print("ready", flush=True)
        async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
            while line := await reader.readline():
                began = time.monotonic()
                match line.decode().strip():
                    case "register":
                        await self._register(contexts, stack, group)
                    case "assigned":
                        await self._all_assigned.wait()
                    case "status":
                        await self._report()
                    case "memory":
                        print(_memory_mib(), flush=True)
                        continue
                print(time.monotonic() - began, flush=True)

    async def _register(
        self, contexts: list[ssl.SSLContext], stack: AsyncExitStack, group: asyncio.TaskGroup
    ) -> None:
        turn = asyncio.Semaphore(REGISTERING_AT_ONCE)

        async def one(tls: ssl.SSLContext) -> None:
            async with turn:
                channel = await stack.enter_async_context(
                    connected(self._address, tls, MANAGER_NAME, timeout_s=60)
                )
                call = await stack.enter_async_context(channel.stream(methods.SESSION))
                request = pb.SessionRequest(description=description_to_pb(NodeDescription(hostname="agent")))
                await call.send(request, end=True)
                message = await call.receive()
                assert message is not None
                self._sessions.append((channel, message.session_id))
            group.create_task(self._heartbeat(channel, message.session_id))
            group.create_task(self._receive(channel, message.session_id))

        await asyncio.gather(*map(one, contexts))

    async def _heartbeat(self, channel: Channel, session_id: str) -> None:
        async with channel.stream(methods.HEARTBEATS) as call:
            while True:
                await call.send(skep.Heartbeat(session_id=session_id))
                reply = await call.receive()
                assert reply is not None
                await asyncio.sleep(reply.period.seconds + reply.period.nanos / 1e9)

    async def _receive(self, channel: Channel, session_id: str) -> None:
        async with channel.stream(methods.REVISED_ASSIGNMENTS) as call:
            await call.send(pb.AssignmentsRequest(session_id=session_id), end=True)
            async for revised in call:
                for change in revised.message.changes:
                    if change.assignment.HasField("task"):
                        self._assigned[session_id] = change.assignment.task.id
                if len(self._assigned) == self._count:
                    self._all_assigned.set()

    async def _report(self) -> None:
        status = status_to_pb(TaskStatus(state=TaskState.RUNNING, message="started"))

        async def one(channel: Channel, session_id: str) -> None:
            update = pb.UpdateTaskStatusRequest.TaskStatusUpdate(
                task_id=self._assigned[session_id], status=status
            )
            request = pb.UpdateTaskStatusRequest(session_id=session_id, updates=[update])
            await channel.call(methods.UPDATE_TASK_STATUS, request, timeout_s=60)

        await asyncio.gather(*(one(channel, id) for channel, id in self._sessions))


def _spec() -> SwarmSpec:
    """Heartbeats as rare as SwarmKit's: agents that all share one processor cannot be punctual to the second."""
    dispatcher = DispatcherConfig(heartbeat_period=HEARTBEAT_S * SECOND_NS)
    return msgspec.structs.replace(DEFAULT_SWARM_SPEC, dispatcher=dispatcher)


def _put(tx: Transaction, object: Object) -> None:
    tx.put(object)


def _pair(authority: Authority, cluster: ClusterId, id: NodeId, role: NodeRole) -> KeyPair:
    key = new_private_key()
    identity = Identity(node_id=id, cluster_id=cluster, role=role)
    return KeyPair(
        certificate_pem=authority.sign(signing_request(key), identity),
        key_pem=private_pem(key),
        root_pem=authority.root_pem,
    )


def _memory_mib() -> float:
    """Resident memory of this process at present."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * resource.getpagesize() / 2**20, 1)


if __name__ == "__main__":
    main()
