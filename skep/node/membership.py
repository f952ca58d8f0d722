"""This node's part in a swarm: coming in (init, join), taking part, going out (leave), and telling about it.

A node is in a swarm when ``node.json`` says so.  It is the last thing written on the way in and the first removed on
the way out, so whatever else is found without it belongs to an unfinished init or leave and is removed at the next
start.

Source: moby, daemon/cluster/{swarm,cluster,noderunner}.go (the order of the checks, the words).
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from skep.aio.clock import Clock
from skep.aio.first import wait_first
from skep.aio.groups import first_alone
from skep.aio.guard import explain, persist
from skep.api.backups import Manifest, RestorePlan
from skep.api.swarm_requests import Endpoints, founding, joining
from skep.errors import AlreadyExists, SkepError, Unavailable
from skep.model.ids import IdSource, NodeId
from skep.model.node import NodeRole
from skep.model.swarm import InitRequest, JoinRequest, UnlockRequest
from skep.node.founding import (
    NewCluster,
    check_listening,
    check_settings,
    check_space,
    found,
    moved,
)
from skep.node.interfaces import read_interfaces
from skep.node.leaving import objection
from skep.node.local import LocalNode, Peer, read_local_node, write_local_node
from skep.node.local_api import LocalApi
from skep.node.participation import Participation, Parts
from skep.node.restoring import Restored, endpoints_for, plan_of, received, restored_node
from skep.node.supervision.zygote import ZygoteGone
from skep.node.swarm_info import (
    IN_A_SWARM,
    LEAVING_LOCKED,
    LOCKED,
    NO_SWARM,
    NOT_A_MANAGER,
    NOT_IN_A_SWARM,
    TIMED_OUT,
    cluster_section,
    local_section,
    wait_ready,
    why_no_vote,
    why_waiting,
)
from skep.node.traces import clear_unfinished, forget_swarm
from skep.paths import Paths
from skep.security import keypair
from skep.security.keypair import KeyPair
from skep.security.locking import KeyLock, parsed_unlock_key

log = structlog.get_logger()

_FOUNDING_TIMEOUT_S = 60.0
_JOIN_TIMEOUT_S = 20.0
"""Docker's swarmConnectTimeout."""
_MARK_LOOK_S = 0.2


class Membership:
    """This node's place in a swarm, or outside of any."""

    def __init__(
        self,
        *,
        paths: Paths,
        parts: Parts,
        manager_api: LocalApi,
        clock: Clock,
        new_id: IdSource,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """``say``: told why what this node knows of its swarm cannot be used now; an empty text when it can."""
        self._paths = paths
        self._parts = parts
        self._manager_api = manager_api
        self._clock = clock
        self._new_id = new_id
        self._lock = KeyLock(paths)
        self._control = asyncio.Lock()
        self._group: asyncio.TaskGroup | None = None
        self._taking_part: asyncio.Task[None] | None = None
        self._part: Participation | None = None
        self._locked: LocalNode | None = None  # while it waits for the unlock key
        self._say = say
        self._unread = ""  # why nobody knows whether this node is in a swarm
        self._hindrance = ""
        """What kept the last new manager from its vote; empty: nothing is known."""

    async def run(self) -> None:
        """Take part in the swarm that the data directory says, until cancelled.

        What cannot be read of it is tried again; meanwhile this node takes no part in any, and says why.
        """
        async with asyncio.TaskGroup() as group:
            self._group = group
            await persist(
                self._resume,
                "not taking part in the swarm",
                clock=self._clock,
                longest_s=10.0,
                on_error=lambda error: self._note_unread(explain(error)),
                passes=(ZygoteGone,),
            )
            await asyncio.Event().wait()

    async def _resume(self) -> None:
        async with self._control:
            if self.node is not None:
                return  # a user was faster
            node = read_local_node(self._paths.node_json)
            if node is not None and node.is_manager and self._lock.is_locked:
                log.warning("locked: docker swarm unlock")
                self._locked = node
            elif node is not None:
                self._begin(await self._placed(node))
            else:
                await clear_unfinished(self._paths, self._parts)
                await self._parts.manager_stands_by(True)
            self._note_unread("")

    def _note_unread(self, why: str) -> None:
        self._unread = why
        self._say(f"this node does not take part in its swarm: {why}" if why else "")

    def _require_outside(self) -> None:
        """Raises: Unavailable: this node is in a swarm, or may be."""
        if self.node is not None:
            raise Unavailable(IN_A_SWARM)
        if self._unread:
            raise Unavailable(self._unread)

    # --- the swarm routes -------------------------------------------------------------------------------------

    async def init(self, request: InitRequest) -> NodeId:
        """Found a cluster; returns when its manager serves and this node is ready in it.

        A manager that is told to force one goes on alone with the cluster it has (``manager.recovery``).
        Raises: Unavailable: this node is in a swarm already; what ``founding`` raises; SkepError.
        """
        async with self._control:
            if self.node is not None and request.force_new_cluster:
                return await self._go_on_alone(self.node, request)
            self._require_outside()
            plan = founding(request, await read_interfaces())
            check_settings(plan.spec)
            self._parts.manager_files.check_ports(plan.endpoints.listen_addr)
            await asyncio.to_thread(check_space, self._paths.data)
            node, pair, root_key_pem = await asyncio.to_thread(found, plan, self._new_id)
            new = NewCluster(plan=plan, root_key_pem=root_key_pem)
            write_files = partial(self._parts.manager_files.write_new, node, new)
            await self._settle(node, pair, write_files, _FOUNDING_TIMEOUT_S)
            log.info("swarm founded", node=node.node_id, cluster=node.cluster_id)
            return node.node_id

    async def _go_on_alone(self, node: LocalNode, request: InitRequest) -> NodeId:
        """Have this node's manager make a new cluster of what it has.  Tasks are left alone.

        Raises: Unavailable: this node is no manager, or locked; what ``founding`` raises; SkepError: the manager does
        not come up, and nothing of it was removed.
        """
        if self.is_locked:
            raise Unavailable(LOCKED)
        if not node.is_manager:
            raise Unavailable(NOT_A_MANAGER)
        before = node
        if request.advertise_addr:
            node = moved(node, founding(request, await read_interfaces()).endpoints)
        await self._stop()
        try:
            check_listening(node.listen_addr)
            await asyncio.to_thread(self._parts.manager_files.write_recovery, node)
            await asyncio.to_thread(write_local_node, self._paths.node_json, node)
        except BaseException:
            self._begin(before)
            raise
        await self._come_in(node, _FOUNDING_TIMEOUT_S)
        await self._wait_ready(node, _FOUNDING_TIMEOUT_S)
        log.warning("swarm goes on with this manager alone", node=node.node_id, cluster=node.cluster_id)
        return node.node_id

    async def restore(
        self, pieces: AsyncIterator[bytes], key: bytes, advertise_addr: str, *, is_dry: bool
    ) -> RestorePlan:
        """Take the place of the manager that made a backup, alone; ``is_dry``: only look at the backup.

        Args:
            advertise_addr: empty: the backup's if this machine has it, else this machine's only address.

        Raises: Unavailable: this node is in a swarm already; InvalidArgument: the backup, the key or the address;
        SkepError: the manager does not come up, and nothing of it was kept.
        """
        async with self._control:
            self._require_outside()
            snapshot = self._paths.data / "restore.snapshot"
            try:
                manifest = await received(pieces, key, snapshot)
                endpoints = endpoints_for(manifest, advertise_addr, await read_interfaces())
                if not is_dry:
                    await self._take_place(manifest, endpoints, snapshot)
            finally:
                snapshot.unlink(missing_ok=True)
            return plan_of(manifest, endpoints.advertise_addr, is_done=not is_dry)

    async def _take_place(self, manifest: Manifest, endpoints: Endpoints, snapshot: Path) -> None:
        self._parts.manager_files.check_ports(endpoints.listen_addr)
        await asyncio.to_thread(check_space, self._paths.data)
        node, pair = await asyncio.to_thread(restored_node, manifest, endpoints)
        restored = Restored(
            node=node, wrapping_key=manifest.wrapping_key, snapshot=snapshot, hostname=manifest.hostname
        )
        write_files = partial(self._parts.manager_files.write_restored, restored)
        await self._settle(node, pair, write_files, _FOUNDING_TIMEOUT_S)
        log.warning("swarm restored", node=node.node_id, cluster=node.cluster_id)

    async def join(self, request: JoinRequest) -> None:
        """Come into a cluster as the token says; returns when a manager took this node's session.

        Raises: Unavailable, InvalidArgument, Unimplemented: in Docker's words.
        """
        async with self._control:
            self._require_outside()
            plan = joining(request, await read_interfaces())
            pair = await self._parts.request_certificate(plan)
            is_manager = pair.identity.role is NodeRole.MANAGER
            if is_manager:
                self._parts.manager_files.check_ports(plan.endpoints.listen_addr)
                await asyncio.to_thread(check_space, self._paths.data)
            node = LocalNode(
                node_id=pair.identity.node_id,
                cluster_id=pair.identity.cluster_id,
                is_manager=is_manager,
                listen_addr=plan.endpoints.listen_addr,
                advertise_addr=plan.endpoints.advertise_addr,
                local_addr=plan.endpoints.local_addr,
                data_path_addr=plan.endpoints.data_path_addr,
                managers=tuple(Peer(NodeId(""), remote) for remote in plan.remote_addrs),
            )
            write_files = partial(self._parts.manager_files.write_new, node, None)
            await self._settle(node, pair, write_files, _JOIN_TIMEOUT_S)
            log.info("swarm joined", node=node.node_id, cluster=node.cluster_id)

    async def leave(self, *, force: bool) -> None:
        """Go out of the swarm: stop its tasks, its agent, its manager; forget everything about it.

        Raises: Unavailable: not in a swarm, or a manager without ``force``.
        """
        async with self._control:
            if self.node is None and not (self._unread and force):
                raise Unavailable(self._unread or NO_SWARM)
            if self.is_locked and not force:
                raise Unavailable(LEAVING_LOCKED)
            if self.is_manager and not force:
                raise Unavailable(await objection(self._manager_api))
            if self.is_manager and self._part is not None:
                await self._parts.resign(self._part.other_managers)
            await self._parts.give_places_back()
            self._paths.node_json.unlink(missing_ok=True)
            await self._end()
            self._note_unread("")
            log.info("swarm left")

    async def unlock(self, request: UnlockRequest) -> None:
        """Open what autolock has locked; returns when this node takes part again, or after 20 s in which it tried to.

        Raises: Unavailable: this node is no manager, or has trouble to take part again; AlreadyExists: it is not
        locked; InvalidArgument, WrongUnlockKey: the key; all in Docker's words.
        """
        async with self._control:
            if not self.is_locked:
                if (reason := self.manager_refusal()) is not None:
                    raise Unavailable(reason)
                raise AlreadyExists("swarm is not locked")
            assert self.node is not None, "locked"
            key = parsed_unlock_key(request.unlock_key)
            await asyncio.to_thread(self._lock.unlock, key)
            log.info("unlocked")
            taking_part = self._begin(await self._placed(self.node))
            with suppress(TimeoutError):
                async with asyncio.timeout(_JOIN_TIMEOUT_S):
                    await self._wait_registered_or(taking_part)
            if self._trouble:
                raise Unavailable(f"swarm component could not be started: {self._trouble}")

    def reload(self) -> None:
        """Have the manager of this node, if there is one, read its settings again."""
        if self._part is not None:
            self._part.reload()

    def manager_refusal(self) -> str | None:
        """Why no manager of this node answers, in Docker's words; None: one does, or will in a moment."""
        if self.node is None:
            return NOT_IN_A_SWARM
        if not self.node.is_manager or (self._part is not None and self._part.is_removed):
            return NOT_A_MANAGER
        if self.is_locked:
            return LOCKED
        if self._part is not None and (trouble := self._part.manager_trouble()):
            return f"This node is not a swarm manager. {trouble}"
        return None

    @property
    def node(self) -> LocalNode | None:
        """What this node is in its swarm; None outside of any."""
        return self._part.node if self._part is not None else self._locked

    @property
    def is_in_swarm(self) -> bool:
        return self.node is not None

    @property
    def is_manager(self) -> bool:
        return self.node is not None and self.node.is_manager

    @property
    def is_locked(self) -> bool:
        """Whether this node waits for the unlock key."""
        return self._locked is not None

    @property
    def status(self) -> str:
        """``inactive``, ``locked``, ``pending``, ``active`` or ``error``, as ``LocalNodeState`` of ``/info``."""
        if self.node is None:
            return "error" if self._unread else "inactive"
        if self.is_locked:
            return "locked"
        if self._trouble:
            return "error"
        return "active" if self._part is not None and self._part.is_active else "pending"

    @property
    def header(self) -> str:
        """The ``Swarm`` header of ``/_ping``: ``active/manager``, ``inactive``."""
        role = "manager" if self.is_manager else "worker"
        return f"active/{role}" if self.status == "active" else self.status

    async def info(self) -> dict[str, Any]:
        """The ``Swarm`` section of ``/info``."""
        if self.is_locked:
            return local_section(None, status=self.status, trouble=LOCKED, managers=())
        managers = self._part.managers if self._part is not None else ()
        section = local_section(self.node, status=self.status, trouble=self._trouble, managers=managers)
        if waits_for := why_waiting(self._paths.manager_waiting):
            section |= {"ControlAvailable": True, "Error": waits_for}
        elif self.is_manager and not self._trouble:
            section |= await cluster_section(self._manager_api)
        if (
            self.node is not None
            and self.is_manager
            and (peer := self._parts.manager_files.peer_section(self.node))
        ):
            warnings = [*section.get("Warnings", ()), *peer.pop("Warnings", ())]
            section |= peer | ({"Warnings": warnings} if warnings else {})
        return section

    # --- within -----------------------------------------------------------------------------------------------

    @property
    def _trouble(self) -> str:
        return self._part.trouble if self._part is not None else self._unread

    async def _settle(
        self, node: LocalNode, pair: KeyPair, write_files: Callable[[], None], timeout_s: float
    ) -> None:
        """Take ``node``'s place in the cluster; on failure nothing of it is kept.

        ``write_files``: writes what its manager reads, if it is to have one.
        """
        self._hindrance = ""
        try:
            await asyncio.to_thread(keypair.save, pair, self._paths.certificates)
            if node.is_manager:
                await asyncio.to_thread(write_files)
            await self._come_in(node, timeout_s)
            if node.is_manager:
                await self._wait_ready(node, timeout_s)
            await asyncio.to_thread(write_local_node, self._paths.node_json, self.node or node)
        except BaseException:
            if node.is_manager and self._part is not None:
                # a place kept here keeps the next one out
                await self._parts.resign(self._part.other_managers)
            await self._end()
            raise

    async def _come_in(self, node: LocalNode, timeout_s: float) -> None:
        """Begin to take part; returns with the first session.  Raises: SkepError: it does not come to one."""
        taking_part = self._begin(node)
        try:
            async with asyncio.timeout(timeout_s):
                await self._noting_hindrances(self._wait_registered_or(taking_part))
        except TimeoutError as error:
            raise Unavailable(self._trouble or self._why_late()) from error
        if self._trouble:
            raise Unavailable(self._trouble)

    def _why_late(self) -> str:
        """What a join is refused with that did not come about in time."""
        return f"Timeout was reached before node joined: {self._hindrance}" if self._hindrance else TIMED_OUT

    async def _noting_hindrances(self, waiting: Coroutine[Any, Any, None]) -> None:
        """``waiting``, and meanwhile what keeps a new manager from its vote; its mark goes with each attempt."""

        async def note() -> None:
            while True:
                self._hindrance = why_no_vote(self._paths.joining_mark) or self._hindrance
                await self._clock.sleep(_MARK_LOOK_S)

        with first_alone(SkepError):
            async with asyncio.TaskGroup() as group:
                noting = group.create_task(note(), name="hindrances")
                try:
                    await waiting
                finally:
                    noting.cancel()

    async def _wait_registered_or(self, taking_part: asyncio.Task[None]) -> None:
        """Return with the first session, or when there will be none."""
        assert self._part is not None, "begun before"
        await wait_first(self._part.wait_settled(), asyncio.wait((taking_part,)))

    async def _wait_ready(self, node: LocalNode, timeout_s: float) -> None:
        """Return when the manager shows this node as ready."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._noting_hindrances(wait_ready(self._manager_api, node.node_id, self._clock))
        except TimeoutError as error:
            raise Unavailable(self._trouble or self._why_late()) from error

    async def _placed(self, node: LocalNode) -> LocalNode:
        """The node where its configuration says that it is now: its address may have changed while it was off."""
        placed = await self._parts.placed(node)
        if placed != node:
            log.info("this node has moved", before=node.advertise_addr, now=placed.advertise_addr)
            await asyncio.to_thread(write_local_node, self._paths.node_json, placed)
        return placed

    def _begin(self, node: LocalNode) -> asyncio.Task[None]:
        assert self._group is not None, "used outside of run()"
        self._locked = None
        self._part = Participation(node, self._parts, self._paths, self._clock)
        self._taking_part = self._group.create_task(self._part.run(), name="swarm")
        return self._taking_part

    async def _stop(self) -> None:
        """Stop manager and agent; tasks run on."""
        if self._taking_part is not None and self._part is not None:
            self._part.dismiss()
            self._taking_part.cancel()
            await asyncio.wait([self._taking_part])
        self._taking_part = None

    async def _end(self) -> None:
        """Stop taking part and remove every trace of the swarm."""
        await self._stop()
        self._part = self._locked = None
        await self._parts.remove_tasks()
        await forget_swarm(self._paths)
        await self._parts.manager_stands_by(True)
