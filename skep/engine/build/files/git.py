"""Runs ``git`` for builds, without any configuration of the machine or its users, and with limits.

Servers are not trusted, so memory, files, output and time are limited.

Source: buildkit, util/gitutil/git_cli.go.
"""

import asyncio
import os
import re
import shutil
import signal
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from skep.aio.trees import walk_tree
from skep.engine.build.addresses import redacted
from skep.engine.images.archives.workers import ImageLimits
from skep.errors import ResourceExhausted, Unavailable, Unimplemented
from skep.linux.trees import walk

_DEADLINE_S = 900.0
"""Seconds for one git command.  Large repositories take minutes."""
_MEMORY_BYTES_MAX = 2 << 30
"""Address space of each process.  Git may hold three copies of an object below ``core.bigFileThreshold`` in memory."""
_OUTPUT_BYTES_MAX = 1 << 20
"""Bytes of standard output.  ``ls-remote`` prints a few references."""
_SHOWN_BYTES = 1000
"""Bytes of git's error output that an error shows."""
_WATCH_S = 1.0
"""Seconds between two checks of the disk."""
_END_S = 5.0
"""Seconds for the streams of a killed process to end."""
_WALK_SHARE = 10
"""Length of the pause after a walk of the tree, as a multiple of the walk's duration, so that measuring a large tree
costs little.
"""
_READ_BYTES = 64 << 10
"""Capacity of a pipe."""
_FILE_BLOCK_BYTES = 512
"""The unit of ``ulimit -f`` in POSIX."""
_LIMITED = 'ulimit -c 0 && ulimit -v "$1" && ulimit -f "$2" && shift 2 && exec "$@"'
_CONFIGURATION = (
    *("-c", "core.hooksPath=/dev/null"),
    *("-c", "protocol.allow=never"),
    *(word for name in ("http", "https", "git", "ssh") for word in ("-c", f"protocol.{name}.allow=always")),
    # A server that sends nothing for a minute counts as lost.
    *("-c", "http.lowSpeedLimit=1", "-c", "http.lowSpeedTime=60"),
    # Git maps whole packs into memory, by default, which exceeds the limit of the address space.
    *("-c", "core.packedGitWindowSize=32m", "-c", "core.packedGitLimit=256m"),
)
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY")


class Git:
    """Runs git in one directory."""

    def __init__(self, directory: Path, limits: ImageLimits, shown: str) -> None:
        """``shown``: Address of the repository in messages."""
        self._directory = directory
        self._limits = limits
        self._shown = shown

    async def run(self, *words: str, variables: Mapping[str, str]) -> str:
        """Run a command and return its standard output.

        Args:
            variables: Added to the environment.

        Raises:
            Unavailable: the command failed, or took too long.
            ResourceExhausted: the repository or the response of its server is larger than the node accepts.
            Unimplemented: git is not installed.
        """
        program = shutil.which("git")
        if program is None:
            raise Unimplemented(
                "ADD of a git repository needs the program git on this node: install the package git"
            )
        blocks = self._bytes_max() // _FILE_BLOCK_BYTES + 1
        process = await asyncio.create_subprocess_exec(
            *("/bin/sh", "-c", _LIMITED, "sh", str(_MEMORY_BYTES_MAX >> 10), str(blocks)),
            program,
            *_CONFIGURATION,
            *words,
            cwd=self._directory,
            env={**_environment(), **variables},
            umask=0o022,
            start_new_session=True,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(_DEADLINE_S):
                output, errors = await self._watch(process)
        except TimeoutError as error:
            raise Unavailable(f"git {words[0]} took longer than {_DEADLINE_S:.0f} seconds") from error
        if process.returncode:
            text = redacted(errors.decode(errors="replace").strip())
            if process.returncode == -signal.SIGXFSZ or f"died of signal {signal.SIGXFSZ:d}" in text:
                raise ResourceExhausted(f"{self._shown} has more than {self._limits.archive_bytes_max} bytes")
            raise Unavailable(f"failed to fetch {self._shown}: git stderr:\n{text}")
        return output.decode("utf-8", "surrogateescape")

    async def _watch(self, process: asyncio.subprocess.Process) -> tuple[bytes, bytes]:
        """Return the output of ``process`` once it has ended.  Raises: ResourceExhausted: it exceeds a limit."""
        assert process.stderr is not None
        now = asyncio.get_running_loop().time
        reading = asyncio.gather(
            self._read_output(process), _last(process.stderr, _SHOWN_BYTES), process.wait()
        )
        walk_at = now() + _WATCH_S
        try:
            while not reading.done():
                await asyncio.wait([reading], timeout=_WATCH_S)
                if self._limits.room_on(self._directory) <= 0:
                    raise ResourceExhausted(f"no space is left on this node for {self._shown}")
                if reading.done() or now() >= walk_at:
                    began = now()
                    await walk_tree(self._measure)
                    walk_at = now() + _WALK_SHARE * (now() - began)
            output, errors, _ = reading.result()
        finally:
            _kill(process)
            # Both streams are read to their ends, which closes them.
            await asyncio.wait([reading], timeout=_END_S)
            reading.cancel()
        return output, errors

    def _bytes_max(self) -> int:
        return max(min(self._limits.archive_bytes_max, self._limits.room_on(self._directory)), 0)

    def _measure(self) -> None:
        """Check the directory's size.  Raises: ResourceExhausted: it holds more than the node accepts."""
        bytes_max, entries_max = self._limits.archive_bytes_max, self._limits.entries_max
        size = 0
        for entries, (_, status) in enumerate(walk(self._directory), 1):
            size += 0 if stat.S_ISDIR(status.st_mode) else status.st_size
            if size > bytes_max:
                raise ResourceExhausted(f"{self._shown} has more than {bytes_max} bytes")
            if entries > entries_max:
                raise ResourceExhausted(f"{self._shown} has more than {entries_max} files")

    async def _read_output(self, process: asyncio.subprocess.Process) -> bytes:
        """Return the standard output, or kill the process when it exceeds the limit.  Raises: ResourceExhausted."""
        assert process.stdout is not None
        content, is_above = bytearray(), False
        while piece := await process.stdout.read(_READ_BYTES):
            if len(content) + len(piece) <= _OUTPUT_BYTES_MAX:
                content += piece
            elif not is_above:
                is_above = True
                _kill(process)
        if is_above:
            raise ResourceExhausted(f"{self._shown} lists more than {_OUTPUT_BYTES_MAX} bytes of references")
        return bytes(content)


def _kill(process: asyncio.subprocess.Process) -> None:
    """Kill git and its network helpers."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


async def _last(stream: asyncio.StreamReader, size: int) -> bytes:
    """Read a stream to its end and return its last bytes, without a partial word at the start.

    A partial address would have no scheme, so its password would not be recognized.
    """
    content, is_cut = b"", False
    while piece := await stream.read(_READ_BYTES):
        content += piece
        is_cut |= len(content) > size
        content = content[-size:]
    return re.sub(rb"^\S*", b"", content) if is_cut else content


def _environment() -> Mapping[str, str]:
    variables = {
        "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
        "LC_ALL": "C",
        "HOME": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_TERMINAL_PROMPT": "0",
    }
    for name in (*_PROXIES, *map(str.lower, _PROXIES)):
        if name in os.environ:
            variables[name] = os.environ[name]
    return variables
