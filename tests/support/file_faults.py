"""Injects errors into chosen system calls on files below a directory, whatever Python code makes them."""

import asyncio
import builtins
import errno
import io
import itertools
import os
import shutil
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

DEADLINE_S = 60

ERRNOS = (errno.ENOSPC, errno.EMFILE, errno.ENOMEM, errno.EIO, errno.EROFS)

_BY_PATH = (
    *("open", "mkdir", "rmdir", "rename", "replace", "unlink", "remove", "link", "symlink", "chmod", "chown"),
    *("scandir", "listdir", "stat", "lstat", "truncate", "utime"),
)
_BY_DESCRIPTOR = ("write", "fsync", "fchmod", "ftruncate")


class Faults:
    """Chooses the calls that fail.

    It counts calls on files below ``directory``, and in a process without other work on all descriptors.  From the
    call ``first`` on, ``count`` calls fail with the error ``number``, and so do all calls that a test chooses.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = str(directory)
        self.calls = 0
        self.hits: list[str] = []
        self._first, self._count, self._number = -1, 0, 0
        self._chosen: Callable[[str, Path], bool] = lambda _call, _path: False
        self._lock = threading.Lock()

    def plan(self, first: int, number: int, count: int = 1) -> None:
        with self._lock:
            self.calls, self.hits = 0, []
            self._first, self._count, self._number = first, count, number

    def choose(self, number: int, chosen: Callable[[str, Path], bool]) -> None:
        """Let the calls that are ``chosen``, by their name and path, fail with the error ``number``."""
        with self._lock:
            self._number, self._chosen = number, chosen

    def end(self) -> None:
        with self._lock:
            self._count = 0
            self._chosen = lambda _call, _path: False

    def met(self, name: str, target: object) -> None:
        if isinstance(target, bytes):
            target = os.fsdecode(target)
        if isinstance(target, str | os.PathLike) and os.path.isabs(target):
            if not str(target).startswith(self.directory):
                return
        elif not isinstance(target, int) and name in _BY_DESCRIPTOR:
            return
        with self._lock:
            self.calls += 1
            is_chosen = not isinstance(target, int) and self._chosen(name, Path(str(target)))
            if is_chosen or self._first <= self.calls - 1 < self._first + self._count:
                self.hits.append(f"{name} {target}")
                raise OSError(self._number, os.strerror(self._number), str(target))


@contextmanager
def file_faults(directory: Path) -> Iterator[Faults]:
    """Pass all such calls of this process through ``Faults`` inside the block."""
    faults = Faults(directory)

    def faulty(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            is_ours = "dir_fd" in options or "src_dir_fd" in options
            if arguments and (is_ours or not isinstance(arguments[0], int) or name in _BY_DESCRIPTOR):
                faults.met(name, arguments[0])
            return real(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in (*_BY_PATH, *_BY_DESCRIPTOR):
            patch.setattr(os, name, faulty(name, getattr(os, name)))
        opening = faulty("open", io.open)
        patch.setattr(io, "open", opening)
        patch.setattr(builtins, "open", opening)
        yield faults


Life = Callable[[Path, Faults], Awaitable[None]]
"""Work below a directory.  Faults are injected from its start until it calls ``Faults.end``."""


async def walk(
    directory: Path, life: Life, *, template: Path | None = None, count: int = 1, step: int = 1
) -> int:
    """Let the n-th call on a file fail, for every ``step``-th n and with one error after the other.

    Args:
        template: initial content of each life's directory.
        count: number of consecutive calls that fail.

    Returns: number of calls that a life without a fault makes.
    """
    numbers = itertools.cycle(ERRNOS)
    for n in itertools.count(0, step):
        place = directory / str(n)
        if template is not None:
            shutil.copytree(template, place, symlinks=True)
        else:
            place.mkdir(parents=True)
        with file_faults(place) as faults, capture_logs():
            faults.plan(n, next(numbers), count)
            try:
                async with asyncio.timeout(DEADLINE_S):
                    await life(place, faults)
            except BaseException as error:
                error.add_note(f"call {n} failed: {faults.hits}")
                raise
            if not faults.hits:
                return faults.calls
        shutil.rmtree(place)
    raise AssertionError("unreachable")
