"""Ten stacks of a fault run: the operations of their owners, and constant requests of their customers.

Every stack has a published service and one behind it on a separate network, which is encrypted in every second stack.
It also has a secret, volumes and a health check.  Owners deploy with ``skep stack deploy``.  Acknowledged changes are
recorded.
"""

import base64
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from bench import soak_networks
from bench.engine import Engine
from bench.soak_users import DEADLINE_S, Users
from skep.model.options.labels import VOLUME_AFFINITY, VolumeAffinity
from skep.playground.description import PlaygroundNode

STACKS = 10
REPLICAS = (2, 3, 4)
"""Possible numbers of replicas, at least two, because a single replica would be down while its node is drained."""
KEPT_MAX = 200
"""Limit for the created configs that are kept."""
JOB_RUNS = 4
ASKERS = 2
PAUSE_S = 0.05
COMMAND_S = 300.0
FAILED_MAX = 50
"""Limit for the failed requests whose text is kept."""
SKEP = str(Path(sys.executable).with_name("skep"))


def skep(node: PlaygroundNode, *words: str, within_s: float = COMMAND_S) -> str:
    """Run ``skep`` as an operator of ``node``, and return its output.  Raises: AssertionError: it failed."""
    command = (SKEP, "--host", node.endpoint, *words)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=within_s)
    assert done.returncode == 0, f"skep {' '.join(words)}: {done.stderr[-800:]}"
    return done.stdout


class Stacks(Users):
    """The stacks and their owners.  ``commands`` runs ``skep`` on an available manager."""

    def __init__(
        self,
        engine: Callable[[], Engine],
        image: str,
        rng: random.Random,
        commands: Callable[..., str],
        folder: Path,
    ) -> None:
        super().__init__(engine, image, rng)
        self._skep = commands
        self._folder = folder
        self._files: dict[int, dict[str, Any]] = {}
        self.configs: list[str] = []
        """Acknowledged configs that were not removed."""
        self.acknowledged = 0

    def prepare(self) -> None:
        """Deploy all stacks."""
        for number in range(STACKS):
            self._files[number] = a_stack(number)
            self._new_secret(number, 0)
            self._deploy(number)
            for service in ("web", "api"):
                self.wanted[f"day{number}_{service}"] = 2

    def step(self) -> str:
        """Do the next operation of an owner, and describe it."""
        self._steps += 1
        some = (self._update_stack, self._scale_stack, self._rotate, self._run_job, self._keep_config)
        return self._random.choice(some)()

    def difference(self) -> str:
        """Return the differences of users, missing acknowledged objects, and updates in progress."""
        if different := super().difference():
            return different
        names = {one["Spec"]["Name"] for one in self._engine().get("/configs")}
        if lost := set(self.configs) - names:
            return f"configs {sorted(lost)[:5]} were acknowledged, and are not there"
        for service in self._engine().get("/services"):
            state = (service.get("UpdateStatus") or {}).get("State", "completed")
            if state != "completed":
                return f"the update of {service['Spec']['Name']} is {state}"
        return ""

    def remove_all(self) -> None:
        for number in range(STACKS):
            self._skep("stack", "rm", f"day{number}")
        self.wanted.clear()
        self.services.clear()

    # -- the steps -------------------------------------------------------------------------------------------------

    def _update_stack(self) -> str:
        number = self._random.randrange(STACKS)
        for one in self._files[number]["services"].values():
            one["environment"]["STEP"] = str(self._steps)
        self._deploy(number)
        return f"update day{number}"

    def _scale_stack(self) -> str:
        number, replicas = self._random.randrange(STACKS), self._random.choice(REPLICAS)
        self._files[number]["services"]["web"]["deploy"]["replicas"] = replicas
        self._deploy(number)
        self.wanted[f"day{number}_web"] = replicas
        return f"scale day{number}_web to {replicas}"

    def _rotate(self) -> str:
        number = self._random.randrange(STACKS)
        self._new_secret(number, self._steps)
        self._deploy(number)
        return f"rotate the secret of day{number}"

    def _run_job(self) -> str:
        name = f"job{self._steps}"
        container = {"Image": self._image, "Command": ["true"]}
        mode = {"ReplicatedJob": {"MaxConcurrent": 2, "TotalCompletions": JOB_RUNS}}
        spec = {"Name": name, "TaskTemplate": {"ContainerSpec": container}, "Mode": mode}
        self._patiently("POST", "/services/create", spec)
        self.until(lambda: self._completed(name) == JOB_RUNS, f"{name} has run {JOB_RUNS} times")
        self._patiently("DELETE", f"/services/{name}", gone_is_fine=True)
        return f"run {name}"

    def _completed(self, name: str) -> int:
        tasks = self._engine().get("/tasks", filters={"service": [name]})
        return sum(task["Status"]["State"] == "complete" for task in tasks)

    def _keep_config(self) -> str:
        name = f"note{self._steps}"
        data = base64.b64encode(name.encode()).decode()
        self._patiently("POST", "/configs/create", {"Name": name, "Data": data})
        self.acknowledged += 1
        self.configs.append(name)
        if len(self.configs) > KEPT_MAX:
            self._patiently("DELETE", f"/configs/{self.configs.pop(0)}", gone_is_fine=True)
        return f"keep {name}"

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for ``condition``.  Raises: AssertionError: it was not met in time."""
        deadline = time.monotonic() + DEADLINE_S
        while not self.until_answered(condition):
            assert time.monotonic() < deadline, f"not within {DEADLINE_S} s: {what}"
            time.sleep(0.2)

    def _new_secret(self, number: int, version: int) -> None:
        data = f"secret {version} of day{number}".encode()
        (self._folder / f"key{number}").write_bytes(data)
        for service, port in (("web", 20000 + number), ("api", 0)):
            name = f"day{number}_{service}"
            networks = (f"day{number}_net",)
            self.services[name] = soak_networks.Service(name, networks, port, secret=data)

    def _deploy(self, number: int) -> None:
        file = self._folder / f"day{number}.json"
        file.write_text(json.dumps(self._files[number]))
        self._skep("stack", "deploy", "-c", str(file), "--resolve-image", "never", f"day{number}")
        self.acknowledged += 1


def a_stack(number: int) -> dict[str, Any]:
    """Return the Compose file of a stack."""

    def service(name: str) -> dict[str, Any]:
        return {
            "image": "busybox:1",
            "command": ["sh", "-c", soak_networks.SERVER.replace("$", "$$")],
            "environment": {"SERVICE": f"day{number}_{name}", "STEP": "0"},
            "secrets": [{"source": "key", "target": soak_networks.SECRET}],
            "volumes": [f"{name}:/data"],
            "networks": ["net"],
            "stop_grace_period": "5s",
            "healthcheck": {
                "test": ["CMD", "wget", "-q", "-O", "/dev/null", f"http://127.0.0.1:{soak_networks.PORT}/"],
                "interval": "30s",
                "timeout": "20s",
                "start_period": "60s",
                "start_interval": "500ms",
            },
            "deploy": {
                "replicas": 2,
                # An upgrade refuses crowded nodes, and tasks that return to their data cannot be spread before it.
                "labels": {VOLUME_AFFINITY: VolumeAffinity.NONE.value},
                "update_config": {"order": "start-first", "parallelism": 1, "monitor": "1s"},
                "restart_policy": {"condition": "any", "delay": "0s"},
            },
        }

    web = service("web")
    web["ports"] = [{"target": soak_networks.PORT, "published": 20000 + number, "mode": "ingress"}]
    encrypted = {"driver_opts": {"encrypted": ""}} if number % 2 else {}
    return {
        "services": {"web": web, "api": service("api")},
        "networks": {"net": {"driver": "overlay", **encrypted}},
        "volumes": {"web": {}, "api": {}},
        "secrets": {"key": {"file": f"./key{number}"}},
    }


class Asked(msgspec.Struct):
    """Requests during one event."""

    count: int = 0
    failed: int = 0


class Customers:
    """Sends requests to published ports all the time.

    ``during`` names the current event.  A lost machine interrupts requests, so they are not promised during such an
    event.
    """

    def __init__(
        self, nodes: Callable[[], Sequence[PlaygroundNode]], services: Callable[[], Sequence[Any]]
    ) -> None:
        """``nodes`` returns the available nodes.

        ``services`` returns the services to request (``soak_networks.Service``).
        """
        self._nodes, self._services = nodes, services
        self._lock = threading.Lock()
        self._stopped, self._open = threading.Event(), threading.Event()
        self._open.set()
        self._now = ("quiet", True)
        self.asked: dict[tuple[str, bool], Asked] = {}
        self.broken: list[str] = []
        """Descriptions of requests that failed although they were promised."""

    @contextmanager
    def running(self) -> Iterator[None]:
        """Send requests in separate threads."""
        threads = [threading.Thread(target=self._ask_on, args=(seed,)) for seed in range(ASKERS)]
        for one in threads:
            one.start()
        try:
            yield
        finally:
            self._stopped.set()
            self._open.set()
            for one in threads:
                one.join()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Pause while counters of the machines are compared."""
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()

    def during(self, what: str, *, is_promised: bool) -> None:
        """Set the current event."""
        self._now = (what, is_promised)

    def note(self, before: tuple[str, bool], after: tuple[str, bool], wrong: str) -> None:
        """Record the end of a request.  It is promised if it was both when it began and when it ended."""
        during = before if not before[1] else after
        with self._lock:
            asked = self.asked.setdefault(during, Asked())
            asked.count += 1
            asked.failed += bool(wrong)
            if wrong and during[1] and len(self.broken) < FAILED_MAX:
                self.broken.append(f"{time.strftime('%H:%M:%S', time.gmtime())} {during[0]}: {wrong}")

    def _ask_on(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self._stopped.wait(PAUSE_S):
            self._open.wait()
            nodes, services = self._nodes(), self._services()
            if len(nodes) < 2 or not services:
                continue
            (asking, at), service, before = rng.sample(list(nodes), 2), rng.choice(services), self._now
            wrong = _wrong(asking, at, service)
            self.note(before, self._now, wrong)


def _wrong(asking: PlaygroundNode, at: PlaygroundNode, service: Any) -> str:
    """Return why a request from one machine to another was not served, or an empty string.

    During a rotation of a secret its page may have either value.
    """
    where = f"{service.name} asked by {asking.name} at {at.name}"
    try:
        body = soak_networks.within(
            Path(asking.netns), lambda: soak_networks.fetched(at.addr, service.published)
        )
    except OSError as error:
        return f"{where}: {error}"
    is_its = body.startswith(f"{service.name} ".encode()) and body.endswith(b" kept")
    return "" if is_its else f"{where}: {body[:60]!r}"
