"""A manager whose files were stolen is evicted: they give no access to the store or to any manager."""

import asyncio
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import msgspec
import pytest

from skep.errors import FailedPrecondition
from skep.model.node import NodeRole
from skep.model.values.ids import ClusterId, NodeId
from skep.security import keypair
from skep.security.authority import Authority
from skep.security.identity import NodeIdentity
from skep.security.keypair import KeyPair
from skep.security.keys import new_private_key, private_pem, signing_request
from skep.store.etcd import etcd_pb2 as pb
from skep.store.etcd.client import EtcdClient, prefix_end
from skep.store.etcd.encryption.cipher import Cipher, KeyRing
from skep.store.etcd.requests import PREFIX, is_clear
from tests.support.machines.playground_rig import (
    SKEP,
    TestCluster,
    TestNode,
    a_playground,
    create,
    nodes_by_name,
    ready,
    wait_running,
    wait_until,
)

pytestmark = [pytest.mark.timeout(400), pytest.mark.slow]

RING = re.compile(rb'\{"current":\d+,"keys":\[(?:\{"id":\d+,"wrapped":"[A-Za-z0-9+/=]+"\},?)+\]\}')
CUT_WITHIN_S = 5.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[TestCluster]:
    """m1, m2, m3 and w1."""
    with a_playground("evict", managers=3, workers=1) as cluster:
        yield cluster


def inside(cluster: TestCluster, *words: str) -> list[str]:
    """The command line of ``tests.support.security.stolen_certificates`` in the worker's network namespace."""
    netns = cluster.node("w1").description["netns"]
    return [
        "nsenter",
        f"--net={netns}",
        sys.executable,
        "-m",
        "tests.support.security.stolen_certificates",
        *words,
    ]


def taken(cluster: TestCluster, certificates: Path) -> set[bool]:
    """What the ports of the managers that stay say to a certificate."""
    ips = [cluster.node(name).description["addr"] for name in ("m1", "m2")]
    addresses = [f"{ip}:2377" for ip in ips] + [f"peer:{ip}:2378" for ip in ips]
    done = subprocess.run(
        inside(cluster, "once", str(certificates), *addresses),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return set(json.loads(done.stdout).values())


def hold(cluster: TestCluster, certificates: Path, address: str) -> "subprocess.Popen[str]":
    """A connection that stays; the process says when it ended."""
    command = inside(cluster, "hold", str(certificates), address)
    held = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert held.stdout is not None
    assert held.stdout.readline() == "open\n"
    return held


def minted(cluster: TestCluster, authority: Authority, directory: Path) -> Path:
    """A certificate for a manager that stays, by who has the root's key."""
    m1 = cluster.node("m1").client()
    id = NodeId(nodes_by_name(cluster.node("m1"))["m1"]["ID"])
    key = new_private_key()
    identity = NodeIdentity(node_id=id, cluster_id=ClusterId(m1.swarm.id or ""), role=NodeRole.MANAGER)
    m1.swarm.reload()
    identity = msgspec.structs.replace(identity, cluster_id=ClusterId(m1.swarm.attrs["ID"]))
    pair = KeyPair(
        certificate_pem=authority.sign(signing_request(key), identity),
        key_pem=private_pem(key),
        root_pem=authority.root_pem,
    )
    keypair.save(pair, directory)
    return directory


def wrapping_keys(data: Path) -> bytes:
    return (data / "manager" / "keys" / "wrapping.key").read_bytes()


def opened_rings(image: Path, wrapping_key: bytes) -> tuple[int, int]:
    """The newest data key anywhere in the files of a store, and the newest that a wrapping key gives."""
    newest = known = 0
    for path in sorted(image.rglob("*")):
        if not path.is_file():
            continue
        for found in RING.findall(path.read_bytes()):
            ring = msgspec.json.decode(found, type=KeyRing)
            newest = max(newest, ring.current)
            try:
                Cipher(ring, wrapping_key)
            except FailedPrecondition:
                continue
            known = max(known, ring.current)
    return newest, known


async def data_keys_in_use(node: TestNode) -> set[int]:
    """Ids of the data keys that the present values are encrypted with."""
    (holder,) = node.description["pids"]
    async with EtcdClient(Path(f"/proc/{holder}/root/run/skep/etcd.sock")) as client:
        page = await client.range(pb.RangeRequest(key=PREFIX, range_end=prefix_end(PREFIX)), timeout_s=10)
    return {int.from_bytes(kv.value[1:5], "big") for kv in page.kvs if not is_clear(kv.key) and kv.value}


def test_the_files_of_an_evicted_manager_give_no_access(cluster: TestCluster, tmp_path: Path) -> None:
    m1 = cluster.node("m1")
    authority = Authority.create()
    for name, content in (("root.crt", authority.root_pem), ("root.key", authority.key_pem)):
        (tmp_path / name).write_bytes(content)
    m1.docker(
        "swarm",
        "ca",
        "--rotate",
        "-q",
        "--ca-cert",
        str(tmp_path / "root.crt"),
        "--ca-key",
        str(tmp_path / "root.key"),
    )
    m1.docker("swarm", "update", "--autolock=true")
    unlock_key = m1.docker("swarm", "unlock-key", "-q").stdout.strip()
    m1.docker("swarm", "update", "--autolock=false")
    m1.docker("network", "create", "-d", "overlay", "--opt", "encrypted", "private")
    create(m1, "web", 2, "--constraint", "node.hostname!=m3")
    tasks = sorted(task["ID"] for task in wait_running(m1, "web", 2))
    tokens = m1.docker("swarm", "join-token", "-q", "manager").stdout
    stolen = tmp_path / "stolen"
    shutil.copytree(cluster.directory / "m3" / "data", stolen, ignore=shutil.ignore_patterns("*.new"))
    certificates, wrapping = stolen / "certificates", wrapping_keys(stolen)
    id = nodes_by_name(m1)["m3"]["ID"]
    forged = minted(cluster, authority, tmp_path / "forged")
    assert taken(cluster, certificates) == {True}
    wait_until(lambda: taken(cluster, forged) == {True}, "every etcd has the root", 60)
    image = tmp_path / "before"
    shutil.copytree(cluster.directory / "m1" / "data" / "manager" / "etcd", image)
    newest, known = opened_rings(image, wrapping)
    assert newest == known > 0

    held = hold(cluster, certificates, f"peer:{m1.description['addr']}:2378")
    in_another_name = hold(cluster, forged, f"{cluster.node('m2').description['addr']}:2377")
    begun_at = time.time()
    done = subprocess.run(
        [SKEP, "--host", m1.socket, "node", "evict", "--yes", "m3"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert "m3 is evicted" in done.stdout, done.stderr + done.stdout
    closed_at = float(held.communicate(timeout=10)[0])
    assert float(in_another_name.communicate(timeout=10)[0]) > begun_at
    removed_at = told_at(cluster, "peer connections of etcd closed")
    assert begun_at < removed_at
    assert closed_at - removed_at < CUT_WITHIN_S

    assert taken(cluster, certificates) == taken(cluster, forged) == {False}
    assert wrapping not in wrapping_keys(cluster.directory / "m1" / "data")
    assert wrapping_keys(cluster.directory / "m1" / "data") == wrapping_keys(
        cluster.directory / "m2" / "data"
    )
    m1.docker("secret", "create", "later", "-", stdin="nobody else's")
    later = tmp_path / "after"
    shutil.copytree(cluster.directory / "m2" / "data" / "manager" / "etcd", later)
    newest, known = opened_rings(later, wrapping)
    assert newest > known
    assert min(asyncio.run(data_keys_in_use(cluster.node("m2")))) > known

    assert m1.docker("swarm", "join-token", "-q", "manager").stdout != tokens
    assert unlock_key not in done.stdout
    assert ready(m1) == {"m1", "m2", "w1"}
    assert sorted(task["ID"] for task in wait_running(m1, "web", 2)) == tasks
    events = m1.client().events(since=int(begun_at) - 1, until=int(time.time()) + 1, decode=True)
    evictions = [event for event in events if event["Action"] == "evict"]
    assert {event["Actor"]["ID"] for event in evictions} == {id}
    assert evictions[-1]["Actor"]["Attributes"]["done"] == "7/7"
    assert "@" in evictions[0]["Actor"]["Attributes"]["requestedBy"]

    # All managers come back with what they keep.
    for name in ("m1", "m2"):
        cluster.skep("kill", name)
    for name in ("m1", "m2"):
        cluster.skep("start", name)
    wait_until(lambda: m1.docker("secret", "ls", check=False).returncode == 0, "the managers are back", 60)
    assert "later" in m1.docker("secret", "ls").stdout


def told_at(cluster: TestCluster, event: str) -> float:
    """The time of the last ``event`` in m1's log; 0: never."""
    found = 0.0
    for line in (cluster.directory / "m1" / "skep.log").read_text().splitlines():
        if event in line:
            found = datetime.fromisoformat(json.loads(line)["timestamp"]).timestamp()
    return found
