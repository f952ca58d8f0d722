"""A node of the playground that runs an unmodified Docker Engine instead of ``skep daemon``."""

import platform
from pathlib import Path

from skep.playground.commands import find
from skep.playground.description import PlaygroundNode

SOCKET = "docker.sock"
CONFIGURATION = "daemon.json"
NO_IPVS = (
    "note: This kernel has no IPVS, so virtual addresses and the routing mesh do not work on Docker Engines. Use "
    "--endpoint-mode dnsrr and --publish mode=host."
)
_MODULES = Path("/lib/modules")


def command(home: Path, node: PlaygroundNode) -> tuple[str, ...]:
    """Return the engine's command line.  Its sockets are in the node's own /run, its data below ``home``.

    Raises: FailedPrecondition: dockerd is not installed.
    """
    configuration = home / CONFIGURATION
    if not configuration.exists():
        configuration.write_text("{}\n")
    return (
        *(find("dockerd"), "--config-file", str(configuration), "--data-root", node.state_dir),
        *("--exec-root", "/run/docker", "--pidfile", "/run/docker.pid"),
        *("--host", "unix:///run/docker.sock", "--host", node.endpoint),
        *("--cgroup-parent", f"/{node.cgroup}/ctr"),
    )


def has_ipvs() -> bool:
    """Return whether the kernel has IPVS, loaded or as a module that an engine can load."""
    if Path("/proc/net/ip_vs").exists():
        return True
    modules = _MODULES / platform.release()
    return any(modules.glob("kernel/net/netfilter/ipvs/ip_vs.ko*"))
