"""What the next process of this node begins with: on tmpfs, since a reboot may bring another network card.

Without it a node that starts anew, perhaps while no manager answers, would answer no probes, and give its
overlays the MTU of its devices until all was measured again.
"""

from pathlib import Path

import msgspec
import structlog

from skep.dataplane.probe.mtu import Measured
from skep.linux.files import replace_file
from skep.model.paths import ProbeTargets

log = structlog.get_logger()


class Kept(msgspec.Struct, frozen=True):
    """The last targets, and what was measured of them.  ``wish``: as the file names them."""

    wish: ProbeTargets
    measured: Measured


def load(file: Path) -> Kept | None:
    """None: nothing is kept; what cannot be read is logged and counts as nothing."""
    try:
        return msgspec.msgpack.decode(file.read_bytes(), type=Kept)
    except FileNotFoundError:
        return None
    except (
        OSError,
        msgspec.DecodeError,
        UnicodeDecodeError,
    ) as error:  # a value of another type is a DecodeError as well
        log.warning("measurements cannot be read", file=str(file), reason=str(error))
        return None


def save(file: Path, kept: Kept | None) -> None:
    """None: keep nothing.  Raises: OSError."""
    if kept is None:
        file.unlink(missing_ok=True)
    else:
        replace_file(file, msgspec.msgpack.encode(kept), is_durable=False)
