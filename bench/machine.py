"""Resource use of the machine and of a node's daemons.

Memory is PSS: pages shared by several processes are divided among them, so that sums are fair both for a forked Python
and for a Go daemon.  A node's daemons are all processes in its namespaces that do not belong to a container (a process
in another PID namespace does).
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
MONITORS = ("conmon", "containerd-shim")
BUSY = 0.25
"""If a larger share of the machine (0 to 1) is busy when a pair begins, the pair is repeated."""


def busy_s() -> float:
    """Return the processor seconds of this machine since boot."""
    fields = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / _TICKS_PER_S


def noise(window_s: float = 0.5) -> float:
    """Return the share of the machine (0 to 1) that is busy while this process waits."""
    before, began = busy_s(), time.monotonic()
    time.sleep(window_s)
    return (busy_s() - before) / (time.monotonic() - began) / (os.cpu_count() or 1)


def is_kept(before: float, tried: int, kept: int, wanted: int) -> bool:
    """Return whether the pair number ``tried`` (from 1) counts.

    ``before`` is the share of the machine that was busy before the pair.

    ``kept`` is the number of pairs that count already, of ``wanted``.  At most ``wanted`` pairs are repeated.
    """
    repeated = tried - 1 - kept
    return before <= BUSY or repeated >= wanted


def quiet(within_s: float = 3.0, most: float = 0.1) -> float:
    """Wait up to ``within_s`` until the machine is idle, and return how busy it is."""
    until = time.monotonic() + within_s
    while (busy := noise()) > most and time.monotonic() < until:
        time.sleep(1)
    return busy


def resident_mib() -> float:
    """Return the current resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def processor_s(pid: int) -> float:
    """Return the processor time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def thread_use(pid: int) -> tuple[float, int]:
    """Return the processor time and the number of wakeups of a process, summed over its threads.

    The scheduler counts this time in nanoseconds.  ``processor_s`` is too coarse for a process that is nearly idle.
    """
    seconds, wakeups = 0.0, 0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        try:
            seconds += int((thread / "schedstat").read_text().split()[0]) / 1e9
            words = (thread / "status").read_text().split()
        except (FileNotFoundError, ProcessLookupError):  # the thread has ended meanwhile
            continue
        wakeups += int(words[words.index("voluntary_ctxt_switches:") + 1])
    return seconds, wakeups


def group_processor_s(cgroup: str) -> float:
    """Return the processor time of a control group and of those below it.  Some may be deleted meanwhile."""
    top = Path("/sys/fs/cgroup")
    v1 = top / "cpuacct" / cgroup / "cpuacct.usage"
    if v1.exists():
        return int(v1.read_text()) / 1e9
    words = (top / cgroup / "cpu.stat").read_text().split()
    return int(words[words.index("usage_usec") + 1]) / 1e6


def _namespace(pid: str, kind: str) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/{kind}")
    except OSError:
        return None


def daemons(netns: Path, root_pids: list[int]) -> Iterator[int]:
    """Yield the node's processes outside of containers: in its network namespace, in the host's PID namespace."""
    inode = f"net:[{netns.stat().st_ino}]"
    host_pids = _namespace("self", "pid")
    roots = {str(pid) for pid in root_pids}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        inside = _namespace(entry, "net") == inode or entry in roots
        if inside and _namespace(entry, "pid") == host_pids:
            yield int(entry)


def memory_mib(netns: Path, root_pids: list[int]) -> dict[str, float]:
    """Return PSS in MiB by kind of process: ``daemons``, ``monitors`` (conmon, shims), and each command name."""
    sums: dict[str, float] = {"daemons": 0.0, "monitors": 0.0}
    for pid in daemons(netns, root_pids):
        try:
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        pss_kib = next((int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")), 0)
        kind = "monitors" if name.startswith(MONITORS) else "daemons"
        sums[kind] += pss_kib / 1024
        sums[f"process {name}"] = sums.get(f"process {name}", 0.0) + pss_kib / 1024
    return sums
