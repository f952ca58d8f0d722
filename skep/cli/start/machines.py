"""The preflight script that ``skep up`` runs on a machine, and the evaluation of its results.  Pure."""

import re
from collections.abc import Iterator

import msgspec

from skep.model.networks.reserved_ports import IMAGES_PORT, MANAGER_PORT, PEER_PORT

PORTS = (IMAGES_PORT, MANAGER_PORT, PEER_PORT)
"""TCP ports that a node listens on."""
KERNEL_MIN = (5, 10)
"""Kernel of Debian 11.  Older ones lack calls that nodes use, such as ``openat2`` (5.6)."""
SKEW_S_MAX = 30.0
"""Largest difference of a machine's clock in seconds.  A new certificate is not valid yet on a machine whose clock is
behind.
"""
FREE_KIB_MIN = 1 << 20
"""1 GiB: room for the package, etcd's store and the first images."""

PREFLIGHT = f"""
echo "uid $(id -u)"
echo "kernel $(uname -r)"
echo "time $(date +%s)"
echo "os $(. /etc/os-release 2>/dev/null; echo "${{PRETTY_NAME:-unknown}}")"
echo "free $(df -Pk /var/lib | awk 'NR == 2 {{ print $4 }}')"
for port in {" ".join(map(str, PORTS))}; do
    hexadecimal=$(printf '%04X' "$port")
    listens=":$hexadecimal [0-9A-F]*:0000 0A"
    if cat /proc/net/tcp /proc/net/tcp6 2>/dev/null | grep -q "$listens"; then echo "taken $port"; fi
done
if command -v skep >/dev/null; then echo "skep $(skep --version | awk '{{ print $NF }}')"; fi
if [ -S /run/skep/skep.sock ]; then echo "runs yes"; fi
if command -v systemctl >/dev/null; then echo "systemd yes"; fi
if command -v apt-get >/dev/null; then echo "apt yes"; fi
echo "end yes"
"""
START = """
systemctl enable --now skep || exit 1
i=0
until [ -S /run/skep/skep.sock ]; do
    i=$((i + 1))
    if [ $i -gt 60 ]; then echo "Skep does not start. Run journalctl -u skep on the machine." >&2; exit 1; fi
    sleep 0.5
done
"""


class PreflightFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The results of the preflight."""

    uid: int = -1
    kernel: str = ""
    time_s: float = 0.0
    os: str = ""
    free_kib: int = 0
    taken: tuple[int, ...] = ()
    skep: str = ""
    """Installed version of skep, or empty."""
    runs: bool = False
    has_systemd: bool = False
    has_apt: bool = False
    is_whole: bool = False

    @property
    def summary(self) -> str:
        """Return the facts as one line of text."""
        state = "is running" if self.runs else "is installed" if self.skep else "will be installed"
        skep = f"skep {self.skep} {state}" if self.skep else f"skep {state}"
        return f"{self.os}, kernel {self.kernel}, {self.free_kib >> 20} GiB free, {skep}"


def facts_of(text: str) -> PreflightFacts:
    """Return the facts in the preflight's output; invalid lines are ignored."""
    lines = [line.partition(" ") for line in text.splitlines()]
    found = {key: value.strip() for key, _, value in lines}
    return PreflightFacts(
        uid=_number(found.get("uid", ""), -1),
        kernel=found.get("kernel", ""),
        time_s=_number(found.get("time", ""), 0),
        os=found.get("os", ""),
        free_kib=_number(found.get("free", ""), 0),
        taken=tuple(_number(value.strip(), 0) for key, _, value in lines if key == "taken"),
        skep=found.get("skep", ""),
        runs="runs" in found,
        has_systemd="systemd" in found,
        has_apt="apt" in found,
        is_whole="end" in found,
    )


def _number(text: str, otherwise: int) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else otherwise


def problems(facts: PreflightFacts, before: float, after: float, *, has_package: bool) -> list[str]:
    """Return the reasons why the machine cannot become a node, each with a next step.

    ``before``, ``after``: this machine's time at the start and the end of the preflight.
    """
    return list(_problems(facts, before, after, has_package))


def _problems(facts: PreflightFacts, before: float, after: float, has_package: bool) -> Iterator[str]:
    if not facts.is_whole:
        yield "The check did not finish. Install a shell and awk on the machine."
        return
    if facts.uid != 0:
        yield "The user is not root. Use root@MACHINE."
    version = re.match(r"(\d+)\.(\d+)", facts.kernel)
    if version is None or (int(version[1]), int(version[2])) < KERNEL_MIN:
        yield f"Kernel {facts.kernel or 'unknown'} is too old. Use at least {KERNEL_MIN[0]}.{KERNEL_MIN[1]}."
    skew_s = max(before - 1 - facts.time_s, facts.time_s - after, 0.0)
    if skew_s > SKEW_S_MAX:
        yield f"The clock is wrong by {skew_s:.0f} s. Run timedatectl set-ntp true there."
    if facts.free_kib < FREE_KIB_MIN:
        yield f"Only {facts.free_kib >> 10} MiB are free in /var/lib. Free at least 1 GiB."
    if facts.taken and not facts.runs:
        yield f"Other programs use the ports {', '.join(map(str, facts.taken))}. Stop them."
    if facts.runs:
        return
    if not facts.skep and not has_package:
        yield "Skep is not installed. Install it with --package skep.deb."
    elif not facts.skep and not facts.has_apt:
        yield "The machine has no apt-get to install the package. Install Skep by other means."
    if not facts.has_systemd:
        yield "Skep is not running, and there is no systemd to start it. Start skep daemon there."
