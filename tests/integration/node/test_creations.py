"""Volumes and images that are removed while a container is created: there is a container that has them, or none."""

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import pytest

from skep.engine.api.responses.container_responses import inspected
from skep.engine.containers.container import Container, ContainerConfig
from skep.engine.containers.request import CreateRequest, read_create
from skep.engine.engine import Engine
from skep.engine.log_drivers.facts import with_attributes
from skep.errors import InvalidArgument, NotFound
from tests.support.engine.runc_lab import IMAGE, RUNTIME


async def created_while(
    engine: Engine, remove: Callable[[], Any], patch: pytest.MonkeyPatch, *command: str
) -> Container:
    """A container with a volume; ``remove`` is called while a user's regular expression takes its time."""

    async def evaluated(config: ContainerConfig, labels: Mapping[str, str]) -> ContainerConfig:
        await remove()
        return await with_attributes(config, labels)

    patch.setattr("skep.engine.engine.with_attributes", evaluated)
    body = {"Image": IMAGE, "Cmd": command, "HostConfig": {"Binds": ["data:/data"]}}
    return await engine.create(read_create(msgspec.json.encode(body)))


async def test_a_volume_that_is_removed_meanwhile_is_made_anew(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def remove() -> None:
        await engine.volumes.remove("data", engine.list)

    container = await created_while(engine, remove, monkeypatch, "touch", "/data/file")
    await engine.start(container.id)
    assert (await engine.wait(container.id)).exit_code == 0
    assert (engine.volumes.path("data") / "file").exists()


async def test_of_an_image_that_is_removed_meanwhile_none_is_made(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def remove() -> None:
        monkeypatch.setattr(engine.images, "resolve", lambda _: None)

    with pytest.raises(NotFound, match="No such image"):
        await created_while(engine, remove, monkeypatch, "true")
    assert not engine.list()
    assert not engine.volumes.names()


async def test_a_container_has_the_runtime_that_it_was_created_with(engine: Engine) -> None:
    def requested(host: dict[str, str]) -> CreateRequest:
        return read_create(msgspec.json.encode({"Image": IMAGE, "Cmd": ["true"], "HostConfig": host}))

    default = await engine.create(requested({}))
    assert default.runtime == RUNTIME
    for name in ("runc", "crun"):
        container = await engine.create(requested({"Runtime": name}))
        assert container.runtime == name
        assert inspected(container, engine.bundles, (), {})["HostConfig"]["Runtime"] == name
    with pytest.raises(InvalidArgument, match="unknown or invalid runtime name: kata"):
        await engine.create(requested({"Runtime": "kata"}))
