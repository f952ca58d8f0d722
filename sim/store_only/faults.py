"""Random faults of the etcd members and links below the stores."""

from collections.abc import Callable
from functools import partial
from math import inf

from sim.store_only.world import StoreWorld
from skep.model.values.ids import NodeId

LASTS_S = (0.3, 1.5, 7.0)
OVERDUE_S = 6.0
"""Lag of a watch that exceeds the time limit of an update."""


class Faults:
    """Injects random faults."""

    def __init__(self, world: StoreWorld) -> None:
        self._world = world
        self._random = world.random
        self._raft = world.raft
        self._links = world.links
        self._lasting: list[tuple[float, str, Callable[[], None]]] = []
        self._hit: set[NodeId] = set()
        self._faults: tuple[Callable[[], None], ...] = (
            *(self._crash, self._crash, self._restart_member, self._reset_connections),
            *(self._hang, self._hang, self._slow_disk, self._slow_member, self._slow_watch),
            *(self._cut, self._cut, self._split, self._freeze),
            *(self._depose, self._depose, self._compact, self._rotate),
        )

    def inject(self) -> None:
        """Inject a random fault."""
        self._random.choice(self._faults)()

    def end_due(self) -> None:
        """End the faults whose time is over."""
        self._end(self._world.loop.time())

    def heal(self) -> None:
        """End all faults.  A hanging disk recovers when its time is over."""
        now = self._world.loop.time()
        hanging = [until for until, name, _ in self._lasting if name.startswith("hang")]
        self._world.run_for(max(hanging, default=now) - now)
        self._end(inf)

    def _end(self, now: float) -> None:
        for one in [one for one in self._lasting if one[0] <= now]:
            self._lasting.remove(one)
            self._world.log(f"fault: end of {one[1]}")
            one[2]()

    def _begin(self, name: str, undo: Callable[[], None], hits: NodeId | None = None) -> None:
        lasts_s = self._random.choice(LASTS_S) * self._random.uniform(0.5, 1.5)
        if hits is not None:
            self._hit.add(hits)
        self._world.log(f"fault: {name} for {lasts_s:.2f} s")

        def ended() -> None:
            if hits is not None:
                self._hit.discard(hits)
            undo()

        self._lasting.append((self._world.loop.time() + lasts_s, name, ended))

    def _victim(self) -> NodeId | None:
        healthy = [id for id in self._world.ids if id not in self._hit]
        return self._random.choice(healthy) if healthy else None

    def _crash(self) -> None:
        if id := self._victim():
            self._begin(f"crash of {id}", self._world.crash(id), id)

    def _restart_member(self) -> None:
        if id := self._victim():
            self._begin(f"end of the member of {id}", self._world.restart_member(id), id)

    def _reset_connections(self) -> None:
        if id := self._victim():
            self._world.log(f"fault: connections of {id} are reset")
            self._raft.reset_connections(id)

    def _hang(self) -> None:
        """Let a disk hang, mostly the leader's.  The leader stays leader."""
        leads = self._raft.current
        id = leads.member.id if leads is not None and self._random.random() < 0.8 else self._victim()
        if id is None or id in self._hit or self._raft.members[id].held is not None:
            return
        if self._random.random() < 0.5:
            self._raft.hang(id)
        else:
            self._world.on_next_want = lambda: self._raft.hang(id)  # while its number is being written
        self._begin(f"hang of the disk of {id}", partial(self._resume, id), id)

    def _resume(self, id: NodeId) -> None:
        self._world.on_next_want = None
        self._raft.resume(id)

    def _slow_disk(self) -> None:
        leads = self._raft.current
        if leads is not None and not leads.member.stall_s:
            member = leads.member
            member.stall_s = self._random.choice((0.1, 0.7, 1.3, 2.5))
            undo = partial(setattr, member, "stall_s", 0.0)
            self._begin(f"disk of {member.id} slow by {member.stall_s} s", undo)

    def _slow_member(self) -> None:
        member = self._raft.members[self._random.choice(self._world.ids)]
        member.lag_s = self._random.uniform(0.05, 1.5)
        self._begin(f"{member.id} lags", partial(setattr, member, "lag_s", 0.0))

    def _slow_watch(self) -> None:
        member = self._raft.members[self._random.choice(self._world.ids)]
        member.watch_lag_s = self._random.uniform(0.05, 3.0) if self._random.random() < 0.5 else OVERDUE_S
        self._begin(f"watch of {member.id} lags", partial(setattr, member, "watch_lag_s", 0.0))

    def _cut(self) -> None:
        if id := self._victim():
            others = [other for other in self._world.ids if other != id]
            word = self._random.choice(("both", "in", "out"))
            sources, targets = (others, [id]) if word == "in" else ([id], others)
            cut = self._links.cut(sources, targets, both_ways=word == "both")
            self._begin(f"cut off {id} {word}", partial(self._links.restore, cut), id)

    def _split(self) -> None:
        side = [id for id in self._world.ids if self._random.random() < 0.5]
        cut = self._links.cut(side, [id for id in self._world.ids if id not in side])
        self._begin(f"split {side}", partial(self._links.restore, cut))

    def _freeze(self) -> None:
        if id := self._victim():
            self._links.freeze(id)
            self._begin(f"{id} is frozen", partial(self._links.thaw, id), id)

    def _depose(self) -> None:
        if self._raft.current is None:
            return
        old = self._raft.current.member
        others = [id for id in self._world.ids if id != old.id and self._raft.members[id].is_running]
        if others and self._raft.transfer(self._random.choice(others)):
            self._world.log("fault: leadership moves")
            if self._random.random() < 0.7:
                old.stale_until = self._world.loop.time() + self._random.uniform(0.2, 2.0)

    def _compact(self) -> None:
        revision = self._raft.kv.revision - self._random.choice((0, 0, 5, 20))
        self._world.log(f"fault: compaction at {revision}")
        self._raft.kv.compact(revision)

    def _rotate(self) -> None:
        """Request a new data key, which is not a fault."""
        for manager in self._world.managers.values():
            if manager.store is not None:
                self._world.log("user: another data key")
                self._world.request(manager.store.rotate_data_key())
                return
