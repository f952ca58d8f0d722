"""One node's taking part in its swarm: its agent, and its manager process while it is to have one.

What it learns on the way, the other managers and its own role, is kept in ``node.json`` for the next start.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import msgspec
import structlog

from skep.aio.clock import Clock
from skep.aio.first import wait_first
from skep.aio.groups import first_alone
from skep.aio.guard import persist, report
from skep.api.swarm_requests import Joining
from skep.errors import SkepError
from skep.model.node import NodeRole
from skep.node.local import LocalNode, Peer, write_local_node
from skep.node.management import Management, ManagerProcess
from skep.node.manager_files import ManagerFiles
from skep.node.supervision.zygote import ZygoteGone
from skep.paths import Paths
from skep.security.keypair import KeyPair

log = structlog.get_logger()

_OWN_MANAGER_S = 0.02
"""How often it is looked whether the manager of this node serves, until there is a session."""

_LOOK_S = 0.2
"""How often a wait for the first session looks whether it is in vain: nobody announces that a process was given up."""


class AgentConnection(Protocol):
    """The node's session with the managers (``node.agent.Agent``)."""

    registered: asyncio.Event

    @property
    def managers(self) -> tuple[Peer, ...]: ...

    @property
    def role(self) -> NodeRole:
        """In the node's certificate."""

    def renew_certificate(self) -> None:
        """Have the managers issue another one, as soon as one of them can."""

    async def run(self) -> None: ...

    def try_now(self) -> None:
        """A manager has just begun to serve; without a session it is asked for one."""


class Parts(Protocol):
    """What a node in a swarm is made of; the daemon composes it."""

    manager_files: ManagerFiles

    def manager(self) -> ManagerProcess:
        """The supervised manager process, not yet running."""

    async def manager_stands_by(self, wanted: bool) -> None:
        """Have a manager process ready to be started in an instant; without ``wanted`` none any more."""

    def agent(
        self,
        node: LocalNode,
        remember: Callable[[tuple[Peer, ...]], None],
        certified: Callable[[NodeRole], None],
    ) -> AgentConnection:
        """The agent, not yet running.

        It tells ``remember`` about every new list of managers, and ``certified`` the role in every new certificate.
        """

    async def placed(self, node: LocalNode) -> LocalNode:
        """The node with its present address, which its manager reads too."""

    async def request_certificate(self, plan: Joining) -> KeyPair:
        """Use the join token.  Raises: SkepError in Docker's words."""

    async def resign(self, managers: Sequence[str]) -> None:
        """Give this manager's vote back, if the others (``ip:port``) let it go."""

    async def give_places_back(self) -> None:
        """Take plain containers from the cluster's networks, while a manager hears it."""

    async def remove_tasks(self) -> None:
        """Stop and remove everything that runs for the cluster."""


class Participation:
    """A node in its swarm, from one start to the next stop."""

    def __init__(self, node: LocalNode, parts: Parts, paths: Paths, clock: Clock) -> None:
        self.node = node
        self.is_active = False
        """Whether there has been a session; it stays so while managers are away."""
        self._parts = parts
        self._paths = paths
        self._clock = clock
        self._error = ""
        self._is_unwritten = asyncio.Event()
        self._management = Management(
            paths,
            is_manager=node.is_manager,
            make=parts.manager,
            prepare=lambda: parts.manager_files.write_new(self.node, None),
            become=self._become,
            renew=self._renew_certificate,
        )
        self._agent = parts.agent(node, self._remember_managers, self._management.take_role)
        # What was cut off between a new certificate and its consequences goes on now.
        self._management.take_role(self._agent.role)

    @property
    def trouble(self) -> str:
        """Why the node does not take part as it should; empty: it does."""
        return self._management.trouble or self._error

    @property
    def managers(self) -> tuple[Peer, ...]:
        """The managers as the agent heard last."""
        return self._agent.managers

    @property
    def other_managers(self) -> tuple[str, ...]:
        """Addresses of the managers that are not this node's own."""
        return tuple(peer.addr for peer in self.managers if peer.node_id != self.node.node_id)

    def manager_trouble(self) -> str:
        """Why the manager process is not going to be started again; empty: nothing speaks against it."""
        return self._management.trouble

    @property
    def is_removed(self) -> bool:
        """Whether the other managers have just put this node's out."""
        return self._management.is_removed

    def reload(self) -> None:
        """Have the manager of this node, if there is one, read its settings again."""
        if self._management.process is not None:
            self._management.process.reload()

    def dismiss(self) -> None:
        """The end of ``run`` is no failure: the manager of this node is stopped then."""
        self._management.dismiss()

    async def run(self) -> None:
        """Run manager and agent until cancelled, or until the cluster does not want this node any more."""
        try:
            with first_alone(SkepError):
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._persist(self._management.run, "management"), name="management")
                    group.create_task(self._run_agent(), name="agent")
                    group.create_task(self.wait_registered(), name="first session")
                    group.create_task(self._write_later(), name="node.json")
        except ZygoteGone:
            raise  # it takes a new node process to start anything again
        except SkepError as error:
            self._error = str(error)
            log.error("not taking part in the swarm", reason=self._error)

    async def _run_agent(self) -> None:
        try:
            await self._persist(self._agent.run, "agent")
        except SkepError:  # the cluster does not want this node any more
            self.dismiss()
            raise

    async def _persist(self, work: Callable[[], Coroutine[Any, Any, None]], part: str) -> None:
        """Raises: SkepError; what else a part meets is a bug, or the disk's, and it is tried again."""

        async def run() -> None:
            with first_alone(SkepError):
                await work()

        await persist(
            run, "part of the node failed", clock=self._clock, longest_s=10.0, passes=(SkepError,), part=part
        )

    async def wait_registered(self) -> None:
        """Return with the first session.  From then on the node is active, also while its manager is away."""
        await wait_first(self._agent.registered.wait(), self._watch_own_manager())
        self.is_active = True
        if not self.node.is_manager:
            await self._parts.manager_stands_by(False)

    async def _watch_own_manager(self) -> None:
        """While there is no session: have one asked for whenever the manager of this node begins to serve."""
        known = None
        while True:
            serves = _identity(self._paths.manager_socket) if self.node.is_manager else None
            if serves not in (None, known):
                self._agent.try_now()
            known = serves
            await self._clock.sleep(_OWN_MANAGER_S)

    async def wait_settled(self) -> None:
        """Return with the first session, or when ``trouble`` says that there will be none."""
        while not self._agent.registered.is_set() and not self.trouble:
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self._agent.registered.wait()

    def _renew_certificate(self) -> None:
        self._agent.renew_certificate()

    def _remember_managers(self, managers: tuple[Peer, ...]) -> None:
        self._remember(msgspec.structs.replace(self.node, managers=managers))

    def _become(self, is_manager: bool) -> None:
        self._remember(msgspec.structs.replace(self.node, is_manager=is_manager))

    def _remember(self, node: LocalNode) -> None:
        """Keep it for the next start; during init and join it is written with the rest, at their end."""
        self.node = node
        try:
            self._write()
        except OSError as error:
            report(error, "node.json not written")
            self._is_unwritten.set()

    def _write(self) -> None:
        if self._paths.node_json.exists():
            write_local_node(self._paths.node_json, self.node)

    async def _write_later(self) -> None:
        """Write what the disk refused, as soon as it can be."""

        async def write() -> None:
            self._write()

        while True:
            await self._is_unwritten.wait()
            self._is_unwritten.clear()
            await persist(write, "node.json not written", clock=self._clock, longest_s=10.0)


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a file from the next one of its name; None: there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_ctime_ns
