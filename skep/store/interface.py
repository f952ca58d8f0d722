"""The store as the control plane sees it: an in-memory replica, transactions, watches, leadership.

Two implementations pass one contract suite (``tests/contract/test_store.py``): ``store.memory`` and ``store.etcd``.

Reads are synchronous and local.  A transaction is a plain function that is run against the replica and
proposed; on a conflict it is simply run again on newer state, so it must be free of side effects.  It is
serializable by itself: the proposal compares every key it wrote and every object it read with ``get``.  What
``find`` listed is not compared: "nobody uses it" and "it is free" are keys of their own (references and claims,
see ``schema``), so removal of a used secret and a second service on one port cannot slip through.
"""

from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Concatenate, ParamSpec, Protocol, TypeAlias, TypeVar

import msgspec

from skep.errors import SkepError, Unavailable
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
        """The object with exactly this id.  Raises: NotFound; Unavailable: it is stored and cannot be read."""

    def lookup(self, kind: type[T], id: str) -> T | None:
        """The object with exactly this id, or None."""

    def find(self, kind: type[T], **by: str) -> Sequence[T]:
        """All objects of a kind, in order of id; ``by`` names at most one index of the schema.

        ``view.find(Task, service_id=...)`` costs what it returns.  An unknown index is a bug (KeyError).
        """

    def ids(self, kind: type[Object]) -> Sequence[str]:
        """The ids of all objects of a kind, in order: a copy, for whoever goes through very many with pauses."""

    def unreadable(self, kind: type[Object]) -> Mapping[str, str]:
        """Ids of objects of a kind that are stored but cannot be read, and why; empty unless something is damaged.

        Such an object is not found, which is not to be taken for its removal; or it is found as it was before, or (a
        node) as far as its other parts are readable.
        """

    def damaged(self, kind: type[Object]) -> Mapping[str, Mapping[str, str]]:
        """Id -> parts beside the head that are stored but cannot be read -> why; usually none.

        Such a part is as it was before, or as if it were not there.  Whoever writes it mends it.
        """

    def resolve(self, kind: type[T], word: str) -> T:
        """What a user means by ``word``: full id, else name, else unique prefix of an id (Docker's order).

        Removed services, still there as owners of their tasks, are not meant.
        Raises: NotFound: "service web not found"; InvalidArgument: "... is ambiguous (2 matches found)"; Unavailable:
        it is there and cannot be read.
        """


class Transaction(View, Protocol):
    """A view that can be written to.  Lives inside one call of a transaction function."""

    def put(self, object: T) -> T:
        """Create or replace ``object``; gives it back as stored (version, updated_at set by the store).

        Only the parts that changed are written.  A change of the wish bumps ``version``.
        A new service spec is stored a second time as a ``SpecVersion``, and ``spec_version`` names it.
        Raises: AlreadyExists: the name belongs to another object; InvalidArgument: a published port does; both with
        Docker's words.  NotFound: a reference names no object.
        """

    def delete(self, kind: type[T], id: str) -> None:
        """Remove the object with all its parts.

        Raises: NotFound; Unavailable: it cannot be read; FailedPrecondition: other objects refer to it (the ids are in
        the error's ``users``).
        """

    def raise_level(self, level: int) -> None:
        """Have the stored data be of this level from now on, unless they are of a higher one."""

    def rely_on(self, kind: type[T], id: str, *parts: str) -> T | None:
        """Like ``lookup``, and the commit fails if the object changed in between (``get`` does the same).

        ``parts``: only these count (``"session"`` of a node), and that the object still exists; default all.
        Raises: Unavailable: it is stored and cannot be read, so that nobody knows whether to decide as without it.
        """


class InUse(SkepError):
    """A removal met references.  ``users``: (kind name, id) of those who refer to it, sorted."""

    def __init__(self, message: str, users: Sequence[tuple[str, str]]) -> None:
        super().__init__(message)
        self.users = users


class Created(msgspec.Struct, frozen=True, gc=False):
    object: Object


class Updated(msgspec.Struct, frozen=True, gc=False):
    old: Object
    new: Object


class Deleted(msgspec.Struct, frozen=True, gc=False):
    object: Object


Event: TypeAlias = Created | Updated | Deleted


class Commit(msgspec.Struct, frozen=True, gc=False):
    """Everything that one revision changed, merged per object."""

    revision: int
    events: tuple[Event, ...]


class WatchLagged(SkepError):
    """The reader of a watch fell behind its bound: start again from a fresh snapshot."""


class Watch(Protocol):
    """Commits after ``snapshot``, each once, in order, without a gap."""

    @property
    def snapshot(self) -> View:
        """What is there at the beginning; to be asked for before the first commit is."""

    def __aiter__(self) -> AsyncIterator[Commit]:
        """Raises: WatchLagged."""


class NotLeader(Unavailable):
    """A write of a leader's loop met a newer leader: nothing was written, and nothing ever will be in this term."""


class Updates(Protocol):
    """What both the store and a term can do: run transactions."""

    async def update(
        self, body: Callable[Concatenate[Transaction, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Run ``body(tx, ...)`` until it commits; return its result once the local replica shows the write.

        A body that writes nothing commits nothing.  What the body raises is raised here, nothing is written.
        Raises: Unavailable: no quorum, or no answer within the store's deadline (5 s) and the outcome could not
        be found out.
        """

    async def update_each(
        self, body: Callable[[Transaction, Item], R], items: Iterable[Item], /
    ) -> Sequence[R | SkepError]:
        """``update`` once per item, each a proposal of its own, committed in as few raft entries as possible.

        One item's conflict or error does not touch the others; the result has one entry per item, in order.
        A store that does not answer, or a term that is over, is the error of every item.
        """


class Store(Updates, Protocol):
    """The replica of one manager, and its way to write."""

    def view(self) -> View:
        """The present local state."""

    def watch(self, *kinds: type[Object]) -> AbstractAsyncContextManager[Watch]:
        """Follow commits that touch one of ``kinds``, from a snapshot on.  Bounded (10,000 commits)."""

    async def barrier(self) -> None:
        """Return once the replica shows everything acknowledged anywhere before this call.

        Concurrent callers share one round trip.  Raises: Unavailable after 5 s.
        """

    def terms(self, node_id: NodeId, addr: str) -> AsyncIterator["Term"]:
        """Terms of leadership of this manager, one after another: yields when this manager has become leader."""

    @property
    def leader(self) -> NodeId | None:
        """Who leads, as far as this replica knows."""

    async def rotate_data_key(self) -> None:
        """Encrypt everything with a fresh data key: new values at once, the others in the background.

        Returns when the new key is in use.  Nothing of it shows in any object.  Raises: Unavailable.
        """

    async def space(self) -> Space | None:
        """How much room this manager's own copy has, as of a moment ago; None: there is no limit.

        Raises: Unavailable.
        """

    async def compact(self, kept_revisions: int) -> bool:
        """Forget all history but the last revisions; whether there was any to forget.  Raises: Unavailable."""

    async def defragment(self) -> None:
        """Give free pages of this manager's own copy back.  It stands still meanwhile.  Raises: Unavailable."""

    async def disarm(self) -> None:
        """Take writes again after the quota was reached.  Raises: Unavailable."""

    @property
    def incarnation(self) -> int:
        """Which life of the cluster this store serves, 1 and up; raised by every restore and forced new cluster.

        Revisions of different incarnations do not compare.
        """


class Term(Updates, Protocol):
    """One term of leadership.  Its updates are fenced: they fail with NotLeader once it is over."""

    @property
    def number(self) -> int: ...

    def view(self) -> View: ...

    def watch(self, *kinds: type[Object]) -> AbstractAsyncContextManager[Watch]: ...

    async def confirm(self) -> None:
        """Have the fence compared, and nothing written; then the replica shows what was written before.

        For what no fence covers, as a change of the consensus itself.  Raises: NotLeader; Unavailable.
        """

    async def wait_lost(self) -> None:
        """Return when the term is over (another leader, or no word from the member for too long)."""


def nothing(object: Any) -> Iterable[Any]:
    """What objects of most kinds claim, share and refer to."""
    return ()


class KindSchema(msgspec.Struct, frozen=True, kw_only=True):
    """How one kind of object is stored (``schema.py`` lists them)."""

    name: str
    type: type[Object]

    parts: Mapping[str, tuple[str, ...]] = {}
    """Part name -> field names.  Every other field is the head ("wish"), whose change bumps the version."""

    answers: frozenset[str] = frozenset()
    """Parts that answer a spec: stored with its version, dropped by the merge when they answer an older one."""

    claims: Callable[[Any], Iterable[str]] = nothing
    """Keys (``n/service/web``, ``p/tcp/8080``) that only one object may hold."""

    shared_claims: Callable[[Any], Iterable[str]] = nothing
    """Claims that many may hold together while nobody holds them alone (host-mode ports)."""

    taken: Callable[[str, Any, Any], SkepError]
    """``(claim, wanting object, holder) -> error``: the refusal in Docker's words."""

    references: Callable[[Any], Iterable[tuple[str, str]]] = nothing
    """(kind name, id) of the objects it needs; these cannot be deleted meanwhile."""

    max_bytes: int = 1024 * 1024
    """One part of such an object, encoded."""

    is_referable: bool = False
    """Whether objects of other kinds may refer to this one, so that its removal has to ask."""

    indexes: Mapping[str, Callable[[Any], str | None]] = {}
    """Index name -> value of an object (None or empty: not in this index).  ``name`` is without regard to case."""

    indexed_part: str = ""
    """The part that all indexes look at; "" is the head.  While it stays as it is, so do they."""

    is_hidden: Callable[[Any], bool] = lambda _: False
    """Whether users no longer see it (a removed service)."""

    has_stand_in: bool = False
    """Whether an object whose head was never readable is shown all the same, made of its other parts: ``type(id=...)``
    stands for the head."""

    assumed: Callable[[Any, Collection[str]], Any] = lambda one, _: one
    """``(object, parts that were never readable and hold their defaults) -> object`` as it is safe to take it: what
    cannot be read must not look like a loss.  Idempotent."""
