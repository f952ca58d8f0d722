"""Timed scenarios.  Each takes one lab and returns ``{metric: value}``, where the metric's name ends with its unit.

A scenario starts from a node without services and leaves it so.  Tasks run a shell that exits at once on SIGTERM, so
that removal measures the orchestrator and not a grace period.
"""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from bench.machine import busy_s, daemons, memory_mib, thread_use

WORKLOAD = ["sh", "-c", "trap 'exit 0' TERM INT; while :; do sleep 3600 & wait $!; done"]
NOWHERE = "node.labels.bench==nowhere"
POLL_S = 0.01
POLL_MANY_S = 0.05
"""Seconds between two polls of many tasks.  A list of 50 costs both systems processor time, which is measured."""
EXECS = 30
"""Number of execs, one after the other."""
EXEC_POLL_S = 0.001
"""Seconds between two polls of an exec, which takes 20 to 40 ms."""
CHURN_BATCHES = 20
"""Number of batches of 50 services."""
LOG_REPLICAS, LOG_LINES, LOG_LINE_BYTES = 20, 50_000, 100
LOG_SILENCE_S = 15.0
"""Seconds of silence after which a log stream counts as ended.  They are not part of the result."""
REST_S, IDLE_S = 10.0, 60.0
"""Seconds before an idle node is measured, and for which it is.  Its rarest frequent timers fire every 10 to 20 s."""
Metrics = dict[str, float]


def service(lab: Any, name: str, replicas: int, **template: Any) -> str:
    """Create a service, and return its id."""
    spec = {
        "Name": name,
        "TaskTemplate": {"ContainerSpec": {"Image": lab.image, "Command": WORKLOAD}, **template},
        "Mode": {"Replicated": {"Replicas": replicas}},
    }
    response: dict[str, str] = lab.engine.post("/services/create", spec)
    return response["ID"]


def running(lab: Any, service_id: str) -> list[dict[str, Any]]:
    tasks = lab.engine.get("/tasks", filters={"service": [service_id]})
    return [t for t in tasks if t["Status"]["State"] == "running" and t["DesiredState"] == "running"]


def wait_for(condition: Callable[[], bool], timeout_s: float = 180, poll_s: float = POLL_S) -> float:
    """Wait for ``condition``, and return the seconds.  Raises: TimeoutError."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > timeout_s:
            raise TimeoutError(f"not so within {timeout_s} s")
        time.sleep(poll_s)
    return time.monotonic() - began


def is_bare(lab: Any) -> bool:
    """Return whether no service has a container."""
    labeled = {"label": ["com.docker.swarm.service.name"]}
    return not lab.engine.get("/containers/json", all="1", filters=labeled)


def clear(lab: Any) -> None:
    """Remove every service and wait until no container and no task is left."""
    for existing in lab.engine.get("/services"):
        lab.engine.delete(f"/services/{existing['ID']}")
    wait_for(lambda: is_bare(lab) and not lab.engine.get("/tasks"))


def on_overlay(lab: Any, name: str, subnet: str = "") -> str:
    """Return the id of the overlay network ``name``, created if it is missing.

    ``subnet`` may be empty for the system's choice.
    """
    for existing in lab.engine.get("/networks"):
        if existing["Name"] == name:
            return str(existing["Id"])
    requested: dict[str, Any] = {"Name": name, "Driver": "overlay"}
    if subnet:
        requested["IPAM"] = {"Config": [{"Subnet": subnet}]}
    response: dict[str, str] = lab.engine.post("/networks/create", requested)
    return response["Id"]


def start(replicas: int, *, weighs: bool = False, overlay: str = "") -> Callable[[Any], Metrics]:
    """Return a scenario that measures from create to all RUNNING, then from removal to no containers.

    With ``weighs``, also measure the daemons' memory (PSS) without tasks, and the memory per task with its monitor.
    ``overlay`` is the name of the overlay network of the tasks.
    """

    poll_s = POLL_S if replicas < 20 else POLL_MANY_S

    def scenario(lab: Any) -> Metrics:
        empty = memory_mib(lab.netns, lab.root_pids) if weighs else {}
        template = {"Networks": [{"Target": on_overlay(lab, overlay)}]} if overlay else {}
        busy, began = busy_s(), time.monotonic()
        id = service(lab, f"start{replicas}", replicas, **template)
        wait_for(lambda: len(running(lab, id)) >= replicas, poll_s=poll_s)
        took, spent = time.monotonic() - began, busy_s() - busy
        full = memory_mib(lab.netns, lab.root_pids) if weighs else {}
        began = time.monotonic()
        lab.engine.delete(f"/services/{id}")
        wait_for(lambda: is_bare(lab), poll_s=poll_s)
        gone = time.monotonic() - began
        clear(lab)
        where = " on an overlay" if overlay else ""
        result = {
            f"create {replicas}{where} to running, s": took,
            f"create {replicas}{where}, processor s per task": spent / replicas,
            f"remove {replicas}{where} to containers gone, s": gone,
        }
        if weighs:
            added = sum(full[kind] - empty[kind] for kind in ("daemons", "monitors"))
            result |= {"memory idle, MiB": empty["daemons"], "memory per task, MiB": added / replicas}
        return result

    return scenario


def crash(lab: Any) -> Metrics:
    """Kill one task's process with SIGKILL, and measure until a replacement is RUNNING (restart delay 0)."""
    id = service(lab, "crash", 3, RestartPolicy={"Condition": "any", "Delay": 0})
    wait_for(lambda: len(running(lab, id)) >= 3)
    victim = running(lab, id)[0]
    known = {task["ID"] for task in running(lab, id)}
    container = victim["Status"]["ContainerStatus"]["ContainerID"]
    pid = lab.engine.get(f"/containers/{container}/json")["State"]["Pid"]
    os.kill(pid, signal.SIGKILL)
    took = wait_for(lambda: any(task["ID"] not in known for task in running(lab, id)))
    clear(lab)
    return {"crash to replacement, s": took}


def execs(lab: Any) -> Metrics:
    """Measure an exec of ``true`` in a task, from its creation until it has ended."""
    id = service(lab, "execs", 1)
    wait_for(lambda: len(running(lab, id)) >= 1)
    container = running(lab, id)[0]["Status"]["ContainerStatus"]["ContainerID"]
    values = []
    busy = busy_s()
    for _ in range(EXECS):
        began = time.perf_counter()
        made = lab.engine.post(f"/containers/{container}/exec", {"Cmd": ["true"]})["Id"]
        lab.engine.post(f"/exec/{made}/start", {"Detach": True})
        while lab.engine.get(f"/exec/{made}/json")["Running"]:
            time.sleep(EXEC_POLL_S)
        values.append((time.perf_counter() - began) * 1e3)
    spent = busy_s() - busy
    clear(lab)
    return {"exec, ms p50": median(values), "exec, processor s": spent / EXECS}


def churn(lab: Any) -> Metrics:
    """Create and remove 1,000 services (no tasks placed) on a fresh node.

    Compare memory after and before, also by process.

    Memory "before" is measured after a first container was created and removed, because only then has a node loaded
    everything that it needs.
    """
    id = service(lab, "first", 1)
    wait_for(lambda: len(running(lab, id)) >= 1)
    clear(lab)
    before = memory_mib(lab.netns, lab.root_pids)
    for batch in range(CHURN_BATCHES):
        ids = [service(lab, f"churn-{batch}-{n}", 1, Placement={"Constraints": [NOWHERE]}) for n in range(50)]
        for id in ids:
            lab.engine.delete(f"/services/{id}")
    clear(lab)
    after = memory_mib(lab.netns, lab.root_pids)
    result = {
        "memory before churn, MiB": before["daemons"],
        "memory after 1,000 services, MiB": after["daemons"],
        "growth by churn": after["daemons"] / before["daemons"],
    }
    for name in sorted(after):
        if name.startswith("process ") and name in before:
            result[f"growth by churn of {name}, MiB"] = after[name] - before[name]
    return result


def listing(tasks: int) -> Callable[[Any], Metrics]:
    """Return a scenario for the latency of ``GET /tasks`` with ``tasks`` pending tasks, and of small requests
    meanwhile.
    """

    def scenario(lab: Any) -> Metrics:
        ids = [service(lab, f"list{n}", 10, Placement={"Constraints": [NOWHERE]}) for n in range(tasks // 10)]
        wait_for(lambda: len(lab.engine.get("/tasks")) >= tasks)
        paths = {
            f"list {tasks} tasks": "/tasks",
            f"list services of {tasks} tasks": "/services",
            f"inspect a service beside {tasks} tasks": f"/services/{ids[0]}",
            f"list nodes beside {tasks} tasks": "/nodes",
        }
        result = {f"{what}, ms p50": _latency_ms(lab, path) for what, path in paths.items()}
        clear(lab)
        return result

    return scenario


def latency(lab: Any) -> Metrics:
    """Measure p50 of small requests on an empty node."""
    result = {
        "GET /_ping, ms p50": _latency_ms(lab, "/_ping"),
        "GET /services, ms p50": _latency_ms(lab, "/services"),
        "GET /nodes, ms p50": _latency_ms(lab, "/nodes"),
    }
    created = []
    for n in range(50):
        began = time.perf_counter()
        service(lab, f"latency{n}", 0)
        created.append((time.perf_counter() - began) * 1e3)
    clear(lab)
    return result | {"POST /services/create, ms p50": median(created)}


def _latency_ms(lab: Any, path: str, times: int = 30) -> float:
    lab.engine.raw("GET", path)
    values = []
    for _ in range(times):
        began = time.perf_counter()
        lab.engine.raw("GET", path)
        values.append((time.perf_counter() - began) * 1e3)
    return median(values)


def logs(lab: Any) -> Metrics:
    """Run ``docker service logs`` for 100 MB that 20 tasks have written, with one client that discards it."""
    line = "x" * (LOG_LINE_BYTES - 1)
    id = service(
        lab,
        "logs",
        LOG_REPLICAS,
        RestartPolicy={"Condition": "none"},
        ContainerSpec={
            "Image": lab.image,
            "Command": ["sh", "-c", f"yes {line} | head -n {LOG_LINES}"],
        },
    )
    wait_for(
        lambda: (
            [t["Status"]["State"] for t in lab.engine.get("/tasks", filters={"service": [id]})]
            == ["complete"] * LOG_REPLICAS
        ),
        poll_s=POLL_MANY_S,
    )
    busy = busy_s()
    received, took = lab.engine.drain(f"/services/{id}/logs?stdout=1&tail=all", LOG_SILENCE_S)
    spent = busy_s() - busy
    clear(lab)
    lines = received / (LOG_LINE_BYTES + 8)  # each line has a frame header
    return {
        "service logs of 100 MB, s per 100 MB received": took / received * 1e8,
        "service logs of 100 MB, processor s": spent,
        "service logs of 100 MB, lines that did not come": LOG_REPLICAS * LOG_LINES - lines,
    }


def idle(lab: Any) -> Metrics:
    """Measure the processor time and the wakeups of a node without tasks."""
    time.sleep(REST_S)
    pids = tuple(daemons(lab.netns, lab.root_pids))
    before, began = {pid: thread_use(pid) for pid in pids}, time.monotonic()
    time.sleep(IDLE_S)
    took_s = time.monotonic() - began
    result = {"idle, % of a processor": 0.0, "idle, wakeups per s": 0.0}
    for pid in pids:
        seconds, wakeups = (now - then for now, then in zip(thread_use(pid), before[pid], strict=True))
        name = Path(f"/proc/{pid}/comm").read_text().strip()
        result["idle, % of a processor"] += 100 * seconds / took_s
        result["idle, wakeups per s"] += wakeups / took_s
        result[f"idle, % of a processor of process {name}"] = 100 * seconds / took_s
    return result


SCENARIOS: dict[str, Callable[[Any], Metrics]] = {
    "start1": start(1),
    "start20": start(20),
    "start50": start(50, weighs=True),
    "overlay20": start(20, overlay="bench"),
    "crash": crash,
    "exec": execs,
    "latency": latency,
    "listing1000": listing(1000),
    "listing3000": listing(3000),
    "churn": churn,
    "idle": idle,
    "logs": logs,
}
FRESH = frozenset({"start20", "crash", "latency", "churn"})
"""Scenarios that begin on separate nodes in each pair.

A node's growth depends on its history, and its requests are faster or slower by a tenth from its start on.
"""
