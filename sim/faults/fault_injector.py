"""Random faults of machines, processes, disks, clocks and the network, and the end of each fault."""

from asyncio import Handle
from collections.abc import Callable, Sequence
from functools import partial
from random import Random

import msgspec

from sim.cluster import SimulatedCluster
from sim.etcd.member import WATCH_LAG_S_MAX, Member
from sim.faults.targeted_faults import hang_manager
from sim.world.committed import Change
from sim.world.links import Port
from sim.world.software import is_before_rotation
from skep.model.node import Node
from skep.model.values.ids import NodeId
from skep.store.etcd.requests import PREFIX, etcd_key
from skep.store.interface import View
from skep.store.space import QUOTA_BYTES

Undo = Callable[[], None]

DISK_HANGS = "disk hangs"

OBJECTS, TASKS = etcd_key("o/"), etcd_key("o/task/")
"""Key prefixes of objects."""

NODES_BACK_S = 3.0
"""Seconds within which nodes that have lost their session because of a slow store get another session."""


class ActiveFault(msgspec.Struct):
    """A fault with a duration."""

    name: str
    until: float
    undo: Undo
    nodes: frozenset[NodeId]
    """The affected machines.  A machine has at most one fault at a time."""


class FaultInjector:
    """Injects faults into one cluster."""

    def __init__(self, cluster: SimulatedCluster) -> None:
        self._cluster = cluster
        self._random: Random = cluster.random
        self._active: list[ActiveFault] = []
        self._written_at = 0.0
        """Time at which a disk that was slow has finished its pending writes."""
        self._faults: tuple[Callable[[], None], ...] = (
            *(self._container_ends,) * 3,
            *(self._power_loss, self._node_process_dies, self._node_process_dies),
            *(self._manager_crashes, self._manager_crashes, self._most_managers_crash),
            *(self._manager_and_worker_die, self._freeze, self._freeze),
            *(self._cut_off, self._cut_off, self._split, self._split, self._lose_session_path),
            *(self._slow_machine, self._slow_member, self._slow_watch, self._slow_disk),
            *(self._lastingly_slow_disk, self._hanging_disk),
            *(self._most_nodes_lost, self._port_cut, self._port_cut, self._connections_reset),
            *(self._member_restarts, self._disk_full, self._suspend, self._disk_fills),
            *(self._compaction, self._depose, self._depose, self._clock_jumps),
            *(self._fail_decisions, self._serve_stale_state, self._late_report),
            *(
                self._manager_hangs,
                self._manager_hangs,
                self._killed_between_writes,
                self._killed_between_writes,
            ),
            *(self._corrupt_values, self._corrupt_values, self._no_space, self._quota_reached),
        )

    def inject(self) -> None:
        """Inject a random fault."""
        self._random.choice(self._faults)()

    def end_due(self) -> None:
        """End the faults whose time is over."""
        now = self._cluster.loop.time()
        for fault in [one for one in self._active if one.until <= now]:
            self._end_early(fault)

    def end_all(self) -> None:
        """End all faults.  A hanging disk recovers only when its time is over."""
        hanging = (fault.until for fault in self._active if fault.name == DISK_HANGS)
        now = self._cluster.loop.time()
        self._cluster.run_for(max(hanging, default=now) - now)
        for fault in list(self._active):
            self._end_early(fault)  # the end of one fault may end another
        if self._written_at > self._cluster.loop.time():
            self._cluster.run_for(self._written_at - self._cluster.loop.time() + NODES_BACK_S)

    # -- machines and processes ------------------------------------------------------------------------------------

    def _container_ends(self) -> None:
        running = [
            task
            for id in self._cluster.workers
            if id not in self._affected()
            for task in self._cluster.nodes[id].containers.values()
        ]
        if running:
            task, code = self._random.choice(running), self._random.choice((0, 1, 137))
            self._log(f"container of {task.id[:6]} ends with {code}")
            self._cluster.kill_container(task, exit_code=code)

    def _power_loss(self) -> None:
        if id := self._victim(self._cluster.workers):
            self._begin("power loss", [id], self._without_power([id]))

    def _node_process_dies(self) -> None:
        if id := self._victim(self._cluster.workers):
            self._cluster.kill_node(id, keeps_containers=True)
            self._begin("node process dies", [id], lambda: self._cluster.start_node(id), (0.01, 0.3, 2.0))

    def _manager_crashes(self) -> None:
        if id := self._victim(self._cluster.managers):
            self._cluster.crash(id)
            self._begin("manager crashes", [id], lambda: self._cluster.start_manager(id))

    def _most_managers_crash(self) -> None:
        healthy = [id for id in self._cluster.managers if id not in self._affected()]
        if len(healthy) == len(self._cluster.managers) and self._random.random() < 0.5:
            ids = self._random.sample(healthy, len(healthy) // 2 + 1)
            self._begin("most managers lose power", ids, self._without_power(ids), (1.0, 6.0))

    def _manager_and_worker_die(self) -> None:
        manager, worker = self._victim(self._cluster.managers), self._victim(self._cluster.workers)
        if manager and worker:
            ids = sorted({manager, worker})
            self._begin("power loss", ids, self._without_power(ids))

    def _freeze(self) -> None:
        if id := self._victim([*self._cluster.managers, *self._cluster.workers]):
            self._cluster.links.freeze(id)
            self._begin("frozen", [id], lambda: self._cluster.links.thaw(id), (0.3, 1.5, 6.0))

    def _manager_hangs(self) -> None:
        """The event loop of a manager is blocked, or its process is stopped.  Its etcd member continues."""
        if id := self._running_manager():
            for_s = self._random.uniform(5.0, 30.0)
            undo = hang_manager(self._cluster, id, for_s=for_s)
            self._begin("manager hangs", [id], undo, (1.5, for_s))

    def _killed_between_writes(self) -> None:
        """A manager, mostly the leader, is killed right after one of its writes, before any further step."""
        id, watchers = self._running_manager(), self._cluster.committed.watchers
        if id is None:
            return
        left, killing = self._random.randint(1, 4), list[Handle]()

        def kill(change: Change, view: View) -> None:
            nonlocal left
            if change.origin == id:
                left -= 1
            if left == 0:
                watchers.remove(kill)
                self._cluster.trace.add(f"fault: {id} is killed")
                killing.append(self._cluster.loop.call_soon(self._cluster.kill_manager, id))

        def undo() -> None:
            if kill in watchers:
                watchers.remove(kill)
            else:
                killing[0].cancel()  # the kill may be pending
                self._cluster.crash(id)
                self._cluster.start_manager(id)

        watchers.append(kill)
        self._begin("killed after a write", [id], undo)

    def _no_space(self) -> None:
        """The disks of one manager or most managers have no space left: etcd members exit, and restart when there is
        space.
        """
        healthy = [id for id in self._cluster.managers if id not in self._affected()]
        number = len(healthy) // 2 + 1 if self._random.random() < 0.3 else 1
        ids = self._random.sample(healthy, min(number, len(healthy)))
        if ids:
            for id in ids:
                self._cluster.raft.crash(id)

            def undo() -> None:
                for id in ids:
                    self._cluster.raft.start(id)

            self._begin("no space", ids, undo, (6.0, 20.0))

    def _suspend(self) -> None:
        """A machine is suspended: its monotonic clock stops, its boot time clock continues."""
        if id := self._victim([*self._cluster.managers, *self._cluster.workers]):
            began = self._cluster.loop.time()
            self._cluster.links.freeze(id)

            def wake() -> None:
                self._cluster.clocks[id].suspended_s += self._cluster.loop.time() - began
                self._cluster.links.thaw(id)

            self._begin("suspended", [id], wake, (1.5, 6.0))

    def _disk_full(self) -> None:
        """A node cannot write to its disk.  Its process may restart meanwhile."""
        if id := self._victim(self._cluster.workers):
            disk = self._cluster.nodes[id].disk
            disk.fill()
            if self._random.random() < 0.3:
                self._cluster.kill_node(id, keeps_containers=True)
                self._cluster.start_node(id)
            self._begin("disk full", [id], disk.make_room)

    def _disk_fills(self) -> None:
        """Containers fill a node's disk.  The node requests no new tasks until there is space."""
        if id := self._victim(self._cluster.workers):
            node = self._cluster.nodes[id]
            node.has_full_disk = True

            def empty() -> None:
                node.has_full_disk = False

            self._begin("disk fills", [id], empty, (6.0, 20.0, 60.0))

    def _without_power(self, ids: Sequence[NodeId]) -> Undo:
        """Stop the machines without closing their connections.  Return a function that starts them again."""
        cut = self._cluster.links.cut(ids, self._machines())
        managers = [id for id in ids if id in self._cluster.managers]
        workers = [id for id in ids if id in self._cluster.nodes]
        for id in workers:
            self._cluster.kill_node(id)
        for id in managers:
            self._cluster.crash(id)

        def undo() -> None:
            self._cluster.links.restore(cut)
            for id in workers:
                self._cluster.start_node(id)
            for id in managers:
                self._cluster.start_manager(id)

        return undo

    # -- the network -----------------------------------------------------------------------------------------------

    def _cut_off(self) -> None:
        if id := self._victim([*self._cluster.managers, *self._cluster.workers]):
            others = [other for other in self._machines() if other != id]
            match self._random.choice(("both", "both", "in", "out")):
                case "both":
                    cut = self._cluster.links.cut([id], others)
                case "in":
                    cut = self._cluster.links.cut(others, [id], both_ways=False)
                case _:
                    cut = self._cluster.links.cut([id], others, both_ways=False)
            self._begin("disconnected", [id], lambda: self._cluster.links.restore(cut), (0.3, 1.5, 6.0, 12.0))

    def _split(self) -> None:
        """Partition the machines into two sides."""
        if any(fault.name == "partition" for fault in self._active):
            return
        machines = self._machines()
        side = [id for id in machines if self._random.random() < 0.5]
        cut = self._cluster.links.cut(side, [id for id in machines if id not in side])
        self._begin("partition", [], lambda: self._cluster.links.restore(cut), detail=",".join(side))

    def _most_nodes_lost(self) -> None:
        """A switch failure disconnects most workers."""
        workers = [id for id in self._cluster.workers if id not in self._affected()]
        if len(workers) == len(self._cluster.workers) > 2:
            lost = self._random.sample(workers, len(workers) // 2 + 1)
            cut = self._cluster.links.cut(lost, [id for id in self._machines() if id not in lost])
            self._begin("disconnected", lost, partial(self._cluster.links.restore, cut), (1.5, 6.0, 12.0))

    def _port_cut(self) -> None:
        """Managers reach each other's etcd members but not each other, or the other way round.

        This affects two managers, or one manager and all others.
        """
        if len(self._cluster.managers) > 1:
            one, *others = self._random.sample(self._cluster.managers, len(self._cluster.managers))
            others = others[:1] if self._random.random() < 0.5 else others
            port = self._random.choice(list(Port))
            cut = self._cluster.links.cut([one], others, port=port)
            detail = f" {one} and {','.join(others)} at {port.value}"
            self._begin("disconnected", [], partial(self._cluster.links.restore, cut), detail=detail)

    def _connections_reset(self) -> None:
        id = self._random.choice(self._machines())
        self._log(f"connections of {id} are reset")
        self._cluster.network.reset_connections(id)
        if id in self._cluster.raft.members and self._cluster.raft.members[id].is_running:
            self._cluster.raft.reset_connections(id)

    def _member_restarts(self) -> None:
        """An etcd member restarts without its manager.  At first it has applied less than before."""
        if id := self._victim(self._cluster.managers):
            self._cluster.raft.crash(id)
            less = self._random.choice((0, 3, 20))
            undo = partial(self._cluster.raft.start, id, less=less)
            self._begin("member ends", [id], undo, (0.1, 1.5, 6.0))

    def _lose_session_path(self) -> None:
        """One worker and one manager are disconnected, in one or both directions."""
        worker = self._random.choice(self._cluster.workers)
        manager = self._random.choice(self._cluster.managers)
        cut = self._cluster.links.cut([worker], [manager], both_ways=self._random.random() < 0.5)
        self._begin(
            "disconnected", [], lambda: self._cluster.links.restore(cut), detail=f"{worker} to {manager}"
        )

    def _late_report(self) -> None:
        """A node changes its manager, and a late message to the previous manager arrives.

        The previous manager's replica does not show the new session yet.
        """
        worker = self._victim(self._cluster.workers)
        node = self._cluster.view.lookup(Node, worker) if worker is not None else None
        old = node.session if node is not None else None
        if worker is None or old is None or len(self._cluster.managers) == 1:
            return
        member = self._cluster.raft.members.get(old.manager_id)
        if member is None:
            return
        member.watch_lag_s = self._random.uniform(0.5, 1.8)
        cut = self._cluster.links.cut([worker], [old.manager_id], both_ways=self._random.random() < 0.5)
        undo = partial(self._cluster.links.restore, cut)
        lost = self._begin("disconnected", [worker], undo, (6.0,), detail=f" to {old.manager_id}")
        undo_lag = partial(setattr, member, "watch_lag_s", 0.0)
        self._begin("watch lags", [], undo_lag, (9.0,), detail=member.id)
        for task in list(self._cluster.nodes[worker].containers.values())[:1]:
            self._cluster.kill_container(task)  # The end of the task causes the report that arrives late.

        def look(change: Change, view: View) -> None:
            now = view.lookup(Node, worker)
            if now is None or now.session != old:
                self._cluster.committed.watchers.remove(look)
                self._cluster.loop.call_later(self._random.uniform(0.0, 0.3), self._end_early, lost)

        self._cluster.committed.watchers.append(look)

    def _slow_machine(self) -> None:
        id = self._random.choice(self._machines())
        if id not in self._cluster.network.slow:
            self._cluster.network.slow[id] = self._random.uniform(0.05, 0.8)
            self._begin("slow", [], lambda: self._forget_slow(id), detail=id)

    def _forget_slow(self, id: NodeId) -> None:
        del self._cluster.network.slow[id]

    # -- the store -------------------------------------------------------------------------------------------------

    def _slow_member(self) -> None:
        member = self._random.choice(list(self._cluster.raft.members.values()))
        member.lag_s = self._random.uniform(0.05, 1.5)
        self._begin("member lags", [], lambda: setattr(member, "lag_s", 0.0), detail=member.id)

    def _slow_watch(self) -> None:
        member = self._random.choice(list(self._cluster.raft.members.values()))
        member.watch_lag_s = self._random.uniform(0.05, WATCH_LAG_S_MAX)
        self._begin("watch lags", [], lambda: setattr(member, "watch_lag_s", 0.0), detail=member.id)

    def _slow_disk(self) -> None:
        """Slow down a disk, mostly the leader's.  Beyond a second, writers time out although their entries are
        committed.
        """
        member = self._written_to()
        member.stall_s = self._random.choice((0.1, 1.1, 1.6))
        self._begin("disk stalls", [], partial(self._end_slow, member), (0.5, 2.0), detail=member.id)

    def _lastingly_slow_disk(self) -> None:
        """Slow down a disk, mostly the leader's, until all faults end."""
        member = self._written_to()
        member.stall_s = self._random.choice((0.1, 0.4, 0.8, 1.2, 2.0, 4.0))
        detail = f"{member.id} by {member.stall_s} s"
        self._begin("disk is slow", [], partial(self._end_slow, member), (60.0, 180.0), detail=detail)

    def _end_slow(self, member: Member) -> None:
        """End the fault once the disk has written the entries that it has begun, because these are still slow."""
        cluster, took_s, member.stall_s = self._cluster, member.stall_s, 0.0

        def over() -> None:
            cluster.disturbances -= 1
            cluster.disturb()

        cluster.disturbances += 1
        cluster.loop.call_later(took_s, over)
        self._written_at = cluster.loop.time() + took_s

    def _hanging_disk(self) -> None:
        """Let a disk, mostly the leader's, hang for 5 to 30 s after the next entry.  A leader stays leader.

        So the outcome of a write that reacts to that entry is unknown to its writer.
        """
        member, raft, watchers = self._written_to(), self._cluster.raft, self._cluster.committed.watchers

        def hang(change: Change, view: View) -> None:
            watchers.remove(hang)
            raft.hang(member.id)

        def undo() -> None:
            if hang in watchers:
                watchers.remove(hang)
            else:
                raft.resume(member.id)

        if member.held is None:
            watchers.append(hang)
            self._begin(DISK_HANGS, [], undo, (10.0, 20.0), detail=member.id)

    def _written_to(self) -> Member:
        """Return a member to disturb, mostly the leader."""
        leads = self._cluster.raft.current
        member = self._random.choice(list(self._cluster.raft.members.values()))
        return leads.member if leads is not None and self._random.random() < 0.7 else member

    def _corrupt_values(self) -> None:
        """A manager restarts with unreadable values on its disk, until the disk is replaced.

        Other managers read and write the intact values, so no object may be considered deleted.  Heads of tasks are
        not corrupted: without a head the service of a task is unknown, and its slot is filled again.
        """
        id, raft = self._running_manager(), self._cluster.raft
        keys = [
            key
            for key in raft.kv.present
            if key.startswith(OBJECTS) and not (key.startswith(TASKS) and b"." not in key)
        ]
        if id is None or not keys:
            return
        chosen = self._random.sample(keys, min(self._random.randint(1, 4), len(keys)))
        self._cluster.crash(id)
        for key in chosen:
            raft.corrupt(id, key)
        self._cluster.start_manager(id)

        def undo() -> None:
            self._cluster.crash(id)
            raft.members[id].corrupted.clear()
            self._cluster.start_manager(id)

        names = " ".join(key.removeprefix(PREFIX).decode() for key in chosen)
        self._begin("corrupted values", [id], undo, (1.5, 6.0, 12.0), detail=f" {names}")

    def _quota_reached(self) -> None:
        """Unrelated values fill the store.  Sometimes they are soon removed, and sometimes most of them are history.

        Requests that make the store grow are refused.  The leader continues, and frees space as soon as it can.
        """
        space = self._cluster.raft.space
        if space.in_use:
            return
        live, old = self._random.choice(((0.75, 0.0), (0.85, 0.2), (0.4, 0.65), (0.97, 0.0), (0.1, 0.95)))
        space.fill(self._cluster.managers, round(live * QUOTA_BYTES), round(old * QUOTA_BYTES))

        async def free() -> None:
            await self._cluster.write_probe("removed")
            space.old += space.live
            space.live = 0

        def undo() -> None:
            self._cluster.supervise(self._cluster.loop.create_task(free(), name="free the store"))

        self._begin("the store is full", [], undo, (1.5, 6.0, 20.0), detail=f" {live} {old}")

    def _compaction(self) -> None:
        revision = self._cluster.raft.kv.revision - self._random.choice((0, 0, 5, 50))
        self._log(f"compaction at {revision}")
        self._cluster.raft.kv.compact(revision)

    def _depose(self) -> None:
        self._log("leadership moves")
        self._cluster.depose(quietly=self._random.random() < 0.7)

    # -- clocks and software ---------------------------------------------------------------------------------------

    def _clock_jumps(self) -> None:
        id = self._random.choice(self._machines())
        by_s = self._random.choice((-3600.0, -30.0, -1.0, 1.0, 30.0, 3600.0))
        self._log(f"the clock of {id} jumps by {by_s}")
        self._cluster.clocks[id].wall_off_s += by_s

    def _fail_decisions(self) -> None:
        services = [
            id for id in self._cluster.observer.acknowledgements.services if id not in self._cluster.poisoned
        ]
        if services:
            id = self._random.choice(services)
            self._cluster.poisoned.add(id)
            self._begin(
                "failing decisions", [], lambda: self._cluster.poisoned.discard(id), (0.5, 3.0), detail=id
            )

    def _serve_stale_state(self) -> None:
        """A manager sends its nodes an old state until it is restarted."""
        id = self._victim(self._cluster.managers)
        if id is None or id not in self._cluster.running_managers:
            return
        revision = max(self._cluster.raft.kv.revision - self._random.choice((5, 30, 100)), 2)
        past = self._cluster.committed.past(self._cluster.raft.kv.events(2, revision))
        if is_before_rotation(past, self._cluster.view):
            return
        if not self._cluster.running_managers[id].serve_stale_state(past):
            return

        def undo() -> None:
            self._cluster.crash(id)
            self._cluster.start_manager(id)

        self._begin("serves stale state", [id], undo, detail=f" at {revision}")

    # -- inside ----------------------------------------------------------------------------------------------------

    def healthy(self) -> list[NodeId]:
        """Return the machines without an active fault."""
        hit = self._affected()
        return [id for id in self._machines() if id not in hit]

    def _machines(self) -> list[NodeId]:
        """Return all machines once, although a manager may also be a worker."""
        return list(dict.fromkeys([*self._cluster.managers, *self._cluster.workers]))

    def _affected(self) -> set[NodeId]:
        return {id for fault in self._active for id in fault.nodes} | self._cluster.changing

    def _running_manager(self) -> NodeId | None:
        """Return a healthy running manager, mostly the leader, or None."""
        leads = self._cluster.raft.current
        healthy = [id for id in self._cluster.running_managers if id not in self._cluster.nodes]
        if leads is not None and leads.member.id in healthy and self._random.random() < 0.6:
            healthy = [leads.member.id]
        return self._victim(healthy)

    def _victim(self, candidates: Sequence[NodeId]) -> NodeId | None:
        healthy = [id for id in candidates if id not in self._affected()]
        return self._random.choice(healthy) if healthy else None

    def _begin(
        self,
        name: str,
        hits: Sequence[NodeId],
        undo: Undo,
        lasts_s: Sequence[float] = (0.3, 1.5, 6.0),
        *,
        detail: str = "",
    ) -> ActiveFault:
        lasting_s = self._random.choice(lasts_s) * self._random.uniform(0.5, 1.5)
        until = self._cluster.loop.time() + lasting_s
        fault = ActiveFault(name, until, undo, frozenset(hits))
        self._active.append(fault)
        self._cluster.disturbances += 1
        self._log(f"{name} {','.join(hits)}{detail} for {lasting_s:.2f} s")
        return fault

    def _end_early(self, fault: ActiveFault) -> None:
        if any(one is fault for one in self._active):
            self._end(fault)

    def _end(self, fault: ActiveFault) -> None:
        self._active.remove(fault)
        fault.undo()
        self._cluster.disturbances -= 1
        self._log(f"end of {fault.name} {','.join(sorted(fault.nodes))}")

    def _log(self, text: str) -> None:
        self._cluster.disturb()
        self._cluster.trace.add(f"fault: {text}")
