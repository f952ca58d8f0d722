"""``skep upgrade``: upgrades Skep, or with ``--system`` the machines, one node after the other, drained by default.

The command stores in the cluster which node it is upgrading (``maintenance``).  So a second upgrade is refused while it
runs, and an interrupted one can be resumed or aborted.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, TypeVar

import click
import msgspec

from skep.api.client.client import ApiClient
from skep.api.client.requests import overriding
from skep.api.client.updates import update
from skep.api.client.waiting import persistently
from skep.cli.cluster.node import drain_and_wait
from skep.cli.endpoint import RESPONSE_TIMEOUT_S, HostOptions
from skep.cli.maintain import maintenance
from skep.cli.maintain.maintenance import LockHolder
from skep.cli.maintain.reboot_lock import whoami
from skep.cli.maintain.upgrade_means import Means
from skep.cli.maintain.upgrade_plan import (
    UpgradableNode,
    UpgradePlan,
    UpgradeStep,
    degraded_of,
    jobs_of,
    lines_of,
    plan,
    running_of,
)
from skep.cli.running import say
from skep.cli.start.up import INSTALLS_WITHIN_S
from skep.errors import FailedPrecondition, NotFound, SkepError, Unavailable
from skep.model.values.counts import counted
from skep.stack.progress import UP_TO_DATE

T = TypeVar("T")

_LEASE_S_MIN = 1800.0
"""The lock outlasts this command by this time if it is killed, so that someone can continue the upgrade first."""
_UNSET = datetime.max.replace(tzinfo=UTC)
_LOOK_S = 0.5
"""Seconds between two looks at a node that is drained or restarts, which takes seconds."""
_LEVEL_UNKNOWN = 4
"""Level of the last version that does not report its level."""


class _Upgrade:
    """One run of the command."""

    def __init__(
        self, client: ApiClient, means: Means, *, drains: bool, within_s: float, is_override: bool = True
    ) -> None:
        """``is_override``: continue in a freeze of the cluster that begins while the command runs."""
        self._client = client
        self._is_override = is_override
        self._means = means
        self._drains = drains
        self._within_s = within_s
        self.holder = LockHolder(
            node="",
            by=f"{whoami()}, process {os.getpid()}",
            until=_UNSET,
            is_upgrade=True,
            is_system=means.is_system,
        )
        self._spread: set[str] = set()
        self._visited: set[str] = set()
        """Nodes whose turn is over in this run."""
        self._is_held = False
        """Whether this run has taken the lock and not released it."""

    async def take(self, *, continues: bool) -> None:
        """Take the lock.  Raises: FailedPrecondition: another upgrade, or a node's reboot, has it."""
        members, now = await maintenance.nodes_and_time(self._client)
        former = await _upgrade_of(self._client)
        if former is not None:
            held = maintenance.described(former, members, now)
            if former.is_system != self.holder.is_system:
                way = "skep upgrade --system" if former.is_system else "skep upgrade without --system"
                raise FailedPrecondition(f"{held}. Run {way} --continue, or skep upgrade --abort.")
            if not continues and not former.is_overdue(now):
                raise FailedPrecondition(f"{held}. Use --continue to take over, or --abort to end it.")
            self.holder = msgspec.structs.replace(
                self.holder, node=former.node, availability=former.availability, boot=former.boot
            )
        await self.hold(former)

    async def hold(self, former: LockHolder | None = None, **changes: Any) -> None:
        """Renew the lock with ``changes`` of its contents, or take it over from ``former``.

        Raises: FailedPrecondition: another holder has the lock, perhaps because it took it over from this one, or a
            user has released it.
        """
        self.holder = msgspec.structs.replace(self.holder, **changes)

        def decide(text: str, members: Sequence[UpgradableNode], now: datetime) -> str:
            # The lock is renewed before a drain, and before an installation, which may be rolled back.
            lease = timedelta(seconds=max(_LEASE_S_MIN, 3 * self._within_s + 2 * INSTALLS_WITHIN_S))
            renewed = msgspec.structs.replace(self.holder, until=now + lease)
            holders = [one for one in maintenance.read(text) if one != former]
            taken = maintenance.taken(holders, renewed, members, now)
            if self._is_held and not any(maintenance.is_same(one, renewed) for one in holders):
                raise FailedPrecondition(
                    "The upgrade was aborted meanwhile. To continue it, rerun the command."
                )
            return maintenance.written(taken)

        await self._retry(lambda: maintenance.change_by_nodes(self._client, decide))
        self._is_held = True

    async def release(self) -> None:
        """Release the lock if this upgrade holds it."""

        def decide(text: str) -> str:
            holders = maintenance.read(text)
            return maintenance.written([one for one in holders if not maintenance.is_same(one, self.holder)])

        await self._retry(lambda: maintenance.change(self._client, decide))
        self._is_held = False

    async def end(self) -> None:
        """Activate a node that was not upgraded and release the lock, unless another upgrade holds it now.

        The node may have been drained after an abort, which activated it before.
        """
        holders = [
            one for one in await self._retry(lambda: maintenance.holders_of(self._client)) if one.is_upgrade
        ]
        if all(maintenance.is_same(one, self.holder) for one in holders):
            if self.holder.node and self.holder.availability:
                await self._restore_availability()
            await self.release()

    async def run(self) -> int:
        """Upgrade node after node, and return their number.

        Raises: FailedPrecondition: the next step is not permitted; Unavailable: a node did not become healthy.
        """
        count = 0
        if self.holder.boot and self._means.is_system:
            await (
                self._interrupted_is_back()
            )  # it may be rebooting, and nothing can be checked until it is back
        while True:
            step = await self._next()
            if self.holder.node and (step is None or step.node.id != self.holder.node):
                await self._finish_interrupted()
                continue
            if step is None:
                return count
            if self._means.is_system and not self._is_override and not self.holder.node:
                await maintenance.require_unfrozen(self._client)
            if spread := [name for name in step.spread if name not in self._spread]:
                await self._distribute(spread)
                self._spread.update(spread)
                continue
            count += await self._make(step)
            self._spread.clear()

    async def _next(self) -> UpgradeStep | None:
        """Return the next step.  If it is not permitted, wait, because tasks may still start elsewhere.

        Raises: FailedPrecondition: the step is still not permitted after the wait.
        """
        found = await self._plan()
        shown: tuple[str, ...] = ()
        try:
            async with asyncio.timeout(self._within_s):
                while found.refusals:
                    if found.refusals != shown:
                        shown = found.refusals
                        say(f"waiting up to {self._within_s:g} s: {'; '.join(shown)}")
                    await asyncio.sleep(_LOOK_S)
                    found = await self._plan()
        except TimeoutError:
            raise FailedPrecondition("\n".join(found.refusals)) from None
        return found.steps[0] if found.steps else None

    async def _plan(self) -> UpgradePlan:
        return await self._retry(
            lambda: plan_now(
                self._client,
                self._is_due,
                drains=self._drains,
                spread=self._spread,
                first=self.holder.node,
                can_keep=not self._means.is_system,
            )
        )

    def _is_due(self, node: UpgradableNode) -> bool:
        return node.id not in self._visited and self._means.is_due(node)

    @property
    def _repair(self) -> str:
        return f"Repair the node and {self._means.words.resume}, or use --abort."

    async def _make(self, step: UpgradeStep) -> bool:
        """Upgrade a node, and return whether it needed that."""
        node = step.node
        try:
            is_needed = await self._means.check(node)
        except Unavailable as error:
            if self.holder.node:
                raise Unavailable(f"{node.name}: {error}. {self._repair}") from error
            await self.release()
            raise Unavailable(
                f"{node.name} cannot be upgraded and is unchanged: {error}. Fix the problem and rerun the command."
            ) from error
        self._visited.add(node.id)
        # An interrupted run may have installed its packages, and nothing else would tell that the reboot is due.
        is_interrupted = node.id == self.holder.node and bool(node.boot) and node.boot == self.holder.boot
        if not is_needed and not (self._means.is_system and is_interrupted):
            await self._activate()
            return False
        drains = (
            step.drains and node.is_ready
        )  # the node of an interrupted upgrade may be down and have no tasks
        before = self.holder.availability or (node.availability if drains else "")
        await self.hold(node=node.id, availability=before, boot="")
        if drains:
            say(f"{node.name}: draining")
            try:
                # The check at the start of the upgrade covers its drains.
                client = overriding(self._client, is_override=True)
                await drain_and_wait(client, node.id, self._within_s * 3)
            except Unavailable:
                await self._activate()
                await self.release()
                raise
        supported = (await self._levels()).get(node.id, _LEVEL_UNKNOWN)
        for action in self._means.actions(node):
            await self.hold(boot=node.boot)
            say(f"{node.name}: {action.words}")
            try:
                await action.run()
            except Unavailable as error:
                raise Unavailable(await self._rolled_back(node, str(error), supported)) from error
        try:
            await self._comes_back(node, partial(self._means.is_done, node))
        except Unavailable as error:
            raise Unavailable(await self._rolled_back(node, str(error), supported)) from error
        await self._activate()
        say(f"{node.name}: {self._means.words.done}")
        return True

    async def _levels(self) -> Mapping[str, int]:
        """Return the level of data that each manager supports, by id, and the level of the cluster as ``""``.

        Returns nothing if no manager responds, or their version does not report it.
        """
        try:
            found = await self._client.get("/skep/cluster/level", timeout_s=RESPONSE_TIMEOUT_S)
        except SkepError:
            return {}
        return {**(found.get("Managers") or {}), "": found["Level"]}

    async def _rolled_back(self, node: UpgradableNode, reason: str, supported: int) -> str:
        """Roll the node back, and return the result as a sentence.

        Args:
            supported: the level of data that its former version can read.
        """
        text = f"{node.name} {self._means.words.failed}: {reason}"
        if not self._means.can_roll_back:
            return f"{text}. It stays drained. {self._repair}"
        # If no manager responds, none uses the data. A manager that never became ready has not raised the level.
        level = (await self._levels()).get("", supported)
        if node.is_manager and level > supported:
            return (
                f"{text}. It keeps {self._means.version}, because the cluster's data has level {level} and "
                f"{node.version} reads level {supported} at most. It stays drained. {self._repair}"
            )
        with suppress(Unavailable):  # if no manager responds, no other upgrade can have taken over
            await self.hold()
        say(f"{node.name}: not healthy, rolling back to {node.version}")
        try:
            await self._means.roll_back(node)
            await self._comes_back(node, lambda now: now.is_ready and now.version == node.version)
        except Unavailable as error:
            return f"{text}. The rollback to {node.version} failed: {error}. It stays drained. {self._repair}"
        await self._activate()
        await self.release()
        return f"{text}. It has {node.version} again, and the upgrade stops. Run journalctl -u skep on {node.name}."

    async def _comes_back(self, node: UpgradableNode, is_back: Callable[[UpgradableNode], bool]) -> None:
        """Wait until the node is healthy again by ``is_back``.  Raises: Unavailable."""
        seen = node
        try:
            async with asyncio.timeout(self._within_s):
                while True:
                    members, _ = await self._retry(lambda: maintenance.nodes_and_time(self._client))
                    seen = next((one for one in members if one.id == node.id), seen)
                    if is_back(seen):
                        return
                    await asyncio.sleep(_LOOK_S)
        except TimeoutError:
            state = "ready" if seen.is_ready else "not ready"
            if self._means.is_system and seen.is_ready:
                state = "ready but not rebooted,"
            raise Unavailable(f"after {self._within_s:g} s it is {state} with {seen.version}") from None

    async def _activate(self) -> None:
        if self.holder.node and self.holder.availability:
            await self._restore_availability()
        await self.hold(node="", availability="", boot="")

    async def _restore_availability(self) -> None:
        node, word = self.holder.node, self.holder.availability
        await self._retry(lambda: _set_availability(self._client, node, word))

    async def _finish_interrupted(self) -> None:
        """Finish the interrupted upgrade of a node that is not due.  Raises: Unavailable: it is not healthy."""
        await self._interrupted_is_back()
        await self._activate()

    async def _interrupted_is_back(self) -> None:
        """Wait until the node of an interrupted upgrade is healthy, if it still exists.  Raises: Unavailable."""
        members, _ = await self._retry(lambda: maintenance.nodes_and_time(self._client))
        node = next((one for one in members if one.id == self.holder.node), None)
        if node is None:
            await self.hold(node="", availability="", boot="")
            return
        try:
            await self._comes_back(node, self._means.is_healthy)
        except Unavailable as error:
            text = f"the interrupted upgrade of {node.name} did not succeed: {error}"
            raise Unavailable(f"{text}. {self._repair}") from error

    async def _distribute(self, names: Sequence[str]) -> None:
        """Force updates of services, by their own policy, so that the scheduler spreads tasks after a drain."""
        client = overriding(self._client, is_override=True)  # as for drains
        for name in names:
            say(f"{name}: redistributing its tasks")
            await update(client, "services", name, _forced, timeout_s=RESPONSE_TIMEOUT_S)
        try:
            async with asyncio.timeout(self._within_s):
                left = list(names)
                while left:
                    left = [
                        one for one in left if not await self._retry(partial(_is_updated, self._client, one))
                    ]
                    await asyncio.sleep(_LOOK_S)
        except TimeoutError:
            raise Unavailable(
                f"{', '.join(names)}: not redistributed within {self._within_s:g} s. Run skep explain {names[0]}."
            ) from None

    async def _retry(self, request: Callable[[], Awaitable[T]]) -> T:
        """Repeat a request while the manager restarts.  Raises: Unavailable: no response in time."""
        try:
            async with asyncio.timeout(self._within_s):
                return await persistently(request, say)
        except TimeoutError:
            raise Unavailable(
                f"no manager has responded for {self._within_s:g} s. Run skep status on another manager."
            ) from None


async def plan_now(
    client: ApiClient,
    is_due: Callable[[UpgradableNode], bool],
    *,
    drains: bool,
    spread: Iterable[str] = (),
    first: str = "",
    can_keep: bool = True,
) -> UpgradePlan:
    """Return the plan for the present state of the cluster."""
    members, _ = await maintenance.nodes_and_time(client)
    services = await client.get("/services", timeout_s=RESPONSE_TIMEOUT_S, status="true", health="true")
    filters = {"desired-state": ["running", "complete"]}  # the tasks of jobs are to complete
    tasks = await client.get("/tasks", filters=filters, timeout_s=RESPONSE_TIMEOUT_S)
    return plan(
        members,
        running_of(services, tasks),
        is_due,
        drains=drains,
        spread=spread,
        first=first,
        degraded=degraded_of(services),
        jobs=jobs_of(services, tasks),
        can_keep=can_keep,
    )


async def _set_availability(client: ApiClient, node: str, word: str) -> None:
    with suppress(NotFound):  # it was removed meanwhile
        await update(
            client,
            "nodes",
            node,
            lambda found: found["Spec"] | {"Availability": word},
            timeout_s=RESPONSE_TIMEOUT_S,
        )


def _forced(service: Mapping[str, Any]) -> Mapping[str, Any]:
    spec: dict[str, Any] = service["Spec"]
    task = spec["TaskTemplate"]
    return spec | {"TaskTemplate": task | {"ForceUpdate": task.get("ForceUpdate", 0) + 1}}


async def _is_updated(client: ApiClient, name: str) -> bool:
    service = await client.get(f"/services/{name}", timeout_s=RESPONSE_TIMEOUT_S)
    state = (service.get("UpdateStatus") or {}).get("State")
    if state is None:  # the leader has not begun the update, or has nothing to replace
        filters = {"service": [service["ID"]], "desired-state": ["running"]}
        tasks = await client.get("/tasks", filters=filters, timeout_s=RESPONSE_TIMEOUT_S)
        present = await client.get("/tasks", filters={**filters, **UP_TO_DATE}, timeout_s=RESPONSE_TIMEOUT_S)
        state = "completed" if {one["ID"] for one in tasks} <= {one["ID"] for one in present} else "updating"
    if state not in ("updating", "completed"):
        raise FailedPrecondition(
            f"{name} could not be redistributed, because its update is {state}. Run skep explain {name}."
        )
    return bool(state == "completed")


async def carry_out(
    host: HostOptions,
    means: Means,
    *,
    drains: bool,
    within_s: float,
    continues: bool,
    is_override: bool = False,
) -> None:
    """Upgrade all nodes.

    Raises: FailedPrecondition: a step is not permitted; Unavailable: a node did not become healthy.
    """
    async with host.client() as client:
        if not is_override:
            await maintenance.require_unfrozen(client)
        run = _Upgrade(client, means, drains=drains, within_s=within_s, is_override=is_override)
        await run.take(continues=continues)
        try:
            count = await run.run()
        except FailedPrecondition:
            await run.end()
            raise
        except asyncio.CancelledError:
            say("Interrupted. Rerun the command with --continue, or run skep upgrade --abort.")
            raise
        await run.release()
    rest = "" if count else ": no node needs it"
    click.echo(f"{counted(count, 'node')} {means.words.done}{rest}")


async def show_plan(host: HostOptions, means: Means, *, drains: bool) -> int:
    """Print the steps and the reasons that forbid them, and return the exit code."""
    async with host.client() as client:
        found = await plan_now(client, means.is_due, drains=drains, can_keep=not means.is_system)
        members, now = await maintenance.nodes_and_time(client)
        held = [maintenance.described(one, members, now) for one in await maintenance.holders_of(client)]
    for line in lines_of(found, means.step_words):
        click.echo(line)
    for reason in (*held, *found.refusals):
        click.echo(f"blocked: {reason}", err=True)
    return 2 if held or found.refusals else 0


async def abort(host: HostOptions) -> None:
    async with host.client() as client:
        former = await _upgrade_of(client)
        if former is None:
            raise FailedPrecondition("No upgrade is running. Run skep reboot-lock status.")
        while former is not None:  # an upgrade that still runs may have drained another node meanwhile
            if former.node and former.availability:
                await _set_availability(client, former.node, former.availability)
            await maintenance.change(client, partial(_without, former))
            former = await _upgrade_of(client)
    click.echo(
        "The upgrade is aborted. Nodes keep their present versions. Run skep version --all to see them."
    )


async def _upgrade_of(client: ApiClient) -> LockHolder | None:
    return next((one for one in await maintenance.holders_of(client) if one.is_upgrade), None)


def _without(holder: LockHolder, text: str) -> str:
    """Return the lock without ``holder``, unless it has changed."""
    return maintenance.written([one for one in maintenance.read(text) if one != holder])
