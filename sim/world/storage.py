"""A simulated storage system with its CSI driver, and the cluster volumes of a simulated machine.

The storage does not fence, like NFS or host paths.  Unpublishing a volume changes the driver's records, but a node that
has the volume mounted can still write.  So the rule on writers counts tasks on machines
(``invariants.writers.SingleWriters``).
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence

from skep.aio.clock import Clock
from skep.errors import FailedPrecondition, NotFound
from skep.model.assignment import AssignmentSet
from skep.model.task import Task
from skep.model.values.ids import VolumeId
from skep.model.volume import Volume, VolumeInfo, VolumeScope

DRIVER = "disks"
LOOK_S = 0.5
"""Interval at which a machine checks whether a volume to release is still in use."""


class SimulatedStorage:
    """The storage, and the controller of its driver.  ``find`` is the ``FindDriver`` of every manager."""

    def __init__(self) -> None:
        self.published: dict[str, set[str]] = {}
        """Volumes by the driver's ids, with the nodes on which they are published."""

    async def find(self, name: str) -> "SimulatedStorage":
        """Return the driver.  Raises: NotFound: it has another name."""
        if name != DRIVER:
            raise NotFound(f'driver "{name}" not found')
        return self

    async def create(self, volume: Volume, secrets: Mapping[str, str]) -> VolumeInfo:
        """Create a volume.  Repeated calls return the same volume."""
        id = f"disk-{volume.id}"
        self.published.setdefault(id, set())
        return VolumeInfo(volume_id=id)

    async def delete(self, volume_id: str, secrets: Mapping[str, str]) -> None:
        """Delete a volume.  Raises: FailedPrecondition: it is published."""
        if self.published.get(volume_id):
            raise FailedPrecondition(f"{volume_id} is in use")
        self.published.pop(volume_id, None)

    async def publish(
        self, volume: Volume, driver_node_id: str, secrets: Mapping[str, str]
    ) -> Mapping[str, str]:
        """Publish a volume on a node.  Raises: FailedPrecondition: another node has it."""
        assert volume.info is not None, "it was made"
        nodes = self.published.setdefault(volume.info.volume_id, set())
        others = nodes - {driver_node_id}
        if others and volume.spec.access_mode.scope is VolumeScope.SINGLE:
            raise FailedPrecondition(f"{volume.info.volume_id} is published on {sorted(others)}")
        nodes.add(driver_node_id)
        return {}

    async def unpublish(self, volume_id: str, driver_node_id: str, secrets: Mapping[str, str]) -> None:
        """Record that a volume is no longer published on a node."""
        self.published.get(volume_id, set()).discard(driver_node_id)


class SimulatedVolumes:
    """The cluster volumes of one node process.  They are mounted as assigned, and released on request once unused.

    Has the methods of ``agent.tasks.cluster_volumes.ClusterVolumes`` that the worker and the session call.
    """

    def __init__(self, tasks: Callable[[], Iterable[Task]], clock: Clock) -> None:
        """``tasks``: returns the tasks that have a process on the machine."""
        self._tasks = tasks
        self._clock = clock
        self._mounted: set[VolumeId] = set()
        self._asked: set[VolumeId] = set()
        """Volumes that managers have asked to release."""
        self._changed = asyncio.Event()

    async def wait_ready(self) -> None:
        """Return at once, because nothing is read from a disk."""

    def assign(self, change: AssignmentSet) -> None:
        """Take over the volumes of ``change``."""
        given, taken = {one.id for one in change.volumes}, {one.id for one in change.removed_volumes}
        self._mounted = (self._mounted & given if change.complete else self._mounted) | given
        self._mounted -= taken
        self._asked = (self._asked | taken) - given
        self._changed.set()

    async def wait_mounted(self, task: Task) -> None:
        """Return when the task's volumes are mounted."""
        while not all(VolumeId(one.id) in self._mounted for one in task.volumes):
            self._changed.clear()
            await self._changed.wait()

    async def take_reports(self) -> Sequence[VolumeId]:
        """Wait for released volumes.  Returns them again until ``reported`` is called."""
        while True:
            used = {VolumeId(one.id) for task in self._tasks() for one in task.volumes}
            if free := sorted(self._asked - used):
                return free
            if self._asked:
                await self._clock.sleep(LOOK_S)
            else:
                self._changed.clear()
                await self._changed.wait()

    def reported(self, ids: Iterable[VolumeId]) -> None:
        """Record that a manager has received the reports."""
        self._asked -= set(ids)
