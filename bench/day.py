"""A fault run: ten stacks under load on three managers and five workers, with changes and faults of all kinds.

Owners update, scale, rotate secrets and run jobs.  Operators rotate the root certificate, replace a worker, and
upgrade every node from the previous commit (once, in the middle).  Daemons are killed, and machines lose power, hang
or are cut off.  After each of these events the checks of the soak must pass (``soak_cluster``, ``soak_networks``), all
acknowledged changes must be there, and no customer's request may have failed, unless a lost machine interrupted it.
Memory is compared between calm phases.  The report page is always written.

    .venv/bin/python -m bench.day --minutes 120
"""

import argparse
import asyncio
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from bench import soak_networks
from bench.cluster_lab import engine
from bench.day_stacks import COMMAND_S, Asked, Customers, Stacks, skep
from bench.engine import Engine, EngineError
from bench.run import RESULTS, commit
from bench.soak_cluster import ClusterSoak
from bench.soak_users import Log
from skep import __version__
from skep.playground.description import PlaygroundNode
from skep.playground.playground import Playground
from tests.support.machines.versions import ROOT, Versions, package_of

MANAGERS, WORKERS = 3, 5
FAULTS, OPERATIONS = 0.25, 0.15
"""Shares of the rounds with a fault, and with an operator's work."""
FORMER = "0.0.9"
"""Version number of the release that the day begins with."""
UPGRADE_S = 3600.0
QUIET_S = 2.0


class Event(msgspec.Struct):
    """All occurrences of one kind of event."""

    count: int = 0
    took_s_max: float = 0.0
    """Longest time in seconds until everything was in its desired state again."""


class Report(msgspec.Struct):
    """Content of the report page."""

    title: str
    events: dict[str, Event] = {}
    memory: list[str] = []
    outcome: str = ""

    def add(self, what: str, took_s: float) -> None:
        """Record the end of an event."""
        event = self.events.setdefault(what, Event())
        event.count += 1
        event.took_s_max = max(event.took_s_max, took_s)

    def page(self, asked: Mapping[tuple[str, bool], Asked], broken: Sequence[str], acknowledged: int) -> str:
        """Return the page as Markdown."""
        rows = [
            f"| {what} | {event.count} | {event.took_s_max:.1f} s |"
            for what, event in sorted(self.events.items())
        ]
        requests = [
            f"| {what} | {'yes' if is_promised else 'no'} | {one.count} | {one.failed} |"
            for (what, is_promised), one in sorted(asked.items())
        ]
        promised = [one for (_, is_promised), one in asked.items() if is_promised]
        count, failed = (sum(getattr(one, name) for one in promised) for name in ("count", "failed"))
        lines = [
            f"# Fault run: {self.title}",
            f"**{self.outcome}**",
            f"{count} promised requests, {failed} failed; {acknowledged} changes were acknowledged.",
            "## What happened",
            "\n".join(("| what | times | longest until all was as wanted |", "|---|---|---|", *rows)),
            "## Requests",
            "\n".join(("| during | promised | asked | failed |", "|---|---|---|---|", *requests)),
            *(("\n".join(f"* {one}" for one in broken),) if broken else ()),
            "## Memory",
            "\n".join(f"* {one}" for one in self.memory),
        ]
        return "\n\n".join(lines) + "\n"


class Day(ClusterSoak):
    """One run on one cluster."""

    def __init__(
        self,
        playground: Playground,
        rng: random.Random,
        log: Log,
        report: Report,
        upgrade: Sequence[str],
        folder: Path,
    ) -> None:
        """``upgrade`` has the arguments of ``skep`` that upgrade all nodes.

        ``folder`` is the directory for the stacks' files.
        """

        def stacks(engine: Callable[[], Engine], image: str, rng: random.Random) -> Stacks:
            return Stacks(engine, image, rng, self._at_a_manager, folder)

        super().__init__(playground, rng, FAULTS, log, stacks)
        assert isinstance(self._users, Stacks)
        self.stacks = self._users
        self._report = report
        self._upgrade_words = upgrade
        self._upgrade_at = float("inf")
        self._new: set[str] = set()
        """Machines to which no load balancer sends customers, because they are not ready yet."""
        self.customers = Customers(self._open, self._published)

    def run(self, minutes: float) -> None:
        self._upgrade_at = time.monotonic() + minutes * 60 / 2
        self._nodes_ready()
        self.stacks.prepare()
        self._settle("ten stacks")
        with self.customers.running():
            super().run(minutes)
        assert not self.customers.broken, f"promised requests failed: {self.customers.broken[:5]}"

    def _remove_all(self) -> None:
        self.customers.during("the end", is_promised=False)
        super()._remove_all()

    # -- rounds ----------------------------------------------------------------------------------------------------

    def _round(self, *, calm: bool = False) -> None:
        self._rounds += 1
        if not calm and time.monotonic() >= self._upgrade_at:
            self._upgrade_at = float("inf")
            self._operate("upgrade", self._upgrade)
            return
        chance = self._random.random()
        if not calm and chance < OPERATIONS:
            self._operate(*self._random.choice((
                ("certificates", self._rotate_certificates),
                ("node replaced", self._replace_a_worker),
            )))  # fmt: skip
        elif not calm and chance < OPERATIONS + FAULTS:
            self._suffer()
        else:
            self._own()

    def _own(self) -> None:
        """Let an owner change something, even while machines are down."""
        back = self._away and self._return_some()
        began = time.monotonic()
        if not back:
            self.customers.during("changes by owners", is_promised=True)
        what = self.stacks.step()
        self._settle(what)
        self._over(what.split()[0], began)

    def _return_some(self) -> bool:
        """Bring back machines that were down long enough.

        Responses from them are not promised until they are ready.
        """
        self.customers.during("a machine comes back", is_promised=False)
        began = time.monotonic()
        said = self._come_back()
        if said:
            self._settle(", ".join(said))
            self._over("machine back", began)
        return bool(said)

    def _suffer(self) -> None:
        self._return_some()
        began = time.monotonic()
        self._faults += 1
        if self._random.random() < 0.5 and (node := self._one_that_may_go()):
            self.customers.during("a machine is lost", is_promised=False)
            what, kind = self._take_away(node), "machine lost"
        else:
            victim = self._random.choice(self._there())
            self.customers.during("a daemon is killed", is_promised=True)
            what, kind = self._kill_a_process(victim), "daemon killed"
            if "conmon" in what or "wireguard-go" in what:  # containers or tunnels depend on it
                self.customers.during("a monitor is killed", is_promised=False)
        self._settle(what)
        self._over(kind, began)

    def _operate(self, kind: str, work: Callable[[], None]) -> None:
        """Let operators do something while all machines are up."""
        self.customers.during("a machine comes back", is_promised=False)
        self._come_back(all_of_them=True)
        self._settle("all are back")
        self._nodes_ready()
        began = time.monotonic()
        self.customers.during(kind, is_promised=True)
        work()
        self._settle(kind)
        self._new.clear()
        self._over(kind, began)

    def _over(self, kind: str, began: float) -> None:
        self._report.add(kind, time.monotonic() - began)
        self.customers.during("quiet", is_promised=True)

    def _calm(self) -> dict[str, list[float]]:
        self.customers.during("a machine comes back", is_promised=False)
        found = super()._calm()
        self._report.memory += [
            f"{role}: {', '.join(f'{one:.1f} MiB' for one in held)}" for role, held in found.items()
        ]
        return found

    def _difference(self) -> str:
        if difference := self.stacks.difference():
            return difference
        with self.customers.paused():
            time.sleep(0.1)  # so that running requests end
            return super()._difference()

    def log_situation(self) -> None:
        """Log the locations of tasks and the states of services for an analysis, as far as a manager responds."""
        try:
            manager = self._a_manager()
            nodes = manager.get("/nodes")
            names = {node["ID"]: node["Description"]["Hostname"] for node in nodes}
            for node in nodes:
                state = node["Status"]["State"], node["Spec"]["Availability"]
                version = node["Description"]["Engine"]["EngineVersion"]
                self._say(f"{names[node['ID']]}: {', '.join((*state, version))}")
            for service in manager.get("/services"):
                tasks = manager.get("/tasks", filters={"service": [service["ID"]]})
                where = [
                    f"{task.get('Slot')} {names.get(task.get('NodeID', ''))} {task['Status']['State']} "
                    f"{task['DesiredState']} {task['Status'].get('Err', '')}"
                    for task in sorted(tasks, key=lambda one: (one.get("Slot", 0), one["CreatedAt"]))
                ]
                update = (service.get("UpdateStatus") or {}).get("State", "")
                self._say(f"{service['Spec']['Name']} {update}: {'; '.join(where)}")
        except (OSError, EngineError, LookupError) as error:
            self._say(f"nothing more is known: {error}")

    # -- operators -------------------------------------------------------------------------------------------------

    def _rotate_certificates(self) -> None:
        def rotate() -> None:
            # The command waits until every etcd trusts the root of the previous rotation.
            manager = self._a_manager(COMMAND_S)
            swarm = manager.get("/swarm")
            spec = swarm["Spec"]
            spec["CAConfig"]["ForceRotate"] = (spec["CAConfig"].get("ForceRotate") or 0) + 1
            manager.post("/swarm/update", spec, version=swarm["Version"]["Index"])

        self.stacks.until_answered(rotate)
        self.stacks.until(
            lambda: not self._a_manager().get("/swarm").get("RootRotationInProgress"), "the root is rotated"
        )

    def _replace_a_worker(self) -> None:
        """Drain and remove a worker, and let the machine join as a new node.

        A drain stops tasks before their replacements start, as Docker's does.  A service whose tasks all run on the
        drained node is down meanwhile, and ``skep upgrade`` refuses such a node.
        """
        workers, homes = [one for one in self._there() if one.role == "worker"], self._only_homes()
        if not (others := [one for one in workers if one.name not in homes]):
            self.customers.during("node replaced that has a whole service", is_promised=False)
        node = self._random.choice(others or workers)
        self._at_a_manager("node", "drain", node.name)
        del self._nodes[node.name]  # it no longer receives requests
        time.sleep(QUIET_S)
        worker = engine(node, COMMAND_S)
        worker.post("/swarm/leave")
        self._at_a_manager("node", "rm", "--force", node.name)
        token = self.stacks.until_answered(lambda: self._a_manager().get("/swarm"))["JoinTokens"]["Worker"]
        manager = next(one for one in self._nodes.values() if one.role == "manager")
        body = {
            "ListenAddr": "0.0.0.0:2377",
            "AdvertiseAddr": node.addr,
            "RemoteAddrs": [f"{manager.addr}:2377"],
            "JoinToken": token,
        }
        worker.post("/swarm/join", body)
        self._new.add(node.name)
        self._nodes[node.name] = node
        self._nodes_ready()

    def _only_homes(self) -> set[str]:
        """Return the nodes on which all tasks of some service run."""
        manager = self._a_manager()
        names = {node["ID"]: node["Description"]["Hostname"] for node in manager.get("/nodes")}
        homes: dict[str, set[str]] = {}
        for task in manager.get("/tasks", filters={"desired-state": ["running"]}):
            homes.setdefault(task["ServiceID"], set()).add(names.get(task.get("NodeID", ""), ""))
        return {next(iter(nodes)) for nodes in homes.values() if len(nodes) == 1}

    def _upgrade(self) -> None:
        self._at_a_manager(*self._upgrade_words, within_s=UPGRADE_S)
        versions = {
            node["Description"]["Engine"]["EngineVersion"]
            for node in self.stacks.until_answered(lambda: self._a_manager().get("/nodes"))
        }
        assert versions == {__version__}, f"versions after the upgrade: {versions}"
        # Their processes were replaced.
        self._nodes = {node.name: node for node in self._playground.cluster().nodes}

    def _nodes_ready(self) -> None:
        self.stacks.until(lambda: not self._missing(), "all nodes are ready")

    def _at_a_manager(self, *words: str, within_s: float = COMMAND_S) -> str:
        managers = [one for one in self._there() if one.role == "manager"]
        return skep(self._random.choice(managers), *words, within_s=within_s)

    def _open(self) -> Sequence[PlaygroundNode]:
        return [one for one in self._there() if one.name not in self._new]

    def _published(self) -> list[soak_networks.Service]:
        return [one for one in tuple(self.stacks.services.values()) if one.published]


def day(directory: Path, minutes: float, rng: random.Random, log: Log, report: Report, earlier: str) -> None:
    """Run the day.  Raises: AssertionError: a check failed.  Then the nodes' logs are kept in the directory of
    ``log``.
    """
    former = package_of(earlier, directory / "package")
    (former / "skep/__init__.py").write_text(f'__version__ = "{FORMER}"\n')
    folder = directory / "versions"
    folder.mkdir()
    versions = Versions(folder, former)
    nodes = directory / "nodes"
    playground = Playground(nodes, "day", lambda _: None)
    asyncio.run(playground.down())
    change = f"{sys.executable} -m tests.support.machines.versions {nodes} day {folder} $SKEP_NODE present"
    upgrade = ("upgrade", "--to", __version__, "--command", change)
    run: Day | None = None
    try:
        up = (str(versions.command), "playground", "up", "--name", "day", "--dir", str(nodes), "--no-relay")
        subprocess.run((*up, "--managers", str(MANAGERS), "--workers", str(WORKERS)), check=True, timeout=600)
        (directory / "stacks").mkdir()
        run = Day(playground, rng, log, report, upgrade, directory / "stacks")
        run.run(minutes)
        report.outcome = "Nothing acknowledged was lost, no promised request failed, memory stayed flat."
    except BaseException as error:
        said = str(error).replace(str(directory), "DIRECTORY").replace(str(ROOT), "CLONE")
        report.outcome = f"It ended early: {said}"
        if run is not None:
            run.log_situation()
        for found in nodes.glob("*/skep.log"):
            shutil.copy(found, log.path.with_suffix(f".{found.parent.name}.skep.log"))
        raise
    finally:
        if run is not None:
            page = report.page(run.customers.asked, run.customers.broken, run.stacks.acknowledged)
            log.path.with_suffix(".md").write_text(page)
        asyncio.run(playground.down())


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.day", description="A fault run.")
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time")
    parser.add_argument("--dir", default="/var/tmp", help="where nodes keep their state; not on overlayfs")
    parser.add_argument("--earlier", default="HEAD~1", help="the commit that the run begins with")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else int.from_bytes(os.urandom(4), "big")
    RESULTS.mkdir(exist_ok=True)
    log = Log(RESULTS / f"day-{datetime.now(UTC):%Y-%m-%d-%H%M}-{commit()}.log")
    title = f"{options.minutes:g} minutes, commit {commit()}, seed {seed}"
    log(title)
    with tempfile.TemporaryDirectory(prefix="skep-day-", dir=options.dir) as directory:
        day(Path(directory), options.minutes, random.Random(seed), log, Report(title=title), options.earlier)


if __name__ == "__main__":
    main()
