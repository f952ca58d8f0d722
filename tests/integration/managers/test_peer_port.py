"""The port where managers reach each other's etcd: taken on one machine, closed between two."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.integration.test_path_failures import blocked, doctor, failing, in_network_of, message
from tests.support.machines.playground_rig import TestNode, a_playground, wait_until
from tests.support.managers.managers_rig import wait_managers, write

LISTENER = """
import socket, time
taken = socket.create_server(("", 2378))
print("listening", flush=True)
time.sleep(600)
"""


def peer_addr(node: TestNode) -> str:
    """As ``/info`` says; docker's own type knows no such field."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(node.socket.removeprefix("unix://"))
        connection.sendall(b"GET /v1.41/info HTTP/1.0\r\nHost: skep\r\n\r\n")
        with connection.makefile("rb") as response:
            body = response.read().partition(b"\r\n\r\n")[2]
    return str(json.loads(body)["Swarm"]["PeerAddr"])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_manager_whose_peer_port_is_taken_uses_another_one_and_says_so() -> None:
    with a_playground("peerport", managers=1) as cluster:
        for name in ("m2", "m3"):
            cluster.skep("add", "manager", name)
        m1, m2, m3 = map(cluster.node, ("m1", "m2", "m3"))
        addresses = [node.description["addr"] for node in (m1, m2)]
        command = ["nsenter", f"--net={m2.description['netns']}", sys.executable, "-c", LISTENER]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
            try:
                assert other.stdout is not None
                assert other.stdout.readline().strip() == b"listening"
                token = m1.docker("swarm", "join-token", "-q", "manager").stdout.strip()
                m2.docker("swarm", "join", "--token", token, f"{addresses[0]}:2377")
                m3.docker("swarm", "join", "--token", token, f"{addresses[0]}:2377")
                wait_managers(m1, "m1", "m2", "m3")
                write(m2, "with-three")
                assert [peer_addr(m1), peer_addr(m2)] == [f"{addresses[0]}:2378", f"{addresses[1]}:12377"]
                assert "TCP port 12377" in m2.docker("info").stderr
                assert "TCP port" not in m1.docker("info").stderr
                assert failing(json.loads(doctor(m1, "--json").stdout)) == set()
            finally:
                other.kill()
        with blocked(m2, m3, "12377/tcp"):  # neither of them leads
            wait_until(
                lambda: ("m3", "m2", "12377/tcp") in failing(json.loads(doctor(m1, "--json").stdout)),
                "named",
                60,
            )
            wait_until(lambda: "m2 12377/tcp (etcd)" in message(m1, "m3"), "its status says it", 60)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_peer_port_that_is_closed_on_the_way_out_or_on_the_way_in_is_named() -> None:
    with a_playground("peerways", managers=1) as cluster:
        cluster.skep("add", "manager", "m2")
        m1, m2 = map(cluster.node, ("m1", "m2"))
        addresses = [node.description["addr"] for node in (m1, m2)]
        token = m1.docker("swarm", "join-token", "-q", "manager").stdout.strip()

        with lost(m2, "output", "tcp dport 2378"):
            refused = m2.docker("swarm", "join", "--token", token, f"{addresses[0]}:2377", check=False)
        assert f"this manager cannot reach {addresses[0]}:2378 (etcd's peers): no response" in refused.stderr
        # The etcd that comes in opens what it needs; the way in is missed when it has to send a snapshot, say.
        with lost(m2, "input", "tcp dport 2378"):
            m2.docker("swarm", "join", "--token", token, f"{addresses[0]}:2377")
            wait_managers(m1, "m1", "m2")
            wait_until(
                lambda: ("m1", "m2", "2378/tcp") in failing(json.loads(doctor(m1, "--json").stdout)),
                "named",
                60,
            )


@contextmanager
def lost(node: TestNode, chain: str, packets: str) -> Iterator[None]:
    """``packets`` (nft) that come in or go out (``chain``: input, output) are lost."""
    rules = f"table inet lost {{ chain lost {{ type filter hook {chain} priority -400; {packets} drop; }}; }}"
    in_network_of(node, "nft", "-f", "-", stdin=rules)
    try:
        yield
    finally:
        in_network_of(node, "nft", "delete", "table", "inet", "lost")
