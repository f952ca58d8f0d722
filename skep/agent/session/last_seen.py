"""Time at which a manager last responded to this node, recorded across restarts of the node process.

The time is in seconds since the machine's boot, which advance while no node process runs and while the machine sleeps.
Such times are comparable only within one boot, so the boot's id is stored with them.
"""

from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog

from skep.linux.files import replace_file

log = structlog.get_logger()


class LastSeen:
    """The time of the last response, in memory.  ``since_boot`` returns the seconds since the machine booted."""

    def __init__(self, since_boot: Callable[[], float], at: float | None = None) -> None:
        """``at`` is in seconds since boot, or None without a known response during this boot."""
        self._since_boot = since_boot
        self._at = at

    def record(self, ago_s: float) -> None:
        """Record that a manager responded ``ago_s`` seconds ago."""
        self._at = self._since_boot() - ago_s
        self._save(self._at)

    def forget(self) -> None:
        """Forget the time, because the machine has rebooted."""
        self._at = None

    def silence_s(self) -> float:
        """Return the seconds since the last response.

        Infinite if the time is unknown: after such a long time, tasks may have been replaced.
        """
        return float("inf") if self._at is None else self._since_boot() - self._at

    def _save(self, at: float) -> None:
        """Store the time for the next process."""


class _Saved(msgspec.Struct, frozen=True):
    boot_id: str
    at: float


class LastSeenFile(LastSeen):
    """The time of the last response, also in a file.  The file is not synced: after a reboot it is useless."""

    def __init__(self, path: Path, since_boot: Callable[[], float], boot_id: str) -> None:
        self._path = path
        self._boot_id = boot_id
        super().__init__(since_boot, seen_at(path, boot_id))

    def _save(self, at: float) -> None:
        content = msgspec.json.encode(_Saved(self._boot_id, at))
        try:
            replace_file(self._path, content, mode=0o600, is_durable=False)
        except OSError as error:
            log.warning("time of a manager's last response not written", error=str(error))


def seen_at(path: Path, boot_id: str) -> float | None:
    """Return the time recorded in ``path``, in seconds since boot, or None without a record of this boot."""
    try:
        saved = msgspec.json.decode(path.read_bytes(), type=_Saved)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    return saved.at if saved.boot_id == boot_id else None
