"""Metrics of each process for Prometheus: processor time, memory, file descriptors, event loop lag."""

import os
import time
from contextlib import suppress
from pathlib import Path

from skep.aio.event_loop.loop_lag import LoopLag
from skep.api.telemetry.exposition import MetricFamily, Sample, buckets, label_text

_PAGE = os.sysconf("SC_PAGE_SIZE")


def process_families(process: str, lag: LoopLag | None = None) -> list[MetricFamily]:
    """Return the metrics of this process.

    Args:
        process: ``node`` or ``manager``.  It is a label of the metrics, because both processes share one metrics page.
    """
    labels = label_text({"process": process})
    families = [
        MetricFamily(
            "process_cpu_seconds_total",
            "counter",
            "Processor time used.",
            [Sample(labels, time.process_time())],
        ),
        MetricFamily(
            "process_resident_memory_bytes", "gauge", "Resident memory.", [Sample(labels, _resident())]
        ),
        MetricFamily("process_open_fds", "gauge", "Open file descriptors.", [Sample(labels, _descriptors())]),
    ]
    if lag is not None:
        seen = lag.seen()
        found = buckets(
            [ms / 1000 for ms in seen.bounds_ms], seen.counts, seen.ms_sum / 1000, {"process": process}
        )
        families.append(
            MetricFamily(
                "skep_event_loop_lag_seconds", "histogram", "By how much the event loop ran late.", found
            )
        )
    return families


def _resident() -> int:
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE
    return 0


def _descriptors() -> int:
    with suppress(OSError):
        return len(os.listdir("/proc/self/fd"))
    return 0
