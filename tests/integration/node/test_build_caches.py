"""Caches of builds and pushes, as buildx asks for them: with a registry, and directories of the client."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.node.test_dockerfile_language import Host
from tests.support.builds.build_lab import BASE, BuildLab, build_lab
from tests.support.images.registry_rig import docker_registry
from tests.support.machines.playground_rig import CLIS
from tests.support.machines.plugins import plugin

pytestmark = pytest.mark.timeout(300)

DOCKERFILE = (
    "FROM busybox:1 AS made\nRUN date +%s%N > /when\nFROM busybox:1\n"
    "COPY --from=made /when /when\nRUN date +%s%N > /then\n"
)


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[str]:
    async with docker_registry(tmp_path / "registry") as address:
        yield address


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[BuildLab]:
    async with build_lab(tmp_path) as lab:
        yield lab


async def forget(lab: BuildLab) -> None:
    """The node has the base image only, as one that has built nothing."""
    await lab.images.prune(lambda image: BASE not in {one.familiar for one in image.tags}, users=tuple)
    assert [image.tags[0].familiar for image in lab.images.images()] == [BASE]


async def built(lab: BuildLab, *options: str, dockerfile: str = DOCKERFILE) -> str:
    host = Host(f"unix://{lab.socket}", CLIS[0], plugin("docker-buildx"))
    code, output = await host.build(lab.context(dockerfile), *options)
    assert code == 0, output
    return output


@pytest.mark.parametrize("form", ["", ",image-manifest=false"])
async def test_a_cache_in_a_registry(lab: BuildLab, registry: str, form: str) -> None:
    ref = f"type=registry,ref={registry}/cache:1"
    first = await built(lab, "--cache-to", f"{ref},mode=max{form}", "-t", "app:1")
    assert "CACHED" not in first
    id = lab.images.get("app:1").id
    await forget(lab)
    second = await built(lab, "--cache-from", ref, "-t", "app:1")
    assert second.count("CACHED") == 3, second
    assert "WARN" not in second
    assert lab.images.get("app:1").id == id


async def test_a_cache_in_a_directory_of_the_client(lab: BuildLab, tmp_path: Path) -> None:
    place = tmp_path / "cache"
    for _ in range(2):  # the second export finds its blobs there
        await built(lab, "--cache-to", f"type=local,dest={place},mode=max", "-t", "app:1")
    await forget(lab)
    second = await built(lab, "--cache-from", f"type=local,src={place}", "-t", "app:1")
    assert second.count("CACHED") == 3, second
    for blob in (place / "blobs/sha256").iterdir():
        blob.write_bytes(b"{}" if blob.read_bytes().startswith(b"{") else b"x")
    await forget(lab)
    third = await built(lab, "--cache-from", f"type=local,src={place}", "-t", "app:1")
    assert "CACHED" not in third
    assert "is not used: " in third


async def test_an_image_is_pushed_with_its_cache(lab: BuildLab, registry: str) -> None:
    name = f"{registry}/app:1"
    dockerfile = "FROM busybox:1\nRUN date +%s%N > /then\nENV A=b\n"
    first = await built(lab, "-t", name, "--push", "--cache-to", "type=inline", dockerfile=dockerfile)
    assert f"pushing {name}" in first
    await forget(lab)
    second = await built(lab, "-t", name, "--cache-from", name, dockerfile=dockerfile)
    assert second.count("CACHED") == 2, second
