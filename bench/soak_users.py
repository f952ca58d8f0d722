"""The requests of users during a soak, and their patience with a cluster whose daemons are being killed."""

import random
import sys
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from bench import soak_networks
from bench.engine import Engine, EngineError

DEADLINE_S = 120.0
"""Time limit in seconds for a request to be accepted, and for the requested state to be reached."""
SERVICES_MAX = 8
REPLICAS_MAX = 5
TASKS_MAX = 20
"""Limit for the tasks of all services.

Each container has an entry for every other one in the kernel's table of neighbors, which all nodes of a playground
share.  Where its limit of 1,024 entries cannot be raised, some 30 containers fill it.
"""
T = TypeVar("T")


class Log:
    """Writes lines with the time of day to the file and to the terminal."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, text: str) -> None:
        line = f"{datetime.now(UTC):%H:%M:%S} {text}"
        print(line, file=sys.stderr, flush=True)
        with self.path.open("a") as file:
            file.write(line + "\n")


class Users:
    """Does one random step at a time.  ``wanted`` has the requested replicas by service name."""

    def __init__(self, engine: Callable[[], Engine], image: str, rng: random.Random) -> None:
        """``engine`` returns the endpoint for each attempt."""
        self._engine, self._image, self._random = engine, image, rng
        self.wanted: dict[str, int] = {}
        self.services: dict[str, soak_networks.Service] = {}
        self._secret = ""
        self._steps = 0

    def prepare(self) -> None:
        """Create the networks and the secret of the services."""
        self.until_answered(lambda: soak_networks.make(self._engine()))
        self._secret = self.until_answered(lambda: soak_networks.secret_id(self._engine()))

    def step(self) -> str:
        """Make a new request, and describe it."""
        self._steps += 1
        if len(self.wanted) < 2:
            return self._create()
        return self._random.choice([self._create, self._scale, self._update, self._remove_one])()

    def remove_all(self) -> None:
        for name in list(self.wanted):
            self._remove(name)

    def difference(self) -> str:
        """Return the difference between the services with running tasks and the requested state, or an empty
        string.
        """
        engine = self._engine()
        tasks = engine.get("/tasks")
        names = {service["ID"]: service["Spec"]["Name"] for service in engine.get("/services")}
        if sorted(names.values()) != sorted(self.wanted):
            return f"services {sorted(names.values())} instead of {sorted(self.wanted)}"
        running = counted(
            names.get(task["ServiceID"], "?")
            for task in tasks
            if task["Status"]["State"] == "running" and task["DesiredState"] == "running"
        )
        wanted = self.wanted_running()
        return "" if running == wanted else f"running tasks {running} instead of {wanted}"

    def wanted_running(self) -> dict[str, int]:
        return {name: replicas for name, replicas in self.wanted.items() if replicas}

    def until_answered(self, attempt: Callable[[], T]) -> T:
        """Repeat while no endpoint responds, or it responds with 500 or 503."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            try:
                return attempt()
            except (OSError, EngineError) as error:
                will_pass = not isinstance(error, EngineError) or error.status in (500, 503)
                if not will_pass or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    # -- the steps -------------------------------------------------------------------------------------------------

    def _create(self) -> str:
        if len(self.wanted) >= SERVICES_MAX:
            return self._remove_one()
        name = f"s{self._steps}"
        replicas = self._replicas(name)
        self._patiently("POST", "/services/create", self._spec(name, replicas))
        self.wanted[name] = replicas
        return f"create {name} x {replicas}"

    def _scale(self) -> str:
        name = self._any()
        replicas = self._replicas(name)
        self._change(name, lambda spec: spec["Mode"]["Replicated"].update(Replicas=replicas))
        self.wanted[name] = replicas
        return f"scale {name} to {replicas}"

    def _replicas(self, name: str) -> int:
        others = sum(self.wanted.values()) - self.wanted.get(name, 0)
        return min(self._random.randint(0, REPLICAS_MAX), TASKS_MAX - others)

    def _update(self) -> str:
        name, number = self._any(), self._steps
        self._change(name, lambda spec: _set_env(spec, f"STEP={number}"))
        return f"update {name}"

    def _remove_one(self) -> str:
        name = self._any()
        self._remove(name)
        return f"remove {name}"

    def _remove(self, name: str) -> None:
        self._patiently("DELETE", f"/services/{name}", gone_is_fine=True)
        del self.wanted[name], self.services[name]

    def _change(self, name: str, edit: Callable[[Any], None]) -> None:
        def attempt() -> None:
            engine = self._engine()
            service = engine.get(f"/services/{name}")
            edit(service["Spec"])
            engine.post(f"/services/{name}/update", service["Spec"], version=service["Version"]["Index"])

        self.until_answered(attempt)

    def _patiently(self, method: str, path: str, body: Any = None, *, gone_is_fine: bool = False) -> None:
        """Repeat a request until it is accepted.  An attempt whose response was lost may have been accepted before."""
        tries = 0

        def attempt() -> None:
            nonlocal tries
            tries += 1
            try:
                self._engine().call(method, path, body)
            except EngineError as error:
                was_taken_before = tries > 1 and error.status == 409
                if not was_taken_before and not (gone_is_fine and error.status == 404):
                    raise

        self.until_answered(attempt)

    def _any(self) -> str:
        return self._random.choice(sorted(self.wanted))

    def _spec(self, name: str, replicas: int) -> dict[str, Any]:
        service = self.services[name] = soak_networks.chosen(name, self._steps, self._random)
        return {
            "Name": name,
            **soak_networks.spec_of(service, self._image, self._secret, self._random),
            "UpdateConfig": {"Parallelism": 0, "Monitor": 1},
            "Mode": {"Replicated": {"Replicas": replicas}},
        }


def _set_env(spec: Any, variable: str) -> None:
    """Replace one variable, so that the tasks differ from those before."""
    container = spec["TaskTemplate"]["ContainerSpec"]
    name = variable.partition("=")[0]
    container["Env"] = [one for one in container["Env"] if not one.startswith(f"{name}=")] + [variable]


def counted(words: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for word in words:
        counts[word] = counts.get(word, 0) + 1
    return counts
