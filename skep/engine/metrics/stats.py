"""A container's resource usage, in the form of ``GET /containers/{id}/stats``.

This module makes one sample.  The caller keeps the previous sample for ``precpu_stats``, from which the docker command
computes the difference.
Source: moby, daemon/stats_unix.go, which also maps the fields of cgroup v1 and v2 to the same names.
"""

import errno
import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from skep.engine.confinement.cgroups import Cgroups
from skep.engine.containers.container import Container
from skep.errors import Unavailable, reason_of
from skep.model.values.times import ZERO_TIME, Timestamp, timestamp

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_NS_PER_US = 1000
"""cgroup v2 has microseconds where Docker's API has nanoseconds."""


class CPUUsage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Processor time in nanoseconds.  ``percpu_usage`` exists only on cgroup v1."""

    total_usage: int = msgspec.field(default_factory=int)
    percpu_usage: tuple[int, ...] = ()
    usage_in_kernelmode: int = msgspec.field(default_factory=int)
    usage_in_usermode: int = msgspec.field(default_factory=int)


class Throttling(msgspec.Struct, frozen=True, kw_only=True):
    """Number of periods of the CPU limit, number of periods that reached it, and nanoseconds of waiting because
    of it.
    """

    periods: int = 0
    throttled_periods: int = 0
    throttled_time: int = 0


class CPUStats(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Processor statistics.  ``system_cpu_usage`` is the busy time of all processors of the node in nanoseconds."""

    cpu_usage: CPUUsage = msgspec.field(default_factory=CPUUsage)
    system_cpu_usage: int = 0
    online_cpus: int = 0
    throttling_data: Throttling = msgspec.field(default_factory=Throttling)


class MemoryStats(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Memory statistics in bytes.  ``stats`` is the kernel's own list."""

    usage: int = 0
    max_usage: int = 0
    stats: Mapping[str, int] = {}
    failcnt: int = 0
    limit: int = 0


class PidsStats(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Current number of processes and threads, and its limit."""

    current: int = 0
    limit: int = 0


class NetworkStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counters of one interface, as the container sees it."""

    rx_bytes: int = 0
    rx_packets: int = 0
    rx_errors: int = 0
    rx_dropped: int = 0
    tx_bytes: int = 0
    tx_packets: int = 0
    tx_errors: int = 0
    tx_dropped: int = 0


class BlkioEntry(msgspec.Struct, frozen=True):
    """One counter of one block device.  ``op`` is Read, Write, ..."""

    major: int
    minor: int
    op: str
    value: int


class BlkioStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counters of block devices."""

    io_service_bytes_recursive: tuple[BlkioEntry, ...] | None = None
    io_serviced_recursive: tuple[BlkioEntry, ...] | None = None


class Stats(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One sample, with the API's field names."""

    read: Timestamp
    preread: Timestamp = msgspec.field(default_factory=lambda: ZERO_TIME)
    pids_stats: PidsStats = msgspec.field(default_factory=PidsStats)
    blkio_stats: BlkioStats = msgspec.field(default_factory=BlkioStats)
    num_procs: int = msgspec.field(default_factory=int)
    storage_stats: Mapping[str, int] = msgspec.field(default_factory=dict)
    cpu_stats: CPUStats = msgspec.field(default_factory=CPUStats)
    precpu_stats: CPUStats = msgspec.field(default_factory=CPUStats)
    memory_stats: MemoryStats = msgspec.field(default_factory=MemoryStats)
    name: str = ""
    id: str = ""
    networks: Mapping[str, NetworkStats] = {}
    os_type: str = ""
    """``linux`` since API 1.52.  Not set for older versions."""


def sample(container: Container, cgroups: Cgroups, now_ns: int) -> Stats:
    """Return the usage of ``container`` so far, or only its names if it does not run.

    Raises: Unavailable: the files cannot be read.  Zeros would look like real values.
    """
    if not container.is_running:
        return Stats(read=ZERO_TIME, name=f"/{container.name}", id=container.id)
    try:
        return _sample(container, cgroups, now_ns)
    except OSError as error:
        raise Unavailable(f"statistics of container {container.name}: {reason_of(error)}") from error


def _sample(container: Container, cgroups: Cgroups, now_ns: int) -> Stats:
    files = _Files(container, cgroups)
    cpu = _cpu_v2(files) if cgroups.is_v2 else _cpu_v1(files)
    return Stats(
        read=timestamp(now_ns),
        name=f"/{container.name}",
        id=container.id,
        pids_stats=PidsStats(
            current=files.number("pids", "pids.current"), limit=files.number("pids", "pids.max")
        ),
        blkio_stats=_blkio_v2(files) if cgroups.is_v2 else _blkio_v1(files),
        cpu_stats=cpu,
        memory_stats=_memory_v2(files) if cgroups.is_v2 else _memory_v1(files),
        networks=network_counters(_read(Path(f"/proc/{container.pid}/net/dev"))),
    )


def cpu_and_memory(container: Container, cgroups: Cgroups) -> tuple[int, int] | None:
    """Return the processor time so far in nanoseconds, and the used memory in bytes without reclaimable caches.

    Reads only the three files that are needed for that.  Returns None if the container has ended.  Raises: OSError.
    """
    files = _Files(container, cgroups)
    if cgroups.is_v2:
        cpu_ns = files.table("cpu", "cpu.stat").get("usage_usec", 0) * _NS_PER_US
        used, cache = files.text("memory", "memory.current").strip(), "inactive_file"
    else:
        cpu_ns = files.number("cpuacct", "cpuacct.usage")
        used, cache = files.text("memory", "memory.usage_in_bytes").strip(), "total_inactive_file"
    if not cpu_ns or not used.isdigit():
        return None
    return cpu_ns, max(int(used) - files.table("memory", "memory.stat").get(cache, 0), 0)


class _Files:
    """Files of one container's groups.  A missing file reads as empty."""

    def __init__(self, container: Container, cgroups: Cgroups) -> None:
        self._container = container
        self._cgroups = cgroups

    def text(self, controller: str, name: str) -> str:
        directory = self._cgroups.directory(self._container, controller)
        return "" if directory is None else _read(directory / name)

    def number(self, controller: str, name: str) -> int:
        text = self.text(controller, name).strip()
        return int(text) if text.isdigit() else 0

    def table(self, controller: str, name: str) -> dict[str, int]:
        """Return lines of ``key value`` as a mapping."""
        return flat_keyed(self.text(controller, name))


def flat_keyed(text: str) -> dict[str, int]:
    """Parse a "flat keyed" file of the kernel: one ``key number`` per line."""
    pairs = (line.split() for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def network_counters(text: str) -> dict[str, NetworkStats]:
    """Parse /proc/PID/net/dev, without the loopback device."""
    found = {}
    for line in text.splitlines()[2:]:
        name, _, counters = line.partition(":")
        values = [int(word) for word in counters.split()]
        if name.strip() != "lo" and len(values) >= 12:
            found[name.strip()] = NetworkStats(
                rx_bytes=values[0],
                rx_packets=values[1],
                rx_errors=values[2],
                rx_dropped=values[3],
                tx_bytes=values[8],
                tx_packets=values[9],
                tx_errors=values[10],
                tx_dropped=values[11],
            )
    return found


def _cpu_v1(files: _Files) -> CPUStats:
    split = files.table("cpuacct", "cpuacct.stat")  # in ticks
    throttled = files.table("cpu", "cpu.stat")
    tick_ns = 1_000_000_000 // _TICKS_PER_SECOND
    return CPUStats(
        cpu_usage=CPUUsage(
            total_usage=files.number("cpuacct", "cpuacct.usage"),
            percpu_usage=tuple(map(int, files.text("cpuacct", "cpuacct.usage_percpu").split())),
            usage_in_kernelmode=split.get("system", 0) * tick_ns,
            usage_in_usermode=split.get("user", 0) * tick_ns,
        ),
        system_cpu_usage=_system_cpu_ns(),
        online_cpus=os.cpu_count() or 1,
        throttling_data=Throttling(
            periods=throttled.get("nr_periods", 0),
            throttled_periods=throttled.get("nr_throttled", 0),
            throttled_time=throttled.get("throttled_time", 0),
        ),
    )


def _cpu_v2(files: _Files) -> CPUStats:
    table = files.table("cpu", "cpu.stat")
    return CPUStats(
        cpu_usage=CPUUsage(
            total_usage=table.get("usage_usec", 0) * _NS_PER_US,
            usage_in_kernelmode=table.get("system_usec", 0) * _NS_PER_US,
            usage_in_usermode=table.get("user_usec", 0) * _NS_PER_US,
        ),
        system_cpu_usage=_system_cpu_ns(),
        online_cpus=os.cpu_count() or 1,
        throttling_data=Throttling(
            periods=table.get("nr_periods", 0),
            throttled_periods=table.get("nr_throttled", 0),
            throttled_time=table.get("throttled_usec", 0) * _NS_PER_US,
        ),
    )


def _memory_v1(files: _Files) -> MemoryStats:
    return MemoryStats(
        usage=files.number("memory", "memory.usage_in_bytes"),
        max_usage=files.number("memory", "memory.max_usage_in_bytes"),
        stats=files.table("memory", "memory.stat"),
        failcnt=files.number("memory", "memory.failcnt"),
        limit=_at_most_the_node(files.number("memory", "memory.limit_in_bytes")),
    )


def _memory_v2(files: _Files) -> MemoryStats:
    return MemoryStats(
        usage=files.number("memory", "memory.current"),
        stats=files.table("memory", "memory.stat"),
        failcnt=files.table("memory", "memory.events").get("oom", 0),
        limit=_at_most_the_node(files.number("memory", "memory.max")),
    )


def _blkio_v1(files: _Files) -> BlkioStats:
    return BlkioStats(
        io_service_bytes_recursive=_blkio_entries(
            files.text("blkio", "blkio.throttle.io_service_bytes_recursive")
        ),
        io_serviced_recursive=_blkio_entries(files.text("blkio", "blkio.throttle.io_serviced_recursive")),
    )


def _blkio_entries(text: str) -> tuple[BlkioEntry, ...]:
    entries = []
    for line in text.splitlines():
        words = line.split()
        if len(words) == 3 and ":" in words[0]:
            major, _, minor = words[0].partition(":")
            entries.append(BlkioEntry(int(major), int(minor), words[1], int(words[2])))
    return tuple(entries)


def _blkio_v2(files: _Files) -> BlkioStats:
    sizes = []
    for line in files.text("io", "io.stat").splitlines():
        device, *pairs = line.split()
        major, _, minor = device.partition(":")
        values = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        for key, operation in (("rbytes", "read"), ("wbytes", "write")):
            if major.isdigit() and minor.isdigit() and values.get(key, "").isdigit():
                sizes.append(BlkioEntry(int(major), int(minor), operation, int(values[key])))
    return BlkioStats(io_service_bytes_recursive=tuple(sizes))


def _system_cpu_ns() -> int:
    """Return user, nice, system, idle, iowait, irq and softirq time of the whole node in nanoseconds."""
    first = _read(Path("/proc/stat")).partition("\n")[0].split()
    return sum(map(int, first[1:8])) * (1_000_000_000 // _TICKS_PER_SECOND)


def _at_most_the_node(limit: int) -> int:
    """Return the memory limit, but at most the node's memory, as in Docker.

    Without a limit, the kernel reports a huge number (v1) or ``max`` (v2).
    """
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(limit, total) if limit else total


def _read(path: Path) -> str:
    """Return a kernel file's text, or "" if it does not exist.  Raises: OSError: it cannot be read at the moment."""
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    except OSError as error:
        if error.errno == errno.ENODEV:  # the container's group is being removed
            return ""
        raise
