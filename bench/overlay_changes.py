"""Time until a cluster's networks follow a change: a backend that starts or stops on ten nodes, or a dead node.

A manager and nine workers run in a playground.  Each node has a container that uses the service's virtual address, and
the first worker has a hundred.  For a backend that *stops*, the time begins when the manager takes it out of use (its
event ``drain``), after a request that scales the service down.  For a backend that *starts*, it begins when its node
sees it run.  Both end when the kernel has announced the new rules in the last of all the containers' namespaces.  For a
*dead* node, whose power was cut, the time begins when the API first shows it as down.  It ends when no other node sends
frames to it and no container directs its service there.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlencode

from bench.cluster_lab import ClusterLab, engine, until
from bench.figures import Figure, run_alone
from bench.machine import is_kept, noise
from bench.namespace_watch import Watch, leads_to, watching
from bench.overlay_tasks import (
    Placed,
    create_network,
    create_service,
    placed,
    running,
    scale,
    specification,
    wait_running,
)
from skep.playground.description import PlaygroundNode

WORKERS, CROWD = 9, 99
"""Number of workers, and of additional containers on the first worker.  Each node also has one container."""
BACKENDS = 3
CHANGES_PER_PAIR, DEATHS = 5, 3
CHANGE_MS_MAX, DEATH_S_MAX = 200.0, 1.0
_DEAD_WITHIN_S = 30.0


def figures(pairs: int) -> list[Figure]:
    """Measure changes (``pairs`` times five of each kind), then deaths."""
    with tempfile.TemporaryDirectory(prefix="skep-bench-", dir="/var/tmp") as directory:
        lab = ClusterLab("skep", Path(directory, "skep"), 1, WORKERS)
        try:
            lab.up()
            lab.form()
            cluster = Cluster(lab)
            return [*_changes(cluster, pairs), *_deaths(cluster)]
        finally:
            lab.down()


class Cluster:
    """The services of the cluster: ``web``, whose tasks start and stop, and containers that use it."""

    def __init__(self, lab: ClusterLab) -> None:
        self.lab = lab
        self.network = create_network(lab, "bench")
        first = f"node.hostname=={lab.workers[0].name}"
        self._users = [
            create_service(lab, specification(lab, "each", self.network, None)),
            create_service(lab, specification(lab, "crowd", self.network, CROWD, constraints=[first])),
        ]
        elsewhere = [f"node.hostname!={lab.workers[0].name}", "node.role==worker"]
        self.web = create_service(
            lab, specification(lab, "web", self.network, BACKENDS, constraints=elsewhere)
        )
        self.wait()

    def wait(self) -> None:
        """Wait until every service has its tasks, and no others."""
        each, crowd = self._users
        wait_running(self.lab, each, WORKERS + 1)
        wait_running(self.lab, crowd, CROWD)
        wait_running(self.lab, self.web, BACKENDS)

    def users(self) -> list[Placed]:
        """Return the containers that use the service."""
        return [one for service in self._users for one in placed(self.lab, service)]

    def scale(self, replicas: int) -> None:
        """Scale the service, and return when the request has its response."""
        scale(self.lab, self.web, replicas)

    def wait_scaled(self, replicas: int) -> None:
        """Wait until that many tasks run, and all traces of stopped tasks are removed."""

        def is_so() -> bool:
            tasks = engine(self.lab.nodes[0]).get("/tasks", filters={"service": [self.web]})
            return len(tasks) == replicas == len(running(self.lab, self.web))

        until(is_so, f"{replicas} tasks of web are all there are")

    def taken_out(self, since: float) -> float:
        """Return the time of the first event after ``since`` with which the manager takes a task out of use."""
        period = urlencode({"since": f"{since:.6f}", "until": f"{time.time():.6f}"})
        lines = engine(self.lab.nodes[0]).raw("GET", f"/events?{period}").splitlines()
        events = [json.loads(line) for line in lines]
        return min(int(one["timeNano"]) / 1e9 for one in events if one.get("Action") == "drain")


class Change(NamedTuple):
    """Milliseconds until one change applied everywhere."""

    gone: float
    gone_since_request: float
    come: float


def _changes(cluster: Cluster, pairs: int) -> list[Figure]:
    found: list[Change] = []
    busy: list[float] = []
    wanted, tried = pairs * CHANGES_PER_PAIR, 0
    users = cluster.users()
    with watching([one.netns for one in users], "web") as watch:
        while len(found) < wanted:
            tried += 1
            before = noise(0.3)
            change = Change(*_gone_ms(cluster, watch), _come_ms(cluster, watch))
            if is_kept(before, tried, len(found), wanted):
                found.append(change)
                busy.append(round(before, 3))
    what = f"on ten nodes and in {len(users)} containers, {CROWD + 1} of them on one node, p99"

    def figure(way: str, values: Sequence[float], limit: float | None = CHANGE_MS_MAX) -> Figure:
        return Figure(
            number=7 if limit else 0,
            what=f"a backend {way} {what}",
            unit="ms",
            values=tuple(values),
            quantile=0.99,
            limit=limit,
            busy=tuple(busy),
        )

    return [
        figure("goes", [one.gone for one in found]),
        figure("comes", [one.come for one in found]),
        figure("goes, from the request on,", [one.gone_since_request for one in found], None),
    ]


def _gone_ms(cluster: Cluster, watch: Watch) -> tuple[float, float]:
    """Return the time since the backend was taken out, and since the request."""
    began = time.time()
    cluster.scale(BACKENDS - 1)
    last = watch.wait(began)
    cluster.wait_scaled(BACKENDS - 1)
    return (last - cluster.taken_out(began)) * 1e3, (last - began) * 1e3


def _come_ms(cluster: Cluster, watch: Watch) -> float:
    began = time.time()
    cluster.scale(BACKENDS)
    last = watch.wait(began)
    cluster.wait_scaled(BACKENDS)
    tasks = running(cluster.lab, cluster.web)
    return (last - max(_seconds(task["Status"]["Timestamp"]) for task in tasks)) * 1e3


def _seconds(stamp: str) -> float:
    """Convert a time in Docker's format (nine digits after the point) to ``time.time``."""
    whole, _, fraction = stamp.removesuffix("Z").partition(".")
    return datetime.fromisoformat(f"{whole}+00:00").timestamp() + float(f"0.{fraction or 0}")


def _deaths(cluster: Cluster) -> list[Figure]:
    found, busy = [], []
    for _ in range(DEATHS):
        busy.append(round(noise(0.3), 3))
        found.append(_death(cluster))
    what = "after a node was declared dead, of"
    return [
        Figure(
            number=8,
            what=f"what leads to it is gone {what} {subject}",
            unit="s",
            values=tuple(values),
            quantile=1,
            limit=DEATH_S_MAX,
            busy=tuple(busy),
        )
        for subject, values in (
            ("nine nodes' forwarding tables (largest)", [frames for frames, _ in found]),
            ("all containers' virtual addresses (largest)", [leads for _, leads in found]),
        )
    ]


def _death(cluster: Cluster) -> tuple[float, float]:
    """Return the seconds from a backend's node being down until no frames, and no virtual addresses, lead to it."""
    lab = cluster.lab
    victim = placed(lab, cluster.web)[0].node
    victim_id = lab.ids()[victim.name]
    overlays = [_overlay(node, cluster.network) for node in lab.nodes if node.name != victim.name]
    users = [one.netns for one in cluster.users() if one.node.name != victim.name]
    through = engine(lab.nodes[0])
    with watching(users, "web") as watch:
        began = time.time()
        lab.kill(victim)
        until(
            lambda: through.get(f"/nodes/{victim_id}")["Status"]["State"] == "down",
            f"{victim.name} is down",
            _DEAD_WITHIN_S,
            0.005,
        )
        dead = time.time()
        until(
            lambda: not any(leads_to(one, victim.addr) for one in overlays),
            f"nothing leads to {victim.name}",
            _DEAD_WITHIN_S,
            0.005,
        )
        frames = time.time() - dead
        leads = watch.wait(began) - dead
    lab.start(victim)
    cluster.wait()
    return frames, max(leads, 0.0)


def _overlay(node: PlaygroundNode, network: str) -> Path:
    """Return the network's namespace on a playground's node, through the node's own mounts."""
    return Path(f"/proc/{node.pids[0]}/root/run/skep/overlays/{network}")


if __name__ == "__main__":
    run_alone(__doc__, "overlay-changes", figures)
