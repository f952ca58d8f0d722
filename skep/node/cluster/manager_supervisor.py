"""Runs the manager process of this node while the node has a manager's certificate.

A promoted node writes the manager's files and starts the manager process, which then requests admission from the other
managers.  A demoted node stops the process and removes its files.  The role in ``node.json`` is updated accordingly.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import structlog

from skep.aio.backoff import Backoff
from skep.aio.trees import discard_tree_now
from skep.linux.files import file_exists
from skep.model.node import NodeRole
from skep.node.cluster.membership_states import MembershipEvent, MembershipState, after, certified
from skep.paths import Paths
from skep.security.locking import KeyLock

log = structlog.get_logger()


class ManagerProcess(Protocol):
    """A supervised process (``supervision.supervisor``)."""

    error: str
    """Reason why the process is not restarted, or empty if it is."""

    async def run(self) -> None:
        """Keep the process running until cancelled.  Returns when the other managers have removed this manager."""

    def dismiss(self) -> None:
        """Let ``run`` stop the process when it is cancelled, instead of leaving it to the next node process."""

    def reload(self) -> None:
        """Make the process read its settings again."""


class ManagerSupervisor:
    """Starts and stops the manager process when the role of this node changes.

    Args:
        new_process: Makes a manager process, not yet running.
        write_files: Writes the files that a new manager reads at its start.
        save_role: Called with True before a manager starts, and with False after it has ended.
        renew_certificate: Requests another certificate.
    """

    def __init__(
        self,
        paths: Paths,
        *,
        is_manager: bool,
        new_process: Callable[[], ManagerProcess],
        write_files: Callable[[], None],
        save_role: Callable[[bool], None],
        renew_certificate: Callable[[], None],
    ) -> None:
        self._paths = paths
        self._new_process = new_process
        self._write_files = write_files
        self._save_role = save_role
        self._renew_certificate = renew_certificate
        self._role = NodeRole.MANAGER if is_manager else NodeRole.WORKER
        self._role_changed = asyncio.Event()
        self._backoff = Backoff(0.5, 30.0)
        self.state = MembershipState.MANAGER if is_manager else MembershipState.WORKER
        self.process: ManagerProcess | None = None

    @property
    def error(self) -> str:
        """Reason why the manager process is not restarted.  Empty if it is, or if there is none."""
        return self.process.error if self.process is not None else ""

    def set_role(self, role: NodeRole) -> None:
        """Set the role that the node's present certificate has."""
        self._role = role
        self._role_changed.set()

    def dismiss(self) -> None:
        """Let ``run`` stop the manager when it ends, because the node leaves its cluster or starts another manager."""
        if self.process is not None:
            self.process.dismiss()

    async def run(self) -> None:
        """Follow the role of the certificate until cancelled.

        After an error in writing files it may be called again.
        """
        while True:
            match self.state:
                case MembershipState.PROMOTING:
                    await self._promote()
                case MembershipState.DEMOTING:
                    await self._demote()
                case MembershipState.REMOVED:
                    await self._start_over()
                case MembershipState.MANAGER if self._role is NodeRole.MANAGER:
                    await self._run_manager()
                case _:
                    await self._follow_certificate()

    def _apply(self, event: MembershipEvent) -> None:
        self.state = after(self.state, event)

    async def _follow_certificate(self) -> None:
        """Change to the role of the certificate.  If the role is unchanged, wait for the next certificate."""
        self._role_changed.clear()
        before = self.state
        self._apply(certified(self._role))
        if self.state is before:
            await self._role_changed.wait()

    async def _promote(self) -> None:
        log.info("node promoted to manager")
        await asyncio.to_thread(self._write_files)
        self._save_role(True)
        self._apply(MembershipEvent.FILES_WRITTEN)

    async def _run_manager(self) -> None:
        """Run the manager process until the certificate has the role worker, or the other managers have removed this
        manager.
        """
        if not (file_exists(self._paths.manager_config) or file_exists(self._paths.etcd)):
            # The node process ended after it discarded a removed manager's files and before it wrote new ones.
            await asyncio.to_thread(self._replace_files)
        self.process = self._new_process()
        async with asyncio.TaskGroup() as group:
            running = group.create_task(self.process.run(), name="manager process")
            while self._role is NodeRole.MANAGER and not running.done():
                changed = group.create_task(self._role_changed.wait(), name="role")
                await asyncio.wait({running, changed}, return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
                self._role_changed.clear()
            self.process.dismiss()
            running.cancel()
        self._apply(
            MembershipEvent.EXPELLED if self._role is NodeRole.MANAGER else MembershipEvent.CERTIFIED_WORKER
        )

    async def _start_over(self) -> None:
        """Discard the data of a manager that the others have removed, and request admission as a new one.

        If the manager was demoted, the others refuse, and soon a certificate with the role worker arrives.  If it was
        promoted again, it still needs a new certificate, because etcd's peers refuse the certificate with which it was
        removed.
        """
        self._renew_certificate()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._backoff.next_delay_s()):
                await self._role_changed.wait()
        if self._role is not NodeRole.MANAGER:
            self._apply(MembershipEvent.CERTIFIED_WORKER)
            return
        await asyncio.to_thread(self._replace_files)
        self._apply(MembershipEvent.RESET)

    async def _demote(self) -> None:
        """Demote this node.

        ``node.json`` is written last.  If the node process restarts before that, it still finds a manager and demotes
        it again.
        """
        log.info("node demoted to worker")
        self.process = None
        self._backoff.reset()
        await asyncio.to_thread(self._remove_files)
        self._save_role(False)
        self._apply(MembershipEvent.FILES_REMOVED)

    def _replace_files(self) -> None:
        self._remove_files()
        self._write_files()

    def _remove_files(self) -> None:
        """Remove all files of the manager.  If autolock had encrypted the node's key, it is stored unencrypted again.

        The directory is renamed first, so that after an interruption either all of its files exist or none.
        """
        KeyLock(self._paths).turn(None)
        discard_tree_now(self._paths.removed_manager)
        with suppress(FileNotFoundError):
            self._paths.manager.rename(self._paths.removed_manager)
        discard_tree_now(self._paths.removed_manager)
