"""Measures features around a running task: logs, exec, health checks, secrets, and a Compose project.

One Docker Engine and one playground node, each in its own namespaces, in alternating pairs:

* *logs*: 100 MB of 20 tasks, read by one client (``scenarios.logs``)
* *exec*: ``true`` in a container of the node, and of another node (``reaching``)
* *health*: the processor time of health checks every second in ``PROBED`` containers, one system after the other
* *secret*: 100 tasks with and without a secret of 500 KB, and a secret of its own for each task on 100 nodes
  (``dispatching``)
* *compose*: ``docker compose up`` of ten services by the docker command's plugin
"""

import asyncio
import base64
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bench import dispatching, reaching
from bench.docker_lab import DockerLab
from bench.figures import Figure, Sides, alternate, ratio, run_parts, run_undisturbed, side_by_side
from bench.machine import group_processor_s
from bench.scenarios import (
    LOG_REPLICAS,
    POLL_MANY_S,
    WORKLOAD,
    Metrics,
    clear,
    logs,
    running,
    service,
    wait_for,
)
from bench.skep_lab import SkepLab
from skep.playground.images.busybox import busybox_archive
from tests.support.machines.plugins import plugin

Lab = DockerLab | SkepLab
TURNS = 5
"""Number of runs of each way to execute a command, within one pair."""
EXECS = 20
PROBED = 20
"""Number of probed containers.  In both systems, 100 probes per second would need more than two processors."""
SETTLED_S, WINDOW_S = 3.0, 10.0
TASKS, SECRET_BYTES = 100, 500_000
SERVICES = 10
SECOND_NS = 1_000_000_000


@contextmanager
def _labs(workers: int = 0) -> Iterator[tuple[DockerLab, SkepLab]]:
    """Start both systems with the same image."""
    archive = asyncio.run(busybox_archive())
    with tempfile.TemporaryDirectory(prefix="skep-bench-", dir="/var/tmp") as directory, ExitStack() as stack:
        place = Path(directory)
        labs = (
            DockerLab(place / "docker", "docker-around"),
            SkepLab(place / "skep", "around", workers=workers),
        )
        for lab in labs:
            stack.callback(lab.down)
            lab.up(archive.data, archive.image_id)
        yield labs


def log_figures(pairs: int) -> list[Figure]:
    with _labs() as labs:
        for lab in labs:
            clear(lab)
        sides, busy = side_by_side(labs, pairs, logs)
    rate, spent, missing = (
        next(sides[metric] for metric in sides if metric.endswith(unit))
        for unit in ("received", "processor s", "come")
    )
    return [
        ratio(1, f"100 MB of logs of {LOG_REPLICAS} tasks to one client, s", rate, limit=1.0, busy=busy),
        Figure(
            number=1,
            what="their lines that did not come",
            unit="lines",
            values=tuple(missing["skep"]),
            quantile=1,
            limit=0,
        ),
        ratio(0, "processor time of that, s", spent),
    ]


def exec_figures(pairs: int) -> list[Figure]:
    with _labs(workers=1) as (docker, skep):
        ways = reaching.ways(skep, docker)

        async def turn(way: str) -> float:
            return await asyncio.to_thread(_took_ms, ways[way])

        async def one(number: int) -> dict[str, float]:
            return await alternate(list(ways), number, TURNS, turn)

        def spent(lab: Lab) -> Metrics:
            before = group_processor_s(lab.cgroup)
            for _ in range(EXECS):
                ways["requests, Docker" if lab is docker else "requests, Skep"]()
            return {"ms": (group_processor_s(lab.cgroup) - before) / EXECS * 1e3}

        asyncio.run(one(0))  # not timed, because the first command has additional work
        values, busy = asyncio.run(run_undisturbed(pairs, one))
        processor, _ = side_by_side((docker, skep), pairs, spent)

    def beside(first: str, second: str) -> Sides:
        return {way: [value[way] for value in values] for way in (first, second)}

    return [
        ratio(
            2,
            "exec: its three requests, ms",
            beside("requests, Docker", "requests, Skep"),
            limit=0.7,  # runc alone takes 0.61 (docs/decisions/0105)
            busy=busy,
        ),
        ratio(
            3,
            "exec from another node, ms",
            beside("requests, same node", "requests, another node"),
            limit=1.5,
        ),
        ratio(0, "exec: processor ms of its three requests", processor["ms"]),
        ratio(0, "docker exec, ms", beside("docker exec, Docker", "docker exec, Skep")),
        ratio(
            0, "skep exec from another node, ms", beside("skep exec, same node", "skep exec, another node")
        ),
        ratio(
            0,
            "what no exec can be faster than: runc exec alone, ms",
            beside("requests, Docker", "runc, Skep"),
        ),
        ratio(0, "the same of Docker's, ms", beside("requests, Docker", "runc, Docker")),
    ]


def _took_ms(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return (time.perf_counter() - began) * 1e3


def health_figures(pairs: int) -> list[Figure]:
    with _labs() as labs:
        found = {lab.system: _probed(lab, pairs) for lab in labs}

    def sides(metric: str) -> Sides:
        return {system: [window[metric] for window in windows] for system, windows in found.items()}

    what = "health checks of 1 s:"
    return [
        ratio(4, f"{what} processor ms per probe", sides("ms per probe"), limit=1.0),
        ratio(0, f"{what} processor s each second", sides("s each second")),
        ratio(0, f"{what} probes each second", sides("probes each second")),
    ]


def _probed(lab: Lab, windows: int) -> list[Metrics]:
    """Measure each window by the processor time of the system's control group."""
    check = {"Test": ["CMD", "true"], "Interval": SECOND_NS, "Timeout": 120 * SECOND_NS, "Retries": 1000}
    body = {
        "Image": lab.image,
        "Cmd": ["sleep", "3600"],
        "Healthcheck": check,
        "HostConfig": {"NetworkMode": "none"},
    }
    ids = [lab.engine.post("/containers/create", body)["Id"] for _ in range(PROBED)]
    for id in ids:
        lab.engine.post(f"/containers/{id}/start")
    time.sleep(SETTLED_S)
    found = [_window(lab) for _ in range(windows)]
    for id in ids:
        lab.engine.raw("DELETE", f"/containers/{id}?force=1")
    return found


def _window(lab: Lab) -> Metrics:
    before, began = group_processor_s(lab.cgroup), time.monotonic()
    events = lab.engine.listen('/events?filters={"event":["exec_die"]}', WINDOW_S)
    spent, took = group_processor_s(lab.cgroup) - before, time.monotonic() - began
    probes = events.count(b'"Action":"exec_die"')
    if not probes:
        raise SystemExit(f"{lab.system}: no container was probed within {took:.0f} s")
    return {
        "ms per probe": spent / probes * 1e3,
        "s each second": spent / took,
        "probes each second": probes / took,
    }


def secret_figures(pairs: int) -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="skep-bench-", dir="/var/tmp") as directory, ExitStack() as stack:
        lab = SkepLab(Path(directory) / "skep", "around")
        stack.callback(lab.down)
        lab.up_alone()
        data = base64.b64encode(os.urandom(SECRET_BYTES)).decode()
        id = lab.engine.post("/secrets/create", {"Name": "key", "Data": data})["ID"]
        file = {"Name": "key", "UID": "0", "GID": "0", "Mode": 0o444}
        secrets = {"without": [], "with": [{"File": file, "SecretID": id, "SecretName": "key"}]}

        async def turn(way: str) -> float:
            return await asyncio.to_thread(_started, lab, secrets[way])

        async def one(number: int) -> dict[str, float]:
            return await alternate(list(secrets), number, 1, turn)

        values, busy = asyncio.run(run_undisturbed(pairs, one))
    sent = []
    for _ in range(pairs):
        with ProcessPoolExecutor(1, get_context("spawn")) as managers:
            sent.append(
                managers.submit(dispatching.manage, TASKS, SECRET_BYTES).result()["commit_and_assign_s"]
            )
    what = f"a secret of {SECRET_BYTES // 1000} KB"
    return [
        Figure(
            number=5,
            what=f"{what}: what it adds until {TASKS} tasks of a node run",
            unit="s",
            values=tuple(value["with"] - value["without"] for value in values),
            limit=1.0,
            sides={way: tuple(value[way] for value in values) for way in secrets},
            busy=tuple(busy),
        ),
        Figure(
            number=5, what=f"{what} and a task each to {TASKS} nodes", unit="s", values=tuple(sent), limit=1.0
        ),
    ]


def _started(lab: SkepLab, secrets: list[Any]) -> float:
    """Return the seconds until all tasks of a service run."""
    container = {"Image": lab.image, "Command": WORKLOAD, "Secrets": secrets}
    began = time.monotonic()
    id = service(lab, "secret", TASKS, ContainerSpec=container)
    wait_for(lambda: len(running(lab, id)) >= TASKS, poll_s=POLL_MANY_S)
    took = time.monotonic() - began
    clear(lab)
    return took


def compose_figures(pairs: int) -> list[Figure]:
    with _labs() as labs, tempfile.TemporaryDirectory(prefix="skep-bench-") as directory:
        file = Path(directory, "compose.yaml")

        def measure(lab: Lab) -> Metrics:
            file.write_text(json.dumps(_project(lab.image)))
            began = time.monotonic()
            _compose(lab, file, "up", "--detach")
            up, began = time.monotonic() - began, time.monotonic()
            _compose(lab, file, "down")
            return {"up": up, "down": time.monotonic() - began}

        for lab in labs:
            measure(lab)  # not counted, because the first run has additional work
        sides, busy = side_by_side(labs, pairs, measure)
    return [
        ratio(6, f"docker compose up of {SERVICES} services, s", sides["up"], limit=0.5, busy=busy),
        ratio(0, "docker compose down of them, s", sides["down"]),
    ]


def _project(image: str) -> Mapping[str, Any]:
    command = [word.replace("$", "$$") for word in WORKLOAD]  # a single dollar sign begins a Compose variable
    one = {"image": image, "command": command}
    return {"name": "ten", "services": {f"s{number}": one for number in range(SERVICES)}}


def _compose(lab: Lab, file: Path, *words: str) -> None:
    """Run Compose.  Raises: SystemExit: it failed."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": "/nonexistent",
        "DOCKER_HOST": f"unix://{lab.engine.path}",
    }
    command = [str(plugin("docker-compose")), "--progress", "quiet", "--file", str(file), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{lab.system}: docker compose {' '.join(words)}: {done.stderr}")


PARTS = {
    "logs": log_figures,
    "exec": exec_figures,
    "health": health_figures,
    "secret": secret_figures,
    "compose": compose_figures,
}

if __name__ == "__main__":
    run_parts(__doc__, "around", PARTS)
