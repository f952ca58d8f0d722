"""``swarm init --force-new-cluster`` on one manager: from a healthy store, and from what a damaged disk left."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.machines.daemon_rig import INIT, DaemonRig, wait_until

pytestmark = pytest.mark.timeout(180)

SECRETS = [f"s{number}" for number in range(20)]


def cluster_with_secrets(rig: DaemonRig) -> dict[str, Any]:
    """The cluster and its secrets, as they are shown."""
    rig.start()
    assert rig.ask("POST", "/swarm/init", INIT)[0] == 200
    for name in SECRETS:
        assert rig.ask("POST", "/secrets/create", {"Name": name, "Data": "eA=="})[0] == 201
    return shown(rig)


def shown(rig: DaemonRig) -> dict[str, Any]:
    swarm = rig.get("/swarm")[1]
    secrets = {one["Spec"]["Name"]: (one["ID"], one["Version"]) for one in rig.get("/secrets")[1]}
    return {"id": swarm["ID"], "tokens": swarm["JoinTokens"], "secrets": secrets, "version": swarm["Version"]}


def force(rig: DaemonRig, **more: Any) -> None:
    response = rig.ask(
        "POST", "/swarm/init", {"ListenAddr": "127.0.0.1:2377", "ForceNewCluster": True} | more
    )
    assert response[0] == 200, (response, rig.log.read_text())


def segments(rig: DaemonRig) -> list[Path]:
    return sorted((rig.data / "manager/etcd/data/member/wal").glob("*.wal"))


def stopped_error(rig: DaemonRig) -> str:
    """What the node says when its manager has given up."""
    return wait_until(
        lambda: rig.swarm()["LocalNodeState"] == "error" and str(rig.swarm()["Error"]),
        "the manager gives up",
        within_s=60,
    )


def test_a_forced_cluster_has_everything_and_another_incarnation(rig: DaemonRig) -> None:
    before = cluster_with_secrets(rig)
    node = rig.swarm()["NodeID"]
    force(rig)
    assert shown(rig) == before
    assert rig.swarm()["NodeID"] == node
    (only,) = rig.get("/nodes")[1]
    assert (only["ManagerStatus"]["Leader"], only["Status"]["State"]) == (True, "ready")
    assert not (rig.data / "manager/recovery.json").exists()
    assert not (rig.data / "manager/etcd/data.old").exists()
    assert rig.ask("POST", "/secrets/create", {"Name": "after", "Data": "eA=="})[0] == 201
    rig.stop()
    rig.start()
    wait_until(lambda: rig.get("/secrets")[0] == 200, "the manager serves")
    assert set(shown(rig)["secrets"]) == {*SECRETS, "after"}


def test_a_crash_in_the_middle_of_forcing_is_made_good_at_the_next_start(rig: DaemonRig) -> None:
    """The request is on the disk, and has not been executed yet."""
    before = cluster_with_secrets(rig)
    rig.kill_all()
    (rig.data / "manager/recovery.json").write_text('{"stage":"wanted"}')
    rig.start()
    wait_until(lambda: rig.get("/secrets")[0] == 200, "the manager serves")
    assert shown(rig) == before
    assert not (rig.data / "manager/recovery.json").exists()


@pytest.mark.parametrize(
    "damage",
    ["gone", pytest.param("torn", marks=pytest.mark.slow), pytest.param("emptied", marks=pytest.mark.slow)],
)
def test_a_damaged_log_is_named_and_the_database_is_the_way_back(rig: DaemonRig, damage: str) -> None:
    before = cluster_with_secrets(rig)
    rig.stop()
    for segment in segments(rig):
        content = segment.read_bytes()
        end = len(content.rstrip(b"\0"))
        if damage == "gone":
            segment.unlink()
        elif damage == "torn":
            place = end // 2
            torn = bytes(255 - byte for byte in content[place : place + 64])
            segment.write_bytes(content[:place] + torn + content[place + 64 :])
        else:
            segment.write_bytes(b"")
    rig.start()
    error = stopped_error(rig)
    assert "log is damaged" in error, error
    assert "docker swarm init --force-new-cluster" in error
    status, response = rig.get("/services")
    assert status == 503
    assert "log is damaged" in response["message"]
    force(rig)
    after = shown(rig)
    assert after == before


def test_a_damaged_database_is_named_and_only_a_backup_is_the_way_back(rig: DaemonRig) -> None:
    cluster_with_secrets(rig)
    rig.stop()
    database = rig.data / "manager/etcd/data/member/snap/db"
    database.write_bytes(b"\0" * 4096)
    rig.start()
    error = stopped_error(rig)
    assert "database is damaged" in error, error
    assert "skep restore" in error
    status, response = rig.ask(
        "POST", "/swarm/init", {"ListenAddr": "127.0.0.1:2377", "ForceNewCluster": True}
    )
    assert status == 503
    assert "restore a backup" in response["message"], response


@pytest.mark.slow
def test_another_clusters_store_is_refused(rig: DaemonRig, tmp_path: Path) -> None:
    cluster_with_secrets(rig)
    rig.stop()
    foreign = rig.data / "manager/etcd/data"
    kept = tmp_path / "data"
    shutil.copytree(foreign, kept)
    rig.start()
    wait_until(lambda: rig.get("/nodes")[0] == 200, "the manager serves")
    assert rig.ask("POST", "/swarm/leave?force=1")[0] == 200
    assert rig.ask("POST", "/swarm/init", INIT)[0] == 200
    rig.stop()
    shutil.rmtree(foreign)
    shutil.copytree(kept, foreign)
    rig.start()
    assert "another cluster" in stopped_error(rig)
