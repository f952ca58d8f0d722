"""What this node has of its volumes on disk: a directory for each, with its labels and options beside the files."""

import asyncio
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from weakref import WeakValueDictionary

import msgspec

from skep.aio.clock import SystemClock
from skep.aio.failures import describe_error, log_error
from skep.aio.trees import discard_tree
from skep.engine.events import Events
from skep.engine.volume_plugins import LOCAL
from skep.errors import InvalidArgument, NotFound, SkepError, Unavailable
from skep.linux.files import replace_file

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+")
_LABELS, _OPTIONS, _USES = "labels.json", "options.json", "uses.json"
_DRIVER = "driver.json"
"""Of a volume of a plug-in: the plug-in's name."""
_ASIDE = ".removed-"
"""Begins the name of a directory that was a volume: no volume has such a name."""
_USES_MAX = 64
"""Names that a volume keeps of those that used it, the latest ones."""
_NAMELESS = re.compile(r"[0-9a-f]{64}")
ANONYMOUS = "com.docker.volume.anonymous"
"""Docker's label of a volume without a name."""


class VolumeStore:
    """The volumes of one node, each at ``<data>/volumes/<name>/_data``; labels and options beside, as JSON.

    A volume goes in one step: its directory gets another name, and is emptied after that.
    """

    def __init__(self, directory: Path, events: Events | None = None) -> None:
        """``events``: the engine's; None: its own."""
        self.events = events or Events(SystemClock())
        self._directory = directory
        self._locks = WeakValueDictionary[str, asyncio.Lock]()
        """Each as long as something has it or waits for it."""
        self._uses: dict[str, Mapping[str, int]] = {}

    def _lock(self, name: str) -> asyncio.Lock:
        """Held by what changes a volume in more than one step."""
        return self._locks.setdefault(name, asyncio.Lock())

    def path(self, name: str) -> Path:
        """Where a volume's files are.  Raises: InvalidArgument, with Docker's words: no name for a volume."""
        if len(name) == 1:
            raise InvalidArgument(
                f"create {name}: volume name is too short, names should be at least two alphanumeric characters"
            )
        if not _NAME.fullmatch(name):
            raise InvalidArgument(
                f'create {name}: "{name}" includes invalid characters for a local volume name,'
                ' only "[a-zA-Z0-9][a-zA-Z0-9_.-]" are allowed. If you intended to pass a host directory,'
                " use absolute path"
            )
        return self._directory / name / "_data"

    def names(self) -> list[str]:
        """All volumes of the node, sorted."""
        try:
            return sorted(entry.name for entry in self._directory.iterdir() if self.has(entry.name))
        except FileNotFoundError:
            return []  # none was made yet

    def has(self, name: str) -> bool:
        """Whether there is such a volume.  What may be mounted on it is not asked."""
        try:
            return _NAME.fullmatch(name) is not None and "_data" in os.listdir(self._directory / name)
        except OSError:
            return False

    def created_ns(self, name: str) -> int:
        """When the volume was made, Unix time.  Raises: NotFound."""
        try:
            return self.path(name).parent.stat().st_mtime_ns
        except FileNotFoundError as error:
            raise NotFound(f"get {name}: no such volume") from error

    def ensure(
        self,
        name: str,
        labels: Mapping[str, str] | None = None,
        options: Mapping[str, str] | None = None,
        driver: str = LOCAL,
    ) -> Path:
        """The volume's directory, made if there is none, with ``labels`` and ``options`` then; one that is there
        keeps its own.  ``driver``: a plug-in, which has made it.  Raises: SkepError: the file system refuses it.
        """
        path, plug_in = self.path(name), None if driver == LOCAL else driver
        if self.has(name):
            return path
        try:
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            for left in (_LABELS, _OPTIONS, _DRIVER, _USES):  # of one that was half made
                (path.parent / left).unlink(missing_ok=True)
            # Before the directory, with which the volume is there.
            for file, kept in ((_LABELS, labels), (_OPTIONS, options), (_DRIVER, plug_in)):
                if kept is not None:  # a password may be among the options
                    replace_file(path.parent / file, msgspec.json.encode(kept), mode=0o600)
            path.mkdir(mode=0o755, exist_ok=True)
        except OSError as error:
            raise SkepError(f"error while creating volume path '{path}': {error.strerror}") from error
        self.events.publish_volume("create", name, {"driver": driver})
        return path

    def options(self, name: str) -> Mapping[str, str]:
        """The driver options it was made with.  Raises: Unavailable: they cannot be read."""
        return self.given_options(name) or {}

    def given_options(self, name: str) -> Mapping[str, str] | None:
        """The same; None where it was made without any."""
        try:
            content = (self.path(name).parent / _OPTIONS).read_bytes()
            return msgspec.json.decode(content, type=dict[str, str])
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Unavailable(f"options of volume {name} cannot be read: {describe_error(error)}") from error

    def driver(self, name: str) -> str:
        """``local``, or the plug-in that has it.  Raises: Unavailable: that cannot be read."""
        try:
            return msgspec.json.decode((self.path(name).parent / _DRIVER).read_bytes(), type=str)
        except FileNotFoundError:
            return LOCAL
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Unavailable(f"driver of volume {name} cannot be read: {describe_error(error)}") from error

    def _is_mounted(self, name: str) -> bool:
        """Whether its files are elsewhere, and mounted while it is used.  Raises: Unavailable."""
        if self.driver(name) != LOCAL:
            return True
        options = self.options(name)
        return bool(options.get("device") or options.get("type"))

    def has_options(self, name: str) -> bool:
        """Whether it was made with driver options: what it mounts may not be on this node."""
        try:
            return bool(self.options(name))
        except SkepError:
            return True

    def labels(self, name: str) -> Mapping[str, str] | None:
        """The labels it was made with; None: it was made by a container without labels, or they cannot be read."""
        try:
            return msgspec.json.decode((self.path(name).parent / _LABELS).read_bytes(), type=dict[str, str])
        except FileNotFoundError:
            return {ANONYMOUS: ""} if _NAMELESS.fullmatch(name) else None
        except Exception as error:  # one volume's error does not reach others
            log_error(error, "labels of a volume not read", volume=name)
            return None

    # --- what has used them ---------------------------------------------------------------------------------------

    def open(self) -> None:
        """Read what has used the volumes; to be called once, in a thread."""
        for name in self.names():
            try:
                content = (self.path(name).parent / _USES).read_bytes()
                self._uses[name] = msgspec.json.decode(content, type=dict[str, int])
            except FileNotFoundError:
                continue  # nothing that said so
            except Exception as error:  # one volume's error does not reach others
                log_error(error, "uses of a volume not read", volume=name)

    @property
    def uses(self) -> Mapping[str, Mapping[str, int]]:
        """Volumes -> names of what has used them -> the latest time of each, as it was given."""
        return self._uses

    async def note_use(self, name: str, user: str, at: int) -> None:
        """Keep that ``user`` has data in the volume, beyond the life of its containers; not if it mounts something.

        Raises: Unavailable: it cannot be written.
        """
        async with self._lock(name):
            known = self._uses.get(name, {})
            if known.get(user, -1) >= at or self._is_mounted(name):
                return
            latest = dict(sorted({**known, user: at}.items(), key=lambda use: -use[1])[:_USES_MAX])
            path, content = self.path(name).parent / _USES, msgspec.json.encode(latest)
            try:
                await asyncio.to_thread(replace_file, path, content, is_durable=False)
            except OSError as error:
                raise Unavailable(f"use of volume {name} not kept: {describe_error(error)}") from error
            self._uses[name] = latest

    # --- removal --------------------------------------------------------------------------------------------------

    def _set_aside(self, name: str) -> Path | None:
        """Take a volume away in one step; gives the directory that is to be emptied, None: there is no such volume.

        Raises: OSError.
        """
        aside = self._directory / f"{_ASIDE}{secrets.token_hex(8)}"
        try:
            self.path(name).parent.rename(aside)
        except FileNotFoundError:
            return None
        self._uses.pop(name, None)
        return aside

    async def sweep(self) -> None:
        """Delete what earlier processes have not deleted of volumes that were removed."""
        for left in sorted(self._directory.glob(f"{_ASIDE}*")):
            await discard_tree(left)
