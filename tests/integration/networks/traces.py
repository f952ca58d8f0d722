"""What the networks of services leave on a node: counted before, and after the last of them is removed."""

import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import msgspec
from pyroute2 import NFCTSocket

from skep.model.networks.tables import NetworkTable
from tests.integration.networks.lab import in_place, remove_all
from tests.support.machines.playground_rig import TestCluster, TestNode, wait_until

_LISTINGS = {
    "links": "ip -o link",
    "addresses": "ip -o address",
    "routes": "ip route show table all",
    "routes of IPv6": "ip -6 route show table all",
    "rules of routes": "ip rule",
    "neighbors": "ip neighbor show nud permanent",
    "forwarding": "bridge fdb show",
    "rules": "nft list ruleset",
}
_PINS = ("overlays", "netns", "tables", "names", "runc", "bundles")
_PASSING = re.compile(
    r" (packets|bytes|expires|timeout) \S+|^\d+: |@if\d+| (state|lladdr) \S+|link-netns\S* \S+"
)
"""Counters, ages, and numbers that the kernel gave."""
_GATEWAY = re.compile(r"^skep-gw\b|\bdev skep-gw\b")
"""The node's own bridge, which stays; a port on it is something that is left."""
_CLOSED_WITHIN_S = 120
"""The kernel forgets connections that have ended after so long; what it keeps for longer it takes for open."""


def run_directory(node: TestNode) -> Path:
    """The node's ``/run/skep``, as its processes see it."""
    return Path(f"/proc/{node.description['pids'][0]}/root/run/skep")


def tables(node: TestNode) -> dict[str, NetworkTable]:
    """Network's name -> the table that the node's net process finds."""
    there = run_directory(node) / "tables"
    found = [
        msgspec.msgpack.decode(path.read_bytes(), type=NetworkTable)
        for path in there.iterdir()
        if path.suffix != ".new"
    ]
    return {table.head.name: table for table in found}


def traces(node: TestNode) -> Counter[str]:
    """Every line of what is there, with its kind."""
    found: Counter[str] = Counter()
    for kind, command in _LISTINGS.items():
        words = ["nsenter", f"--net={node.description['netns']}", *command.split()]
        said = subprocess.run(words, capture_output=True, text=True, timeout=30, check=True).stdout
        lines = (_PASSING.sub("", line).strip() for line in said.splitlines())
        found.update(f"{kind}: {line}" for line in lines if not _GATEWAY.search(line))
    for pins in _PINS:
        directory = run_directory(node) / pins
        found.update(f"{pins}: {path.name}" for path in (directory.iterdir() if directory.exists() else ()))
    found.update(f"connection: {one}" for one in in_place(Path(node.description["netns"]), _open_connections))
    return found


def _open_connections() -> Iterable[str]:
    """Tracked connections of the thread's namespace that do not end by themselves soon, loopback's left out."""
    with NFCTSocket() as tracking:
        for entry in tracking.dump():
            addresses = entry.get_attr("CTA_TUPLE_ORIG").get_attr("CTA_TUPLE_IP")
            source, target = (addresses.get_attr(f"CTA_IP_V4_{end}") for end in ("SRC", "DST"))
            if entry.get_attr("CTA_TIMEOUT") > _CLOSED_WITHIN_S and source and not source.startswith("127."):
                yield f"{source} {target}"


def all_traces(cluster: TestCluster) -> dict[str, Counter[str]]:
    """Of each node that is up."""
    return {
        one["name"]: traces(cluster.node(one["name"])) for one in cluster.description["nodes"] if one["pids"]
    }


def wait_no_more_than(cluster: TestCluster, before: dict[str, Counter[str]], within_s: float = 150) -> None:
    """Until nothing is on the nodes that was not there ``before``.

    The longest takes a namespace in which a client closed its connection to a server that was gone: the kernel keeps
    both until it has given up what it had still to send (tcp(7), ``tcp_orphan_retries``: a minute or two).
    """
    left: dict[str, Counter[str]] = {}

    def is_gone() -> bool:
        left.clear()
        left.update({name: found - before[name] for name, found in all_traces(cluster).items()})
        return not any(left.values())

    try:
        wait_until(is_gone, "nothing is left", within_s)
    except AssertionError:
        shown = {name: sorted(found)[:20] for name, found in left.items() if found}
        raise AssertionError(f"left after {within_s} s: {shown}") from None


def _wait_probed(cluster: TestCluster) -> None:
    """Until all nodes let each other's probes in, which has nothing to do with what is made later."""
    nodes = {one["addr"]: cluster.node(one["name"]) for one in cluster.description["nodes"] if one["pids"]}

    def lets_in(node: TestNode, others: Iterable[str]) -> bool:
        words = [
            "nsenter",
            f"--net={node.description['netns']}",
            *["nft", "list", "table", "inet", "skep_overlay"],
        ]
        said = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False).stdout
        return all(f"{other} . " in said for other in others)

    for address, node in nodes.items():
        wait_until(partial(lets_in, node, nodes.keys() - {address}), "probes are let in")


@contextmanager
def leaving_nothing(cluster: TestCluster) -> Iterator[None]:
    """What the block made is removed when it has ended well; then nothing of it may be left on any node."""
    _wait_probed(cluster)
    before = all_traces(cluster)
    yield
    remove_all(cluster.node("m1"))
    wait_no_more_than(cluster, before)
