"""Stores the node's volumes on disk.  Each has a directory, with its labels and options in files next to its data."""

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
from skep.engine.volumes.volume_plugins import LOCAL
from skep.errors import InvalidArgument, NotFound, SkepError, Unavailable
from skep.linux.files import replace_file

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+")
_LABELS, _OPTIONS, _USES = "labels.json", "options.json", "uses.json"
_DRIVER = "driver.json"
"""File that names the plug-in of a plug-in volume."""
_ASIDE = ".removed-"
"""Name prefix of the directories of removed and of unfinished volumes.  No volume name can start with it."""
_USES_MAX = 64
"""Limit for the recorded users of a volume.  The latest ones are kept."""
_NAMELESS = re.compile(r"[0-9a-f]{64}")
ANONYMOUS = "com.docker.volume.anonymous"
"""Docker's label for volumes to which the user has given no name."""


class VolumeStore:
    """Volumes of one node, each at ``<data>/volumes/<name>/_data``, with labels and options as JSON files next to it.

    A removal is atomic: the volume's directory is first renamed and then emptied.
    """

    def __init__(self, directory: Path, events: Events | None = None) -> None:
        """``events`` is the engine's event bus, or None to create one."""
        self.events = events or Events(SystemClock())
        self.directory = directory
        self._locks = WeakValueDictionary[str, asyncio.Lock]()
        """Locks by volume name.  Each exists while it is held or waited for."""
        self._uses: dict[str, Mapping[str, int]] = {}

    def lock_of(self, name: str) -> asyncio.Lock:
        """Return the volume's lock.  Hold it while you change the volume in more than one step."""
        return self._locks.setdefault(name, asyncio.Lock())

    def path(self, name: str) -> Path:
        """Return the directory of a volume's files.

        Raises: InvalidArgument, in Docker's words: the name is invalid.
        """
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
        return self.directory / name / "_data"

    def names(self) -> list[str]:
        """Return the names of all volumes on the node, sorted."""
        try:
            return sorted(entry.name for entry in self.directory.iterdir() if self.has(entry.name))
        except FileNotFoundError:
            return []  # no volume was created yet

    def has(self, name: str) -> bool:
        """Return whether the volume exists.  Does not touch the volume's mount, whose server may not respond."""
        try:
            return _NAME.fullmatch(name) is not None and "_data" in os.listdir(self.directory / name)
        except OSError:
            return False

    def created_ns(self, name: str) -> int:
        """Return when the volume was created, as Unix time.  Raises: NotFound."""
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
        """Return the directory of a volume's files.

        Create the volume with ``labels`` and ``options`` if it does not exist.

        An existing volume keeps its labels and options.  ``driver`` names the plug-in that has created the volume.
        Raises: SkepError: the file system refuses it.
        """
        path, plug_in = self.path(name), None if driver == LOCAL else driver
        if self.has(name):
            return path
        try:
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            for left in (_LABELS, _OPTIONS, _DRIVER, _USES):  # left by an interrupted creation
                (path.parent / left).unlink(missing_ok=True)
            # Write these files before the data directory, because the volume is visible once that exists.
            for file, kept in ((_LABELS, labels), (_OPTIONS, options), (_DRIVER, plug_in)):
                if kept is not None:  # the options may contain a password
                    replace_file(path.parent / file, msgspec.json.encode(kept), mode=0o600)
            path.mkdir(mode=0o755, exist_ok=True)
        except OSError as error:
            raise SkepError(f"error while creating volume path '{path}': {error.strerror}") from error
        self.events.publish_volume("create", name, {"driver": driver})
        return path

    def options(self, name: str) -> Mapping[str, str]:
        """Return the driver options of the volume's creation.  Raises: Unavailable: they cannot be read."""
        return self.given_options(name) or {}

    def given_options(self, name: str) -> Mapping[str, str] | None:
        """Return the driver options, or None if the volume was created without any.  Raises: Unavailable."""
        try:
            content = (self.path(name).parent / _OPTIONS).read_bytes()
            return msgspec.json.decode(content, type=dict[str, str])
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Unavailable(f"options of volume {name} cannot be read: {describe_error(error)}") from error

    def driver(self, name: str) -> str:
        """Return ``local`` or the name of the volume's plug-in.  Raises: Unavailable: it cannot be read."""
        try:
            return msgspec.json.decode((self.path(name).parent / _DRIVER).read_bytes(), type=str)
        except FileNotFoundError:
            return LOCAL
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Unavailable(f"driver of volume {name} cannot be read: {describe_error(error)}") from error

    def _is_mounted(self, name: str) -> bool:
        """Return whether the files are stored elsewhere and mounted while in use.  Raises: Unavailable."""
        if self.driver(name) != LOCAL:
            return True
        options = self.options(name)
        return bool(options.get("device") or options.get("type"))

    def has_options(self, name: str) -> bool:
        """Return whether the volume was created with driver options.  Its data may then be outside this node."""
        try:
            return bool(self.options(name))
        except SkepError:
            return True

    def labels(self, name: str) -> Mapping[str, str] | None:
        """Return the volume's labels, or None if a container without labels created it or they cannot be read."""
        try:
            return msgspec.json.decode((self.path(name).parent / _LABELS).read_bytes(), type=dict[str, str])
        except FileNotFoundError:
            return {ANONYMOUS: ""} if _NAMELESS.fullmatch(name) else None
        except Exception as error:  # one volume's error must not affect others
            log_error(error, "labels of a volume not read", volume=name)
            return None

    # --- users of volumes -------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Read the recorded uses of all volumes.  Call it once, in a thread."""
        for name in self.names():
            try:
                content = (self.path(name).parent / _USES).read_bytes()
                self._uses[name] = msgspec.json.decode(content, type=dict[str, int])
            except FileNotFoundError:
                continue  # no use was recorded
            except Exception as error:  # one volume's error must not affect others
                log_error(error, "uses of a volume not read", volume=name)

    @property
    def uses(self) -> Mapping[str, Mapping[str, int]]:
        """Recorded users by volume name, and for each user the latest time that was passed to ``note_use``."""
        return self._uses

    async def note_use(self, name: str, user: str, at: int) -> None:
        """Record that ``user`` has data in the volume, which outlives its containers.

        Skips volumes whose data is elsewhere.

        Raises: Unavailable: the record cannot be written.
        """
        async with self.lock_of(name):
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
        """Rename a volume's directory so that the volume no longer exists.

        Return the directory to empty, or None if the volume did not exist.

        Raises: OSError.
        """
        aside = self.new_aside()
        try:
            self.path(name).parent.rename(aside)
        except FileNotFoundError:
            return None
        self._uses.pop(name, None)
        return aside

    def new_aside(self) -> Path:
        """Return the path of a directory that belongs to no volume, and that the next process deletes."""
        return self.directory / f"{_ASIDE}{secrets.token_hex(8)}"

    async def sweep(self) -> None:
        """Delete the directories of removed and of unfinished volumes that earlier processes left."""
        for left in sorted(self.directory.glob(f"{_ASIDE}*")):
            await discard_tree(left)
