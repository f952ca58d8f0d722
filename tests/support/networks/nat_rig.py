"""A playground whose second and third subnet are behind NAT, each behind another one.

Its first subnet has m1 and w3, w1 and w4 are in the second and w2 in the third.  Nodes behind NAT can open connections
to the first subnet and nowhere else, and the translation also changes their ports.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.machines.playground_rig import TestCluster, TestNode, a_playground, ready, wait_until
from tests.support.networks.distance import DEVICE, distant_subnets

OUTSIDE = {"101": "192.168.100.201", "102": "192.168.100.202"}
"""The address under which the nodes of a subnet are seen."""

RULES = """
table ip nat {
  chain leaving { type nat hook postrouting priority 100;
    ip saddr 192.168.101.0/24 ip daddr 192.168.100.0/24 snat to 192.168.100.201 fully-random
    ip saddr 192.168.102.0/24 ip daddr 192.168.100.0/24 snat to 192.168.100.202 fully-random
  }
  chain passing { type filter hook forward priority 0;
    ct state established,related accept
    iifname "br0" oifname { "br1", "br2" } drop
    iifname "br1" oifname "br2" drop
    iifname "br2" oifname "br1" drop
  }
}
"""

FORGET = "import pyroute2; pyroute2.NFCTSocket().flush()"

NARROW = """
table ip narrow {
  chain passing { type filter hook forward priority 1;
    tcp flags syn tcp option maxseg size set 1100
    ip length > LENGTH drop
  }
}
"""

# Packets come back from the device with the addresses that they get on their first way, so the rules are for that one.
FAR = f"""
table ip far {{
  chain returning {{ type filter hook prerouting priority -300; iifname "{DEVICE}" notrack; }}
  chain passing {{ type filter hook forward priority -1;
    ct state established,related accept
    iifname "br0" ip daddr {{ 192.168.101.0/24, 192.168.102.0/24 }} drop
    iifname "br1" ip daddr 192.168.102.0/24 drop
    iifname "br2" ip daddr 192.168.101.0/24 drop
  }}
}}
"""


@contextmanager
def nodes_behind_nat(name: str) -> Iterator[TestCluster]:
    """Run the playground.  The workers join through the NAT."""
    with a_playground(name, managers=1, subnets=3) as cluster:
        switch = f"skep-{cluster.name}-net"
        for address in OUTSIDE.values():
            _run("ip", "-n", switch, "addr", "add", f"{address}/24", "dev", "br0")
        _in_switch(cluster, "nft", "-f", "-", stdin=RULES)
        m1 = cluster.node("m1")
        token = m1.docker("swarm", "join-token", "-q", "worker").stdout.strip()
        workers = ("w1", "w2", "w3", "w4")
        for worker in workers:
            cluster.skep("add", "worker", worker)
            address = f"{m1.description['addr']}:2377"
            cluster.node(worker).docker("swarm", "join", "--token", token, address)
        wait_until(lambda: ready(m1) == {"m1", *workers}, "all nodes are ready")
        yield cluster


def change_address(cluster: TestCluster, before: str, after: str) -> None:
    """Give a NAT another public address.  It forgets its connections, as a router does that restarts."""
    switch = f"skep-{cluster.name}-net"
    _run("ip", "-n", switch, "addr", "add", f"{after}/24", "dev", "br0")
    rules = RULES.replace(before, after)
    _in_switch(cluster, "nft", "-f", "-", stdin=f"delete table ip nat\n{rules}")
    _run("ip", "-n", switch, "addr", "del", f"{before}/24", "dev", "br0")
    _in_switch(cluster, sys.executable, "-c", FORGET)


@contextmanager
def narrow_ways(cluster: TestCluster, length: int) -> Iterator[None]:
    """Drop larger packets between the subnets without an answer, while the block runs.

    TCP connections get a segment size that fits, as routers of providers with a smaller MTU set it.
    """
    _in_switch(cluster, "nft", "-f", "-", stdin=NARROW.replace("LENGTH", str(length)))
    try:
        yield
    finally:
        _in_switch(cluster, "nft", "delete", "table", "ip", "narrow")


@contextmanager
def far_apart(cluster: TestCluster, *, delay_ms: float, loss_percent: float) -> Iterator[None]:
    """Delay and lose packets between the subnets, in each direction, while the block runs."""
    _in_switch(cluster, "nft", "-f", "-", stdin=FAR)
    try:
        bridges = ("br0", "br1", "br2")
        switch = f"skep-{cluster.name}-net"
        with distant_subnets(switch, delay_ms=delay_ms, loss_percent=loss_percent, bridges=bridges):
            # Translated packets come back with an address of the switch itself.
            _in_switch(cluster, "sysctl", "-qw", f"net.ipv4.conf.{DEVICE}.accept_local=1")
            _in_switch(cluster, sys.executable, "-c", FORGET)
            yield
    finally:
        _in_switch(cluster, "nft", "delete", "table", "ip", "far")
        _in_switch(cluster, sys.executable, "-c", FORGET)


def in_network_of(node: TestNode, *command: str) -> str:
    """Run a command in the node's network namespace."""
    return _run("nsenter", f"--net={node.description['netns']}", *command)


def _in_switch(cluster: TestCluster, *command: str, stdin: str | None = None) -> str:
    return _run("nsenter", f"--net=/run/netns/skep-{cluster.name}-net", *command, stdin=stdin)


def _run(*command: str, stdin: str | None = None) -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout
