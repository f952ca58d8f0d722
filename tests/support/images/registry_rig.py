"""An image in the form that a registry stores: configuration, layers, manifest.  Debian's docker-registry stores
it.
"""

import asyncio
import gzip
import json
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

from skep.engine.images.registry.registry import DOCKER_MANIFEST
from skep.playground.commands import find
from skep.playground.images.archive import ArchivedDirectory, Entry, File, image_archive
from skep.playground.images.busybox import GROUP, PASSWD, PATH, applets
from tests.conftest import SEARCHED
from tests.support.images.archives import a_config, a_file, a_layer, a_tar, sha256

LAYERS = (a_layer(), a_tar(a_file("data", os.urandom(300_000))))
BLOBS = tuple(gzip.compress(layer, mtime=0) for layer in LAYERS)
CONFIG = a_config(*LAYERS)

HTPASSWD = "user:$2b$04$HJKnD8v/sWk9MFUCbP3J4.rX23aRxVokR1XHDgzEN2rxLL2Q72x3y"
"""The name ``user`` with the password ``secret``, in the format of docker-registry."""
HTPASSWD_NEXT = "user:$2b$04$efiU.xNt8gsmC0opyjdd6.gpplbkG3bffmzfuEOD80uU6sYuoJ5Om"
"""The same name with the password ``next``."""


def a_manifest(
    config: bytes = CONFIG, blobs: tuple[bytes, ...] = BLOBS, media_type: str = DOCKER_MANIFEST
) -> bytes:
    def descriptor(content: bytes) -> dict[str, object]:
        return {"mediaType": "application/octet-stream", "digest": sha256(content), "size": len(content)}

    document = {
        "schemaVersion": 2,
        "mediaType": media_type,
        "config": descriptor(config),
        "layers": [descriptor(blob) for blob in blobs],
    }
    return json.dumps(document).encode()


def registry_program() -> str:
    """Return the path of docker-registry."""
    program = shutil.which("docker-registry", path=SEARCHED)
    assert program is not None, "docker-registry is not installed: make setup"
    return program


@asynccontextmanager
async def docker_registry(directory: Path, *, auth: Mapping[str, object] | None = None) -> AsyncIterator[str]:
    """Run Debian's docker-registry with its files below ``directory``.  Yield its address once it responds."""
    directory.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    settings = {
        "version": "0.1",
        "log": {"level": "error"},
        "storage": {"filesystem": {"rootdirectory": str(directory / "files")}},
        "http": {"addr": address},
        **({"auth": auth} if auth else {}),
    }
    (directory / "registry.yml").write_text(json.dumps(settings))
    process = await asyncio.create_subprocess_exec(
        registry_program(), "serve", str(directory / "registry.yml")
    )
    try:
        await _wait_until_it_responds(address)
        yield address
    finally:
        process.terminate()
        await process.wait()


@asynccontextmanager
async def guarded_registry(directory: Path) -> AsyncIterator[str]:
    """Run a registry that requires the name ``user`` with the password ``secret``."""
    directory.mkdir(parents=True)
    (directory / "htpasswd").write_text(HTPASSWD + "\n")
    basic = {"htpasswd": {"realm": "tests", "path": str(directory / "htpasswd")}}
    async with docker_registry(directory / "own", auth=basic) as address:
        yield address


async def _wait_until_it_responds(address: str) -> None:
    async with aiohttp.ClientSession() as session, asyncio.timeout(60):
        while True:
            try:
                async with session.get(f"http://{address}/v2/"):
                    return
            except aiohttp.ClientConnectionError:
                await asyncio.sleep(0.05)


def registry_image(name: str = "registry:1") -> bytes:
    """Return an archive of docker-registry with its shared libraries, for ``docker load``."""
    entries: dict[str, Entry] = {
        **asyncio.run(applets(Path(find("busybox")))),
        "etc/group": GROUP,
        "etc/passwd": PASSWD,
        "etc/registry/config.yml": File(
            json.dumps(
                {
                    "version": "0.1",
                    "log": {"level": "error"},
                    "storage": {"filesystem": {"rootdirectory": "/registry"}},
                    "http": {"addr": ":5000"},
                }
            ).encode()
        ),
        "etc/registry/secret": File(HTPASSWD.encode()),
        "etc/registry/next": File(HTPASSWD_NEXT.encode()),
        "registry": ArchivedDirectory(),
        "tmp": ArchivedDirectory(0o1777),
        "usr/bin/docker-registry": File(Path(registry_program()).read_bytes(), 0o755),
    }
    linked = subprocess.run(["ldd", registry_program()], capture_output=True, text=True, check=True).stdout
    for word in linked.split():
        if word.startswith("/"):
            entries[word.lstrip("/")] = File(Path(word).resolve().read_bytes(), 0o755)
    config = {"Cmd": ["docker-registry", "serve", "/etc/registry/config.yml"], "Env": [f"PATH={PATH}"]}
    return image_archive(entries, tags=[name], created="2026-01-01T00:00:00Z", config=config).data
