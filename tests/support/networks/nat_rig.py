"""A playground whose second and third subnet are behind NAT, each behind another one.

Its first subnet has m1 and w3, w1 and w4 are in the second and w2 in the third.  Nodes behind NAT can open connections
to the first subnet and nowhere else, and the translation also changes their ports.
"""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.machines.playground_rig import TestCluster, TestNode, a_playground, ready, wait_until

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


@contextmanager
def nodes_behind_nat(name: str) -> Iterator[TestCluster]:
    """Run the playground.  The workers join through the NAT."""
    with a_playground(name, managers=1, subnets=3) as cluster:
        switch = f"skep-{cluster.name}-net"
        for address in OUTSIDE.values():
            _run("ip", "-n", switch, "addr", "add", f"{address}/24", "dev", "br0")
        _run("nsenter", f"--net=/run/netns/{switch}", "nft", "-f", "-", stdin=RULES)
        m1 = cluster.node("m1")
        token = m1.docker("swarm", "join-token", "-q", "worker").stdout.strip()
        workers = ("w1", "w2", "w3", "w4")
        for worker in workers:
            cluster.skep("add", "worker", worker)
            address = f"{m1.description['addr']}:2377"
            cluster.node(worker).docker("swarm", "join", "--token", token, address)
        wait_until(lambda: ready(m1) == {"m1", *workers}, "all nodes are ready")
        yield cluster


def in_network_of(node: TestNode, *command: str) -> str:
    """Run a command in the node's network namespace."""
    return _run("nsenter", f"--net={node.description['netns']}", *command)


def _run(*command: str, stdin: str | None = None) -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout
