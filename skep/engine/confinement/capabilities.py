"""Linux capabilities: Docker's default set, and the set of a container with its additions and removals.

Source: moby, oci/caps (DefaultCapabilities, TweakCapabilities).
"""

from collections.abc import Iterable
from pathlib import Path

from skep.errors import InvalidArgument

ALL = tuple(
    f"CAP_{name}"
    for name in (
        *("CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID"),
        *("SETPCAP", "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW"),
        *("IPC_LOCK", "IPC_OWNER", "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT"),
        *("SYS_ADMIN", "SYS_BOOT", "SYS_NICE", "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD"),
        *("LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP", "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG"),
        *("WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF", "CHECKPOINT_RESTORE"),
    )
)
"""All capabilities in the order of their numbers."""

DEFAULT = tuple(
    f"CAP_{name}"
    for name in (
        *("CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "MKNOD", "NET_RAW", "SETGID", "SETUID", "SETFCAP"),
        *("SETPCAP", "NET_BIND_SERVICE", "SYS_CHROOT", "KILL", "AUDIT_WRITE"),
    )
)
"""Docker's default set."""


def granted(add: Iterable[str], drop: Iterable[str]) -> tuple[str, ...]:
    """Return the capabilities of a container in the order of their numbers.

    They start from all capabilities if ``ALL`` is in ``add``, from none if it is in ``drop``, and otherwise from
    Docker's default.
    Raises: InvalidArgument: an unknown name.
    """
    added, dropped = _normalized(add), _normalized(drop)
    if "ALL" in added:
        chosen = set(ALL) - dropped
    elif "ALL" in dropped:
        chosen = added
    else:
        chosen = (set(DEFAULT) - dropped) | added
    return tuple(name for name in ALL if name in chosen)


def bounding_set(status: str | None = None) -> frozenset[str]:
    """Return the capabilities that this process may pass on at most (``CapBnd`` of /proc/self/status)."""
    text = Path("/proc/self/status").read_text() if status is None else status
    for line in text.splitlines():
        if line.startswith("CapBnd:"):
            bits = int(line.split()[1], 16)
            return frozenset(name for number, name in enumerate(ALL) if bits >> number & 1)
    return frozenset(ALL)


def _normalized(names: Iterable[str]) -> set[str]:
    chosen = set()
    for name in names:
        upper = name.upper()
        full = upper if upper == "ALL" or upper.startswith("CAP_") else f"CAP_{upper}"
        if full == "CAP_ALL":
            full = "ALL"
        if full != "ALL" and full not in ALL:
            raise InvalidArgument(f'invalid capability: "{name}"')
        chosen.add(full)
    return chosen
