"""The daemon: what it refuses, what it says of itself, what survives it, what it takes over while it runs."""

import os
import signal
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from skep.playground.images.busybox import busybox_archive
from tests.support.engine.runc_lab import remove_cgroups
from tests.support.machines.daemon_rig import (
    INIT,
    DaemonRig,
    children_named,
    daemon_rig,
    is_running,
    wait_until,
)
from tests.support.machines.playground_rig import CLIS

# --- starting -------------------------------------------------------------------------------------------------------


def test_a_node_outside_of_a_swarm_says_what_it_is(rig: DaemonRig) -> None:
    rig.start("--label", "zone=a b", "--generic-resource", "gpu=2")
    status, info = rig.get("/v1.41/info")
    assert status == 200
    assert [one for one in info["Labels"] if not one.startswith("skep.encryption=")] == ["zone=a b"]
    assert info["GenericResources"] == [{"DiscreteResourceSpec": {"Kind": "gpu", "Value": 2}}]
    assert info["DockerRootDir"] == str(rig.data)
    assert info["Swarm"] == {
        "NodeID": "",
        "NodeAddr": "",
        "LocalNodeState": "inactive",
        "ControlAvailable": False,
        "Error": "",
        "RemoteManagers": None,
    }
    version = rig.get("/version")[1]
    assert {component["Name"] for component in version["Components"]} >= {"Engine", "etcd"}
    status, response = rig.get("/v1.41/services")
    assert status == 503
    assert response["message"].startswith('This node is not a swarm manager. Use "docker swarm init"')
    status, response = rig.get("/v1.41/volumes")
    assert status == 501
    assert "--engine-socket" in response["message"]
    assert rig.get("/v1.41/containers/x/bogus") == (404, {"message": "page not found"})


def script(directory: Path, name: str, says: str) -> str:
    path = directory / name
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("flag", "name", "says", "sentence"),
    [
        ("--runc", None, "", "is missing or cannot be run: apt-get install runc, or name it with --runc"),
        ("--runc", "runc", "runc version 1.0.3", "runc 1.0.3 is too old, skep needs 1.1.0 or newer"),
        ("--conmon", None, "", "is missing or cannot be run: apt-get install conmon"),
        ("--conmon", "conmon", "conmon version 2.0.25", "conmon 2.0.25 is too old"),
        ("--nft", None, "", "is missing or cannot be run: apt-get install nftables"),
        ("--nft", "nft", "nftables v0.9.8", "nft 0.9.8 is too old"),
        ("--etcd-binary", "etcd", "etcd Version: 3.4.23", "too old"),
    ],
)
def test_a_missing_or_old_program_is_refused_with_what_to_do(
    rig: DaemonRig, tmp_path: Path, flag: str, name: str | None, says: str, sentence: str
) -> None:
    program = script(tmp_path, name, says) if name else str(tmp_path / "none")
    assert sentence in rig.refusal("--executor", "oci", flag, program)


def test_all_missing_programs_are_reported_at_once(rig: DaemonRig, tmp_path: Path) -> None:
    missing = str(tmp_path / "none")
    reported = rig.refusal("--executor", "oci", "--runc", missing, "--conmon", missing, "--nft", missing)
    assert len(reported.splitlines()) == 3


def test_a_second_daemon_on_the_same_data_dir_is_refused(rig: DaemonRig, tmp_path: Path) -> None:
    rig.start()
    reported = rig.refusal("--run-dir", str(tmp_path))
    assert reported == (
        f"skep daemon: another skep daemon uses the data dir {rig.data}: stop it, or name another one with --data-dir"
    )
    assert rig.answers()


def test_a_data_dir_on_overlayfs_is_refused(rig: DaemonRig, tmp_path: Path) -> None:
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    options = ",".join(f"{name}dir={tmp_path / name}" for name in ("lower", "upper", "work"))
    rig.data = tmp_path / "merged" / "data"
    mount = f'mount -t overlay overlay -o "{options}" "{tmp_path / "merged"}" && exec "$@"'
    done = subprocess.run(
        ["unshare", "-n", "-m", "sh", "-c", mount, "sh", *rig.command()],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1
    assert "lies on an overlay file system" in done.stderr
    assert "put it on ext4 or xfs" in done.stderr


def test_the_data_dir_of_a_docker_engine_is_refused(rig: DaemonRig) -> None:
    rig.data.mkdir()
    (rig.data / "engine-id").touch()
    assert "belongs to a Docker Engine" in rig.refusal()


def test_a_data_dir_from_the_future_is_refused(rig: DaemonRig) -> None:
    rig.data.mkdir()
    (rig.data / "format").write_text("99\n")
    assert "run the version that wrote it" in rig.refusal()


def test_a_bad_setting_is_refused_with_its_place(rig: DaemonRig) -> None:
    rig.toml.write_text('data-path-port = 80\nlog-format = "xml"\n')
    reported = rig.refusal().splitlines()
    assert reported == [
        f"skep daemon: {rig.toml}: data-path-port is 80: choose a port from 1024 to 49151",
        f"skep daemon: {rig.toml}: log-format is 'xml': choose text or json",
    ]


# --- reloading ------------------------------------------------------------------------------------------------------


def test_sighup_reloads_what_can_be_reloaded_and_says_so(rig: DaemonRig) -> None:
    rig.toml.write_text('labels = ["zone=a"]\n')
    rig.start("--host", f"unix://{rig.run}/skep.sock")
    assert rig.process is not None
    rig.toml.write_text('labels = ["zone=b"]\ndebug = true\ndata-path-port = 5000\n')
    rig.process.send_signal(signal.SIGHUP)
    wait_until(lambda: rig.get("/info")[1]["Debug"], "debug is reloaded")
    assert "zone=b" in rig.get("/info")[1]["Labels"]
    assert "reloaded='debug, labels' needs_restart=data-path-port" in rig.log.read_text()

    rig.toml.write_text('debug = true\nhosts = ["unix:///elsewhere.sock"]\n')
    rig.process.send_signal(signal.SIGHUP)
    unused = "hosts is not used, because --host is given: unix:///elsewhere.sock"
    wait_until(lambda: unused in rig.log.read_text(), "unused hosts are named")

    rig.toml.write_text("debug = maybe\n")
    rig.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "configuration not reloaded" in rig.log.read_text(), "the bad file is reported")
    assert rig.get("/info")[1]["Debug"] is True


def test_a_reloaded_debug_reaches_manager_and_net_process(swarm: DaemonRig) -> None:
    before = swarm.pid_of("manager"), swarm.pid_of("net")
    assert swarm.process is not None
    swarm.toml.write_text("debug = true\n")
    swarm.process.send_signal(signal.SIGHUP)
    for name in ("manager", "net"):
        line = f"log settings read again debug=True process={name}"
        wait_until(lambda line=line: line in swarm.log.read_text(), f"{name} says so")
    assert (swarm.pid_of("manager"), swarm.pid_of("net")) == before


def test_logs_are_structured(rig: DaemonRig) -> None:
    import json

    rig.start("--log-format", "json")
    lines = [json.loads(line) for line in rig.log.read_text().splitlines()]
    assert {"event": "ready", "level": "info", "process": "node"}.items() <= lines[-1].items() or any(
        line["event"] == "ready" for line in lines
    )


# --- in a swarm -----------------------------------------------------------------------------------------------------


@pytest.fixture
def swarm(rig: DaemonRig) -> DaemonRig:
    """A node that is a manager."""
    rig.start()
    status, node_id = rig.ask("POST", "/v1.41/swarm/init", INIT)
    assert status == 200, node_id
    return rig


def test_init_makes_a_manager_that_is_ready(swarm: DaemonRig) -> None:
    section = swarm.swarm()
    assert section["LocalNodeState"] == "active"
    assert section["ControlAvailable"] is True
    assert (section["Nodes"], section["Managers"]) == (1, 1)
    assert section["RemoteManagers"] == [{"NodeID": section["NodeID"], "Addr": "127.0.0.1:2377"}]
    assert section["Cluster"]["Spec"]["Name"] == "default"
    assert "JoinTokens" not in section["Cluster"]
    (node,) = swarm.get("/v1.41/nodes")[1]
    assert node["ID"] == section["NodeID"]
    assert node["Status"]["State"] == "ready"


BAD_INITS: list[tuple[dict[str, Any], int, str]] = [
    ({}, 400, 'invalid ListenAddr "": invalid empty address'),
    ({"ListenAddr": "bogus"}, 400, "listen address must be an IP address or network interface"),
    ({"ListenAddr": "127.0.0.1"}, 400, "could not find the system's IP address"),
    (INIT | {"ListenAddr": "127.0.0.1:99999"}, 500, "listen tcp: address 99999: invalid port"),
    (INIT | {"ListenAddr": "192.0.2.1:2377"}, 500, "bind: cannot assign requested address"),
    (
        INIT | {"Spec": {"CAConfig": {"ExternalCAs": [{"Protocol": "acme", "URL": "https://ca.example"}]}}},
        400,
        'error updating cluster settings: invalid protocol: "acme"',
    ),
    (INIT | {"Spec": {"Name": "x"}}, 400, 'swarm spec must be named "default"'),
    (INIT | {"AdvertiseAddr": "0.0.0.0"}, 400, "advertise address must be a non-zero IP address"),
    (INIT | {"DataPathPort": 80}, 500, "Datapath port number is not in valid range (1024-49151) : 80"),
    (INIT | {"SubnetSize": 30, "DefaultAddrPool": ["10.0.0.0/8"]}, 500, "subnet size is out of range: 30"),
    (INIT | {"Availability": "bogus"}, 500, 'invalid Availability: "bogus"'),
]


def test_a_bad_init_gets_dockers_words_and_leaves_nothing(rig: DaemonRig) -> None:
    rig.start()
    for body, status, words in BAD_INITS:
        response = rig.ask("POST", "/v1.41/swarm/init", body)
        assert response[0] == status, (body, response)
        assert words in response[1]["message"], (body, response)
    assert rig.swarm()["LocalNodeState"] == "inactive"
    assert not (rig.data / "manager").exists()
    assert not (rig.data / "certificates").exists()


def test_what_cannot_be_asked_of_a_node_in_its_state_gets_dockers_words(rig: DaemonRig) -> None:
    rig.start()
    assert rig.ask("POST", "/swarm/leave") == (503, {"message": "This node is not part of a swarm"})
    status, response = rig.ask(
        "POST", "/swarm/join", INIT | {"RemoteAddrs": ["127.0.0.1:1"], "JoinToken": "bad"}
    )
    assert (status, response) == (500, {"message": "invalid join token"})
    assert rig.ask("POST", "/swarm/init", INIT)[0] == 200
    for path in ("/swarm/init", "/swarm/join"):
        status, response = rig.ask("POST", path, INIT)
        assert status == 503
        assert response["message"].startswith("This node is already part of a swarm.")
    status, response = rig.ask("POST", "/swarm/leave")
    assert status == 503
    assert "Removing the last manager erases all current state of the swarm." in response["message"]


def test_leaving_forgets_everything_and_a_new_cluster_can_be_founded(swarm: DaemonRig) -> None:
    first, manager = swarm.swarm()["NodeID"], swarm.pid_of("manager")
    assert swarm.ask("POST", "/swarm/leave?force=1")[0] == 200
    assert swarm.swarm()["LocalNodeState"] == "inactive"
    assert manager is not None
    assert not is_running(manager)
    for name in ("node.json", "manager", "certificates"):
        assert not (swarm.data / name).exists()
    assert swarm.ask("POST", "/swarm/init", INIT)[0] == 200
    assert swarm.swarm()["NodeID"] != first


def test_an_unfinished_init_is_removed_at_the_next_start(rig: DaemonRig) -> None:
    for name in ("manager/etcd", "certificates"):
        (rig.data / name).mkdir(parents=True)
    rig.start()
    wait_until(lambda: not (rig.data / "manager").exists(), "the leftovers are removed")
    assert not (rig.data / "certificates").exists()
    assert rig.ask("POST", "/swarm/init", INIT)[0] == 200


# --- surviving ------------------------------------------------------------------------------------------------------


def test_a_killed_node_process_leaves_the_others_running_and_the_next_adopts_them(swarm: DaemonRig) -> None:
    before = swarm.pid_of("manager"), swarm.pid_of("net")
    assert None not in before
    (etcd,) = children_named(before[0] or 0, "etcd")
    swarm.kill()
    assert (swarm.pid_of("manager"), swarm.pid_of("net")) == before
    swarm.start()
    wait_until(lambda: swarm.swarm()["ControlAvailable"], "the manager answers")
    assert (swarm.pid_of("manager"), swarm.pid_of("net")) == before
    assert is_running(etcd)
    wait_until(lambda: swarm.swarm()["LocalNodeState"] == "active", "the node has its session again")


def test_a_killed_manager_is_started_again_and_its_etcd_with_it(swarm: DaemonRig) -> None:
    old = swarm.pid_of("manager")
    assert old is not None
    (etcd,) = children_named(old, "etcd")
    os.kill(old, signal.SIGKILL)
    wait_until(lambda: not is_running(etcd), "etcd goes with its manager")
    wait_until(lambda: swarm.pid_of("manager") not in (None, old), "a new manager")
    wait_until(lambda: swarm.get("/nodes")[0] == 200, "the new manager answers")
    assert swarm.swarm()["LocalNodeState"] == "active"


def test_a_manager_of_another_version_is_replaced(swarm: DaemonRig) -> None:
    old = swarm.pid_of("manager")
    swarm.kill()
    pid_file = swarm.run / "manager.pid"
    pid_file.write_text(pid_file.read_text().replace('"version":"', '"version":"0.0.0-'))
    swarm.start()
    wait_until(lambda: swarm.pid_of("manager") not in (None, old), "a new manager")
    wait_until(lambda: swarm.get("/nodes")[0] == 200, "the new manager answers")


def test_five_crashes_within_a_minute_stop_the_manager_and_info_says_why(swarm: DaemonRig) -> None:
    (swarm.data / "manager" / "config.json").write_text("{")
    killed = swarm.pid_of("manager")
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: swarm.swarm()["LocalNodeState"] == "error", "the manager is given up", within_s=50)
    section = swarm.swarm()
    assert "the manager process ended 5 times within 60 s" in section["Error"]
    status, response = swarm.get("/services")
    assert status == 503
    assert "ended 5 times" in response["message"]
    assert swarm.ask("POST", "/swarm/leave?force=1")[0] == 200
    assert swarm.swarm()["LocalNodeState"] == "inactive"


def test_sigterm_stops_manager_etcd_and_net(swarm: DaemonRig) -> None:
    manager, net = swarm.pid_of("manager"), swarm.pid_of("net")
    assert manager is not None
    assert net is not None
    (etcd,) = children_named(manager, "etcd")
    swarm.stop()
    assert not any(map(is_running, (manager, net, etcd)))
    assert not (swarm.run / "skep.sock").exists()
    swarm.start()
    wait_until(lambda: swarm.swarm()["ControlAvailable"], "the manager is back")


async def test_containers_start_below_directories_that_are_symbolic_links(tmp_path: Path) -> None:
    """As below ``/var/run``; runc refuses a root file system whose path is not what the kernel calls it."""
    cgroup = f"skep-test-{os.getpid()}"
    with tempfile.TemporaryDirectory(prefix="skep-", dir="/dev/shm") as real, ExitStack() as stack:
        stack.callback(remove_cgroups, cgroup)
        link = tmp_path / "link"
        link.symlink_to(real)
        with daemon_rig(link) as rig:
            rig.start("--executor", "oci", "--cgroup-parent", cgroup)
            (tmp_path / "busybox.tar").write_bytes((await busybox_archive()).data)
            done = docker(rig, "load", "-i", str(tmp_path / "busybox.tar"))
            assert done.returncode == 0, done.stderr
            done = docker(rig, "run", "--rm", "--network", "none", "busybox:1", "echo", "it runs")
            assert (done.returncode, done.stdout) == (0, "it runs\n"), done.stderr
            rig.stop()


def docker(rig: DaemonRig, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DOCKER_HOST": f"unix://{rig.run}/skep.sock"}
    return subprocess.run(
        [CLIS[-1], *words], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
