"""Autolock: what a manager does that was stopped, or lost power, while its cluster wants it locked."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from skep.node.cluster.swarm_info import LEAVING_LOCKED, LOCKED
from tests.support.machines.daemon_rig import INIT, DaemonRig, wait_until

pytestmark = pytest.mark.timeout(120)

SPEC: dict[str, Any] = {"EncryptionConfig": {"AutoLockManagers": True}}


def init(rig: DaemonRig, *, is_locked: bool = True) -> str:
    """Found a cluster; its unlock key."""
    rig.start()
    response = rig.ask(
        "POST", "/swarm/init", INIT | ({"Spec": SPEC, "AutoLockManagers": True} if is_locked else {})
    )
    assert response[0] == 200, response
    return unlock_key(rig)


def unlock_key(rig: DaemonRig) -> str:
    status, response = rig.get("/swarm/unlockkey")
    assert status == 200
    return str(response["UnlockKey"])


def update(rig: DaemonRig, *, is_locked: bool, query: str = "") -> None:
    swarm = rig.get("/swarm")[1]
    spec = swarm["Spec"] | {"EncryptionConfig": {"AutoLockManagers": is_locked}}
    response = rig.ask("POST", f"/swarm/update?version={swarm['Version']['Index']}{query}", spec)
    assert response[0] == 200, response


def power_loss(rig: DaemonRig) -> None:
    """What lies on tmpfs is gone with the processes."""
    rig.kill_all()
    shutil.rmtree(rig.run)


def has_clear_keys(data: Path) -> bool:
    """Whether a thief of the disk could use the node's key."""
    return b"PRIVATE KEY" in (data / "certificates/swarm-node.key").read_bytes() or (
        len((data / "manager/keys/wrapping.key").read_bytes()) == 32
    )


def wait_locked_on_disk(rig: DaemonRig) -> None:
    wait_until(lambda: not has_clear_keys(rig.data), "the keys on disk are locked")


def test_a_stopped_manager_needs_the_unlock_key_and_says_so_in_dockers_words(rig: DaemonRig) -> None:
    key = init(rig)
    assert key.startswith("SWMKEY-1-")
    wait_locked_on_disk(rig)
    rig.stop()
    rig.start()
    swarm = rig.swarm()
    assert (swarm["LocalNodeState"], swarm["Error"], swarm["NodeID"]) == ("locked", LOCKED, "")
    for method, path in (
        ("GET", "/nodes"),
        ("GET", "/swarm"),
        ("GET", "/swarm/unlockkey"),
        ("GET", "/services"),
    ):
        assert rig.ask(method, path) == (503, {"message": LOCKED})
    assert rig.pid_of("manager") is None
    assert rig.ask("POST", "/swarm/leave") == (503, {"message": LEAVING_LOCKED})
    bad = rig.ask("POST", "/swarm/unlock", {"UnlockKey": "SWMTKN-1-x"})
    assert bad == (400, {"message": "invalid key string"})
    wrong = rig.ask("POST", "/swarm/unlock", {"UnlockKey": "SWMKEY-1-" + "A" * 43})
    assert wrong == (401, {"message": "swarm could not be unlocked: invalid key provided"})
    assert rig.swarm()["LocalNodeState"] == "locked"
    assert rig.ask("POST", "/swarm/unlock", {"UnlockKey": key})[0] == 200
    assert rig.swarm()["LocalNodeState"] == "active"
    wait_until(lambda: rig.get("/nodes")[0] == 200, "the manager serves")
    again = rig.ask("POST", "/swarm/unlock", {"UnlockKey": key})
    assert again == (409, {"message": "swarm is not locked"})
    assert not has_clear_keys(rig.data)


def test_a_crash_of_every_process_needs_no_key_but_a_loss_of_power_does(rig: DaemonRig) -> None:
    key = init(rig)
    wait_locked_on_disk(rig)
    rig.kill_all()
    rig.start()
    wait_until(lambda: rig.get("/nodes")[0] == 200, "the manager serves without a key")
    power_loss(rig)
    rig.start()
    assert rig.swarm()["LocalNodeState"] == "locked"
    assert rig.ask("POST", "/swarm/unlock", {"UnlockKey": key})[0] == 200


def test_the_lock_is_turned_on_rotated_and_off_again(rig: DaemonRig) -> None:
    assert init(rig, is_locked=False) == ""
    assert has_clear_keys(rig.data)
    update(rig, is_locked=True)
    first = unlock_key(rig)
    wait_locked_on_disk(rig)
    lock = (rig.data / "manager/keys/lock.key").read_bytes()
    update(rig, is_locked=True, query="&rotateManagerUnlockKey=1")
    second = unlock_key(rig)
    assert second not in ("", first)
    wait_until(
        lambda: (rig.data / "manager/keys/lock.key").read_bytes() != lock,
        "the disk is locked with the new key",
    )
    rig.stop()
    rig.start()
    assert rig.ask("POST", "/swarm/unlock", {"UnlockKey": first})[0] == 401
    assert rig.ask("POST", "/swarm/unlock", {"UnlockKey": second})[0] == 200
    wait_until(lambda: rig.get("/nodes")[0] == 200, "the manager serves")
    update(rig, is_locked=False)
    assert unlock_key(rig) == ""
    wait_until(lambda: has_clear_keys(rig.data), "the keys on disk are in clear")
    rig.stop()
    rig.start()
    wait_until(lambda: rig.get("/nodes")[0] == 200, "the manager serves")


def test_a_locked_manager_can_leave_by_force_and_forgets_everything(rig: DaemonRig) -> None:
    init(rig)
    wait_locked_on_disk(rig)
    rig.stop()
    rig.start()
    assert rig.ask("POST", "/swarm/leave?force=1")[0] == 200
    assert rig.swarm()["LocalNodeState"] == "inactive"
    assert not (rig.data / "manager").exists()
    assert rig.ask("POST", "/swarm/init", INIT)[0] == 200
