"""The manager process of this node, while the node is to be a manager.

The role is the certificate's: a node that got a manager's certificate starts its manager, which then asks to be let in
among the others; one that got a worker's stops it and keeps nothing of what it knew.  ``node.json`` follows.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import structlog

from skep.aio.backoff import Backoff
from skep.aio.trees import discard_tree_now
from skep.model.node import NodeRole
from skep.paths import Paths
from skep.security.locking import KeyLock

log = structlog.get_logger()


class ManagerProcess(Protocol):
    """The manager process of this node, as its supervisor shows it."""

    trouble: str

    async def run(self) -> None:
        """Keep it running until cancelled; returns when the other managers have removed it."""

    def dismiss(self) -> None:
        """It is not wanted any more: have it stopped when ``run`` is cancelled."""

    def reload(self) -> None:
        """Have it read its settings again."""


class Management:
    """Starts and ends the manager process as the role of this node changes.

    Args:
        make: a manager process, not yet running.
        prepare: called before the first start of a promoted node's manager: writes what it reads.
        become: told what the node is now, before a manager starts and after one was ended.
        renew: asks for another certificate.
    """

    def __init__(
        self,
        paths: Paths,
        *,
        is_manager: bool,
        make: Callable[[], ManagerProcess],
        prepare: Callable[[], None],
        become: Callable[[bool], None],
        renew: Callable[[], None],
    ) -> None:
        self._paths = paths
        self._is_manager = is_manager
        self._is_wanted = is_manager
        self._make = make
        self._prepare = prepare
        self._become = become
        self._renew = renew
        self._changed = asyncio.Event()
        self._backoff = Backoff(0.5, 30.0)
        self.process: ManagerProcess | None = None
        self.is_removed = False
        """Whether the other managers have just put this one out, and its certificate does not say so yet."""

    @property
    def trouble(self) -> str:
        """Why the manager process is not going to be started again; empty: nothing speaks against it."""
        return self.process.trouble if self.process is not None else ""

    def take_role(self, role: NodeRole) -> None:
        """The node's certificate is one of ``role`` from now on."""
        self._is_wanted = role is NodeRole.MANAGER
        self._changed.set()

    def dismiss(self) -> None:
        """The node leaves the swarm, or begins in another one: the end of ``run`` stops the manager."""
        if self.process is not None:
            self.process.dismiss()

    async def run(self) -> None:
        """Be what the certificate says until cancelled."""
        while True:
            self._changed.clear()
            if self._is_wanted:
                await self._manage()
            elif self._is_manager:
                await self._step_down()
            else:
                await self._changed.wait()

    async def _manage(self) -> None:
        """Run the manager process until the node is to be none, or until the others have removed it."""
        if not self._is_manager:
            log.info("this node becomes a manager")
            await asyncio.to_thread(self._prepare)
            self._is_manager = True
            self._become(True)
        self.process = self._make()
        self.is_removed = False
        async with asyncio.TaskGroup() as group:
            running = group.create_task(self.process.run(), name="manager process")
            while self._is_wanted and not running.done():
                changed = group.create_task(self._changed.wait(), name="role")
                await asyncio.wait({running, changed}, return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
                self._changed.clear()
            self.process.dismiss()
            running.cancel()
        if self._is_wanted:
            await self._start_over()

    async def _start_over(self) -> None:
        """The others have removed this manager: what it knew counts for nothing, and it asks to be let in again.

        They refuse it while it is to be none; a moment later its certificate says so, too.  One that is to be a manager
        again by then needs another certificate as well: etcd's peers refuse the one that it was removed with.
        """
        self.is_removed = True
        self._renew()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._backoff.next_delay_s()):
                await self._changed.wait()
        if self._is_wanted:
            await asyncio.to_thread(self._forget)
            await asyncio.to_thread(self._prepare)

    async def _step_down(self) -> None:
        log.info("this node is no manager any more")
        self.process = None
        self.is_removed = False
        self._is_manager = False
        self._backoff.reset()
        await asyncio.to_thread(KeyLock(self._paths).turn, None)  # a worker is never asked for the unlock key
        self._become(False)
        await asyncio.to_thread(self._forget)

    def _forget(self) -> None:
        """Keep nothing of the manager.  The node's own key, if it was locked, is a worker's now, and in clear."""
        KeyLock(self._paths).turn(None)
        discard_tree_now(self._paths.manager)
