"""Tables of networks on a real node: from the service to the files that the net process reads, over restarts."""

import os
import shutil
import signal
from typing import Any

import msgspec
import pytest

from skep.model.networks.tables import NetworkTable
from tests.support.machines.daemon_rig import INIT, DaemonRig, is_running, wait_until

WEB = {
    "Name": "web",
    "TaskTemplate": {"ContainerSpec": {"Image": "none", "Command": ["/bin/sleep", "1000"]}},
    "Mode": {"Replicated": {"Replicas": 2}},
    "EndpointSpec": {"Ports": [{"TargetPort": 80, "PublishedPort": 8080}]},
}


@pytest.fixture
def swarm(rig: DaemonRig) -> DaemonRig:
    """A node that is a manager."""
    rig.start()
    status, node_id = rig.ask("POST", "/v1.41/swarm/init", INIT)
    assert status == 200, node_id
    return rig


def tables(swarm: DaemonRig) -> dict[str, NetworkTable]:
    """What the net process finds."""
    directory = swarm.run / "tables"
    if not directory.is_dir():
        return {}
    found = [path for path in directory.iterdir() if not path.name.endswith(".new")]
    return {path.name: msgspec.msgpack.decode(path.read_bytes(), type=NetworkTable) for path in found}


def serving(swarm: DaemonRig, ingress: str) -> int:
    table = tables(swarm).get(ingress)
    return sum(one.is_serving for one in table.endpoints.values()) if table else 0


def test_a_published_service_is_in_the_tables_of_its_node_whatever_ends_and_comes_back(
    swarm: DaemonRig,
) -> None:
    (ingress,) = [network for network in swarm.get("/networks")[1] if network["Name"] == "ingress"]
    assert ingress["IPAM"]["Config"] == [{"Subnet": "10.0.0.0/24", "Gateway": "10.0.0.1"}]
    id, node_id = ingress["Id"], swarm.swarm()["NodeID"]
    assert tables(swarm) == {}
    status, response = swarm.ask("POST", "/v1.41/services/create", WEB)
    assert status == 201, response
    wait_until(lambda: serving(swarm, id) == 2, "both tasks serve in the table")
    table = tables(swarm)[id]
    (service,) = table.services.values()
    assert (service.name, service.ports[0].published, service.ports[0].target) == ("web", 8080, 80)
    assert list(table.nodes) == [node_id]
    assert table.nodes[node_id].underlay == "127.0.0.1"
    addresses = [*service.virtual_ips, *table.nodes[node_id].addresses]
    addresses += [address for one in table.endpoints.values() for address in one.addresses]
    assert len(set(addresses)) == 4
    assert sorted(one.name.rpartition(".")[0] for one in table.endpoints.values()) == ["web.1", "web.2"]
    assert [segment.vni for segment in table.head.segments] == [4096]
    assert sorted(path.name for path in (swarm.data / "networks/tables").iterdir()) == [id]

    # Without a manager the next node process has its tables at once.
    swarm.kill_all()
    state, away = swarm.data / "manager" / "etcd", swarm.data / "away"
    state.rename(away)
    state.touch()  # its manager does not come up
    swarm.start()
    wait_until(lambda: swarm.pid_of("net"), "the node process has started what it starts")
    assert tables(swarm)[id] == table
    swarm.kill_all()
    shutil.rmtree(swarm.run / "tables")  # as after a reboot
    swarm.start()
    wait_until(lambda: tables(swarm).get(id) == table, "the tables are there without a manager")

    swarm.kill_all()
    state.unlink()
    away.rename(state)
    swarm.start()
    wait_until(lambda: serving(swarm, id) == 2, "both tasks serve again", within_s=40)

    status, response = swarm.ask("DELETE", "/v1.41/services/web")
    assert status == 200, response
    wait_until(lambda: tables(swarm) == {}, "no service publishes a port", within_s=40)


def test_a_killed_manager_sends_the_same_again_and_goes_on(swarm: DaemonRig) -> None:
    (ingress,) = [network for network in swarm.get("/networks")[1] if network["Name"] == "ingress"]
    id = ingress["Id"]
    assert swarm.ask("POST", "/v1.41/services/create", WEB)[0] == 201
    wait_until(lambda: serving(swarm, id) == 2, "both tasks serve in the table")
    before = tables(swarm)[id]
    old = swarm.pid_of("manager")
    assert old is not None
    os.kill(old, signal.SIGKILL)
    wait_until(lambda: not is_running(old), "the manager is gone")
    assert tables(swarm)[id] == before
    wait_until(lambda: swarm.get("/nodes")[0] == 200, "the new manager answers", within_s=40)
    version = swarm.get("/v1.41/services/web")[1]["Version"]["Index"]
    more: dict[str, Any] = {**WEB, "Mode": {"Replicated": {"Replicas": 3}}}
    status, response = swarm.ask("POST", f"/v1.41/services/web/update?version={version}", more)
    assert status == 200, response
    wait_until(lambda: serving(swarm, id) == 3, "the third task serves too", within_s=40)
    after = tables(swarm)[id]
    assert after.revision > before.revision
    assert before.endpoints.items() <= after.endpoints.items()


def test_a_node_that_leaves_the_swarm_deletes_its_tables(swarm: DaemonRig) -> None:
    assert swarm.ask("POST", "/v1.41/services/create", WEB)[0] == 201
    wait_until(lambda: tables(swarm), "there is a table")
    assert swarm.ask("POST", "/swarm/leave?force=1")[0] == 200
    assert tables(swarm) == {}
    assert not (swarm.data / "networks/tables").exists()
    assert swarm.ask("POST", "/swarm/init", INIT)[0] == 200
    assert swarm.ask("POST", "/v1.41/services/create", WEB)[0] == 201
    wait_until(lambda: tables(swarm), "there is a table of the next swarm")
