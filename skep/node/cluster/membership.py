"""This node's membership of a cluster: init, join, restore, unlock, leave, and the cluster's section of ``/info``.

A node is a member when ``node.json`` exists.  The file is written last when joining and removed first when leaving.
Files found without it belong to an unfinished init, join or leave, and are removed at the next start.  The states and
their transitions are in ``membership_states``.

Source: moby, daemon/cluster/{swarm,cluster,noderunner}.go (order of the checks, error texts).
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import structlog

from skep.agent.certificates import join
from skep.agent.session.managers import KnownManager
from skep.aio.failures import describe_error, retry
from skep.aio.groups import first_alone
from skep.aio.race import wait_first
from skep.api.backups import BackupManifest, RestorePlan
from skep.api.client.client import ApiClient
from skep.api.errors import Untranslated
from skep.api.formats.swarm_requests import Endpoints, Joining, advertised, founding, joining
from skep.errors import AlreadyExists, InvalidArgument, SkepError, Unavailable
from skep.model.networks.addresses import host_of
from skep.model.node import NodeRole
from skep.model.swarm import InitRequest, JoinRequest, UnlockRequest
from skep.model.values.ids import IdSource, NodeId
from skep.node.cluster.founding import (
    NewCluster,
    check_listening,
    check_settings,
    check_space,
    found,
    moved,
)
from skep.node.cluster.leaving import (
    clear_former,
    clear_unfinished,
    forget_swarm,
    leave_manager_group,
    objection,
)
from skep.node.cluster.local import LocalNode, read_local_node, write_local_node
from skep.node.cluster.membership_states import MembershipEvent, MembershipState, after, docker_state
from skep.node.cluster.restoring import RestoredData, endpoints_for, plan_of, receive, restored_node
from skep.node.cluster.runner import Dependencies, NodeRunner
from skep.node.cluster.swarm_info import (
    IN_A_SWARM,
    LEAVING_LOCKED,
    LOCKED,
    NO_SWARM,
    NOT_A_MANAGER,
    NOT_IN_A_SWARM,
    TIMED_OUT,
    cluster_section,
    local_section,
    quorum_lost_at,
    wait_ready,
    why_no_vote,
    why_waiting,
)
from skep.node.host.machine import read_interfaces
from skep.node.supervision.zygote import ZygoteGone
from skep.security import keypair
from skep.security.keypair import KeyPair
from skep.security.locking import KeyLock, parsed_unlock_key

log = structlog.get_logger()

_FOUNDING_TIMEOUT_S = 60.0
"""Time limit in seconds for ``init``.  Long, because etcd may be on a slow disk."""
_JOIN_TIMEOUT_S = 20.0
"""Time limit in seconds for ``join``, Docker's swarmConnectTimeout."""
_MARK_POLL_S = 0.2
"""Seconds between checks for a file that the manager process writes."""
_LOOK_S = 2.0
"""Time limit in seconds for reading the machine before the first session.

Later descriptions include parts that took longer.
"""


class Membership:
    """Membership of this node in a cluster.  One request at a time changes it.

    Args:
        manager_api: API of this node's manager.
        show_condition: Called with the reason if ``node.json`` cannot be used, and with an empty text once it can.
    """

    def __init__(
        self,
        dependencies: Dependencies,
        *,
        manager_api: ApiClient,
        new_id: IdSource,
        show_condition: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._dependencies = dependencies
        self._paths = dependencies.paths
        self._clock = dependencies.clock
        self._manager_api = manager_api
        self._new_id = new_id
        self._show_condition = show_condition
        self._lock = KeyLock(dependencies.paths)
        self._control = asyncio.Lock()
        self._group: asyncio.TaskGroup | None = None
        self._state = MembershipState.STARTING
        self._runner: NodeRunner | None = None
        self._running: asyncio.Task[None] | None = None
        """The task of the runner, until it is stopped."""
        self._locked_node: LocalNode | None = None
        self._read_error = ""
        """Reason why ``node.json`` cannot be used, or empty."""
        self._no_vote_reason = ""
        """Reason why the last new manager did not get a vote in time, or empty if unknown."""

    def _apply(self, event: MembershipEvent) -> None:
        self._state = after(self._state, event)

    async def run(self) -> None:
        """Take part in the cluster that the data directory names, until cancelled.

        An unreadable ``node.json`` is retried with growing pauses.  Meanwhile the node is in no cluster.
        """
        async with asyncio.TaskGroup() as group:
            self._group = group
            await retry(
                self._resume,
                "not taking part in the swarm",
                clock=self._clock,
                longest_s=10.0,
                on_error=lambda error: self._note_unreadable(describe_error(error)),
                passes=(ZygoteGone,),
            )
            await asyncio.Event().wait()

    async def _resume(self) -> None:
        async with self._control:
            if self.node is not None:
                return  # a request came first
            node = read_local_node(self._paths.node_json)
            if node is not None and node.is_manager and self._lock.is_locked:
                log.warning("manager is locked, run docker swarm unlock")
                self._locked_node = node
                self._apply(MembershipEvent.LOADED_LOCKED)
            elif node is not None:
                node = await self._with_present_address(node)
                self._start(node)
                self._apply(MembershipEvent.LOADED)
            else:
                await clear_unfinished(self._paths, self._dependencies.work)
                await self._dependencies.processes.keep_spare_manager(True)
                self._apply(MembershipEvent.NO_FILE)
            self._clear_read_error()

    def _note_unreadable(self, why: str) -> None:
        self._apply(MembershipEvent.READ_FAILED)
        self._read_error = why
        self._show_condition(f"this node does not take part in its swarm: {why}")

    def _clear_read_error(self) -> None:
        self._read_error = ""
        self._show_condition("")

    def _require_outside(self) -> None:
        """Check that this node is in no cluster.  Raises: Unavailable: it is a member, or may be one."""
        if self.node is not None:
            raise Unavailable(IN_A_SWARM)
        if self._read_error:
            raise Unavailable(self._read_error)

    # --- the swarm routes -------------------------------------------------------------------------------------

    async def init(self, request: InitRequest) -> NodeId:
        """Create a cluster.  Returns when its manager serves and this node is ready in it.

        With ``force_new_cluster``, a manager continues its present cluster alone (``manager.storage.recovery``).
        Raises: Unavailable: this node is in a swarm already; the errors of ``founding``; SkepError.
        """
        async with self._control:
            if self.node is not None and request.force_new_cluster:
                return await self._recover(self.node, request)
            self._require_outside()
            plan = founding(request, await read_interfaces())
            check_settings(plan.spec)
            self._dependencies.manager_files.check_ports(plan.endpoints.listen_addr)
            await asyncio.to_thread(check_space, self._paths.data)
            node, pair, root_key_pem = await asyncio.to_thread(found, plan, self._new_id)
            new = NewCluster(plan=plan, root_key_pem=root_key_pem)
            write_files = partial(self._dependencies.manager_files.write_new, node, new)
            await self.enter(node, pair, write_files, _FOUNDING_TIMEOUT_S)
            log.info("swarm founded", node=node.node_id, cluster=node.cluster_id)
            return node.node_id

    async def _recover(self, node: LocalNode, request: InitRequest) -> NodeId:
        """Restart this node's manager as the only manager of its cluster, with its own data.  Tasks keep running.

        Raises: Unavailable: this node is not a manager, or is locked; the errors of ``founding``; SkepError: the
        manager does not start.  Its data is kept.
        """
        if self.is_locked:
            raise Unavailable(LOCKED)
        if not node.is_manager:
            raise Unavailable(NOT_A_MANAGER)
        before = node
        if request.advertise_addr:
            node = moved(node, founding(request, await read_interfaces()).endpoints)
        lost_at = await quorum_lost_at(self._manager_api)
        self._apply(MembershipEvent.RECOVER)
        try:
            await self._stop()
            check_listening(node.listen_addr)
            await asyncio.to_thread(self._dependencies.manager_files.write_recovery, node, lost_at)
            await asyncio.to_thread(write_local_node, self._paths.node_json, node)
        except BaseException:
            node = before
            raise
        finally:
            self._apply(MembershipEvent.RESTARTED)
            self._start(node)
        await self._wait_session(_FOUNDING_TIMEOUT_S)
        await self._wait_ready(node, _FOUNDING_TIMEOUT_S)
        log.warning("swarm continues with this manager alone", node=node.node_id, cluster=node.cluster_id)
        return node.node_id

    async def restore(
        self, pieces: AsyncIterator[bytes], key: bytes, advertise_addr: str, *, is_dry: bool
    ) -> RestorePlan:
        """Become the manager that made a backup, as the only manager of its cluster.

        With ``is_dry``, only read the backup and check that this node can become that manager.

        Args:
            advertise_addr: The address of the manager.  If empty, the address in the backup if this machine has it,
                else this machine's only address.

        Raises:
            Unavailable: This node is in a swarm already.
            InvalidArgument: The backup, the key or the address is wrong.
            SkepError: The manager does not start.  Everything that was restored is removed.
        """
        async with self._control:
            self._require_outside()
            snapshot = self._paths.data / "restore.snapshot"
            try:
                manifest = await receive(pieces, key, snapshot)
                endpoints = endpoints_for(manifest, advertise_addr, await read_interfaces())
                self._dependencies.manager_files.check_ports(endpoints.listen_addr)
                await asyncio.to_thread(check_space, self._paths.data)
                if not is_dry:
                    await self._enter_restored(manifest, endpoints, snapshot)
            finally:
                snapshot.unlink(missing_ok=True)
            return plan_of(manifest, endpoints.advertise_addr, is_done=not is_dry)

    async def _enter_restored(self, manifest: BackupManifest, endpoints: Endpoints, snapshot: Path) -> None:
        node, pair = await asyncio.to_thread(restored_node, manifest, endpoints)
        restored = RestoredData(
            node=node, wrapping_key=manifest.wrapping_key, snapshot=snapshot, hostname=manifest.hostname
        )
        write_files = partial(self._dependencies.manager_files.write_restored, restored)
        await self.enter(node, pair, write_files, _FOUNDING_TIMEOUT_S)
        log.warning("swarm restored", node=node.node_id, cluster=node.cluster_id)

    async def join(self, request: JoinRequest) -> None:
        """Join a cluster in the token's role.  Returns when a manager has accepted this node's session.

        Raises: Unavailable, InvalidArgument, Unimplemented: in Docker's words.
        """
        async with self._control:
            self._require_outside()
            plan = joining(request, await read_interfaces())
            pair = await self._request_certificate(plan)
            is_manager = pair.identity.role is NodeRole.MANAGER
            if is_manager:
                self._dependencies.manager_files.check_ports(plan.endpoints.listen_addr)
                await asyncio.to_thread(check_space, self._paths.data)
            node = LocalNode(
                node_id=pair.identity.node_id,
                cluster_id=pair.identity.cluster_id,
                is_manager=is_manager,
                listen_addr=plan.endpoints.listen_addr,
                advertise_addr=plan.endpoints.advertise_addr,
                local_addr=plan.endpoints.local_addr,
                data_path_addr=plan.endpoints.data_path_addr,
                managers=tuple(KnownManager(NodeId(""), remote) for remote in plan.remote_addrs),
            )
            write_files = partial(self._dependencies.manager_files.write_new, node, None)
            await self.enter(node, pair, write_files, _JOIN_TIMEOUT_S)
            log.info("swarm joined", node=node.node_id, cluster=node.cluster_id)

    async def leave(self, *, force: bool) -> None:
        """Leave the cluster: stop tasks, agent and manager, and remove the cluster's data.

        Raises: Unavailable: this node is not in a swarm, or is a manager and ``force`` is False.
        """
        async with self._control:
            if self.node is None and not (self._read_error and force):
                raise Unavailable(self._read_error or NO_SWARM)
            if self.is_locked and not force:
                raise Unavailable(LEAVING_LOCKED)
            if self.is_manager and not force:
                raise Unavailable(await objection(self._manager_api))
            if self.is_manager and self._runner is not None:
                await self._leave_manager_group(self._runner)
            await self._dependencies.work.release_attachments()
            self._paths.node_json.unlink(missing_ok=True)
            self._apply(MembershipEvent.LEAVE)
            await self._end()
            self._clear_read_error()
            log.info("swarm left")

    async def unlock(self, request: UnlockRequest) -> None:
        """Unlock a node that autolock has locked.  Returns when it has a session again, or after 20 s.

        Raises, with Docker's texts:
            Unavailable: This node is not a manager, or cannot take part again.
            AlreadyExists: It is not locked.
            InvalidArgument, WrongUnlockKey: The key is wrong.
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
            node = await self._with_present_address(self.node)
            self._start(node)
            self._apply(MembershipEvent.UNLOCKED)
            with suppress(TimeoutError):
                async with asyncio.timeout(_JOIN_TIMEOUT_S):
                    await self._wait_settled()
            if self._error:
                raise Unavailable(f"swarm component could not be started: {self._error}")

    def reload(self) -> None:
        """Have the manager of this node, if there is one, read its settings again."""
        if self._runner is not None:
            self._runner.reload()

    # --- API responses ------------------------------------------------------------------------------------------

    def manager_refusal(self) -> str | None:
        """Return Docker's error for requests that need a manager, or None if this node has one, or soon will."""
        if self.node is None:
            return NOT_IN_A_SWARM
        if self._removal:
            return f"This node is not a swarm manager: {self._removal}"
        if not self.node.is_manager or (self._runner is not None and self._runner.loses_manager):
            return NOT_A_MANAGER
        if self.is_locked:
            return LOCKED
        if self._runner is not None and (error := self._runner.manager_error):
            return f"This node is not a swarm manager. {error}"
        return None

    @property
    def node(self) -> LocalNode | None:
        """This node as a member, or None outside of any cluster."""
        return self._runner.node if self._runner is not None else self._locked_node

    @property
    def is_in_swarm(self) -> bool:
        """Whether this node is a member, even a locked one."""
        return self.node is not None

    @property
    def is_manager(self) -> bool:
        """Whether this node is a member with the role manager."""
        return self.node is not None and self.node.is_manager

    @property
    def is_locked(self) -> bool:
        """Whether this node waits for the unlock key."""
        return self._state is MembershipState.LOCKED

    @property
    def status(self) -> str:
        """``LocalNodeState`` of ``/info``."""
        session = self._runner.session if self._runner is not None else None
        return docker_state(self._state, session, self._error)

    @property
    def header(self) -> str:
        """The ``Swarm`` header of ``/_ping``: ``active/manager``, ``inactive``."""
        role = "manager" if self.is_manager else "worker"
        return f"active/{role}" if self.status == "active" else self.status

    async def info(self) -> dict[str, Any]:
        """Return the ``Swarm`` section of ``/info``."""
        if self.is_locked:
            return local_section(None, status=self.status, error=LOCKED, managers=())
        managers = self._runner.managers if self._runner is not None else ()
        section = local_section(self.node, status=self.status, error=self._error, managers=managers)
        if not self._removal and (waits_for := why_waiting(self._paths.manager_waiting)):
            section |= {"ControlAvailable": True, "Error": waits_for}
        elif self.is_manager and not self._error:
            section |= await cluster_section(self._manager_api)
        if self.node is not None and self.is_manager:
            peer = self._dependencies.manager_files.peer_section(self.node)
            warnings = [*section.get("Warnings", ()), *peer.pop("Warnings", ())]
            section |= peer | ({"Warnings": warnings} if warnings else {})
        return section

    @property
    def _removal(self) -> str:
        """A sentence about the removal of this node from its cluster, or an empty string."""
        return self._runner.removal if self._runner is not None else ""

    @property
    def _error(self) -> str:
        return self._runner.error if self._runner is not None else self._read_error

    # --- entering and leaving ---------------------------------------------------------------------------------

    async def enter(
        self, node: LocalNode, pair: KeyPair, write_files: Callable[[], None], timeout_s: float
    ) -> None:
        """Become ``node`` in its cluster.  A failure leaves nothing behind.

        ``write_files`` writes the files of its manager if it becomes a manager.
        """
        self._no_vote_reason = ""
        self._apply(MembershipEvent.ENTER)
        try:
            await clear_former(self._paths)
            await asyncio.to_thread(keypair.save, pair, self._paths.certificates)
            if node.is_manager:
                await asyncio.to_thread(write_files)
            await self._look()
            self._start(node)
            await self._wait_session(timeout_s)
            if node.is_manager:
                await self._wait_ready(node, timeout_s)
            await self._write_new(node)
        except BaseException:
            if node.is_manager and self._runner is not None:
                # Remove the raft member. A stopped member would make it harder for the next manager to reach a
                # quorum.
                await self._leave_manager_group(self._runner)
            self._apply(MembershipEvent.ENTER_FAILED)
            await self._end()
            raise
        self._apply(MembershipEvent.ENTERED)

    async def _write_new(self, node: LocalNode) -> None:
        """Write ``node.json``, and write it again if managers or role have changed meanwhile."""
        written: LocalNode | None = None
        while written != (present := self.node or node):
            await asyncio.to_thread(write_local_node, self._paths.node_json, present)
            written = present

    async def _look(self) -> None:
        """Read the machine's networks again, because the cluster's networks must avoid networks that have
        just appeared.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(_LOOK_S):
                await self._dependencies.look()

    async def _request_certificate(self, plan: Joining) -> KeyPair:
        """Request a certificate with the join token.  Raises: SkepError, with Docker's texts."""
        try:
            return await join(plan.remote_addrs[0], plan.token, self._clock, plan.availability)
        except InvalidArgument as error:
            raise Untranslated(str(error)) from error  # Docker Engine responds 500 to a bad token

    async def _wait_session(self, timeout_s: float) -> None:
        """Wait for the first session.  Raises: SkepError: the cluster refuses this node, or the time is up."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._noting_no_vote(self._wait_settled())
        except TimeoutError as error:
            raise Unavailable(self._error or self._timeout_text()) from error
        if self._error:
            raise Unavailable(self._error)

    def _timeout_text(self) -> str:
        reason = self._no_vote_reason
        return f"Timeout was reached before node joined: {reason}" if reason else TIMED_OUT

    async def _noting_no_vote(self, waiting: Coroutine[Any, Any, None]) -> None:
        """Await ``waiting`` and record why a new manager has no vote yet.

        The file with the reason is removed with each attempt.
        """

        async def note() -> None:
            while True:
                self._no_vote_reason = why_no_vote(self._paths.joining_mark) or self._no_vote_reason
                await self._clock.sleep(_MARK_POLL_S)

        with first_alone(SkepError):
            async with asyncio.TaskGroup() as group:
                noting = group.create_task(note(), name="reason of no vote")
                try:
                    await waiting
                finally:
                    noting.cancel()

    async def _wait_settled(self) -> None:
        """Wait for the first session, or until it is clear that there will be none."""
        assert self._runner is not None, "started before"
        assert self._running is not None, "started before"
        await wait_first(self._runner.wait_settled(), asyncio.wait((self._running,)))

    async def _wait_ready(self, node: LocalNode, timeout_s: float) -> None:
        """Wait until the manager shows this node as ready."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._noting_no_vote(wait_ready(self._manager_api, node.node_id, self._clock))
        except TimeoutError as error:
            raise Unavailable(self._error or self._timeout_text()) from error

    async def _with_present_address(self, node: LocalNode) -> LocalNode:
        """Return ``node`` with the configured address, which may have changed while the node was off.

        If this machine does not have the address, that is logged and the former address is kept.
        """
        present = node
        configured = self._dependencies.configuration().advertise_addr
        if configured:
            try:
                addr = advertised(configured, node.listen_addr, await read_interfaces())
                present = msgspec.structs.replace(node, advertise_addr=addr, local_addr=host_of(addr))
            except SkepError as error:
                log.warning("advertise address unchanged", configured=configured, reason=str(error))
        if present.is_manager:
            await asyncio.to_thread(self._dependencies.manager_files.update, present)
        if present != node:
            log.info("advertise address changed", before=node.advertise_addr, now=present.advertise_addr)
            await asyncio.to_thread(write_local_node, self._paths.node_json, present)
        return present

    async def _leave_manager_group(self, runner: NodeRunner) -> None:
        """Ask the other managers to remove this manager's etcd member, so that it no longer counts for their quorum."""
        pair = await asyncio.to_thread(keypair.load, self._paths.certificates, self._lock)
        await leave_manager_group(runner.other_managers, pair)

    def _start(self, node: LocalNode) -> None:
        """Run agent and manager as ``node``."""
        assert self._group is not None, "used outside of run()"
        self._runner = NodeRunner(node, self._dependencies, partial(self._apply, MembershipEvent.REFUSED))
        self._locked_node = None
        self._running = self._group.create_task(self._runner.run(), name="swarm")

    async def _stop(self) -> None:
        """Stop manager and agent.  Tasks keep running."""
        if self._running is not None and self._runner is not None:
            self._runner.dismiss()
            self._running.cancel()
            await asyncio.wait([self._running])
        self._running = None

    async def _end(self) -> None:
        """Stop manager and agent, and remove everything of the cluster from this node."""
        try:
            await self._stop()
            self._runner = self._locked_node = None
            await self._dependencies.work.remove_all()
            await forget_swarm(self._paths)
            await self._dependencies.processes.keep_spare_manager(True)
        finally:
            # Leftovers are removed at the next start of the node process.
            self._apply(MembershipEvent.LEFT)
