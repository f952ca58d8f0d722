"""The store's interface: an in-memory replica, transactions, watches, leadership.

Two implementations pass one contract suite (``tests/contract/test_store.py``): ``store.memory`` and ``store.etcd``.

Reads are synchronous and local.  A transaction is a plain function that runs against the replica and is then
proposed; on a conflict it runs again on newer state, so it must be free of side effects.  The proposal compares every
key that it wrote and every object that it read with ``get``.  The results of ``find`` are not compared: "unused" and
"free" have their own keys (references and claims, see ``schema``), so concurrent transactions cannot remove a secret
in use or publish one port twice.  Without such a key, a rare transaction compares a whole kind
(``rely_on_all``).
"""

from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Concatenate, ParamSpec, Protocol, TypeAlias, TypeVar

import msgspec

from skep.errors import FailedPrecondition, SkepError, Unavailable
from skep.model.values.ids import NodeId
from skep.store.space import MemberSpace

Object: TypeAlias = msgspec.Struct
"""An instance of one of the kinds in ``store.schema``."""

T = TypeVar("T", bound=msgspec.Struct)
R = TypeVar("R")
Item = TypeVar("Item")
P = ParamSpec("P")


class View(Protocol):
    """One consistent state of the cluster.  Valid until the next ``await``.  Nothing is copied."""

    @property
    def revision(self) -> int:
        """Store revision of this state.  It grows with every commit anywhere in the cluster."""

    @property
    def level(self) -> int:
        """The level of the stored data (``store.level``)."""

    def get(self, kind: type[T], id: str) -> T:
        """Return the object with exactly this id.  Raises NotFound, or Unavailable if the object is unreadable."""

    def lookup(self, kind: type[T], id: str) -> T | None:
        """Return the object with exactly this id, or None."""

    def find(self, kind: type[T], **by: str) -> Sequence[T]:
        """Return all objects of a kind, in order of id.

        ``by`` names at most one index of the schema: the cost of ``view.find(Task, service_id=...)`` is proportional to
        its result.  An unknown index is a bug (KeyError).
        """

    def ids(self, kind: type[Object]) -> Sequence[str]:
        """Return a copy of all ids of a kind, in order, for long loops that yield to the event loop."""

    def unreadable(self, kind: type[Object]) -> Mapping[str, str]:
        """Return the errors of unreadable objects of a kind, by id.  Empty unless something is damaged.

        Such an object is not found, although it was not removed.  Or it is found in its last readable state, or, if it
        is a node, with its readable parts.
        """

    def why_unreadable(self, kind: type[Object], name: str) -> str:
        """Return the error of the unreadable object that has this unique name, or an empty string without one."""

    def damaged(self, kind: type[Object]) -> Mapping[str, Mapping[str, str]]:
        """Return the errors of unreadable parts except heads, by id and part.  Usually empty.

        Such a part keeps its last readable value, or its defaults.  Writing it repairs it.
        """

    def resolve(self, kind: type[T], word: str, among: Callable[[T], bool] | None = None) -> T:
        """Return the object that ``word`` names: by full id, name, or unique prefix of an id (Docker's order).

        Removed services, which are still stored as owners of their tasks, are not found.

        Args:
            among: Returns whether an object is considered.  The result is the same as if the others did not exist.

        Raises:
            NotFound: "service web not found".
            InvalidArgument: "... is ambiguous (2 matches found)".
            Unavailable: The object is unreadable.  Not raised with ``among``, which cannot judge such an object.
        """


class Transaction(View, Protocol):
    """A view that can be written to.  Valid during one call of a transaction function."""

    def put(self, object: T) -> T:
        """Create or replace ``object``.  Returns it as stored: the store sets version and updated_at.

        Only changed parts are written.  A change of the head increases ``version``.  A new service spec is also stored
        as a ``SpecVersion``, to which ``spec_version`` refers.

        Raises:
            AlreadyExists: Another object has the name.  The text is Docker's.
            InvalidArgument: Another object has the published port.  The text is Docker's.
            NotFound: A referenced object does not exist.
        """

    def delete(self, kind: type[T], id: str) -> None:
        """Remove the object with all its parts.

        Raises:
            NotFound: It does not exist.
            Unavailable: It is unreadable.
            FailedPrecondition: Other objects refer to it.  Their ids are in the error's ``users``.
        """

    def raise_level(self, level: int) -> None:
        """Raise the level of the stored data (``store.level``) unless it is that high already."""

    def rely_on(self, kind: type[T], id: str, *parts: str) -> T | None:
        """Return the object like ``lookup``, and fail the commit if it changed concurrently, as ``get`` does.

        Args:
            parts: Parts to compare (``"session"`` of a node), together with the object's existence.  All by default.

        Raises:
            Unavailable: The object is unreadable, so its absence is not certain.
        """

    def rely_on_all(self, kind: type[Object]) -> None:
        """Fail the commit if any writer created or changed an object of the kind concurrently.

        Use it in rare transactions only, because every write of an object of the kind makes them run again.  The kind
        must be in ``keys.KINDS_COMPARED``.
        """


class InUse(SkepError):
    """The object cannot be removed because other objects refer to it.  ``users`` has their (kind name, id), sorted."""

    def __init__(self, message: str, users: Sequence[tuple[str, str]]) -> None:
        super().__init__(message)
        self.users = users


class Created(msgspec.Struct, frozen=True, gc=False):
    """An object that was created in this revision."""

    object: Object


class Updated(msgspec.Struct, frozen=True, gc=False):
    """An object before and after the revision."""

    old: Object
    new: Object


class Deleted(msgspec.Struct, frozen=True, gc=False):
    """A deleted object as it was before the revision."""

    object: Object


Event: TypeAlias = Created | Updated | Deleted


class Commit(msgspec.Struct, frozen=True, gc=False):
    """All changes of one revision, merged per object."""

    revision: int
    events: tuple[Event, ...]


class WatchLagged(SkepError):
    """The reader of a watch is too far behind and has to restart from a new snapshot."""


class Watch(Protocol):
    """The commits after ``snapshot``, each once, in order, and without gaps."""

    @property
    def snapshot(self) -> View:
        """The state at the beginning.  Read it before the first commit."""

    def __aiter__(self) -> AsyncIterator[Commit]:
        """Iterate over the commits.  Raises WatchLagged."""

    def waiting(self) -> Iterator[Commit]:
        """Take the commits that the replica already shows, without waiting for more.

        Raises WatchLagged.
        """


class HistoryGone(FailedPrecondition):
    """The store has deleted this old revision."""


class NotLeader(Unavailable):
    """A leader's write found another leader.  Nothing was written, and no later write of this term will be."""


class Updates(Protocol):
    """Runs transactions: a store, or a term."""

    async def update(
        self, body: Callable[Concatenate[Transaction, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Run ``body(tx, ...)`` until it commits.  Returns its result once the local replica shows the write.

        A body that writes nothing commits nothing.  Errors of the body are raised, and nothing is written.

        Raises:
            Unavailable: There is no quorum, or the store did not respond within its deadline (5 s) and the outcome is
                unknown.
        """

    async def update_each(
        self, body: Callable[[Transaction, Item], R], items: Iterable[Item], /
    ) -> Sequence[R | SkepError]:
        """Run ``update`` for each item as a separate proposal, in as few raft entries as possible.

        One item's conflict or error does not affect the others.  The result has one entry per item, in order.  If the
        store does not respond, or the term is over, every item has that error.
        """


class LoopStore(Updates, Protocol):
    """The store for a control loop.  It is a ``Term`` in production, or a plain ``Store`` without the fence."""

    def view(self) -> View:
        """Return the current local state."""

    def watch(self, *kinds: type[Object]) -> AbstractAsyncContextManager[Watch]:
        """Watch commits that change objects of ``kinds``, starting from a snapshot.  Bounded (10,000 commits)."""


class Store(LoopStore, Protocol):
    """The replica of one manager, and the writes of that manager."""

    def rehearsal(self) -> Transaction:
        """Return a transaction on the current state that is never proposed.  Use it to find out whether a change would
        be refused.

        If it is used across an ``await``, its reads may be of different states.
        """

    async def barrier(self) -> None:
        """Wait until the replica shows every write that any manager has acknowledged before this call.

        Concurrent callers share one round trip.  Raises Unavailable after 5 s.
        """

    def terms(self, node_id: NodeId, addr: str) -> AsyncIterator["Term"]:
        """Yield a term each time this manager becomes the leader."""

    @property
    def leader(self) -> NodeId | None:
        """The leader that this replica shows, or None."""

    async def rotate_data_key(self) -> None:
        """Encrypt new values with a new data key at once, and all others in the background.

        Returns when the new key is in use.  No object changes.  Raises Unavailable.
        """

    async def space(self) -> MemberSpace | None:
        """Return a recent size and the quota of this manager's own copy, or None without a limit.

        Raises Unavailable.
        """

    async def compact(self, kept_revisions: int) -> bool:
        """Discard all history but the last revisions.  Returns whether any was discarded.  Raises Unavailable."""

    async def state_at(self, revision: int) -> View:
        """Return the objects as they were at ``revision``, without secrets and configs.

        Raises:
            HistoryGone: The store has deleted the revision.
            FailedPrecondition, ResourceExhausted: The revision cannot be read.
            Unavailable: The store did not respond.
        """

    async def oldest_revision(self) -> int:
        """Return the first revision that ``state_at`` may still have.  Raises Unavailable."""

    async def defragment(self) -> None:
        """Return free pages of this manager's own copy to the disk.  The copy is blocked meanwhile.  Raises
        Unavailable.
        """

    async def disarm(self) -> None:
        """Clear the alarm that was raised at the quota, so that writes are accepted again.  Raises Unavailable."""

    @property
    def incarnation(self) -> int:
        """The cluster's incarnation, 1 or more.  Every restore and forced new cluster increases it.

        Revisions of different incarnations are not comparable.
        """


class Term(LoopStore, Protocol):
    """One term of leadership.  Its updates are fenced: they fail with NotLeader once it is over."""

    @property
    def number(self) -> int:
        """Number of the term.  A later term of the cluster has a higher number."""

    async def confirm(self) -> None:
        """Compare the fence without a write.  Afterwards the replica shows everything that was written before.

        Use it before changes that no fence covers, such as raft membership changes.  Raises NotLeader or Unavailable.
        """

    async def wait_lost(self) -> None:
        """Wait until the term is over (another leader, or no response of the member for too long)."""


def nothing(object: Any) -> Iterable[Any]:
    """Return no claims or references, as most kinds have none."""
    return ()


class KindSchema(msgspec.Struct, frozen=True, kw_only=True):
    """The storage rules of one kind of object.  ``schema.py`` lists the kinds."""

    name: str
    type: type[Object]

    parts: Mapping[str, tuple[str, ...]] = {}
    """Names of the fields in each part, by part.  All other fields are the head.  A change of the head increases the
    version.
    """

    spec_statuses: frozenset[str] = frozenset()
    """Parts that report on one version of the spec (as Kubernetes' ``observedGeneration``).

    They are stored with that version, and ignored once the spec has a newer one."""

    claims: Callable[[Any], Iterable[str]] = nothing
    """Returns the keys (``n/service/web``, ``p/tcp/8080``) that at most one object may hold."""

    shared_claims: Callable[[Any], Iterable[str]] = nothing
    """Returns claims that several objects may share while no object holds them exclusively (host-mode ports)."""

    taken: Callable[[str, Any, Any], SkepError]
    """Takes claim, claiming object and holder, and returns the error with Docker's text."""

    references: Callable[[Any], Iterable[tuple[str, str]]] = nothing
    """Returns (kind name, id) of the objects that an object uses.  These cannot be deleted as long as it uses them."""

    max_bytes: int = 1024 * 1024
    """Maximum bytes of one encoded part."""

    is_referable: bool = False
    """Whether objects of other kinds may refer to objects of this kind.  A removal must then compare that none does."""

    indexes: Mapping[str, Callable[[Any], str | None]] = {}
    """Functions that return the value of an object in an index, by index name.  None or empty means that it is not in
    the index.  ``name`` is case-insensitive.
    """

    indexed_part: str = ""
    """The part from which all indexes are computed, or empty for the head.  They are updated only if it changes."""

    is_hidden: Callable[[Any], bool] = lambda _: False
    """Returns whether an object is hidden from users (a removed service)."""

    has_placeholder: bool = False
    """Whether an object with an unreadable head is shown with its other parts and the head of ``type(id=...)``."""

    irreplaceable: frozenset[str] = frozenset()
    """Parts that a process only writes if it was once able to read them.

    Other processes may still be able to read the stored value, and would take defaults in its place for facts.
    Removing such a part is allowed.
    """

    safe_fallback: Callable[[Any, Collection[str]], Any] = lambda one, _: one
    """Takes an object and the names of parts that were never readable and have their defaults.  Returns the object with
    safe values in these parts.

    It exists because damage must not look like the loss of a task or node.  Idempotent.
    """
