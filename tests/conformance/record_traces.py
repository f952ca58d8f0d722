"""Record what a real Docker Engine in swarm mode does with services: ``python -m tests.conformance.record_traces``.

As root, with dockerd; a few minutes.  The engine gets namespaces of its own and leaves nothing behind.  The traces are
kept in ``recorded/traces.json``; they are data for tests, made by this script alone.
"""

import asyncio
import json
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any, assert_never

import msgspec

from bench.docker_lab import DockerLab
from bench.engine import EngineError
from skep.model.service import ServiceSpec
from skep.playground.images.busybox import busybox_archive
from tests.conformance.record import RECORDED
from tests.conformance.traces import (
    CRASHES,
    CRASHES_AFTER_S,
    LONGEST_S,
    MISSING,
    QUIET_S,
    SCENARIOS,
    Act,
    Action,
    Create,
    Observer,
    Seen,
    Update,
)

_RUN = ["sh", "-c", "trap 'exit 0' TERM INT; while :; do sleep 3600 & wait $!; done"]
_CRASH = ["sh", "-c", f"sleep {CRASHES_AFTER_S}; exit 1"]


class Swarm:
    """One engine and its service."""

    def __init__(self, lab: DockerLab) -> None:
        self._lab = lab
        self._engine = lab.engine
        self._id = ""

    def record(self, actions: tuple[Action, ...]) -> list[Seen]:
        observer, began = Observer(), time.monotonic()
        for action in actions:
            self._act(action)
            changed_at = acted_at = time.monotonic()
            while time.monotonic() < min(changed_at + QUIET_S, acted_at + LONGEST_S):
                before = len(observer.trace)
                self._look(observer, time.monotonic() - began)
                if len(observer.trace) > before:
                    changed_at = time.monotonic()
                time.sleep(0.005)
        return observer.trace

    def clean(self) -> None:
        for service in self._engine.get("/services"):
            self._engine.delete(f"/services/{service['ID']}")
        while self._engine.get("/containers/json", all="1"):
            time.sleep(0.1)

    def _act(self, action: Action) -> None:
        match action:
            case Create(spec):
                self._id = self._engine.post("/services/create", self._body(spec))["ID"]
            case Update(spec):
                self._engine.post(f"/services/{self._id}/update", self._body(spec), version=self._version())
            case Act("rollback"):
                spec = self._engine.get(f"/services/{self._id}")["Spec"]
                query = {"version": self._version(), "rollback": "previous"}
                self._engine.post(f"/services/{self._id}/update", spec, **query)
            case Act("crash"):
                self._kill()
            case Act("drain" | "activate" as what):
                (node,) = self._engine.get("/nodes")
                spec = {**node["Spec"], "Availability": "drain" if what == "drain" else "active"}
                self._engine.post(f"/nodes/{node['ID']}/update", spec, version=node["Version"]["Index"])
            case Act():
                self._engine.delete(f"/services/{self._id}")
            case _:
                assert_never(action)

    def _version(self) -> int:
        version: int = self._engine.get(f"/services/{self._id}")["Version"]["Index"]
        return version

    def _kill(self) -> None:
        (task,) = [t for t in self._tasks() if t["Slot"] == 1 and t["Status"]["State"] == "running"]
        os.kill(task["Status"]["ContainerStatus"]["PID"], signal.SIGKILL)

    def _body(self, spec: ServiceSpec) -> Any:
        """The spec with what its image stands for."""
        body = json.loads(msgspec.json.encode(spec))
        container = body["TaskTemplate"]["ContainerSpec"]
        image = container["Image"]
        container["Image"] = "localhost:1/nosuch:1" if image == MISSING else self._lab.image
        container["Command"] = _CRASH if image == CRASHES else _RUN
        container["Env"] = [f"IMAGE={image}"]
        return body

    def _tasks(self) -> list[Any]:
        found: list[Any] = self._engine.get("/tasks")
        return [task for task in found if task["ServiceID"] == self._id]

    def _look(self, observer: Observer, at_s: float) -> None:
        try:
            status = self._engine.get(f"/services/{self._id}").get("UpdateStatus") or {}
        except EngineError:
            status = {}
        tasks = [
            (one["ID"], one["Slot"], one["CreatedAt"], one["DesiredState"], one["Status"]["State"])
            for one in self._tasks()
        ]
        observer.look(at_s, tasks, (status.get("State", ""), status.get("Message", "")))


def main() -> None:
    archive = asyncio.run(busybox_archive())
    traces: dict[str, list[Seen]] = {}
    with tempfile.TemporaryDirectory(prefix="skep-traces-", dir="/var/tmp") as directory:
        lab = DockerLab(Path(directory) / "docker")
        try:
            lab.up(archive.data, archive.image_id)
            version = lab.version()
            for scenario in SCENARIOS:
                swarm = Swarm(lab)
                traces[scenario.name] = swarm.record(scenario.actions)
                print(f"{scenario.name}: {len(traces[scenario.name])} changes", flush=True)
                swarm.clean()
        finally:
            lab.down()
    text = msgspec.json.encode({"engine": version, "traces": traces})
    (RECORDED / "traces.json").write_bytes(msgspec.json.format(text, indent=1) + b"\n")


if __name__ == "__main__":
    main()
