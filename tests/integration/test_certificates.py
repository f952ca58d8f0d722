"""Certificates of a running cluster: the root is rotated, nodes are removed, tokens change, with real processes."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from skep.security.authority import Authority
from skep.security.tokens import join_token
from tests.support.machines.playground_rig import (
    TestCluster,
    TestNode,
    a_playground,
    container_pids,
    create,
    remove_services,
    wait_running,
    wait_until,
)
from tests.support.security.external_ca import cfssl_command
from tests.support.security.roots import expire

pytestmark = pytest.mark.timeout(240)

ROOT = Authority.create()


@pytest.fixture(scope="module")
def trio() -> Iterator[TestCluster]:
    """m1, w1 and w2."""
    with a_playground("certs", managers=1, workers=2) as cluster:
        yield cluster


@pytest.fixture
def m1(trio: TestCluster) -> Iterator[TestNode]:
    node = trio.node("m1")
    yield node
    remove_services(node)


def swarm_of(node: TestNode) -> dict[str, Any]:
    response: dict[str, Any] = node.client().api.inspect_swarm()
    return response


def nodes_of(node: TestNode) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = node.client().api.nodes()
    return found


def said(node: TestNode, *words: str) -> str:
    """What the docker command prints."""
    return node.docker(*words).stdout


def refusal(node: TestNode, *words: str) -> str:
    """What the docker command prints when it fails."""
    done = node.docker(*words, check=False)
    assert done.returncode != 0
    return done.stderr


def rotated(node: TestNode, *words: str) -> str:
    """What ``docker swarm ca --rotate`` prints, once every node trusts the present root (decision 82)."""

    def all_trust_it() -> bool:
        root = node.client().info()["Swarm"]["Cluster"]["TLSInfo"]["TrustRoot"]
        found = [
            (one["Status"]["State"], one["Description"]["TLSInfo"]["TrustRoot"]) for one in nodes_of(node)
        ]
        return set(found) == {("ready", root)}

    wait_until(all_trust_it, "every node trusts the present root", 60)
    return said(node, "swarm", "ca", "--rotate", *words)


def certificate_of(cluster: TestCluster, name: str) -> x509.Certificate:
    path = cluster.directory / name / "data" / "certificates" / "swarm-node.crt"
    return x509.load_pem_x509_certificate(path.read_bytes())


def peer_roots_of(cluster: TestCluster, name: str) -> str:
    """What etcd is to trust; on the node's own tmpfs."""
    (holder,) = cluster.node(name).description["pids"]
    return Path(f"/proc/{holder}/root/run/skep/tls/swarm-root-ca.crt").read_text().strip()


def test_swarm_ca_rotate_ends_with_a_new_root_everywhere_and_no_task_moved(trio: TestCluster, m1: TestNode):
    create(m1, "web", 4)
    wait_running(m1, "web", 4)
    before = {name: container_pids(trio.node(name), "web") for name in ("m1", "w1", "w2")}
    old, old_root = swarm_of(m1), said(m1, "swarm", "ca").strip()
    certificates = {name: certificate_of(trio, name) for name in ("m1", "w1", "w2")}

    shown = rotated(m1)

    new, new_root = swarm_of(m1), said(m1, "swarm", "ca").strip()
    assert "desired root digest" in shown
    assert new_root in shown
    assert new_root != old_root
    assert not new["RootRotationInProgress"]
    assert new["JoinTokens"]["Worker"] != old["JoinTokens"]["Worker"]
    assert new["JoinTokens"]["Manager"] != old["JoinTokens"]["Manager"]
    assert {node["Description"]["TLSInfo"]["TrustRoot"].strip() for node in nodes_of(m1)} == {new_root}
    root = x509.load_pem_x509_certificate(new_root.encode())
    for name, certificate in certificates.items():
        renewed = certificate_of(trio, name)
        assert renewed.serial_number != certificate.serial_number
        renewed.verify_directly_issued_by(root)
    assert {node["Status"]["State"] for node in nodes_of(m1)} == {"ready"}
    assert {name: container_pids(trio.node(name), "web") for name in before} == before
    wait_until(lambda: peer_roots_of(trio, "m1") == new_root, "etcd's files have the new root")
    # The manager goes on: etcd was restarted, and what was written before is there.
    said(m1, "service", "update", "--detach", "--label-add", "x=y", "web")


def test_a_cluster_has_a_root_a_certificate_for_each_node_and_two_tokens_for_the_root(
    trio: TestCluster, m1: TestNode
):
    root = x509.load_pem_x509_certificate(said(m1, "swarm", "ca").encode())
    root.verify_directly_issued_by(root)
    certificates = [certificate_of(trio, name) for name in ("m1", "w1", "w2")]
    for certificate in certificates:
        certificate.verify_directly_issued_by(root)
    keys = {
        one.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) for one in certificates
    }
    assert len(keys) == 3, "each node has a key of its own"
    roles = [
        one.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)[0].value for one in certificates
    ]
    assert roles == ["swarm-manager", "swarm-worker", "swarm-worker"]
    tokens = swarm_of(m1)["JoinTokens"]
    secrets = {role: token.rpartition("-")[2] for role, token in tokens.items()}
    assert secrets["Worker"] != secrets["Manager"]
    trusted = said(m1, "swarm", "ca").encode()
    assert tokens == {role: join_token(trusted.rstrip() + b"\n", secret) for role, secret in secrets.items()}


def test_join_token_rotate_changes_one_token_and_q_prints_nothing_else(m1: TestNode):
    old = swarm_of(m1)["JoinTokens"]
    printed = said(m1, "swarm", "join-token", "--rotate", "-q", "worker")
    new = swarm_of(m1)["JoinTokens"]
    assert printed == new["Worker"] + "\n"
    assert new["Worker"] != old["Worker"]
    assert new["Manager"] == old["Manager"]
    shown = said(m1, "swarm", "join-token", "manager", "--rotate")
    assert "Successfully rotated manager join token." in shown
    assert swarm_of(m1)["JoinTokens"]["Manager"] in shown


def test_what_swarm_ca_cannot_do_is_refused_in_words(trio: TestCluster, m1: TestNode):
    url = "protocol=cfssl,url=http://ca.example"
    refused = refusal(m1, "swarm", "update", "--external-ca", url)
    assert "the URL of an external CA must begin with https://" in refused
    refused = refusal(m1, "swarm", "update", "--cert-expiry", "59m")
    assert "minimum certificate expiry time is: 1h0m0s" in refused
    refused = refusal(m1, "swarm", "ca", "--cert-expiry", "2h")
    assert "flag requires the `--rotate` flag" in refused


def test_an_external_root_is_accepted_and_its_key_never_shown(
    trio: TestCluster, m1: TestNode, tmp_path: Path
):
    rotate_to(m1, ROOT, tmp_path)
    assert said(m1, "swarm", "ca").strip() == ROOT.root_pem.decode().strip()
    assert swarm_of(m1)["Spec"]["CAConfig"].get("SigningCAKey", "") == ""
    certificate_of(trio, "w1").verify_directly_issued_by(ROOT.certificate)
    # The same again is no rotation, and a counted one goes on from it.
    rotate_to(m1, ROOT, tmp_path)
    rotated(m1, "--detach")
    wait_until(lambda: not swarm_of(m1)["RootRotationInProgress"], "the rotation in the background has ended")
    assert said(m1, "swarm", "ca").strip() != ROOT.root_pem.decode().strip()


def test_nodes_renew_and_join_with_certificates_of_an_external_authority(
    trio: TestCluster, m1: TestNode, tmp_path: Path
):
    """The root rotates to one whose key no manager has, a node joins, and the root rotates away from it."""
    theirs, certificate = Authority.create(), tmp_path / "theirs.crt"
    certificate.write_bytes(theirs.root_pem)
    present = said(m1, "swarm", "ca").strip()
    with an_authority(m1, theirs, present, tmp_path) as url:
        external = f"protocol=cfssl,url={url},cacert={certificate}"
        rotated(m1, "-q", "--ca-cert", str(certificate), "--external-ca", external)
        assert said(m1, "swarm", "ca").strip() == theirs.root_pem.decode().strip()
        for name in ("m1", "w1", "w2"):
            certificate_of(trio, name).verify_directly_issued_by(theirs.certificate)
        w2, token = trio.node("w2"), said(m1, "swarm", "join-token", "-q", "worker").strip()
        left = w2.client().info()["Swarm"]["NodeID"]
        said(w2, "swarm", "leave")
        said(m1, "node", "rm", "--force", left)
        said(w2, "swarm", "join", "--token", token, f"{m1.description['addr']}:2377")
        certificate_of(trio, "w2").verify_directly_issued_by(theirs.certificate)

        (shown,) = swarm_of(m1)["Spec"]["CAConfig"]["ExternalCAs"]
        assert (shown["Protocol"], shown["URL"]) == ("cfssl", url)
        rotated(m1, "-q")
        assert said(m1, "swarm", "ca").strip() not in {present, theirs.root_pem.decode().strip()}
    said(m1, "swarm", "update", "--cert-expiry", "720h")  # the authority is not needed any more


@contextmanager
def an_authority(m1: TestNode, root: Authority, present_pem: str, directory: Path) -> Iterator[str]:
    """cfssl with the key of ``root`` on m1's machine; gives its URL."""
    addr = m1.description["addr"]
    command = cfssl_command(directory, addr, 8888, root, [root])
    with (directory / "trusted.crt").open("a") as trusted:
        trusted.write(present_pem + "\n")
    inside = ["nsenter", f"--net={m1.description['netns']}"]
    with (directory / "cfssl.log").open("w") as output:
        process = subprocess.Popen([*inside, *command], cwd=directory, stdout=output, stderr=output)
    try:
        wait_until(lambda: "Now listening" in (directory / "cfssl.log").read_text(), "cfssl listens")
        yield f"https://{addr}:8888/api/v1/cfssl/sign"
    finally:
        process.kill()
        process.wait()


def rotate_to(m1: TestNode, root: Authority, directory: Path) -> None:
    certificate, key = directory / "root.crt", directory / "root.key"
    certificate.write_bytes(root.root_pem)
    key.write_bytes(root.key_pem)
    rotated(m1, "-q", "--ca-cert", str(certificate), "--ca-key", str(key))


@pytest.mark.slow
def test_a_worker_whose_certificate_expired_while_it_was_off_comes_back_by_itself(
    trio: TestCluster, m1: TestNode, tmp_path: Path
):
    rotate_to(m1, ROOT, tmp_path)
    trio.skep("kill", "w1")
    wait_until(lambda: state_of(m1, "w1") == "down", "w1 is down")
    expired = expire(trio.directory / "w1" / "data" / "certificates", ROOT, days_ago=20)
    trio.skep("start", "w1")
    wait_until(lambda: state_of(m1, "w1") == "ready", "w1 is back")
    renewed = certificate_of(trio, "w1")
    assert renewed.subject == expired.certificate.subject
    assert renewed.not_valid_after_utc > expired.not_after


def state_of(m1: TestNode, name: str) -> str:
    (found,) = [node for node in nodes_of(m1) if node["Description"]["Hostname"] == name]
    return str(found["Status"]["State"])


@pytest.fixture
def outsider(trio: TestCluster) -> Iterator[TestNode]:
    """w2, out of the swarm, and back in it afterwards."""
    w2, m1 = trio.node("w2"), trio.node("m1")
    id = next(node["ID"] for node in nodes_of(m1) if node["Description"]["Hostname"] == "w2")
    said(w2, "swarm", "leave")
    wait_until(lambda: state_of(m1, "w2") == "down", "w2 has left")
    said(m1, "node", "rm", id)
    yield w2
    if w2.client().info()["Swarm"]["LocalNodeState"] == "inactive":
        said(
            w2,
            "swarm",
            "join",
            "--token",
            said(m1, "swarm", "join-token", "-q", "worker").strip(),
            where(trio),
        )


def where(trio: TestCluster) -> str:
    return f"{trio.node('m1').description['addr']}:2377"


@pytest.mark.slow
def test_a_join_that_cannot_work_says_why_and_leaves_nothing(
    trio: TestCluster, m1: TestNode, outsider: TestNode
):
    worker = said(m1, "swarm", "join-token", "-q", "worker").strip()
    wrong = worker[:-25] + "0" * 25
    words = refusal(outsider, "swarm", "join", "--token", wrong, where(trio))
    assert "A valid join token is necessary to join this cluster" in words
    foreign = join_token(Authority.create().root_pem, worker[-25:])
    words = refusal(outsider, "swarm", "join", "--token", foreign, where(trio))
    assert "remote CA does not match fingerprint" in words
    said(m1, "swarm", "join-token", "--rotate", "-q", "worker")
    words = refusal(outsider, "swarm", "join", "--token", worker, where(trio))
    assert "A valid join token is necessary to join this cluster" in words
    rotated(m1, "-q")
    words = refusal(outsider, "swarm", "join", "--token", worker, where(trio))
    assert "remote CA does not match fingerprint" in words
    words = refusal(outsider, "swarm", "join", "--token", "SWMTKN-1-no-token", where(trio))
    assert "invalid join token" in words
    assert outsider.client().info()["Swarm"]["LocalNodeState"] == "inactive"


@pytest.mark.slow
@pytest.mark.parametrize("who", ["no listener", "a silent listener", "another program"])
def test_a_join_to_where_no_manager_is_says_so(trio: TestCluster, m1: TestNode, outsider: TestNode, who: str):
    token = said(m1, "swarm", "join-token", "-q", "worker").strip()
    netns = trio.node("m1").description["netns"]
    port = {"no listener": 3999, "a silent listener": 3998, "another program": 3997}[who]
    program = {"no listener": "", "a silent listener": _SILENT, "another program": _GREETING}[who]
    with listening(netns, program, port):
        address = f"{trio.node('m1').description['addr']}:{port}"
        words = refusal(outsider, "swarm", "join", "--token", token, address)
    assert address in words or "Timeout was reached" in words
    assert outsider.client().info()["Swarm"]["LocalNodeState"] == "inactive"


_SILENT = """
import socket, sys
s = socket.create_server(("0.0.0.0", int(sys.argv[1]))); print("listening", flush=True)
kept = []
while True: kept.append(s.accept())
"""
_GREETING = """
import socket, sys
s = socket.create_server(("0.0.0.0", int(sys.argv[1]))); print("listening", flush=True)
while True:
    c, _ = s.accept(); c.sendall(b"220 mail.example ESMTP\\r\\n"); c.close()
"""


@contextmanager
def listening(netns: str, program: str, port: int) -> Iterator[None]:
    """Run a server that is no manager on ``port`` of a node."""
    if not program:
        yield
        return
    command = ["nsenter", f"--net={netns}", sys.executable, "-c", program, str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "listening\n"
        try:
            yield
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.needs("dockerd")
def test_an_unmodified_engine_goes_through_a_rotation_and_keeps_its_tasks():
    with a_playground("mixed", managers=1, docker_workers=1) as cluster:
        m1 = cluster.node("m1")
        create(m1, "web", 4, "--endpoint-mode", "dnsrr")
        wait_running(m1, "web", 4, within_s=60)
        tasks = sorted(task["ID"] for task in m1.client().api.tasks())
        rotated(m1, "-q")
        root = said(m1, "swarm", "ca").strip()
        descriptions = {node["Description"]["Hostname"]: node["Description"] for node in nodes_of(m1)}
        assert descriptions["d1"]["TLSInfo"]["TrustRoot"].strip() == root
        assert descriptions["d1"]["TLSInfo"] == descriptions["m1"]["TLSInfo"]
        assert {node["Status"]["State"] for node in nodes_of(m1)} == {"ready"}
        assert sorted(task["ID"] for task in wait_running(m1, "web", 4)) == tasks
