"""Dockerfiles with their results according to BuildKit's reference and a real BuildKit."""

import asyncio
import io
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LIMIT_S = 120.0


@dataclass(frozen=True)
class Case:
    """One Dockerfile.  ``BASE`` in it is an image with busybox, and users root and alice (1000:1001)."""

    name: str
    dockerfile: str
    files: Mapping[str, str] = field(default_factory=dict)
    """Files of the context."""
    options: tuple[str, ...] = ()
    """Options of ``docker buildx build``.  ``CONTEXT`` in them is the context's directory."""
    gives: Mapping[str, str] = field(default_factory=dict)
    """Expected files of the image, with their text."""
    owned: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    """Expected files of the image, with mode, user and group."""
    lacks: tuple[str, ...] = ()
    """Files that the image must not have."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Expected fields of ``docker image inspect``, by path: ``Config.Cmd``."""
    history: tuple[str, ...] = ()
    """Expected entries of ``docker history`` after those of the base image, oldest first."""
    fails: str = ""
    """Expected text of the error.  Empty if the build succeeds."""
    shows: tuple[str, ...] = ()
    """Expected texts of the output."""
    skep_says: str = ""
    """Expected error instead of ``fails``, where Skep's message differs."""
    is_beyond: bool = False
    """Whether the reference engine at hand lacks the feature: Dockerfile 1.20 and later, or a case that needs a
    registry.
    """


@dataclass(frozen=True)
class Built:
    """Result of a build."""

    exit: int
    output: str
    members: Mapping[str, tarfile.TarInfo]
    texts: Mapping[str, str]
    config: Mapping[str, Any]
    history: Sequence[str] = ()
    """Entries of ``docker history``, oldest first."""

    def field(self, path: str) -> object:
        """Return a field of the image's inspection."""
        value: Any = self.config
        for name in path.split("."):
            value = value.get(name) if value is not None else None
        return value


class Host:
    """A builder on a socket, ``unix://`` with its path.  buildx keeps its files in the same directory."""

    def __init__(self, socket: str, cli: str, buildx: Path, *, options: tuple[str, ...] = ()) -> None:
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": "/nonexistent",
            "BUILDX_CONFIG": f"{socket.removeprefix('unix://')}.buildx",
            "DOCKER_HOST": socket,
        }
        self.cli = cli
        self.buildx = buildx
        self.options = options

    async def run(self, *words: str, stdin: bytes | None = None, **environment: str) -> tuple[int, str, str]:
        """Run a command, and return exit code, standard output and error output."""
        process = await asyncio.create_subprocess_exec(
            *words,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**self.environment, **environment},
        )
        try:
            async with asyncio.timeout(LIMIT_S):
                out, err = await process.communicate(stdin)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode is not None
        return process.returncode, out.decode(errors="replace"), err.decode(errors="replace")

    async def build(
        self, context: Path, *options: str, output: str = "", **environment: str
    ) -> tuple[int, str]:
        """Run ``docker buildx build``, and return exit code and output."""
        words = ("--progress", "plain", *self.options, *options, *(("-o", output) if output else ()))
        code, out, err = await self.run(str(self.buildx), "build", *words, str(context), **environment)
        return code, out + err

    async def inspect(self, image: str) -> Mapping[str, Any]:
        """Return ``docker image inspect`` of an image."""
        _, out, _ = await self.run(self.cli, "image", "inspect", image)
        found: list[dict[str, Any]] = json.loads(out)
        return found[0] if found else {}

    async def history(self, image: str) -> Sequence[str]:
        """Return the entries of ``docker history`` of an image, oldest first."""
        words = ("history", "--no-trunc", "--format", "{{json .CreatedBy}}", image)
        _, out, _ = await self.run(self.cli, *words)
        return [json.loads(line) for line in reversed(out.splitlines())]

    async def carry_out(self, case: Case, context: Path, image: str) -> Built:
        """Build a case, and inspect its result."""
        context.mkdir()
        files = {"Dockerfile": case.dockerfile.replace("BASE", "busybox:1"), **case.files}
        for name, text in files.items():
            (context / name).parent.mkdir(parents=True, exist_ok=True)
            (context / name).write_text(text)
        options = tuple(one.replace("CONTEXT", str(context)) for one in case.options)
        members: dict[str, tarfile.TarInfo] = {}
        texts: dict[str, str] = {}
        code, output, config, history = 0, "", {}, list[str]()
        if case.config or case.history or not (case.gives or case.owned or case.lacks):
            code, output = await self.build(context, "-t", image, *options)
            config = dict(await self.inspect(image)) if not code else {}
            history = list(await self.history(image)) if case.history and not code else []
        if not code and (case.gives or case.owned or case.lacks):
            code, more = await self.build(context, *options, output=f"type=tar,dest={context}/result.tar")
            output += more
            if not code:
                with tarfile.open(fileobj=io.BytesIO((context / "result.tar").read_bytes())) as archive:
                    for member in archive:
                        members[member.name.strip("/")] = member
                        if member.isfile() and (file := archive.extractfile(member)):
                            texts[member.name] = file.read().decode(errors="replace")
        return Built(code, output, members, texts, config, history)


def differences(case: Case, built: Built, *, of_skep: bool) -> list[str]:
    """Return the differences between the result and the case."""
    fails = (case.skep_says if of_skep else "") or case.fails
    if fails:
        if not built.exit:
            return [f"it did not fail with {fails!r}"]
        return [] if fails in built.output else [f"the error has no {fails!r}: {built.output[-1500:]}"]
    if built.exit:
        return [f"it failed: {built.output[-1500:]}"]
    found = []
    for path, text in case.gives.items():
        if built.texts.get(path) != text:
            found.append(f"{path}: {built.texts.get(path)!r}, not {text!r}")
    for path, (mode, uid, gid) in case.owned.items():
        member = built.members.get(path)
        seen = (oct(member.mode), member.uid, member.gid) if member is not None else None
        if seen != (oct(mode), uid, gid):
            found.append(f"{path}: {seen}, not {(oct(mode), uid, gid)}")
    found += [f"{path} is there" for path in case.lacks if path in built.members]
    for path, value in case.config.items():
        if built.field(path) != value:
            found.append(f"{path}: {built.field(path)!r}, not {value!r}")
    if case.history and tuple(built.history[-len(case.history) :]) != case.history:
        found.append(f"history: {built.history}, not {case.history}")
    found += [
        f"the output has no {text!r}: {built.output[-1500:]}"
        for text in case.shows
        if text not in built.output
    ]
    return found
