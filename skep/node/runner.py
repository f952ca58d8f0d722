"""Runs what makes a node a member of its cluster: the agent, and the manager process while the node is a manager.

The managers and the role that it learns meanwhile are kept in ``node.json`` for the next start.
"""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import msgspec
import structlog

from skep.agent.managers import Peer
from skep.aio.clock import Clock
from skep.aio.failures import log_error, retry
from skep.aio.groups import first_alone
from skep.aio.race import wait_first
from skep.configuration.configuration import Configuration
from skep.errors import SkepError
from skep.model.node import NodeRole
from skep.node.local import LocalNode, write_local_node
from skep.node.manager_files import ManagerFiles
from skep.node.manager_supervisor import ManagerProcess, ManagerSupervisor
from skep.node.membership_states import Event, State, after
from skep.node.supervision.zygote import ZygoteGone
from skep.paths import Paths

log = structlog.get_logger()

_OWN_MANAGER_POLL_S = 0.02
"""Between two looks whether the manager of this node serves, until there is a session."""

_ERROR_POLL_S = 0.2
"""Between two looks, during the wait for the first session, whether there will be none."""


class AgentConnection(Protocol):
    """The node's session with the managers (``agent.agent.Agent``)."""

    registered: asyncio.Event

    @property
    def managers(self) -> tuple[Peer, ...]:
        """As the last session listed them."""

    @property
    def removal(self) -> str:
        """A sentence about the removal of this node from its cluster, or an empty string if it was not removed."""

    @property
    def role(self) -> NodeRole:
        """In the node's certificate."""

    def renew_certificate(self) -> None:
        """Request another certificate from the managers, as soon as one is reached."""

    async def run(self) -> None:
        """Keep a session until cancelled.  Raises: SkepError: the cluster refuses this node."""

    def try_now(self) -> None:
        """A manager has just begun to serve: without a session, request one at once."""


class NewAgent(Protocol):
    """Makes an agent, not yet running.

    ``save_managers`` is called with every new list of managers, ``set_role`` with the role of every new certificate.
    """

    def __call__(
        self,
        node: LocalNode,
        save_managers: Callable[[tuple[Peer, ...]], None],
        set_role: Callable[[NodeRole], None],
    ) -> AgentConnection: ...


class Processes(Protocol):
    """Manager processes of this node (``supervision.processes``)."""

    def new_manager(self) -> ManagerProcess:
        """The supervised manager process, not yet running."""

    async def keep_spare_manager(self, wanted: bool) -> None:
        """Have a manager process forked in advance, so that init and join are fast; not ``wanted``: none any more."""


class ClusterWork(Protocol):
    """What runs on this node for the cluster (``node.cluster_work``)."""

    async def release_attachments(self) -> None:
        """Detach plain containers from the cluster's networks, while a manager can be reached."""

    async def remove_all(self) -> None:
        """Stop and remove every task and every network of the cluster."""


class Dependencies(msgspec.Struct, frozen=True, kw_only=True):
    """What membership of a cluster is built on; the composition root (``node.node``) provides it.

    ``configuration`` gives the present one, which may be reloaded.  ``look`` reads what a description says of this
    machine.
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
    """A node in its cluster, from one start to the next stop.

    Args:
        refused: called when the cluster refuses this node, so that its agent has ended.
    """

    def __init__(
        self, node: LocalNode, dependencies: Dependencies, refused: Callable[[], None] = lambda: None
    ) -> None:
        self.node = node
        self.session = State.PENDING
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
        # A change of role that was interrupted after the certificate was written is continued.
        self._manager.set_role(self._agent.role)

    @property
    def error(self) -> str:
        """Why the node does not take part in its cluster as it should; empty: it does."""
        return self.removal or self._manager.error or self._error

    @property
    def removal(self) -> str:
        """A sentence about the removal of this node from its cluster, or an empty string if it was not removed."""
        return self._agent.removal

    @property
    def manager_error(self) -> str:
        """Why the manager process is not going to be started again; empty: it is, or there is none."""
        return self._manager.error

    @property
    def managers(self) -> tuple[Peer, ...]:
        """The managers as the agent received them last."""
        return self._agent.managers

    @property
    def other_managers(self) -> tuple[str, ...]:
        """Addresses of the managers that are not this node's own."""
        return tuple(peer.addr for peer in self.managers if peer.node_id != self.node.node_id)

    @property
    def loses_manager(self) -> bool:
        """Whether the manager of this node was removed by the others, or is being removed here."""
        return self._manager.state in (State.REMOVED, State.DEMOTING)

    def reload(self) -> None:
        """Have the manager of this node, if there is one, read its settings again."""
        if self._manager.process is not None:
            self._manager.process.reload()

    def dismiss(self) -> None:
        """The end of ``run`` is wanted: the manager of this node is stopped then."""
        self._manager.dismiss()

    async def run(self) -> None:
        """Run manager and agent until cancelled, or until the cluster refuses this node.

        Raises: ZygoteGone: nothing can be started any more; the node process has to be started again.
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
        """Run ``work`` until cancelled, again after every error but a SkepError, which is raised."""

        async def run() -> None:
            with first_alone(SkepError):
                await work()

        await retry(
            run, "part of the node failed", clock=self._clock, longest_s=10.0, passes=(SkepError,), part=part
        )

    async def wait_registered(self) -> None:
        """Return with the first session.  From then on the node is active, also while its manager is away."""
        await wait_first(self._agent.registered.wait(), self._watch_own_manager())
        self.session = after(self.session, Event.SESSION)
        if not self.node.is_manager:
            await self._processes.keep_spare_manager(False)

    async def _watch_own_manager(self) -> None:
        """Until there is a session: have the agent request one whenever the manager of this node begins to serve."""
        known = None
        while True:
            serves = _identity(self._paths.manager_socket) if self.node.is_manager else None
            if serves not in (None, known):
                self._agent.try_now()
            known = serves
            await self._clock.sleep(_OWN_MANAGER_POLL_S)

    async def wait_settled(self) -> None:
        """Return with the first session, or when ``error`` gives the reason why there will be none."""
        while not self._agent.registered.is_set() and not self.error:
            with suppress(TimeoutError):
                async with asyncio.timeout(_ERROR_POLL_S):
                    await self._agent.registered.wait()

    def _renew_certificate(self) -> None:
        self._agent.renew_certificate()

    def _save_managers(self, managers: tuple[Peer, ...]) -> None:
        self._save(msgspec.structs.replace(self.node, managers=managers))

    def _save_role(self, is_manager: bool) -> None:
        self._save(msgspec.structs.replace(self.node, is_manager=is_manager))

    def _save(self, node: LocalNode) -> None:
        """Keep it for the next start.  While the node enters a cluster there is no file: that is written last."""
        self.node = node
        try:
            self._write()
        except OSError as error:
            log_error(error, "node.json not written")
            self._is_unwritten.set()

    def _write(self) -> None:
        if self._paths.node_json.exists():
            write_local_node(self._paths.node_json, self.node)

    async def _write_later(self) -> None:
        """Write what a failing disk refused, as soon as that succeeds."""

        async def write() -> None:
            self._write()

        while True:
            await self._is_unwritten.wait()
            self._is_unwritten.clear()
            await retry(write, "node.json not written", clock=self._clock, longest_s=10.0)


def _identity(path: Path) -> tuple[int, int] | None:
    """Inode and change time, which differ from those of a file that replaces it; None: there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_ctime_ns
