"""Runs a node's part in its cluster: the agent, and the manager process while the node is a manager.

It saves each new list of managers and each new role in ``node.json`` for the next start.
"""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import msgspec
import structlog

from skep.agent.session.managers import KnownManager
from skep.aio.clock import Clock
from skep.aio.failures import log_error, retry
from skep.aio.groups import first_alone
from skep.aio.race import wait_first
from skep.configuration.configuration import Configuration
from skep.errors import SkepError
from skep.linux.files import file_exists
from skep.model.node import NodeRole
from skep.node.cluster.local import LocalNode, write_local_node
from skep.node.cluster.manager_files import ManagerFiles
from skep.node.cluster.manager_supervisor import ManagerProcess, ManagerSupervisor
from skep.node.cluster.membership_states import MembershipEvent, MembershipState, after
from skep.node.supervision.zygote import ZygoteGone
from skep.paths import Paths

log = structlog.get_logger()

_OWN_MANAGER_POLL_S = 0.02
"""Seconds between checks whether this node's manager serves, until there is a session."""

_ERROR_POLL_S = 0.2
"""Seconds between checks, during the wait for the first session, whether the node was refused."""


class AgentConnection(Protocol):
    """The node's session with the managers (``agent.agent.Agent``)."""

    registered: asyncio.Event

    @property
    def managers(self) -> tuple[KnownManager, ...]:
        """The managers as the last session listed them."""

    @property
    def removal(self) -> str:
        """A sentence about the removal of this node from its cluster, or an empty string if it was not removed."""

    @property
    def role(self) -> NodeRole:
        """The role in the node's certificate."""

    def renew_certificate(self) -> None:
        """Request another certificate as soon as a manager is reached."""

    async def run(self) -> None:
        """Keep a session until cancelled.  Raises: SkepError: the cluster refuses this node."""

    def try_now(self) -> None:
        """Without a session, request one at once, because a manager has just started to serve."""


class NewAgent(Protocol):
    """Makes an agent, not yet running.

    ``save_managers`` is called with every new list of managers, ``set_role`` with the role of every new certificate.
    """

    def __call__(
        self,
        node: LocalNode,
        save_managers: Callable[[tuple[KnownManager, ...]], None],
        set_role: Callable[[NodeRole], None],
    ) -> AgentConnection: ...


class Processes(Protocol):
    """Manager processes of this node (``supervision.processes``)."""

    def new_manager(self) -> ManagerProcess:
        """Return the supervised manager process, not yet running."""

    async def keep_spare_manager(self, wanted: bool) -> None:
        """Keep a manager process that was forked in advance, so that init and join are fast.

        If not ``wanted``, end it.
        """


class ClusterWork(Protocol):
    """The cluster's work on this node (``node.cluster.cluster_work``)."""

    async def release_attachments(self) -> None:
        """Detach plain containers from cluster networks while a manager can be reached."""

    async def remove_all(self) -> None:
        """Stop and remove every task and every network of the cluster."""


class Dependencies(msgspec.Struct, frozen=True, kw_only=True):
    """Dependencies of the membership, which the composition root (``node.node``) provides.

    ``configuration`` returns the present configuration, which may be reloaded.  ``look`` reads the machine for the
    node's description.
    """

    paths: Paths
    clock: Clock
    configuration: Callable[[], Configuration]
    manager_files: ManagerFiles
    processes: Processes
    new_agent: NewAgent
    work: ClusterWork
    look: Callable[[], Coroutine[Any, Any, None]]


class NodeRunner:
    """Runs agent and manager of one node, from one start to the next stop.

    ``refused`` is called when the agent has ended because the cluster refuses this node.
    """

    def __init__(
        self, node: LocalNode, dependencies: Dependencies, refused: Callable[[], None] = lambda: None
    ) -> None:
        self.node = node
        self.session = MembershipState.PENDING
        self._processes = dependencies.processes
        self._paths = dependencies.paths
        self._clock = dependencies.clock
        self._refused = refused
        self._error = ""
        self._is_unwritten = asyncio.Event()
        self._manager = ManagerSupervisor(
            dependencies.paths,
            is_manager=node.is_manager,
            new_process=dependencies.processes.new_manager,
            write_files=lambda: dependencies.manager_files.write_new(self.node, None),
            save_role=self._save_role,
            renew_certificate=self._renew_certificate,
        )
        self._agent = dependencies.new_agent(node, self._save_managers, self._manager.set_role)
        # Continue a change of role that was interrupted after the certificate was written.
        self._manager.set_role(self._agent.role)

    @property
    def error(self) -> str:
        """Reason why the node does not take part in its cluster as it should, or empty."""
        return self.removal or self._manager.error or self._error

    @property
    def removal(self) -> str:
        """A sentence about the removal of this node from its cluster, or an empty string if it was not removed."""
        return self._agent.removal

    @property
    def manager_error(self) -> str:
        """Reason why the manager process is not restarted.  Empty if it is, or if there is none."""
        return self._manager.error

    @property
    def managers(self) -> tuple[KnownManager, ...]:
        """The last list of managers that the agent received."""
        return self._agent.managers

    @property
    def other_managers(self) -> tuple[str, ...]:
        """Addresses of the managers except this node's own."""
        return tuple(peer.addr for peer in self.managers if peer.node_id != self.node.node_id)

    @property
    def loses_manager(self) -> bool:
        """Whether the other managers have removed this node's manager, or this node is removing it."""
        return self._manager.state in (MembershipState.REMOVED, MembershipState.DEMOTING)

    def reload(self) -> None:
        """Make the manager of this node, if there is one, read its settings again."""
        if self._manager.process is not None:
            self._manager.process.reload()

    def dismiss(self) -> None:
        """Let ``run`` stop the manager of this node when it ends."""
        self._manager.dismiss()

    async def run(self) -> None:
        """Run manager and agent until cancelled, or until the cluster refuses this node.

        Raises: ZygoteGone: processes can no longer be started, and the node process must be restarted.
        """
        try:
            with first_alone(SkepError):
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._repeat(self._manager.run, "manager supervisor"), name="manager")
                    group.create_task(self._run_agent(), name="agent")
                    group.create_task(self.wait_registered(), name="first session")
                    group.create_task(self._write_later(), name="node.json")
        except ZygoteGone:
            raise
        except SkepError as error:
            self._error = str(error)
            log.error("not taking part in the swarm", reason=self._error)
            self._refused()

    async def _run_agent(self) -> None:
        try:
            await self._repeat(self._agent.run, "agent")
        except SkepError:  # the cluster refuses this node
            self.dismiss()
            raise

    async def _repeat(self, work: Callable[[], Coroutine[Any, Any, None]], part: str) -> None:
        """Run ``work`` until cancelled, and restart it after every error except a SkepError, which is raised."""

        async def run() -> None:
            with first_alone(SkepError):
                await work()

        await retry(
            run, "part of the node failed", clock=self._clock, longest_s=10.0, passes=(SkepError,), part=part
        )

    async def wait_registered(self) -> None:
        """Wait for the first session.  From then on the node is active, even while its manager is unreachable."""
        await wait_first(self._agent.registered.wait(), self._watch_own_manager())
        self.session = after(self.session, MembershipEvent.SESSION)
        if not self.node.is_manager:
            await self._processes.keep_spare_manager(False)

    async def _watch_own_manager(self) -> None:
        """Make the agent request a session whenever this node's manager starts to serve, until there is a session."""
        known = None
        while True:
            serves = _identity(self._paths.manager_socket) if self.node.is_manager else None
            if serves not in (None, known):
                self._agent.try_now()
            known = serves
            await self._clock.sleep(_OWN_MANAGER_POLL_S)

    async def wait_settled(self) -> None:
        """Wait for the first session, or until ``error`` has the reason why there will be none."""
        while not self._agent.registered.is_set() and not self.error:
            with suppress(TimeoutError):
                async with asyncio.timeout(_ERROR_POLL_S):
                    await self._agent.registered.wait()

    def _renew_certificate(self) -> None:
        self._agent.renew_certificate()

    def _save_managers(self, managers: tuple[KnownManager, ...]) -> None:
        self._save(msgspec.structs.replace(self.node, managers=managers))

    def _save_role(self, is_manager: bool) -> None:
        self._save(msgspec.structs.replace(self.node, is_manager=is_manager))

    def _save(self, node: LocalNode) -> None:
        """Save ``node`` for the next start.

        Does nothing while the node joins a cluster, because the file is written last then.
        """
        self.node = node
        try:
            self._write()
        except OSError as error:
            log_error(error, "node.json not written")
            self._is_unwritten.set()

    def _write(self) -> None:
        if file_exists(self._paths.node_json):
            write_local_node(self._paths.node_json, self.node)

    async def _write_later(self) -> None:
        """Retry writes that a failing disk refused, until they succeed."""

        async def write() -> None:
            self._write()

        while True:
            await self._is_unwritten.wait()
            self._is_unwritten.clear()
            await retry(write, "node.json not written", clock=self._clock, longest_s=10.0)


def _identity(path: Path) -> tuple[int, int] | None:
    """Return inode and change time, which tell whether the file was replaced, or None if the file is missing."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_ctime_ns
