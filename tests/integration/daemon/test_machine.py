"""The daemon and its machine: where it serves its API, what it finds out, what it does without."""

import datetime
import os
import socket
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from skep.node import features
from tests.support.daemon_rig import INIT, Connection, DaemonRig, is_running, wait_until
from tests.support.documents import ROOT
from tests.support.playground_rig import CLIS

PORT = 2376


class Authority:
    """An authority that signs a server's and a client's certificate; files as dockerd's ``--tls...`` take them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(directory.name)
        self.root = self._write("ca.crt", self._certificate(self._name, self._key.public_key(), is_root=True))

    def pair(self, name: str) -> tuple[Path, Path]:
        """Certificate and key of a server at 127.0.0.1."""
        key = ec.generate_private_key(ec.SECP256R1())
        path = self._directory / f"{name}.key"
        path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return self._write(f"{name}.crt", self._certificate(_name(name), key.public_key())), path

    def _certificate(
        self, name: x509.Name, key: ec.EllipticCurvePublicKey, *, is_root: bool = False
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        names = x509.SubjectAlternativeName([x509.DNSName("localhost")])
        builder = x509.CertificateBuilder(self._name, name, key, x509.random_serial_number())
        return (
            builder.not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=is_root, path_length=None), critical=True)
            .add_extension(names, critical=False)
            .sign(self._key, hashes.SHA256())
        )

    def _write(self, name: str, certificate: x509.Certificate) -> Path:
        path = self._directory / name
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return path


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


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
    for refused in (docker(rig, ours.root, *_words(*theirs.pair("client"))), docker(rig, ours.root)):
        assert refused.returncode != 0
        assert "error during connect" in refused.stderr  # the alert of TLS, or the end of the connection
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


def test_a_node_runs_plain_commands_without_runc_and_images(rig: DaemonRig, tmp_path: Path) -> None:
    missing = str(tmp_path / "none")
    rig.start("--runc", missing, "--conmon", missing, "--nft", missing)
    assert rig.ask("POST", "/v1.41/swarm/init", INIT)[0] == 200
    template = {"ContainerSpec": {"Image": "none", "Command": ["sleep", "600"]}}
    spec = {"Name": "plain", "TaskTemplate": template, "Mode": {"Replicated": {"Replicas": 2}}}
    status, answer = rig.ask("POST", "/v1.41/services/create", spec)
    assert status == 201, answer

    def pids() -> list[int]:
        tasks = rig.get("/v1.41/tasks")[1]
        running = [task for task in tasks if task["Status"]["State"] == "running"]
        return [task["Status"]["ContainerStatus"]["PID"] for task in running]

    wait_until(lambda: len(pids()) == 2, "both tasks run")
    started = pids()
    assert {Path(f"/proc/{pid}/cmdline").read_bytes() for pid in started} == {b"sleep\x00600\x00"}
    assert rig.ask("DELETE", "/v1.41/services/plain")[0] == 200
    wait_until(lambda: not any(map(is_running, started)), "both processes are gone")


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
    without = {name: value for name, value in labels.items() if name.startswith("skep.without.")}
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


def an_authority(directory: Path) -> Authority:
    directory.mkdir()
    return Authority(directory)


def _words(certificate: Path, key: Path) -> list[str]:
    return ["--tlscert", str(certificate), "--tlskey", str(key)]
