"""Recovery of a cluster of three managers and two workers from a lost machine, compared with real Docker Swarm.

::

    python -m bench.cluster --pairs 3
    python -m bench.cluster --pairs 5 --steps form      # only init and join
    python -m bench.cluster --pairs 3 --steps update    # rolling updates
    python -m bench.cluster --pairs 3 --steps drain     # a node with 100 tasks
    python -m bench.cluster --pairs 5 --steps idle,alone --managers 1    # idle processor time and memory

Each round creates fresh machines of one system, measures, and removes them.  The systems take turns, so only one is
on the machine at a time.  To lose a leader, first its cable is cut and then its power, so that it cannot send a last
packet.
"""

import argparse
import os
import platform
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

from bench.cluster_lab import MANAGERS, RESPONSE_S, ClusterLab, System, answered, engine, until
from bench.docker_lab import put_engine_first
from bench.engine import EngineError
from bench.facts import fsync
from bench.machine import noise
from bench.rollouts import ORDERS, REPLICAS, TIMES, rolling_update
from bench.run import commit, keep
from bench.scenarios import WORKLOAD
from skep.errors import SkepError
from skep.playground.description import PlaygroundNode

SETTLE_S = 4.0
"""Seconds to wait after new machines have started, so that the start of the daemons is not part of ``init``."""
NEW_S = 15.0
"""Seconds for which a cluster is new.  A manager of Skep waits longer for nodes that it adopts in its first 12 s."""

REST_S, WATCHED_S = 10.0, 60.0
"""Seconds to wait before the idle cost of a new cluster is measured, and seconds over which processor time is
measured.
"""
RETRY_S = 0.02
DRAINED = 100
"""Tasks of the drained node."""
DRAIN_POLL_S = 1.0
"""Seconds between two polls during a drain.  The list has twice as many tasks as during the start, so frequent polls
would slow down the drain more than the start.  The measured ends are the times that the nodes have reported.
"""
Values = dict[str, list[float]]


class Round:
    """One cluster's lifetime.  ``values`` has the measurements so far, ``{metric: values}``."""

    def __init__(self, lab: ClusterLab, steps: frozenset[str]) -> None:
        self.lab, self._steps = lab, steps
        self.values: Values = {}
        self.noise: list[float] = []
        self.facts: dict[str, str] = {}

    def run(self) -> None:
        """Measure everything.  After an error, which is raised, ``values`` has the earlier measurements."""
        self._say("machines come up")
        self.lab.up()
        time.sleep(SETTLE_S)
        self._form()
        first = self.lab.nodes[0]
        self.facts = {
            "version": self.lab.version(),
            "machines": f"{len(self.lab.managers)} managers, {len(self.lab.workers)} workers",
            "fsync": fsync(Path(first.netns), list(first.pids)),
        }
        steps: dict[str, Callable[[], None]] = {
            "idle": self._idle,
            "update": self._update,
            "drain": self._drain,
            "worker": lambda: self._lose_worker(0, "worker killed", self.lab.kill, self.lab.start),
            "cable": lambda: self._lose_worker(
                1,
                "worker's cable out",
                lambda node: self.lab.cable(node, connected=False),
                lambda node: self.lab.cable(node, connected=True),
            ),
            "leader": self._lose_leader,
            "alone": self._alone,
        }
        for name, step in steps.items():
            if name in self._steps:
                step()

    # -- steps -----------------------------------------------------------------------------------------------------

    def _form(self) -> None:
        self.noise.append(noise())
        self._take("swarm init, s", self.lab.init)
        for node in self.lab.nodes[1:]:
            began = time.monotonic()
            self._take(f"swarm join of a {node.role}, s", lambda node=node: self.lab.join(node))  # type: ignore[misc]
            self._wait_ready(self.lab.nodes.index(node) + 1)
            self._note(f"swarm join of a {node.role} to listed ready, s", time.monotonic() - began)

    def _idle(self) -> None:
        """Measure memory and processor share of each machine, without services."""
        time.sleep(REST_S)
        before = {node.name: self.lab.processor_s(node) for node in self.lab.nodes}
        began = time.monotonic()
        time.sleep(WATCHED_S)
        managers = len(self.lab.managers)
        where = "" if managers == MANAGERS else f" in a cluster with {managers} manager"
        for node in self.lab.nodes:
            spent = (self.lab.processor_s(node) - before[node.name]) / (time.monotonic() - began)
            self._note(f"idle {node.role}{where}, % of a processor", spent * 100)
        for node in self.lab.nodes:
            self._note(f"idle {node.role}{where}, memory (PSS), MiB", self.lab.memory_mib(node))

    def _alone(self) -> None:
        """Measure a worker's memory while no other process maps the same files.  This ends the cluster."""
        left = self.lab.workers[0]
        for node in self.lab.nodes:
            if node.name != left.name:
                self.lab.kill(node)
        self._note("idle worker alone, memory (PSS), MiB", self.lab.memory_mib(left))

    def _update(self) -> None:
        """Measure rolling updates in both orders, on all machines."""
        via = engine(self.lab.nodes[0])
        service = self._service("rolled", REPLICAS)
        for round in range(TIMES * len(ORDERS)):
            self.noise.append(noise())
            for metric, value in rolling_update(via, service, ORDERS[round % len(ORDERS)], round).items():
                self._note(metric, value)
        self._remove(service)

    def _drain(self) -> None:
        """Measure the drain of a worker with many tasks, compared with the start of as many tasks on it.

        Each worker has a processor of its own, like machines.  Otherwise the stops would take the starts' time.
        """
        first, second = self.lab.workers
        self.lab.give_processors(self.lab.workers)
        ids, via = self.lab.ids(), engine(self.lab.nodes[0])
        self._set_availability(second.name, "pause")
        self.noise.append(noise())
        began = time.time()
        service: str = via.post(
            "/services/create", self._spec("many", DRAINED, Constraints=["node.role==worker"])
        )["ID"]
        until(
            lambda: len(self._running(via, service)) >= DRAINED, f"{DRAINED} tasks run", poll_s=DRAIN_POLL_S
        )
        started_s = self._last_report(via, service) - began
        self._set_availability(second.name, "active")
        time.sleep(SETTLE_S)
        began = time.time()
        self._set_availability(first.name, "drain")

        def moved() -> bool:
            is_empty = not engine(first).get("/containers/json")
            return is_empty and len(self._running(via, service, without=ids[first.name])) >= DRAINED

        until(moved, f"{first.name} has no tasks", poll_s=DRAIN_POLL_S)
        drained_s = self._last_report(via, service) - began
        self._note(f"start of {DRAINED} tasks on one node, s", started_s)
        self._note(f"drain of a node with {DRAINED} tasks, s", drained_s)
        self._note("drain, in times of the start", drained_s / started_s)
        self._remove(service)
        self._set_availability(first.name, "active")

    def _last_report(self, via: Any, service: str) -> float:
        """Return the Unix time at which the last task of a service reached its state on its node."""
        tasks = via.get("/tasks", filters={"service": [service]})
        return max(datetime.fromisoformat(task["Status"]["Timestamp"]).timestamp() for task in tasks)

    def _set_availability(self, name: str, availability: str) -> None:
        via = engine(self.lab.nodes[0])
        node = via.get(f"/nodes/{self.lab.ids()[name]}")
        spec = {**node["Spec"], "Availability": availability}
        via.post(f"/nodes/{node['ID']}/update", spec, version=node["Version"]["Index"])

    def _lose_worker(
        self,
        which: int,
        what: str,
        lose: Callable[[PlaygroundNode], None],
        give_back: Callable[[PlaygroundNode], None],
    ) -> None:
        """Lose a worker, and measure the time until the service's tasks run on the other worker."""
        victim, via = self.lab.workers[which], engine(self.lab.nodes[0], RESPONSE_S)
        lost = self.lab.ids()[victim.name]
        service = self._service("standing", REPLICAS, Constraints=["node.role==worker"])
        had = len(self._running(via, service)) - len(self._running(via, service, without=lost))
        self.noise.append(noise())
        began = time.monotonic()
        lose(victim)
        down = 0.0

        def replaced() -> bool:
            nonlocal down
            if not down and any(
                one["ID"] == lost and one["Status"]["State"] == "down" for one in via.get("/nodes")
            ):
                down = time.monotonic() - began
            return len(self._running(via, service, without=lost)) >= REPLICAS

        until(replaced, f"{what}: {had} tasks run elsewhere", timeout_s=90)
        self._note(f"{what}: its tasks running elsewhere, s", time.monotonic() - began)
        if down:
            self._note(f"{what}: listed down, s", down)
        self._say(f"{what}: {had} of {REPLICAS} tasks were on it")
        give_back(victim)
        self._wait_ready(len(self.lab.nodes))
        self._remove(service)

    def _lose_leader(self) -> None:
        """Lose the leader.  Measure until a survivor accepts a write, and until its tasks run elsewhere."""
        service = self._service("standing", REPLICAS)
        leader = self.lab.leader()
        lost = self.lab.ids()[leader.name]
        via = engine(self.lab.nodes[0], RESPONSE_S)
        had = REPLICAS - len(self._running(via, service, without=lost))
        survivors = [node for node in self.lab.managers if node.name != leader.name]
        time.sleep(NEW_S)
        self.noise.append(noise())
        self.lab.cable(leader, connected=False)
        began = time.monotonic()
        writes = _Writes(survivors, lambda name: self._spec(name, 1))
        try:
            self.lab.kill(leader)
            accepted_at, survivor, written = writes.first(timeout_s=90)
        finally:
            writes.end()
        self._note("leader lost: first write accepted, s", accepted_at - began)
        through = engine(survivor, RESPONSE_S)
        until(lambda: bool(self._running(through, written, without=lost)), "the written service runs")
        self._note("leader lost: that service's task running, s", time.monotonic() - began)
        until(
            lambda: len(self._running(through, service, without=lost)) >= REPLICAS,
            f"{had} tasks of the leader run elsewhere",
        )
        self._note("leader lost: its tasks replaced, s", time.monotonic() - began)
        self._say(f"leader {leader.name} lost: {had} of {REPLICAS} tasks were on it")

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _spec(self, name: str, replicas: int, **placement: Any) -> dict[str, Any]:
        return {
            "Name": name,
            "TaskTemplate": {
                "ContainerSpec": {"Image": self.lab.image, "Command": WORKLOAD},
                "RestartPolicy": {"Condition": "any", "Delay": 0},
                "Placement": placement,
            },
            "Mode": {"Replicated": {"Replicas": replicas}},
        }

    def _service(self, name: str, replicas: int, **placement: Any) -> str:
        """Create a service, wait until all its tasks run, and return its id."""
        via = engine(self.lab.nodes[0])
        id: str = via.post("/services/create", self._spec(name, replicas, **placement))["ID"]
        until(lambda: len(self._running(via, id)) >= replicas, f"{replicas} tasks run")
        return id

    def _remove(self, service: str) -> None:
        via = engine(self.lab.nodes[0])
        via.delete(f"/services/{service}")
        until(
            lambda: all(not engine(node).get("/containers/json") for node in self.lab.nodes),
            "every container is gone",
        )

    def _running(self, via: Any, service: str, without: str = "") -> list[dict[str, Any]]:
        """Return the tasks that run and have the desired state running, except the tasks of node ``without``."""
        tasks = answered(lambda: via.get("/tasks", filters={"service": [service]}), otherwise=[])
        return [
            task
            for task in tasks
            if task["Status"]["State"] == task["DesiredState"] == "running" and task["NodeID"] != without
        ]

    def _wait_ready(self, count: int) -> None:
        first = self.lab.nodes[0]
        until(lambda: self.lab.ready(first) >= count, f"{count} nodes are ready")

    def _take(self, metric: str, act: Callable[[], None]) -> None:
        began = time.monotonic()
        act()
        self._note(metric, time.monotonic() - began)

    def _note(self, metric: str, value: float) -> None:
        self.values.setdefault(metric, []).append(value)
        self._say(f"{metric}: {value:.3g}")

    def _say(self, text: str) -> None:
        say(f"{self.lab.system}: {text}")


class _Writes:
    """Clients of all surviving managers, which retry a write until one of them succeeds."""

    def __init__(self, survivors: list[PlaygroundNode], spec: Callable[[str], dict[str, Any]]) -> None:
        self._accepted: list[tuple[float, PlaygroundNode, str]] = []
        self._seen, self._over = threading.Event(), threading.Event()
        self._threads = [
            threading.Thread(target=self._try, args=(node, spec), daemon=True) for node in survivors
        ]
        for thread in self._threads:
            thread.start()

    def first(self, timeout_s: float) -> tuple[float, PlaygroundNode, str]:
        """Return the time (monotonic), the manager that was used, and the service's id.  Raises: TimeoutError."""
        if not self._seen.wait(timeout_s):
            raise TimeoutError(f"no write was accepted within {timeout_s:g} s")
        return min(self._accepted, key=lambda accepted: accepted[0])

    def end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(2 * RESPONSE_S)

    def _try(self, node: PlaygroundNode, spec: Callable[[str], dict[str, Any]]) -> None:
        attempt = 0
        while not self._over.is_set() and not self._seen.is_set():
            attempt += 1
            try:
                id = engine(node, RESPONSE_S).post("/services/create", spec(f"by-{node.name}-{attempt}"))[
                    "ID"
                ]
            except (OSError, EngineError):
                time.sleep(RETRY_S)
                continue
            self._accepted.append((time.monotonic(), node, id))
            self._seen.set()


def main() -> None:
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that SIGTERM also removes everything
    began = time.monotonic()
    values: dict[str, dict[str, list[float]]] = {}
    noises: list[float] = []
    failures: list[str] = []
    facts: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory(prefix="skep-five-", dir=options.dir) as directory:
        if options.engine:
            put_engine_first(options.engine, Path(directory) / "engine")
        for pair in range(1, options.pairs + 1):
            for system in options.systems if pair % 2 else reversed(options.systems):
                say(f"--- pair {pair}/{options.pairs}: {system}, after {time.monotonic() - began:.0f} s")
                lab = ClusterLab(system, Path(directory) / system, options.managers)
                round = Round(lab, options.steps)
                try:
                    round.run()
                except (OSError, EngineError, SkepError, LookupError) as error:  # TimeoutError is an OSError
                    failures.append(f"pair {pair}, {system}: {error}")
                    say(f"FAILED: {failures[-1]}")
                    _keep_logs(lab, options.logs, f"{pair}-{system}")
                finally:
                    lab.down()
                noises += round.noise
                facts.setdefault(system, {}).update(round.facts)
                for metric, measured in round.values.items():
                    values.setdefault(metric, {}).setdefault(system, []).extend(measured)
    unknown = {"version": "–", "machines": "–", "fsync": "–"}
    keep(
        {
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "commit": commit(),
            "machine": f"{os.cpu_count()} processors, {platform.system()} {platform.release()}",
            "pairs": options.pairs,
            "minutes": round_minutes(time.monotonic() - began),
            "noise": noises,
            "facts": {system: facts.get(system) or unknown for system in get_args(System)},
            "values": values,
            "failures": failures,
        },
        f"-{options.engine}-cluster" if options.engine else "-cluster",
    )


def round_minutes(seconds: float) -> float:
    return round(seconds / 60, 1)


def _keep_logs(lab: ClusterLab, target: Path | None, name: str) -> None:
    """Keep the daemons' logs of a failed round, if requested."""
    if target is None:
        return
    with suppress(SkepError):
        for node in lab.nodes:
            log = Path(node.endpoint.removeprefix("unix://")).with_name("skep.log")
            if log.exists():
                target.mkdir(parents=True, exist_ok=True)
                (target / f"{name}-{node.name}.log").write_bytes(log.read_bytes())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.cluster", description="A cluster that loses machines, beside Docker's."
    )
    parser.add_argument("--pairs", type=int, default=3, help="rounds of each system (default 3)")
    parser.add_argument(
        "--dir", default="/var/tmp", help="where the machines keep their state; not on overlayfs"
    )
    parser.add_argument(
        "--engine", default="", help="Debian suite of the Docker Engine, default this machine's"
    )
    parser.add_argument(
        "--managers", type=int, default=MANAGERS, help="number of managers, three or more to lose the leader"
    )
    parser.add_argument("--systems", type=lambda text: text.split(","), default=list(get_args(System)))
    parser.add_argument(
        "--steps",
        type=lambda text: frozenset(text.split(",")),
        default=frozenset({"idle", "update", "drain", "worker", "cable", "leader", "alone"}),
        help="comma-separated: form, idle, update, drain, worker, cable, leader, alone (default all);"
        " init and join always are",
    )
    parser.add_argument(
        "--logs", type=Path, default=None, help="keep the daemons' logs of failed rounds here"
    )
    return parser.parse_args()


def say(text: str) -> None:
    print(f"{datetime.now(UTC):%H:%M:%S} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
