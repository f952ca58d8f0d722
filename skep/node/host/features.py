"""Detects kernel features of this machine by using them in a new network namespace.

A version number does not tell whether a module is missing, a surrounding container lacks a capability, or the kernel
has no nftables.  A missing feature becomes a warning in ``/info`` and an engine label, so that a placement constraint
can avoid the node (``engine.labels.skep.missing.vxlan!=true``).
"""

import ctypes
import os
import resource
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from skep.dataplane.netns.kernel.forwarding import ipv6_refusal
from skep.dataplane.plan.wireguard import DeviceChange
from skep.dataplane.wireguard import kernel
from skep.dataplane.wireguard.keys import new_private_key
from skep.engine.confinement.cgroups import Cgroups
from skep.linux.own_user_namespace import is_in_user_namespace, is_rootless, lowest_port

# Source: linux/sched.h and linux/magic.h.
_CLONE_NEWNET = 0x40000000
_CGROUP2_MAGIC = 0x63677270
_COMMAND_TIMEOUT_S = 5.0
"""Time limit in seconds for one test command."""

WANTED_CAPABILITIES = {
    0: "CAP_CHOWN",
    1: "CAP_DAC_OVERRIDE",
    5: "CAP_KILL",
    6: "CAP_SETGID",
    7: "CAP_SETUID",
    12: "CAP_NET_ADMIN",
    21: "CAP_SYS_ADMIN",
    24: "CAP_SYS_RESOURCE",
    27: "CAP_MKNOD",
}
_OPEN_FILES_WANTED = 65536
"""Open files below which the node warns.  Elasticsearch demands 65,535, and other databases recommend as many."""

_DUMMY_TABLE = """
table ip skep_probe {
  chain zones { type filter hook prerouting priority -300;
    ct original zone set @ll,80,16
  }
  chain pre { type nat hook prerouting priority -100;
    fib daddr type local ct mark set 1 dnat to numgen random mod 2 map { 0 : 10.255.255.2, 1 : 10.255.255.3 }
  }
  chain post { type nat hook postrouting priority 100;
    masquerade
  }
}
"""


class Features(msgspec.Struct, frozen=True, kw_only=True):
    """The available features.  ``missing`` has, for each missing feature, the attempt and the kernel's error."""

    missing: Mapping[str, str] = {}
    cgroup_version: int = 2
    controllers: frozenset[str] = frozenset()
    capabilities_missing: tuple[str, ...] = ()
    open_files_max: int = 0
    is_rootless: bool = False
    """Whether an ordinary user runs this node."""
    has_cgroups: bool = True
    """Whether containers have control groups.  A rootless node has them only if they are delegated to its user."""
    ports_from: int = 0
    """The lowest port of the machine that containers may publish."""

    def has(self, feature: str) -> bool:
        """Return whether a feature that ``detect`` tries is available."""
        return feature not in self.missing


_IN_NAMESPACE = frozenset({"veth", "bridge", "vxlan", "wireguard", "nftables", "route-localnet"})
"""Features that are tested by creating objects, which must not be created in the machine's own network namespace."""

_CONSEQUENCES = {
    "veth": "containers get no network of their own",
    "bridge": "containers get no network of their own",
    "vxlan": "overlay networks do not reach other nodes",
    "nftables": "published ports and virtual IPs do not work; use endpoint mode dnsrr and host networks",
    "ipv6-egress": "containers on networks with IPv6 reach the outside by IPv4 only",
    "route-localnet": "published ports do not answer on 127.0.0.1",
    "overlayfs": "images cannot be shared between containers; put the data dir on ext4 or xfs",
    "seccomp": "containers run without a seccomp profile",
}
"""Consequences of each missing feature.  Features that are not listed here are used only on request."""


# Docker's sentences.  Source: moby, daemon/info_unix.go (fillPlatformInfo).
_NO_CGROUPS_V1 = (
    "WARNING: Running in rootless-mode without cgroups. "
    "To enable cgroups in rootless-mode, you need to boot the system in cgroup v2 mode."
)
_NO_CGROUPS_V2 = (
    "WARNING: Running in rootless-mode without cgroups. "
    "Systemd is required to enable cgroups in rootless-mode."
)


def warnings(features: Features) -> tuple[str, ...]:
    """Return the warnings for ``/info``."""
    sentences = [
        f"WARNING: No {name} support ({features.missing[name]}): {consequence}"
        for name, consequence in _CONSEQUENCES.items()
        if name in features.missing
    ]
    if not features.has_cgroups:
        sentences.append(_NO_CGROUPS_V2 if features.cgroup_version == 2 else _NO_CGROUPS_V1)
    sentences += [
        f"WARNING: No {controller} cgroup controller: its limits are not enforced"
        for controller in ("memory", "cpu", "pids")
        if controller not in features.controllers and features.has_cgroups
    ]
    if features.capabilities_missing:
        sentences.append(
            f"WARNING: This node runs without {', '.join(features.capabilities_missing)}: "
            "containers that need more than it has are refused or limited"
        )
    if 0 < features.open_files_max < _OPEN_FILES_WANTED:
        sentences.append(
            f"WARNING: At most {features.open_files_max} open files are allowed: "
            f"raise LimitNOFILE to {_OPEN_FILES_WANTED} or more"
        )
    return tuple(sentences)


def labels(features: Features) -> Mapping[str, str]:
    """Return the engine labels for missing features."""
    # The former name stays, because existing services may have constraints with it.
    return {
        f"skep.{word}.{name}": "true" for word in ("missing", "without") for name in sorted(features.missing)
    }


def detect(data_dir: Path, nft: str = "nft") -> Features:
    """Try every feature, which takes about 40 ms.  Uses a separate thread, because its namespaces end with it."""
    missing: dict[str, str] = {}

    def probe() -> None:
        if refusal := ipv6_refusal():  # a new namespace has IPv6 even if IPv6 is turned off on the machine
            missing["ipv6-egress"] = refusal
        refusal = "" if _libc.unshare(_CLONE_NEWNET) == 0 else os.strerror(ctypes.get_errno())
        for name, attempt in _attempts(data_dir, nft).items():
            if refusal and name in _IN_NAMESPACE:
                missing[name] = f"no network namespace can be made: {refusal}"
                continue
            try:
                attempt()
            except (OSError, subprocess.SubprocessError) as error:
                missing[name] = _reason(error)

    thread = threading.Thread(target=probe, name="features")
    thread.start()
    thread.join()
    cgroups = Cgroups("")
    version, controllers = _cgroups()
    return Features(
        is_rootless=is_rootless(),
        has_cgroups=cgroups.is_usable,
        ports_from=lowest_port(),
        missing=missing,
        cgroup_version=version,
        controllers=controllers if cgroups.is_usable else frozenset(),
        capabilities_missing=_missing_capabilities(),
        open_files_max=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
    )


def _attempts(data_dir: Path, nft: str) -> dict[str, Callable[[], object]]:
    return {
        "veth": lambda: _run("ip", "link", "add", "v0", "type", "veth", "peer", "name", "v1"),
        "bridge": lambda: _run("ip", "link", "add", "b0", "type", "bridge"),
        "vxlan": lambda: _run("ip", "link", "add", "x0", "type", "vxlan", "id", "1", "dstport", "4789"),
        "wireguard": _try_wireguard,
        "nftables": lambda: _run(nft, "-f", "-", stdin=_DUMMY_TABLE),
        "route-localnet": lambda: (
            Path("/proc/thread-self/net/route").stat()
            and Path("/proc/sys/net/ipv4/conf/all/route_localnet").write_text("1")
        ),
        "wireguard-go": lambda: _find("wireguard-go"),
        "tun": lambda: os.close(os.open("/dev/net/tun", os.O_RDWR)),
        "ipv6": lambda: Path("/proc/sys/net/ipv6").stat(),
        "overlayfs": lambda: _try_overlay(data_dir),
        "seccomp": lambda: Path("/proc/sys/kernel/seccomp/actions_avail").read_text(),
    }


def _run(*command: str, stdin: str = "") -> None:
    try:
        subprocess.run(
            command, input=stdin, capture_output=True, text=True, check=True, timeout=_COMMAND_TIMEOUT_S
        )
    except subprocess.CalledProcessError as error:
        raise OSError((error.stderr or "failed").strip().partition("\n")[0]) from error


def _find(program: str) -> None:
    if shutil.which(program) is None:
        raise OSError(f"{program} is not installed")


def _try_wireguard() -> None:
    """Create a device, set a key and bring it up.  A kernel may refuse each of these (rights, lockdown, FIPS)."""
    _run("ip", "link", "add", "w0", "type", "wireguard")
    kernel.change_device("w0", DeviceChange(private=new_private_key()))
    _run("ip", "link", "set", "w0", "up")


def _try_overlay(data_dir: Path) -> None:
    """Mount an overlay below the data directory, because containers' file systems will be there."""
    data_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".probe-", dir=data_dir) as scratch:
        for name in ("lower", "upper", "work", "merged"):
            (Path(scratch) / name).mkdir()
        options = ",".join(f"{name}dir={scratch}/{name}" for name in ("lower", "upper", "work"))
        options += ",userxattr" if is_in_user_namespace() else ""
        merged = f"{scratch}/merged".encode()
        if _libc.mount(b"overlay", merged, b"overlay", 0, options.encode()) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        _libc.umount2(merged, 0)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{error.filename} not found"
    return (error.strerror if isinstance(error, OSError) and error.strerror else str(error)).rstrip(".")


def _cgroups() -> tuple[int, frozenset[str]]:
    """Return the cgroup version, 1 or 2, and the controllers that can set limits."""
    root = Path("/sys/fs/cgroup")
    if file_system_type(root) == _CGROUP2_MAGIC:
        return 2, frozenset((root / "cgroup.controllers").read_text().split())
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    mounted = (name for line in lines for name in line.split(":")[1].split(",") if (root / name).is_dir())
    return 1, frozenset(name for name in mounted if name and "=" not in name)


def _missing_capabilities() -> tuple[str, ...]:
    lines = Path("/proc/self/status").read_text().splitlines()
    bounding = next((int(line.split()[1], 16) for line in lines if line.startswith("CapBnd:")), 0)
    return tuple(name for number, name in WANTED_CAPABILITIES.items() if not bounding >> number & 1)


def file_system_type(path: Path) -> int:
    """Return the magic number of the file system of ``path`` (statfs(2)).  Raises: OSError."""
    buffer = (ctypes.c_long * 32)()
    if _libc.statfs(os.fsencode(path), buffer) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    return int(buffer[0])


_libc = ctypes.CDLL(None, use_errno=True)
