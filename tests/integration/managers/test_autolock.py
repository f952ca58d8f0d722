"""Autolock among three managers: a rotated key reaches one that was away; the others go on without it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.machines.playground_rig import TestCluster, TestNode, a_playground, wait_until
from tests.support.managers.managers_rig import secrets, wait_managers, write

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]


@pytest.fixture
def own() -> Iterator[TestCluster]:
    with a_playground("lock", managers=3) as cluster:
        yield cluster


def lock_key(node: TestNode) -> bytes:
    """The locked lock key on this node's disk; empty while there is none."""
    path = Path(node.description["state_dir"]) / "manager/keys/lock.key"
    return path.read_bytes() if path.exists() else b""


def state(node: TestNode) -> str:
    done = node.docker("info", "--format", "{{.Swarm.LocalNodeState}}", check=False)
    return done.stdout.strip()


def unlock_key(node: TestNode) -> str:
    return node.docker("swarm", "unlock-key", "--quiet").stdout.strip()


def test_a_rotated_key_reaches_a_manager_that_was_away(own: TestCluster) -> None:
    m1, m2, m3 = (own.node(name) for name in ("m1", "m2", "m3"))
    m1.docker("swarm", "update", "--autolock=true")
    old = unlock_key(m1)
    wait_until(lambda: all(map(lock_key, (m1, m2, m3))), "every disk is locked", within_s=60)
    own.skep("kill", "m3")
    before = lock_key(m3)
    rotated = m1.docker("swarm", "unlock-key", "--rotate", "--quiet").stdout.strip()
    assert rotated not in ("", old)
    write(m1, "meanwhile")

    own.skep("start", "m3")
    assert wait_until(lambda: state(m3), "m3 answers") == "locked"
    refused = m3.docker("swarm", "unlock", stdin=f"{rotated}\n", check=False)
    assert "invalid key provided" in refused.stderr
    m3.docker("swarm", "unlock", stdin=f"{old}\n")
    wait_managers(m1, "m1", "m2", "m3")
    assert "meanwhile" in secrets(m3)
    wait_until(lambda: lock_key(m3) != before, "m3 has taken the new key over")

    own.skep("kill", "m3")
    own.skep("start", "m3")
    assert wait_until(lambda: state(m3), "m3 answers") == "locked"
    refused = m3.docker("swarm", "unlock", stdin=f"{old}\n", check=False)
    assert "invalid key provided" in refused.stderr
    m3.docker("swarm", "unlock", stdin=f"{rotated}\n")
    wait_managers(m1, "m1", "m2", "m3")
