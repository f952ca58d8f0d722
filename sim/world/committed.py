"""The committed state, to which every replica must converge, and the manager that wrote each change."""

from collections.abc import Callable

import msgspec

from skep.model.values.ids import NodeId
from skep.store import keys
from skep.store.etcd import etcd_pb2 as pb
from skep.store.etcd.encryption.cipher import Cipher, decoded_ring
from skep.store.etcd.requests import by_revision, change_of, etcd_key
from skep.store.interface import Event, View
from skep.store.leadership import LeaderRecord
from skep.store.state import State
from skep.store.tables import KeyChange

KEY_RING = etcd_key(keys.KEY_RING)


class Change(msgspec.Struct, frozen=True):
    """One committed entry that changed keys."""

    time_s: float
    origin: NodeId
    """The manager that proposed it."""
    leader: NodeId | None
    """Leader before this entry, according to the leader key."""
    term: int
    """Term of that leader, according to the leader key.  A manager may lead in several terms."""
    revision: int
    keys: tuple[KeyChange, ...]
    events: tuple[Event, ...]


class CommittedState:
    """The committed state.  ``watchers`` are called with each change, after ``view`` shows it."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.watchers: list[Callable[[Change, View], None]] = []
        self.leader: NodeId | None = None
        self.term = 0
        self.now = now
        self._state = State()
        self._cipher: Cipher | None = None

    @property
    def view(self) -> State:
        """Return the current state, which is valid until the next commit."""
        return self._state

    def begin(self, cipher: Cipher) -> None:
        """Decrypt with ``cipher`` from now on.  Earlier entries contain no encrypted values."""
        self._cipher = cipher

    def take(self, origin: NodeId, revision: int, events: list[pb.Event]) -> None:
        """Apply a committed entry that ``origin`` proposed."""
        assert self._cipher is not None, "the cluster is initialized before the first write"
        for event in events:
            if event.kv.key == KEY_RING and event.type == pb.Event.PUT:
                self._cipher.use(decoded_ring(event.kv.value), revision)
        changes = tuple(
            change
            for event in events
            if (change := change_of(event.kv, self._cipher, is_delete=event.type == pb.Event.DELETE))
            is not None
        )
        leader, term = self.leader, self.term
        for change in changes:
            if change.key == keys.LEADER and change.value is not None:
                record = msgspec.json.decode(change.value, type=LeaderRecord)
                self.leader, self.term = record.node, record.term
        happened = self._state.apply(revision, changes)
        change_ = Change(self.now(), origin, leader, term, revision, changes, happened)
        for watcher in tuple(self.watchers):
            watcher(change_, self._state)

    def restore(self, events: list[pb.Event]) -> None:
        """Return to the state after ``events``."""
        self._state, self.leader = self.past(events), None

    def past(self, events: list[pb.Event]) -> State:
        """Return the state after ``events``, which are the events of the first revisions."""
        assert self._cipher is not None
        state = State()
        for revision, group in by_revision(events):
            changes = [
                change_of(event.kv, self._cipher, is_delete=event.type == pb.Event.DELETE) for event in group
            ]
            state.apply(revision, [change for change in changes if change is not None])
        return state
