"""A cluster of rows for the dashboard: made from a seed, changed at will."""

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

KINDS = ("nodes", "services", "tasks", "networks", "stacks", "volumes", "secrets", "configs")
NAMES = [
    "web",
    "api",
    "cart",
    "orders",
    "payments",
    "search",
    "catalog",
    "users",
    "sessions",
    "mail",
    "images",
    "thumbnails",
    "reports",
    "billing",
    "queue",
    "worker",
    "scheduler",
    "gateway",
    "cache",
    "auth",
    "feed",
    "notifications",
    "audit",
    "metrics",
    "ledger",
    "stock",
    "prices",
    "labels",
    "parcels",
    "returns",
]
LINES = (
    "GET / 200 3 ms",
    "GET /healthz 200 0 ms",
    "POST /orders 201 18 ms",
    "cache miss, asking the catalog",
    "\x1b[33mwarning\x1b[0m: slow query, 812 ms",
)

Row = dict[str, Any]


@dataclass
class MadeUpCluster:
    """Rows by kind and id as ``/skep/view`` has them.  ``requests``: (method, path, body) of what the page sent."""

    rows: dict[str, dict[str, Row]] = field(default_factory=lambda: {kind: {} for kind in KINDS})
    info: Row = field(default_factory=dict)
    revision: int = 1
    requests: list[tuple[str, str, Any]] = field(default_factory=list)
    history: list[Row] = field(default_factory=list)
    then: Row = field(default_factory=dict)
    streams: set[asyncio.Queue[Row]] = field(default_factory=set)
    lines: Sequence[str] = LINES
    routes: list[Row] = field(default_factory=list)
    """As ``GET /skep/door`` has them."""
    now: float = field(default_factory=time.time)
    made: int = 0

    def snapshot(self) -> Row:
        """As ``GET /skep/view``."""
        lists = {kind: list(rows.values()) for kind, rows in self.rows.items()}
        return {"cursor": f"1-{self.revision}", "cluster": self.info, **lists}

    def set(self, kind: str, *rows: Row) -> None:
        """Writes whole rows and sends them to the streams."""
        self.change({kind: list(rows)}, {})

    def change(self, set: Mapping[str, Any], removed: Mapping[str, list[str]]) -> None:
        """One change of several kinds."""
        for kind, rows in set.items():
            if kind == "cluster":
                self.info = rows
            else:
                self.rows[kind].update({row["id"]: row for row in rows})
        for kind, ids in removed.items():
            for id in ids:
                self.rows[kind].pop(id, None)
        self.revision += 1
        message = {
            "cursor": f"1-{self.revision}",
            "time": time.time(),
            "set": dict(set),
            "removed": dict(removed),
        }
        for queue in self.streams:
            queue.put_nowait(message)

    def log(
        self, type: str, action: str, row: Row, message: str, severity: str = "info", **more: Any
    ) -> None:
        """An entry of the journal."""
        stamp = more.pop("at", time.time())
        self.history.append(
            {
                "ID": f"e{len(self.history)}",
                "Time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(stamp))}.{int(stamp % 1 * 1e9):09d}Z",
                "Kind": "change",
                "Type": type,
                "Action": action,
                "Severity": severity,
                "ObjectID": row["id"],
                "Name": row.get("name", ""),
                "Message": message,
                **more,
            }
        )

    def id(self, kind: str) -> str:
        self.made += 1
        return f"{kind}{self.made:05d}{'x' * 12}"

    def task(self, service: Row, slot: int, node: str, **more: Any) -> Row:
        """A new row of a task, not yet written."""
        row = {
            "id": self.id("t"),
            "service": service["id"],
            "slot": slot,
            "node": node,
            "state": "running",
            "desired_state": "running",
            "error": "",
            "message": "started",
            "since": time.time(),
            "health": "",
            "image": service["image"],
            "current": True,
        }
        return row | more

    def tasks_of(self, service: str) -> list[Row]:
        return [row for row in self.rows["tasks"].values() if row["service"] == service]

    def recount(self, *services: str) -> list[Row]:
        """The rows of services with their numbers and states as their tasks are now."""
        found = []
        for id in services:
            row = self.rows["services"][id]
            running = sum(task["state"] == "running" for task in self.tasks_of(id))
            state = "healthy" if running >= row["desired"] else "converging"
            found.append(row | {"running": running, "state": state})
        return found

    def kill(self, node: str) -> None:
        """The node is down and its tasks' replacements wait."""
        lost = [task for task in self.rows["tasks"].values() if task["node"] == node]
        new = [
            self.task(self.rows["services"][task["service"]], task["slot"], "", state="pending")
            for task in lost
        ]
        row = self.rows["nodes"][node]
        down = row | {"state": "down", "reason": "heartbeat failure"}
        self.log("node", "down", row, f"node {row['name']} is down: heartbeat failure", "error")
        self.change({"nodes": [down], "tasks": new}, {"tasks": [task["id"] for task in lost]})
        self.set("services", *self.recount(*{task["service"] for task in lost}))

    def heal(self) -> None:
        """Waiting tasks run, each on the ready node with the fewest."""
        ready = [row["id"] for row in self.rows["nodes"].values() if row["state"] == "ready"]
        number = dict.fromkeys(ready, 0)
        for task in self.rows["tasks"].values():
            if task["node"] in number:
                number[task["node"]] += 1
        placed = []
        for task in [task for task in self.rows["tasks"].values() if not task["node"]]:
            node = min(ready, key=number.__getitem__)
            number[node] += 1
            placed.append(task | {"node": node, "state": "running", "since": time.time()})
            self.log(
                "task",
                "start",
                {"id": task["id"]},
                f"task {task['id'][:6]} runs on {self.rows['nodes'][node]['name']}",
            )
        self.set("tasks", *placed)
        self.set("services", *self.recount(*{task["service"] for task in placed}))


def _routes(cluster: MadeUpCluster) -> list[Row]:
    """Routes of the first services: two with requests, one in a canary, one that does not work."""
    ids = [(row["id"], row["name"]) for row in cluster.rows["services"].values()]
    counted = {"RequestsPerSecond": 1284.5, "ErrorPercent": 0.02}
    busy = {**counted, "LatencyP50": 4.2, "LatencyP95": 31.0, "LatencyP99": 240.0}
    slow = {"RequestsPerSecond": 3.4, "ErrorPercent": 7.5, "LatencyP50": 180.0, "LatencyP95": 2400.0}
    in_days = {
        days: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(cluster.now + 86400 * days))
        for days in (11, 74)
    }
    more: list[Row] = [
        {"Route": "app.example.com", **busy, "CertificateExpires": in_days[74]},
        {
            "Route": "app.example.com/api",
            **slow,
            "LatencyP99": 10000.0,
            "NewPercent": 5,
            "CertificateExpires": in_days[11],
        },
        {"Route": "shop.example.org", "Problem": "no task of the service runs"},
    ]
    return [{"ServiceID": id, "Service": name, **route} for (id, name), route in zip(ids, more, strict=False)]


def make(nodes: int, tasks: int, *, services: int | None = None, seed: int = 1) -> MadeUpCluster:
    """A cluster in which most is well: one node drained, one service in an update, one task failed."""
    rng = random.Random(seed)
    cluster = MadeUpCluster()
    managers = 1 if nodes < 3 else 3 if nodes < 50 else 5
    for i in range(nodes):
        is_manager = i < managers
        row = {
            "id": cluster.id("n"),
            "name": f"m{i + 1}" if is_manager else f"w{i + 1 - managers}",
            "role": "manager" if is_manager else "worker",
            "manager": "reachable" if is_manager else "",
            "leader": i == 0,
            "state": "ready",
            "availability": "active",
            "address": f"10.0.{i // 250}.{i % 250 + 1}",
            "engine": "skep 0.2.0",
            "os": "linux",
            "arch": "x86_64",
            "labels": {"zone": "abc"[i % 3], "disk": "ssd"} if i % 2 else {},
            "cpus": 8.0,
            "memory": 32 << 30,
            "load": round(rng.betavariate(2, 3), 2),
            "failing_checks": [],
            "volumes": [],
            "reason": "",
            "version": 1,
        }
        cluster.rows["nodes"][row["id"]] = row
    if nodes > 4:
        list(cluster.rows["nodes"].values())[-1]["availability"] = "drain"
    _networks(cluster)
    _services(cluster, tasks, services or max(3, min(24, tasks // 4)), rng)
    cluster.routes = _routes(cluster)
    leader = next(iter(cluster.rows["nodes"]))
    cluster.info = {
        "id": "c1",
        "name": "orchard",
        "managers": {"total": managers, "reachable": managers, "leader": leader},
        "warnings": [],
        "replacement_suspended": "",
    }
    _journal(cluster, rng)
    return cluster


def in_every_state() -> MadeUpCluster:
    """A small cluster with a task in each phase and a node in each state, under light, medium and heavy load."""
    cluster = make(9, 60)
    tasks = list(cluster.rows["tasks"].values())
    spoiled: list[Row] = [
        {"state": "pending", "node": "", "error": "no suitable node (insufficient resources on 9 nodes)"},
        {"state": "preparing"},
        {"health": "unhealthy"},
        {"desired_state": "shutdown"},
        {"state": "complete"},
        {"state": "failed", "error": "task: non-zero exit (1)"},
        {"state": "unknown"},
    ]
    for task, changes in zip(tasks[::4], spoiled, strict=False):
        task |= changes
    nodes = list(cluster.rows["nodes"].values())
    for node, load in zip(nodes, (0.2, 0.8, 0.95, 0.0), strict=False):
        node["load"] = load
    nodes[4] |= {"state": "down", "reason": "heartbeat failure", "last_heartbeat_at": cluster.now - 90}
    nodes[5] |= {"state": "unknown", "reason": "the managers have no leader"}
    nodes[6] |= {"availability": "pause"}
    nodes[3] |= {"reason": "disk 96 % full"}
    services = list(cluster.rows["services"].values())
    services[3] |= {"state": "degraded", "reason": "its update is paused"}
    services[3]["update"] = {
        "state": "paused",
        "message": "update paused due to failure or early termination of task",
        "started_at": cluster.now - 400,
        "completed_at": 0,
    }
    services[4] |= {"mode": "replicated-job", "running": 0, "completed": 6, "total": 6}
    cluster.info |= {"warnings": ["WARNING: the store is 92 % full"]}
    cluster.log("node", "pressure", nodes[3], "node m4 has little disk left", "warning")
    return cluster


def without_services(nodes: int) -> MadeUpCluster:
    """A cluster in which nothing was started yet."""
    cluster = make(nodes, 3)
    for kind in KINDS:
        if kind != "nodes":
            cluster.rows[kind].clear()
    for row in cluster.rows["nodes"].values():
        row |= {"failing_checks": [], "volumes": []}
    cluster.history.clear()
    cluster.routes.clear()
    return cluster


def _networks(cluster: MadeUpCluster) -> None:
    for name, encrypted in (("ingress", False), ("shop_front", False), ("shop_back", True)):
        row = {
            "id": cluster.id("w"),
            "name": name,
            "driver": "overlay",
            "encrypted": encrypted,
            "ingress": name == "ingress",
            "internal": False,
            "attachable": name == "shop_front",
            "subnets": [f"10.{len(cluster.rows['networks'])}.0.0/24"],
            "services": [],
            "stack": name.partition("_")[0] if "_" in name else "",
        }
        cluster.rows["networks"][row["id"]] = row


def _services(cluster: MadeUpCluster, tasks: int, number: int, rng: random.Random) -> None:
    shares = [rng.paretovariate(1.2) for _ in range(number)]
    takes = [row["id"] for row in cluster.rows["nodes"].values() if row["availability"] == "active"]
    networks = list(cluster.rows["networks"].values())
    stack: Row = {
        "id": "shop",
        "name": "shop",
        "services": [],
        "revision": 7,
        "revisions": _revisions(cluster.now),
    }
    place = 0
    for i, share in enumerate(shares):
        wanted = max(1, round(tasks * share / sum(shares)))
        name = NAMES[i % len(NAMES)] + ("" if i < len(NAMES) else f"-{i // len(NAMES)}")
        row: Row = {
            "id": cluster.id("s"),
            "name": name if i % 3 == 0 else f"shop_{name}",
            "stack": "" if i % 3 == 0 else "shop",
            "image": f"registry.example/{name}:{rng.randint(1, 4)}.{rng.randint(0, 20)}",
            "mode": "replicated",
            "desired": wanted,
            "running": wanted,
            "completed": 0,
            "state": "healthy",
            "reason": "",
            "ports": [{"published": 8080 + i, "target": 80, "protocol": "tcp", "mode": "ingress"}]
            if i % 4 == 0
            else [],
            "networks": [networks[i % 3]["id"]],
            "secrets": [],
            "configs": [],
            "update": None,
            "can_roll_back": i % 2 == 0,
            "version": 1,
            "updated_at": cluster.now - rng.randint(60, 400_000),
        }
        cluster.rows["services"][row["id"]] = row
        networks[i % 3]["services"].append(row["id"])
        if row["stack"]:
            stack["services"].append(row["id"])
        for slot in range(1, wanted + 1):
            task = cluster.task(row, slot, takes[place % len(takes)], since=row["updated_at"])
            cluster.rows["tasks"][task["id"]] = task
            place += 1
    cluster.rows["stacks"]["shop"] = stack
    _troubles(cluster)
    _kept(cluster)


def _revisions(now: float) -> list[Row]:
    ends = {7: "deployed", 6: "failed: service shop_api: task: non-zero exit (1)", 5: "deployed"}
    return [
        {
            "number": number,
            "state": state,
            "changes": f"{number % 2 + 1} created, 2 updated",
            "created_at": now - (8 - number) * 5000,
        }
        for number, state in ends.items()
    ]


def _troubles(cluster: MadeUpCluster) -> None:
    services = list(cluster.rows["services"].values())
    moving, failing = services[1], services[2]
    moving["update"] = {
        "state": "updating",
        "message": "update in progress",
        "started_at": cluster.now - 40,
        "completed_at": 0,
    }
    moving["state"] = "converging"
    tasks = cluster.tasks_of(moving["id"])
    for task in tasks[len(tasks) // 2 :]:
        task["current"] = False
    tasks[0]["state"] = "starting"
    moving["running"] -= 1
    broken = cluster.tasks_of(failing["id"])[0]
    broken |= {
        "state": "failed",
        "error": "task: non-zero exit (137): out of memory",
        "since": cluster.now - 12,
    }
    nodes = list(cluster.rows["nodes"].values())
    for node, other in pairwise(nodes[:3]):
        node["failing_checks"] = [{"peer": other["name"], "check": "overlay", "port": "4789/udp"}]
    for node in nodes[:3]:
        used = {"service": moving["name"], "slot": 1, "used_at": cluster.now - 3000}
        node["volumes"] = [{"name": f"{moving['name']}_data", **used}]
    moving["ports"] = [{"published": 0, "target": 9000, "protocol": "tcp", "mode": "host"}]
    for i, task in enumerate(tasks[:2]):
        task["ports"] = [moving["ports"][0] | {"published": 32768 + i}]
    failing |= {"running": failing["running"] - 1, "state": "degraded", "reason": "1 task: out of memory"}


def _kept(cluster: MadeUpCluster) -> None:
    services = list(cluster.rows["services"].values())
    for kind, name in (
        ("secrets", "shop_db-password"),
        ("secrets", "tls-key"),
        ("configs", "shop_nginx.conf"),
        ("secrets", "tls-key-2"),
    ):
        row: Row = {
            "id": cluster.id("k"),
            "name": name,
            "created_at": cluster.now - 90_000,
            "updated_at": cluster.now - 90_000,
            "services": [services[0]["id"]],
            "stack": "shop" if name.startswith("shop") else "",
            "labels": {"skep.rotation.of": "tls-key"} if name.endswith("-2") else {},
        }
        row["created_at"] += 500 * len(cluster.rows[kind])
        cluster.rows[kind][row["id"]] = row
        services[0][kind].append(row["id"])
    volume = {
        "id": cluster.id("v"),
        "name": "orders",
        "driver": "csi.example",
        "nodes": [next(iter(cluster.rows["nodes"]))],
        "state": "in use",
        "availability": "active",
        "reason": "",
    }
    cluster.rows["volumes"][volume["id"]] = volume


def _journal(cluster: MadeUpCluster, rng: random.Random) -> None:
    tasks = list(cluster.rows["tasks"].values())
    begin = cluster.now - 3500
    for i in range(60):
        at = begin + i * 58 + rng.random() * 40
        task = rng.choice(tasks)
        service = cluster.rows["services"][task["service"]]
        name = f"{service['name']}.{task['slot']}"
        if i % 11 == 5:
            cluster.log("task", "fail", task, f"task {name} failed: exit 1; replaced", "error", at=at)
        elif i % 7 == 3:
            by = {"User": "alice", "Through": "tls"}
            message = f"service {service['name']} updated: image {service['image']}"
            cluster.log("service", "update", service, message, at=at, Kind="request", By=by)
        else:
            cluster.log("task", "start", task, f"task {name} runs", at=at)


def step(cluster: MadeUpCluster, rng: random.Random) -> None:
    """One task is replaced on another node."""
    active = [
        row["id"]
        for row in cluster.rows["nodes"].values()
        if row["availability"] == "active" and row["state"] == "ready"
    ]
    old = rng.choice(list(cluster.rows["tasks"].values()))
    new = cluster.task(cluster.rows["services"][old["service"]], old["slot"], rng.choice(active))
    cluster.change({"tasks": [new]}, {"tasks": [old["id"]]})
