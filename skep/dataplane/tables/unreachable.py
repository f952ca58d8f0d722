"""Peers that do not answer probes, while the node has no session with a manager.

With a manager, a node that is gone leaves the tables within seconds.  Without one it stays there, and its share of
connections fails for as long as that lasts.  The nodes probe each other all the time, so what a peer that does not
answer was to serve is left out of this node's tables meanwhile: published ports, virtual addresses, names.

* A service keeps what it has if all of it is silent: perhaps an answer comes yet.
* Where no peer at all answers, it is this node's own cable that is out, and nothing is left out.
* The first answer brings a peer back, and so do the tables of a manager that is there again.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import msgspec
import structlog

from skep.aio.clock import Clock
from skep.aio.race import Preempted, run_unless
from skep.model.ids import NodeId, ServiceId
from skep.model.paths import PathCheck, PathReport
from skep.model.tables import Table, TableEndpoint

log = structlog.get_logger()

LOST_SECONDS = 5.0
"""Without a manager's word, until the probes count: a session that moves takes less."""
FRESH_SECONDS = 6.0
"""Of a session, until its manager's tables count alone: it has to find out itself which nodes are gone."""
LOOK_SECONDS = 1.0


class Session(Protocol):
    """The node's session with a manager (``agent.session_state``)."""

    @property
    def has_session(self) -> bool: ...

    def silence_s(self) -> float: ...

    async def wait_session(self) -> None: ...

    async def wait_no_session(self) -> None: ...


class Unreachable(msgspec.Struct, frozen=True):
    """Peers that do not answer: on plain networks, on encrypted ones."""

    plain: frozenset[NodeId] = frozenset()
    encrypted: frozenset[NodeId] = frozenset()

    def of(self, table: Table) -> frozenset[NodeId]:
        """Those that matter to one network."""
        return self.encrypted if table.head.is_encrypted else self.plain


NONE_UNREACHABLE = Unreachable()


def silent(reports: Mapping[NodeId, PathReport]) -> Unreachable:
    """The peers that do not answer, as the latest ``reports`` say; a verdict that is not settled is none."""
    return Unreachable(_silent(reports, PathCheck.OVERLAY), _silent(reports, PathCheck.ENCRYPTED))


def _silent(reports: Mapping[NodeId, PathReport], check: PathCheck) -> frozenset[NodeId]:
    asked = {
        id: report.is_settled and one.is_failing
        for id, report in reports.items()
        for one in report.findings
        if one.check is check
    }
    found = frozenset(id for id, fails in asked.items() if fails)
    return found if len(found) < len(asked) else frozenset()


def without(table: Table, silent: frozenset[NodeId]) -> Table:
    """``table`` with nothing served by ``silent`` nodes, but for services that no other node serves."""
    kept = {
        one.service_id for one in table.endpoints.values() if one.is_serving and one.node_id not in silent
    }
    changed = {
        id: msgspec.structs.replace(one, is_serving=False, is_left_out=True)
        for id, one in table.endpoints.items()
        if _is_left_out(one, silent, kept)
    }
    return msgspec.structs.replace(table, endpoints={**table.endpoints, **changed}) if changed else table


def whole(table: Table) -> Table:
    """``table`` as the managers said it: undoes ``without``."""
    changed = {
        id: msgspec.structs.replace(one, is_serving=True, is_left_out=False)
        for id, one in table.endpoints.items()
        if one.is_left_out
    }
    return msgspec.structs.replace(table, endpoints={**table.endpoints, **changed}) if changed else table


def _is_left_out(one: TableEndpoint, silent: frozenset[NodeId], kept: Iterable[ServiceId]) -> bool:
    return one.is_serving and one.node_id in silent and bool(one.service_id) and one.service_id in kept


async def watch(
    session: Session,
    reports: Callable[[], Mapping[NodeId, PathReport]],
    leave_out: Callable[[Unreachable], None],
    clock: Clock,
) -> None:
    """Have silent peers left out whenever no manager's word is fresh, until cancelled."""
    while True:
        await session.wait_no_session()
        try:
            await _while_without_manager(session, reports, leave_out, clock)
        finally:
            leave_out(NONE_UNREACHABLE)


async def _while_without_manager(
    session: Session,
    reports: Callable[[], Mapping[NodeId, PathReport]],
    leave_out: Callable[[Unreachable], None],
    clock: Clock,
) -> None:
    gained_at: float | None = None
    before = NONE_UNREACHABLE
    while gained_at is None or clock.monotonic() - gained_at < FRESH_SECONDS:
        is_lost = not session.has_session
        if is_lost or gained_at is None:
            gained_at = None if is_lost else clock.monotonic()
        if session.silence_s() >= LOST_SECONDS or before != NONE_UNREACHABLE:
            found = silent(reports())
            if found != before:
                log.warning("peers that do not answer serve nothing here", peers=sorted(found.plain))
            leave_out(found)
            before = found
        try:
            changed = session.wait_session() if is_lost else session.wait_no_session()
            await run_unless(clock.sleep(LOOK_SECONDS), changed)
        except Preempted:
            if before == NONE_UNREACHABLE and is_lost:
                return  # nothing was left out
