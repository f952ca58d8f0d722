"""Hours of load and faults on one node, with its invariants checked all along.

Each round does something a user does (create, scale, update, remove) and, now and then, something nobody wants: SIGKILL
of the node process, the manager, etcd, the net process, a conmon, a container.  After each round the cluster has to
reach the wanted state within its deadline: as many running tasks and containers as asked for, none doubled, none left
over.  Every ten minutes the daemons' memory and open files are written down; at the end they may not have grown beyond
their bounds.

    .venv/bin/python -m bench.soak --minutes 120 --seed 7
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.engine import EngineError
from bench.machine import daemons
from bench.run import RESULTS, commit
from bench.scenarios import WORKLOAD
from bench.skep_lab import SkepLab
from skep.node.supervision.restart import CRASH_WINDOW_S

DEADLINE_S = 60.0
MEASURE_EVERY_S = 600.0
MEASURES_MIN = 10
MEMORY_GROWTH_MAX = 1.3
FILES_GROWTH_MAX = 1.5
ETCD_MIB_MAX = 128
"""etcd's collector is told to keep to 64 MiB; it begins far below, so its growth by itself means nothing."""
GIVEN_UP = frozenset({"skep-manager", "etcd"})
GIVEN_UP_KILLS_MAX = 3
"""Of those together, within a minute: after five ends they are given up, as they should be."""
SERVICES_MAX = 6
REPLICAS_MAX = 8
DAEMONS = ("skep-node", "skep-manager", "etcd", "skep-net", "conmon")


class Soak:
    """One run; ``wanted`` is what the cluster was asked for: service name -> replicas."""

    def __init__(self, lab: SkepLab, seed: int, log: Path, faults: float) -> None:
        """``faults``: share of the rounds in which something is killed."""
        self.lab, self.random, self._log, self._fault_share = lab, random.Random(seed), log, faults
        self.wanted: dict[str, int] = {}
        self.rounds = self.faults = 0
        self._kills: list[float] = []

    def run(self, minutes: float) -> None:
        """Do rounds for ``minutes``.  Raises: AssertionError: an invariant does not hold."""
        self.say(f"soak of {minutes:g} minutes, commit {commit()}")
        every_s = min(MEASURE_EVERY_S, minutes * 60 / MEASURES_MIN)
        end, measured = time.monotonic() + minutes * 60, -every_s
        first: dict[str, float] = {}
        while time.monotonic() < end:
            self._round()
            if time.monotonic() - measured >= every_s and self.rounds >= 20:
                measured = time.monotonic()
                now = self._measure()
                first = first or now
        for name in list(self.wanted):
            self._remove(name)
        self._settle("after the last removal")
        last = self._measure()
        for what, limit in (("memory_mib", MEMORY_GROWTH_MAX), ("open_files", FILES_GROWTH_MAX)):
            assert not first or last[what] <= first[what] * limit, (
                f"{what} grew from {first[what]} to {last[what]}"
            )
        assert last["etcd_mib"] <= ETCD_MIB_MAX, f"etcd has grown to {last['etcd_mib']:.0f} MiB"
        self.say(f"{self.rounds} rounds, {self.faults} faults: all invariants held")

    def _round(self) -> None:
        self.rounds += 1
        steps = (
            [self._create]
            if len(self.wanted) < 2
            else [self._create, self._scale, self._update, self._remove_one]
        )
        step = self.random.choice(steps)
        what = step()
        if self.random.random() < self._fault_share:
            what += f", {self._fault()}"
        self._settle(what)

    # -- what users do ---------------------------------------------------------------------------------------------

    def _create(self) -> str:
        if len(self.wanted) >= SERVICES_MAX:
            return self._remove_one()
        name, replicas = f"s{self.rounds}", self.random.randint(0, REPLICAS_MAX)
        spec = self._spec(name, replicas)
        self._patiently("POST", "/services/create", spec)
        self.wanted[name] = replicas
        return f"create {name} x {replicas}"

    def _scale(self) -> str:
        name, replicas = self._any(), self.random.randint(0, REPLICAS_MAX)
        self._change(name, lambda spec: spec["Mode"]["Replicated"].update(Replicas=replicas))
        self.wanted[name] = replicas
        return f"scale {name} to {replicas}"

    def _update(self) -> str:
        name, number = self._any(), self.rounds
        self._change(name, lambda spec: spec["TaskTemplate"]["ContainerSpec"].update(Env=[f"ROUND={number}"]))
        return f"update {name}"

    def _remove_one(self) -> str:
        name = self._any()
        self._remove(name)
        return f"remove {name}"

    def _remove(self, name: str) -> None:
        self._patiently("DELETE", f"/services/{name}", gone_is_fine=True)
        del self.wanted[name]

    def _change(self, name: str, edit: Any) -> None:
        def attempt() -> None:
            service = self.lab.engine.get(f"/services/{name}")
            edit(service["Spec"])
            self.lab.engine.post(
                f"/services/{name}/update", service["Spec"], version=service["Version"]["Index"]
            )

        self._until_answered(attempt)

    # -- what nobody wants -----------------------------------------------------------------------------------------

    def _fault(self) -> str:
        now = time.monotonic()
        self._kills = [at for at in self._kills if now - at < CRASH_WINDOW_S]
        candidates = [*DAEMONS, "a container"]
        if len(self._kills) >= GIVEN_UP_KILLS_MAX:
            candidates = [one for one in candidates if one not in GIVEN_UP]
        victim = self.random.choice(candidates)
        pids = self._container_pids() if victim == "a container" else self._pids(victim)
        if not pids:
            return f"no {victim} to kill"
        self.faults += 1
        if victim in GIVEN_UP:
            self._kills.append(now)
        with suppress(ProcessLookupError):  # it has just ended by itself
            os.kill(self.random.choice(pids), signal.SIGKILL)
        return f"kill -9 {victim}"

    def _pids(self, comm: str) -> list[int]:
        found = []
        for pid in daemons(self.lab.netns, self.lab.root_pids):
            try:
                if Path(f"/proc/{pid}/comm").read_text().strip() == comm:
                    found.append(pid)
            except OSError:
                continue
        return sorted(found)

    def _container_pids(self) -> list[int]:
        containers = self._until_answered(lambda: self.lab.engine.get("/containers/json"))
        pids = []
        for container in containers:
            try:
                pids.append(self.lab.engine.get(f"/containers/{container['Id']}/json")["State"]["Pid"])
            except EngineError:
                continue  # it ended in between
        return [pid for pid in pids if pid]

    # -- what must hold --------------------------------------------------------------------------------------------

    def _settle(self, what: str) -> None:
        """Wait until the cluster is as it was wanted; say how long that took."""
        began = time.monotonic()
        while difference := self._until_answered(self._difference):
            assert time.monotonic() - began < DEADLINE_S, f"after {what}: {difference} for {DEADLINE_S} s"
            time.sleep(0.05)
        self.say(f"round {self.rounds}: {what}: settled in {time.monotonic() - began:.2f} s")

    def _difference(self) -> str:
        tasks = self.lab.engine.get("/tasks")
        names = {service["ID"]: service["Spec"]["Name"] for service in self.lab.engine.get("/services")}
        if sorted(names.values()) != sorted(self.wanted):
            return f"services {sorted(names.values())} instead of {sorted(self.wanted)}"
        running = _counted(
            names.get(task["ServiceID"], "?")
            for task in tasks
            if task["Status"]["State"] == "running" and task["DesiredState"] == "running"
        )
        containers = _counted(
            container["Labels"]["com.docker.swarm.service.name"]
            for container in self.lab.engine.get("/containers/json")
        )
        wanted = {name: replicas for name, replicas in self.wanted.items() if replicas}
        if running != wanted:
            return f"running tasks {running} instead of {wanted}"
        return "" if containers == wanted else f"containers {containers} instead of {wanted}"

    def _measure(self) -> dict[str, float]:
        """Memory and open files of the daemons, without the monitors of containers.

        Memory is what each process has for itself or shares with one it was forked from, counted in full: a sum of
        shares would change with every restart, which leaves a process without those it shares with.
        """
        deadline = time.monotonic() + DEADLINE_S
        while not all(self._pids(name) for name in DAEMONS if name != "conmon"):  # one was killed just now
            assert time.monotonic() < deadline, f"a daemon stays away for {DEADLINE_S} s"
            time.sleep(0.2)
        files, mebibytes, each = 0, dict.fromkeys(DAEMONS, 0.0), []
        for pid in daemons(self.lab.netns, self.lab.root_pids):
            try:
                status = Path(f"/proc/{pid}/status").read_text()
                name = Path(f"/proc/{pid}/comm").read_text().strip()
                if name in mebibytes and name != "conmon":
                    anonymous, mapped = (_mebibytes(status, field) for field in ("RssAnon", "RssFile"))
                    files += len(os.listdir(f"/proc/{pid}/fd"))
                    mebibytes[name] += anonymous
                    each.append(f"{name} {pid} {anonymous:.1f} + {mapped:.1f} mapped")
            except (OSError, IndexError):
                continue  # it has just ended
        total = sum(mebibytes.values())
        self.say(f"daemons: {total:.1f} MiB of memory ({', '.join(each)}), {files} open files")
        etcd = mebibytes["etcd"]
        return {"memory_mib": total - etcd, "etcd_mib": etcd, "open_files": float(files)}

    # -- talking to a node whose daemons are being killed ----------------------------------------------------------

    def _patiently(self, method: str, path: str, body: Any = None, *, gone_is_fine: bool = False) -> None:
        """A request that is repeated until it was taken; one whose answer was lost may have been taken before."""
        tries = 0

        def attempt() -> None:
            nonlocal tries
            tries += 1
            try:
                self.lab.engine.call(method, path, body)
            except EngineError as error:
                was_taken_before = tries > 1 and error.status == 409
                if not was_taken_before and not (gone_is_fine and error.status == 404):
                    raise

        self._until_answered(attempt)

    def _until_answered(self, attempt: Any) -> Any:
        deadline = time.monotonic() + DEADLINE_S
        while True:
            try:
                return attempt()
            except (OSError, EngineError) as error:
                will_pass = not isinstance(error, EngineError) or error.status in (500, 503)
                if not will_pass or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def _any(self) -> str:
        return self.random.choice(sorted(self.wanted))

    def _spec(self, name: str, replicas: int) -> dict[str, Any]:
        return {
            "Name": name,
            "TaskTemplate": {
                "ContainerSpec": {"Image": self.lab.image, "Command": WORKLOAD},
                "RestartPolicy": {"Condition": "any", "Delay": 0},
            },
            "UpdateConfig": {"Parallelism": 0, "Monitor": 1},
            "Mode": {"Replicated": {"Replicas": replicas}},
        }

    def say(self, text: str) -> None:
        line = f"{datetime.now(UTC):%H:%M:%S} {text}"
        print(line, file=sys.stderr, flush=True)
        with self._log.open("a") as file:
            file.write(line + "\n")


def _mebibytes(status: str, field: str) -> float:
    """A figure of /proc/<pid>/status."""
    return int(status.partition(f"{field}:")[2].split()[0]) / 1024


def _counted(words: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for word in words:
        counts[word] = counts.get(word, 0) + 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="bench.soak", description="Load and faults, with invariants checked."
    )
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time")
    parser.add_argument("--dir", default="/var/tmp", help="where the node keeps its state; not on overlayfs")
    parser.add_argument("--faults", type=float, default=0.3, help="share of rounds with one (default 0.3)")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else int.from_bytes(os.urandom(4), "big")
    RESULTS.mkdir(exist_ok=True)
    log = RESULTS / f"soak-{datetime.now(UTC):%Y-%m-%d-%H%M}-{commit()}.log"
    with tempfile.TemporaryDirectory(prefix="skep-soak-", dir=options.dir) as directory:
        lab = SkepLab(Path(directory) / "skep", "soak")
        try:
            lab.up_alone()
            soak = Soak(lab, seed, log, options.faults)
            soak.say(f"seed {seed}, faults in {options.faults:.0%} of the rounds")
            soak.run(options.minutes)
        except BaseException:
            shutil.copy(Path(directory) / "skep/m1/skep.log", log.with_suffix(".skep.log"))
            raise
        finally:
            lab.down()


if __name__ == "__main__":
    main()
