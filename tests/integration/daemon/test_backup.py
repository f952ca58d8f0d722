"""A backup is made while the swarm runs and restored on an empty node; nothing else is taken for one."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.machines.daemon_rig import INIT, SKEP, DaemonRig, daemon_rig, wait_until
from tests.support.machines.directories import a_directory

pytestmark = pytest.mark.timeout(180)

PASSPHRASE = "correct horse battery staple"


@pytest.fixture
def other() -> Iterator[DaemonRig]:
    """A second machine."""
    with a_directory("skep-") as directory, daemon_rig(directory) as rig:
        yield rig


@pytest.fixture
def words(tmp_path: Path) -> Path:
    file = tmp_path / "passphrase"
    file.write_text(f"{PASSPHRASE}\n")
    return file


def skep(rig: DaemonRig, *command: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SKEP, "--host", f"unix://{rig.run}/skep.sock", *command],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def backed_up(rig: DaemonRig, file: Path, words: Path) -> None:
    done = skep(rig, "backup", "--passphrase-file", str(words), str(file))
    assert done.returncode == 0, done.stderr + rig.log.read_text()
    assert "20 secrets" in done.stdout


def cluster_with_secrets(rig: DaemonRig) -> None:
    rig.start()
    assert rig.ask("POST", "/swarm/init", INIT)[0] == 200
    for number in range(20):
        body = {"Name": f"s{number}", "Data": "eA=="}
        assert rig.ask("POST", "/secrets/create", body)[0] == 201


def secrets(rig: DaemonRig) -> dict[str, Any]:
    return {one["Spec"]["Name"]: (one["ID"], one["Version"]) for one in rig.get("/secrets")[1]}


def test_a_backup_is_restored_on_another_machine_which_takes_the_managers_place(
    rig: DaemonRig, other: DaemonRig, tmp_path: Path, words: Path
) -> None:
    cluster_with_secrets(rig)
    file = tmp_path / "swarm.backup"
    backed_up(rig, file, words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["passphrase", "swarm.backup"]
    assert file.stat().st_mode & 0o777 == 0o600
    before, swarm, node = secrets(rig), rig.get("/swarm")[1], rig.swarm()["NodeID"]
    assert rig.ask("POST", "/secrets/create", {"Name": "later", "Data": "eA=="})[0] == 201
    rig.stop()

    other.start()
    dry = skep(other, "restore", "--passphrase-file", str(words), "--dry-run", str(file))
    assert dry.returncode == 0, dry.stderr
    assert "20 secrets" in dry.stdout
    assert swarm["ID"] in dry.stdout
    assert other.swarm()["LocalNodeState"] == "inactive"
    assert not (other.data / "manager").exists()

    refused = skep(other, "restore", "--passphrase-file", str(words), str(file), stdin="n\n")
    assert refused.returncode == 1
    assert other.swarm()["LocalNodeState"] == "inactive"

    done = skep(other, "restore", "--passphrase-file", str(words), "--yes", str(file))
    assert done.returncode == 0, done.stderr + other.log.read_text()
    assert other.swarm()["NodeID"] == node
    assert secrets(other) == before
    restored = other.get("/swarm")[1]
    assert (restored["ID"], restored["JoinTokens"]) == (swarm["ID"], swarm["JoinTokens"])
    assert other.ask("POST", "/secrets/create", {"Name": "after", "Data": "eA=="})[0] == 201
    assert not list(other.data.glob("restore*"))
    assert not (other.data / "manager/recovery.snapshot").exists()


def test_torn_foreign_and_other_files_are_refused_with_a_sentence(
    rig: DaemonRig, tmp_path: Path, words: Path
) -> None:
    cluster_with_secrets(rig)
    file = tmp_path / "swarm.backup"
    backed_up(rig, file, words)
    assert rig.ask("POST", "/swarm/leave?force=1")[0] == 200
    content = file.read_bytes()
    wrong = tmp_path / "wrong"
    wrong.write_text("wrong\n")
    key = tmp_path / "key"
    key.write_bytes(b"k" * 32)
    cases = [
        (content[:-100], words, "the backup is damaged or incomplete"),
        (content[: len(content) // 2], words, "the backup is damaged or incomplete"),
        (b"", words, "this file is not a backup of a cluster"),
        (b"#!/bin/sh\n" * 100, words, "this file is not a backup of a cluster"),
        (content, wrong, "the passphrase or key file is wrong"),
    ]
    for bad, secret, sentence in cases:
        file.write_bytes(bad)
        done = skep(rig, "restore", "--passphrase-file", str(secret), "--yes", str(file))
        assert (done.returncode, sentence in done.stderr) == (1, True), done.stderr
    file.write_bytes(content)
    done = skep(rig, "restore", "--key-file", str(key), "--yes", str(file))
    assert "was made with a passphrase" in done.stderr
    assert rig.swarm()["LocalNodeState"] == "inactive"
    assert not list(rig.data.glob("restore*"))
    assert not (rig.data / "manager").exists()


def test_a_node_in_a_swarm_restores_nothing(rig: DaemonRig, tmp_path: Path, words: Path) -> None:
    cluster_with_secrets(rig)
    file = tmp_path / "swarm.backup"
    backed_up(rig, file, words)
    done = skep(rig, "restore", "--passphrase-file", str(words), "--yes", str(file))
    assert done.returncode == 1
    assert "already part of a swarm" in done.stderr


def test_a_backup_that_breaks_off_leaves_the_one_before(rig: DaemonRig, tmp_path: Path, words: Path) -> None:
    """Without a response the file of yesterday stays as it was."""
    file = tmp_path / "swarm.backup"
    file.write_bytes(b"yesterday")
    rig.start()
    done = skep(rig, "backup", "--passphrase-file", str(words), str(file))
    assert done.returncode == 1
    assert "not a swarm manager" in done.stderr
    assert file.read_bytes() == b"yesterday"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["passphrase", "swarm.backup"]


def test_a_backup_that_the_cluster_refuses_asks_for_no_passphrase(rig: DaemonRig, tmp_path: Path) -> None:
    rig.start()
    done = skep(rig, "backup", str(tmp_path / "swarm.backup"), stdin=f"{PASSPHRASE}\n{PASSPHRASE}\n")
    assert done.returncode == 1
    assert "not a swarm manager" in done.stderr
    assert "Passphrase" not in done.stdout + done.stderr
    done = skep(rig, "backup", str(tmp_path / "absent" / "swarm.backup"), stdin="")
    assert "Create it, or choose another place." in done.stderr


def test_a_locked_swarm_is_locked_again_after_its_restore(
    rig: DaemonRig, other: DaemonRig, tmp_path: Path
) -> None:
    """With a key file this time."""
    rig.start()
    spec = {"EncryptionConfig": {"AutoLockManagers": True}}
    assert rig.ask("POST", "/swarm/init", INIT | {"Spec": spec, "AutoLockManagers": True})[0] == 200
    unlock_key = rig.get("/swarm/unlockkey")[1]["UnlockKey"]
    key, file = tmp_path / "key", tmp_path / "swarm.backup"
    key.write_bytes(b"k" * 32)
    done = skep(rig, "backup", "--key-file", str(key), str(file))
    assert done.returncode == 0, done.stderr
    rig.stop()
    other.start()
    done = skep(other, "restore", "--key-file", str(key), "--yes", str(file))
    assert done.returncode == 0, done.stderr + other.log.read_text()
    assert other.get("/swarm/unlockkey")[1]["UnlockKey"] == unlock_key
    wait_until(lambda: (other.data / "manager/keys/lock.key").exists(), "the disk is locked")
    other.stop()
    other.start()
    assert other.swarm()["LocalNodeState"] == "locked"
    assert other.ask("POST", "/swarm/unlock", {"UnlockKey": unlock_key})[0] == 200


@pytest.mark.parametrize("is_locked", [False, True], ids=["open", "locked"])
def test_dockers_own_procedure_a_copy_of_the_directory_on_another_machine_at_another_address(
    rig: DaemonRig, other: DaemonRig, *, is_locked: bool
) -> None:
    cluster_with_secrets(rig)
    unlock_key = ""
    if is_locked:
        swarm = rig.get("/swarm")[1]
        spec = swarm["Spec"] | {"EncryptionConfig": {"AutoLockManagers": True}}
        assert rig.ask("POST", f"/swarm/update?version={swarm['Version']['Index']}", spec)[0] == 200
        unlock_key = rig.get("/swarm/unlockkey")[1]["UnlockKey"]
        wait_until(
            lambda: b"PRIVATE KEY" not in (rig.data / "certificates/swarm-node.key").read_bytes(),
            "the disk is locked",
        )
    before, node = secrets(rig), rig.swarm()["NodeID"]
    rig.stop()
    shutil.copytree(rig.data, other.data)
    other.start()
    if is_locked:
        assert other.swarm()["LocalNodeState"] == "locked"
        assert other.ask("POST", "/swarm/unlock", {"UnlockKey": unlock_key})[0] == 200
    moved = {"ListenAddr": "127.0.0.9:2377", "AdvertiseAddr": "127.0.0.9", "ForceNewCluster": True}
    response = other.ask("POST", "/swarm/init", moved)
    assert response[0] == 200, (response, other.log.read_text())
    assert secrets(other) == before
    swarm = other.swarm()
    assert (swarm["NodeID"], swarm["NodeAddr"]) == (node, "127.0.0.9")
    (only,) = other.get("/nodes")[1]
    assert only["ManagerStatus"]["Addr"] == "127.0.0.9:2377"
    if is_locked:
        assert other.get("/swarm/unlockkey")[1]["UnlockKey"] == unlock_key
