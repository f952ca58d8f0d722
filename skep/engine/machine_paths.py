"""What of the machine decides how its containers are confined."""

from collections.abc import Iterator
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")
_UID_MAP = Path("/proc/self/uid_map")


def thermal_throttles(cpus: Path = _CPUS) -> tuple[str, ...]:
    """Each processor's directory of heat events, which tell what the machine does.

    Source: moby, daemon/pkg/oci/defaults.go (GHSA-6fw5-f8r9-fgfm).
    """
    try:
        possible = (cpus / "possible").read_text()
    except OSError:
        return ()
    paths = (cpus / f"cpu{number}" / "thermal_throttle" for number in _numbers(possible))
    return tuple(str(path) for path in paths if path.exists())


def is_in_user_namespace(uid_map: Path = _UID_MAP) -> bool:
    """Whether this process's root is not the machine's.  There, 200 keys are all that root and its containers have.

    Such a node's containers share a session keyring: with one each, the two hundredth would not start.
    """
    try:
        return uid_map.read_text().split() != ["0", "0", str(2**32 - 1)]
    except OSError:
        return False


def _numbers(ranges: str) -> Iterator[int]:
    """``0-3,8`` -> 0, 1, 2, 3, 8; what is no range is passed over."""
    for part in ranges.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdecimal() and (last or first).isdecimal():
            yield from range(int(first), int(last or first) + 1)
