"""The reboot lock.  It is a label of the cluster's spec that lists the nodes that are down on purpose, and is changed
by compare-and-swap.

As in kured and FleetLock, the lock is taken for a node before it is stopped on purpose, and released when the node is
ready again.  An overdue lock is not released automatically, because its node may have failed, but others may take it.
"""

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import msgspec

from skep.api.client.requests import Requests
from skep.cli.endpoint import RESPONSE_TIMEOUT_S
from skep.cli.maintain.upgrade_plan import UpgradableNode, members_of, refusals_of_quorum
from skep.errors import FailedPrecondition, NotFound, OutOfSequence, PermissionDenied, SkepError
from skep.model.options.freezes import CLUSTER, FreezesResponse
from skep.model.options.labels import MAINTENANCE
from skep.model.values.counts import counted

_ATTEMPTS: Final = 10
"""Other writers of the cluster's spec conflict with a change of the lock.  Each attempt reads the spec again."""


class LockHolder(msgspec.Struct, frozen=True, kw_only=True):
    """A holder of the lock."""

    node: str
    """Node id, or empty for an upgrade between two nodes."""
    by: str
    until: datetime
    is_upgrade: bool = False
    is_system: bool = False
    """Whether the upgrade is one of the machines, with reboots."""
    boot: str = ""
    """Boot id of the node before its reboot, or empty if it is not being rebooted."""
    availability: str = ""
    """Availability of the node before the upgrade drained it, which is restored afterwards.  Empty if it was not
    drained.
    """

    def is_overdue(self, now: datetime) -> bool:
        """Return whether others may take the lock over."""
        return now > self.until


class _Lock(msgspec.Struct, frozen=True):
    holders: tuple[LockHolder, ...] = ()


def read(text: str) -> tuple[LockHolder, ...]:
    """Return the holders in the label's value.  Raises: FailedPrecondition: the value is damaged."""
    try:
        return msgspec.json.decode(text, type=_Lock).holders if text else ()
    except msgspec.MsgspecError as error:
        raise FailedPrecondition(
            f"the cluster's label {MAINTENANCE} cannot be read ({error}). Remove it with skep reboot-lock release "
            "--all."
        ) from error


def written(holders: Sequence[LockHolder]) -> str:
    """Return the label's value, or an empty text to remove the label."""
    return msgspec.json.encode(_Lock(tuple(holders))).decode() if holders else ""


def taken(
    holders: Sequence[LockHolder],
    wanted: LockHolder,
    members: Sequence[UpgradableNode],
    now: datetime,
    *,
    at_once: int = 1,
) -> tuple[LockHolder, ...]:
    """Return the holders with ``wanted`` added.  A holder may take the lock again, which renews it.

    Raises: FailedPrecondition: another node holds the lock, or the managers need the node.
    """
    others = [one for one in holders if not is_same(one, wanted)]
    held = [one for one in others if not one.is_overdue(now)]
    if len(held) >= at_once or (held and wanted.is_upgrade):
        held_by = "; ".join(described(one, members, now) for one in held)
        if held[0].is_upgrade:
            raise FailedPrecondition(f"{held_by}. Wait, or run skep upgrade --abort.")
        name = next((one.name for one in members if one.id == held[0].node), held[0].node)
        raise FailedPrecondition(f"{held_by}. Wait, or run skep reboot-lock release {name}.")
    away = next((one for one in members if one.id == wanted.node), None)
    if away is not None:
        absent = [one for one in members if any(one.id == holder.node for holder in held)]
        nodes = [msgspec.structs.replace(one, is_ready=one.is_ready and one not in absent) for one in members]
        if reasons := list(refusals_of_quorum(nodes, away)):
            raise FailedPrecondition("; ".join(reasons))
    return (*held, wanted)


def is_same(one: LockHolder, other: LockHolder) -> bool:
    """Return whether both are the same lock, perhaps taken again."""
    if one.is_upgrade or other.is_upgrade:
        return one.is_upgrade and other.is_upgrade and one.by == other.by
    return one.node == other.node


def described(holder: LockHolder, members: Sequence[UpgradableNode], now: datetime) -> str:
    """Return a text about a holder, in capital letters if it is long overdue."""
    names = {one.id: one.name for one in members}
    what = (
        ("a system upgrade" if holder.is_system else "an upgrade") if holder.is_upgrade else "the reboot lock"
    )
    text = f"{what} is held by {holder.by}"
    if holder.node:
        text += f" for {names.get(holder.node, holder.node)}"
    late = now - holder.until
    if late <= timedelta():
        return f"{text} for another {counted(max(int(-late.total_seconds()) // 60, 1), 'minute')}"
    minutes = int(late.total_seconds()) // 60
    if minutes < 60:
        return f"{text}, overdue for {counted(max(minutes, 1), 'minute')}"
    ready = any(one.id == holder.node and one.is_ready for one in members)
    cause = "it was not released" if ready or not holder.node else "THE NODE IS STILL NOT READY"
    return f"{text}, OVERDUE for {counted(minutes // 60, 'hour')}: {cause}"


def overdue(holders: Sequence[LockHolder], members: Sequence[UpgradableNode], now: datetime) -> Iterator[str]:
    """Return a line for each overdue holder."""
    return (described(one, members, now) for one in holders if one.is_overdue(now))


async def nodes_and_time(client: Requests) -> tuple[list[UpgradableNode], datetime]:
    """Return the nodes, and the time by the manager's clock, because locks have times of managers' clocks."""
    nodes = await client.get("/nodes", timeout_s=RESPONSE_TIMEOUT_S)
    info = await client.get("/info", timeout_s=RESPONSE_TIMEOUT_S)
    return members_of(nodes), msgspec.convert(info["SystemTime"], datetime).astimezone(UTC)


async def require_unfrozen(client: Requests) -> None:
    """Check that neither a freeze of the cluster nor a closed window forbids maintenance.

    Raises: FailedPrecondition.
    """
    try:
        response = await client.get("/skep/cluster/freezes", timeout_s=RESPONSE_TIMEOUT_S)
    except (NotFound, PermissionDenied):  # an earlier version
        return
    found = msgspec.convert(response, FreezesResponse)
    freeze, window = found.freezes.get(CLUSTER), found.window
    why = freeze.words(CLUSTER) if freeze is not None else ""
    if not why and window is not None and window.closed_until:
        why = window.words()
    if why:
        raise FailedPrecondition(f"{why}. Wait, or use --override-freeze.")


async def settings_of(client: Requests) -> Mapping[str, Any]:
    """Return the cluster as ``GET /swarm`` shows it; users below administrator get it without join tokens."""
    try:
        swarm: Mapping[str, Any] = await client.get("/swarm", timeout_s=RESPONSE_TIMEOUT_S)
    except PermissionDenied:
        info = await client.get("/info", timeout_s=RESPONSE_TIMEOUT_S)
        found = info["Swarm"].get("Cluster")
        if not found:
            raise
        return dict(found)
    return swarm


async def holders_of(client: Requests) -> tuple[LockHolder, ...]:
    """Return the present holders of the lock."""
    swarm = await settings_of(client)
    return read((swarm["Spec"].get("Labels") or {}).get(MAINTENANCE, ""))


async def change(client: Requests, decide: Callable[[str], str]) -> None:
    """Replace the label's value by the result of ``decide``, which gets the present value.  Retry after a concurrent
    change.
    """

    async def decide_at_once(text: str) -> str:
        return decide(text)

    await _change(client, decide_at_once)


async def change_by_nodes(
    client: Requests, decide: Callable[[str, Sequence[UpgradableNode], datetime], str]
) -> None:
    """Call ``change`` with a ``decide`` that also gets the nodes and the time.  At each attempt, these are read after
    the value.
    """

    async def decide_by_nodes(text: str) -> str:
        members, now = await nodes_and_time(client)
        return decide(text, members, now)

    await _change(client, decide_by_nodes)


async def _change(client: Requests, decide: Callable[[str], Awaitable[str]]) -> None:
    for attempt in range(_ATTEMPTS):
        swarm: dict[str, Any] = await client.get("/swarm", timeout_s=RESPONSE_TIMEOUT_S)
        labels = dict(swarm["Spec"].get("Labels") or {})
        value = await decide(labels.pop(MAINTENANCE, ""))
        spec = {**swarm["Spec"], "Labels": labels | ({MAINTENANCE: value} if value else {})}
        try:
            version = str(swarm["Version"]["Index"])
            await client.post("/swarm/update", spec, timeout_s=RESPONSE_TIMEOUT_S, version=version)
            return
        except SkepError as error:
            is_race = isinstance(error, OutOfSequence) or "update out of sequence" in str(error)
            if not is_race or attempt == _ATTEMPTS - 1:
                raise
