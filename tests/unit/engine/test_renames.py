"""``docker rename``: the name on the networks is that of the record, whatever happens meanwhile."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from skep.engine.containers.container import Container, PlainOptions
from skep.engine.engine import Engine
from skep.errors import AlreadyExists, FailedPrecondition, NotFound, SkepError, Unavailable
from skep.model.networks.sandbox import Sandbox, SandboxConfig
from tests.support.engine.oci_rig import Machine, MemoryNetwork, memory_engine, new_container
from tests.support.managers.wire_rig import until


class Names(MemoryNetwork):
    """Names of running containers; a change of one waits for ``gate``, and then meets ``error``."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self.present: dict[str, str] = {}
        self.gate = asyncio.Event()
        self.error: SkepError | None = None

    async def rename(self, config: SandboxConfig, sandbox: Sandbox | None) -> None:
        if isinstance(self.error, FailedPrecondition):
            raise self.error
        self.present[config.id] = config.name
        await self.gate.wait()
        if self.error is not None:
            error, self.error = self.error, None
            raise error


class Renaming:
    """An engine with the running containers ``one`` and ``two``."""

    def __init__(self, directory: Path) -> None:
        machine = Machine()
        self.names = Names(machine)
        self.engine: Engine = memory_engine(directory, machine, self.names)

    async def begun(self, name: str) -> Container:
        new = replace(new_container(name), plain=PlainOptions())
        return await self.engine.start((await self.engine.add(new)).id)

    def begin(self, name: str, other: str) -> "asyncio.Task[None]":
        return asyncio.create_task(self.engine.rename(name, other))


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Renaming]:
    rig = Renaming(tmp_path)
    async with asyncio.timeout(30), rig.engine.running():
        for name in ("one", "two"):
            await rig.begun(name)
        yield rig
        rig.names.gate.set()
        for container in rig.engine.list():
            await rig.engine.remove(container.id, force=True)


async def test_a_name_is_taken_before_the_networks_have_it(rig: Renaming) -> None:
    renaming = rig.begin("one", "other")
    await until(lambda: rig.names.present)
    for name, wanted in (("two", "other"), ("two", "one")):
        with pytest.raises(AlreadyExists, match=f'The container name "/{wanted}" is already in use'):
            await rig.engine.rename(name, wanted)
    rig.names.gate.set()
    await renaming
    id = rig.engine.get("other").id
    assert rig.names.present == {id: "other"}
    with pytest.raises(NotFound):
        rig.engine.get("one")
    await rig.engine.rename("two", "one")


async def test_a_rename_whose_client_goes_is_carried_out(rig: Renaming) -> None:
    renaming = rig.begin("one", "other")
    await until(lambda: rig.names.present)
    renaming.cancel()
    await asyncio.wait([renaming])
    rig.names.gate.set()
    await until(lambda: rig.engine.events.recent(0)[-1].action == "rename")
    event = rig.engine.events.recent(0)[-1]
    assert (event.attributes["oldName"], event.attributes["name"]) == ("/one", "other")
    container = rig.engine.get("other")
    assert rig.names.present == {container.id: "other"}
    with pytest.raises(NotFound):
        rig.engine.get("one")


@pytest.mark.parametrize("kind", [FailedPrecondition, Unavailable])
async def test_a_container_whose_networks_refuse_a_name_keeps_its_own(
    rig: Renaming, kind: type[SkepError]
) -> None:
    rig.names.error = kind("no")
    rig.names.gate.set()
    before = rig.engine.get("one")
    with pytest.raises(kind, match=r"^no$"):
        await rig.engine.rename("one", "other")
    assert rig.engine.get("one") == before
    assert rig.engine.bundles.read(before.id) == before
    assert rig.names.present.get(before.id, "one") == "one"
    rig.names.error = None
    await rig.engine.rename("two", "other")
