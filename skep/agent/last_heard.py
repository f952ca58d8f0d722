"""When a manager last heard this node, known over restarts of the node process too.

It is told on the machine's time since boot, which runs on while no node process does and while the machine sleeps.
Two such times compare within one boot only, so the boot's id stands beside it.
"""

from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog

from skep.linux.files import replace_file

log = structlog.get_logger()


class LastHeard:
    """In memory.  ``since_boot``: seconds since the machine was started."""

    def __init__(self, since_boot: Callable[[], float], at: float | None = None) -> None:
        """``at``: since boot; None: not in this boot, as far as is known."""
        self._since_boot = since_boot
        self._at = at

    def note(self, ago_s: float) -> None:
        """A manager heard this node ``ago_s`` seconds ago."""
        self._at = self._since_boot() - ago_s
        self._keep(self._at)

    def forget(self) -> None:
        """The machine was started anew."""
        self._at = None

    def silence_s(self) -> float:
        """Seconds since then; endless where it is not known: what may run elsewhere by now shall not run here."""
        return float("inf") if self._at is None else self._since_boot() - self._at

    def _keep(self, at: float) -> None:
        """Have the next process know it."""


class _Kept(msgspec.Struct, frozen=True):
    boot_id: str
    at: float


class LastHeardFile(LastHeard):
    """In a file too; it needs no sync, for a reboot ends its meaning."""

    def __init__(self, path: Path, since_boot: Callable[[], float], boot_id: str) -> None:
        self._path = path
        self._boot_id = boot_id
        super().__init__(since_boot, self._load())

    def _load(self) -> float | None:
        return heard_at(self._path, self._boot_id)

    def _keep(self, at: float) -> None:
        content = msgspec.json.encode(_Kept(self._boot_id, at))
        try:
            replace_file(self._path, content, mode=0o600, is_durable=False)
        except OSError as error:
            log.warning("not kept when a manager last heard this node", error=str(error))


def heard_at(path: Path, boot_id: str) -> float | None:
    """What is kept in ``path``, in seconds since boot; None: nothing is known of this boot."""
    try:
        kept = msgspec.json.decode(path.read_bytes(), type=_Kept)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    return kept.at if kept.boot_id == boot_id else None
