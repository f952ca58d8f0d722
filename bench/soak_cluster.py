"""Puts load and faults on three managers and three workers: machines are lost, cut off or hang, and processes are
killed.

Faults begin between rounds and last for some rounds, so that services change while machines are down.  At most one
manager is down (the others must have a quorum), and at most one worker (more would start disruption mode, which has
separate tests).  After each round exactly the requested tasks have to run on the available machines.  Machines that are
back have to stop the tasks that others took over.

Memory is compared between calm phases: all machines are back, then the same work is done on each side of the
comparison.  Leaders are compared with leaders and other managers with other managers, because only the leader runs the
control loops.
"""

import asyncio
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from bench import soak_daemons, soak_networks
from bench.cluster_lab import engine
from bench.engine import Engine, EngineError
from bench.soak_users import DEADLINE_S, Log, Users, counted
from skep.errors import Unavailable
from skep.node.supervision.supervisor import CRASH_WINDOW_S
from skep.playground.commands import wait_until
from skep.playground.description import PlaygroundNode
from skep.playground.engine import is_up
from skep.playground.playground import Playground

MANAGERS, WORKERS = 3, 3
MANAGERS_AWAY_MAX, WORKERS_AWAY_MAX = 1, 1
AWAY_ROUNDS_MAX = 3
MEASURE_EVERY_S = 600.0
CALM_ROUNDS = 15
"""Number of rounds without faults before memory is measured, so that no manager has just started."""
MEMORY_GROWTH_MAX = 1.2
RESPONSE_S = 10.0
LATE_S = 10.0
"""Seconds after which a round's log line has the reason of its delay."""


class Away(msgspec.Struct):
    """A machine that is temporarily down or unreachable."""

    node: PlaygroundNode
    rounds_left: int
    bring_back: Callable[[str], Coroutine[Any, Any, object]]


def soak(directory: Path, minutes: float, rng: random.Random, faults: float, log: Log) -> None:
    """Run a soak.  Raises: AssertionError: an invariant was violated.  Then the nodes' logs are kept in the directory
    of ``log``.
    """
    playground = Playground(directory, "soak", lambda _: None)
    asyncio.run(playground.down())
    try:
        asyncio.run(playground.up(managers=MANAGERS, workers=WORKERS, relays=None))
        ClusterSoak(playground, rng, faults, log).run(minutes)
    except BaseException:
        for found in directory.glob("*/skep.log"):
            shutil.copy(found, log.path.with_suffix(f".{found.parent.name}.skep.log"))
        raise
    finally:
        asyncio.run(playground.down())


class ClusterSoak:
    """One run on one cluster."""

    def __init__(
        self,
        playground: Playground,
        rng: random.Random,
        faults: float,
        log: Log,
        users: Callable[[Callable[[], Engine], str, random.Random], Users] = Users,
    ) -> None:
        """``faults`` is the share of the rounds before which a fault begins."""
        self._playground, self._random, self._fault_share, self._say = playground, rng, faults, log
        cluster = playground.cluster()
        self._nodes = {node.name: node for node in cluster.nodes}
        self._users = users(self._a_manager, cluster.image, rng)
        self._away: dict[str, Away] = {}
        self._kills: dict[str, list[float]] = {}
        self._rounds = self._faults = 0

    def run(self, minutes: float) -> None:
        """Do rounds for ``minutes``.  Measure every ten minutes, or five times in a shorter run."""
        every_s = min(MEASURE_EVERY_S, minutes * 60 / 5)
        began = time.monotonic()
        end, measure_at = began + minutes * 60, began + every_s
        first: dict[str, list[float]] = {}
        self._users.prepare()
        while time.monotonic() < end:
            self._round()
            if time.monotonic() >= measure_at:
                measure_at += every_s
                now = self._calm()
                first = first or now
        last = self._calm()
        for role, before in first.items():
            for then, now_mib in zip(before, last[role], strict=True):
                grown = f"a {role}'s memory grew from {then:.1f} to {now_mib:.1f} MiB"
                assert now_mib <= then * MEMORY_GROWTH_MAX, grown
        self._remove_all()
        self._say(f"{self._rounds} rounds, {self._faults} faults: all invariants held")

    def _remove_all(self) -> None:
        self._users.remove_all()
        self._settle("after the last removal")

    # -- rounds ----------------------------------------------------------------------------------------------------

    def _round(self, *, calm: bool = False) -> None:
        self._rounds += 1
        said = [] if calm else self._come_back()
        if not calm and self._random.random() < self._fault_share:
            said.append(self._fault())
        said.append(self._users.step())
        self._settle(", ".join(said))

    def _settle(self, what: str) -> None:
        began, late = time.monotonic(), ""
        while difference := self._users.until_answered(self._difference):
            assert time.monotonic() - began < DEADLINE_S, f"after {what}: {difference} for {DEADLINE_S} s"
            if time.monotonic() - began > LATE_S:
                late = f", at last {difference}"
            time.sleep(0.2)
        away = f", without {' '.join(sorted(self._away))}" if self._away else ""
        self._say(f"round {self._rounds}: {what}: settled in {time.monotonic() - began:.2f} s{away}{late}")

    def _difference(self) -> str:
        if difference := self._users.difference():
            return difference
        containers = counted(
            container["Labels"]["com.docker.swarm.service.name"]
            for node in self._there()
            for container in engine(node, RESPONSE_S).get("/containers/json")
        )
        wanted = self._users.wanted_running()
        if containers != wanted:
            return f"containers {containers} instead of {wanted}"
        return soak_networks.faults(
            [(node, engine(node, RESPONSE_S)) for node in self._there()], self._users.services
        )

    # -- faults ----------------------------------------------------------------------------------------------------

    def _fault(self) -> str:
        self._faults += 1
        if self._random.random() < 0.5 and (node := self._one_that_may_go()):
            return self._take_away(node)
        return self._kill_a_process(self._random.choice(self._there()))

    def _one_that_may_go(self) -> PlaygroundNode | None:
        managers = sum(away.node.role == "manager" for away in self._away.values())
        free = {
            "manager": MANAGERS_AWAY_MAX - managers,
            "worker": WORKERS_AWAY_MAX + managers - len(self._away),
        }
        able = [node for node in self._there() if free[node.role] > 0]
        return self._random.choice(able) if able else None

    def _take_away(self, node: PlaygroundNode) -> str:
        ways = {
            "power off": (self._playground.kill, self._playground.start),
            "cable out": (self._playground.cut, self._playground.reconnect),
            "hung": (self._playground.pause, self._playground.resume),
        }
        way = self._random.choice(sorted(ways))
        begin, bring_back = ways[way]
        asyncio.run(begin(node.name))
        rounds = self._random.randint(1, AWAY_ROUNDS_MAX)
        self._away[node.name] = Away(node, rounds, bring_back)
        return f"{node.name} {way}"

    def _come_back(self, *, all_of_them: bool = False) -> list[str]:
        back = []
        for name, away in list(self._away.items()):
            away.rounds_left -= 1
            if all_of_them or away.rounds_left < 0:
                del self._away[name]
                self._bring_back(name, away)
                self._nodes[name] = self._playground.cluster().node(name)
                back.append(f"{name} back")
        return back

    def _bring_back(self, name: str, away: Away) -> None:
        """Bring a machine back.  If its daemon is not up in time, because the processors are busy, wait once more."""
        try:
            asyncio.run(away.bring_back(name))
        except Unavailable as error:
            self._say(f"{name}: {str(error).splitlines()[0]}, waiting on")
            up = partial(is_up, away.node.endpoint)
            asyncio.run(wait_until(up, f"{name} serves its API", DEADLINE_S))

    def _kill_a_process(self, node: PlaygroundNode) -> str:
        now = time.monotonic()
        kills = [at for at in self._kills.get(node.name, []) if now - at < CRASH_WINDOW_S]
        candidates = list(soak_daemons.VICTIMS)
        if len(kills) >= soak_daemons.GIVEN_UP_KILLS_MAX:
            candidates = [one for one in candidates if one not in soak_daemons.GIVEN_UP]
        victim = self._random.choice(candidates)
        pids = soak_daemons.pids(Path(node.netns), list(node.pids), victim)
        if not pids:
            return f"no {victim} to kill on {node.name}"
        if victim in soak_daemons.GIVEN_UP:
            kills.append(now)
        self._kills[node.name] = kills
        with suppress(ProcessLookupError):  # it has just ended by itself
            os.kill(self._random.choice(pids), signal.SIGKILL)
        return f"kill -9 {victim} of {node.name}"

    # -- the cluster -----------------------------------------------------------------------------------------------

    def _there(self) -> list[PlaygroundNode]:
        return [node for name, node in self._nodes.items() if name not in self._away]

    def _a_manager(self, within_s: float = RESPONSE_S) -> Engine:
        return engine(
            self._random.choice([node for node in self._there() if node.role == "manager"]), within_s
        )

    def _calm(self) -> dict[str, list[float]]:
        """Return the daemons' memory on each manager in MiB, by role, after all machines are back and have done some
        work.
        """
        self._come_back(all_of_them=True)
        self._settle("all are back")
        deadline = time.monotonic() + DEADLINE_S
        while missing := self._users.until_answered(self._missing):
            assert time.monotonic() < deadline, f"{missing} for {DEADLINE_S} s"
            time.sleep(0.2)
        for _ in range(CALM_ROUNDS):
            self._round(calm=True)
        leader = self._users.until_answered(self._leader)
        found: dict[str, list[float]] = {"leader": [], "other manager": []}
        for node in self._nodes.values():
            if node.role == "manager":
                held = soak_daemons.held(Path(node.netns), list(node.pids))
                self._say(f"{node.name}: {held.skep_mib:.1f} MiB, etcd {held.etcd_mib:.1f} ({held.each})")
                limit = soak_daemons.ETCD_MIB_MAX
                assert held.etcd_mib <= limit, f"etcd of {node.name} has grown to {held.etcd_mib:.0f} MiB"
                found["leader" if node.name == leader else "other manager"].append(
                    held.skep_mib + held.etcd_mib
                )
        return {role: sorted(values) for role, values in found.items()}

    def _missing(self) -> str:
        """Return the nodes that are not ready although all are back."""
        known = self._a_manager().get("/nodes")
        lacking = [
            node["Description"]["Hostname"]
            for node in known
            if node["Status"]["State"] != "ready"
            or (node.get("ManagerStatus") or {}).get("Reachability", "reachable") != "reachable"
        ]
        return f"{' '.join(lacking)} not ready" if lacking or len(known) != len(self._nodes) else ""

    def _leader(self) -> str:
        """Return the leader.  Raises: EngineError: there is currently no leader (503, which is transient)."""
        for node in self._a_manager().get("/nodes"):
            if (node.get("ManagerStatus") or {}).get("Leader"):
                return str(node["Description"]["Hostname"])
        raise EngineError(503, "no leader")
