"""The condition of a node whose encrypted networks do not reach every node; what an earlier version left."""

import asyncio
from pathlib import Path

from skep.daemon import end_forwarder
from skep.dataplane.plan.wireguard import plan_of
from skep.dataplane.wireguard.tunnels import unreachable
from skep.linux.detached import identify, write_pid_file
from skep.model.values.ids import NodeId
from skep.paths import Paths
from tests.support.encryption.wireguard import a_pair, a_secure_table

OWN, THEIRS = a_pair(1), a_pair(2)


def test_nodes_of_an_earlier_version_are_named() -> None:
    """They publish no key: nothing is exchanged with them until they are upgraded."""
    table = a_secure_table({"n1": (OWN,), "n2": (), "n3": (THEIRS,)})
    assert unreachable(plan_of(NodeId("n1"), (OWN,), [table])) == (
        "encrypted networks exchange nothing with node n2, without a WireGuard key: "
        "upgrade them, or see there why they cannot encrypt"
    )
    many = a_secure_table({"n1": (OWN,), **{f"n{number}": () for number in range(2, 9)}})
    assert "node n2, node n3, node n4 and 4 more" in unreachable(plan_of(NodeId("n1"), (OWN,), [many]))


def test_nodes_with_the_same_key_are_named_and_a_network_that_is_well_says_nothing() -> None:
    table = a_secure_table({"n1": (OWN,), "n2": (THEIRS,), "n3": (THEIRS,)})
    assert "that several nodes publish: node n2, node n3" in unreachable(
        plan_of(NodeId("n1"), (OWN,), [table])
    )
    well = a_secure_table({"n1": (OWN,), "n2": (THEIRS,)})
    assert unreachable(plan_of(NodeId("n1"), (OWN,), [well])) == ""


async def test_the_forwarder_of_an_earlier_version_is_ended_with_what_it_left(tmp_path: Path) -> None:
    paths = Paths(tmp_path / "data", tmp_path / "run")
    paths.pid_file("forwarder").parent.mkdir(parents=True)
    forwarder = await asyncio.create_subprocess_exec("sleep", "600")
    this = identify(forwarder.pid, "0.0.9")
    assert this is not None
    write_pid_file(paths.pid_file("forwarder"), this)
    (paths.run / "forwarder.plan").write_bytes(b"keys")
    await end_forwarder(paths)
    assert await forwarder.wait() == -15
    assert not (paths.run / "forwarder.plan").exists()
    await end_forwarder(paths)  # harmless when there is none
