"""A node that builds images, and the docker command: real runc, a real image store, no cluster."""

import asyncio
import io
import os
import tarfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from aiohttp import web

from skep.aio.clock import SystemClock
from skep.api.http.responses import json_response
from skep.api.http.server import Routes, application
from skep.engine.api.routes import engine_routes
from skep.engine.engine import Engine
from skep.engine.images.archives.workers import ImageLimits
from skep.engine.images.store import ImageStore
from tests.support.engine.runc_lab import Lab
from tests.support.images.archives import a_docker_archive
from tests.support.machines.playground_rig import CLIS

BASE = "busybox:1"
LIMIT_S = 120.0


@dataclass(frozen=True)
class CommandResult:
    """Result of a command."""

    exit: int
    output: str


class BuildLab:
    """One node with its API on a socket."""

    def __init__(self, root: Path, lab: Lab, engine: Engine) -> None:
        self.root = root
        self.lab = lab
        self.engine = engine
        self.images = engine.images
        self.socket = root / "api.sock"
        self._contexts = 0

    def context(self, dockerfile: str, files: Mapping[str, str] | None = None) -> Path:
        """Create a directory with a Dockerfile and other files."""
        self._contexts += 1
        directory = self.root / f"context-{self._contexts}"
        directory.mkdir()
        for name, content in {"Dockerfile": dockerfile, **(files or {})}.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return directory

    async def docker(
        self, *words: str, cli: str = CLIS[0], stdin: bytes | None = None, is_buildkit: bool = False
    ) -> CommandResult:
        """Run the docker command against the node.  Return both its streams as the output."""
        process = await self.start(*words, cli=cli, is_buildkit=is_buildkit)
        try:
            async with asyncio.timeout(LIMIT_S):
                output, _ = await process.communicate(stdin)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode is not None
        return CommandResult(process.returncode, output.decode(errors="replace"))

    async def start(
        self, *words: str, cli: str = CLIS[0], is_buildkit: bool = False
    ) -> asyncio.subprocess.Process:
        """Start a docker command, and return its process."""
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": "/nonexistent",
            "DOCKER_HOST": f"unix://{self.socket}",
            "DOCKER_BUILDKIT": "1" if is_buildkit else "0",
            "DOCKER_API_VERSION": "1.41",
        }
        return await asyncio.create_subprocess_exec(
            *(cli, *words),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=environment,
        )

    async def build(self, context: Path, *options: str, cli: str = CLIS[0]) -> CommandResult:
        """Run ``docker build`` for a directory."""
        return await self.docker("build", *options, str(context), cli=cli)

    def files(self, name: str) -> dict[str, tarfile.TarInfo]:
        """Return the files in those layers of an image that its base does not have, by path."""
        base = set(self.images.get(BASE).chain)
        found: dict[str, tarfile.TarInfo] = {}
        for chain_id in self.images.get(name).chain:
            if chain_id not in base:
                found |= members(self.images.layer_store.directory(chain_id))
        return {
            path: one for path, one in found.items() if path != "etc"
        }  # the layer contained the runtime's mount points

    def text(self, name: str, path: str) -> str:
        """Return the content of a file of an image."""
        for directory in self.images.layers(self.images.get(name)):
            if (directory / path).is_file():
                return (directory / path).read_text()
        raise FileNotFoundError(path)

    def remains(self) -> list[str]:
        """Return leftovers of builds: containers, mounts, files in the store's scratch directory."""
        found = self.lab.remains() + [str(path) for path in self.images.scratch.iterdir()]
        mounts = Path("/proc/self/mounts").read_text().splitlines()
        found += [line for line in mounts if line.split()[1].startswith(str(self.root / "images"))]
        return found + [container.name for container in self.engine.list()]


def members(directory: Path) -> dict[str, tarfile.TarInfo]:
    """Return the files below a directory, by path."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(directory, arcname="")
    buffer.seek(0)
    with tarfile.open(fileobj=buffer) as archive:
        return {member.name: member for member in archive if member.name}


@asynccontextmanager
async def build_lab(root: Path, limits: ImageLimits | None = None) -> AsyncIterator[BuildLab]:
    """Run a node with the image ``BASE``."""
    async with Lab(root).running() as lab:
        images = ImageStore(root / "images", limits=limits)
        lab.images = cast("Any", images)
        await images.open()
        await _load_base(images, lab.tree)
        executor = lab.executor()
        async with executor.running():
            built = BuildLab(root, lab, executor.engine)
            app = application(_node_routes(), engine_routes(executor.engine, SystemClock()))
            runner = web.AppRunner(app, handler_cancellation=True)
            await runner.setup()
            await web.UnixSite(runner, str(built.socket)).start()
            try:
                yield built
            finally:
                await runner.cleanup()


def _node_routes() -> Routes:
    """Return the routes that buildx requests from the node process, which does not exist here."""
    routes = Routes()

    @routes.head("/_ping")
    @routes.get("/_ping")
    async def ping(_: web.Request) -> web.StreamResponse:
        return web.Response(headers={"Builder-Version": "2"})

    @routes.get("/version")
    async def version(_: web.Request) -> web.StreamResponse:
        return json_response({"ApiVersion": "1.41", "Os": "linux", "Arch": "amd64"})

    @routes.get("/info")
    async def info(_: web.Request) -> web.StreamResponse:
        return json_response({"OSType": "linux", "Driver": "overlay2"})

    return routes


async def _load_base(images: ImageStore, tree: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in sorted(tree.iterdir()):
            archive.add(path, arcname=path.name)

    async def pieces() -> AsyncIterator[bytes]:
        yield a_docker_archive(buffer.getvalue(), tags=[BASE])

    await images.load(pieces())
