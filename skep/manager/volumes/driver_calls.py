"""Driver calls: carries out one step of a volume, and records the result.

Drivers know no fencing: a call by a deposed leader may be executed after the next leader's first call.  So the term is
confirmed before each call, and each call ends within ``STEP_S``.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol, TypeAlias, TypeVar, assert_never

import structlog

from skep.csi.driver import UnusableResponse, discrepancy
from skep.errors import NotFound, Unavailable
from skep.manager.volumes.records import (
    announce_creation,
    forget,
    record_created,
    record_published,
    record_unpublished,
)
from skep.manager.volumes.steps import CreateVolume, Delete, Forget, Publish, Step, Unpublish
from skep.model.volume import Volume, VolumeInfo
from skep.store.interface import LoopStore
from skep.store.kinds import Payload

log = structlog.get_logger(__name__)

STEP_S = 45.0
"""Maximum seconds of a step's driver calls, including the wait for their turn."""

T = TypeVar("T")


class ControllerDriver(Protocol):
    """The controller half of ``skep.csi.driver.CsiDriver``."""

    async def create(self, volume: Volume, secrets: Mapping[str, str]) -> VolumeInfo: ...

    async def delete(self, volume_id: str, secrets: Mapping[str, str]) -> None: ...

    async def publish(
        self, volume: Volume, driver_node_id: str, secrets: Mapping[str, str]
    ) -> Mapping[str, str]: ...

    async def unpublish(self, volume_id: str, driver_node_id: str, secrets: Mapping[str, str]) -> None: ...


FindDriver: TypeAlias = Callable[[str], Awaitable[ControllerDriver]]
"""Returns the driver with that name on this machine.  Raises NotFound."""


Confirm: TypeAlias = Callable[[], Awaitable[None]]
"""Returns while the term lasts.  Raises NotLeader or Unavailable."""


async def skip_confirmation() -> None:
    """Do nothing, for a store without terms."""


async def no_drivers(name: str) -> ControllerDriver:
    """Raise NotFound, on a manager without drivers."""
    raise NotFound(f'driver "{name}" not found')


class DriverCalls:
    """Calls the drivers of cluster volumes on this machine."""

    def __init__(self, term: LoopStore, find_driver: FindDriver, confirm: Confirm) -> None:
        self._term = term
        self._find_driver = find_driver
        self._confirm = confirm
        self._creation = asyncio.Lock()
        """Volumes get their ids one after the other: two volumes with the same id would share a disk."""

    async def carry_out(self, step: Step, volume: Volume) -> None:
        """Carry out one step.  Raises SkepError."""
        if isinstance(step, Forget):
            await self._term.update(forget, volume.id)
            return
        driver = await self._find_driver(volume.spec.driver.name)
        secrets = self._secrets_of(volume)
        match step:
            case CreateVolume():
                if await self._term.update(announce_creation, volume.id):
                    info = await self._call_driver(lambda: driver.create(volume, secrets))
                    await self._enter_created(volume, info)
            case Delete():
                await self._call_driver(lambda: driver.delete(_id_of(volume), secrets))
                await self._term.update(forget, volume.id)
            case Publish(node_id, driver_node_id):
                context = await self._call_driver(lambda: driver.publish(volume, driver_node_id, secrets))
                await self._term.update(record_published, volume.id, node_id, context)
            case Unpublish(node_id, driver_node_id):
                await self._call_driver(lambda: driver.unpublish(_id_of(volume), driver_node_id, secrets))
                await self._term.update(record_unpublished, volume.id, node_id)
            case _:
                assert_never(step)
        log.info("volume", volume=volume.spec.name, id=volume.id, done=type(step).__name__.lower())

    async def _call_driver(self, call: Callable[[], Awaitable[T]]) -> T:
        """Confirm the term, make a driver call and return its result.  Raises NotLeader or another SkepError."""
        await self._confirm()
        try:
            async with asyncio.timeout(STEP_S):
                return await call()
        except TimeoutError as error:
            raise Unavailable(f"the driver did not finish within {STEP_S:g} s") from error

    async def _enter_created(self, volume: Volume, info: VolumeInfo) -> None:
        """Record a created volume.  Raises UnusableResponse if it is not as requested, or another volume."""
        # It is not deleted: drivers find volumes by name, so it may be an earlier volume with data.
        if not volume.pending_delete and (words := discrepancy(volume, info)):
            raise UnusableResponse(f"{words}; removing the volume deletes it")
        async with self._creation:
            for other in self._term.view().find(Volume):
                taken = other.info is not None and other.info.volume_id == info.volume_id
                if taken and other.id != volume.id and other.spec.driver.name == volume.spec.driver.name:
                    raise UnusableResponse(
                        f"the driver gave it the id of volume {other.spec.name}: {info.volume_id}"
                    )
            await self._term.update(record_created, volume.id, info)

    def _secrets_of(self, volume: Volume) -> Mapping[str, str]:
        """Return the driver secrets of a volume.  Raises Unavailable if one is unreadable."""
        view, found = self._term.view(), {}
        for one in volume.spec.secrets:
            payload = view.lookup(Payload, f"secret/{one.secret}")
            if payload is None:
                raise Unavailable(f"secret {one.secret} of the volume cannot be read")
            found[one.key] = payload.data.decode(errors="replace")
        return found


def _id_of(volume: Volume) -> str:
    assert volume.info is not None, "it is there"
    return volume.info.volume_id
