"""The store's interface: an in-memory replica, transactions, watches, leadership.

Two implementations pass one contract suite (``tests/contract/test_store.py``): ``store.memory`` and ``store.etcd``.

Reads are synchronous and local.  A transaction is a plain function that runs against the replica and is then
proposed; on a conflict it runs again on newer state, so it must be free of side effects.  The proposal compares every
key that it wrote and every object that it read with ``get``.  The results of ``find`` are not compared: "unused" and
"free" have their own keys (references and claims, see ``schema``), so concurrent transactions cannot remove a secret
in use or publish one port twice.  Where there is no such key, a rare transaction compares a whole kind
(``rely_on_all``).
"""

from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Concatenate, ParamSpec, Protocol, TypeAlias, TypeVar

import msgspec

from skep.errors import FailedPrecondition, SkepError, Unavailable
from skep.model.ids import NodeId
from skep.store.space import Space

Object: TypeAlias = msgspec.Struct
"""An instance of one of the kinds in ``store.schema``."""

T = TypeVar("T", bound=msgspec.Struct)
R = TypeVar("R")
Item = TypeVar("Item")
P = ParamSpec("P")


class View(Protocol):
    """One consistent state of the cluster.  Valid until the next ``await``; nothing is copied."""

    @property
    def revision(self) -> int:
        """Grows with every commit anywhere in the cluster."""

    @property
    def level(self) -> int:
        """The level of the stored data (``store.level``)."""

    def get(self, kind: type[T], id: str) -> T:
        """The object with exactly this id.  Raises: NotFound; Unavailable: it is stored but cannot be read."""

    def lookup(self, kind: type[T], id: str) -> T | None:
        """The object with exactly this id, or None."""

    def find(self, kind: type[T], **by: str) -> Sequence[T]:
        """All objects of a kind, in order of id; ``by`` names at most one index of the schema.

        ``view.find(Task, service_id=...)`` costs what it returns.  An unknown index is a bug (KeyError).
        """

    def ids(self, kind: type[Object]) -> Sequence[str]:
        """The ids of all objects of a kind, in order: a copy, for loops over very many that yield to the event loop."""

    def unreadable(self, kind: type[Object]) -> Mapping[str, str]:
        """Ids of stored objects of a kind that cannot be read -> the error; empty unless something is damaged.

        Such an object is not found, which does not mean that it was removed; or it is found in its last readable state,
        or (a node) with its other parts.
        """

    def damaged(self, kind: type[Object]) -> Mapping[str, Mapping[str, str]]:
        """Id -> stored parts besides the head that cannot be read -> the error; usually none.

        Such a part keeps its last readable value, or its defaults.  Writing it repairs it.
        """

    def resolve(self, kind: type[T], word: str) -> T:
        """The object that ``word`` names: by full id, else name, else unique prefix of an id (Docker's order).

        Removed services, which are still stored as owners of their tasks, are not found.
        Raises: NotFound: "service web not found"; InvalidArgument: "... is ambiguous (2 matches found)"; Unavailable:
        it is stored but cannot be read.
        """


class Transaction(View, Protocol):
    """A view that can be written to.  Valid during one call of a transaction function."""

    def put(self, object: T) -> T:
        """Create or replace ``object``; returns it as stored (version, updated_at set by the store).

        Only the parts that changed are written.  A change of the head increases ``version``.
        A new service spec is also stored as a ``SpecVersion``, which ``spec_version`` names.
        Raises: AlreadyExists: another object has the name; InvalidArgument: or a published port; both with Docker's
        texts.  NotFound: a reference names no object.
        """

    def delete(self, kind: type[T], id: str) -> None:
        """Remove the object with all its parts.

        Raises: NotFound; Unavailable: it cannot be read; FailedPrecondition: other objects refer to it (the ids are in
        the error's ``users``).
        """

    def raise_level(self, level: int) -> None:
        """Raise the level of the stored data (``store.level``), unless it is higher already."""

    def rely_on(self, kind: type[T], id: str, *parts: str) -> T | None:
        """Like ``lookup``, but the commit fails if the object changed concurrently (``get`` does the same).

        ``parts``: compare only these (``"session"`` of a node) and that the object still exists; default all.
        Raises: Unavailable: it is stored but cannot be read, which must not be taken for absence.
        """

    def rely_on_all(self, kind: type[Object]) -> None:
        """The commit fails if an object of the kind was created or changed concurrently, by whatever writer.

        For rare transactions only: every write of the kind makes them run again.  One of ``keys.KINDS_COMPARED``.
        """


class InUse(SkepError):
    """An object that other objects refer to cannot be removed.  ``users``: their (kind name, id), sorted."""

    def __init__(self, message: str, users: Sequence[tuple[str, str]]) -> None:
        super().__init__(message)
        self.users = users


class Created(msgspec.Struct, frozen=True, gc=False):
    """The object is new in this revision."""

    object: Object


class Updated(msgspec.Struct, frozen=True, gc=False):
    """The object before and after the revision."""

    old: Object
    new: Object


class Deleted(msgspec.Struct, frozen=True, gc=False):
    """The object as it was before the revision."""

    object: Object


Event: TypeAlias = Created | Updated | Deleted


class Commit(msgspec.Struct, frozen=True, gc=False):
    """Everything that one revision changed, merged per object."""

    revision: int
    events: tuple[Event, ...]


class WatchLagged(SkepError):
    """The reader of a watch is too far behind: it has to start again from a new snapshot."""


class Watch(Protocol):
    """Commits after ``snapshot``, each once, in order, without a gap."""

    @property
    def snapshot(self) -> View:
        """The state at the beginning; to be read before the first commit."""

    def __aiter__(self) -> AsyncIterator[Commit]:
        """Raises: WatchLagged."""

    def waiting(self) -> Iterator[Commit]:
        """Take the commits that the replica shows already and that nothing has taken, without waiting for more.

        Raises: WatchLagged.
        """


class HistoryGone(FailedPrecondition):
    """The store does not keep so old a revision."""


class NotLeader(Unavailable):
    """A leader's write found another leader: nothing was written, and nothing more will be in this term."""


class Updates(Protocol):
    """Runs transactions: a store, or a term."""

    async def update(
        self, body: Callable[Concatenate[Transaction, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Run ``body(tx, ...)`` until it commits; return its result once the local replica shows the write.

        A body that writes nothing commits nothing.  Errors of the body are raised, and nothing is written.
        Raises: Unavailable: no quorum, or no response within the store's deadline (5 s) and the outcome is unknown.
        """

    async def update_each(
        self, body: Callable[[Transaction, Item], R], items: Iterable[Item], /
    ) -> Sequence[R | SkepError]:
        """``update`` once per item, each a separate proposal, committed in as few raft entries as possible.

        One item's conflict or error does not affect the others; the result has one entry per item, in order.
        If the store does not respond, or the term is over, every item has that error.
        """


class LoopStore(Updates, Protocol):
    """The store as a control loop uses it: a ``Term`` in production, or a plain ``Store`` without the fence."""

    def view(self) -> View:
        """The present local state."""

    def watch(self, *kinds: type[Object]) -> AbstractAsyncContextManager[Watch]:
        """Commits that change objects of ``kinds``, from a snapshot on.  Bounded (10,000 commits)."""


class Store(LoopStore, Protocol):
    """The replica of one manager, and the writes of that manager."""

    def rehearsal(self) -> Transaction:
        """Return a transaction on the present state that is never proposed: it says what would be refused.

        It may be used over several ``await``; then its reads are not of one state.
        """

    async def barrier(self) -> None:
        """Return once the replica shows everything acknowledged anywhere before this call.

        Concurrent callers share one round trip.  Raises: Unavailable after 5 s.
        """

    def terms(self, node_id: NodeId, addr: str) -> AsyncIterator["Term"]:
        """Terms of leadership of this manager: yields each time this manager has become leader."""

    @property
    def leader(self) -> NodeId | None:
        """The leader, as of this replica."""

    async def rotate_data_key(self) -> None:
        """Encrypt everything with a new data key: new values at once, the others in the background.

        Returns when the new key is in use.  No object changes.  Raises: Unavailable.
        """

    async def space(self) -> Space | None:
        """Size and quota of this manager's own copy, as of a moment ago; None: there is no limit.

        Raises: Unavailable.
        """

    async def compact(self, kept_revisions: int) -> bool:
        """Discard all history but the last revisions; whether there was any to discard.  Raises: Unavailable."""

    async def state_at(self, revision: int) -> View:
        """The objects as they were at ``revision``, without secrets and configs.

        Raises: HistoryGone: the store does not keep it any more; FailedPrecondition, ResourceExhausted: it cannot be
        read; Unavailable.
        """

    async def oldest_revision(self) -> int:
        """The first revision for which ``state_at`` may have a response.  Raises: Unavailable."""

    async def defragment(self) -> None:
        """Return free pages of this manager's own copy to the disk.  It is blocked meanwhile.  Raises: Unavailable."""

    async def disarm(self) -> None:
        """Clear the alarm of a reached quota, so that writes are accepted again.  Raises: Unavailable."""

    @property
    def incarnation(self) -> int:
        """The cluster's incarnation, 1 and up; increased by every restore and forced new cluster.

        Revisions of different incarnations are not comparable.
        """


class Term(LoopStore, Protocol):
    """One term of leadership.  Its updates are fenced: they fail with NotLeader once it is over."""

    @property
    def number(self) -> int:
        """Counts the terms of the cluster; a later term has a higher number."""

    async def confirm(self) -> None:
        """Compare the fence without a write; on return the replica shows everything written before.

        For changes that no fence covers, as of the raft membership itself.  Raises: NotLeader; Unavailable.
        """

    async def wait_lost(self) -> None:
        """Return when the term is over (another leader, or no response of the member for too long)."""


def nothing(object: Any) -> Iterable[Any]:
    """The claims and references of most kinds: none."""
    return ()


class KindSchema(msgspec.Struct, frozen=True, kw_only=True):
    """How one kind of object is stored (``schema.py`` lists them)."""

    name: str
    type: type[Object]

    parts: Mapping[str, tuple[str, ...]] = {}
    """Part name -> field names.  All other fields are the head, whose change increases the version."""

    spec_statuses: frozenset[str] = frozenset()
    """Parts that report on one version of the spec (as Kubernetes' ``observedGeneration``): stored with that version,
    and ignored once the spec has a newer one."""

    claims: Callable[[Any], Iterable[str]] = nothing
    """Keys (``n/service/web``, ``p/tcp/8080``) that at most one object may hold."""

    shared_claims: Callable[[Any], Iterable[str]] = nothing
    """Claims that several objects may share while no object holds them exclusively (host-mode ports)."""

    taken: Callable[[str, Any, Any], SkepError]
    """``(claim, claiming object, holder) -> error``, with Docker's text."""

    references: Callable[[Any], Iterable[tuple[str, str]]] = nothing
    """(kind name, id) of the objects that it uses, which cannot be deleted meanwhile."""

    max_bytes: int = 1024 * 1024
    """Limit of one encoded part."""

    is_referable: bool = False
    """Whether objects of other kinds may refer to this one, so that its removal has to compare that none does."""

    indexes: Mapping[str, Callable[[Any], str | None]] = {}
    """Index name -> value of an object (None or empty: not in this index).  ``name`` is case-insensitive."""

    indexed_part: str = ""
    """The part that all indexes are computed from; "" is the head.  They are updated only when it changes."""

    is_hidden: Callable[[Any], bool] = lambda _: False
    """Whether it is not shown to users (a removed service)."""

    has_placeholder: bool = False
    """Whether an object whose head was never readable is shown with its other parts, and ``type(id=...)`` as head."""

    irreplaceable: frozenset[str] = frozenset()
    """Parts that only a process that was once able to read them writes: others may still be able to read what is there,
    and defaults in its place would be taken for facts.  Removing them is allowed."""

    safe_fallback: Callable[[Any, Collection[str]], Any] = lambda one, _: one
    """``(object, parts that were never readable and have their defaults) -> object`` with safe values in these parts:
    damage must not look like a loss of the task or node.  Idempotent."""
