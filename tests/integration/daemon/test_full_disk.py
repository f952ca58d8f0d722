"""The disk of the leader runs full: nothing acknowledged is lost, and it goes on by itself when there is room."""

import os
import signal
import subprocess
from base64 import b64encode
from collections.abc import Iterator

import pytest

from tests.support.machines.daemon_rig import INIT, DaemonRig, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

MISSING = "MB of disk space are missing for the store of this manager. Make room: it goes on by itself."
CONTENT = b64encode(os.urandom(700_000)).decode()


@pytest.fixture
def small(rig: DaemonRig) -> Iterator[DaemonRig]:
    """A node whose data directory is a disk of 500 MB."""
    rig.data.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=500m", "skep-disk", rig.data], check=True)
    try:
        yield rig
    finally:
        rig.clean_up()
        subprocess.run(["umount", "--lazy", rig.data], check=True)


def put_config(rig: DaemonRig, name: str) -> bool:
    return bool(rig.ask("POST", "/configs/create", {"Name": name, "Data": CONTENT})[0] == 201)


def configs(rig: DaemonRig) -> set[str]:
    return {one["Spec"]["Name"] for one in rig.get("/configs")[1]}


def free_bytes(rig: DaemonRig) -> int:
    disk = os.statvfs(rig.data)
    return disk.f_bavail * disk.f_frsize


def check_said(rig: DaemonRig) -> None:
    """Reads and writes are refused with what is wrong, and so says the node's state."""
    for method, path in (("GET", "/configs"), ("POST", "/configs/create")):
        status, response = rig.ask(method, path, {"Name": "refused", "Data": "eA=="})
        assert status == 503
        assert response["message"].startswith("The swarm does not have a leader.")
        assert f"{rig.data}/manager/etcd: " in response["message"]
        assert MISSING in response["message"]
    assert MISSING in rig.swarm()["Error"]


def test_a_full_disk_stops_writes_and_loses_none(small: DaemonRig) -> None:
    rig = small
    rig.start()
    assert rig.ask("POST", "/swarm/init", INIT)[0] == 200
    filler = rig.data / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free_bytes(rig) - 1024 * 1024)
    acknowledged: set[str] = set()
    for number in range(200):
        name = f"c{number}"
        if not put_config(rig, name):
            break
        acknowledged.add(name)
    else:
        pytest.fail("the disk never ran full")
    wait_until(
        lambda: "no disk space for the store" in rig.log.read_text(), "the log names the problem", within_s=60
    )
    check_said(rig)
    manager = rig.pid_of("manager")
    assert manager is not None
    os.kill(manager, signal.SIGKILL)
    wait_until(lambda: rig.pid_of("manager") not in (None, manager), "a new manager waits, too")
    wait_until(lambda: MISSING in rig.swarm()["Error"], "it says what for")
    check_said(rig)
    filler.unlink()
    wait_until(lambda: put_config(rig, "after"), "writes go on by themselves", within_s=90)
    assert acknowledged | {"after"} <= configs(rig)
    assert "refused" not in configs(rig)
    assert rig.swarm()["Error"] == ""
