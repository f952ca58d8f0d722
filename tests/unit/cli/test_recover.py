"""What `skep cluster recover` shows before it does anything, and what it refuses."""

from typing import Any, cast

import pytest

from skep.api.client.client import ApiClient
from skep.cli.cluster.recover import StoredCluster, _read_kept, afterwards, check, lost, plan
from skep.errors import FailedPrecondition


def an_info(**swarm: Any) -> dict[str, Any]:
    return {
        "Name": "m1",
        "Swarm": {"NodeID": "m1", "LocalNodeState": "active", "ControlAvailable": True} | swarm,
    }


def a_quorum(*silent: str, managers: int = 3, has_leader: bool = False) -> dict[str, Any]:
    names = [f"m{number}" for number in range(1, managers + 1)]
    return {
        "HasLeader": has_leader,
        "Since": "2026-01-02T03:04:05Z",
        "Managers": [
            {
                "ID": name,
                "Hostname": name,
                "Addr": f"192.0.2.{name[1:]}:2377",
                "IsReachable": name not in silent,
                "UnreachableSeconds": 75.0 if name in silent else 0.0,
            }
            for name in names
        ],
    }


def shown(*args: Any) -> list[str]:
    return [f"{word} {text}" for word, text in plan(*args)]


def test_the_lost_managers_are_named_and_so_is_the_state_that_is_kept() -> None:
    info, quorum = an_info(), a_quorum("m2", "m3")
    check(info, quorum)
    lines = shown(info, quorum, StoredCluster(revision=1234, counts={"services": 4, "nodes": 5}))
    assert lines[:5] == [
        "NO LEADER 1 of 3 managers responds, 2 are needed",
        "here m1 (192.0.2.1:2377)",
        "LOST m2 (192.0.2.2:2377), no response for 1m 15s",
        "LOST m3 (192.0.2.3:2377), no response for 1m 15s",
        "kept revision 1234 of m1: 4 services, 5 nodes",
    ]
    assert not any(line.startswith("compare") for line in lines)
    assert lost(info, quorum) == ["m2", "m3"]
    assert "docker node demote m2 && docker node rm --force m2" in "".join(afterwards(["m2", "m3"]))


def test_another_manager_that_answers_may_have_more() -> None:
    lines = shown(an_info(), a_quorum("m3", "m4", "m5", managers=5), StoredCluster(revision=7))
    assert (
        "compare Also run it with --dry-run on m2. Recover on the manager with the highest revision." in lines
    )
    assert "responds m2 (192.0.2.2:2377)" in lines


@pytest.mark.parametrize(
    ("swarm", "quorum", "reason"),
    [
        ({}, a_quorum(has_leader=True), "has a leader, so there is nothing to recover"),
        ({}, a_quorum("m3"), "2 of 3 managers respond, which is enough"),
        (
            {"LocalNodeState": "inactive"},
            None,
            "not in a cluster. To restore one from a backup, run skep restore FILE",
        ),
        ({"LocalNodeState": "locked"}, None, "docker swarm unlock"),
        ({"ControlAvailable": False}, None, "a worker. Run the command on a manager"),
    ],
)
def test_what_needs_no_recovery_is_refused_with_the_next_step(swarm: Any, quorum: Any, reason: str) -> None:
    with pytest.raises(FailedPrecondition, match=reason):
        check(an_info(**swarm), quorum)


def test_a_manager_that_does_not_serve_is_recovered_from_its_disk() -> None:
    info = an_info(
        LocalNodeState="error",
        Error="the store's log is damaged",
        RemoteManagers=[{"Addr": "192.0.2.2:2377"}],
    )
    check(info, None)
    lines = shown(info, None, StoredCluster())
    assert lines[0] == "here m1 is not serving: the store's log is damaged"
    assert "192.0.2.2:2377" in lines[1]
    assert lost(info, None) == []


class Store:
    """A manager without a leader, which answers from its store."""

    async def get(self, path: str, **_: object) -> Any:
        drivers = ("bridge", "host", "null", "overlay", "overlay")
        return [{"Driver": driver} for driver in drivers] if path == "/networks" else [{}]


async def test_networks_that_every_node_has_are_not_among_those_of_the_store() -> None:
    kept = await _read_kept(cast("ApiClient", Store()), {"Revision": 7})
    assert kept.counts == {"services": 1, "tasks": 1, "nodes": 1, "networks": 2, "secrets": 1, "configs": 1}
