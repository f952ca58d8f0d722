"""3,000 simulated nodes with 100,000 tasks on one manager: the production process, with its etcd.

::

    .venv/bin/python -m bench.thousands
    .venv/bin/python -m bench.thousands --nodes 300 --tasks 10000 --holds --keep /var/tmp/look

The nodes join with a token, register, heartbeat, take tasks and report them over the real wire.  They have no
containers (``simulated_nodes``).  The phases follow each other: the nodes register, services are created until all
tasks run, nothing happens, one node falls silent, and a service of 1,000 replicas is updated.  Meanwhile a client
sends API requests, one after another.  Event-loop lag is the manager's own measure (``/_skep/lag``).
"""

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from bench.crowd import Ask, crowd
from bench.engine import Engine, EngineError
from bench.machine import noise
from bench.manager_lab import ManagerLab, one_manager, processor_s, resident_mib
from bench.probing import Probe, lag_ms, percentile
from bench.run import commit, result_name, write_result
from skep.model.swarm import DEFAULT_SWARM_SPEC, DispatcherConfig
from skep.model.values.times import SECOND_NS

HEARTBEAT_S = 5
LARGE, REPLICAS = 1000, 300
PARALLELISM, MONITOR_S = 50, 1
STEADY_S = 30.0
LONGEST_S = 900.0
LIMIT_MS = 100.0
JUDGED = ("sessions", "steady", "node loss", "update")
"""Phases in which the lag must keep its limit.  The creation of 100,000 tasks at once is exempt."""


class Phase(msgspec.Struct, kw_only=True):
    """Observations of one phase.  ``requests_ms`` has every latency, by request."""

    name: str
    wall_s: float = 0.0
    manager_s: float = 0.0
    etcd_s: float = 0.0
    """Processor time."""
    lag_counts: list[int] = []
    lag_bounds_ms: list[int] = []
    requests_ms: dict[str, list[float]] = {}

    @property
    def lag_ms(self) -> float:
        """Return p99.9, rounded up to a bound."""
        return lag_ms(self.lag_bounds_ms, self.lag_counts)


class Result(msgspec.Struct, kw_only=True):
    """The whole result.  ``memory_mib`` has memory by moment and process."""

    nodes: int
    tasks: int
    busy: float
    phases: list[Phase] = []
    memory_mib: dict[str, dict[str, float]] = {}
    lost: int = 0
    """Tasks of the lost node."""
    sessions_closed: int = 0
    failures: list[str] = []
    """Requests that got an error response."""


def main() -> None:
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that SIGTERM also removes everything
    result = asyncio.run(measure(options))
    text = document(result)
    if options.keep is None:
        now = datetime.now(UTC)
        write_result(result_name(now, commit(), "thousands"), text, msgspec.to_builtins(result))
    print(text)


async def measure(options: argparse.Namespace) -> Result:
    """Run all phases."""
    result = Result(nodes=options.nodes, tasks=options.tasks, busy=noise())
    spec = replace(DEFAULT_SWARM_SPEC, dispatcher=DispatcherConfig(heartbeat_period=HEARTBEAT_S * SECOND_NS))
    module = "bench.holds" if options.holds else "skep.manager.process"
    place = (
        nullcontext(options.keep)
        if options.keep
        else tempfile.TemporaryDirectory(prefix="skep-thousands-", dir=options.dir)
    )
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(place))
        directory.mkdir(exist_ok=True)
        lab = stack.enter_context(one_manager(directory, spec, module=module))
        tokens = lab.engine().get("/swarm")["JoinTokens"]
        began = time.monotonic()
        nodes = await stack.enter_async_context(
            crowd("bench.simulated_nodes", str(options.nodes), lab.address, tokens["Worker"])
        )
        _say(f"{options.nodes} nodes joined in {time.monotonic() - began:.1f} s")
        await _Run(lab, nodes, result).all_phases()
    return result


class _Run:
    def __init__(self, lab: ManagerLab, nodes: Ask, result: Result) -> None:
        self._lab = lab
        self._nodes = nodes
        self._result = result
        self._probe = Probe(lab.engine())

    async def all_phases(self) -> None:
        tasks, result = self._result.tasks, self._result
        async with self._phase("sessions"):
            await self._nodes("register")
        self._weigh("without tasks")
        async with self._phase("filling"):
            large = await asyncio.to_thread(fill, self._lab.engine(), tasks)
            await self._wait_running(lambda: tasks)
        self._weigh("with all tasks")
        async with self._phase("steady"):
            await asyncio.sleep(STEADY_S)
        async with self._phase("node loss"):
            result.lost = int(await self._nodes("lose"))
            await self._wait_running(lambda: tasks)
        async with self._phase("update"):
            await asyncio.to_thread(self._update, large)
            await self._wait(lambda: self._is_completed(large), "the update is completed")
        self._weigh("at the end")
        result.sessions_closed = int(await self._nodes("closed"))
        result.failures = self._probe.failures

    @asynccontextmanager
    async def _phase(self, name: str) -> AsyncIterator[None]:
        """Send API requests during a phase, and record its costs."""
        phase = Phase(name=name)
        before, began = await asyncio.to_thread(self._figures), time.monotonic()
        async with self._probe.asking(phase.requests_ms):
            yield
        after = await asyncio.to_thread(self._figures)
        phase.wall_s = time.monotonic() - began
        phase.manager_s, phase.etcd_s = after[0] - before[0], after[1] - before[1]
        phase.lag_bounds_ms = after[2]["BoundsMs"]
        phase.lag_counts = [
            one - other for one, other in zip(after[2]["Counts"], before[2]["Counts"], strict=True)
        ]
        self._result.phases.append(phase)
        _say(_line(phase))

    def _figures(self) -> tuple[float, float, Any]:
        lag = self._lab.engine().get("/_skep/lag")
        return processor_s(self._lab.pid), processor_s(self._lab.etcd_pid), lag

    def _weigh(self, moment: str) -> None:
        self._result.memory_mib[moment] = {
            "manager": resident_mib(self._lab.pid),
            "etcd": resident_mib(self._lab.etcd_pid),
        }

    def _update(self, service: str) -> None:
        engine = self._lab.engine()
        now = engine.get(f"/services/{service}")
        spec = now["Spec"]
        spec["TaskTemplate"]["ContainerSpec"]["Env"] = ["UPDATED=1"]
        engine.post(f"/services/{service}/update", spec, version=now["Version"]["Index"])

    async def _is_completed(self, service: str) -> bool:
        shown = await asyncio.to_thread(self._lab.engine().get, f"/services/{service}")
        return (shown.get("UpdateStatus") or {}).get("State") == "completed"

    async def _wait_running(self, wanted: Callable[[], int]) -> None:
        async def are_running() -> bool:
            running = await self._nodes("running")
            _say(f"  {running:.0f} tasks run")
            return running >= wanted()

        await self._wait(are_running, "all tasks run")

    async def _wait(self, holds: Callable[[], Awaitable[bool]], what: str) -> None:
        """Wait until ``holds()`` is true.  Raises: TimeoutError."""
        deadline = time.monotonic() + LONGEST_S
        while not await holds():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}: not within {LONGEST_S:g} s")
            await asyncio.sleep(0.5)


def fill(engine: Engine, tasks: int) -> str:
    """Create services with ``tasks`` tasks in total, and return the id of the largest."""
    large = _created(engine, _service("large", min(LARGE, tasks)))
    missing = tasks - min(LARGE, tasks)
    for number, first in enumerate(range(0, missing, REPLICAS)):
        _created(engine, _service(f"service{number:04}", min(REPLICAS, missing - first)))
    return large


def _created(engine: Engine, spec: dict[str, Any]) -> str:
    """Create a service.  Retry while the manager cannot write."""
    while True:
        try:
            id: str = engine.post("/services/create", spec)["ID"]
        except EngineError as error:
            if error.status == 409:  # an earlier attempt with an error response succeeded nevertheless
                return str(engine.get(f"/services/{spec['Name']}")["ID"])
            if error.status != 503:
                raise
            _say(f"not created yet: {error}")
            continue
        return id


def _service(name: str, replicas: int) -> dict[str, Any]:
    return {
        "Name": name,
        "Labels": {"com.docker.stack.namespace": "thousands"},
        "TaskTemplate": {
            "ContainerSpec": {"Image": "busybox:1", "Command": ["sleep", "1d"]},
            "Resources": {"Reservations": {"NanoCPUs": 1_000_000, "MemoryBytes": 4 << 20}},
        },
        "Mode": {"Replicated": {"Replicas": replicas}},
        "UpdateConfig": {"Parallelism": PARALLELISM, "Monitor": MONITOR_S * SECOND_NS},
    }


def document(result: Result) -> str:
    """Return the result for people."""
    now = datetime.now(UTC)
    before, full = result.memory_mib["without tasks"], result.memory_mib["with all tasks"]
    size = f"{result.nodes:,} nodes with {result.tasks:,} tasks"
    lines = [
        f"# {size} on one manager, {now:%Y-%m-%d %H:%M UTC}, commit {commit()}",
        "",
        f"{os.cpu_count()} processors for manager, etcd, nodes and client, {result.busy:.0%} of them busy before.",
        f"Production manager and etcd; nodes over the real wire, without containers, heartbeats every {HEARTBEAT_S} s.",
        f"The node that was lost had {result.lost} tasks; the update replaced {min(LARGE, result.tasks)} tasks,",
        f"{PARALLELISM} at a time, monitored for {MONITOR_S} s. Latencies are one client's, one request after another.",
        f"Sessions that the manager ended: {result.sessions_closed}; requests that failed: {len(result.failures)}.",
        "",
        "| phase | s | processor: manager, s | etcd, s | loop lag p99.9, ms (at most) | limit | |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {phase.name} | {phase.wall_s:.1f} | {phase.manager_s:.1f} | {phase.etcd_s:.1f} "
        f"| {phase.lag_ms:g} | {_verdict(phase, phase.lag_ms)} |"
        for phase in result.phases
    ]
    lines += [
        "",
        "| phase | request | number | p50, ms | p99, ms | largest | limit | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for phase in result.phases:
        for request, took in sorted(phase.requests_ms.items()):
            p99 = percentile(took, 0.99)
            lines.append(
                f"| {phase.name} | {request} | {len(took)} | {percentile(took, 0.5):.1f} | {p99:.1f} | {max(took):.1f} "
                f"| {_verdict(phase, p99)} |"
            )
    lines += ["", "| resident memory, MiB | manager | etcd |", "|---|---|---|"]
    lines += [
        f"| {moment} | {mib['manager']:.0f} | {mib['etcd']:.0f} |"
        for moment, mib in result.memory_mib.items()
    ]
    each = {name: (full[name] - before[name]) * 1024 / result.tasks for name in full}
    lines += [f"| per task, KiB | {each['manager']:.2f} | {each['etcd']:.2f} |", ""]
    return "\n".join(lines)


def _verdict(phase: Phase, value_ms: float) -> str:
    if phase.name not in JUDGED:
        return " | "
    return f"{LIMIT_MS:g} | {'kept' if value_ms <= LIMIT_MS else '**missed**'}"


def _line(phase: Phase) -> str:
    requests = ", ".join(
        f"{name} {percentile(took, 0.5):.0f}/{percentile(took, 0.99):.0f}"
        for name, took in sorted(phase.requests_ms.items())
    )
    return (
        f"{phase.name}: {phase.wall_s:.1f} s, processor {phase.manager_s:.1f} + {phase.etcd_s:.1f} s, "
        f"lag p99.9 {phase.lag_ms:g} ms; p50/p99, ms: {requests}"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.thousands", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=3000)
    parser.add_argument("--tasks", type=int, default=100_000)
    parser.add_argument("--dir", default="/var/tmp", help="where the manager keeps its state")
    parser.add_argument("--holds", action="store_true", help="note what holds the manager's loop")
    parser.add_argument("--keep", type=Path, help="keep the state and the logs here, and no result")
    return parser.parse_args()


def _say(text: str) -> None:
    print(f"{datetime.now(UTC):%H:%M:%S} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
