"""One simulated life of a node's containers, with users, restart policies, faults and crashes.  Afterwards, all rules
must hold.

``simulate(seed)`` returns all violations.  The same seed produces the same run.
"""

import asyncio
import traceback
import warnings
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from functools import partial
from random import Random
from typing import Any

from msgspec.structs import replace

from sim.containers.faults import CALLS, Crash, Faults
from sim.containers.node import NodeProcess, is_up, port_of
from sim.containers.outcomes import Outcome, contradictions
from sim.containers.rules import (
    DECISIVE,
    Request,
    leftovers,
    misreported,
    unadopted,
    unchanged,
    unprobed,
    untold,
    unwanted,
)
from sim.containers.world import World
from sim.run import RunResult
from sim.world.time import VirtualClock, VirtualLoop
from skep.engine.containers.container import (
    Container,
    ContainerConfig,
    ExecConfig,
    NewContainer,
    PlainOptions,
    RestartPolicy,
)
from skep.engine.engine import Engine
from skep.engine.lifecycle.restart import LONGEST_DELAY_S
from skep.errors import AlreadyExists, FailedPrecondition, NotFound, SkepError
from skep.model.container import HealthConfig
from skep.model.networks.sandbox import EndpointRequest, NetworkMode
from skep.model.values.ids import ContainerId
from skep.model.values.times import SECOND_NS

CLIENTS = 3
STEPS = 8
"""Number of requests of each client."""
CONTAINERS = 2
"""Number of containers that exist at a time."""
PAUSES_S = (0.0, 0.01, 0.1, 1.0, 8.0)
RATES = (0.0, 0.02, 0.06, 0.15)
FOCUSED = 0.6
"""Share of the runs in which one kind of call fails more often than others, so that its failures meet each other."""
DISCONNECTS = 0.15
"""Share of the requests whose client disconnects."""
REQUEST_S_MAX = 600.0
"""Seconds within which a request must end, whatever hangs."""
SETTLED_S = 150.0
"""Seconds from the last fault and request until the rules must hold.  They suffice for sweeps, and for the longest
delay of a restart.
"""
UNLOCKED_S = 10
"""Seconds within which an operation without faults ends."""
TURNS_MAX = 100_000
CHECK = HealthConfig(
    test=("CMD", "x"), interval=10 * SECOND_NS, timeout=5 * SECOND_NS, start_interval=SECOND_NS, retries=2
)
NETWORKS = ("front", "back", "bridge")
DECIDING = DECISIVE | {"pause", "unpause", "retire", "update"}
"""Requests that change the process or resources of a container, or whether its policy applies."""
POLICIES = ("no", "always", "unless-stopped", "on-failure")
KINDS = (
    *("start", "start", "start", "stop", "stop", "kill", "restart"),
    *("pause", "pause", "unpause", "remove", "force", "rename", "update", "retire"),
    *("exec", "exec", "connect", "connect", "disconnect", "rename", "update", "signal"),
)


def simulate(seed: int, steps: int = STEPS) -> RunResult:
    """Run the simulation of ``seed``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # coroutines of a crashed process that never began
        run = Run(seed, steps)
        try:
            return run.result()
        finally:
            run.close()


class Run:
    """One run."""

    def __init__(self, seed: int, steps: int) -> None:
        self.seed = seed
        self.random = Random(seed)
        self.loop = VirtualLoop(TURNS_MAX, seed)
        self.loop.set_exception_handler(lambda *_: None)  # errors of crashed processes
        self.clock = VirtualClock(self.loop)
        self.world = World(self.loop, Random(seed + 1))
        faults, focus = Random(seed + 2), ""
        if faults.random() < FOCUSED:
            focus = faults.choice(CALLS)
        self.faults = Faults(faults, self.clock, self.random.choice(RATES), focus)
        self.steps = steps
        self.requests: list[Request] = []
        self.crashes_s: list[float] = []
        self.violations: list[str] = []
        self.trace: list[str] = []
        self.node: NodeProcess | None = None
        self._own: set[asyncio.Task[Any]] = set()
        """Tasks that do not belong to a node process."""
        self._ids: list[ContainerId] = []

    def result(self) -> RunResult:
        try:
            self.loop.run_until_complete(self._whole())
        except Exception:
            self.violations.append(traceback.format_exc())
        return RunResult(self.seed, [*self.violations, *self.world.violations], self.trace)

    def close(self) -> None:
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        with suppress(BaseException):
            self.loop.run_until_complete(asyncio.sleep(0))
        self.loop.close()

    # --- the run ------------------------------------------------------------------------------------------------

    async def _whole(self) -> None:
        self._adopt_task(asyncio.current_task())
        supervisor = self._adopt_task(asyncio.create_task(self._supervise()))
        users = [self._adopt_task(asyncio.create_task(self._use(number))) for number in range(CLIENTS)]
        _, stuck = await asyncio.wait(users, timeout=CLIENTS * self.steps * REQUEST_S_MAX)
        self.faults.rate = 0.0
        if stuck:
            self.violations.append(f"{len(stuck)} clients wait for ever")
        await asyncio.wait([supervisor], timeout=SETTLED_S)
        await self._check()
        supervisor.cancel()
        if self.node is not None:
            self.node.crash()
            await self._end_all()

    async def _check(self) -> None:
        assert self.node is not None, "it is running"
        engine = self.node.engine
        before = dict(self.world.attempts)
        waiting = [one.id for one in engine.list() if one.is_restarting]
        await self.clock.sleep(LONGEST_DELAY_S + 10.0)
        for id in waiting:
            present = engine.get(id)
            if present.is_restarting and self.world.attempts[id] == before.get(id, 0):
                self.violations.append(f"{id[:4]} is not restarted by its policy")
        ended = self._ended_execs(engine)
        await self.clock.sleep(1.0)  # a probe may be starting or ending at this moment
        for exec_id in self._ended_execs(engine) & ended:
            self.violations.append(f"exec {exec_id[:4]} has ended, and it counts as running")
        await self._calm()
        self.violations += leftovers(self.world, engine.list())
        self.violations += unprobed(engine.list(), self.clock.now_ns())
        self.violations += untold(engine.list(), engine.events.recent(0))
        self.violations += misreported(self.world, engine.list())
        self.violations += unchanged(engine.list(), self.requests)
        for name in {str(one.wanted) for one in self.requests if one.kind == "rename"}:
            if engine.has(name) and engine.get(name).name != name:
                self.violations.append(f"the name {name} is taken by a container with another")
        self.violations += unwanted(self.world, engine.list(), self.requests, self.crashes_s)
        for id in self._ids:
            for _ in range(UNLOCKED_S):  # its policy may start it at this moment
                if not engine.lifecycle.locks.is_held(id):
                    break
                await self.clock.sleep(1.0)
            else:
                self.violations.append(f"{id[:4]} is locked")

    async def _check_adopted(self, node: NodeProcess) -> None:
        """Check the containers of earlier processes as soon as all are adopted."""
        began_s, engine, earlier = self.loop.time(), node.engine, set(self.world.records)
        await engine.lifecycle.adoption.is_complete.wait()
        requested = {one.id for one in self.requests if one.issued_s >= began_s and one.kind in DECIDING}
        for one in engine.list() if node.is_alive else ():
            if one.id in earlier - requested and self._is_idle(engine, one.id):
                is_watched = engine.lifecycle.is_watched(one.id)
                self.violations += unadopted(self.world, one, is_watched=is_watched)

    @staticmethod
    def _is_idle(engine: Engine, id: ContainerId) -> bool:
        """Return whether nothing changes a container at this moment, neither an operation nor the end of its run."""
        lifecycle = engine.lifecycle
        if lifecycle.locks.is_held(id):
            return False
        return not (engine.has(id) and lifecycle.is_watched(id) and not is_up(engine.get(id)))

    def _ended_execs(self, engine: Engine) -> set[str]:
        """Return the execs that count as running and have no process."""
        running = [exec.id for one in engine.list() for exec in engine.execs.of(one.id)]
        processes = self.world.execs
        return {id for id in running if id not in processes or processes[id].exit_code is not None}

    async def _calm(self) -> None:
        """Wait until no container is starting or ending."""
        for _ in range(400):
            if self._is_calm():
                return
            await self.clock.sleep(0.05)

    def _is_calm(self) -> bool:
        """Return whether no operation or end of a run is in progress: resources may have no owner meanwhile."""
        assert self.node is not None, "it is running"
        lifecycle = self.node.engine.lifecycle
        return not any(
            lifecycle.locks.is_held(one.id) or lifecycle.is_watched(one.id) != is_up(one) or self._ends(one)
            for one in self.node.engine.list()
        )

    def _ends(self, container: Container) -> bool:
        """Return whether the process has ended and the record does not show that yet."""
        process = self.world.processes.get(container.id)
        return is_up(container) and process is not None and process.exit_code is not None

    async def _supervise(self) -> None:
        """Run one node process after the other."""
        while True:
            node = NodeProcess(self.world, self.faults, self.clock, self.random)
            self.faults.on_crash = node.crash
            self.node = node
            running = asyncio.create_task(node.run())
            crashed = self._adopt_task(asyncio.create_task(node.crashed.wait()))
            checking = self._adopt_task(asyncio.create_task(self._check_adopted(node)))
            await asyncio.wait([running, crashed], return_when=asyncio.FIRST_COMPLETED)
            checking.cancel()
            if not node.is_alive:
                self._note("crash")
                self.crashes_s.append(self.loop.time())
                self.world.lost |= self.world.unwritten
                # The next process deletes processes, and unmounts volumes once it has adopted all containers.
                self.world.unfreed -= {("process", id) for id in self.world.directories}
                self.world.unfreed |= {("volume", id) for id in self.world.volumes}
            elif running.done() and not running.cancelled():
                self.violations.append(f"the engine ended: {running.exception()!r}")
                node.crash()
            await self._end_all()
            await self.clock.sleep(self.random.choice(PAUSES_S))

    async def _end_all(self) -> None:
        """End the tasks of a crashed process."""
        for _ in range(50):
            left = [one for one in asyncio.all_tasks() if one not in self._own]
            if not left:
                return
            for task in left:
                task.cancel()
            await asyncio.sleep(0)

    def _adopt_task(self, task: "asyncio.Task[Any] | None") -> "asyncio.Task[Any]":
        assert task is not None, "called in a task"
        self._own.add(task)
        task.add_done_callback(self._own.discard)
        return task

    def _note(self, text: str) -> None:
        self.trace.append(f"{self.loop.time():9.3f} {text}")

    # --- users --------------------------------------------------------------------------------------------------

    async def _use(self, number: int) -> None:
        for _ in range(self.steps):
            await self.clock.sleep(self.random.choice(PAUSES_S) * self.random.random())
            while self.node is None or not self.node.accepts_requests:
                await self.clock.sleep(0.05)
            node = self.node
            if len(self._ids) < CONTAINERS:
                await self._create(node, number)
            else:
                kind = self.random.choice(KINDS)
                await self._request(node, kind, self.random.choice(self._ids))

    async def _create(self, node: NodeProcess, number: int) -> None:
        policy = self.random.choice(POLICIES)
        restart = RestartPolicy(name=policy, attempts_max=2 if policy == "on-failure" else 0)
        plain = PlainOptions(mode=NetworkMode.BRIDGE, restart=restart)
        is_task = self.random.random() < 0.35
        check = CHECK if self.random.random() < 0.4 else None
        config = ContainerConfig(path="x", ports=port_of(self.random.choice((0, 80, 81))), healthcheck=check)
        name = f"c{number}-{self.random.getrandbits(32):x}"
        new = NewContainer(
            name=name, image="i", image_id="i", layers=(), config=config, plain=None if is_task else plain
        )
        created = await self._ask(node, f"create {name}", node.engine.add(new))
        if isinstance(created, Exception) and node.is_alive:
            self._check_undone(node)
        if isinstance(created, Container):
            if node.is_alive and created.id not in self.world.roots:
                self.violations.append(f"{created.id[:4]} was created without its root")
            if node.is_alive and created.id not in self.world.records:
                self.violations.append(f"{created.id[:4]} was created without its record")
            if node.is_alive and is_task and created.id not in self.world.namespaces:
                self.violations.append(f"{created.id[:4]} was created without its namespace")
            self._ids.append(created.id)
            self.world.behaviors[created.id] = self.random.choice((0.0, 0.3, 1.0))

    def _check_undone(self, node: NodeProcess) -> None:
        """Check that a failed creation has left no namespace.  The sweep would find it later."""
        known = {one.id for one in node.engine.list()} | {id for _, id in self.world.unfreed}
        for id in sorted((self.world.namespaces.keys() & node.attached) - known):
            self.violations.append(f"a namespace of {id[:4]} is left by its creation")

    async def _request(self, node: NodeProcess, kind: str, id: ContainerId) -> None:
        engine = node.engine
        shown = "remove" if kind == "force" else kind
        request = Request(shown, id, self.loop.time(), self.world.starts[id], is_forced=kind == "force")
        request.wanted = self._wanted(kind)
        before, issued_ns = engine.get(id) if engine.has(id) else None, self.clock.now_ns()
        self.requests.append(request)
        secret = ("A=b",) if len(self.requests) % 2 else ()
        network = str(request.wanted)
        works: dict[str, Callable[[], Coroutine[Any, Any, Any]]] = {
            "start": lambda: engine.start(id, secret_env=secret),
            "stop": lambda: engine.stop(id, self.random.choice((0.0, 1.0, 10.0))),
            "kill": lambda: self._kill(node, id),
            "signal": lambda: engine.kill(id, "SIGTERM"),
            "restart": lambda: engine.stop_and_start(id, 1.0),
            "pause": lambda: engine.pause(id),
            "unpause": lambda: engine.unpause(id),
            "remove": lambda: engine.remove(id),
            "force": lambda: engine.remove(id, force=True),
            "retire": lambda: engine.retire(id),
            "rename": lambda: engine.rename(id, str(request.wanted)),
            "update": lambda: engine.update(id, partial(_with_limit, request.wanted)),
            "exec": lambda: self._exec(node, id),
            "connect": lambda: engine.networks.connect(id, EndpointRequest(network=network)),
            "disconnect": lambda: engine.networks.disconnect(id, network),
        }
        runs = self._is_up(id) or (engine.has(id) and is_up(engine.get(id)))  # its end may be unrecorded yet
        outcome = await self._ask(node, f"{kind} {id[:4]}", works[kind]())
        if isinstance(outcome, bool) and node.is_alive and self._is_alone(request):
            self._check_frozen(kind, id)
        if outcome is not None and node.is_alive and kind == "signal" and not isinstance(outcome, Exception):
            self._check_thawed(id, request)
        is_told = kind == "start" and isinstance(outcome, Container)
        if is_told and not runs and self.world.starts[id] == request.starts_before:
            self.violations.append(f"{id[:4]} was not started, and its user was told that it was")
        began = is_told and self.world.starts[id] == request.starts_before + 1 and self._is_alone(request)
        if (
            began
            and not runs
            and isinstance(outcome, Container)
            and outcome.plain is None
            and self.world.environments[id] != secret
        ):
            self.violations.append(f"{id[:4]} runs with other secrets than its user gave it")
        if isinstance(outcome, NotFound) and id in self._ids:
            self._ids.remove(id)
        request.outcome = "refused" if isinstance(outcome, Exception) else (outcome and "done") or "unknown"
        if request.outcome != "unknown":
            request.ended_s = self.loop.time()
        if outcome is not None and node.is_alive and self._is_alone(request):
            after = engine.get(id) if engine.has(id) else None
            seen = Outcome(
                request, outcome, before, after, self._is_idle(engine, id), engine.events.recent(issued_ns)
            )
            self.violations += contradictions(self.world, seen)
        if shown == "remove" and request.outcome == "done" and id in self._ids:
            self._ids.remove(id)

    def _wanted(self, kind: str) -> str | int:
        """Return the name, network or limit that a request asks for."""
        match kind:
            case "rename":
                return f"r{self.random.getrandbits(32):x}"
            case "update":
                return self.random.randrange(1, 1000)
            case "connect" | "disconnect":
                return self.random.choice(NETWORKS)
        return ""

    async def _exec(self, node: NodeProcess, id: ContainerId) -> None:
        execs = node.engine.execs
        exec_id = execs.create(id, ExecConfig(command=("true",)))
        (await execs.start(exec_id)).close()
        if self.random.random() < 0.5:
            await execs.wait(exec_id)

    def _is_alone(self, request: Request) -> bool:
        """Return whether no other request of its container was in progress at the same time."""
        own = [one for one in self.requests if one.id == request.id and one is not request]
        return not any(one.overlaps(request) for one in own)

    def _check_frozen(self, kind: str, id: ContainerId) -> None:
        process = self.world.processes.get(id)
        if process is None or process.exit_code is not None or kind not in ("pause", "unpause"):
            return
        if process.is_frozen != (kind == "pause"):
            self.violations.append(f"{id[:4]}: its user was told of a {kind} that was not done")

    def _check_thawed(self, id: ContainerId, request: Request) -> None:
        """Check that a signal that may end a container has resumed it, unless that has failed."""
        process = self.world.processes.get(id)
        is_frozen = process is not None and process.exit_code is None and process.is_frozen
        if is_frozen and self.faults.rate == 0 and self._is_alone(request):
            self.violations.append(f"{id[:4]} has received SIGTERM and is still frozen")

    def _is_up(self, id: ContainerId) -> bool:
        process = self.world.processes.get(id)
        return process is not None and process.is_started

    async def _kill(self, node: NodeProcess, id: ContainerId) -> None:
        # A wait that begins after the kill would last for the next run, if another user has started it again.
        ended = asyncio.create_task(node.engine.wait(id))
        ended.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            await asyncio.sleep(0)
            await node.engine.kill(id)
            await ended
        finally:
            ended.cancel()

    async def _ask(self, node: NodeProcess, text: str, work: Coroutine[Any, Any, Any]) -> Any:
        """Return the result of a request, its error, or None if it is unknown."""
        task = asyncio.create_task(work)
        if self.random.random() < DISCONNECTS:
            await self.clock.sleep(self.random.choice(PAUSES_S) * self.random.random())
            task.cancel()
        crashed = self._adopt_task(asyncio.create_task(node.crashed.wait()))
        done, _ = await asyncio.wait(
            [task, crashed], timeout=REQUEST_S_MAX, return_when=asyncio.FIRST_COMPLETED
        )
        crashed.cancel()
        if not done:
            self.violations.append(f"{text} does not end")
            task.cancel()
        outcome: Any = None
        if task.done() and not task.cancelled():
            error = task.exception()
            outcome = error if error is not None else task.result() or True
        if isinstance(outcome, Crash):
            outcome = None
        if isinstance(outcome, Exception) and not isinstance(outcome, SkepError | OSError):
            self.violations.append(f"{text}: {outcome!r}")
        # A process may have ended before its record shows that.
        is_expected = (
            self.faults.rate > 0
            or isinstance(outcome, AlreadyExists | NotFound | FailedPrecondition)
            or "no running process" in str(outcome)
        )
        if isinstance(outcome, Exception) and not is_expected:
            self.violations.append(f"{text} failed without a fault: {outcome}")
        result = "unknown" if outcome is None else outcome if isinstance(outcome, Exception) else "done"
        self._note(f"{text}: {result}")
        return outcome


def _with_limit(limit: str | int, container: Container) -> Container:
    return replace(container, config=replace(container.config, pids=int(limit)))


def failing(seeds: Sequence[int]) -> list[RunResult]:
    """Return the runs with violations."""
    return [result for result in map(simulate, seeds) if result.violations]
