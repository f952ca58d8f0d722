"""Facts about this machine, read once at start.

They are reported to the managers and shown by ``/info`` and ``/version``.
"""

import os
import platform
import socket
from pathlib import Path

import msgspec

from skep.engine.capacity import processors

_SECOND_TO_NANO = 1_000_000_000


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about the machine, as in ``/info``."""

    hostname: str
    architecture: str
    """Name of the architecture in the kernel, such as x86_64 or aarch64."""
    kernel: str
    os_name: str
    """For example ``Debian GNU/Linux 12 (bookworm)``."""
    os_version: str
    distribution: str = ""
    """Short name of the distribution, such as ``debian``."""
    cpus: int
    memory_bytes: int

    @property
    def go_architecture(self) -> str:
        """The architecture's name in Go, as in ``/version`` and in images' platforms: amd64, arm64."""
        return _GO_ARCHITECTURES.get(self.architecture, self.architecture)

    @property
    def nano_cpus(self) -> int:
        """Number of processors in Docker's unit, 10^9 per processor."""
        return self.cpus * _SECOND_TO_NANO


_GO_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}


def this_machine() -> Machine:
    """Read the facts about the machine that this process runs on."""
    release = _os_release()
    return Machine(
        hostname=socket.gethostname(),
        architecture=platform.machine(),
        kernel=platform.release(),
        os_name=release.get("PRETTY_NAME", "Linux"),
        os_version=release.get("VERSION_ID", ""),
        distribution=release.get("ID", ""),
        cpus=processors(),
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    )


def _os_release() -> dict[str, str]:
    for path in (Path("/etc/os-release"), Path("/usr/lib/os-release")):
        try:
            lines = path.read_text(errors="replace").splitlines()
        except OSError:
            continue
        return {key: value.strip("\"'") for key, _, value in (line.partition("=") for line in lines) if value}
    return {}
