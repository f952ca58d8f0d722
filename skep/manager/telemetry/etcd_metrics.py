"""Selected metrics of etcd: disk latency, database size and leader changes.

The names are etcd's, which existing dashboards use.  Source: https://etcd.io/docs/v3.5/metrics/
"""

import re
from contextlib import suppress
from pathlib import Path
from typing import cast

from skep.api.client.client import ApiClient
from skep.api.telemetry.exposition import Kind, MetricFamily, Sample

ETCD = {
    "etcd_server_has_leader": "Whether a leader exists.",
    "etcd_server_is_leader": "Whether this member leads etcd.",
    "etcd_server_leader_changes_seen_total": "Changes of etcd's leader.",
    "etcd_server_proposals_pending": "Proposals that wait to be committed.",
    "etcd_server_proposals_failed_total": "Proposals that failed.",
    "etcd_server_slow_apply_total": "Slow applications of an entry.",
    "etcd_disk_wal_fsync_duration_seconds": "Duration of fsync of the log.",
    "etcd_disk_backend_commit_duration_seconds": "Duration of commits of the database.",
    "etcd_mvcc_db_total_size_in_bytes": "Size of the database.",
    "etcd_mvcc_db_total_size_in_use_in_bytes": "Size of the database that is in use.",
    "etcd_network_peer_round_trip_time_seconds": "Round trips to other members.",
}
"""Names and help texts of the exported metrics.  etcd has some hundred metrics."""
_TYPE = re.compile(r"# TYPE (\S+) (\S+)")
_SAMPLE = re.compile(r"([a-z_]+)(\{.*\})? (\S+)")
_SUFFIXES = ("", "_bucket", "_sum", "_count")


async def etcd_families(socket: Path) -> list[MetricFamily]:
    """Return the metric families of the etcd member at ``socket``.  Raises: Unavailable: no response."""
    async with ApiClient.local(socket, "etcd") as client:
        response = await client.send("GET", "/metrics", headers={"Accept-Encoding": "identity"})
    return chosen(response.body.decode(errors="replace")) if response.status == 200 else []


def chosen(page: str) -> list[MetricFamily]:
    """Return the metric families of ``ETCD`` found in a metrics page.  Malformed lines are skipped."""
    kinds: dict[str, str] = {}
    samples: dict[str, list[Sample]] = {name: [] for name in ETCD}
    suffixes = {f"{name}{suffix}": (name, suffix) for name in ETCD for suffix in _SUFFIXES}
    for line in page.splitlines():
        if found := _TYPE.fullmatch(line):
            kinds[found[1]] = found[2]
        elif (found := _SAMPLE.fullmatch(line)) and found[1] in suffixes:
            name, suffix = suffixes[found[1]]
            with suppress(ValueError):
                samples[name].append(Sample(found[2] or "", float(found[3]), suffix))
    return [
        MetricFamily(name, cast("Kind", kinds[name]), ETCD[name], found)
        for name, found in samples.items()
        if found and kinds.get(name) in ("counter", "gauge", "histogram")
    ]
