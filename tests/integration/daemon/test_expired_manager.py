"""A single manager whose certificate expired while it was off; the clock is never set."""

import pytest

from skep.security import keypair
from skep.security.authority import Authority
from tests.support.machines.daemon_rig import INIT, DaemonRig, wait_until
from tests.support.security.roots import expire

pytestmark = [pytest.mark.needs("root", "etcd", "setpriv"), pytest.mark.timeout(120)]


def test_a_single_manager_renews_its_expired_certificate_itself_at_its_start(rig: DaemonRig) -> None:
    rig.start()
    assert rig.ask("POST", "/swarm/init", INIT)[0] == 200
    root = Authority.create()
    swarm = rig.get("/swarm")[1]
    spec = swarm["Spec"]
    spec["CAConfig"] |= {"SigningCACert": root.root_pem.decode(), "SigningCAKey": root.key_pem.decode()}
    version = swarm["Version"]["Index"]
    assert rig.ask("POST", f"/swarm/update?version={version}", spec)[0] == 200
    wait_until(
        lambda: rig.get("/swarm")[1]["TLSInfo"]["TrustRoot"] == root.root_pem.decode(), "the root is ours"
    )
    node_id = rig.swarm()["NodeID"]
    rig.stop()
    expired = expire(rig.data / "certificates", root, days_ago=40)

    rig.start()
    wait_until(lambda: state_of(rig, node_id) == "ready", "the node is ready")
    renewed = keypair.load(rig.data / "certificates")
    assert renewed.identity == expired.identity
    assert renewed.not_after > expired.not_after
    assert "this manager's certificate had expired and was renewed" in rig.log.read_text()


def state_of(rig: DaemonRig, node_id: str) -> str:
    status, node = rig.get(f"/nodes/{node_id}")
    return str(node["Status"]["State"]) if status == 200 else ""
