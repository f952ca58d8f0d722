"""The daemon and its machine: where it serves its API, what it finds out, what it does without."""

import os
import socket
import subprocess
from pathlib import Path

import pytest

from skep.engine.confinement.cgroups import Cgroups
from skep.node.host import features
from skep.node.host.runtime_choice import find_crun_problem
from tests.support.harness.documents import ROOT
from tests.support.machines.daemon_rig import INIT, Connection, DaemonRig, is_running, wait_until
from tests.support.machines.playground_rig import CLIS
from tests.support.security.api_authority import an_authority

PORT = 2376


def docker(rig: DaemonRig, root: Path, *tls: str) -> subprocess.CompletedProcess[str]:
    """Ask for the version over TCP, beside the daemon."""
    assert rig.process is not None
    host = ("--host", f"tcp://localhost:{PORT}", "--tlsverify", "--tlscacert", str(root), *tls)
    command = ["nsenter", "-t", str(rig.process.pid), "-n", CLIS[-1], *host, "version"]
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=30)


def test_tcp_is_served_to_clients_with_a_certificate_of_the_authority_only(
    rig: DaemonRig, tmp_path: Path
) -> None:
    ours, theirs = an_authority(tmp_path / "ours"), an_authority(tmp_path / "theirs")
    certificate, key = ours.pair("server")
    rig.start(
        *("--host", f"unix://{rig.run}/skep.sock", "--host", f"tcp://127.0.0.1:{PORT}"),
        *("--tls-cert", str(certificate), "--tls-key", str(key), "--tls-ca", str(ours.root)),
    )
    good = docker(rig, ours.root, *_words(*ours.pair("client")))
    assert good.returncode == 0, good.stderr
    assert "Server:" in good.stdout
    foreign, nameless = docker(rig, ours.root, *_words(*theirs.pair("client"))), docker(rig, ours.root)
    assert "error during connect" in foreign.stderr  # the alert of TLS, or the end of the connection
    assert "a certificate is needed, or a token" in nameless.stderr
    for refused in (foreign, nameless):
        assert refused.returncode != 0
        assert "Server:" not in refused.stdout
    assert rig.answers()


def test_several_unix_sockets_answer_alike(rig: DaemonRig) -> None:
    second = rig.run.parent / "second.sock"
    rig.start("--host", f"unix://{rig.run}/skep.sock", "--host", f"unix://{second}")
    connection = Connection(second)
    connection.request("GET", "/_ping")
    assert connection.getresponse().status == 200
    connection.close()
    assert rig.get("/_ping")[0] == 200


def test_a_ping_has_the_same_response_from_the_front_and_from_the_application(rig: DaemonRig) -> None:
    rig.start()

    def pinged(
        connection: Connection, method: str, path: str, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        shown = {name.lower(): value for name, value in response.getheaders()}
        assert shown.pop("date")
        shown.pop("connection", None)
        return response.status, shown, response.read()

    kept, closed = Connection(rig.run / "skep.sock"), Connection(rig.run / "skep.sock")
    for method, path in (
        ("GET", "/_ping"),
        ("HEAD", "/_ping"),
        ("GET", "/v1.41/_ping"),
        ("GET", "/v9.9/_ping"),
    ):
        by_application = pinged(closed, method, path, Connection="close")
        assert pinged(kept, method, path) == by_application
        assert by_application[0] == (400 if "v9" in path else 200)
        assert (kept.sock is None) == ("v9" in path), "the connection of a ping is kept"


def test_a_node_runs_plain_commands_without_runc_and_images(rig: DaemonRig, tmp_path: Path) -> None:
    missing = str(tmp_path / "none")
    rig.start("--runc", missing, "--conmon", missing, "--nft", missing)
    assert rig.ask("POST", "/v1.41/swarm/init", INIT)[0] == 200
    template = {"ContainerSpec": {"Image": "none", "Command": ["sleep", "600"]}}
    spec = {"Name": "plain", "TaskTemplate": template, "Mode": {"Replicated": {"Replicas": 2}}}
    status, response = rig.ask("POST", "/v1.41/services/create", spec)
    assert status == 201, response

    def pids() -> list[int]:
        tasks = rig.get("/v1.41/tasks")[1]
        running = [task for task in tasks if task["Status"]["State"] == "running"]
        return [task["Status"]["ContainerStatus"]["PID"] for task in running]

    wait_until(lambda: len(pids()) == 2, "both tasks run")
    started = pids()
    assert {Path(f"/proc/{pid}/cmdline").read_bytes() for pid in started} == {b"sleep\x00600\x00"}
    assert rig.ask("DELETE", "/v1.41/services/plain")[0] == 200
    wait_until(lambda: not any(map(is_running, started)), "both processes are gone")


def test_a_daemon_whose_containers_would_have_no_cgroups_says_so_and_ends(rig: DaemonRig) -> None:
    """In place of runc's message for each container."""
    said = rig.refusal("--executor", "oci", before="umount --recursive /sys/fs/cgroup")
    assert said == (
        "skep daemon: no cgroup hierarchy is mounted at /sys/fs/cgroup, so no container can start: "
        "mount -t cgroup2 none /sys/fs/cgroup"
    )
    cgroups = Cgroups("")
    root = cgroups.parent_directory("devices")
    said = rig.refusal("--executor", "oci", before=f"mount -o remount,bind,ro {root}")
    assert said == (
        f"skep daemon: {root} is read-only, so no container can start: mount -o remount,bind,rw {root}"
    )
    if not cgroups.is_v2:
        said = rig.refusal("--executor", "oci", before=f"umount {root}")
        assert said == (
            "skep daemon: the cgroup hierarchy of devices is not mounted below /sys/fs/cgroup, so no container can "
            "start: mount -t cgroup -o devices none /sys/fs/cgroup/devices"
        )


def test_the_chosen_runtime_is_shown_with_its_reason_and_an_unusable_one_is_refused(rig: DaemonRig) -> None:
    problem = find_crun_problem()
    rig.start("--executor", "oci")
    _, info = rig.get("/info")
    assert info["DefaultRuntime"] in info["Runtimes"]
    if not problem:
        assert "crun" in info["Runtimes"]
        return
    assert (info["DefaultRuntime"], list(info["Runtimes"])) == ("runc", ["runc"])
    assert problem.partition(":")[0] in rig.log.read_text()
    rig.stop()
    assert rig.refusal("--executor", "oci", "--runtime", "crun") == f"skep daemon: {problem}"


def test_what_the_kernel_cannot_do_is_published(rig: DaemonRig, tmp_path: Path) -> None:
    """As warnings for people and as engine labels for placement constraints; compared with trying it here."""
    found = features.detect(tmp_path)
    rig.start()
    info = rig.get("/v1.41/info")[1]
    assert set(features.warnings(found)) <= set(info["Warnings"] or ())
    assert info["CgroupVersion"] == str(found.cgroup_version)
    assert rig.ask("POST", "/v1.41/swarm/init", INIT)[0] == 200
    (node,) = rig.get("/v1.41/nodes")[1]
    labels = node["Description"]["Engine"].get("Labels") or {}
    without = {
        name: value for name, value in labels.items() if name.startswith(("skep.missing.", "skep.without."))
    }
    assert without == features.labels(found)


def test_systemd_is_notified_when_the_daemon_is_ready_and_when_it_stops(
    rig: DaemonRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The unit says ``Type=notify``: systemd waits for that word."""
    unit = (ROOT / "packaging" / "skep.service").read_text()
    assert "\nType=notify\n" in unit
    path = rig.data.parent / "notify.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(path))
        systemd.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        rig.start()
        assert "READY=1" in systemd.recv(4096).decode().splitlines()
        rig.stop()
        assert "STOPPING=1" in systemd.recv(4096).decode().splitlines()


def _words(certificate: Path, key: Path) -> list[str]:
    return ["--tlscert", str(certificate), "--tlskey", str(key)]
