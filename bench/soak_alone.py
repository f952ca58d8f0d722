"""Puts load and faults on one node: kills daemons, conmon processes and containers while services change."""

import os
import random
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

from bench import soak_daemons, soak_networks
from bench.engine import EngineError
from bench.skep_lab import SkepLab
from bench.soak_users import DEADLINE_S, Log, Users, counted
from skep.node.supervision.supervisor import CRASH_WINDOW_S

MEASURE_EVERY_S = 600.0
MEASURES_MIN = 10
MEMORY_GROWTH_MAX = 1.3
FILES_GROWTH_MAX = 1.5


def soak(directory: Path, minutes: float, rng: random.Random, faults: float, log: Log) -> None:
    """Run a soak.  Raises: AssertionError: an invariant was violated.  Then the node's log is kept in the directory of
    ``log``.
    """
    lab = SkepLab(directory, "soak")
    try:
        lab.up_alone()
        Soak(lab, rng, faults, log).run(minutes)
    except BaseException:
        shutil.copy(directory / "m1/skep.log", log.path.with_suffix(".skep.log"))
        raise
    finally:
        lab.down()


class Soak:
    """One run on one node."""

    def __init__(self, lab: SkepLab, rng: random.Random, faults: float, log: Log) -> None:
        """``faults`` is the share of the rounds in which something is killed."""
        self._lab, self._random, self._say, self._fault_share = lab, rng, log, faults
        self._users = Users(lambda: lab.engine, lab.image, rng)
        self._rounds = self._faults = 0
        self._kills: list[float] = []

    def run(self, minutes: float) -> None:
        """Do rounds for ``minutes``."""
        every_s = min(MEASURE_EVERY_S, minutes * 60 / MEASURES_MIN)
        end, measured = time.monotonic() + minutes * 60, -every_s
        first: soak_daemons.Held | None = None
        self._users.prepare()
        while time.monotonic() < end:
            self._round()
            if time.monotonic() - measured >= every_s and self._rounds >= 20:
                measured = time.monotonic()
                now = self._measure()
                first = first or now
        self._users.remove_all()
        self._settle("after the last removal")
        last = self._measure()
        if first:
            grown = f"memory grew from {first.skep_mib:.1f} to {last.skep_mib:.1f} MiB"
            assert last.skep_mib <= first.skep_mib * MEMORY_GROWTH_MAX, grown
            grown = f"open files grew from {first.open_files} to {last.open_files}"
            assert last.open_files <= first.open_files * FILES_GROWTH_MAX, grown
        limit = soak_daemons.ETCD_MIB_MAX
        assert last.etcd_mib <= limit, f"etcd has grown to {last.etcd_mib:.0f} MiB"
        self._say(f"{self._rounds} rounds, {self._faults} faults: all invariants held")

    def _round(self) -> None:
        self._rounds += 1
        what = self._users.step()
        if self._random.random() < self._fault_share:
            what += f", {self._fault()}"
        self._settle(what)

    def _fault(self) -> str:
        now = time.monotonic()
        self._kills = [at for at in self._kills if now - at < CRASH_WINDOW_S]
        candidates = [*soak_daemons.VICTIMS, "a container"]
        if len(self._kills) >= soak_daemons.GIVEN_UP_KILLS_MAX:
            candidates = [one for one in candidates if one not in soak_daemons.GIVEN_UP]
        victim = self._random.choice(candidates)
        pids = self._container_pids() if victim == "a container" else self._pids(victim)
        if not pids:
            return f"no {victim} to kill"
        self._faults += 1
        if victim in soak_daemons.GIVEN_UP:
            self._kills.append(now)
        with suppress(ProcessLookupError):  # it has just ended by itself
            os.kill(self._random.choice(pids), signal.SIGKILL)
        return f"kill -9 {victim}"

    def _pids(self, comm: str) -> list[int]:
        return soak_daemons.pids(self._lab.netns, self._lab.root_pids, comm)

    def _container_pids(self) -> list[int]:
        containers = self._users.until_answered(lambda: self._lab.engine.get("/containers/json"))
        pids = []
        for container in containers:
            try:
                pids.append(self._lab.engine.get(f"/containers/{container['Id']}/json")["State"]["Pid"])
            except EngineError:
                continue  # it ended in between
        return [pid for pid in pids if pid]

    def _settle(self, what: str) -> None:
        """Wait until the cluster is in its desired state, and log how long that took."""
        began = time.monotonic()
        while difference := self._users.until_answered(self._difference):
            assert time.monotonic() - began < DEADLINE_S, f"after {what}: {difference} for {DEADLINE_S} s"
            time.sleep(0.05)
        self._say(f"round {self._rounds}: {what}: settled in {time.monotonic() - began:.2f} s")

    def _difference(self) -> str:
        if difference := self._users.difference():
            return difference
        containers = counted(
            container["Labels"]["com.docker.swarm.service.name"]
            for container in self._lab.engine.get("/containers/json")
        )
        wanted = self._users.wanted_running()
        if containers != wanted:
            return f"containers {containers} instead of {wanted}"
        return soak_networks.faults([(self._lab.described, self._lab.engine)], self._users.services)

    def _measure(self) -> soak_daemons.Held:
        deadline = time.monotonic() + DEADLINE_S
        while not all(self._pids(name) for name in soak_daemons.DAEMONS if name != "conmon"):
            assert time.monotonic() < deadline, (
                f"a daemon stays away for {DEADLINE_S} s"
            )  # it was killed just now
            time.sleep(0.2)
        held = soak_daemons.held(self._lab.netns, self._lab.root_pids)
        total = held.skep_mib + held.etcd_mib
        self._say(f"daemons: {total:.1f} MiB of memory ({held.each}), {held.open_files} open files")
        return held
