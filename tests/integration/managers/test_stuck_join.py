"""A manager that joins and never becomes a voter: the others are not affected."""

import subprocess

import pytest

from tests.support.machines.playground_rig import TestNode, a_playground, wait_until
from tests.support.managers.managers_rig import roles, wait_managers, write

PEER_PORT = 2378


def close_peer_port(node: TestNode) -> None:
    """Lose what goes between the stores of this manager and of the others; everything else passes."""
    for way in ("input", "output"):
        chain = f"chain inet stuck {way} {{ type filter hook {way} priority 0; }}"
        _nft(node, f"add table inet stuck; add {chain}; add rule inet stuck {way} tcp dport {PEER_PORT} drop")


def open_peer_port(node: TestNode) -> None:
    _nft(node, "delete table inet stuck")


def _nft(node: TestNode, rules: str) -> None:
    command = ["nsenter", f"--net={node.description['netns']}", "nft", rules]
    subprocess.run(command, capture_output=True, timeout=20, check=True)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_join_that_never_completes_costs_no_quorum_and_delays_no_other_join() -> None:
    with a_playground("stuck", managers=1) as cluster:
        for name in ("m2", "m3"):
            cluster.skep("add", "manager", name)
        m1, m2, m3 = map(cluster.node, ("m1", "m2", "m3"))
        token = m1.docker("swarm", "join-token", "-q", "manager").stdout.strip()
        address = f"{m1.description['addr']}:2377"
        close_peer_port(m2)
        said = m2.docker("swarm", "join", "--token", token, address, check=False)
        assert said.returncode != 0
        assert m2.docker("info", "--format", "{{.Swarm.LocalNodeState}}").stdout.strip() == "inactive"
        write(m1, "with-one-that-is-stuck")
        m3.docker("swarm", "join", "--token", token, address)
        wait_managers(m3, "m1", "m3")
        open_peer_port(m2)
        m2.docker("swarm", "join", "--token", token, address)
        wait_until(lambda: len([name for name, role in roles(m2).items() if role]) == 3, "three manage", 90)
        write(m2, "with-three")
